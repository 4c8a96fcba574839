"""Integer linear layers of many tokens on tensor cores, sm_80 and later: mma.m16n8k32 on int8, copies beside it.

Operators, formula and layout as in schedules.cuda.linear_int8. A block makes `tokens` x `rows` outputs. Activations
and codes of the next spans are under way to shared memory (cp.async, `stages` buffers) while the tensor cores work on
this one. A warp has up to 64 tokens and 32 rows: it unpacks a span's codes once for all its tokens, adds up in int32,
exactly, starting from 1.5 * 2^23, and scales that into fp32 sums: the order over spans is the CPU's.

Weights are the left operand (16 rows), tokens the right one (8 columns). Where an input stands in k is free as long as
both operands agree, and so is which row stands where: fragments are plain loads, 16 bytes a lane, of the packed layout
and of tokens, whose registers the mma takes as they come (linear_int8_tensor.cu). The other way round, a token's two
halves of 16 would have to be moved. Strides below keep loads out of each other's banks. A zero point leaves 4-bit codes
by one subtraction for four of them (code - zero + 128, unsigned; 128 times the activations' sum leaves with the start
value); that of 8-bit codes meets the sums, exactly. Parts of a span beyond a multiple of 32 inputs multiply zeros.

A warp's 64 tokens x 32 rows x 128 inputs, 4 bits, in machine code for sm_87: 496 instructions. 64 are mma (4096
multiply-adds: 8 clocks of a scheduler's tensor core on sm_87, 4 on sm_90), 84 unpack, 192 scale (3 a result, which
are fp32 units' business), 28 loads of 16 bytes from shared memory, 12 copies. So 512 clocks of sm_87's tensor cores
stand beside 496 to issue; shared memory has 112 turns and 40 of copies for 128 clocks of a multiprocessor. sm_90 would
want 256 clocks: issue and shared memory bound it to half of what mma could do. Groups of 32 scale four times as often.
Shared memory fits 48 KB, which every device has without asking. Nothing of this has been timed.
"""

from __future__ import annotations

from collections.abc import Mapping

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
FILES = ("linear_int8_tensor.cu", "linear_int8_mma.cu")
RESIDENT, MOST_RESIDENT = 12, 8  # warps: 168 registers a thread for 4 bits with zeros and 32 rows a warp, else 255
NEWER = 90  # for which ptxas wants more: 300 bytes would spill
MOST_OUTPUTS = 2048  # of a warp: 32 and 64 fp32 sums a thread
TILES = ((64, 128), (64, 64), (32, 64), (16, 64), (16, 32))  # tokens x rows of a block, the least memory traffic first


