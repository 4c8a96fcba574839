"""The CUDA emulator: wrappers against numpy, every kind of finding, and the same names as the device's header."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from compiler.codegen.nvrtc import HEADER
from schedules.cuda.kernel import CudaKernel, Launch
from schedules.kernel import TensorSpec
from tests.emulator import cuda
from tests.emulator.cuda import hardware
from tests.mock import cuda as mock

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
# One warp each; a and b are what the fragments are loaded from.
WARP = """
#include "quern.cuh"
extern "C" __global__ void integers(const int8_t* a, const int8_t* b, int32_t* out) {  // [16, 32] x [8, 32] transposed
  __shared__ alignas(16) int8_t rows[16 * 32];
  int lane = threadIdx.x;
  async_copy16(rows + 16 * lane, a + 16 * lane);
  async_commit();
  async_wait<0>();
  warp_sync();
  uint32_t fragment[4], other[2];
  load_matrix_x4(fragment, rows + lane % 16 * 32 + lane / 16 * 16);
  for (int i = 0; i < 2; ++i)
    other[i] = load_constant(reinterpret_cast<const uint32_t*>(b + lane / 4 * 32 + 16 * i) + lane % 4);
  int32_t c[4] = {1, 1, 1, 1};
  mma_16x8x32(c, fragment, other);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}
extern "C" __global__ void halves(const uint16_t* a, const uint16_t* b, float* out) {  // [16, 16] x [16, 8]
  uint16_t* rows = reinterpret_cast<uint16_t*>(dynamic_shared());
  int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) rows[i] = a[i];
  for (int i = lane; i < 128; i += 32) rows[256 + i] = b[i];
  block_sync();
  uint32_t fragment[4], other[2];
  load_matrix_x4(fragment, rows + lane % 16 * 16 + lane / 16 * 8);
  load_matrix_x2_transposed(other, rows + 256 + lane % 16 * 8);
  float c[4] = {0.5f, 0.5f, 0.5f, 0.5f};
  mma_16x8x16(c, fragment, other);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}
