"""A bundle whose functions run on an NVIDIA GPU: the flat interface of compiler/codegen/cuda/model.h by ctypes.

Weights are copied to the GPU once, caches and activations live there. A call takes a position and ids to the GPU and
logits back, straight into the pinned memory that the caller reads; the hidden state of a prompt never leaves it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

from . import arrays, cuda_driver, upload
from .bundle import Bundle
from .errors import DeviceError, InputError, UserError, VmError
from .manifest_check import nbytes

ABI = 2
PARAMETER = 1 << 63  # in an offset: bytes into the caches, not into the weights
NO_DRIVER, OLD_DRIVER, WRONG_DEVICE, NO_MEMORY, REFUSED, FAILED = range(1, 7)
GRAPHS, TIMED, PTX_ONLY, CHECKED = 1, 2, 4, 8
CHECK_LAUNCHES = "QUERN_CHECK_LAUNCHES"  # in the environment: wait for every kernel, so that one that fails is named
HEADER = 256  # bytes before the ids: the span and nothing else
CACHE_ALIGNMENT = 256


class Info(ctypes.Structure):
    """quern_info: what the GPU is, and how the model runs on it."""

    _fields_ = (
        ("name", ctypes.c_char * 128),
        ("major", ctypes.c_int32),
        ("minor", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("integrated", ctypes.c_int32),
        ("driver", ctypes.c_int32),
        ("cubin", ctypes.c_int32),
        ("graphs", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("total_bytes", ctypes.c_uint64),
        ("free_bytes", ctypes.c_uint64),
        ("note", ctypes.c_char * 256),
    )


class Left(NamedTuple):
    """The hidden state that a prompt's function left on the GPU: what stands for it here."""

    function: int


class Model:
    """The library opened on a GPU, with its memory there. It goes when the last view of its memory has gone."""

    def __init__(self, where: Path, library: Path, options: int) -> None:
        """where: what messages name."""
        self.where, self._model = str(where), ctypes.c_void_p()
        self._pinned: list[int] = []
        self.library = _open_library(library)
        options |= CHECKED * bool(os.environ.get(CHECK_LAUNCHES))
        opened = self.library.quern_open(cuda_driver.path().encode(), 0, options, ctypes.byref(self._model))
        self._raise_for(opened, "quern_open")

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of the library on this model; raise what it says when it fails."""
        self._raise_for(getattr(self.library, name)(self._model, *arguments), name)

    def _raise_for(self, code: int, name: str) -> None:
        if code:
            raise _error(self.where, code, name, self.library.quern_error().decode(errors="replace"))

    def upload(self, place: int, data: object, size: int) -> None:
        """Copy `size` bytes of a ctypes array to byte `place` of the weights. It may be changed afterwards."""
        self.call("quern_upload", ctypes.c_uint64(place), data, ctypes.c_uint64(size))

    def host(self, nbytes: int) -> int:
        """Address of pinned memory, which lives as long as this object."""
        address = ctypes.c_void_p()
        self.call("quern_host", ctypes.c_uint64(nbytes), ctypes.byref(address))
        assert address.value is not None
        self._pinned.append(address.value)
        return address.value

    @property
    def info(self) -> Info:
        """The GPU now."""
        found = Info()
        self.call("quern_describe", ctypes.byref(found))
        return found

    @property
    def weights(self) -> int:
        """Where they begin in GPU memory."""
        return int(self.library.quern_weights(self._model))

    def parameters(self) -> Iterator[str]:
        """Names of the weights and caches that the code asks for, in its order."""
        for index in itertools.count():
            name = self.library.quern_parameter(index)
            if name is None:
                return
            yield name.decode()

    def __del__(self) -> None:
        if self._model:
            for address in self._pinned:
                self.library.quern_host_free(self._model, ctypes.c_void_p(address))
            self.library.quern_close(self._model)


class Hidden:
    """What the head takes; assigning what a prompt left copies it on the GPU."""

    def __init__(self, model: Model, function: int) -> None:
        self._model, self._function = model, function

    def __setitem__(self, part: slice, left: Left) -> None:
        self._model.call("quern_hand_over", left.function, self._function)


class _Output:
    """Owner of a pinned buffer; views of it hold this object. Afterwards the buffer serves another call."""

    def __init__(self, model: Model, free: list[int], address: int) -> None:
        self._model, self._free, self._address = model, free, address

    def __del__(self) -> None:
        self._free.append(self._address)


class Function:
    """A function of the library: logits as a read-only view, or what stays on the GPU. ids: how many it takes."""

    def __init__(
        self, model: Model, name: str, shape: tuple[int, ...], header: Optional[int], ids: int, keep: bool
    ) -> None:
        self._model, self.shape, self._keep = model, shape, keep
        self.index = int(model.library.quern_function_index(name.encode()))
        if self.index < 0:
            raise VmError(f"{model.where}: has no function {name!r}. Rebuild the bundle.")
        self._header = ctypes.c_void_p(header)
        self._header_bytes = ctypes.c_uint64(0 if header is None else HEADER + 4 * ids)
        self._free: list[int] = []

    def __call__(self) -> Any:
        """Run it. A view of logits stays valid as long as it is held; what was left until the next prompt call."""
        model = self._model
        if self._keep:
            model.call("quern_run", self.index, self._header, self._header_bytes, None)
            return Left(self.index)
        address = self._free.pop() if self._free else model.host(4 * self.shape[0] * self.shape[1])
        owner = _Output(model, self._free, address)
        model.call("quern_run", self.index, self._header, self._header_bytes, ctypes.c_void_p(address))
        return arrays.at(address, self.shape, "float32", owner)


class Call(NamedTuple):
    """A function and the buffer its caller fills: ids i32[tokens] in pinned memory, or the head's hidden state."""

    run: Function
    buffer: Any


