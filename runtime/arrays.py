"""Arrays over memory that somebody else owns: numpy's where numpy is installed, else the plain ones below.

A board may lack numpy, whose wheels are made for one Python each and larger than all the rest of this runtime. What the
runtime does with arrays is little: it fills small buffers, cuts rows, and passes addresses on.
"""

from __future__ import annotations

import ctypes
import mmap
import operator
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Union

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]
    NUMPY: bool
else:
    Array = Any
    try:
        import numpy as np
    except ImportError:
        np = None
    NUMPY = np is not None

__all__ = ["ALIGNMENT", "NUMPY", "Array", "Plain", "at", "integers", "layout", "mapped", "np", "zeros"]
ALIGNMENT = 64  # bytes: generated code may use aligned loads
# dtype of a manifest -> (DLDataTypeCode, letter of `array` and `memoryview`); two-byte floats are only passed on.
_KINDS = {
    "float32": (2, "f"),
    "float16": (2, "H"),
    "bfloat16": (1, "H"),  # neither numpy nor the compiled code's signature has it: the code takes the bits
    "uint16": (1, "H"),
    "int8": (0, "b"),
    "uint8": (1, "B"),
    "int16": (0, "h"),
    "int32": (0, "i"),
}
_NUMPY_NAMES = {"bfloat16": "uint16"}
_NUMPY_CODES = {"i": 0, "u": 1, "f": 2}


class Layout(NamedTuple):
    """Where an array lies and what it holds, in the terms of DLPack. code: 0 signed, 1 unsigned, 2 float."""

    address: int
    shape: tuple[int, ...]
    code: int
    bits: int


class Plain:
    """A C-contiguous array without numpy. It has len, rows by number, slices without a step, and assignment to them.

    owner: kept, because the memory is its.
    """

    def __init__(self, address: int, shape: Sequence[int], dtype: str, owner: object, writable: bool = True) -> None:
        self.address, self.shape, self.dtype, self._owner = address, tuple(shape), dtype, owner
        self._writable = writable
        count = 1
        for size in self.shape:
            count *= size
        letter: Any = _KINDS[dtype][1]
        self.nbytes = count * array(letter).itemsize
        memory = memoryview((ctypes.c_ubyte * self.nbytes).from_address(address)).cast("B").cast(letter)
        self.flat = memory if writable else memory.toreadonly()
        self._row = count // self.shape[0]  # elements a row

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Union[int, slice]) -> Any:
        """A number or row of its own shape for an int, an array of fewer rows for a slice; nothing is copied."""
        if isinstance(key, slice):
            start, stop, _ = key.indices(len(self))
            return self._part(start, (max(0, stop - start), *self.shape[1:]))
        index = range(len(self))[key]
        return self.flat[index] if len(self.shape) == 1 else self._part(index, self.shape[1:])

    def __setitem__(self, key: Union[int, slice], value: Any) -> None:
        """A number, or as many elements as the slice has, from a sequence or from an array of the same dtype."""
        if not isinstance(key, slice):
            self.flat[key] = value
            return
        start, stop, _ = key.indices(len(self))
        begin, end = start * self._row, max(start, stop) * self._row
        if isinstance(value, Plain):
            self.flat[begin:end] = value.flat
            return
        items = [value] * (end - begin) if isinstance(value, int) else value
        self.flat[begin:end] = memoryview(array(_KINDS[self.dtype][1], items))

    def copy(self) -> Plain:
        """The same in memory of its own."""
        fresh = plain_zeros(self.shape, self.dtype)
        fresh.flat[:] = self.flat
        return fresh

    def _part(self, first: int, shape: Sequence[int]) -> Plain:
        start = self.address + first * self._row * self.flat.itemsize
        return Plain(start, shape, self.dtype, self._owner, self._writable) if shape[0] else _empty(shape, self.dtype)


def _empty(shape: Sequence[int], dtype: str) -> Plain:
    hollow = Plain.__new__(Plain)
    hollow.address, hollow.shape, hollow.dtype, hollow.nbytes = 0, tuple(shape), dtype, 0
    hollow.flat, hollow._owner, hollow._row, hollow._writable = memoryview(array(_KINDS[dtype][1])), None, 1, True
    return hollow


def zeros(shape: Sequence[int], dtype: str) -> Array:
    """Zeros on an ALIGNMENT boundary. Untouched pages take no memory."""
    if not NUMPY:
        return _untyped(plain_zeros(shape, dtype))
    kind = np.dtype(_NUMPY_NAMES.get(dtype, dtype))
    size = kind.itemsize * int(np.prod(shape, dtype=np.int64))
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)


def plain_zeros(shape: Sequence[int], dtype: str) -> Plain:
    """Zeros in pages of their own, straight from the kernel."""
    size = array(_KINDS[dtype][1]).itemsize
    for count in shape:
        size *= count
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    anchor = ctypes.c_char.from_buffer(pages)
    return Plain(ctypes.addressof(anchor), shape, dtype, anchor)


def mapped(mapping: mmap.mmap, offset: int, shape: Sequence[int], dtype: str) -> Array:
    """A read-only view into a mapped file; it keeps the mapping."""
    if not NUMPY:
        return _untyped(Plain(_address(mapping) + offset, shape, dtype, mapping, writable=False))
    count = 1
    for size in shape:
        count *= size
    return np.frombuffer(mapping, np.dtype(_NUMPY_NAMES.get(dtype, dtype)), count, offset).reshape(shape)


def at(address: int, shape: Sequence[int], dtype: str, owner: object, writable: bool = False) -> Array:
    """A view, read-only unless asked, of memory that lives as long as `owner`."""
    if not NUMPY:
        return _untyped(Plain(address, shape, dtype, owner, writable))
    return np.asarray(_Interface(address, tuple(shape), np.dtype(dtype).str, owner, writable))


class _Interface:
    """What numpy asks a stranger's memory for; views hold this object, and with it the owner."""

    def __init__(self, address: int, shape: tuple[int, ...], kind: str, owner: object, writable: bool) -> None:
        self._owner = owner
        self.__array_interface__ = {"data": (address, not writable), "shape": shape, "typestr": kind, "version": 3}


def layout(given: Union[Array, Plain]) -> Layout:
    """Raises ValueError unless the array is C-contiguous on an ALIGNMENT boundary."""
    if isinstance(given, Plain):
        found, whole = Layout(given.address, given.shape, _KINDS[given.dtype][0], 8 * given.flat.itemsize), True
    else:
        whole = bool(given.flags.c_contiguous)
        found = Layout(given.ctypes.data, given.shape, _NUMPY_CODES[given.dtype.kind], 8 * given.itemsize)
    if not whole or found.address % ALIGNMENT:
        raise ValueError(f"a C-contiguous array on a {ALIGNMENT}-byte boundary is needed")
    return found


def integers(given: Any) -> list[int]:
    """A plain list of a sequence of integers; TypeError for anything else."""
    return [operator.index(item) for item in given]


def _untyped(made: Plain) -> Any:
    """The rest of the runtime is written against numpy's types, of which Plain has what it uses."""
    return made


class _Buffer(ctypes.Structure):  # Py_buffer: part of Python's stable interface, the same in all of 3.x
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _address(mapping: mmap.mmap) -> int:
    """Where a read-only mapping begins; ctypes' own from_buffer takes writable ones only."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(buffer), 0)
    start = int(buffer.buf)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return start
