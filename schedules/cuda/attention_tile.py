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

from schedules.cuda.attention import call_of, prompt, tile_of
from schedules.cuda.kernel import CudaKernel
from schedules.kernel import Request, Unsupported

TILES = ((128, 32, 32), (256, 16, 16))  # up to d: rows, positions; queries, keys and scores must fit 48 KiB
MOST_D = TILES[-1][0]


def lower(request: Request) -> CudaKernel:
    """A block for every tile of tokens and group of heads."""
    call = call_of(request)
    if call.d > MOST_D:
        raise Unsupported(f"{request.op}: heads of {call.d} elements do not fit shared memory; {MOST_D} do")
    _, rows, block = next(tile for tile in TILES if call.d <= tile[0])
    threads = min(128, rows * block // 4)
    return prompt(call, "tile", tile_of(call, rows), rows, block, threads)


LOWERS = {"quern.attention": lower, "quern.attention_int8": lower}
