"""One GGUF file: metadata and tensor headers, checked down to the last byte before anything is believed.

Layout, little-endian: "GGUF", u32 version (2 or 3), u64 tensors, u64 keys; keys: string name, u32 type, value; tensors:
string name, u32 rank, u64 sizes (fastest first), u32 type, u64 offset; padding; data. A string is u64 length and bytes.
Offsets count from the first multiple of general.alignment behind the header; tensors tile the data but for padding.

The `gguf` package reads the same files but believes them (it makes objects for every element a header claims, follows
nested arrays, and lets tensors overlap), so it is the oracle of the tests and not the reader.
"""
from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from compiler.checkpoint import safetensors, strict_json
from compiler.checkpoint.safetensors import TensorInfo
from compiler.checkpoint.strict_json import shown
from compiler.errors import CheckpointError, UnsupportedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MOST_ALIGNMENT = "general.alignment", 32, 1 << 16
# What a header may make us hold, whatever it claims: 250 000 tokens and 500 000 merges are the largest real cases.
MOST_HEADER_BYTES = 256 << 20
MOST_KEYS, MOST_TENSORS, MOST_STRINGS = 1 << 12, 1 << 16, 1 << 21
MOST_NAME_BYTES, MOST_RANK, SHORTEST_TENSOR = 256, 4, 32  # a name, a size, a type and an offset take 32 bytes at least
SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
BOOL, STRING, ARRAY = 7, 8, 9
# Type number -> (our name, weights a block, bytes a block), as ggml.h numbers them; all that files of today have.
TYPES = {
    0: ("float32", 1, 4), 1: ("float16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34), 10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144), 13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210),
    16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98), 19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136),
    24: ("int8", 1, 1), 25: ("int16", 1, 2), 26: ("int32", 1, 4), 27: ("int64", 1, 8), 28: ("float64", 1, 8),
    29: ("iq1_m", 256, 56), 30: ("bfloat16", 1, 2), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
}


