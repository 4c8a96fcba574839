"""Integer linear layers on every instruction set: by hand, exact integers, extremes, the reference."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache, lru_cache
from itertools import product
from typing import Any

import numpy as np
import pytest

from compiler.quant.ir import QuantWeight
from compiler.quant.reference import matmul_int8, quantize_activations
from schedules import isa as isas
from schedules import linear_int8
from schedules.geometry import Geometry
from schedules.kernel import TensorSpec
from schedules.packed import blocks
from schedules.storage import choose
from targets import features
from tests.emulator import x86
from tests.schedules.kernels import ARM, AVX2, NATIVE, assert_no_heap, request
from tests.schedules.linears import (
    ISAS,
    Layer,
    Shape,
    compiled,
    exact_weight,
    lacking,
    require,
    shapes,
    stand_in,
    weight,
    within,
)

SHAPES = shapes()
QMAX = 127
Activations = tuple[np.ndarray, np.ndarray, np.ndarray]  # q, scale, sum

HERE = [isa for isa in ISAS if not lacking(stand_in(isa))]
for_all = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.NAME)
on_each = pytest.mark.parametrize("isa", HERE, ids=lambda isa: isa.NAME)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def zeros(shape: Shape) -> list[np.ndarray]:
    """Arguments of the right shapes."""
    g = shape.geometry
    args: list[np.ndarray] = [
        np.zeros((shape.m, g.spans, g.width), np.int8),
        np.zeros((shape.m, g.spans), np.float32),
        np.zeros((shape.m, g.spans), np.int32),
        np.zeros((shape.n, shape.k), np.uint8),
        np.zeros((shape.n, shape.groups), shape.scale),
        np.zeros((shape.n, shape.groups), np.int16),
    ]
    return [*args, np.zeros((shape.m, shape.n), np.float32)] if shape.residual else args


def layer(shape: Shape, target: Any, knobs: dict[str, int] | None = None) -> Layer:
    op = f"quern.linear_int8{'_residual' if shape.residual else ''}"
    return compiled(linear_int8.lower, op, zeros(shape), shape.n, target, knobs, bits=shape.bits, group=shape.group)


@cache
def on(isa_name: str, shape: Shape) -> Layer:
    """Built once for all tests of this file."""
    isa = {isa.NAME: isa for isa in ISAS}[isa_name]
    return layer(shape, stand_in(isa))


def run(kernel: Layer, activations: Activations, w: QuantWeight, residual: np.ndarray | None) -> np.ndarray:
    q, scale, total = activations
    more = [] if residual is None else [residual]
    return kernel(q, scale, total, w.codes, w.scale, w.zero, *more)


def integers(shape: Shape, seed: int = 2) -> Activations:
    """Random int8 activations with scale 1; padding is 0."""
    return patterned(shape, np.random.default_rng(seed).integers(-QMAX, QMAX + 1, (shape.m, shape.k)))


def patterned(shape: Shape, values: np.ndarray) -> Activations:
    """values[m, k] as they are, with scale 1."""
    source = shape.geometry.source
    q = np.where(source >= 0, values[:, source], 0).astype(np.int8)
    return q, np.ones(q.shape[:2], np.float32), q.sum(-1, dtype=np.int32)


def residual_of(shape: Shape) -> np.ndarray | None:
    rng = np.random.default_rng(3)
    return rng.integers(-1000, 1000, (shape.m, shape.n)).astype(np.float32) if shape.residual else None


@lru_cache(maxsize=4)
def real(shape: Shape) -> tuple[np.ndarray, Activations, QuantWeight, np.ndarray | None]:
    """Normal activations and a weight of scales of every size."""
    x = np.random.default_rng(4).standard_normal((shape.m, shape.k)).astype(np.float32)
    q, scale, total = quantize_activations(x, shape.geometry.source)
    return x, (q, scale, total), weight(shape), residual_of(shape)


def dots(activations: Activations, w: QuantWeight, geometry: Geometry) -> np.ndarray:
    """i64[m, n, spans]: the integer of every span, sum of (code - zero) * q."""
    q, source = activations[0].astype(np.int64), geometry.source
    codes = np.where(source >= 0, w.codes[:, source], 0).astype(np.int64)
    zero = w.zero[:, geometry.weight_group].astype(np.int64)
    dot: np.ndarray = np.einsum("msi,nsi->mns", q, codes) - zero[None] * q.sum(-1)[:, None, :]
    return dot


def test_one_row_by_hand() -> None:
    """Two groups of 4, stored 8 wide.

    (1 - 8) 1 + (2 - 8) 2 + (3 - 8) 3 + (4 - 8) 4 = -50 and 15 (-127) + 1 (1) + 1 (-1) + 2 (1) = -1903.
    -50 * 0.5 * 2 = -50 and -1903 * -1 * 0.25 = 475.75; the residual is 1000.
    """
    w = QuantWeight(
        np.array([[1, 2, 3, 4, 15, 1, 1, 2]], np.uint8), np.array([[0.5, -1]], np.float16),
        np.array([[8, 0]], np.int16), "int4", 4,
    )  # fmt: skip
    q = np.zeros((1, 2, 8), np.int8)
    q[0, :, :4] = [[1, 2, 3, 4], [-127, 1, -1, 1]]
    scale, total = np.array([[2, 0.25]], np.float32), q.sum(-1, dtype=np.int32)
    shape = Shape(4, 1, 1, 8, 4, "float16", True)
    assert run(layer(shape, NATIVE), (q, scale, total), w, np.array([[1000]], np.float32)).tolist() == [[1425.75]]


def test_the_sample_has_every_value_of_every_axis() -> None:
    axes = {name: {getattr(s, name) for s in SHAPES} for name in ("bits", "m", "n", "k", "group", "scale", "residual")}
    assert axes == {
        "bits": {4, 8},
        "m": {1, 3, 16},
        "n": {1, 16, 105, 344},
        "k": {8, 64, 172, 704},
        "group": {8, 32, 43, 64, 128, 172, 704},
        "scale": {"float16", "float32"},
        "residual": {False, True},
    }
    for other in ("m", "n", "scale", "residual"):  # the axes that shape the code, with the bits
        assert {(s.bits, getattr(s, other)) for s in SHAPES} == set(product((4, 8), axes[other])), other


@for_all
def test_this_machine_runs(isa: Any) -> None:  # the other tests leave out what it cannot run; here one sees it
    require(stand_in(isa))


@for_all
def test_a_stand_in_gets_the_instruction_set_it_stands_for(isa: Any) -> None:
    assert isas.choose(stand_in(isa)).NAME == isa.NAME


@on_each
@by_shape
def test_integers_are_exact(isa: Any, shape: Shape) -> None:
    """Scales are powers of two, so partial sums are multiples of 1/2 below 2**23: exact in any order."""
    w, activations, residual = exact_weight(shape), integers(shape), residual_of(shape)
    terms = dots(activations, w, shape.geometry) * w.scale[:, shape.geometry.weight_group].astype(np.float64)
    assert np.abs(terms).sum(-1).max() + 1000 < 2**23
    want = terms.sum(-1) + (0 if residual is None else residual)
    assert np.array_equal(run(on(isa.NAME, shape), activations, w, residual), want)


@on_each
@by_shape
def test_against_the_reference(isa: Any, shape: Shape) -> None:
    x, activations, w, residual = real(shape)
    g = shape.geometry
    want = matmul_int8(x, w, g.source, g.weight_group).astype(np.float64) + (0 if residual is None else residual)
    scales = w.scale[:, g.weight_group].astype(np.float64)[None] * activations[1].astype(np.float64)[:, None]
    magnitude = np.abs(dots(activations, w, g) * scales).sum(-1) + (0 if residual is None else np.abs(residual))
    # A span's integer is below 2**24 and so exact in float32. Rounded are: scale times scale, times the integer, each
    # sum over the spans, and the residual; and the reference's result, once.
    within(run(on(isa.NAME, shape), activations, w, residual), want, magnitude, roundings=2 + g.spans + 1 + 1)


@by_shape
def test_all_instruction_sets_agree_to_the_bit(shape: Shape) -> None:
    """One template: the same float32 operations in the same order on exact integers, fused multiply-adds alike."""
    _, activations, w, residual = real(shape)
    first, *others = (run(on(isa.NAME, shape), activations, w, residual) for isa in HERE)
    for isa, other in zip(HERE[1:], others, strict=True):
        assert np.array_equal(first, other), f"{HERE[0].NAME} and {isa.NAME}"


def extremes(shape: Shape) -> list[tuple[QuantWeight, Activations]]:
    """All codes 0 or the largest, zeros alike, activations all at the ends or alternating.

    Row r has scale 1 in group r (modulo their number) and 0 elsewhere, so that an output is one group's bare integer.
    What the accumulators must hold: 128 * 255 * 127 = 4 145 280 a span, far below 2**31; the zero point's part is as
    large and may double it. In between AVX2 has int16: two products of a 4-bit field are at most 2 * 15 * 127 = 3810,
    of two fields 7620, below 2**15 = 32768; with whole 8-bit codes it would be 2 * 255 * 127 = 64770 and saturate.
    """
    top = (1 << shape.bits) - 1
    even = np.arange(shape.k) % 2 == 0
    pairs = np.arange(shape.k) // 2 % 2 == 0
    signs = [np.ones(shape.k), -np.ones(shape.k), np.where(even, 1, -1), np.where(pairs, 1, -1)]
    scale = (np.arange(shape.n)[:, None] % shape.groups == np.arange(shape.groups)).astype(shape.scale)
    made = []
    for code, zero, sign in product((0, top), (0, top), signs):
        codes = np.full((shape.n, shape.k), code, np.uint8)
        zeros = np.full((shape.n, shape.groups), zero, np.int16)
        values = np.tile(QMAX * sign, (shape.m, 1))
        made.append((QuantWeight(codes, scale, zeros, f"int{shape.bits}", shape.group), patterned(shape, values)))
    return made


@on_each
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.group in (8, 43, 128, 704)], ids=str)
def test_no_accumulator_overflows(isa: Any, shape: Shape) -> None:
    kernel, residual, g = on(isa.NAME, shape), residual_of(shape), shape.geometry
    emulated = any(features.X86_64_V3_EXTRAS.get(name) in x86.enable() for name in isa.NEEDS)
    for w, activations in extremes(shape)[:: 5 if emulated else 1]:  # every value of each axis; an emulated step: 10 us
        terms = dots(activations, w, g) * w.scale[:, g.weight_group].astype(np.int64)
        # Per channel the parts of a group add up, to 704 * 255 * 127 < 2**25, in even steps: still exact.
        assert terms.sum(-1).astype(np.float32).tolist() == terms.sum(-1).tolist()
        want = terms.sum(-1).astype(np.float32) + (np.float32(0) if residual is None else residual)
        assert np.array_equal(run(kernel, activations, w, residual), want)


@pytest.mark.parametrize("bits", [2, 3, 6])
@on_each
def test_narrow_codes_are_stored_in_the_next_wider_field(isa: Any, bits: int) -> None:
    shape = Shape(bits, 3, 40, 72, 24, "float16", residual=False)
    kernel, w, activations = layer(shape, stand_in(isa)), exact_weight(shape), integers(shape)
    terms = dots(activations, w, shape.geometry) * w.scale[:, shape.geometry.weight_group].astype(np.float64)
    assert np.array_equal(run(kernel, activations, w, None), terms.sum(-1))
    assert str(kernel.built.kernel.name).startswith(f"linear_w{4 if bits < 4 else 8}a8_{isa.NAME}_m3_n40_k72_g24")


@pytest.mark.parametrize(
    "knobs",
    [
        {"row_blocks": 1, "unroll": 1},
        {"row_blocks": 2, "unroll": 2, "tokens": 2},
        {"row_blocks": 4, "tokens": 1, "prefetch_bytes": 1 << 20},  # asks for lines far outside: only a hint
    ],
    ids=str,
)
@pytest.mark.parametrize("m", [1, 4])
def test_knobs_change_no_bit(m: int, knobs: dict[str, int]) -> None:
    shape = Shape(4, m, 120, 172, 43, "float16", residual=True)
    if m == 1:
        knobs = {name: value for name, value in knobs.items() if name != "tokens"}
    _, activations, w, residual = real(shape)
    default, other = (run(layer(shape, NATIVE, asked), activations, w, residual) for asked in (None, knobs))
    assert np.array_equal(default, other)


def test_a_token_does_not_depend_on_its_neighbours() -> None:  # decode and prefill give the same logits
    many = Shape(4, 16, 105, 172, 128, "float16", residual=True)
    one = replace(many, m=1)
    _, (q, scale, total), w, residual = real(many)
    assert residual is not None
    together, alone = run(layer(many, NATIVE), (q, scale, total), w, residual), layer(one, NATIVE)
    for t in range(16):
        row = slice(t, t + 1)
        assert np.array_equal(run(alone, (q[row], scale[row], total[row]), w, residual[row])[0], together[t])


def test_default_knobs_divide_the_shape() -> None:
    for isa, shape in product(ISAS, SHAPES):
        storage = choose(shape.bits, shape.geometry.width)
        knobs = linear_int8.default_knobs(shape.m, shape.n, shape.geometry, storage, isa, None)
        steps = shape.geometry.width // storage.inputs
        assert blocks(shape.n) % knobs["row_blocks"] == 0
        assert shape.m % knobs["tokens"] == 0
        assert steps % knobs["unroll"] == 0


WITNESS = {  # the instruction that an instruction set is there for, as the assembly spells it
    "avx512_vnni": r"\bvpdpbusd\b[^\n]*%zmm",
    "avx_vnni": r"\{vex\}\s+vpdpbusd\b[^\n]*%ymm",
    "avx2": r"\bvpmaddubsw\b[^\n]*%ymm",
    "neon_dotprod": r"\bsdot\tv\d+\.4s",
    "neon_i8mm": r"\busdot\tv\d+\.4s",
    "generic": r"\bvpmulld\b[^\n]*%[yz]mm|\bmla\tv\d+\.4s",
}
BIG = Shape(4, 1, 344, 704, 128, "float16", residual=True)


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("bits", [4, 8])
@for_all
def test_instructions(isa: Any, bits: int, m: int) -> None:  # compiles anywhere, whatever this CPU can run
    assembly = layer(replace(BIG, bits=bits, m=m), stand_in(isa)).built.assembly
    loops = multiplying_blocks(assembly, WITNESS[isa.NAME])
    assert loops
    for loop in loops:
        assert not re.search(r"\tcallq?\t|\tblr?\t", loop)
    if m == 1:  # with many tokens, 16 accumulators are taken from the heap once a task, far outside the loop
        assert_no_heap(assembly)


def multiplying_blocks(assembly: str, vector: str) -> list[str]:
    """The stretches between labels and branches that hold a vector multiplication."""
    blocks = re.split(r"^\.?\w+:|\t(?:b|b\.\w+|cbn?z|tbn?z)\t", assembly, flags=re.MULTILINE)
    return [block for block in blocks if re.search(vector, block)]


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize(("bits", "scale"), [(4, "float16"), (8, "float32")])
def test_on_a_raspberry_pi_4_every_product_is_vector_code(bits: int, scale: str, m: int) -> None:
    (generic,) = (isa for isa in ISAS if isa.NAME == "generic")
    asked_for = {f"+{need}" for isa in ISAS for need in isa.NEEDS}
    target = replace(ARM, features=tuple(f for f in ARM.features if f not in asked_for))
    assert isas.choose(target).NAME == generic.NAME
    assembly = layer(replace(BIG, bits=bits, scale=scale, m=m), target).built.assembly
    loops = multiplying_blocks(assembly, r"\tmla\tv\d+\.4s")
    assert loops
    for loop in loops:
        assert not re.search(r"\t(mul|madd|smull|smaddl|umull|umaddl)\t[wx]\d", loop)
    assert not re.search(r"\tbl\t__\w*(hf|h2f)", assembly)  # float16 scales need no call
    assert_no_heap(assembly)


def test_the_generic_kernel_needs_no_feature() -> None:  # so that every target has a kernel
    assert [isa.NAME for isa in ISAS if not isa.NEEDS] == ["generic"]
    assert isas.choose(replace(AVX2, features=())).NAME == "generic"


@pytest.mark.parametrize(
    ("m", "n", "target", "threads"),
    [(1, 1024, AVX2, False), (1, 1040, AVX2, True), (2, 64, AVX2, True), (1, 64, ARM, True)],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_threads_are_called_where_they_pay(m: int, n: int, target: Any, threads: bool) -> None:
    """128 KiB of codes, 1024 rows of 256 inputs in 4 bits, are computed by one thread; elsewhere nobody has looked."""
    args = zeros(Shape(4, m, n, 256, 64, "float16", False))
    asked = request("quern.linear_int8", args, [TensorSpec((m, n), "float32")], target, bits=4, group=64)
    assert ("T.parallel" in linear_int8.lower(asked).func.script()) is threads
