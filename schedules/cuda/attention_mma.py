"""Attention of a prompt on fp16 tensor cores by mma.m16n8k16: sm_87 and sm_90, caches of float16 and int8.

A block has up to 64 rows (token, query head of one kv head), a warp 16 of them, and goes through the context in
blocks of positions with an online softmax in base 2 (arXiv:2307.08691): scores, weights and sums stay in a warp's
registers, the scores' fragment is the weights' as it lies. Keys are staged while values are multiplied, values while
scores are made.

Queries are brought to 1..2 by a power of two a row and rounded to fp16; weights, at most 1, are rounded to fp16; all
sums and the softmax are fp32. Codes of an int8 cache are halves exactly: k_scale meets the scores, v_scale the
weights, as a share of the largest v_scale so far, which sums are brought to together with their maximum.

For 16 positions and d = 128 a warp issues 32 mma and 16 ldmatrix; a lane has 8 scores there, 10 instructions each.
"""

from __future__ import annotations

from schedules.cuda.attention import call_of, tile_of
from schedules.cuda.kernel import CudaKernel, Launch
from schedules.cuda.source import Constant
from schedules.kernel import NotSuited, Request

RANK = 6  # before the tiles in fp32
FIRST_SM = 80
TILES = ((128, 64, 64), (256, 32, 16))  # up to d: rows, positions; sums, scores and queries must fit 255 registers


def lower(request: Request) -> CudaKernel:
    """A block for every tile of tokens and group of heads."""
    call = call_of(request)
    if call.m == 1 or call.gpu.sm < FIRST_SM or call.cache == "float32" or call.d > TILES[-1][0]:
        raise NotSuited
    _, most_rows, block = next(tile for tile in TILES if call.d <= tile[0])
    tile = tile_of(call, most_rows)
    rows = -(-tile["TOKENS"] * tile["SHARED"] // 16) * 16
    name = f"attention_mma_{call.shape_name}_r{rows}p{block}"
    constants: dict[str, Constant] = {**tile, "ROWS": rows, "BLOCK": block, "THREADS": 2 * rows, "SWIZZLED": 1}
    entry = "attention_entry_int8.cu" if call.codes else "attention_entry.cu"
    source = call.text(name, constants, "attention_stage.cu", "attention_mma.cu", entry)
    grid = (-(-call.m // tile["TOKENS"]), call.heads // tile["SHARED"], 1)
    arguments = tuple(range(call.span_argument + 2))
    return CudaKernel(name, source, (Launch(name, grid, (2 * rows, 1, 1), arguments),))


LOWERS = {"quern.attention": lower, "quern.attention_int8": lower}
