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
        ("jetson-orin", 9, "    block_sync();\n    const int next", "    const int next", SHARED),
        # Tokens start at multiples of 4 bytes.
        ("jetson-orin", 9, "* 32 + piece * PIECE,\n", "* 32 + piece * PIECE + 4,\n", "multiple"),
        # One of the two barriers around the buffer that Xavier's kernel has.
        ("jetson-xavier", 9, "warp_m, warp_n);\n    block_sync();", "warp_m, warp_n);", "no barrier lies between"),
        ("jetson-xavier", 9, "wmma_load_c(place, numbers, 16);", "wmma_load_c(place, numbers, 15);", "stride"),
        # A lane that leaves before its warp is through.
        (
            "jetson-orin", 9, "  float acc[MT][NT][4] = {};", "if (lane == 3) return;\nfloat acc[MT][NT][4] = {};",
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
        (
            "jetson-orin", 9, "a[mt][k][half] = inputs.x, a[mt][k][half + 2]",
            "a[mt][k][2 * half] = inputs.x, a[mt][k][2 * half + 1]",
        ),
        ("jetson-orin", 9, "words[lane % 4 * 4];\n    b[0] = first", "words[lane / 4 % 4 * 4];\n    b[0] = first"),
        ("jetson-orin", 9, "sum[mt][i / 2];", "sum[mt][i % 2];"),
        ("jetson-xavier", 9, "row = first_row + place[i] % 16;", "row = first_row + place[i] / 16;"),
    ],
    ids=lambda v: v[:24] if isinstance(v, str) else None,
)  # fmt: skip
def test_found_by_the_numbers(gpu: str, m: int, old: str, new: str) -> None:
    w, activations = problem(m)
    want = exact_terms(w, activations[0], activations[2]).sum(-1)
    assert np.array_equal(run(kernel_of(gpu, m), activations, w), want)
    assert not np.array_equal(run(edited(kernel_of(gpu, m), old, new), activations, w), want)
