"""Linear layers in fp16, many tokens: activations are rounded by a launch of their own, then tiles of tokens x rows.

Operators and layout as linear_half. The first launch brings a token's activations below 8 by one power of two and
rounds them to halves, in the order of the packed inputs. Products are of code - zero, which fp16 holds exactly, and
a group's scale meets its fp32 sum: so a result is off by the rounding of x alone (and of a table's values).
By default, for many tokens:
  mma   sm_87, sm_90: mma.m16n8k16 by 4 warps, 64 x 128 results, 64 x 32 of a warp. cp.async brings activations and
        packed weights two steps of 64 inputs ahead; a lane's word of a row is just what its fragments want, so
        weights are unpacked in registers, for 64 tokens. A warp's step: 64 mma, 16 ldmatrix, 8 words of 9
        instructions, 64 to scale: 309 of machine code in all, 4.8 an mma, whose tensor cores take 8 clocks on sm_87
        and 4 on sm_90.
  wmma  sm_72: 64 x 64 results, 32 x 32 of a warp, weights unpacked to shared memory. Whose row a fragment's element is,
        is found by loading a tile of numbers. fp16 ceiling of Xavier NX: 6.7 TFLOP/s.
  sm_53 has no tensor cores: linear_half_tile.
What wmma reads of shared memory bounds it beside what it issues: 128 bytes a clock, 4 clocks for a read of 128 bits a
lane. A product of 32 clocks has one fragment of two reads with 32 x 32 of a warp, 1.5 with 16 x 32, where the reads of
four warps (48 clocks) outlast it.
With up to 16 tokens all read each weight once; then the ceiling is the memory's.

Knobs: tokens and rows of a block's tile, the order of tiles, and for mma warps and the buffers (`stages`) of copies
under way; the others have two threads a row.
"""

from __future__ import annotations

from collections.abc import Mapping

from schedules.cuda.kernel import CudaKernel, Launch, ordered
from schedules.cuda.linear_half import Layer, layer_of, workload
from schedules.cuda.packed_half import padded_rows
from schedules.cuda.source import Constant
from schedules.kernel import NotSuited, Request, Space, TensorSpec

MMA, WMMA = "mma", "wmma"
FILES = {
    MMA: ("linear_half_mma.cu",),
    WMMA: ("linear_half_stage.cu", "linear_half_wmma.cu"),
}
FIRST_SM = 70
MOST_TOKENS = 64  # of the default
ROUND_THREADS = 256
SHARED = 48 << 10
STEP, PITCH = 64, 72  # inputs of a step of mma, and halves that they take in shared memory
MOST_TILE = 16  # mma: 16 x 8 results of a warp, 8 registers each in fp32, for groups of 32 and more


def family(layer: Layer) -> str:
    """What multiplies on this chip."""
    return MMA if layer.gpu.sm >= 80 else WMMA


def default_knobs(layer: Layer) -> dict[str, int]:
    """The largest tile that is not mostly padding; by mma 128 rows where that leaves no multiprocessor idle.

    Tensor cores take tiles that share weights one after the other: memory then gives weights once.
    """
    tokens, kind = next((t for t in (16, 32) if t >= layer.m), MOST_TOKENS), family(layer)
    knobs = {"tokens": tokens, "rows": 64, "order": int(layer.m > tokens)}
    if kind != MMA:
        return knobs
    knobs |= {"warps": 4, "stages": 3}
    wide = knobs | {"rows": 128}
    many = padded_rows(layer.n) // 128 * -(-layer.m // tokens) >= layer.gpu.multiprocessors
    fits = padded_rows(layer.n) % 128 == 0 and _fits(layer, wide)
    return wide if tokens == MOST_TOKENS and many and fits else knobs


