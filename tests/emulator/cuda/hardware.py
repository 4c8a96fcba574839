"""The kernels' tests on a GPU instead of the emulator: QUERN_TEST_GPU=1 pytest tests/schedules/cuda

Kernels of the card's own architecture run as machine code, those of older ones are compiled by the driver; newer ones
are skipped. What only an emulator can see (tests of wrong kernels) is skipped as well. Hardware's exp2 and reciprocal
differ in the last place: a test whose tolerance is none may say so.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest

import targets
from compiler.codegen import nvrtc
from runtime import cuda_driver
from schedules.cuda.kernel import CudaKernel, Launch

ASKED = "QUERN_TEST_GPU"
TARGETS = {53: "cuda-sm53", 72: "cuda-sm72", 87: "cuda-sm87", 90: "cuda-sm90"}
POISON, DYNAMIC_SHARED, NON_BLOCKING, PINNED = 0xA5, 8, 1, 1
UNASKED_SHARED = 48 << 10
ARCHITECTURE = re.compile(r"_sm_?(\d+)(?:_|$)")


def asked() -> bool:
    """Whether kernels shall run on a GPU."""
    return bool(os.environ.get(ASKED))


def require_emulator() -> None:
    """Skip a test that is about what the emulator notices."""
    if asked():
        pytest.skip(f"{ASKED} is set, and only the emulator sees what this kernel does wrong")


class DriverError(Exception):
    """A call of the driver that failed."""


class Driver:
    """The driver API on the first GPU, with one stream."""

    def __init__(self, found: cuda_driver.Found) -> None:
        self.found, self._library = found, ctypes.CDLL(cuda_driver.path())
        self("cuInit", 0)
        self("cuCtxSetCurrent", self.made("cuDevicePrimaryCtxRetain", 0))
        self.stream = self.made("cuStreamCreate", NON_BLOCKING)

    def __call__(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'an unknown error').decode()} ({code})")

    def made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """A handle or an address, by its first argument."""
        out = ctypes.c_void_p()
        self(name, ctypes.byref(out), *arguments)
        return out

    def close(self) -> None:
        """Nothing of it may be used afterwards."""
        self("cuStreamDestroy_v2", self.stream)
        self("cuDevicePrimaryCtxRelease", 0)

    @contextmanager
    def memory(self, array: np.ndarray) -> Iterator[tuple[ctypes.c_void_p, ctypes.c_void_p, np.ndarray]]:
        """An array: on the GPU, and pinned, as address and as bytes, to bring it there and back."""
        size = ctypes.c_size_t(max(1, array.nbytes))
        there, here = self.made("cuMemAlloc_v2", size), self.made("cuMemHostAlloc", size, PINNED)
        try:
            assert here.value is not None
            pinned = np.ctypeslib.as_array((ctypes.c_uint8 * size.value).from_address(here.value))
            pinned[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self("cuMemcpyHtoDAsync_v2", there, here, size, self.stream)
            yield there, here, pinned
        finally:
            self("cuMemFree_v2", there)
            self("cuMemFreeHost", here)

    def launch(self, module: ctypes.c_void_p, launch: Launch, places: Sequence[ctypes.c_void_p]) -> None:
        """One launch of a kernel."""
        function = self.made("cuModuleGetFunction", module, launch.function.encode())
        if launch.shared_bytes > UNASKED_SHARED:
            self("cuFuncSetAttribute", function, DYNAMIC_SHARED, launch.shared_bytes)
        values = [ctypes.c_void_p(places[i].value) for i in launch.arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self("cuLaunchKernel", function, *launch.grid, *launch.block, launch.shared_bytes, self.stream, pointers, None)


@cache
def driver() -> Driver:
    """Opened once; a test fails without a GPU, because one was asked for."""
    found = cuda_driver.find()
    if isinstance(found, str):
        pytest.fail(f"{ASKED} is set, but {found}", pytrace=False)
    return Driver(found)


def run(kernel: CudaKernel, arrays: Sequence[np.ndarray], sm: int) -> None:
    """As `tests.emulator.cuda.run`, on the GPU. Skips the test where the GPU is older than the kernel's.

    A kernel's name states the architecture where its text depends on it; sm is the one it is compiled for otherwise.
    """
    opened, named = driver(), ARCHITECTURE.search(kernel.name)
    sm = int(named[1]) if named else sm
    if sm > opened.found.arch:
        pytest.skip(f"{opened.found.name} is sm_{opened.found.arch}, and this kernel is for sm_{sm}")
    gpu = targets.load(TARGETS[sm]).gpu
    assert gpu is not None
    code = nvrtc.compile(kernel.source, gpu)
    image = code.cubin if code.cubin is not None and sm == opened.found.arch else code.ptx + b"\0"
    module = opened.made("cuModuleLoadDataEx", image, 0, None, None)
    sizes = [np.dtype(spec.dtype).itemsize * int(np.prod(spec.shape)) for spec in kernel.temporaries]
    scratch = [np.full(size, POISON, np.uint8) for size in sizes]
    with ExitStack() as stack:
        held = [stack.enter_context(opened.memory(array)) for array in [*arrays, *scratch]]
        for launch in kernel.launches:
            opened.launch(module, launch, [there for there, *_ in held])
        written = [(array, *place) for array, place in zip(arrays, held, strict=False) if array.flags.writeable]
        for array, there, here, _ in written:
            opened("cuMemcpyDtoHAsync_v2", here, there, ctypes.c_size_t(max(1, array.nbytes)), opened.stream)
        opened("cuStreamSynchronize", opened.stream)
        for array, _, _, pinned in written:
            array[...] = pinned[: array.nbytes].view(array.dtype).reshape(array.shape)
    opened("cuModuleUnload", module)
