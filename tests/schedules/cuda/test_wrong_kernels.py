"""What the emulator and the tests would say of kernels with one mistake: each is found, none by luck."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from compiler.quant.ir import QuantWeight
from schedules.cuda.kernel import CudaKernel
from tests.emulator import cuda
from tests.emulator.cuda import hardware
from tests.schedules.cuda.linears import Activations, edited, lowered, run
from tests.schedules.test_linear_grids import exact_terms, spans, weight

N, K, GROUP = 72, 640, 128
SHARED = "shared memory"


@cache
def problem(m: int) -> tuple[QuantWeight, Activations]:
    w = weight("int4", False, N, K, GROUP, whole=True)
    return w, spans(w, np.random.default_rng(1).integers(-127, 128, (m, K)))


def kernel_of(gpu: str, m: int) -> CudaKernel:
    w, activations = problem(m)
    return lowered(activations, w, gpu)


@pytest.mark.parametrize(
    ("gpu", "m", "old", "new", "message"),
    [
        # A barrier less: the block's activations are read before they are there.
        ("jetson-orin", 1, "  block_sync();\n\n  float acc", "  float acc", "which nobody wrote"),
        # One tile further than a row has.
        ("jetson-orin", 1, "if (slot >= SLOTS) return;", "if (slot >= SLOTS + 1) return;", "of array 3, which has"),
        # Codes from an address that is no multiple of 16.
        (
            "jetson-orin", 1, "load_stream(p.codes + position(tile, i, lane))",
            "load_stream((const uint4*)((const char*)p.codes + 4) + position(tile, i, lane))", "is no multiple of 16",
        ),
        # Copies that nobody waits for, and a buffer that is filled while others still read it.
        ("jetson-orin", 9, "async_wait<STAGES - 2>();", "async_wait<STAGES - 1>();", "asynchronous copy"),
        ("jetson-orin", 9, "    block_sync();\n    const int free", "    const int free", SHARED),
        # Tokens start at multiples of 4 bytes.
        ("jetson-orin", 9, "(SPANS * WIDTH) + piece * PIECE;", "(SPANS * WIDTH) + piece * PIECE + 4;", "multiple"),
        # One of the two barriers around the buffer that Xavier's kernel has.
        ("jetson-xavier", 9, "own_row);\n    block_sync();", "own_row);", "no barrier lies between"),
        ("jetson-xavier", 9, "wmma_load_c(c, numbers, 16);", "wmma_load_c(c, numbers, 15);", "stride"),
        # Fragments that lie otherwise than the kernel takes for granted.
        ("jetson-xavier", 9, "2 * quad + i % 2;", "2 * quad + 1 - i % 2;", "what it does not expect"),
        # A lane that leaves before its warp is through.
        (
            "jetson-orin", 9, "  Totals totals = {};", "if (threadIdx.x == 3) return;\nTotals totals = {};",
            "which other threads never reach",
        ),
    ],
    ids=lambda v: v.strip()[:24] if isinstance(v, str) else None,
)  # fmt: skip
def test_found_by_the_emulator(gpu: str, m: int, old: str, new: str, message: str) -> None:
    hardware.require_emulator()
    w, activations = problem(m)
    with pytest.raises(cuda.EmulationError, match=message):
        run(edited(kernel_of(gpu, m), old, new), activations, w)


@pytest.mark.parametrize(
    ("gpu", "m", "old", "new"),
    [
        ("jetson-orin", 1, "shuffle_xor(up ? v[0] : v[2], 16)", "shuffle_xor(up ? v[0] : v[2], 8)"),
        ("jetson-orin", 1, "x.y, sixteen", "x.x, sixteen"),
        ("jetson-orin", 9, "b[k + w / 2][i][w % 2] = words[w]", "b[k + w / 2][i][1 - w % 2] = words[w]"),
        ("jetson-orin", 9, "a[j / 2][0][j % 2] = first", "a[j / 2][0][1 - j % 2] = first"),
        ("jetson-orin", 9, "of_span % WORDS * 4 + eight / K_STEPS", "of_span % WORDS * 4 + 3 - eight / K_STEPS"),
        ("jetson-orin", 9, "const int32_t extra = SHIFTED ? 128", "const int32_t extra = SHIFTED ? 127"),
        ("jetson-xavier", 9, "{b[0][w], b[1][w]};", "{b[1][w], b[0][w]};"),
    ],
    ids=lambda v: v[:24] if isinstance(v, str) else None,
)  # fmt: skip
def test_found_by_the_numbers(gpu: str, m: int, old: str, new: str) -> None:
    w, activations = problem(m)
    want = exact_terms(w, activations[0], activations[2]).sum(-1)
    assert np.array_equal(run(kernel_of(gpu, m), activations, w), want)
    assert not np.array_equal(run(edited(kernel_of(gpu, m), old, new), activations, w), want)
