"""Times every kernel that a session runs, one by one: TVM's virtual machine calls back before and after each.

Loaded by the measured process: the runtime is all it may import. Two reads of the clock and the way into Python and out
of it lie within every interval; the quickest call that does next to nothing says what that costs at least, and is told
with the times.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from typing import Any

from runtime import arrays
from runtime.ffi import TENSOR
from runtime.vm import Tensor, Vm

BUILTIN = "vm.builtin."  # the machine's own functions, which only move references, some in well under 0.1 us
FIRST = 4  # of a callback's values: what the function itself is called with
_OBJECT_BYTES = 24  # sizeof(TVMFFIObject); a tensor's first own field is the address of its data
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int32, ctypes.POINTER(ctypes.c_int64)
)


class KernelClock:
    """Watches a machine for as long as that lives; tensors: arrays that calls are told by, by name."""

    def __init__(self, vm: Vm, tensors: Mapping[str, Tensor]) -> None:
        self._names = {arrays.layout(tensor.array).address: name for name, tensor in tensors.items()}
        self._taken: dict[int, list[int]] = {}  # nanoseconds by the address of the function's name
        self._arguments: dict[int, list[str]] = {}
        self._started = 0
        vm.watch(_CALLBACK(self._seen))

    def _seen(self, _: Any, values: Any, count: int, result: Any) -> int:
        """A value is 16 bytes: what it is, then the value itself."""
        now = time.perf_counter_ns()
        name = values[3]
        if values[5]:
            if name not in self._taken:
                self._taken[name], self._arguments[name] = [], self._named(values, count)
            result[0] = 0  # None: go on
            self._started = time.perf_counter_ns()
        else:
            self._taken[name].append(now - self._started)
            result[0] = 0
        return 0

    def _named(self, values: Any, count: int) -> list[str]:
        """Which of the known arrays a call is given."""
        found = []
        for i in range(FIRST, count):
            if values[2 * i] & 0xFFFFFFFF == TENSOR:
                data = ctypes.c_void_p.from_address(values[2 * i + 1] + _OBJECT_BYTES).value
                found += [self._names[data]] if data in self._names else []
        return found

    def take(self) -> dict[str, Any]:
        """What ran since this was last asked. kernels: by name, `ns` of every call and the known arrays of one call;

        clock_ns: the cost of the measurement in every such number, at least: the quickest call of a builtin.
        """
        kernels, builtins = {}, []
        for place, taken in self._taken.items():
            name = ctypes.string_at(place).decode()
            if taken and name.startswith(BUILTIN):
                builtins.append(min(taken))
            elif taken:
                kernels[name] = {"ns": taken, "arguments": self._arguments[place]}
        self._taken, self._arguments = {}, {}
        return {"kernels": kernels, "clock_ns": min(builtins, default=0)}
