"""One client's session on a board: TVM's RPC loop, which is in libtvm_runtime.so, and what tuning asks for beside it.

Any client of TVM may upload libraries, load and time them. `compiler/tune/board_worker.py` uploads too, and then calls:

  quern.about()               JSON, board.about and the version of tvm-ffi
  quern.gpu()                 JSON, rpc_cuda.about
  quern.open(JSON)            takes up a workload (the fields of Workload.__init__, or with "gpu": true those of
                              rpc_cuda.Workload.__init__); JSON, what was made
  quern.prepare(FILE)         loads a candidate's library and runs it once; JSON, its number or an error
  quern.outputs()             bytes of all outputs of the last kernel that `prepare` ran
  quern.time(JSON, rounds)    JSON of timing.times for these numbers, with `throttled`

A library that was loaded is mapped: it must not be sent again. Whoever may open a session may run anything as this
user: see rpc_server.py.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Optional, Union

from . import board, rpc_cuda, timing, tvm_libs
from .arrays import ALIGNMENT, Plain, plain_zeros
from .errors import InputError, UserError
from .ffi import NONE, RAW_STR, TENSOR, Ffi, Tensor, Value

PROTOCOL = 2
KERNEL = "main"  # the function of a candidate's library
UNWRITTEN = 77  # what outputs are filled with before a kernel is checked


class Workload:
    """One operator call under measurement.

    arguments, outs: dtype and shape each; arguments also offset in `file`, and whether they are streamed: of these
    there are as many copies as make least_bytes, and calls take turns with them.
    canaries: a library with `readers`, functions of a window of read_bytes, and with `spin`; `reader_out` and
    `spin_out` are shapes of int32.
    """

    def __init__(
        self,
        ffi: Ffi,
        load: Callable[[str], Value],
        path: Callable[[str], Path],
        *,
        file: str,
        arguments: Sequence[dict[str, Any]],
        outs: Sequence[dict[str, Any]],
        least_bytes: int,
        most_copies: int,
        canaries: str,
        readers: Sequence[str],
        read_bytes: int,
        reader_out: Sequence[int],
        spin_out: Sequence[int],
    ) -> None:
        self.ffi, self._result, self._turn = ffi, Value(), 0
        data, self._load = path(file).read_bytes(), load
        streamed = [a for a in arguments if a["streamed"]]
        one = sum(map(_padded, streamed))
        copies = timing.copies(one, least_bytes, most_copies)
        self._memory = _Arena(max(copies * one, read_bytes))
        held = [None if a["streamed"] else self._held(a, data) for a in arguments]
        self._plain_outs = [plain_zeros(out["shape"], out["dtype"]) for out in outs]
        self.outs = [self._tensor(out) for out in self._plain_outs]
        self._sets, place = [], 0
        for _ in range(copies):
            tensors = []
            for argument, own in zip(arguments, held):  # noqa: B905  strict= needs Python 3.10
                if own is None:
                    own = self._copied(argument, data, place)
                    place += _padded(argument)
                tensors.append(own)
            self._sets.append(_bound([*tensors, *self.outs]))
        self.functions: list[int] = []
        self.rotated_bytes = copies * one
        self.page_kib = timing.page_kib(self.rotated_bytes)
        module = load(canaries)
        starts = range(0, self._memory.nbytes - read_bytes + 1, read_bytes)
        windows = [self._tensor(self._memory.view(start, (read_bytes // 4,), "int32")) for start in starts]
        out = self._tensor(plain_zeros(reader_out, "int32"))
        self._windows, self._read_bytes = [_bound([window, out]) for window in windows], read_bytes
        self._spin_arguments = _bound([self._tensor(plain_zeros(spin_out, "int32"))])
        self._spin = ffi.method(module, "spin")
        self._reader = max((ffi.method(module, name) for name in readers), key=self._speed)

    def prepare(self, library: str) -> int:
        """Load a candidate and run it on the first copy; gives its number. Its results are in `outs`."""
        function = self.ffi.method(self._load(library), KERNEL)
        for out in self._plain_outs:
            ctypes.memset(out.address, UNWRITTEN, out.nbytes)
        self._call(function, self._sets[0])
        self.functions.append(function)
        return len(self.functions) - 1

    def outputs(self) -> bytes:
        """All outputs, one behind the other."""
        return b"".join(ctypes.string_at(out.address, out.nbytes) for out in self._plain_outs)

    def call(self, number: int) -> float:
        """Seconds of a candidate with the copies of the weights that have not been used for longest."""
        self._turn = (self._turn + 1) % len(self._sets)
        return timing.seconds(self._call, self.functions[number], self._sets[self._turn])

    def read(self) -> float:
        """GB/s of the fastest reader."""
        self._turn += 1
        window = self._windows[self._turn % len(self._windows)]
        return self._read_bytes / timing.seconds(self._call, self._reader, window) / 1e9

    def spin(self) -> float:
        """Seconds of the canary that counts clock cycles."""
        return timing.seconds(self._call, self._spin, self._spin_arguments)

    def _speed(self, reader: int) -> float:
        self._reader = reader
        return sorted(self.read() for _ in range(8))[4]

    def _call(self, function: int, bound: Any) -> None:
        self._result.type_index = NONE
        if self.ffi.call_raw(function, bound, len(bound), ctypes.byref(self._result)):
            raise self.ffi.error("a kernel")

    def _held(self, argument: dict[str, Any], data: bytes) -> Tensor:
        return self._filled(plain_zeros(argument["shape"], argument["dtype"]), argument, data)

    def _copied(self, argument: dict[str, Any], data: bytes, place: int) -> Tensor:
        return self._filled(self._memory.view(place, argument["shape"], argument["dtype"]), argument, data)

    def _filled(self, array: Plain, argument: dict[str, Any], data: bytes) -> Tensor:
        ctypes.memmove(array.address, data[argument["offset"] : argument["offset"] + array.nbytes], array.nbytes)
        return self._tensor(array)

    def _tensor(self, array: Any) -> Tensor:
        """Of an array of ours, whether there is numpy or not."""
        return Tensor(self.ffi, array)


class _Arena:
    """Fresh memory in pages as a mapped weights file would have them."""

    def __init__(self, nbytes: int) -> None:
        self._area, self.nbytes = timing.memory(nbytes), nbytes
        self._anchor = ctypes.c_char.from_buffer(self._area)

    def view(self, place: int, shape: Sequence[int], dtype: str) -> Plain:
        return Plain(ctypes.addressof(self._anchor) + place, shape, dtype, self)


def _padded(argument: dict[str, Any]) -> int:
    return -(-int(argument["nbytes"]) // ALIGNMENT) * ALIGNMENT


def _bound(tensors: Sequence[Tensor]) -> Any:
    """An argument array, which keeps its tensors."""
    made: Any = (Value * len(tensors))(*(Value(TENSOR, 0, tensor.handle) for tensor in tensors))
    made._tensors = tuple(tensors)
    return made


class Session:
    """The functions of a client, in a process of their own. folder: where its files go, and nothing else of it."""

    def __init__(self, folder: Path, threads: Optional[int]) -> None:
        self.folder = folder
        self.ffi = Ffi(folder, None, threads, "Build the library again")
        self.ffi.start_pool()
        self.workload: Union[Workload, rpc_cuda.Workload, None] = None
        self._modules: dict[str, Value] = {}
        self.ffi.register("tvm.rpc.server.workpath", lambda name: str(self.path(name)))
        self.ffi.register("tvm.rpc.server.load_module", self._load)
        for name in ("about", "gpu", "open", "prepare", "outputs", "time"):
            self.ffi.register(f"quern.{name}", getattr(self, name))

    def serve(self, descriptor: int) -> None:
        """Answer until the client leaves."""
        loop = self.ffi.global_function("rpc.ServerLoop")
        self.ffi.call(loop, "serving", Value(1, 0, descriptor))

    def path(self, name: str) -> Path:
        """A file of the session's folder; InputError for a name that leads out of it."""
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise InputError(f"{name!r} is no name of a file for this session")
        return self.folder.joinpath(*parts)

    def about(self) -> str:
        """See the module."""
        version = tvm_libs.abi_version(self.ffi.libraries)
        facts = board.about(self.ffi.threads)
        return json.dumps({"protocol": PROTOCOL, "tvm_ffi": list(version), **facts})

    def gpu(self) -> str:
        """See the module."""
        return json.dumps(rpc_cuda.about())

    def open(self, text: str) -> str:
        """Take up a workload; the one before is forgotten."""
        self.workload, fields = None, json.loads(text)
        if fields.pop("gpu", False):
            self.workload = rpc_cuda.Workload(self.path, **fields)
        else:
            self.workload = Workload(self.ffi, self._module, self.path, **fields)
        rotated = self.workload.rotated_bytes
        return json.dumps({"rotated_bytes": rotated, "page_kib": self.workload.page_kib})

    def prepare(self, name: str) -> str:
        """A kernel that reports an error is a result, not the end of the session."""
        try:
            return json.dumps({"number": self._opened().prepare(name)})
        except UserError as error:
            return json.dumps({"error": str(error)})

    def outputs(self) -> bytes:
        """See Workload."""
        return self._opened().outputs()

    def time(self, text: str, rounds: int) -> str:
        """Numbers of candidates; rounds."""
        made = self._opened()
        found = timing.times(made.call, json.loads(text), rounds, made.read, made.spin)
        return json.dumps({**found, "throttled": board.throttled()})

    def _opened(self) -> Union[Workload, rpc_cuda.Workload]:
        if self.workload is None:
            raise InputError("no workload is open")
        return self.workload

    def _module(self, name: str) -> Value:
        """A library of the session's folder, loaded once: it stays mapped, so its file must stay as it is."""
        if name not in self._modules:
            self._modules[name] = self.ffi.load_module(self.path(name))
        return self._modules[name]

    def _load(self, name: str) -> Any:
        """A module, given away to C++."""
        text = ctypes.create_string_buffer(str(self.path(name)).encode())
        load = self.ffi.global_function("ffi.ModuleLoadFromFile")
        return self.ffi.call(load, "loading", Value(RAW_STR, 0, ctypes.addressof(text)))
