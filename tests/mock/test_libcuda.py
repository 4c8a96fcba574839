"""The mock driver refuses what a driver refuses: what passes there, a driver has no word against."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import targets
from compiler.codegen import nvrtc
from tests.mock import cuda as mock

SOURCE = """#include "quern.cuh"
extern "C" __global__ void __launch_bounds__(64) small(const float* a, float* out) {
  __shared__ float kept[300];
  __shared__ double more[5];
  kept[threadIdx.x] = a[threadIdx.x], more[threadIdx.x % 5] = a[0];
  block_sync();
  out[threadIdx.x] = kept[63 - threadIdx.x] + float(more[1]);
}
extern "C" __global__ void free_size(float* out) { out[threadIdx.x] = 1.0f; }
"""
STATIC = 300 * 4 + 5 * 8
INVALID_VALUE, NO_CONTEXT, INVALID_HANDLE, NOT_FOUND, NOT_READY = 1, 201, 400, 500, 600
DESTROYED, RESOURCES, UNSUPPORTED, INVALIDATED, CAPTURED, OLD_PTX = 709, 701, 900, 901, 907, 222
MAX_THREADS, STATIC_SHARED, DYNAMIC_SHARED = 0, 1, 8
NON_BLOCKING = THREAD_LOCAL = 1


class Driver:
    """Calls by name; handles are void pointers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __call__(self, name: str, *arguments: Any) -> int:
        return int(getattr(self.library, name)(*arguments))

    def made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """A handle or an address, by its first argument."""
        out = ctypes.c_void_p()
        assert self(name, ctypes.byref(out), *arguments) == 0
        return out

    def attribute(self, function: ctypes.c_void_p, which: int) -> int:
        """Of a function."""
        out = ctypes.c_int()
        assert self("cuFuncGetAttribute", ctypes.byref(out), which, function) == 0
        return out.value

    def launch(self, f: Any, stream: Any, threads: int, shared: int = 0, blocks: int = 1, count: int = 2) -> int:
        """One of the kernels above, on nothing."""
        values = [ctypes.c_uint64() for _ in range(count)]
        pointers = (ctypes.c_void_p * count)(*map(ctypes.addressof, values))
        return self("cuLaunchKernel", f, 1, blocks, 1, threads, 1, 1, shared, stream, pointers, None)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """An H100 with a context in this thread."""
    for name, value in mock.environment(arch=90).items():
        monkeypatch.setenv(name, value)
    found = Driver(ctypes.CDLL(str(mock.library())))
    assert found("cuInit", 0) == 0
    found("cuCtxSetCurrent", found.made("cuDevicePrimaryCtxRetain", 0))
    yield found
    assert found("cuDevicePrimaryCtxRelease", 0) == 0


def code(target: str) -> nvrtc.DeviceCode:
    gpu = targets.load(target).gpu
    assert gpu is not None
    return nvrtc.compile(SOURCE, gpu)


