"""The bundle's folder: complete or absent, whatever happens, and nobody else's files are ever lost."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from compiler.codegen import bundle
from compiler.codegen.bundle import OLD, PARTIAL, BundleError
from runtime import manifest


def make(folder: Path, word: str = "new") -> None:
    """What `_foreign` looks at: a manifest that lists its files. The rest of it is the runtime's business."""
    folder.mkdir(exist_ok=True)
    (folder / "model.so").write_text(word)
    listed = {"format": manifest.FORMAT, "files": {"model.so": {}}}
    (folder / manifest.FILE_NAME).write_text(json.dumps(listed))


def failing(folder: Path, failure: type[BaseException]) -> None:
    make(folder)
    raise failure


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_it_appears_when_the_block_ends(out: Path) -> None:
    with bundle.staged(out) as folder:
        assert folder.parent == out.parent
        assert folder.name.startswith(f".out{PARTIAL}")
        make(folder)
        assert not out.exists()
    assert (names(out.parent), names(out)) == (["out"], ["manifest.json", "model.so"])
    assert out.stat().st_mode & 0o777 == 0o755


def test_it_replaces_an_older_one(out: Path) -> None:
    make(out, "old")
    with bundle.staged(out) as folder:
        make(folder)
        assert (out / "model.so").read_text() == "old"
    assert ((out / "model.so").read_text(), names(out.parent)) == ("new", ["out"])


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("older", [True, False])
def test_a_failure_leaves_what_was_there(out: Path, failure: type[BaseException], older: bool) -> None:
    if older:
        make(out, "old")
    with pytest.raises(failure), bundle.staged(out) as folder:
        failing(folder, failure)
    assert names(out.parent) == (["out"] if older else [])
    assert not older or (out / "model.so").read_text() == "old"


def test_an_interrupt_while_the_folder_is_made(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Path.mkdir

    def mkdir(path: Path, mode: int) -> None:
        made(path, mode)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(KeyboardInterrupt), bundle.staged(out):
        pass
    assert names(out.parent) == []


def test_a_full_disk_is_one_message(out: Path) -> None:
    """A write to an open file fails without the file's name."""
    with pytest.raises(BundleError) as refusal, bundle.staged(out):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(refusal.value) == (
        f"{out}: cannot be written: No space left on device. Make room, or choose another place."
    )
    assert names(out.parent) == []


def test_an_error_that_names_its_file_is_left_alone(out: Path) -> None:
    with pytest.raises(PermissionError, match="Permission denied"), bundle.staged(out):
        raise PermissionError(errno.EACCES, "Permission denied", "model.safetensors")


def test_the_older_one_comes_back_when_the_move_fails(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(out, "old")
    rename = Path.rename

    def stuck(self: Path, target: Path) -> Path:
        if target == out and not self.name.endswith(OLD):
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stuck)
    with pytest.raises(OSError, match="Input/output error"), bundle.staged(out) as folder:
        make(folder)
    assert ((out / "model.so").read_text(), names(out.parent)) == ("old", ["out"])


def test_leftovers_of_killed_builds_go(out: Path) -> None:
    make(out.parent / f".out{PARTIAL}1")
    (out.parent / f".out{PARTIAL}2").mkdir()
    for other in (f".out2{PARTIAL}1", f"out{PARTIAL}1"):  # another build's, and no hidden one
        make(out.parent / other)
    with bundle.staged(out) as folder:
        make(folder)
    assert names(out.parent) == [f".out2{PARTIAL}1", "out", f"out{PARTIAL}1"]


def test_a_second_build_to_the_same_place_is_refused(out: Path) -> None:
    with bundle.staged(out) as folder:
        make(folder)
        for attempt in (bundle.check_place, lambda place: bundle.staged(place).__enter__()):
            with pytest.raises(BundleError) as refusal:
                attempt(out)
            assert str(refusal.value) == (
                f"{out}: another build is writing it at this moment. Wait for its end, or give --out another name."
            )
        with bundle.staged(out.with_name("out2")) as other:
            make(other)
    assert (names(out.parent), names(out)) == (["out", "out2"], ["manifest.json", "model.so"])
    with bundle.staged(out) as folder:
        make(folder, "third")
    assert (out / "model.so").read_text() == "third"


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9 << 20, 6 << 20, 3 << 20))
    with bundle.staged(out, 3 << 20) as folder:
        make(folder)
    with pytest.raises(BundleError) as refusal, bundle.staged(out, 700 << 20):
        raise AssertionError("the block must not begin")
    assert str(refusal.value) == (
        f"{out}: takes 700 MiB to write, but its disk has 3 MiB left. Make room, or choose another place."
    )
    assert names(out.parent) == ["out"]


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    for name in (f".a{PARTIAL}1", f".[ab]{PARTIAL}1"):
        (tmp_path / name).mkdir()
    with bundle.staged(tmp_path / "[ab]") as folder:
        make(folder)
    assert names(tmp_path) == [f".a{PARTIAL}1", "[ab]"]


