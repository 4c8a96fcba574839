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

from schedules.cuda.attention import on_tensor_cores
from schedules.cuda.kernel import CudaKernel
from schedules.kernel import Request

RANK = 6  # before the tiles in fp32
FIRST_SM = 80
TILES = ((128, 64, 64), (256, 32, 16))  # up to d: rows, positions; sums, scores and queries must fit 255 registers


def lower(request: Request) -> CudaKernel:
    """A block for every tile of tokens and group of heads."""
    return on_tensor_cores(request, "mma", FIRST_SM, TILES, swizzled=1)


LOWERS = {"quern.attention": lower, "quern.attention_int8": lower}