class OnCuda:
    """`calls` by name; `span` i32[2], first position and number of valid rows, is read by every call.

    graphs: replay a function's launches as a CUDA graph where the driver can; timed: milliseconds() works.
    """

    threads, tiles = 1, False  # of the CPU: one thread walks the launches

    def __init__(
        self,
        bundle: Bundle,
        threads: Optional[int] = None,
        graphs: bool = True,
        timed: bool = False,
        ptx_only: bool = False,
    ) -> None:
        if threads is not None:
            raise InputError(f"{bundle.path}: runs on a GPU, and threads are the CPU's. Leave --threads out.")
        self.model = Model(bundle.path, bundle.library, GRAPHS * graphs | TIMED * timed | PTX_ONLY * ptx_only)
        _place(self.model, bundle)
        upload.upload(bundle, self.model.upload, bool(self.model.info.integrated))
        self.model.call("quern_load")
        functions = bundle.manifest.functions
        header = self.model.host(HEADER + 4 * max(f.tokens for f in functions.values()))
        self.span = arrays.at(header, (2,), "int32", self.model, writable=True)
        self.calls: dict[str, Call] = {}
        for name, signature in functions.items():
            buffer: Any = None
            if "ids" in signature.inputs:
                buffer = arrays.at(header + HEADER, (signature.tokens,), "int32", self.model, writable=True)
            own = header if buffer is not None else None
            keep = name.startswith("prefill_")
            run = Function(self.model, name, signature.output.shape, own, signature.tokens, keep)
            self.calls[name] = Call(run, Hidden(self.model, run.index) if buffer is None else buffer)

    @property
    def info(self) -> Info:
        """The GPU now."""
        return self.model.info

    @property
    def device(self) -> str:
        """The GPU's name."""
        return str(self.info.name.decode(errors="replace"))

    def replay(self, graphs: bool) -> None:
        """Use CUDA graphs from now on, or do not."""
        self.model.call("quern_replay", int(graphs))

    def milliseconds(self) -> float:
        """Time on the GPU of the last call's kernels."""
        found = ctypes.c_float()
        self.model.call("quern_milliseconds", ctypes.byref(found))
        return found.value

    def profile(self, function: str) -> list[tuple[str, float]]:
        """Kernel and milliseconds on the GPU of every launch of a function, for what was last asked of it."""
        index, library = self.model.library.quern_function_index(function.encode()), self.model.library
        names = itertools.takewhile(bool, (library.quern_launched(index, i) for i in itertools.count()))
        kernels = [name.decode() for name in names]
        found = (ctypes.c_float * len(kernels))()
        self.model.call("quern_profile", index, found)
        return list(zip(kernels, found))  # noqa: B905 strict is Python 3.10's

    def copy_gb_s(self, nbytes: int, repeats: int = 5) -> float:
        """GB/s read and written by the fastest copy of `nbytes` within the GPU's memory."""
        found = ctypes.c_double()
        self.model.call("quern_copy_speed", ctypes.c_uint64(nbytes), repeats, ctypes.byref(found))
        return found.value


def _place(model: Model, bundle: Bundle) -> None:
    """GPU memory, and where every parameter of the library lies in it."""
    found, size = {t.name: t.offset for t in bundle.manifest.weights.tensors}, 0
    for cache in bundle.manifest.caches:
        found[cache.name] = size | PARAMETER
        size += -(-nbytes(cache.dtype, cache.shape) // CACHE_ALIGNMENT) * CACHE_ALIGNMENT
    offsets = []
    for name in model.parameters():
        if name not in found:
            raise VmError(f"{model.where}: has no array {name!r}, which its code asks for. Rebuild the bundle.")
        offsets.append(found[name])
    table = (ctypes.c_uint64 * len(offsets))(*offsets)
    weights = bundle.manifest.files[bundle.manifest.weights.file].bytes
    model.call("quern_memory", ctypes.c_uint64(weights), ctypes.c_uint64(size), table)


def _open_library(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path.resolve()))
        abi = library.quern_abi()
    except (OSError, AttributeError) as error:
        raise VmError(f"{path}: does not load: {error}. Rebuild the bundle.") from None
    if abi != ABI:
        raise VmError(f"{path}: has interface {abi}, but this runtime knows {ABI}. Rebuild the bundle.")
    library.quern_weights.restype = ctypes.c_uint64
    library.quern_error.restype = library.quern_parameter.restype = ctypes.c_char_p
    library.quern_launched.restype = ctypes.c_char_p
    library.quern_host_free.restype = library.quern_close.restype = None
    return library


def _error(where: str, code: int, name: str, text: str) -> UserError:
    if code in (NO_DRIVER, OLD_DRIVER, WRONG_DEVICE):
        return DeviceError(f"{where}: cannot run here: {text}. Rebuild the bundle for this machine's target.")
    if code == NO_MEMORY:
        return DeviceError(
            f"{where}: {text}. Close what else uses the GPU, or rebuild the bundle with a shorter context or fewer "
            "bits (python -m compiler build --context, --bits)."
        )
    if code == REFUSED:
        return DeviceError(f"{where}: {text}. Rebuild the bundle with this release of quern, or update the driver.")
    hint = "" if os.environ.get(CHECK_LAUNCHES) else f"; with {CHECK_LAUNCHES}=1 it says which kernel failed"
    return VmError(f"{where}: {name}: {text}. The GPU is lost to this process: start again{hint}.")
