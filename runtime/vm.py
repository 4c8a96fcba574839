"""Call the compiled functions of a bundle: a Relax virtual machine over its library, through ffi.py.

Arguments are bound once: a call costs one ctypes call with a ready argument array.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from .arrays import Array
from .errors import VmError
from .ffi import CPU, FUNCTION, INT, NONE, TENSOR, Ffi, Tensor, Value
from .manifest import TvmVersions

__all__ = ["Function", "Tensor", "Vm"]
_POOLED = 2  # tvm::runtime::memory::AllocatorType::kPooled


class Function:
    """A VM function with its arguments bound. Calling it gives a read-only view of its one output tensor."""

    def __init__(self, vm: Vm, handle: int, name: str, arguments: Sequence[Tensor]) -> None:
        self._vm, self._handle, self.name, self._tensors = vm, handle, name, tuple(arguments)
        self._arguments = (Value * len(arguments))(*(Value(TENSOR, 0, t.handle) for t in arguments))
        self._count = len(arguments)
        self._result = Value()
        self._result_pointer = ctypes.byref(self._result)
        self._call = vm.call_raw

    def __call__(self) -> Array:
        """Run it. The view stays valid as long as it is held; the next call gives another one."""
        result = self._result
        result.type_index = NONE
        if self._call(self._handle, self._arguments, self._count, self._result_pointer):
            raise self._vm.error(f"function {self.name!r}")
        if result.type_index != TENSOR:
            self._vm.release_any(result)
            raise VmError(f"{self._vm.path}: function {self.name!r} gave no tensor. Rebuild the bundle.")
        return self._vm.view(result.value)


class Vm(Ffi):
    """A Relax virtual machine over one shared library. Use it in the thread that made it: TVM's pool is per thread."""

    def __init__(self, path: Path, built_with: TvmVersions, threads: Optional[int] = None) -> None:
        super().__init__(path, built_with, threads, "Rebuild the bundle")
        self._machine = self._start()
        self.start_pool()

    def function(self, name: str, arguments: Sequence[Tensor]) -> Function:
        """A function of the library with its arguments bound, in order."""
        return Function(self, self.method(self._machine, name), name, arguments)

    def watch(self, callback: Any) -> None:
        """Have a ctypes callback called before and after every function that the machine calls from now on.

        Its arguments are those of TVMFFISafeCallType: (unused, values, count, result). values: the function, its name
        as RAW_STR, whether this is before, None or what it gave, then its own arguments.
        """
        made = self.function_of(callback, "a watching callback")
        self.call(self.method(self._machine, "set_instrument"), "set_instrument", Value(FUNCTION, 0, made.value))

    def _start(self) -> Value:
        """Load the library and initialise its VM on the CPU, as relax.VirtualMachine does."""
        module = self.load_module(self.path)
        machine = self.own(self.call(self.method(module, "vm_load_executable"), "vm_load_executable"))
        device_and_allocator = [Value(INT, 0, n) for n in (CPU, 0, _POOLED)]
        self.call(self.method(machine, "vm_initialization"), "vm_initialization", *device_and_allocator)
        return machine
