"""What a self-contained bundle carries: pinned, checked wherever it comes from, and said plainly when it is missing."""
from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import zipfile
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from compiler.codegen import carried
from compiler.codegen.carried import PARTS, CarryError
from runtime import run

REPO = Path(__file__).parents[2]
CONTENT = b"\x7fELF a library"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no installed wheels to take libraries from."""
    monkeypatch.setenv("QUERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    return tmp_path / "cache" / "carried"


class Pip:
    """Stands for `pip download`: writes the wheel that the test wants, or fails as pip does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
        self.asked: list[list[str]] = []
        self._content = content
        monkeypatch.setattr(subprocess, "run", self)

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.asked.append(command)
        if self._content is None:
            said = "WARNING: Retrying\nERROR: No matching distribution found for thing==1.0\n"
            return subprocess.CompletedProcess(command, 1, "", said)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / WHEEL, "w") as archive:
            archive.writestr(zipfile.ZipInfo("thing/lib/libthing.so", carried.EPOCH), self._content)
        return subprocess.CompletedProcess(command, 0, "", "")


WHEEL = "thing-1.0-py3-none-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl"


@pytest.fixture
def thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> carried.Part:
    """The one part of a made-up pin."""
    with zipfile.ZipFile(tmp_path / "made", "w") as archive:
        archive.writestr(zipfile.ZipInfo("thing/lib/libthing.so", carried.EPOCH), CONTENT)
    digest = carried._sha256((tmp_path / "made").read_bytes())
    part = carried.Part(WHEEL, digest, "thing/lib/libthing.so", carried._sha256(CONTENT), 7)
    monkeypatch.setattr(carried, "PARTS", {"aarch64": (part,)})
    return part


def test_pins_are_the_compilers_own_wheels() -> None:
    """tokenizers differs: the compiler's has no wheel for Python 3.9."""
    pinned = (REPO / "pyproject.toml").read_text()
    for parts in PARTS.values():
        assert [part.name for part in parts] == ["libtvm_ffi.so", "libtvm_runtime.so", "tokenizers.abi3.so"]
        for part in parts[:2]:
            project, version = part.requirement.split("==")
            assert f'"{part.requirement}"' in pinned
            assert importlib.metadata.version(project) == version
        assert "-cp39-abi3-" in parts[2].wheel
    old = carried.OLD_PYTHON["aarch64"]
    assert old.name == "tokenizers.cpython-38-aarch64-linux-gnu.so" and fnmatch(old.name, run.OLD_TOKENIZER)


def test_licences_are_those_of_the_wheels(tmp_path: Path) -> None:
    """What the compiler's own wheels bring, word for word; tokenizers' brings none."""
    carried.write({}, tmp_path)
    text = (tmp_path / "licenses.txt").read_text()
    said = " ".join(text.split())
    libraries = [*(parts[2] for parts in PARTS.values()), *carried.OLD_PYTHON.values()]
    versions = {part.requirement.replace("==", " ") for part in libraries}
    assert all(f"{version}: Apache License 2.0" in said for version in versions)
    words = {
        "apache-tvm": ("tvm/NOTICE", "tvm/licenses/LICENSE.builtin_fp16.txt"),
        "apache-tvm-ffi": ("NOTICE", "tvm_ffi/3rdparty/libbacktrace/LICENSE"),
    }
    for project, names in words.items():
        files = importlib.metadata.files(project) or []
        for name in names:
            (found,) = (file for file in files if str(file).endswith(f"/{name}") or str(file) == name)
            own = found.read_text()
            own = own[own.rindex("Copyright (c) 2009-"):] if "builtin_fp16" in name else own
            assert " ".join(own.split()) in said, name
    assert text.endswith((REPO / "LICENSE").read_text().strip("\n") + "\n")


def test_fetched_once_then_offline(thing: carried.Part, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(monkeypatch, CONTENT)
    assert carried.fetch("aarch64") == {"libthing.so": CONTENT}
    assert pip.asked[0][-3:] == [
        "--platform=manylinux_2_27_aarch64", "--platform=manylinux_2_28_aarch64", "thing==1.0"
    ]
    assert carried.fetch("aarch64", offline=True) == {"libthing.so": CONTENT}
    assert len(pip.asked) == 1
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["libthing.so"]


def test_a_gpu_may_meet_an_old_python(thing: carried.Part, monkeypatch: pytest.MonkeyPatch) -> None:
    Pip(monkeypatch, CONTENT)
    old = replace(thing, member="thing/lib/libold.so", python="3.8")
    monkeypatch.setattr(carried, "OLD_PYTHON", {"aarch64": old})
    monkeypatch.setattr(carried, "_download", lambda part: CONTENT)
    assert list(carried.fetch("aarch64", tvm=False)) == ["libthing.so", "libold.so"]
    assert list(carried.fetch("aarch64")) == ["libthing.so"]


def test_a_damaged_cache_is_not_used(thing: carried.Part, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(monkeypatch, CONTENT)
    carried.fetch("aarch64")
    thing.cached.write_bytes(CONTENT[:-1])
    assert carried.fetch("aarch64") == {"libthing.so": CONTENT}
    assert len(pip.asked) == 2 and thing.cached.read_bytes() == CONTENT


def test_offline_says_what_is_missing(thing: carried.Part, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(monkeypatch, CONTENT)
    with pytest.raises(CarryError) as caught:
        carried.fetch("aarch64", offline=True)
    assert str(caught.value) == (
        "--self-contained: libthing.so for aarch64 must be fetched (7 MB of wheels), which --offline forbids. "
        f"Build once without --offline; from then on {cache} has them."
    )
    assert pip.asked == []


def test_another_wheel_is_refused_before_it_is_opened(
    thing: carried.Part, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pip(monkeypatch, b"something else")
    with pytest.raises(CarryError) as caught:
        carried.fetch("aarch64")
    said = str(caught.value)
    assert said.startswith(f"--self-contained: {WHEEL} came with the SHA-256 ")
    assert said.endswith(
        f", but quern was tested with {thing.wheel_sha256}. Do not use it; try again, and ask who runs the package "
        "index that pip uses."
    )
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_pips_own_reason_is_shown(thing: carried.Part, monkeypatch: pytest.MonkeyPatch) -> None:
    Pip(monkeypatch, None)
    with pytest.raises(CarryError) as caught:
        carried.fetch("aarch64")
    assert str(caught.value) == (
        "--self-contained: thing==1.0 cannot be fetched: No matching distribution found for thing==1.0. Check the "
        "network and pip's settings, then try again."
    )


def test_an_architecture_without_wheels() -> None:
    with pytest.raises(CarryError) as caught:
        carried.fetch("riscv64")
    assert str(caught.value) == (
        "--self-contained: the wheels that a bundle carries exist for aarch64 and x86_64, not for riscv64. "
        "Leave --self-contained out."
    )


def test_a_mistyped_option_is_no_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--caht"]) == 2
    said = "error: --caht is none of --chat, --serve, --info, --bench, --rpc-server. Options come after the prompt.\n"
    assert capsys.readouterr() == ("", said)


def test_the_runtime_is_whole_and_reproducible(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        carried.write({"lib.so": CONTENT}, tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and set(one) == {"lib.so", "licenses.txt", "run", "runtime.zip"}
    with zipfile.ZipFile(tmp_path / "one" / "runtime.zip") as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    sources = [path for path in (REPO / "runtime").glob("*.py") if path.name != "run.py"]
    assert packed == {f"runtime/{path.name}": path.read_bytes() for path in sources}
    assert (tmp_path / "one" / "run").stat().st_mode & 0o111
