"""The GGUF container: a file by hand, the gguf package as the oracle, hostile headers."""
from __future__ import annotations

import contextlib
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler.checkpoint import gguf_file
from compiler.errors import CheckpointError, UnsupportedError, UserError
from compiler.quant.formats import open_source
from tests.checkpoint.gguf_files import key, open_gguf, raw, string, tensor, write_llama

AGAIN = "The file is damaged: fetch it again."
PEAK_BYTES = 4 << 20
DATA = np.arange(16, dtype=np.float32).tobytes()
TENSOR = tensor("t", (2, 8), 0, 0)


def refusal(path: Path, content: bytes, kind: type[UserError] = CheckpointError) -> str:
    path.write_bytes(content)
    with pytest.raises(kind) as error:
        gguf_file.read(path)
    assert type(error.value) is kind
    return str(error.value)


def test_a_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    numbers = string("n") + struct.pack("<IIQ3H", 9, 2, 3, 1, 2, 3)
    names = string("s") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("é")
    path.write_bytes(raw([key("k", "u32", 7), key("b", "bool", True), numbers, names], [TENSOR], DATA))
    file = gguf_file.read(path)
    assert file.metadata["k"] == 7
    assert file.metadata["b"] is True
    assert file.metadata["n"].tolist() == [1, 2, 3]
    assert file.metadata["s"] == ["a", "é"]
    info = file.tensors["t"]
    assert (info.dtype, info.shape, info.nbytes) == ("float32", (2, 8), 64)
    assert path.read_bytes()[info.offset:info.offset + info.nbytes] == DATA


def test_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", "Q4_K", value="Q6_K", down="Q5_0", head="Q8_0")
    mine, theirs = gguf_file.read(path), gguf.GGUFReader(path)
    assert [*mine.tensors] == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        info = mine.tensors[t.name]
        assert info.dtype == {"F16": "float16", "F32": "float32"}.get(t.tensor_type.name, t.tensor_type.name.lower())
        assert (info.shape, info.offset, info.nbytes) == (tuple(map(int, t.shape[::-1])), t.data_offset, t.n_bytes)
    for name, value in mine.metadata.items():
        read = theirs.fields[name].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == read, name


def test_block_sizes_are_those_of_ggml() -> None:
    floats = {"float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16"}
    for number, (name, weights, nbytes) in gguf_file.TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert floats.get(name, name.replace("int", "I").upper()) == kind.name
        assert gguf.GGML_QUANT_SIZES[kind] == (weights, nbytes)


