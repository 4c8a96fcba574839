"""weights.bin: every array on its boundary, bit for bit, and readable as the runtime reads it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compiler.codegen import weights_file
from compiler.codegen.weights_file import ALIGNMENT, CHUNKS_AHEAD, LARGE, PAGE, Piece
from runtime.manifest import FileDigest, Weight, Weights, digest_file

Arrays = list[tuple[str, NDArray[Any]]]


def write(path: Path, arrays: Arrays) -> Weights:
    """Every array in one piece."""
    return weights_file.write(path, [Piece(name, str(a.dtype), a.shape, a) for name, a in arrays])[0]


def read(path: Path, weight: Weight) -> NDArray[Any]:
    """As runtime/bundle.py does: a view at the offset."""
    dtype = np.dtype("uint16" if weight.dtype == "bfloat16" else weight.dtype)
    return np.frombuffer(path.read_bytes(), dtype, weight.nbytes // dtype.itemsize, weight.offset).reshape(weight.shape)


def test_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    arrays: Arrays = [
        ("a", np.array([[1, 2, 3]], np.uint8)),
        ("b", np.array([1.0], np.float32)),
        ("c", np.array([0x3F80], np.uint16)),  # bfloat16 1.0
    ]
    assert write(path, arrays) == Weights(
        "weights.bin",
        64,
        (
            Weight("a", "uint8", (1, 3), 0, 3),
            Weight("b", "float32", (1,), 64, 4),
            Weight("c", "bfloat16", (1,), 128, 2),
        ),
    )
    assert path.read_bytes() == (
        b"\x01\x02\x03" + bytes(61) + b"\x00\x00\x80\x3f" + bytes(60) + b"\x80\x3f" + bytes(62)
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16", "int8", "uint8", "int16", "int32"])
def test_every_type_comes_back(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(7)
    arrays: Arrays = [
        (str(number), rng.integers(0, 256, size * np.dtype(dtype).itemsize, np.uint8).view(dtype).reshape(shape))
        for number, (size, shape) in enumerate([(6, (2, 3)), (1, (1,)), (128, (2, 4, 16)), (35, (5, 7))])
    ]
    written = write(tmp_path / "w", arrays)
    size = (tmp_path / "w").stat().st_size
    assert size % ALIGNMENT == 0
    for (name, array), weight in zip(arrays, written.tensors, strict=True):
        assert (weight.name, weight.shape, weight.nbytes) == (name, array.shape, array.nbytes)
        assert weight.offset % ALIGNMENT == 0
        assert weight.offset + weight.nbytes <= size
        back = read(tmp_path / "w", weight)
        assert back.dtype == array.dtype
        assert np.array_equal(back.view(np.uint8), array.view(np.uint8))


def test_a_large_array_begins_a_page(tmp_path: Path) -> None:
    large, small = np.ones(LARGE, np.uint8), np.ones(LARGE - 1, np.uint8)
    written = write(tmp_path / "w", [("a", small), ("b", large), ("c", small)])
    assert [w.offset for w in written.tensors] == [0, LARGE, 2 * LARGE]
    written = write(tmp_path / "w", [("a", small[:1]), ("b", large), ("c", small[:1]), ("d", small)])
    assert [w.offset for w in written.tensors] == [0, PAGE, PAGE + LARGE, PAGE + LARGE + ALIGNMENT]


def test_views_are_written_in_their_own_order(tmp_path: Path) -> None:
    """Transposed, strided and read-only arrays, as packing makes and mapped files give them."""
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    base.flags.writeable = False
    arrays: Arrays = [("transposed", base.T), ("strided", base[::2, 1::2]), ("reversed", base[::-1])]
    written = write(tmp_path / "w", arrays)
    for (_, array), weight in zip(arrays, written.tensors, strict=True):
        assert np.array_equal(read(tmp_path / "w", weight), array)


def test_few_pieces_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model passes through memory in pieces: all but the last few are in the file when one is asked for."""
    monkeypatch.setattr(weights_file, "CHUNK_BYTES", 1 << 16)
    path, seen = tmp_path / "w", []

    def pieces() -> Iterator[Piece]:
        for number in range(16):
            seen.append(path.stat().st_size >> 16)
            yield Piece(str(number // 2), "uint8", (2 << 16,), np.full(1 << 16, number, np.uint8))

    written, digest = weights_file.write(path, pieces())
    assert seen[0] == 0
    assert all(size >= number - CHUNKS_AHEAD for number, size in enumerate(seen))
    assert written.tensors[:2] == (Weight("0", "uint8", (2 << 16,), 0, 2 << 16),
                                   Weight("1", "uint8", (2 << 16,), 2 << 16, 2 << 16))  # fmt: skip
    assert read(path, written.tensors[0])[:: 1 << 16].tolist() == [0, 1]
    assert digest == digest_file(path, 1 << 16)


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path / "w", [("a", np.zeros(100, np.uint8))])


def test_pieces_that_do_not_add_up_are_our_bug(tmp_path: Path) -> None:
    half = Piece("a", "uint8", (2, 5), np.zeros((1, 5), np.uint8))
    for pieces in ([half], [half, half, half], [half, Piece("b", "uint8", (1,), np.zeros(1, np.uint8))]):
        with pytest.raises(AssertionError):
            weights_file.write(tmp_path / "w", pieces)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 128, 129, 1000])
def test_the_digest_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(weights_file, "CHUNK_BYTES", 128)
    pieces = [Piece(name, "uint8", (size,), np.arange(size).astype(np.uint8)) for name in "ab"[: 2 if size else 0]]
    digest = weights_file.write(tmp_path / "w", pieces)[1]
    assert digest == digest_file(tmp_path / "w", 128)
    assert isinstance(digest, FileDigest)


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    arrays: Arrays = [("a", np.arange(5, dtype=np.float32)), ("b", np.ones((3, 3), np.float16))]
    first, second = (write(tmp_path / name, arrays) for name in ("1", "2"))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert first.tensors == second.tensors
