"""The reader against a file worked out by hand, against the safetensors library, and against damaged files."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.checkpoint import safetensors as reader
from compiler.errors import CheckpointError
from tests.checkpoint.files import write_raw

AGAIN = "The file is damaged: fetch it again."


def test_two_tensors_by_hand(tmp_path: Path) -> None:
    text = (b'{"__metadata__":{"format":"pt"},"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},'
            b'"b":{"dtype":"BF16","shape":[1,1],"data_offsets":[8,10]}}  ')
    data = bytes([1, 0, 0, 0, 255, 255, 255, 255]) + bytes([0x80, 0x3F])
    path = write_raw(tmp_path / "x.safetensors", text, data)
    tensors, metadata = reader.read_header(path)
    start = 8 + len(text)
    assert metadata == {"format": "pt"}
    assert tensors == {"a": reader.TensorInfo("int32", (2,), path, start, 8),
                       "b": reader.TensorInfo("bfloat16", (1, 1), path, start + 8, 2)}
    mapped = reader.map_file(path)
    a, b = (reader.view(mapped, tensors[name]) for name in "ab")
    assert a.tolist() == [1, -1]
    assert b.tolist() == [[0x3F80]]  # the bits of 1.0
    assert not a.flags.writeable
    assert not a.flags.owndata


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    text = json.dumps({"s": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]},
                       "e": {"dtype": "F32", "shape": [0, 4], "data_offsets": [1, 1]}}).encode()
    path = write_raw(tmp_path / "x.safetensors", text, b"\x07")
    tensors, _ = reader.read_header(path)
    mapped = reader.map_file(path)
    assert int(reader.view(mapped, tensors["s"])) == 7
    assert reader.view(mapped, tensors["e"]).shape == (0, 4)


def test_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays = {str(kind): rng.integers(0, 100, (3, 5)).astype(kind)
              for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")}
    library.save_file(arrays, tmp_path / "x.safetensors", {"who": "safetensors"})
    tensors, metadata = reader.read_header(tmp_path / "x.safetensors")
    mapped = reader.map_file(tmp_path / "x.safetensors")
    assert metadata == {"who": "safetensors"}
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(reader.view(mapped, tensors[name]), array), name


def entry(dtype: Any = "U8", shape: Any = None, offsets: Any = None, **more: Any) -> dict[str, Any]:
    """The entry of a 4-byte tensor, with one thing changed."""
    return {"dtype": dtype, "shape": [4] if shape is None else shape,
            "data_offsets": [0, 4] if offsets is None else offsets, **more}


DAMAGED_ENTRIES = {
    "missing key": ({"dtype": "U8", "shape": [4]}, """is described by {"dtype": "U8", "shape": [4]}, but needs """
                    "dtype, shape and data_offsets and nothing else"),
    "not an object": (7, "is described by 7, but needs dtype, shape and data_offsets and nothing else"),
    "dtype": (entry(dtype="F4"), f"has dtype 'F4', but quern knows {', '.join(reader.DTYPES)}"),
    "unhashable dtype": (entry(dtype=[]), f"has dtype [], but quern knows {', '.join(reader.DTYPES)}"),
    "negative size": (entry(shape=[-4]), "has shape [-4], but needs a list of at most 8 integers >= 0"),
    "fraction": (entry(shape=[4.0]), "has shape [4.0], but needs a list of at most 8 integers >= 0"),
    "boolean": (entry(shape=[True]), "has shape [true], but needs a list of at most 8 integers >= 0"),
    "rank": (entry(shape=[1] * 9),
             "has shape [1, 1, 1, 1, 1, 1, 1, 1, 1], but needs a list of at most 8 integers >= 0"),
    "backwards": (entry(offsets=[4, 0]), "has data_offsets [4, 0], but needs [begin, end] with 0 <= begin <= end"),
    "three offsets": (entry(offsets=[0, 2, 4]),
                      "has data_offsets [0, 2, 4], but needs [begin, end] with 0 <= begin <= end"),
    "size": (entry(dtype="F32"), "is F32 [4], which is 16 bytes, but data_offsets [0, 4] hold 4"),
    "huge": (entry(shape=[2**62, 2**62]), "is U8 [4611686018427387904, 4611686018427387904], which is "
             "21267647932558653966460912964485513216 bytes, but data_offsets [0, 4] hold 4"),
    "truncated": (entry(shape=[9], offsets=[0, 9]), "ends at byte 77, but the file has only 72"),
}


@pytest.mark.parametrize("case", DAMAGED_ENTRIES)
def test_refuses_a_damaged_entry(tmp_path: Path, case: str) -> None:
    value, what = DAMAGED_ENTRIES[case]
    path = write_raw(tmp_path / "x.safetensors", json.dumps({"t": value}).encode(), b"abcd")
    with pytest.raises(CheckpointError) as error:
        reader.read_header(path)
    assert str(error.value) == f"{path}: tensor 't' {what}. {AGAIN}"


DAMAGED_HEADERS = {
    "not JSON": (b"{]", "not JSON (Expecting property name enclosed in double quotes at character 1)"),
    "a list": (b"[1]", "a JSON object is needed, not list"),
    "not text": (b"\xff\xfe", "not UTF-8 text"),
    "twice": (b'{"t":1,"t":2}', "the key 't' stands twice"),
    "NaN": (b'{"t":NaN}', "NaN is not a JSON number"),
    "digits": (b'{"t":-' + b"9" * 21 + b"}", "an integer has more than 20 digits"),
    "many digits": (b'{"t":' + b"9" * 5000 + b"}", "an integer has more than 20 digits"),
    "deep": (b'{"t":' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper than 32 levels"),
    "very deep": (b'{"t":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 32 levels"),
}


@pytest.mark.parametrize("case", DAMAGED_HEADERS)
def test_refuses_a_damaged_header(tmp_path: Path, case: str) -> None:
    text, what = DAMAGED_HEADERS[case]
    path = write_raw(tmp_path / "x.safetensors", text)
    with pytest.raises(CheckpointError) as error:
        reader.read_header(path)
    assert str(error.value) == f"{path}: {what}. The file is damaged or was edited by hand: fetch it again."


def test_refuses_wrong_lengths(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"1234567")
    with pytest.raises(CheckpointError) as error:
        reader.read_header(path)
    assert str(error.value) == f"{path} has 7 bytes, too few for a safetensors file. Fetch it again."
    for length in (3, 2**63 - 1, 2**64 - 1):
        write_raw(path, b"{}", length=length)
        with pytest.raises(CheckpointError) as error:
            reader.read_header(path)
        assert str(error.value) == (
            f"{path}: the header claims {length} bytes, but the file has 10 and a header at most 33554432. Either it "
            f"was cut short, or it is not a safetensors file: fetch it again.")


def layout(tmp_path: Path, spans: dict[str, tuple[int, int]], size: int) -> str:
    entries = {name: entry(shape=[end - begin], offsets=[begin, end]) for name, (begin, end) in spans.items()}
    path = write_raw(tmp_path / "x.safetensors", json.dumps(entries).encode(), bytes(size))
    with pytest.raises(CheckpointError) as error:
        reader.read_header(path)
    start = path.stat().st_size - size
    return str(error.value).removeprefix(f"{path}: ").replace(f" {AGAIN}", "").replace(str(start + 4), "START+4")


def test_refuses_overlaps_holes_and_leftovers(tmp_path: Path) -> None:
    assert layout(tmp_path, {"a": (0, 6), "b": (4, 8)}, 8).startswith("tensors 'a' and 'b' overlap at byte START+4.")
    assert layout(tmp_path, {"a": (4, 8)}, 8).endswith("to START+4 between the header and 'a' belong to no tensor.")
    assert layout(tmp_path, {"a": (0, 4)}, 9) == "5 bytes after 'a' belong to no tensor."
    assert layout(tmp_path, {}, 1) == "1 bytes after the header belong to no tensor."


def test_refuses_metadata_that_is_not_strings(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", b'{"__metadata__":{"a":1}}')
    with pytest.raises(CheckpointError) as error:
        reader.read_header(path)
    assert str(error.value) == f'{path}: __metadata__ must map names to strings, not {{"a": 1}}. Fetch the file again.'


def test_refuses_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        reader.read_header(tmp_path)
    assert str(error.value) == f"{tmp_path} is not a regular file. Put the file itself there."
    with pytest.raises(CheckpointError) as error:
        reader.read_header(tmp_path / "no")
    assert str(error.value) == (f"{tmp_path / 'no'}: No such file or directory. "
                                f"Check that the checkpoint was copied whole.")
