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

from schedules.cuda.attention import SHARED_MOST, Call, TensorCores

RANK = 6  # before the tiles in fp32
# Registers of a lane that hold fragments all the time: with 70 to 100 more for addresses and what is loaded, fewer
# than 255. ptxas takes 238 of 128 (d = 128, 64 positions), 232 of 140 (d = 256, 16 positions).
MOST_FRAGMENTS = 140
FAR = 128  # queries of longer heads stay in shared memory
MATRIX = 16


def fits(call: Call, rows: int, block: int) -> bool:
    """Sums, queries and scores in registers; keys, values, far queries and scales in shared memory."""
    steps, far = call.padded // MATRIX, call.d > FAR
    fragments = 8 * steps + (4 if far else 4 * steps) + 8 * (block // MATRIX)
    staged = 2 * block * (2 * call.padded + 8) + 8 * block + 16 * (steps * 2 * rows if far else 1)
    return fragments <= MOST_FRAGMENTS and staged <= SHARED_MOST


FAMILY = TensorCores("mma", 80, ((128, 64, 64), (256, 32, 16)), 1, fits)
LOWERS = {"quern.attention": FAMILY.lower, "quern.attention_int8": FAMILY.lower}
SPACES = dict.fromkeys(LOWERS, FAMILY.space)
