"""Opening a bundle: damage of every kind is found, and the wrong machine is refused before anything is loaded."""
from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import device
from runtime.bundle import _read_ahead, open_bundle
from runtime.errors import BundleError, DeviceError, InputError, ManifestError
from tests.runtime import tiny

COPY = "Copy the bundle again or rebuild it."


def flip(path: Path, at: int) -> None:
    """Change one bit of one byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def refusal(kind: type[Exception], path: Path, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        open_bundle(path, **options)
    assert type(caught.value) is kind
    return str(caught.value)


def target_with(bundle: Path, **changes: Any) -> None:
    target = json.loads((bundle / "manifest.json").read_text())["target"]
    tiny.edit_manifest(bundle, target={**target, **changes})


def test_weights_are_exact_read_only_views(toy: Path) -> None:
    found = open_bundle(toy)
    for name, expected in tiny.weights().items():
        array = found.weights[name]
        assert array.dtype == expected.dtype
        assert np.array_equal(array, expected)
        assert not array.flags.writeable
        assert not array.flags.owndata
        assert array.ctypes.data % 64 == 0


@pytest.mark.parametrize("has_large_pages", [True, False])
def test_weights_are_asked_for_in_large_pages_before_they_are_read(has_large_pages: bool) -> None:
    asked: list[int] = []

    class Mapping(mmap.mmap):
        def madvise(self, advice: int, *_: int) -> None:
            asked.append(advice)
            if not has_large_pages and advice == mmap.MADV_HUGEPAGE:
                raise OSError(22, "Invalid argument")  # what a kernel without them says

    _read_ahead(Mapping(-1, mmap.PAGESIZE))
    assert asked == [mmap.MADV_HUGEPAGE, mmap.MADV_WILLNEED]


@pytest.mark.parametrize("name", ["model.so", "tokenizer.json"])
@pytest.mark.parametrize("where", [0, -1])
def test_a_flipped_bit_in_a_file(bundle: Path, name: str, where: int) -> None:
    flip(bundle / name, where)
    assert refusal(BundleError, bundle) == f"{bundle / name}: is damaged: its SHA-256 is not the manifest's. {COPY}"


@pytest.mark.parametrize(("at", "chunk"), [(0, "0 to 511"), (512, "512 to 1023"), (1535, "1024 to 1535")])
def test_a_flipped_bit_in_the_weights(bundle: Path, at: int, chunk: str) -> None:
    path = bundle / "weights.bin"
    flip(path, at)
    assert refusal(BundleError, bundle) == (
        f"{path}: is damaged: the SHA-256 of bytes {chunk} is not the manifest's. {COPY}"
    )
    assert open_bundle(bundle, verify_weights=False).weights["head"].shape == (tiny.VOCAB, tiny.HIDDEN)


def test_every_flipped_byte_of_the_manifest(bundle: Path) -> None:
    path = bundle / "manifest.json"
    sound = path.read_bytes()
    for at in range(0, len(sound), 7):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        if json_or_none(path) != json.loads(sound):  # a flipped space is no damage
            refusal(ManifestError, bundle)


def json_or_none(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


@pytest.mark.parametrize("name", ["model.so", "tokenizer.json", "weights.bin"])
@pytest.mark.parametrize("verify", [True, False])
def test_truncated_and_missing_files(bundle: Path, name: str, verify: bool) -> None:
    path = bundle / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert refusal(BundleError, bundle, verify_weights=verify) == (
        f"{path}: has {len(data) - 1} bytes, but the manifest says {len(data)}. Copy the bundle again."
    )
    path.unlink()
    assert refusal(BundleError, bundle, verify_weights=verify) == (
        f"{path}: cannot be read: No such file or directory. Copy the bundle again."
    )
    path.mkdir()
    assert refusal(BundleError, bundle) == f"{path}: is not a regular file. Copy the bundle again."


def test_meanwhile_runs_during_the_check_and_nothing_of_a_damaged_bundle_comes_out(bundle: Path) -> None:
    seen: list[str] = []
    assert open_bundle(bundle, meanwhile=lambda found: seen.append(found.model.name)).weights
    assert seen == ["tiny"]
    flip(bundle / "weights.bin", 512)
    damaged = refusal(BundleError, bundle, meanwhile=lambda found: seen.append(found.library))
    assert seen == ["tiny", "model.so"]
    assert damaged == (
        f"{bundle / 'weights.bin'}: is damaged: the SHA-256 of bytes 512 to 1023 is not the manifest's. {COPY}"
    )

    def fails(_: object) -> None:
        raise InputError("first")

    assert refusal(InputError, bundle, meanwhile=fails) == "first"
    flip(bundle / "model.so", 0)  # code is checked before anybody gets a chance to load it
    assert "model.so: is damaged" in refusal(BundleError, bundle, meanwhile=lambda _: seen.append("too early"))
    assert "too early" not in seen


def test_what_is_no_bundle(tmp_path: Path) -> None:
    there = "Point at a directory that quern built."
    assert refusal(BundleError, tmp_path / "no") == f"{tmp_path / 'no'}: there is no such directory. {there}"
    assert refusal(BundleError, tmp_path) == f"{tmp_path}: has no manifest.json, so it is not a bundle. {there}"
    file = tmp_path / "file"
    file.write_text("")
    assert refusal(BundleError, file) == f"{file}: is not a directory. A bundle is a directory with a manifest.json."


def test_a_cpu_without_a_feature(bundle: Path) -> None:
    target_with(bundle, features=["amx_made_up", "zz_made_up"], cpu="later")
    assert refusal(DeviceError, bundle) == (
        f"{bundle}: cannot run here: it is built for native (later), but this CPU lacks amx_made_up, zz_made_up. "
        "Rebuild the bundle for this machine's target (python -m compiler targets)."
    )


def test_a_wrong_architecture_is_found_before_files_are_read(bundle: Path) -> None:
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[device.arch()]
    target_with(bundle, arch=other, name="rpi4")
    (bundle / "model.so").unlink()
    assert refusal(DeviceError, bundle) == (
        f"{bundle}: cannot run here: it is built for {other} (rpi4), but this machine is {device.arch()}. "
        "Rebuild the bundle for this machine's target (python -m compiler targets)."
    )


def test_a_later_glibc(bundle: Path) -> None:
    target_with(bundle, glibc="9.9")
    assert refusal(DeviceError, bundle) == (
        f"{bundle}: cannot run here: it needs glibc 9.9 or later, but this machine has glibc {device.glibc()}. "
        "Rebuild the bundle for this machine's target (python -m compiler targets)."
    )


def test_a_bundle_without_a_tokenizer(bundle: Path) -> None:
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    del files["tokenizer.json"]
    tiny.edit_manifest(bundle, files=files)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle).tokenizer  # noqa: B018
    assert str(caught.value) == (
        f"{bundle}: has no tokenizer.json, so it takes ids, not text. "
        "Use the logits command, or rebuild the bundle from a checkpoint that has a tokenizer."
    )
