"""Integer linear layers of many tokens on tensor cores, sm_80 and later: mma.m16n8k32 on int8, copies beside it.

Operators, formula and layout as in schedules.cuda.linear_int8. A block makes `tokens` x `rows` outputs. Activations
and codes of the next spans are under way to shared memory (cp.async, `stages` buffers) while the tensor cores work on
this one. A warp has 32 (or 16) tokens and some columns of 8 rows; for each column it adds up a span in int32,
exactly, starting from 1.5 * 2^23, and scales that into fp32 sums: the order over spans is the CPU's.

Where an input stands in k is free as long as both operands agree: lane t of four takes inputs 8 t to 8 t + 7 of each
32, which is one word of codes at 4 bits (two at 8) and one 64-bit load of a token. So both fragments are plain loads of
unpacked order, without bank conflicts by the strides chosen below, and ldmatrix would read no fewer bytes. The parts
of a span beyond a multiple of 32 inputs multiply zeros.

A warp's 32 tokens x 32 rows x 128 inputs: 32 mma (each 4096 multiply-adds: 8 clocks of a quarter of an sm_87
multiprocessor, 256 in all), 16 words of codes with 48 operations to unpack, 32 x 4 operations of scaling, and a
span's activations, read once for all columns: about 430 instructions of PTX, and 100 more for the copies of 8 warps.
An instruction a clock: half of the peak of sm_87 is in reach, at groups of 32 a fifth. sm_90 has four times the
tensor cores for these instructions' clocks and is bound by scaling alone. Shared memory fits 48 KB, which every
device has without asking. From the second-level cache a block reads (tokens + rows / 2) bytes an input for tokens *
rows multiply-adds: at 64 x 128, 32 bytes a clock of sm_87 at its peak. Nothing of this has been timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from schedules.cuda.kernel import CudaKernel, ordered
from schedules.cuda.linear_int8 import Call, read, workload
from schedules.cuda.packed import ROWS
from schedules.kernel import NotSuited, Request, Space

RANK = 2
SINCE = 80  # compute capability: mma.m16n8k32 on int8 and cp.async
FEW = 4  # tokens that the dot-product kernel serves
K_STEP = 32  # inputs of an mma
STAGE_INPUTS = 128  # at most, of one token in one buffer
SHARED = 48 << 10
RESIDENT = 16  # warps: 128 registers a thread, for up to FEW_OUTPUTS a warp
FEW_OUTPUTS, MOST_OUTPUTS = 1024, 2048  # of a warp: 32 and 64 fp32 sums a thread
TILES = ((64, 128), (64, 64), (32, 64), (16, 64), (16, 32))  # tokens x rows of a block, the least memory traffic first


def steps(call: Call) -> tuple[int, int]:
    """(k-steps of a span, spans of a buffer)."""
    k_steps = -(-call.layout.geometry.width // K_STEP)
    return k_steps, min(max(1, STAGE_INPUTS // (k_steps * K_STEP)), call.layout.geometry.spans)


def strides(call: Call) -> tuple[int, int]:
    """(bytes between tokens, units between row blocks): the lanes of a load then touch every bank once.

    Tokens: 32 times an odd number, so that four neighbours' 32 bytes fill 128. Row blocks, four of whose 16-byte units
    (every second one of 8 bits) two blocks read at once: 4 above a multiple of 8, or odd.
    """
    k_steps, spans = steps(call)
    inputs, units = k_steps * spans * K_STEP, k_steps * spans * call.layout.bits
    tokens = inputs if inputs // 32 % 2 else inputs + 32
    if call.layout.bits == 8:
        return tokens, units + 1
    return tokens, next(u for u in range(units, units + 8) if u % 8 == 4)


def stage_bytes(call: Call, tokens: int, rows: int) -> int:
    """Size of `Stage`."""
    _, spans = steps(call)
    a_stride, w_stride = strides(call)
    blocks, scale = rows // ROWS, 8 if call.scale == "float16" else 16
    parts = [
        tokens * a_stride,
        blocks * w_stride * 16,
        blocks * spans * scale,
        blocks * spans * 16 if call.affine == "offset" else 16,
        blocks * spans * 4 if call.affine == "zero" else 4,
        tokens * spans * 4,
        tokens * spans * 4,
    ]
    return sum(-(-part // 16) * 16 for part in parts)


def default_knobs(call: Call) -> dict[str, int]:
    """The largest tile that fits twice into 48 KB, is not mostly padding, and leaves no multiprocessor idle."""
    fitting = [tile for tile in TILES if 2 * stage_bytes(call, *tile) <= SHARED]
    useful = [(t, r) for t, r in fitting if t <= 16 * -(-call.m // 16)] or fitting[-1:]
    filling = [(t, r) for t, r in useful if -(-call.m // t) * -(-call.n // r) >= call.gpu.multiprocessors]
    tokens, rows = (filling or useful[-1:])[0]
    stages = 3 if 3 * stage_bytes(call, tokens, rows) <= SHARED else 2
    return {"tokens": tokens, "rows": rows, "warps": rows // 16, "stages": stages, "order": 0}


def lower(request: Request) -> CudaKernel:
    """A block of warps a tile of the output. Raises NotSuited before sm_80 and for few tokens."""
    call = suited(request)
    knobs = default_knobs(call) | dict(request.knobs)
    tokens, rows, stages = knobs["tokens"], knobs["rows"], knobs["stages"]
    k_steps, spans = steps(call)
    a_stride, w_stride = strides(call)
    warps_m = max(1, tokens // 32)
    shared = stages * stage_bytes(call, tokens, rows)
    sizes = {
        "BM": tokens, "BN": rows, "WARPS_M": warps_m, "WARPS_N": knobs["warps"] // warps_m, "K_STEPS": k_steps,
        "STAGE_SPANS": spans, "A_STRIDE": a_stride, "W_STRIDE": w_stride, "STAGES": stages, "SHARED_BYTES": shared,
        "ORDER": knobs["order"],
    }  # fmt: skip
    grid = ordered(-(-call.n // rows), -(-call.m // tokens), knobs["order"])
    few = tokens * rows // knobs["warps"] <= FEW_OUTPUTS
    resident = RESIDENT if few and call.layout.bits == 4 and call.affine == "zero" else 8
    return call.kernel(call.name("mma", knobs), "linear_int8_mma.cu", sizes, grid, knobs["warps"], resident, shared)


def suited(request: Request) -> Call:
    """The call, if it is one for tensor cores of sm_80."""
    call = read(request)
    if call.gpu.sm < SINCE or call.m <= FEW:
        raise NotSuited
    return call


LOWERS = {
    f"quern.linear_int8{affine}{tail}": lower for affine in ("", "_offset", "_table") for tail in ("", "_residual")
}


def points(call: Call) -> Iterator[tuple[int, int]]:
    """Tiles that fit."""
    return (tile for tile in TILES if 2 * stage_bytes(call, *tile) <= SHARED)


def space(request: Request) -> Space:
    """What tuning may try."""
    call = suited(request)

    def allowed(knobs: Mapping[str, int]) -> bool:
        tokens, rows, warps = knobs["tokens"], knobs["rows"], knobs["warps"]
        warps_m = max(1, tokens // 32)
        whole = warps % warps_m == 0 and rows % (8 * (warps // warps_m)) == 0
        whole = whole and tokens * rows // warps <= MOST_OUTPUTS and (knobs["order"] == 0 or call.m > tokens)
        return whole and knobs["stages"] * stage_bytes(call, tokens, rows) <= SHARED

    tried = {"tokens": (16, 32, 64), "rows": (32, 64, 128), "warps": (2, 4, 8), "stages": (2, 3, 4), "order": (0, 1)}
    macs = call.m * call.n * call.layout.geometry.k
    return Space.around(
        default_knobs(call), tried, schedule=f"cuda.linear_int8_mma.{call.gpu.arch}", workload=workload(call),
        macs=macs, allowed=allowed,
    )  # fmt: skip


SPACES = dict.fromkeys(LOWERS, space)