def steps(call: Call) -> tuple[int, int]:
    """(k-steps of a span, spans of a buffer)."""
    k_steps = -(-call.layout.geometry.width // K_STEP)
    return k_steps, min(max(1, STAGE_INPUTS // (k_steps * K_STEP)), call.layout.geometry.spans)


def strides(call: Call) -> tuple[int, int]:
    """(bytes between tokens, units between row blocks): the lanes of a load then touch every bank once.

    128 bytes are served at a time: loads of 16 bytes (an even number of k-steps) of two tokens, of 8 bytes of four. A
    lane's part of a span is 8 * k_steps bytes from its neighbour's. Of two row blocks four neighbouring units are read.
    """
    k_steps, spans = steps(call)
    inputs, units = k_steps * spans * K_STEP, k_steps * spans * call.layout.bits
    size = 8 if k_steps % 2 else 16

    def apart(stride: int) -> bool:
        starts = [g * stride + t * k_steps * 8 for g in range(128 // size // 4) for t in range(4)]
        return len({(at + i) % 128 for at in starts for i in range(0, size, 4)}) == 32

    tokens = [stride for stride in range(inputs, inputs + 128, size) if apart(stride)]
    return min(tokens, default=inputs + size), next(u for u in range(units, units + 8) if u % 8 == 4)


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
        tokens * spans * 8,
    ]
    return sum(-(-part // 16) * 16 for part in parts)


def sizes(call: Call, tokens: int, rows: int, warps: int, order: int) -> dict[str, int]:
    """Constants of linear_int8_tensor.cu."""
    k_steps, spans = steps(call)
    a_stride, w_stride = strides(call)
    down = warps_down(tokens)
    return {
        "BM": tokens, "BN": rows, "WARPS_M": down, "WARPS_N": warps // down, "K_STEPS": k_steps, "STAGE_SPANS": spans,
        "A_STRIDE": a_stride, "W_STRIDE": w_stride, "ORDER": order,
    }  # fmt: skip


def warps_down(tokens: int) -> int:
    """Warps that share rows: each has up to 64 tokens."""
    return max(1, tokens // 64)


def whole(tokens: int, rows: int, warps: int) -> bool:
    """Whether warps share a tile evenly: 16 or a multiple of 32 rows each, and few enough sums for its registers."""
    down = warps_down(tokens)
    own = rows * down // warps
    even = warps % down == 0 and rows * down % warps == 0 and own >= 16 and (own % 32 == 0 or 32 % own == 0)
    return even and tokens * rows // warps <= MOST_OUTPUTS


def default_knobs(call: Call) -> dict[str, int]:
    """The largest tile that fits twice into 48 KB, is not mostly padding, and leaves few multiprocessors idle.

    Where several tiles of tokens read the same weights they come one after the other: memory gives weights once.
    """
    fitting = [tile for tile in TILES if 2 * stage_bytes(call, *tile) <= SHARED]
    useful = [(t, r) for t, r in fitting if t <= 16 * -(-call.m // 16)] or fitting[-1:]
    filling = [(t, r) for t, r in useful if 4 * -(-call.m // t) * -(-call.n // r) >= 3 * call.gpu.multiprocessors]
    tokens, rows = (filling or useful[-1:])[0]
    stages = 3 if 3 * stage_bytes(call, tokens, rows) <= SHARED else 2
    warps = rows // 32 if tokens >= 64 else rows // 16
    return {"tokens": tokens, "rows": rows, "warps": warps, "stages": stages, "order": int(call.m > tokens)}


def lower(request: Request) -> CudaKernel:
    """A block of warps a tile of the output. Raises NotSuited before sm_80 and for few tokens."""
    call = suited(request)
    knobs = default_knobs(call) | dict(request.knobs)
    tokens, rows, warps = knobs["tokens"], knobs["rows"], knobs["warps"]
    shared = knobs["stages"] * stage_bytes(call, tokens, rows)
    more = sizes(call, tokens, rows, warps, knobs["order"]) | {
        "STAGES": knobs["stages"], "SHARED_BYTES": shared, "UNSIGNED": 1,
    }  # fmt: skip
    grid = ordered(-(-call.n // rows), -(-call.m // tokens), knobs["order"])
    few = rows * warps_down(tokens) // warps <= 32 and call.layout.bits == 4 and call.affine == "zero"
    few = few and call.gpu.sm < NEWER
    resident = RESIDENT if few else MOST_RESIDENT
    return call.kernel(call.name("mma", knobs), FILES, more, grid, warps, resident, shared)


def suited(request: Request) -> Call:
    """The call, if it is one for tensor cores of sm_80."""
    call = read(request)
    if call.gpu.sm < SINCE or call.m <= FEW:
        raise NotSuited
    return call


LOWERS = {
    f"quern.linear_int8{affine}{tail}": lower for affine in ("", "_offset", "_table") for tail in ("", "_residual")
}


def space(request: Request) -> Space:
    """What tuning may try."""
    call = suited(request)

    def allowed(knobs: Mapping[str, int]) -> bool:
        tokens, rows = knobs["tokens"], knobs["rows"]
        fits = whole(tokens, rows, knobs["warps"]) and (knobs["order"] == 0 or call.m > tokens)
        return fits and knobs["stages"] * stage_bytes(call, tokens, rows) <= SHARED

    tried = {"tokens": (16, 32, 64, 128), "rows": (32, 64, 128), "warps": (1, 2, 4, 8), "stages": (2, 3, 4)}
    macs = call.m * call.n * call.layout.geometry.k
    return Space.around(
        default_knobs(call), tried | {"order": (0, 1)}, schedule=f"cuda.linear_int8_mma.{call.gpu.arch}",
        workload=workload(call), macs=macs, allowed=allowed,
    )  # fmt: skip


SPACES = dict.fromkeys(LOWERS, space)
