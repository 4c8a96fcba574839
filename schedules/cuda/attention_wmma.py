"""Attention of a prompt on fp16 tensor cores by wmma: sm_72, caches of float16 and int8.

As attention_mma, with what wmma leaves unsaid made up for: a fragment's elements have no known row, so scores are
stored to shared memory for the softmax, weights come back as fp16 from there, and the factor that old sums get is
itself loaded as a fragment, of a 16 x 16 tile that repeats each row's factor.
"""

from __future__ import annotations

from schedules.cuda.attention import on_tensor_cores
from schedules.cuda.kernel import CudaKernel
from schedules.kernel import Request

RANK = 5  # before the tiles in fp32, after mma
FIRST_SM = 70
TILES = ((64, 64, 32), (128, 32, 32), (256, 32, 16))  # up to d: rows, positions; all arrays must fit 48 KiB


def lower(request: Request) -> CudaKernel:
    """A block for every tile of tokens and group of heads."""
    return on_tensor_cores(request, "wmma", FIRST_SM, TILES, swizzled=0)


LOWERS = {"quern.attention": lower, "quern.attention_int8": lower}