@pytest.mark.parametrize("kind", ["ptx", "cubin"])
@pytest.mark.parametrize("target", ["cuda-sm90", "jetson-xavier", "jetson-orin"])
def test_it_reads_of_a_kernel_what_ptxas_says(
    target: str, kind: str, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, sm = code(target), targets.load(target).gpu.sm  # type: ignore[union-attr]
    monkeypatch.setenv("QUERN_MOCK_ARCH", str(sm))
    image = made.ptx + b"\0" if kind == "ptx" else made.cubin
    module = driver.made("cuModuleLoadDataEx", image, 0, None, None)
    small, free_size = (driver.made("cuModuleGetFunction", module, name) for name in (b"small", b"free_size"))
    assert (driver.attribute(small, STATIC_SHARED), made.functions["small"].shared_bytes) == (STATIC, STATIC)
    assert driver.attribute(free_size, STATIC_SHARED) == made.functions["free_size"].shared_bytes == 0
    assert (driver.attribute(small, MAX_THREADS), driver.attribute(free_size, MAX_THREADS)) == (64, 1024)
    assert driver("cuModuleGetFunction", ctypes.byref(ctypes.c_void_p()), module, b"smal") == NOT_FOUND
    assert driver("cuModuleUnload", module) == 0


def test_what_a_launch_must_keep_to(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = driver.made("cuStreamCreate", NON_BLOCKING)
    module = driver.made("cuModuleLoadDataEx", code("cuda-sm90").cubin, 0, None, None)
    small, free_size = (driver.made("cuModuleGetFunction", module, name) for name in (b"small", b"free_size"))
    assert driver.launch(small, stream, 64) == 0
    assert driver.launch(small, stream, 96) == INVALID_VALUE  # than its launch bound
    assert driver.launch(free_size, stream, 1025, count=1) == INVALID_VALUE
    assert driver.launch(small, stream, 64, blocks=65536) == INVALID_VALUE  # in y
    assert driver.launch(small, stream, 64, shared=(48 << 10) - STATIC) == 0
    assert driver.launch(small, stream, 64, shared=(48 << 10) - STATIC + 1) == INVALID_VALUE  # static counts too
    assert driver("cuFuncSetAttribute", small, DYNAMIC_SHARED, (227 << 10) - STATIC + 1) == INVALID_VALUE
    assert driver("cuFuncSetAttribute", small, DYNAMIC_SHARED, 64 << 10) == 0
    assert driver.launch(small, stream, 64, shared=64 << 10) == 0
    assert driver.launch(small, ctypes.c_void_p(1), 64) == INVALID_HANDLE
    assert driver("cuStreamSynchronize", stream) == driver("cuModuleUnload", module) == 0
    assert driver.launch(small, stream, 64) == INVALID_HANDLE
    old = code("jetson-xavier").ptx + b"\0"
    monkeypatch.setenv("QUERN_MOCK_DRIVER", "10020")
    assert driver("cuModuleLoadDataEx", ctypes.byref(ctypes.c_void_p()), old, 0, None, None) == OLD_PTX
    assert driver("cuStreamDestroy_v2", stream) == 0
    assert driver("cuStreamSynchronize", stream) == INVALID_HANDLE


def test_registers_of_a_block(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launch bound a kernel may take more registers than 1024 threads of it find room for."""
    loads = "".join(f"  float v{i} = a[{i} * n];\n" for i in range(80))
    sums = " * ".join(f"(v{i} + v{(7 * i + 1) % 80})" for i in range(80))
    text = f"""#include "quern.cuh"
extern "C" __global__ void wide(const float* a, float* out) {{
  const int n = int(out[0]);
{loads}  block_sync();
  out[threadIdx.x] = {sums};
}}
"""
    gpu = targets.load("jetson-orin").gpu
    assert gpu is not None
    cubin, resources = nvrtc.machine_code(text, gpu)
    used = resources["wide"].registers
    assert used > 64
    monkeypatch.setenv("QUERN_MOCK_ARCH", "87")
    module = driver.made("cuModuleLoadDataEx", cubin, 0, None, None)
    wide, stream = driver.made("cuModuleGetFunction", module, b"wide"), driver.made("cuStreamCreate", NON_BLOCKING)
    most = 65536 // (-(-used // 8) * 8 * 32) * 32
    assert driver.attribute(wide, MAX_THREADS) == most < 1024
    assert (driver.launch(wide, stream, most), driver.launch(wide, stream, most + 32)) == (0, RESOURCES)
    assert driver("cuStreamDestroy_v2", stream) == driver("cuModuleUnload", module) == 0


def test_what_spoils_a_graph(driver: Driver) -> None:
    stream, event = driver.made("cuStreamCreate", NON_BLOCKING), driver.made("cuEventCreate", 0)
    graph = ctypes.c_void_p()
    module = driver.made("cuModuleLoadDataEx", code("cuda-sm90").cubin, 0, None, None)
    small = driver.made("cuModuleGetFunction", module, b"small")
    spoiling: list[Callable[[], int]] = [
        lambda: driver.launch(small, stream, 64),  # a kernel that was never launched is loaded now
        lambda: driver("cuStreamSynchronize", stream),
        lambda: driver("cuMemAlloc_v2", ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(256)),
        lambda: driver("cuEventSynchronize", event),
    ]
    for spoil in spoiling:
        assert driver("cuStreamBeginCapture_v2", stream, THREAD_LOCAL) == 0
        assert spoil() == UNSUPPORTED
        assert driver.launch(small, stream, 64) in (UNSUPPORTED, INVALIDATED)
        assert driver("cuStreamEndCapture", stream, ctypes.byref(graph)) == INVALIDATED and graph.value is None
    assert driver.launch(small, stream, 64) == driver("cuStreamSynchronize", stream) == 0
    assert driver("cuStreamBeginCapture_v2", stream, THREAD_LOCAL) == 0
    assert driver.launch(small, stream, 64) == driver("cuEventRecord", event, stream) == 0
    assert driver("cuStreamEndCapture", stream, ctypes.byref(graph)) == 0
    milliseconds = ctypes.c_float()
    assert driver("cuEventElapsedTime", ctypes.byref(milliseconds), event, event) == CAPTURED
    assert driver("cuGraphDestroy", graph) == 0 and driver("cuGraphDestroy", graph) == INVALID_HANDLE
    for name, handle in (("cuEventDestroy_v2", event), ("cuModuleUnload", module), ("cuStreamDestroy_v2", stream)):
        assert driver(name, handle) == 0


def test_contexts_events_and_memory(driver: Driver) -> None:
    stream, other = driver.made("cuStreamCreate", NON_BLOCKING), driver.made("cuStreamCreate", NON_BLOCKING)
    event, late, milliseconds = driver.made("cuEventCreate", 0), driver.made("cuEventCreate", 0), ctypes.c_float()
    elapsed = ("cuEventElapsedTime", ctypes.byref(milliseconds), event, late)
    assert driver(*elapsed) == INVALID_HANDLE  # never recorded
    assert driver("cuEventRecord", event, stream) == driver("cuEventRecord", late, stream) == 0
    assert driver("cuStreamSynchronize", other) == 0
    assert driver(*elapsed) == NOT_READY  # the other stream's work was waited for
    assert driver("cuStreamSynchronize", stream) == driver(*elapsed) == 0
    assert driver("cuEventDestroy_v2", late) == 0
    assert driver(*elapsed) == INVALID_HANDLE
    nothing, some = ctypes.c_size_t(0), ctypes.c_size_t(512)
    assert driver("cuMemAlloc_v2", ctypes.byref(ctypes.c_void_p()), nothing) == INVALID_VALUE
    at = driver.made("cuMemAlloc_v2", some)
    inside = ctypes.c_void_p((at.value or 0) + 256)
    assert driver("cuMemFree_v2", inside) == INVALID_VALUE
    assert driver("cuMemsetD8Async", inside, 0, some, stream) == INVALID_VALUE  # past its end
    assert driver("cuMemcpyHtoDAsync_v2", at, (ctypes.c_char * 512)(), some, stream) == INVALID_VALUE  # not pinned
    assert driver("cuMemFree_v2", at) == driver("cuEventDestroy_v2", event) == driver("cuStreamDestroy_v2", other) == 0
    assert driver("cuCtxSetCurrent", None) == 0
    assert driver("cuStreamSynchronize", stream) == NO_CONTEXT
    driver("cuCtxSetCurrent", driver.made("cuDevicePrimaryCtxRetain", 0))
    assert driver("cuStreamDestroy_v2", stream) == driver("cuDevicePrimaryCtxRelease", 0) == 0
    assert driver("cuDevicePrimaryCtxRelease", 0) == 0
    assert driver("cuStreamCreate", ctypes.byref(ctypes.c_void_p()), NON_BLOCKING) == DESTROYED
    driver.made("cuDevicePrimaryCtxRetain", 0)
