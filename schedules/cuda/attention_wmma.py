"""Attention of a prompt on fp16 tensor cores by wmma: sm_72, caches of float16 and int8.

As attention_mma, with what wmma leaves unsaid made up for: a fragment's elements have no known row, so scores are
stored to shared memory for the softmax, weights come back as fp16 from there, and the factor that old sums get is
itself loaded as a fragment, of a 16 x 16 tile that repeats each row's factor.
"""

from __future__ import annotations

from schedules.cuda.attention import call_of, tile_of
from schedules.cuda.kernel import CudaKernel, Launch
from schedules.cuda.source import Constant
from schedules.kernel import NotSuited, Request

RANK = 5  # before the tiles in fp32, after mma
FIRST_SM = 70
TILES = ((64, 64, 32), (128, 32, 32), (256, 32, 16))  # up to d: rows, positions; all arrays must fit 48 KiB


def lower(request: Request) -> CudaKernel:
    """A block for every tile of tokens and group of heads."""
    call = call_of(request)
    if call.m == 1 or call.gpu.sm < FIRST_SM or call.cache == "float32" or call.d > TILES[-1][0]:
        raise NotSuited
    _, most_rows, block = next(tile for tile in TILES if call.d <= tile[0])
    tile = tile_of(call, most_rows)
    rows = -(-tile["TOKENS"] * tile["SHARED"] // 16) * 16
    name = f"attention_wmma_{call.shape_name}_r{rows}p{block}"
    constants: dict[str, Constant] = {**tile, "ROWS": rows, "BLOCK": block, "THREADS": 2 * rows, "SWIZZLED": 0}
    entry = "attention_entry_int8.cu" if call.codes else "attention_entry.cu"
    source = call.text(name, constants, "attention_stage.cu", "attention_wmma.cu", entry)
    grid = (-(-call.m // tile["TOKENS"]), call.heads // tile["SHARED"], 1)
    arguments = tuple(range(call.span_argument + 2))
    return CudaKernel(name, source, (Launch(name, grid, (2 * rows, 1, 1), arguments),))


LOWERS = {"quern.attention": lower, "quern.attention_int8": lower}
