"""Dot-product and matrix instructions of NEON under qemu: to the bit what this machine's instruction set gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import targets
from compiler.quant.grids import GRIDS
from compiler.quant.ir import QuantWeight
from schedules import linear_int8, linear_int8_smmla
from schedules.isa import neon_dotprod, neon_i8mm
from schedules.kernel import lowerings
from tests.schedules import emulated
from tests.schedules.linears import stand_in
from tests.schedules.test_linear_grids import CASES, QMAX, exact_terms, spans, weight, weight_arguments
from tests.schedules.test_linear_int8_widening import arguments, here, request

CPU = {"neon_dotprod": "cortex-a76", "neon_i8mm": "max"}  # a Cortex-A76 has no i8mm: it would be an illegal instruction
I8MM: Any = neon_i8mm
by_isa = pytest.mark.parametrize("isa", [neon_dotprod, neon_i8mm], ids=lambda isa: isa.NAME)
FEW = [case for i, case in enumerate(CASES) if i % 2 == 0 or case[0] in ("int8", "nf4")]


def there(args: list[np.ndarray], w: QuantWeight, residual: bool, isa: Any) -> np.ndarray:
    call = request(args, w, residual, stand_in(isa))
    kernel = linear_int8.lower(call)
    assert isa.NAME in kernel.name
    (got,) = emulated.run(kernel, call, args, CPU[isa.NAME])
    return got


@by_isa
@pytest.mark.parametrize("case", FEW, ids=lambda c: "-".join(map(str, c)))
def test_equal_to_this_machine_to_the_bit(isa: Any, case: Any) -> None:
    grid, offset, m, n, k, group = case
    w = weight(grid, offset, n, k, group)
    x = np.random.default_rng(2).standard_normal((m, k)).astype(np.float32)
    args = [*arguments(x, w), np.ones((m, n), np.float32)]
    assert np.array_equal(there(args, w, True, isa), here(args, w, True))


@by_isa
@pytest.mark.parametrize("grid", ["int4", "int6", "int8", "nf4"])
def test_extremes_are_exact(isa: Any, grid: str) -> None:
    k, levels = 128, GRIDS[grid].levels
    even = np.arange(k) % 2 == 0
    codes = np.stack([np.zeros(k), np.full(k, levels - 1), np.where(even, 0, levels - 1), np.full(k, levels // 2)])
    signs = np.stack([np.ones(k), -np.ones(k), np.where(even, 1, -1)])
    one = np.ones((4, 1), np.float32)
    w = QuantWeight(codes.astype(np.uint8), one, np.zeros((4, 1), np.int16), grid, k)
    q, scale, asum = spans(w, QMAX * signs)
    want = exact_terms(w, q, asum).sum(-1).astype(np.float32)
    got = there([q, scale, asum, *weight_arguments(w)], w, False, isa)
    assert np.array_equal(got, want * np.float32(GRIDS[grid].unit) if GRIDS[grid].values else want)


PROMPTS = [case for case in CASES if case[2] % 4 == 0]


@pytest.mark.parametrize("case", PROMPTS, ids=lambda c: "-".join(map(str, c)))
def test_matrix_instructions_give_the_same_to_the_bit(case: Any) -> None:
    by_matrix(*case)


@pytest.mark.parametrize(("grid", "m"), [("int8", 4), ("int3", 8), ("int5", 12), ("nf4", 4), ("int2", 8)])
def test_matrix_instructions_over_odd_shapes(grid: str, m: int) -> None:
    by_matrix(grid, GRIDS[grid].values is None, m, 37, 172, 43)


def by_matrix(grid: str, offset: bool, m: int, n: int, k: int, group: int) -> None:
    w = weight(grid, offset, n, k, group)
    x = np.random.default_rng(2).standard_normal((m, k)).astype(np.float32)
    args = [*arguments(x, w), np.ones((m, n), np.float32)]
    call = request(args, w, True, stand_in(I8MM))
    kernel = linear_int8_smmla.lower(call)
    (got,) = emulated.run(kernel, call, args, "max")
    assert np.array_equal(got, here(args, w, True))


@pytest.mark.parametrize("grid", ["int4", "int8", "nf4"])
def test_extremes_of_matrix_instructions_are_exact(grid: str) -> None:
    """The largest codes and levels against activations of +-127, all of one sign and alternating."""
    k, levels = 128, GRIDS[grid].levels
    codes = np.stack([np.zeros(k), np.full(k, levels - 1), np.where(np.arange(k) % 2, levels - 1, 0)])
    one = np.ones((3, 1), np.float32)
    w = QuantWeight(codes.astype(np.uint8), one, np.zeros((3, 1), np.int16), grid, k)
    signs = np.where(np.arange(k) % 2, -1, 1)
    q, scale, asum = spans(w, QMAX * np.stack([np.ones(k), -np.ones(k), signs, -signs]))
    want = exact_terms(w, q, asum).sum(-1).astype(np.float32)
    args = [q, scale, asum, *weight_arguments(w)]
    call = request(args, w, False, stand_in(I8MM))
    (got,) = emulated.run(linear_int8_smmla.lower(call), call, args, "max")
    assert np.array_equal(got, want * np.float32(GRIDS[grid].unit) if GRIDS[grid].values else want)


def test_matrix_instructions_save_a_fifth() -> None:
    """Of all instructions of a prompt's kernel; and each multiplies 32 pairs."""
    m, n, k = 16, 64, 1024
    w = weight("int4", False, n, k, 128)
    args = arguments(np.ones((m, k), np.float32), w)
    call = request(args, w, False, stand_in(I8MM))
    plain, matrix = (emulated.count(family.lower(call), call, args) for family in (linear_int8, linear_int8_smmla))
    # USMMLA Vd.4S, Vn.16B, Vm.16B: 01001110 100mmmmm 101011nn nnnddddd (Arm ARM, C7.2)
    products = sum(32 * e.count for e in matrix if e.word & 0xFFE0FC00 == 0x4E80AC00)
    assert products == m * n * k
    assert sum(e.count for e in matrix) <= 0.8 * sum(e.count for e in plain)


def test_who_takes_a_prompt() -> None:
    w = weight("int4", False, 16, 32, 32)
    for m, target, family in ((16, "snapdragon-8gen2", "smmla"), (1, "snapdragon-8gen2", "neon_i8mm"),
                              (6, "snapdragon-8gen2", "neon_i8mm"), (16, "rpi5", "neon_dotprod")):  # fmt: skip
        args = arguments(np.ones((m, 32), np.float32), w)
        call = replace(request(args, w, False), target=targets.load(target))
        assert f"_{family}_" in lowerings()["quern.linear_int8"](call).name


def test_the_emulated_a76_lacks_what_neon_i8mm_needs() -> None:
    """Else the tests above would not tell the two apart."""
    w = weight("int4", False, 16, 32, 32)
    args = arguments(np.ones((1, 32), np.float32), w)
    call = request(args, w, False, stand_in(I8MM))
    with pytest.raises(RuntimeError, match=r"left with -4"):  # SIGILL
        emulated.run(linear_int8.lower(call), call, args, "cortex-a76")


def test_targets_get_their_instruction_set() -> None:
    w = weight("int4", False, 16, 32, 32)
    args = arguments(np.ones((1, 32), np.float32), w)
    for name, isa in (("rpi5", "neon_dotprod"), ("snapdragon-8gen2", "neon_i8mm"), ("riscv64-v", "generic")):
        kernel = linear_int8.lower(replace(request(args, w, False), target=targets.load(name)))
        assert f"_{isa}_" in kernel.name