def test_killed_between_the_two_renames(out: Path) -> None:
    """The older bundle was moved away, the new one not yet in place: the next build, though it fails, gives it back."""
    make(out.parent / f".out{PARTIAL}1")
    make(out.parent / f".out{PARTIAL}1{OLD}", "old")
    with pytest.raises(ValueError, match="failed"), bundle.staged(out):
        raise ValueError("failed")
    assert ((out / "model.so").read_text(), names(out.parent)) == ("old", ["out"])


def test_somebody_still_writes_into_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the linker of an interrupted build does: the first attempts to delete the folder fail."""
    rmtree, attempts = shutil.rmtree, []

    def busy(path: Path, ignore_errors: bool = False) -> None:
        attempts.append(path)
        if len(attempts) > 2:
            rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", busy)
    with pytest.raises(KeyboardInterrupt), bundle.staged(out):
        raise KeyboardInterrupt
    assert (len(attempts), names(out.parent)) == (3, [])


def test_through_a_link(tmp_path: Path) -> None:
    make(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    with bundle.staged(tmp_path / "link") as folder:
        make(folder)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.so").read_text() == "new"
    assert names(tmp_path) == ["link", "real"]


def test_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with bundle.staged(Path()) as folder:
        make(folder)
    assert names(tmp_path / "here") == ["manifest.json", "model.so"]


FOREIGN = [
    ({"notes.txt": ""}, "notes.txt"),
    ({"manifest.json": "{}"}, "manifest.json"),  # a browser extension, a web page
    ({"manifest.json": '{"format": "quern-bundle"}', "model.so": ""}, "manifest.json"),
    ({"manifest.json": "[" * 100_000}, "manifest.json"),
    ({"manifest.json": '{"format": "quern-bundle", "files": {"a": 1}}', "a": "", "b": ""}, "b"),
    ({".hidden": ""}, ".hidden"),
]


@pytest.mark.parametrize(("files", "named"), FOREIGN, ids=range(len(FOREIGN)))
def test_a_folder_with_other_things_is_not_replaced(out: Path, files: dict[str, str], named: str) -> None:
    out.mkdir()
    for name, content in files.items():
        (out / name).write_text(content)
    with pytest.raises(BundleError) as refusal, bundle.staged(out):
        raise AssertionError("the work was not to begin")
    assert str(refusal.value) == (
        f"{out}: is a folder with {named!r} in it, which is no part of a bundle and would be lost: a build replaces "
        f"the whole folder. Give --out a new name."
    )
    assert names(out) == sorted(files)


def test_an_empty_folder_is_fine(out: Path) -> None:
    out.mkdir()
    bundle.check_place(out)


def test_a_folder_that_cannot_be_written_to(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(BundleError) as refusal:
        bundle.check_place(out)
    assert str(refusal.value) == (f"{out}: the folder {out.parent} cannot be written to. Give --out another place.")


def test_digests_by_hand(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"abcdefghij")
    (tmp_path / "model.so").write_bytes(b"abcdefghij")
    (tmp_path / manifest.FILE_NAME).write_text("cannot hold its own digest")
    known = manifest.FileDigest(10, "found while it was written", 4, ())
    found = bundle.digests(tmp_path, {"weights.bin": known})
    assert list(found) == ["model.so", "weights.bin"]
    assert (found["model.so"].bytes, found["model.so"].sha256) == (10, hashlib.sha256(b"abcdefghij").hexdigest())
    assert found["weights.bin"] is known
