from __future__ import annotations

import numpy as np
import pytest

import targets
from compiler.codegen import nvrtc
from schedules.cuda.kernel import CudaKernel, Launch
from tests.emulator import cuda

GPUS = ["jetson-nano", "jetson-xavier", "jetson-orin", "cuda-sm90"]
# Row sums of x f32[3, 256] times 2: half a row a warp, joined through shared memory.
TOY = """
#include "quern.cuh"
extern "C" __global__ void __launch_bounds__(64) toy(const float* __restrict__ x, float* __restrict__ out) {
  __shared__ float part[2];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint4* row = reinterpret_cast<const uint4*>(x + blockIdx.x * 256 + warp * 128);
  uint4 v = load_stream(row + lane);
  float sum = bits_float(v.x) + bits_float(v.y) + bits_float(v.z) + bits_float(v.w);
  sum = warp_sum(sum);
  if (lane == 0) part[warp] = sum;
  block_sync();
  if (threadIdx.x == 0) out[blockIdx.x] = fmaf(part[0] + part[1], 2.0f, 0.0f);
}
"""


def toy(source: str = TOY) -> CudaKernel:
    return CudaKernel("toy", source, (Launch("toy", (3, 1, 1), (64, 1, 1), (0, 1)),))


def run(source: str, rows: int = 3) -> np.ndarray:
    x, out = np.arange(rows * 256, dtype=np.float32).reshape(rows, 256), np.zeros(3, np.float32)
    cuda.run(toy(source), [x, out])
    return out


def test_toy_runs() -> None:
    assert run(TOY).tolist() == [2 * sum(range(256 * i, 256 * (i + 1))) for i in range(3)]


def broken(old: str, new: str) -> str:
    assert old in TOY
    return TOY.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  block_sync();\n", "", "thread (0, 0, 0) of block (0, 0, 0): a read reads byte 4 of shared memory, which nobody wrote"),
        ("row + lane", "row + lane + 1", "thread (63, 0, 0) of block (2, 0, 0): load_stream of 16 bytes at byte 3072 of array 0, which has 3072"),
    ],
)
def test_what_is_wrong_is_found(old: str, new: str, message: str) -> None:
    with pytest.raises(cuda.EmulationError) as caught:
        run(broken(old, new))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", GPUS)
def test_compiles(name: str) -> None:
    gpu = targets.load(name).gpu
    assert gpu is not None
    code = nvrtc.compile(TOY, gpu)
    print(code.functions, code.cubin and len(code.cubin))
    assert f".version {gpu.ptx}\n.target {gpu.arch}\n".encode() in code.ptx
    assert code.functions["toy"].spill_bytes == 0
    assert (code.cubin is not None) == gpu.cubin
