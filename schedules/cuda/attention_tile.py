"""Attention of a prompt in fp32: for chips without fp16 tensor cores, and for fp32 caches everywhere.

A block has a tile of up to `rows` rows (token, query head of one kv head), and goes through the context in blocks of
positions with an online softmax (arXiv:2205.14135, in base 2). Keys, then values, are widened into one shared array, an
int8 cache is multiplied by its scales there, so that products are fp32 throughout, as on a CPU.
  scores   a thread has 4 rows x `positions * rows / (4 * threads)` positions, both by 128-bit reads
  values   a thread has 4 rows x 4 columns of every `threads / (rows / 4)` fours

fp32 ceilings: Nano 236 GFLOP/s, Xavier NX 845, Orin Nano 1280. An element of 4 rows and 2 keys is
8 multiply-adds beside 2 shared reads, a position of 4 rows and 8 columns 32 beside 3.
"""

from __future__ import annotations

from collections.abc import Mapping

from schedules.cuda.attention import SHARED_MOST, Call, call_of, fewest_rows, prompt, space_of, tile_of, too_large
from schedules.cuda.kernel import CudaKernel
from schedules.kernel import Request, Space, Unsupported

TILES = ((128, 32, 32), (256, 16, 16))  # up to d: rows, positions; queries, keys and scores must fit 48 KiB
MOST_D = TILES[-1][0]
MOST_SUMS = 96  # sums and scores in a thread's registers, beside some 60 others


def default_knobs(call: Call) -> dict[str, int]:
    """The stated default."""
    _, most, block = next(tile for tile in TILES if call.d <= tile[0])
    rows = fewest_rows(call, most)
    return {"rows": rows, "block": block, "threads": min(128, rows * block // 4)}


def fits(call: Call, knobs: Mapping[str, int]) -> bool:
    """Whether threads share rows and positions evenly, and registers and shared memory hold the tile."""
    rows, block, threads = knobs["rows"], knobs["block"], knobs["threads"]
    if threads % rows or threads > 32 * rows or rows * block % (4 * threads):
        return False
    wide = -(-call.d // 4)  # fours of columns
    fours = -(-wide // (threads // (rows // 4)))
    shared = 4 * (call.d * rows + 4 * wide * block + block * (rows + 4) + rows)
    return 16 * fours + rows * block // threads <= MOST_SUMS and shared <= SHARED_MOST


def lower(request: Request) -> CudaKernel:
    """A block for every tile of tokens and group of heads."""
    call = request_for(request)
    knobs = default_knobs(call) | dict(request.knobs)
    if not fits(call, knobs):
        raise too_large(request, knobs)
    rows = knobs["rows"]
    return prompt(call, "tile", tile_of(call, rows), rows, knobs["block"], knobs["threads"])


def request_for(request: Request) -> Call:
    """The call. Raises Unsupported for heads that nobody has."""
    call = call_of(request)
    if call.d > MOST_D:
        raise Unsupported(f"{request.op}: heads of {call.d} elements do not fit shared memory; {MOST_D} do")
    return call


def space(request: Request) -> Space:
    """What tuning may try: rows that share what is staged, positions staged at a time, threads that share a tile."""
    call = request_for(request)

    def allowed(knobs: Mapping[str, int]) -> bool:
        return knobs["rows"] <= fewest_rows(call, knobs["rows"]) and fits(call, knobs)

    tried = {"rows": (16, 32, 64), "block": (16, 32, 64), "threads": (64, 128, 256)}
    return space_of(call, "tile", default_knobs(call), tried, allowed)


LOWERS = {"quern.attention": lower, "quern.attention_int8": lower}
SPACES = dict.fromkeys(LOWERS, space)