extern "C" __global__ void tiles(const int8_t* a, const int8_t* b, int32_t* out) {  // [16, 16] x [16, 16] transposed
  __shared__ alignas(32) int8_t rows[2][256];
  __shared__ alignas(32) int32_t numbers[256];
  int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) rows[0][i] = a[i], rows[1][i] = b[i], numbers[i] = i;
  warp_sync();
  uint32_t x[2], y[2];
  int32_t c[8] = {}, place[8];
  wmma_load_a(x, rows[0], 16);
  wmma_load_b(y, rows[1], 16);
  wmma_load_c(place, numbers, 16);
  wmma_multiply(c, x, y);
  for (int i = 0; i < 8; ++i) out[place[i]] = c[i];
}
extern "C" __global__ void half_tiles(const uint16_t* a, const uint16_t* b, float* out) {  // b by columns, then by rows
  __shared__ alignas(32) Half rows[2][256];
  __shared__ alignas(32) float sums[256];
  int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) rows[0][i].bits = a[i], rows[1][i].bits = b[i];
  warp_sync();
  uint32_t x[8], y[8];
  float c[8] = {};
  wmma_load_a(x, rows[0], 16);
  wmma_load_b(y, rows[1], 16);
  wmma_multiply(c, x, y);
  wmma_load_b_rows(y, rows[1], 16);
  wmma_multiply_rows(c, x, y);
  wmma_store(sums, c, 16);
  warp_sync();
  for (int i = lane; i < 256; i += 32) out[i] = sums[i];
}
extern "C" __global__ void scalars(const uint32_t* x, uint32_t* out) {  // x[32, 3] -> out[14, 32]
  int lane = threadIdx.x;
  uint32_t a = x[3 * lane], b = x[3 * lane + 1], c = x[3 * lane + 2];
  out[lane] = dp4a(a, b, c);
  out[32 + lane] = dp4a_unsigned(a, b, c);
  out[64 + lane] = lop3<(0xF0 & 0xCC) | 0xAA>(a, b, c);
  out[96 + lane] = permute_bytes(a, b, c & 0x7777);
  out[128 + lane] = permute_bytes(a, b, c | 0x8888);
  out[160 + lane] = shuffle_xor(a, 5);
  out[192 + lane] = shuffle(a, 31 - lane);
  out[224 + lane] = shuffle_down(a, 3);
  out[256 + lane] = ballot(a & 1);
  out[288 + lane] = fma_half2(Half2{a & 0x3FFF3FFF}, Half2{b & 0x3FFF3FFF}, Half2{c & 0x3FFF3FFF}).bits;
  out[320 + lane] = add_half2(mul_half2(Half2{a & 0x3FFF3FFF}, Half2{b & 0x3FFF3FFF}), Half2{c & 0x3FFF3FFF}).bits;
  out[352 + lane] = round_to_int(bits_float(a));
  out[384 + lane] = warp_sum<8>(a);
  out[416 + lane] = float_bits(warp_max(to_float(Half{static_cast<uint16_t>(a & 0x3FFF)})));
}
"""


def toy(source: str = TOY) -> CudaKernel:
    return CudaKernel("toy", source, (Launch("toy", (3, 1, 1), (64, 1, 1), (0, 1)),))


def run_toy(source: str = TOY, start: int = 0) -> np.ndarray:
    x, out = np.arange(start, 3 * 256 + start, dtype=np.float32).reshape(3, 256), np.zeros(3, np.float32)
    cuda.run(toy(source), [x, out])
    return out


def warp(function: str, a: np.ndarray, b: np.ndarray | None, out: np.ndarray) -> np.ndarray:
    arrays = [a, out] if b is None else [a, b, out]
    launch = Launch(function, (1, 1, 1), (32, 1, 1), tuple(range(len(arrays))), 1024)
    cuda.run(CudaKernel(function, WARP, (launch,)), arrays)
    return out


def test_toy() -> None:
    assert run_toy().tolist() == [2 * sum(range(256 * i, 256 * (i + 1))) for i in range(3)]


def test_products_of_matrices() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (16, 32), np.int8), rng.integers(-128, 128, (8, 32), np.int8)
    want = a.astype(int) @ b.T.astype(int) + 1
    assert np.array_equal(warp("integers", a, b, np.zeros((16, 8), np.int32)), want)
    a, b = rng.integers(-128, 128, (16, 16), np.int8), rng.integers(-128, 128, (16, 16), np.int8)
    assert np.array_equal(warp("tiles", a, b, np.zeros((16, 16), np.int32)), a.astype(int) @ b.T.astype(int))
    x, y = (rng.integers(-8, 8, (16, n)).astype(np.float16) / 4 for n in (16, 8))
    got = warp("halves", x.view(np.uint16), np.ascontiguousarray(y).view(np.uint16), np.zeros((16, 8), np.float32))
    assert np.array_equal(got, x.astype(float) @ y.astype(float) + 0.5)
    y = rng.integers(-8, 8, (16, 16)).astype(np.float16)
    got = warp("half_tiles", x.view(np.uint16), y.view(np.uint16), np.zeros((16, 16), np.float32))
    assert np.array_equal(got, x.astype(float) @ y.T.astype(float) + x.astype(float) @ y.astype(float))


def test_scalars() -> None:
    x = np.random.default_rng(1).integers(0, 1 << 32, (32, 3), np.uint32)
    got = warp("scalars", x, None, np.zeros((14, 32), np.uint32))
    a, b, c = x.T
    bytes_a, bytes_b = (np.ascontiguousarray(v).view(np.uint8).reshape(32, 4).astype(int) for v in (a, b))
    signed_a, signed_b = ((v ^ 128) - 128 for v in (bytes_a, bytes_b))
    both = np.concatenate([bytes_a, bytes_b], 1)
    nibble = (c[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 7).astype(int)
    chosen = np.take_along_axis(both, nibble, 1)
    lane = np.arange(32)
    halves = [np.ascontiguousarray(v & 0x3FFF3FFF).view(np.float16).astype(np.float64) for v in (a, b, c)]
    fused = (halves[0] * halves[1] + halves[2]).astype(np.float16)
    apart = ((halves[0] * halves[1]).astype(np.float16).astype(float) + halves[2]).astype(np.float16)
    real = np.nan_to_num(a.view(np.float32).astype(np.float64), nan=0.0)
    weights = 256 ** np.arange(4)
    want = [
        (signed_a * signed_b).sum(1) + c, (bytes_a * signed_b).sum(1) + c, a & b | c, chosen @ weights,
        np.where(chosen > 127, 255, 0) @ weights, a[lane ^ 5], a[31 - lane], a[np.where(lane < 29, lane + 3, lane)],
        np.full(32, int(((a & 1).astype(object) << lane).sum())), fused.view(np.uint32), apart.view(np.uint32),
        np.clip(np.rint(real), -(2**31), 2**31 - 1).astype(np.int64),
        np.repeat(a.reshape(4, 8).astype(np.uint64).sum(1), 8),
        np.full(32, (a & 0x3FFF).astype(np.uint16).view(np.float16).max()).astype(np.float32).view(np.uint32),
    ]  # fmt: skip
    for i, (made, wanted) in enumerate(zip(got, want, strict=True)):
        assert np.array_equal(made, (np.asarray(wanted).astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)), i


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  block_sync();\n", "",
         "toy: thread (0, 0, 0) of block (0, 0, 0): a read reads byte 4 of shared memory, which nobody wrote"),
        ("  block_sync();\n", "  part[0] = 0.0f;\n  block_sync();\n",
         "a write writes byte 0 of shared memory, which thread 27 wrote; no barrier lies between"),
        ("row + lane", "row + lane + 1",
         "toy: thread (63, 0, 0) of block (2, 0, 0): load_stream of 16 bytes at byte 3072 of array 0, which has 3072"),
        ("row + lane", "row - 1 + lane", "toy: thread (0, 0, 0) of block (0, 0, 0): load_stream of 16 bytes "),
        ("load_stream(row + lane)", "load_stream((const uint4*)(x + 1))", "is no multiple of 16"),
        ("if (lane == 0) part", "if (lane == 1) return;\n  if (lane == 0) part",
         "toy: thread 0 waits at the block's barrier, which other threads never reach"),
        ("sum = warp_sum(sum);", "if (lane < 16) sum = warp_sum(sum);",
         "toy: thread 0 waits at shuffle_xor, which other threads never reach"),
        ("sum = warp_sum(sum);", "if (lane < 16) sum = warp_sum(sum); else ballot(true);",
         "toy: thread (16, 0, 0) of block (0, 0, 0): is at ballot while other lanes of its warp are at shuffle_xor"),
        ("part[warp] = sum;", "part[warp + 1] = sum;",
         "thread (32, 0, 0) of block (0, 0, 0): a write of 4 bytes is outside every array, shared memory"),
        ("if (lane == 0) part[warp] = sum;", "async_copy16(const_cast<float*>(x), x);",
         "async_copy to what is not shared memory"),
        ("uint4 v = load_stream", "uint4 v = nonsense", "the kernel's source does not compile"),
    ],
    ids=lambda v: None,
)  # fmt: skip
def test_what_is_wrong_is_found(old: str, new: str, message: str) -> None:
    assert old in TOY
    with pytest.raises(cuda.EmulationError, match=re.escape(message)):
        run_toy(TOY.replace(old, new))


def test_a_launch_that_cannot_be() -> None:
    for launch, message in [
        (Launch("other", (1, 1, 1), (32, 1, 1), (0, 1)), "other: there is no function other"),
        (Launch("toy", (1, 1, 1), (48, 1, 1), (0, 1)), "toy: a block of 48 threads; must be 32 to 1024, whole warps"),
    ]:
        with pytest.raises(cuda.EmulationError, match=re.escape(message)):
            cuda.run(replace(toy(), launches=(launch,)), [np.zeros((3, 256), np.float32), np.zeros(3, np.float32)])


def test_temporaries_hold_garbage_at_first() -> None:
    kernel = CudaKernel("toy", TOY, toy().launches, temporaries=(TensorSpec((3, 256), "float32"),))
    out = np.zeros(3, np.float32)
    cuda.run(replace(kernel, launches=(Launch("toy", (3, 1, 1), (64, 1, 1), (1, 0)),)), [out])
    assert (out != 0).all()


def test_the_emulator_has_what_the_header_has() -> None:
    """Every function of the device's part of quern.cuh, and no other that a kernel might take for one of its own."""
    names = re.compile(r"QUERN_INLINE [\w\s\*:<>,&]*?\b(\w+)\(|QUERN_(?:HALF2_OP|HALF2|LOADS|MMA)\((\w+)")
    device, _ = HEADER.read_text().split("#endif  // NVRTC")
    there = {a or b for a, b in names.findall(device)} - {"NAME", "shared_address"}
    here = {a or b for a, b in names.findall((cuda.HERE / "emulator.h").read_text())} - {"NAME"}
    assert there - here == set()
    assert len(there) > 40


def test_the_same_call_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """QUERN_TEST_GPU takes kernels to the driver: here to the mock, with this kernel's emulation behind it."""
    for name, value in mock.environment(cuda.library(TOY), arch=90).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(hardware.ASKED, "1")
    hardware.driver.cache_clear()
    x, out = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32), np.full(3, np.nan, np.float32)
    toy = CudaKernel("toy", TOY, (Launch("toy", (3, 1, 1), (64, 1, 1), (0, 1)),))
    cuda.run(toy, [x, out])
    assert np.allclose(out, 2 * x.sum(1), atol=1e-4)
    with pytest.raises(pytest.skip.Exception, match="Mock GPU is sm_90, and this kernel is for sm_100"):
        cuda.run(replace(toy, name="toy_sm_100"), [x, out])
    with pytest.raises(pytest.skip.Exception, match="only the emulator sees what this kernel does wrong"):
        hardware.require_emulator()
    hardware.driver().close()
    hardware.driver.cache_clear()
    monkeypatch.setenv("QUERN_LIBCUDA", "/nowhere/libcuda.so.1")
    with pytest.raises(pytest.fail.Exception, match="QUERN_TEST_GPU is set, but the NVIDIA driver is not there: "):
        cuda.run(toy, [x, out])
