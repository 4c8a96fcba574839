"""One .safetensors file: the header checked down to the last byte, tensors as read-only views of the mapped file.

Layout: u64 header length, JSON header {name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {str: str}},
data. Offsets count from the start of the data. Tensors must tile the data: no overlap, no hole, nothing at the end.
"""
from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from compiler.checkpoint import strict_json
from compiler.checkpoint.strict_json import shown
from compiler.errors import CheckpointError

HEADER_CAP = strict_json.MAX_FILE_BYTES  # 178 000 tensors, the largest real case we know of, take 23 MB
MAX_RANK = 8
METADATA = "__metadata__"
# As the file spells it -> (our name, how numpy stores it). numpy has no bfloat16 and no float8: their bits are given.
DTYPES = {
    "BOOL": ("bool", "u1"), "U8": ("uint8", "u1"), "I8": ("int8", "i1"),
    "F8_E4M3": ("float8_e4m3", "u1"), "F8_E5M2": ("float8_e5m2", "u1"),
    "U16": ("uint16", "<u2"), "I16": ("int16", "<i2"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2"),
    "U32": ("uint32", "<u4"), "I32": ("int32", "<i4"), "F32": ("float32", "<f4"),
    "U64": ("uint64", "<u8"), "I64": ("int64", "<i8"), "F64": ("float64", "<f8"),
}
STORAGE = dict(DTYPES.values())


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: dtype by our name ("float16", "bfloat16", ...), offset in bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors by name, and the metadata. Reads the header only. Raises CheckpointError naming the first thing wrong."""
    size = strict_json.file_bytes(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            data_start = 8 + length
            if size < 8:
                raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file. Fetch it again.")
            if length > HEADER_CAP or data_start > size:
                raise CheckpointError(
                    f"{path}: the header claims {length} bytes, but the file has {size} and a header at most "
                    f"{HEADER_CAP}. Either it was cut short, or it is not a safetensors file: fetch it again.")
            text = file.read(length)
    except OSError as problem:
        raise CheckpointError(f"{path}: {problem.strerror}. Check that it may be read.") from None
    header = strict_json.loads(text, str(path), CheckpointError)
    metadata = _metadata(path, header.pop(METADATA, {}))
    tensors = {name: _tensor(path, name, entry, data_start, size) for name, entry in header.items()}
    _check_tiling(path, tensors, data_start, size)
    return tensors, metadata


def map_file(path: Path) -> mmap.mmap:
    """The whole file, mapped read-only; pages come from disk when they are first touched."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{path} cannot be mapped into memory: {problem}.") from None


def read_ahead(mapped: mmap.mmap, info: TensorInfo) -> None:
    """Ask for the tensor's pages all at once: one long read, where touching them would make many short ones."""
    if info.nbytes and hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED, *_pages(info))


def drop_pages(mapped: mmap.mmap, info: TensorInfo) -> None:
    """Take the tensor's pages out of the process; they stay in the page cache while memory is plenty."""
    if info.nbytes and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, *_pages(info))


def _pages(info: TensorInfo) -> tuple[int, int]:
    """(start, length) in bytes, from the border of a page on."""
    start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
    return start, info.offset + info.nbytes - start


def view(mapped: mmap.mmap, info: TensorInfo) -> NDArray[Any]:
    """The tensor as a read-only array on the mapping, no copy. bfloat16 comes as uint16 bits, float8 as uint8.

    A dtype that is none of safetensors' is one of GGUF's block formats: u8[..., bytes of a row].
    """
    flat = np.frombuffer(mapped, np.uint8, info.nbytes, info.offset) if info.nbytes else np.empty(0, np.uint8)
    flat.flags.writeable = False
    if info.dtype in STORAGE:
        return flat.view(STORAGE[info.dtype]).reshape(info.shape)
    rows = math.prod(info.shape[:-1])
    return flat.reshape(*info.shape[:-1], info.nbytes // rows if rows else 0)


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"{path}: {METADATA} must map names to strings, not {shown(value)}. "
                              f"Fetch the file again.")
    return value


def _tensor(path: Path, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
    """One header entry, checked against itself and against the file's size."""
    def refuse(what: str) -> NoReturn:
        raise CheckpointError(f"{path}: tensor {shown(name)} {what}. The file is damaged: fetch it again.")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse(f"is described by {shown(entry)}, but needs dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse(f"has dtype {shown(dtype)}, but quern knows {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_RANK:
        refuse(f"has shape {shown(shape)}, but needs a list of at most {MAX_RANK} integers >= 0")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(f"has data_offsets {shown(offsets)}, but needs [begin, end] with 0 <= begin <= end")
    our_name, storage = DTYPES[dtype]
    nbytes = math.prod(shape) * np.dtype(storage).itemsize
    if nbytes != offsets[1] - offsets[0]:
        refuse(f"is {dtype} {shown(shape)}, which is {shown(nbytes)} bytes, but data_offsets {shown(offsets)} hold "
               f"{shown(offsets[1] - offsets[0])}")
    if data_start + offsets[1] > size:
        refuse(f"ends at byte {shown(data_start + offsets[1])}, but the file has only {size}")
    return TensorInfo(our_name, tuple(shape), path, data_start + offsets[0], nbytes)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """Every data byte belongs to exactly one tensor; a hole could carry anything, an overlap is two truths."""
    end, last = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset < end:
            raise CheckpointError(f"{path}: tensors {last} and {shown(name)} overlap at byte {info.offset}. "
                                  f"The file is damaged: fetch it again.")
        if info.offset > end:
            raise CheckpointError(f"{path}: bytes {end} to {info.offset} between {last} and {shown(name)} belong to no "
                                  f"tensor. The file is damaged: fetch it again.")
        end, last = info.offset + info.nbytes, shown(name)
    if end != size:
        raise CheckpointError(f"{path}: {size - end} bytes after {last} belong to no tensor. "
                              f"The file is damaged: fetch it again.")


def is_inside(name: str) -> bool:
    """True when `name` is a plain safetensors file name that cannot leave its folder."""
    return (name.endswith(".safetensors") and name.isprintable() and not name.startswith(".")
            and "/" not in name and "\\" not in name)
