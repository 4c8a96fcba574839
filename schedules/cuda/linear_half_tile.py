"""Linear layers in fp16, many tokens, where there are no tensor cores (sm_53): tiles by half2 multiply-adds.

Operators and layout as linear_half. A launch rounds activations first, as in linear_half_gemm, but lays them down with
the tokens of an input side by side. A block has tokens x rows results, a thread 8 x 8 or 4 x 8 of them, and both
halves of a half2 are rows: an activation is multiplied with two rows at once, which takes no instruction, because
Maxwell's half2 arithmetic takes either half of an operand twice (ptxas does so). Weights are unpacked once a block, to
shared memory, the rows of an input side by side: 128 bits are 8 rows or 8 tokens of an input.

A sum has 16 multiply-adds in fp16; two of them meet and become fp32: |sum| <= 2 * 16 * 8 * 255 < 65504.

A warp's step of 32 inputs, 8 x 8 a thread: 1024 products, 64 reads of 128 bits from shared memory, 160 to bring sums
to fp32 and scale them, some 90 to stage. Clocks of a multiprocessor for four warps: 1340 of issue, of which 1024 are
products, and 1190 of shared memory. So at best 76 % of Nano's 236 G multiply-adds/s: a count, nothing was timed.
A block may take 168 registers a thread, so that three of 128 threads, 12 warps, fit a multiprocessor.

Knobs: tokens and rows of a block, its warps, and the order of tiles.
"""

from __future__ import annotations

from collections.abc import Mapping

from schedules.cuda.kernel import CudaKernel, Launch, ordered
from schedules.cuda.linear_half import Layer, layer_of, workload
from schedules.cuda.linear_half_gemm import FIRST_SM
from schedules.cuda.packed_half import padded_rows
from schedules.cuda.source import Constant
from schedules.kernel import NotSuited, Request, Space, TensorSpec

RANK = 5  # before linear_half_gemm
STEP = 32  # inputs that are staged at a time
ROUND_THREADS, ROUND_TOKENS = 256, 8
EACH = {64: 8, 32: 4}  # results of a thread, and its tokens
WARPS = 12  # on a multiprocessor: 168 registers a thread
MOST_WORDS = 16  # of codes, that a thread unpacks a step


def many(request: Request) -> Layer:
    """The layer, if it is one of several tokens and the chip has no tensor cores. Raises NotSuited."""
    layer = layer_of(request)
    if layer.m == 1 or layer.gpu.sm >= FIRST_SM:
        raise NotSuited
    return layer


def default_knobs(layer: Layer) -> dict[str, int]:
    """The largest tile that is not mostly padding; with few tokens there are not enough of them for 8 x 8 a thread."""
    tokens = next((t for t in (16, 32, 64) if t >= layer.m), 128)
    rows = 128 if tokens == 16 and padded_rows(layer.n) % 128 == 0 else 64
    results = 32 if tokens == 16 else 64
    return {"tokens": tokens, "rows": rows, "warps": tokens * rows // results // 32, "order": 0}


def lower(request: Request) -> CudaKernel:
    """The rounding, then a block for every tile."""
    layer = many(request)
    knobs = default_knobs(layer) | dict(request.knobs)
    tokens, rows, warps = knobs["tokens"], knobs["rows"], knobs["warps"]
    sizes: dict[str, Constant] = {"TOKENS": tokens, "ROWS": rows, "ORDER": knobs["order"]}
    sizes |= {"EACH": EACH[tokens * rows // (32 * warps)], "BLOCKS": WARPS // warps}
    name = f"linear_half_tile_{layer.shape_name}_t{tokens}r{rows}w{warps}o{knobs['order']}"
    base = ", const float* __restrict__ residual" if layer.residual else ""
    entry = f"""extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
KERNEL(const Half* __restrict__ rounded, const float* __restrict__ back, const float* __restrict__ sums,
{layer.weight_parameters}{base}, float* __restrict__ out) {{
  run(rounded, back, sums, {layer.weight_values}, {"residual" if layer.residual else "nullptr"}, out);
}}"""
    text = layer.text(name, sizes, entry, "linear_half_tile.cu")
    padded, stored = -(-layer.m // tokens) * tokens, -(-layer.places.stored // STEP) * STEP
    rounded, back, sums = layer.out + 1, layer.out + 2, layer.out + 3
    grid = ordered(padded_rows(layer.n) // rows, padded // tokens, knobs["order"])
    weight = tuple(range(1, layer.out + 1))  # and the residual, and the result
    launches = (
        Launch(f"{name}_round", (padded // ROUND_TOKENS, 1, 1), (ROUND_THREADS, 1, 1), (0, rounded, back, sums)),
        Launch(name, grid, (32 * warps, 1, 1), (rounded, back, sums, *weight)),
    )
    temporaries = (
        TensorSpec((stored, padded), "float16"),
        TensorSpec((padded,), "float32"),
        TensorSpec((layer.places.stored // layer.places.span, padded), "float32"),
    )
    return CudaKernel(name, text, launches, layer.packings, temporaries)


LOWERS = {f"quern.linear_half{kind}{tail}": lower for kind in ("", "_offset", "_table") for tail in ("", "_residual")}


def _fits(layer: Layer, knobs: Mapping[str, int]) -> bool:
    """Whether the tile is needed and comes out even, and every thread has a share of it that registers hold."""
    tokens, rows, threads = knobs["tokens"], knobs["rows"], 32 * knobs["warps"]
    if tokens * rows // threads not in EACH or tokens // 2 >= layer.m or padded_rows(layer.n) % rows:
        return False
    words = rows * layer.places.bits // threads
    shared = 2 <= words <= MOST_WORDS and threads <= STEP * tokens // 8
    return shared and not (knobs["order"] and tokens >= layer.m)


def space(request: Request) -> Space:
    """What tuning may try."""
    layer = many(request)
    default = default_knobs(layer)
    tried = {"tokens": (16, 32, 64, 128), "rows": (32, 64, 128), "warps": (1, 2, 4), "order": (0, 1)}
    return Space.around(
        default, tried, schedule=f"cuda.linear_half_tile.{layer.gpu.arch}", workload=workload(layer),
        macs=layer.m * layer.n * layer.places.k, allowed=lambda knobs: knobs == default or _fits(layer, knobs),
    )  # fmt: skip


SPACES = dict.fromkeys(LOWERS, space)