@dataclass(frozen=True)
class GgufFile:
    """metadata: Python values, numeric arrays as numpy arrays, string arrays as lists. Shapes are row-major."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read(path: Path) -> GgufFile:
    """Headers of the file. Raises CheckpointError naming the first thing wrong, UnsupportedError for other versions."""
    size = strict_json.file_bytes(path)
    if size < 24:
        raise CheckpointError(f"{path} has {size} bytes, too few for a GGUF file. Fetch it again.")
    mapped = safetensors.map_file(path)
    try:
        return _Reader(path, mapped).file()
    finally:
        mapped.close()


class _Reader:
    """A place in the file; every read says first whether the file has that many bytes left."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self._path, self._data, self._at = path, mapped, 0
        self._strings = MOST_STRINGS

    def file(self) -> GgufFile:
        magic, version = self._take(4), self._number("<I")
        if magic != MAGIC:
            self._refuse(f"begins with {magic!r} and not with {MAGIC!r}: it is no GGUF file")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            order = " (it was written for a big-endian machine)" if swapped in VERSIONS else ""
            raise UnsupportedError(f"{self._path} is GGUF version {swapped if order else version}{order}, but quern "
                                   f"reads versions 2 and 3, little-endian. Convert the model again with a current "
                                   f"llama.cpp.")
        tensors, keys = self._number("<Q"), self._number("<Q")
        if tensors > min(MOST_TENSORS, len(self._data) // SHORTEST_TENSOR) or keys > MOST_KEYS:
            self._refuse(f"claims {tensors} tensors and {keys} keys, more than it can hold or any model has")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = self._string(1 << 16)
            if name in metadata:
                self._refuse(f"has the key {shown(name)} twice")
            metadata[name] = self._value(self._number("<I"), name)
        alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
            self._refuse(f"has {ALIGNMENT_KEY} {shown(alignment)}, which must be a power of two")
        found: dict[str, TensorInfo] = {}
        for _ in range(tensors):
            name, info = self._tensor()
            if name in found:
                self._refuse(f"has the tensor {shown(name)} twice")
            found[name] = info
        start = _aligned(self._at, alignment)
        placed = {name: TensorInfo(info.dtype, info.shape, info.file, info.offset + start, info.nbytes)
                  for name, info in found.items()}
        self._check_tiling(placed, start, alignment)
        return GgufFile(self._path, metadata, placed)

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._path} {what}. The file is damaged: fetch it again.")

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            self._refuse(f"ends at byte {len(self._data)}, in the middle of its header, which needs {count} bytes at "
                         f"{self._at}")
        if end > MOST_HEADER_BYTES:
            self._refuse(f"has a header of more than {MOST_HEADER_BYTES >> 20} MiB")
        taken = self._data[self._at:end]
        self._at = end
        return taken

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _string(self, most: int) -> str:
        length = self._number("<Q")
        if length > most:
            self._refuse(f"has a string of {length} bytes at {self._at}, where at most {most} may stand")
        raw = self._take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(f"has a string at {self._at - length} that is not UTF-8")

    def _value(self, kind: int, name: str) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == BOOL:
            return self._number("B") != 0
        if kind == STRING:
            return self._string(MOST_HEADER_BYTES)
        if kind != ARRAY:
            self._refuse(f"has the key {shown(name)} of type {kind}, which GGUF does not have")
        element, count = self._number("<I"), self._number("<Q")
        if element == STRING:
            self._strings -= count
            if self._strings < 0:
                self._refuse(f"has the key {shown(name)} with {count} strings, more than {MOST_STRINGS} in all")
            return [self._string(MOST_HEADER_BYTES) for _ in range(count)]
        if element != BOOL and element not in SCALARS:
            self._refuse(f"has the key {shown(name)}, an array of type {element}; arrays hold numbers or strings")
        dtype = np.dtype("?" if element == BOOL else SCALARS[element])
        raw = self._take(count * dtype.itemsize)
        return np.frombuffer(raw, np.uint8) != 0 if element == BOOL else np.frombuffer(raw, dtype)

    def _tensor(self) -> tuple[str, TensorInfo]:
        """One header; its offset still counts from the start of the data."""
        name = self._string(MOST_NAME_BYTES)
        rank = self._number("<I")
        if not 1 <= rank <= MOST_RANK:
            self._refuse(f"has tensor {shown(name)} of {rank} dimensions, but ggml knows 1 to {MOST_RANK}")
        shape = tuple(self._number("<Q") for _ in range(rank))[::-1]
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in TYPES:
            raise UnsupportedError(f"{self._path}: tensor {shown(name)} has the type {kind}, which quern does not "
                                   f"know. Take the model as Q4_K_M, Q5_K_M, Q6_K or Q8_0.")
        dtype, block, block_bytes = TYPES[kind]
        if shape[-1] % block:
            self._refuse(f"has tensor {shown(name)} with rows of {shape[-1]}, no multiple of {dtype}'s {block}")
        count = math.prod(shape)
        return name, TensorInfo(dtype, shape, self._path, offset, count // block * block_bytes)

    def _check_tiling(self, tensors: dict[str, TensorInfo], start: int, alignment: int) -> None:
        """Every tensor begins where the one before ends, on the next multiple of the alignment."""
        end, last = start, "the header"
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if info.offset != end:
                kind = "overlaps" if info.offset < end else "leaves a hole behind"
                self._refuse(f"has tensor {shown(name)} at byte {info.offset}, which {kind} {last}: byte {end} is next")
            if info.offset + info.nbytes > len(self._data):
                self._refuse(f"has {len(self._data)} bytes, but tensor {shown(name)} ends at byte "
                             f"{info.offset + info.nbytes}")
            end, last = _aligned(info.offset + info.nbytes, alignment), shown(name)
        if len(self._data) > max(end, start):
            self._refuse(f"has {len(self._data) - end} bytes after {last} that belong to no tensor")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
