"""Integer linear layers of many tokens on Xavier's tensor cores (sm_72): wmma on int8.

Operators, formula and layout as in schedules.cuda.linear_int8, products and scaling as in linear_int8_mma, of which it
shares the text (linear_int8_tensor.cu). A block makes `tokens` x `rows` outputs, some spans at a time: while the tensor
cores work on what lies in shared memory, the threads' registers already receive the next part.

Which lane holds what of a wmma fragment is not documented for sm_72. But ptxas turns wmma.load into plain loads, and
wmma.mma of 16 x 16 x 16 bytes into four IMMA.8816 (nvdisasm 12.8 of NVRTC 11.8's code, which is what a bundle carries):
fragments are those of four mma.m8n8k16 as documented for later chips. So the kernel fills them by its own loads of 16
bytes. A block asks at its start all the same, by loading the numbers 0 to 255 as each operand, and ends the launch
with an error if they lie otherwise: PTX may be compiled by a driver that nobody knows.

64 tokens x 32 rows x 128 inputs of a warp, 4 bits: 256 IMMA.8816 are 1024 clocks of a scheduler's tensor core (1024
multiply-adds a clock and multiprocessor, Xavier's 22 TOPS) beside 782 instructions in all and 112 turns of shared
memory, of 256 that fit. Volta multiplies bytes of equal signedness only, so zero points meet the sums: one
multiply-add more a result. Shared memory: 64 x 128 x 128 takes 20 KB. Nothing of this has been timed.
"""

from __future__ import annotations

from collections.abc import Mapping

from schedules.cuda.kernel import CudaKernel, ordered
from schedules.cuda.linear_int8 import Call, read, workload
from schedules.cuda.linear_int8_mma import SHARED, sizes, stage_bytes, steps, whole
from schedules.cuda.packed import ROWS
from schedules.kernel import NotSuited, Request, Space

RANK = 1
FIRST, LAST = 72, 79  # compute capabilities with int8 wmma and without cp.async
FEW = 4  # tokens that the dot-product kernel serves
FILES = ("linear_int8_tensor.cu", "linear_int8_wmma.cu")
RESIDENT = 8  # warps: registers are what bounds them
MOST_FETCHED = 64  # registers of a thread for what it reads ahead; with 1024 outputs and 92 of them, 40 bytes spill


def fetched(call: Call, tokens: int, rows: int, warps: int) -> int:
    """Registers that hold the next stage on its way to shared memory (`Fetched`)."""
    _, spans = steps(call)
    threads, units, pieces = 32 * warps, spans * call.layout.units, spans * -(-call.layout.geometry.width // 16)
    each = [
        (tokens, threads // _lanes(pieces), 4),
        (rows // ROWS, threads // _lanes(units), 4),
        (tokens * spans, threads, 2),
        (rows // ROWS * spans, threads,
         (2 if call.scale == "float16" else 4) + {"zero": 1, "offset": 4, "table": 0}[call.affine]),
    ]  # fmt: skip
    return sum(-(-items // at_once) * registers for items, at_once, registers in each)


def _lanes(items: int) -> int:
    return 1 << (items - 1).bit_length()


def default_knobs(call: Call) -> dict[str, int]:
    """64 x 128 where that fills the device; fewer tokens where there are fewer, fewer rows where they leave it idle."""
    tokens = 16 if call.m <= 16 else 32 if call.m <= 32 else 64
    tiles = -(-call.m // tokens)
    rows = next((r for r in (128, 64) if tiles * -(-call.n // r) >= call.gpu.multiprocessors), 32)
    warps = rows // 32 if tokens == 64 else rows // 16
    return {"tokens": tokens, "rows": rows, "warps": warps, "order": int(tiles > 1)}


def lower(request: Request) -> CudaKernel:
    """A block of warps a tile of the output. Raises NotSuited on other chips and for few tokens."""
    call = suited(request)
    knobs = default_knobs(call) | dict(request.knobs)
    tokens, rows, warps = knobs["tokens"], knobs["rows"], knobs["warps"]
    more = sizes(call, tokens, rows, warps, knobs["order"]) | {"UNSIGNED": 0}
    grid = ordered(-(-call.n // rows), -(-call.m // tokens), knobs["order"])
    return call.kernel(call.name("wmma", knobs), FILES, more, grid, warps, RESIDENT)


def suited(request: Request) -> Call:
    """The call, if it is one for Xavier's tensor cores."""
    call = read(request)
    if not FIRST <= call.gpu.sm <= LAST or call.m <= FEW:
        raise NotSuited
    return call


LOWERS = {
    f"quern.linear_int8{affine}{tail}": lower for affine in ("", "_offset", "_table") for tail in ("", "_residual")
}


def space(request: Request) -> Space:
    """What tuning may try."""
    call = suited(request)
    default = default_knobs(call)

    def allowed(knobs: Mapping[str, int]) -> bool:
        tile = knobs["tokens"], knobs["rows"], knobs["warps"]
        fits = whole(*tile) and stage_bytes(call, *tile[:2]) <= SHARED
        fits = fits and (knobs["order"] == 0 or call.m > knobs["tokens"])
        return fits and (fetched(call, *tile) <= MOST_FETCHED or knobs == default)

    tried = {"tokens": (16, 32, 64), "rows": (32, 64, 128), "warps": (1, 2, 4, 8), "order": (0, 1)}
    macs = call.m * call.n * call.layout.geometry.k
    return Space.around(
        default, tried, schedule=f"cuda.linear_int8_wmma.{call.gpu.arch}",
        workload=workload(call), macs=macs, allowed=allowed,
    )  # fmt: skip


SPACES = dict.fromkeys(LOWERS, space)