@pytest.mark.parametrize(("content", "message"), [
    (b"GGUF", "P has 4 bytes, too few for a GGUF file. Fetch it again."),
    (raw([], [], b"x" * 32, magic=b"GGML"), f"P begins with b'GGML' and not with b'GGUF': it is no GGUF file. {AGAIN}"),
    (raw([], [], counts=(1 << 60, 0)),
     f"P claims 1152921504606846976 tensors and 0 keys, more than it can hold or any model has. {AGAIN}"),
    (raw([], [], counts=(0, 1 << 60)),
     f"P claims 0 tensors and 1152921504606846976 keys, more than it can hold or any model has. {AGAIN}"),
    (raw([string("k") + struct.pack("<IQ", 8, 1 << 60)], []),
     f"P has a string of 1152921504606846976 bytes at 45, where at most 268435456 may stand. {AGAIN}"),
    (raw([string("k") + struct.pack("<IIQ", 9, 4, 1 << 60)], []),
     f"P ends at byte 64, in the middle of its header, which needs 4611686018427387904 bytes at 49. {AGAIN}"),
    (raw([string("k") + struct.pack("<IIQ", 9, 8, 1 << 60)], []),
     f"P has the key 'k' with 1152921504606846976 strings, more than 2097152 in all. {AGAIN}"),
    (raw([string("k") + struct.pack("<IIQ", 9, 9, 1)], []),
     f"P has the key 'k', an array of type 9; arrays hold numbers or strings. {AGAIN}"),
    (raw([string("k") + struct.pack("<I", 13)], []),
     f"P has the key 'k' of type 13, which GGUF does not have. {AGAIN}"),
    (raw([key("k", "u8", 1)] * 2, []), f"P has the key 'k' twice. {AGAIN}"),
    (raw([key(b"\xff", "u8", 1)], []), f"P has a string at 32 that is not UTF-8. {AGAIN}"),
    (raw([key("general.alignment", "u32", 24)], []),
     f"P has general.alignment 24, which must be a power of two. {AGAIN}"),
    (raw([], [TENSOR, tensor("t", (2, 8), 0, 64)], DATA * 2), f"P has the tensor 't' twice. {AGAIN}"),
    (raw([], [tensor("t", (1,) * 5, 0, 0)], DATA),
     f"P has tensor 't' of 5 dimensions, but ggml knows 1 to 4. {AGAIN}"),
    (raw([], [tensor("t", (2, 8), 12, 0)], DATA),
     f"P has tensor 't' with rows of 8, no multiple of q4_k's 256. {AGAIN}"),
    (raw([], [tensor("t", (1 << 40, 1 << 20), 0, 0)], DATA),
     f"P has 160 bytes, but tensor 't' ends at byte {96 + (1 << 62)}. {AGAIN}"),
    (raw([], [TENSOR], DATA[:-1]), f"P has 159 bytes, but tensor 't' ends at byte 160. {AGAIN}"),
    (raw([], [TENSOR], DATA * 2), f"P has 64 bytes after 't' that belong to no tensor. {AGAIN}"),
    (raw([], [TENSOR, tensor("u", (2, 8), 0, 32)], DATA * 2),
     f"P has tensor 'u' at byte 160, which overlaps 't': byte 192 is next. {AGAIN}"),
    (raw([], [TENSOR, tensor("u", (2, 8), 0, 128)], DATA * 3),
     f"P has tensor 'u' at byte 256, which leaves a hole behind 't': byte 192 is next. {AGAIN}"),
])
def test_refuses_headers_that_lie(tmp_path: Path, content: bytes, message: str) -> None:
    assert refusal(tmp_path / "m.gguf", content).replace(str(tmp_path / "m.gguf"), "P") == message


def test_refuses_other_versions_and_types(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    reads = "but quern reads versions 2 and 3, little-endian. Convert the model again with a current llama.cpp."
    assert refusal(path, raw([], [], version=1), UnsupportedError) == f"{path} is GGUF version 1, {reads}"
    assert refusal(path, raw([], [], version=3 << 24), UnsupportedError) == (
        f"{path} is GGUF version 3 (it was written for a big-endian machine), {reads}")
    assert refusal(path, raw([], [tensor("t", (2, 8), 77, 0)]), UnsupportedError) == (
        f"{path}: tensor 't' has the type 77, which quern does not know. Take the model as Q4_K_M, Q5_K_M, Q6_K or "
        f"Q8_0.")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_llama(tmp_path_factory.mktemp("gguf") / "m.gguf", "Q4_K", embedding="Q6_K", head=None).read_bytes()


@settings(max_examples=150, deadline=4000, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 14000), st.sampled_from([0, 1, 2, 9, 12, 63, 127, 128, 255])),
                        min_size=1, max_size=4), cut=st.none() | st.integers(0, 20000))
def test_flipped_bytes_and_cuts(tmp_path: Path, whole: bytes, changes: list[tuple[int, int]], cut: int | None) -> None:
    content = bytearray(whole)
    for place, byte in changes:
        content[place] = byte
    path = tmp_path / "m.gguf"
    path.write_bytes(content if cut is None else content[:cut])
    tracemalloc.start()
    with contextlib.suppress(UserError):
        checkpoint = open_gguf(path)
        checkpoint.tokenizer_files()
        source = open_source(checkpoint)
        assert source.load("model.layers.0.self_attn.q_proj").type == source.describe("model.layers.0.self_attn.q_proj")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < PEAK_BYTES


@settings(max_examples=150, deadline=2000, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=200), counts=st.tuples(*[st.sampled_from([0, 1, 2, 3, 2**16, 2**63])] * 2))
def test_any_bytes(tmp_path: Path, tail: bytes, counts: tuple[int, int]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([], [tail], counts=counts))
    with contextlib.suppress(UserError):
        open_gguf(path)
