"""A bundle whose functions run on the CPU: TVM's virtual machine, arrays shared with it, buffers for what changes."""

from __future__ import annotations

from typing import NamedTuple, Optional

from . import arrays, device
from .arrays import Array
from .bundle import Bundle
from .errors import DeviceError
from .manifest import Function as Signature
from .vm import Function, Tensor, Vm


class Call(NamedTuple):
    """A bound function and the buffer its caller fills: ids i32[tokens] for steps, hidden f32[1, d] for the head.

    plain: the same function without tiles, which fill no faster for a few rows; None where `run` has none.
    """

    run: Function
    buffer: Array
    plain: Optional[Function] = None


class OnCpu:
    """`calls` by name; `span` i32[2], first position and number of valid rows, is read by every call.

    threads: of the kernels; tiles: whether AMX is used; device: None, the name of a GPU elsewhere. tensors: weights,
    caches and the span by name. vm: what measures kernels watches it.
    """

    device: Optional[str] = None

    def __init__(self, bundle: Bundle, threads: Optional[int], tiles: bool) -> None:
        self._functions = bundle.manifest.functions
        self._check_memory(bundle)
        wanted = tiles and any(f.tiled for f in self._functions.values())
        self.tiles = wanted and device.allow_tiles()  # asked before the first thread of the pool exists
        self.vm = Vm(bundle.library, bundle.manifest.tvm, threads)
        self.threads = self.vm.threads
        self.span = arrays.zeros((2,), "int32")
        caches = {c.name: arrays.zeros(c.shape, c.dtype) for c in bundle.manifest.caches}
        shared = {**bundle.weights, **caches, "span": self.span}
        self.tensors = {name: self.vm.tensor(array) for name, array in shared.items()}
        self.calls = {name: self._bind(name, f) for name, f in self._functions.items()}

    def _check_memory(self, bundle: Bundle) -> None:
        """Weights can be read again from the file, but caches and activations need real memory."""
        memory, have = bundle.manifest.memory, device.memory_bytes()
        needed = memory.cache_bytes + memory.activation_bytes
        if have is not None and needed > have:
            raise DeviceError(
                f"{bundle.path}: caches and activations need {needed >> 20} MiB, but this machine has "
                f"{have >> 20} MiB. "
                "Rebuild the bundle with a shorter context (python -m compiler build --context)."
            )

    def _bind(self, name: str, signature: Signature) -> Call:
        """Buffers of the function's own, and the shared arrays, in the order that its signature states."""
        if name == "head_1":
            hidden = next(f.output.shape[1] for n, f in self._functions.items() if n.startswith("prefill_"))
            own, buffer = "hidden", arrays.zeros((1, hidden), "float32")
        else:
            own, buffer = "ids", arrays.zeros((signature.tokens,), "int32")
        tensors: dict[str, Tensor] = {**self.tensors, own: self.vm.tensor(buffer)}
        inputs = [tensors[i] for i in signature.inputs]
        plain = self.vm.function(name, inputs)
        if not (self.tiles and signature.tiled):
            return Call(plain, buffer)
        return Call(self.vm.function(signature.tiled, inputs), buffer, plain)