def lower(request: Request) -> CudaKernel:
    """The rounding, then a block for every tile."""
    layer = many(request)
    kind, stored = family(layer), layer.places.stored
    knobs = default_knobs(layer) | dict(request.knobs)
    tokens, rows = knobs["tokens"], knobs["rows"]
    warps = knobs.get("warps", rows // 16)
    sizes: dict[str, Constant] = {"TOKENS": tokens, "ROWS": rows, "ORDER": knobs["order"], "WARPS": warps}
    name = f"linear_half_{kind}_{layer.shape_name}_t{tokens}r{rows}o{knobs['order']}"
    if kind == MMA:
        sizes["STAGES"] = knobs["stages"]
        name += f"w{warps}s{knobs['stages']}"
    base = ", const float* __restrict__ residual" if layer.residual else ""
    entry = f"""extern "C" __global__ void __launch_bounds__(THREADS, 1)
KERNEL(const Half* __restrict__ rounded, const float* __restrict__ back, const float* __restrict__ sums,
{layer.weight_parameters}{base}, float* __restrict__ out) {{
  run(rounded, back, sums, {layer.weight_values}, {"residual" if layer.residual else "nullptr"}, out);
}}"""
    text = layer.text(name, sizes, entry, "linear_half_round.cu", *FILES[kind])
    rounded, back, sums = layer.out + 1, layer.out + 2, layer.out + 3
    grid = ordered(padded_rows(layer.n) // rows, -(-layer.m // tokens), knobs["order"])
    weight = tuple(range(1, layer.out + 1))  # and the residual, and the result
    launches = (
        Launch(f"{name}_round", (layer.m, 1, 1), (ROUND_THREADS, 1, 1), (0, rounded, back, sums)),
        Launch(name, grid, (32 * warps, 1, 1), (rounded, back, sums, *weight)),
    )
    temporaries = (
        TensorSpec((layer.m, stored), "float16"),
        TensorSpec((layer.m,), "float32"),
        TensorSpec((layer.m, stored // layer.places.span), "float32"),
    )
    return CudaKernel(name, text, launches, layer.packings, temporaries)


def many(request: Request) -> Layer:
    """The layer, if it is one of several tokens, and the chip has tensor cores. Raises NotSuited."""
    layer = layer_of(request)
    if layer.m == 1 or layer.gpu.sm < FIRST_SM:
        raise NotSuited
    return layer


LOWERS = {f"quern.linear_half{kind}{tail}": lower for kind in ("", "_offset", "_table") for tail in ("", "_residual")}


def _fits(layer: Layer, knobs: Mapping[str, int]) -> bool:
    """Whether warps share an mma tile evenly, its buffers fit, and its sums stay in registers."""
    tokens, rows, warps = knobs["tokens"], knobs["rows"], knobs["warps"]
    down = max(1, tokens // 64)
    across = warps // down
    if warps % down or not across or rows // 8 % across:
        return False
    chunks, tile = STEP // layer.places.chunk, tokens // 16 // down * (rows // 8 // across)
    # A scale for each 16 inputs, and offsets, take registers of their own for every 8 rows of a warp.
    most = MOST_TILE // (4 if layer.places.span == 16 else 2 if layer.affine == "offset" else 1)
    return tile <= most and knobs["stages"] * (tokens * PITCH * 2 + chunks * rows * 16) + 32 <= SHARED


def space(request: Request) -> Space:
    """What tuning may try."""
    layer = many(request)
    kind, default = family(layer), default_knobs(layer)

    def allowed(knobs: Mapping[str, int]) -> bool:
        if knobs["tokens"] // 2 >= layer.m or padded_rows(layer.n) % knobs["rows"]:
            return False
        if knobs["order"] and knobs["tokens"] >= layer.m:
            return False
        if kind == MMA:
            return knobs == default or _fits(layer, knobs)
        return True

    tiles: dict[str, dict[str, tuple[int, ...]]] = {
        MMA: {"tokens": (16, 32, 64, 128), "rows": (32, 64, 128), "warps": (2, 4, 8), "stages": (2, 3, 4)},
        WMMA: {"tokens": (16, 32, 64), "rows": (32, 64, 128)},
    }
    tried = tiles[kind] | {"order": (0, 1)}
    macs = layer.m * layer.n * layer.places.k
    schedule = f"cuda.linear_half_{kind}.{layer.gpu.arch}"
    return Space.around(
        default, tried, schedule=schedule, workload=workload(layer), macs=macs, allowed=allowed
    )


SPACES = dict.fromkeys(LOWERS, space)
