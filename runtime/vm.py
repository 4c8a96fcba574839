"""Call the compiled functions of a bundle: tvm-ffi's C ABI through ctypes, nothing of TVM's Python.

The structures below are those of tvm/ffi/c_api.h and dlpack.h (apache-tvm-ffi 0.1). Arguments are bound once: a call
costs one ctypes call with a ready argument array. Inputs and outputs are never copied.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from . import arrays, device, tvm_libs
from .arrays import ALIGNMENT, Array
from .errors import VmError
from .manifest import TvmVersions

_NONE, _INT, _BOOL, _RAW_STR, _FUNCTION, _TENSOR, _MODULE = 0, 1, 2, 8, 68, 70, 73  # TVMFFITypeIndex
_FIRST_OBJECT = 64  # type indices from here on are reference counted
_OBJECT_BYTES = 24  # sizeof(TVMFFIObject): what an object's own fields come after
_CPU = 1  # kDLCPU; also the VM's device type
_POOLED = 2  # tvm::runtime::memory::AllocatorType::kPooled
_KIND_NAMES = {0: "int", 1: "uint", 2: "float"}  # of DLDataTypeCode


class _Any(ctypes.Structure):  # TVMFFIAny
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


class Tensor:
    """An array as a TVM tensor over the same memory. It keeps the array; keep it as long as a call may use it."""

    def __init__(self, vm: Vm, array: Array) -> None:
        found = arrays.layout(array)
        self.array, rank = array, len(found.shape)
        shape = (ctypes.c_int64 * rank)(*found.shape)
        strides = (ctypes.c_int64 * rank)(*(1,) * rank)
        for axis in range(rank - 2, -1, -1):
            strides[axis] = strides[axis + 1] * found.shape[axis + 1]
        described = _Tensor(found.address, _CPU, 0, rank, found.code, found.bits, 1, shape, strides, 0)
        # No deleter: TVM only borrows. The structures must outlive the handle, so both live in this object.
        self._managed = _ManagedTensor(described, None, None)
        self._keep = shape, strides
        self.handle = vm.tensor_from_dlpack(self._managed)
        self._release = vm.release

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._release(self.handle)


class _Output:
    """Owner of a tensor that TVM returned; views of it hold this object, and with it the memory."""

    __slots__ = ("_handle", "_release")

    def __init__(self, vm: Vm, handle: int) -> None:
        self._release, self._handle = vm.release, handle

    def __del__(self) -> None:
        self._release(self._handle)


class Function:
    """A VM function with its arguments bound. Calling it gives a read-only view of its one output tensor."""

    def __init__(self, vm: Vm, handle: int, name: str, arguments: Sequence[Tensor]) -> None:
        self._vm, self._handle, self.name, self._tensors = vm, handle, name, tuple(arguments)
        self._arguments = (_Any * len(arguments))(*(_Any(_TENSOR, 0, t.handle) for t in arguments))
        self._count = len(arguments)
        self._result = _Any()
        self._result_pointer = ctypes.byref(self._result)
        self._call = vm.call_raw

    def __call__(self) -> Array:
        """Run it. The view stays valid as long as it is held; the next call gives another one."""
        result = self._result
        result.type_index = _NONE
        if self._call(self._handle, self._arguments, self._count, self._result_pointer):
            raise self._vm.error(f"function {self.name!r}")
        if result.type_index != _TENSOR:
            self._vm.release_any(result)
            raise VmError(f"{self._vm.path}: function {self.name!r} gave no tensor. Rebuild the bundle.")
        return self._vm.view(result.value)


class Vm:
    """A Relax virtual machine over one shared library. Use it in the thread that made it: TVM's pool is per thread."""

    def __init__(self, path: Path, built_with: TvmVersions, threads: Optional[int] = None) -> None:
        self.path = path
        self._libraries = tvm_libs.load(built_with, threads)
        self.threads = self._libraries.threads
        ffi = self._libraries.ffi
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
        self._get_function = self._global("ffi.ModuleGetFunction")
        self._machine = self._start()
        self._start_pool()

    def function(self, name: str, arguments: Sequence[Tensor]) -> Function:
        """A function of the library with its arguments bound, in order."""
        return Function(self, self._method(self._machine, name), name, arguments)

    def tensor(self, array: Array) -> Tensor:
        """An array as an argument, without a copy."""
        return Tensor(self, array)

    def _start(self) -> _Any:
        """Load the library and initialise its VM on the CPU, as relax.VirtualMachine does."""
        load = self._global("ffi.ModuleLoadFromFile")
        text = str(self.path.resolve()).encode()
        name = ctypes.create_string_buffer(text)
        module = self._own(self._call(load, "loading", _Any(_RAW_STR, 0, ctypes.addressof(name))))
        if module.type_index != _MODULE:
            raise VmError(f"{self.path}: is no TVM module. Rebuild the bundle.")
        machine = self._own(self._call(self._method(module, "vm_load_executable"), "vm_load_executable"))
        device_and_allocator = [_Any(_INT, 0, n) for n in (_CPU, 0, _POOLED)]
        self._call(self._method(machine, "vm_initialization"), "vm_initialization", *device_and_allocator)
        return machine

    def _start_pool(self) -> None:
        """Start TVM's threads now, then bind ourselves to the one CPU that TVM left free for us.

        TVM binds its workers to a CPU each but lets the caller wander, so the caller may land on a worker's CPU and
        both run at half speed for a tenth of a second or more.
        """
        if self.threads == 1:
            return
        self._call(self._global("runtime.NumThreads"), "runtime.NumThreads")
        if os.environ.get("TVM_BIND_THREADS", "1") != "1" or self.threads > len(device.affinity()):
            return
        os.sched_setaffinity(0, {device.fastest(device.affinity())})

    def _method(self, module: _Any, name: str) -> int:
        text = ctypes.create_string_buffer(name.encode())
        found = self._call(
            self._get_function, name, module, _Any(_RAW_STR, 0, ctypes.addressof(text)), _Any(_BOOL, 0, 1)
        )
        if self._own(found).type_index != _FUNCTION:
            raise VmError(f"{self.path}: has no function {name!r}. Rebuild the bundle.")
        return int(found.value)

    def _own(self, value: _Any) -> _Any:
        if value.type_index >= _FIRST_OBJECT:
            self._owned.append(value.value)
        return value

    def __del__(self) -> None:
        for handle in reversed(getattr(self, "_owned", [])):
            self.release(handle)

    def _global(self, name: str) -> int:
        text = name.encode()
        found, buffer = ctypes.c_void_p(), ctypes.create_string_buffer(text)
        key = _Bytes(ctypes.addressof(buffer), len(text))
        if self._get_global(ctypes.byref(key), ctypes.byref(found)) or not found.value:
            raise VmError(
                f"{self._libraries.found.runtime}: has no {name}. Install the wheels that the bundle was built with."
            )
        self._owned.append(found.value)
        return found.value

    def _call(self, handle: int, what: str, *arguments: _Any) -> _Any:
        result = _Any()
        packed = (_Any * len(arguments))(*arguments)
        if self.call_raw(handle, packed, len(arguments), ctypes.byref(result)):
            raise self.error(what)
        return result

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

    def release_any(self, value: _Any) -> None:
        """Give back what a call returned, when it is reference counted."""
        if value.type_index >= _FIRST_OBJECT:
            self.release(value.value)

    def error(self, what: str) -> VmError:
        """The error that TVM raised in this thread, as our exception."""
        handle = ctypes.c_void_p()
        self._move_error(ctypes.byref(handle))
        if not handle.value:
            return VmError(f"{self.path}: {what} failed and TVM gave no reason. Rebuild the bundle.")
        cell = _ErrorCell.from_address(handle.value + _OBJECT_BYTES)
        kind, message = (
            ctypes.string_at(part.data, part.size).decode(errors="replace").strip()
            for part in (cell.kind, cell.message)
        )
        self.release(handle)
        return VmError(f"{self.path}: {what} failed: {kind}: {message}. Rebuild the bundle with this release of quern.")
