"""Weights to a GPU: read once, checked on the way, whatever the sizes are."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime import device, manifest, upload
from runtime.bundle import Bundle
from runtime.errors import BundleError

STEP = 4096


class Gpu:
    """What was copied, and on which thread."""

    def __init__(self, size: int) -> None:
        self.memory, self.threads = bytearray(size), set[int]()

    def copy(self, place: int, data: Any, size: int) -> None:
        self.memory[place : place + size] = ctypes.string_at(data, size)
        self.threads.add(threading.get_ident())


def bundle(folder: Path, content: bytes, chunk_bytes: int | None = STEP, unchecked: bool = True) -> Bundle:
    """A folder with a weights file and as much of a manifest as an upload looks at."""
    (folder / "weights").write_bytes(content)
    digest = manifest.digest_file(folder / "weights", chunk_bytes)
    weights = SimpleNamespace(file="weights", tensors=("some",))
    return Bundle(folder, SimpleNamespace(weights=weights, files={"weights": digest}), {}, unchecked)  # type: ignore[arg-type]


def bytes_read() -> int:
    """By this process so far, with read() and its like."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("size", [1, STEP - 1, STEP, STEP + 1, 9 * STEP, 40 * STEP + 7])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_arrives_and_is_read_once(
    size: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "default_threads", lambda: threads)
    content, gpu = bytes(i * 7 % 251 for i in range(size)), Gpu(size)
    made = bundle(tmp_path, content)
    before = bytes_read()
    upload.upload(made, gpu.copy, evict=True)
    counting = bytes_read() - before - size  # what counting itself reads: one text of the kernel's
    assert bytes(gpu.memory) == content and gpu.threads == {threading.get_ident()}
    assert 0 <= counting < 200


@pytest.mark.parametrize("at", [0, STEP, 5 * STEP + 3, 9 * STEP])
@pytest.mark.parametrize("threads", [1, 3, 64])
def test_a_flipped_bit_is_refused(at: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "default_threads", lambda: threads)
    content = bytearray(9 * STEP + 1)
    made = bundle(tmp_path, bytes(content))
    content[at] ^= 4
    (tmp_path / "weights").write_bytes(content)
    first = at // STEP * STEP
    with pytest.raises(BundleError) as raised:
        upload.upload(made, Gpu(len(content)).copy, evict=False)
    assert str(raised.value) == (
        f"{tmp_path / 'weights'}: is damaged: the SHA-256 of bytes {first} to {min(first + STEP, len(content)) - 1} is "
        "not the manifest's. Copy the bundle again or rebuild it."
    )
    gpu = Gpu(len(content))
    upload.upload(replace(made, unchecked=False), gpu.copy, evict=False)  # --no-verify-weights
    assert gpu.memory == content


def test_a_file_with_one_digest(tmp_path: Path) -> None:
    gpu = Gpu(3 * STEP)
    upload.upload(bundle(tmp_path, b"x" * (3 * STEP), None), gpu.copy, evict=False)
    assert gpu.memory == b"x" * (3 * STEP)


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    made = bundle(tmp_path, b"x" * (3 * STEP))
    (tmp_path / "weights").write_bytes(b"x" * (2 * STEP + 5))
    with pytest.raises(BundleError) as raised:
        upload.upload(made, Gpu(3 * STEP).copy, evict=False)
    assert str(raised.value) == f"{tmp_path / 'weights'}: ends before byte {3 * STEP}. Copy the bundle again."


def test_a_copy_that_fails_ends_it(tmp_path: Path) -> None:
    def refuse(place: int, data: Any, size: int) -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        upload.upload(bundle(tmp_path, b"x" * (30 * STEP)), refuse, evict=False)
