"""tvm-ffi's C ABI through ctypes: modules, functions, tensors, errors. Nothing of TVM's Python.

The structures below are those of tvm/ffi/c_api.h and dlpack.h (apache-tvm-ffi 0.1). Tensors are never copied.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

from . import arrays, device, tvm_libs
from .arrays import ALIGNMENT, Array
from .errors import VmError
from .manifest import TvmVersions

# TVMFFITypeIndex
NONE, INT, BOOL, RAW_STR, BYTES_PTR, SMALL_STR, STR, FUNCTION, TENSOR, MODULE = 0, 1, 2, 8, 9, 11, 65, 68, 70, 73
CPU = 1  # kDLCPU; also the VM's device type
_FIRST_OBJECT = 64  # type indices from here on are reference counted
_OBJECT_BYTES = 24  # sizeof(TVMFFIObject): what an object's own fields come after
_KIND_NAMES = {0: "int", 1: "uint", 2: "float"}  # of DLDataTypeCode


class Value(ctypes.Structure):  # TVMFFIAny
    """One argument or result. padding: of a short string, its length."""

    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_int64))


class _Bytes(ctypes.Structure):  # TVMFFIByteArray
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _ErrorCell(ctypes.Structure):  # TVMFFIErrorCell, its first fields
    _fields_ = (("kind", _Bytes), ("message", _Bytes))


class _Tensor(ctypes.Structure):  # DLTensor
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):  # DLManagedTensor
    _fields_ = (("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_SAFE_CALL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Value), ctypes.c_int32, ctypes.POINTER(Value)
)  # TVMFFISafeCallType


class Tensor:
    """An array as a TVM tensor over the same memory. It keeps the array; keep it as long as a call may use it."""

    def __init__(self, ffi: Ffi, array: Array) -> None:
        found = arrays.layout(array)
        self.array, rank = array, len(found.shape)
        shape = (ctypes.c_int64 * rank)(*found.shape)
        strides = (ctypes.c_int64 * rank)(*(1,) * rank)
        for axis in range(rank - 2, -1, -1):
            strides[axis] = strides[axis + 1] * found.shape[axis + 1]
        described = _Tensor(found.address, CPU, 0, rank, found.code, found.bits, 1, shape, strides, 0)
        # No deleter: TVM only borrows. The structures must outlive the handle, so both live in this object.
        self._managed = _ManagedTensor(described, None, None)
        self._keep = shape, strides
        self.handle = ffi.tensor_from_dlpack(self._managed)
        self._release = ffi.release

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._release(self.handle)


class _Output:
    """Owner of a tensor that TVM returned; views of it hold this object, and with it the memory."""

    __slots__ = ("_handle", "_release")

    def __init__(self, ffi: Ffi, handle: int) -> None:
        self._release, self._handle = ffi.release, handle

    def __del__(self) -> None:
        self._release(self._handle)


class Ffi:
    """The loaded libraries. Use it in the thread that made it: TVM's pool is per thread.

    path and advice open and close the messages of VmErrors: whose code it is, and what to do about it.
    """

    def __init__(self, path: Path, built_with: Optional[TvmVersions], threads: Optional[int], advice: str) -> None:
        self.path, self._advice = path, advice
        self.libraries = tvm_libs.load(built_with, threads)
        self.threads = self.libraries.threads
        ffi = self.libraries.ffi
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        # A CDLL of our own would share function objects with others in the process: prototypes make private ones.
        prototype = ctypes.CFUNCTYPE
        self.call_raw = prototype(integer, pointer, pointer, ctypes.c_int32, pointer)(("TVMFFIFunctionCall", ffi))
        self.release = prototype(integer, pointer)(("TVMFFIObjectDecRef", ffi))
        self._from_dlpack = prototype(integer, pointer, ctypes.c_int32, ctypes.c_int32, pointer)(
            ("TVMFFITensorFromDLPack", ffi)
        )
        self._get_global = prototype(integer, pointer, pointer)(("TVMFFIFunctionGetGlobal", ffi))
        self._move_error = prototype(None, pointer)(("TVMFFIErrorMoveFromRaised", ffi))
        self._owned: list[int] = []  # handles given back with this object
        self._callbacks: list[Any] = []  # kept: C has their addresses
        self._get_function = self.global_function("ffi.ModuleGetFunction")

    def load_module(self, path: Path) -> Value:
        """Load a shared library as a TVM module, which lives as long as this object."""
        text = str(path.resolve()).encode()
        name = ctypes.create_string_buffer(text)
        load = self.global_function("ffi.ModuleLoadFromFile")
        module = self.own(self.call(load, "loading", Value(RAW_STR, 0, ctypes.addressof(name))))
        if module.type_index != MODULE:
            raise VmError(f"{path}: is no TVM module. {self._advice}.")
        return module

    def start_pool(self) -> None:
        """Start TVM's threads now, then bind ourselves to the one CPU that TVM left free for us.

        TVM binds its workers to a CPU each but lets the caller wander, so the caller may land on a worker's CPU and
        both run at half speed for a tenth of a second or more.
        """
        if self.threads == 1:
            return
        self.call(self.global_function("runtime.NumThreads"), "runtime.NumThreads")
        if os.environ.get("TVM_BIND_THREADS", "1") != "1" or self.threads > len(device.affinity()):
            return
        os.sched_setaffinity(0, {device.fastest(device.affinity())})

    def method(self, module: Value, name: str) -> int:
        """Handle of a module's function."""
        text = ctypes.create_string_buffer(name.encode())
        arguments = (module, Value(RAW_STR, 0, ctypes.addressof(text)), Value(BOOL, 0, 1))
        found = self.call(self._get_function, name, *arguments)
        if self.own(found).type_index != FUNCTION:
            raise VmError(f"{self.path}: has no function {name!r}. {self._advice}.")
        return int(found.value)

    def own(self, value: Value) -> Value:
        """Give the value back with this object."""
        if value.type_index >= _FIRST_OBJECT:
            self._owned.append(value.value)
        return value

    def __del__(self) -> None:
        for handle in reversed(getattr(self, "_owned", [])):
            self.release(handle)

    def global_function(self, name: str) -> int:
        """Handle of a function of TVM's global table."""
        found = ctypes.c_void_p()
        if self._get_global(ctypes.byref(_bytes(name.encode())), ctypes.byref(found)) or not found.value:
            raise VmError(
                f"{self.libraries.found.runtime}: has no {name}. Install the wheels that the bundle was built with."
            )
        self._owned.append(found.value)
        return found.value

    def register(self, name: str, function: Callable[..., Union[str, bytes, int, None]]) -> None:
        """Put a Python function into TVM's global table. It gets strings and integers; what it raises, C++ gets."""

        def safe_call(_: Any, values: Any, count: int, result: Any) -> int:
            try:
                self._give(result, function(*(_plain(values[i]) for i in range(count))))
            except BaseException as error:  # nothing may unwind through C
                kind, message = type(error).__name__, str(error).replace("\0", "")
                self.libraries.ffi.TVMFFIErrorSetRaisedFromCStr(kind.encode(), message.encode(errors="replace"))
                return -1
            return 0

        made = self.function_of(_SAFE_CALL(safe_call), name)
        if self.libraries.ffi.TVMFFIFunctionSetGlobal(ctypes.byref(_bytes(name.encode())), made, 1):
            raise self.error(f"registering {name}")

    def function_of(self, callback: Any, name: str) -> ctypes.c_void_p:
        """A TVM function of a ctypes callback with the four arguments of _SAFE_CALL; both live as long as this object.

        ctypes prints what such a callback raises, and C++ never hears of it.
        """
        made = ctypes.c_void_p()
        self._callbacks.append(callback)
        if self.libraries.ffi.TVMFFIFunctionCreate(None, callback, None, ctypes.byref(made)):
            raise self.error(f"making a function of {name}")
        return made

    def _give(self, result: Any, value: Union[str, bytes, int, Value, None]) -> None:
        """Store what a callback returns; an object that it returns is given away."""
        out = result.contents
        if value is None:
            out.type_index, out.padding, out.value = NONE, 0, 0
        elif isinstance(value, int):
            out.type_index, out.padding, out.value = INT, 0, value
        elif isinstance(value, Value):
            out.type_index, out.padding, out.value = value.type_index, value.padding, value.value
        else:
            ffi = self.libraries.ffi
            make = ffi.TVMFFIStringFromByteArray if isinstance(value, str) else ffi.TVMFFIBytesFromByteArray
            if make(ctypes.byref(_bytes(value.encode() if isinstance(value, str) else value)), result):
                raise self.error("returning text")

    def call(self, handle: int, what: str, *arguments: Value) -> Value:
        """Call a function; `what` names it in the VmError when it fails."""
        result = Value()
        packed = (Value * len(arguments))(*arguments)
        if self.call_raw(handle, packed, len(arguments), ctypes.byref(result)):
            raise self.error(what)
        return result

    def tensor(self, array: Array) -> Tensor:
        """An array as an argument, without a copy."""
        return Tensor(self, array)

    def tensor_from_dlpack(self, managed: _ManagedTensor) -> int:
        """Handle of a new TVM tensor that borrows the memory which `managed` describes."""
        handle = ctypes.c_void_p()
        if self._from_dlpack(ctypes.byref(managed), ALIGNMENT, 1, ctypes.byref(handle)) or not handle.value:
            raise self.error("wrapping an array")
        return handle.value

    def view(self, handle: int) -> Array:
        """A returned tensor as a read-only array that owns the handle."""
        tensor = _Tensor.from_address(handle + _OBJECT_BYTES)
        shape, dtype = tuple(tensor.shape[: tensor.ndim]), f"{_KIND_NAMES[tensor.code]}{tensor.bits}"
        return arrays.at(tensor.data + tensor.byte_offset, shape, dtype, _Output(self, handle))

    def release_any(self, value: Value) -> None:
        """Give back what a call returned, when it is reference counted."""
        if value.type_index >= _FIRST_OBJECT:
            self.release(value.value)

    def error(self, what: str) -> VmError:
        """The error that TVM raised in this thread, as our exception."""
        handle = ctypes.c_void_p()
        self._move_error(ctypes.byref(handle))
        if not handle.value:
            return VmError(f"{self.path}: {what} failed and TVM gave no reason. {self._advice}.")
        cell = _ErrorCell.from_address(handle.value + _OBJECT_BYTES)
        kind, message = (
            ctypes.string_at(part.data, part.size).decode(errors="replace").strip()
            for part in (cell.kind, cell.message)
        )
        self.release(handle)
        return VmError(f"{self.path}: {what} failed: {kind}: {message}. {self._advice} with this release of quern.")


def _bytes(text: bytes) -> _Bytes:
    """A view of bytes; the structure keeps them."""
    buffer = ctypes.create_string_buffer(text, len(text) + 1)
    made = _Bytes(ctypes.addressof(buffer), len(text))
    made._buffer = buffer
    return made


def _plain(value: Value) -> Union[str, bytes, int, None]:
    """An argument of a callback."""
    if value.type_index == NONE:
        return None
    if value.type_index in (INT, BOOL):
        return int(value.value)
    if value.type_index == RAW_STR:
        return ctypes.string_at(value.value).decode()
    if value.type_index == SMALL_STR:
        return ctypes.string_at(ctypes.addressof(value) + 8, value.padding).decode()
    if value.type_index in (STR, BYTES_PTR):
        place = value.value + (_OBJECT_BYTES if value.type_index == STR else 0)
        found = _Bytes.from_address(place)
        raw = ctypes.string_at(found.data, found.size)
        return raw.decode() if value.type_index == STR else raw
    raise TypeError(f"an argument has type {value.type_index}, which is no text and no integer")
