"""Linear layers in fp16, many tokens: activations are rounded by a launch of their own, then tiles of tokens x 64 rows.

Operators and layout as linear_half. The first launch brings a token's activations below 8 by one power of two and
rounds them to halves, in the order of the packed inputs. Products are of code - zero, which fp16 holds exactly, and
a group's scale meets its fp32 sum: so a result is off by the rounding of x alone (and of a table's values).
  mma   sm_87, sm_90: mma.m16n8k16 by 4 warps, 64 x 64 results. cp.async brings activations and packed weights two
        steps of 64 inputs ahead; a lane's word of a row is just what its fragments want, so weights are unpacked in
        registers. A warp's step: 32 mma, 8 ldmatrix, 8 words of 10 instructions, 64 to scale: 340 of PTX in all.
  wmma  sm_72: 32 x 64 results, weights unpacked to shared memory. Whose row a fragment's element is, is found by
        loading a tile of numbers. fp16 ceiling of Xavier NX: 6.7 TFLOP/s.
  tile  sm_53: 32 x 64 results by half2 multiply-adds along the inputs, 4 x 4 of a thread, sums to fp32 every 32
        inputs at most: 256 multiply-adds beside 32 shared 128-bit reads and 80 to scale, 65 % of Nano's 472 GFLOP/s
        at best.
With up to 16 tokens all read each weight once; then the ceiling is the memory's.
"""

from __future__ import annotations

from schedules.cuda.kernel import CudaKernel, Launch
from schedules.cuda.linear_half import Layer, layer_of
from schedules.cuda.packed_half import ROW_PAD, padded_rows
from schedules.kernel import NotSuited, Request, TensorSpec

MMA, WMMA, HALF2 = "mma", "wmma", "tile"
FILES = {
    MMA: ("linear_half_mma.cu",),
    WMMA: ("linear_half_stage.cu", "linear_half_wmma.cu"),
    HALF2: ("linear_half_stage.cu", "linear_half_tile.cu"),
}
MOST_TOKENS = {MMA: 64, WMMA: 32, HALF2: 32}
ROUND_THREADS, THREADS = 256, 128


def family(layer: Layer) -> str:
    """What multiplies on this chip."""
    return MMA if layer.gpu.sm >= 80 else WMMA if layer.gpu.sm >= 70 else HALF2


def lower(request: Request) -> CudaKernel:
    """The rounding, then a block for every tile."""
    layer = layer_of(request)
    if layer.m == 1:
        raise NotSuited
    kind, stored = family(layer), layer.places.stored
    tokens = next((t for t in (16, 32, 64) if t >= layer.m), MOST_TOKENS[kind])
    tokens = min(tokens, MOST_TOKENS[kind])
    name = f"linear_half_{kind}_{layer.shape_name}_t{tokens}"
    base = ", const float* __restrict__ residual" if layer.residual else ""
    entry = f"""extern "C" __global__ void __launch_bounds__(THREADS, 1)
KERNEL(const Half* __restrict__ rounded, const float* __restrict__ back, const float* __restrict__ sums,
{layer.weight_parameters}{base}, float* __restrict__ out) {{
  run(rounded, back, sums, {layer.weight_values}, {"residual" if layer.residual else "nullptr"}, out);
}}"""
    text = layer.text(name, {"TOKENS": tokens}, entry, "linear_half_round.cu", *FILES[kind])
    rounded, back, sums = layer.out + 1, layer.out + 2, layer.out + 3
    grid = (padded_rows(layer.n) // ROW_PAD, -(-layer.m // tokens), 1)
    weight = tuple(range(1, layer.out + 1))  # and the residual, and the result
    launches = (
        Launch(f"{name}_round", (layer.m, 1, 1), (ROUND_THREADS, 1, 1), (0, rounded, back, sums)),
        Launch(name, grid, (THREADS, 1, 1), (rounded, back, sums, *weight)),
    )
    temporaries = (
        TensorSpec((layer.m, stored), "float16"),
        TensorSpec((layer.m,), "float32"),
        TensorSpec((layer.m, stored // layer.places.span), "float32"),
    )
    return CudaKernel(name, text, launches, layer.packings, temporaries)


LOWERS = {f"quern.linear_half{kind}{tail}": lower for kind in ("", "_offset", "_table") for tail in ("", "_residual")}
