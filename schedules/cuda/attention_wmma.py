"""Attention of a prompt on fp16 tensor cores by wmma: sm_72, caches of float16 and int8.

As attention_mma, with what wmma leaves unsaid made up for: a fragment's elements have no known row, so scores are
stored to shared memory for the softmax, weights come back as fp16 from there, and the factor that old sums get is
itself loaded as a fragment, of a 16 x 16 tile that repeats each row's factor. A lane reads its half of a row's scores
16 bytes at a time and keeps them; weights and tile then take their place. Fragments of queries and weights are loaded
once for all positions and columns.
"""

from __future__ import annotations

from schedules.cuda.attention import SHARED_MOST, Call, TensorCores

RANK = 5  # before the tiles in fp32, after mma
MATRIX, TILE_PITCH = 16, 20


def fits(call: Call, rows: int, block: int) -> bool:
    """Everything but the sums lies in shared memory; those of d = 256, 128 registers, are the most there are."""
    warps, pitch = rows // MATRIX, call.padded + 8
    own = 4 * MATRIX * max(block + 8, TILE_PITCH + (block + 8) // 2)  # scores, or a tile and weights
    staged = 2 * block * (call.padded + pitch) + 2 * rows * pitch + warps * own + 8 * block
    return staged <= SHARED_MOST


FAMILY = TensorCores("wmma", 70, ((128, 64, 32), (256, 32, 16)), 0, fits)
LOWERS = {"quern.attention": FAMILY.lower, "quern.attention_int8": FAMILY.lower}
SPACES = dict.fromkeys(LOWERS, FAMILY.space)
