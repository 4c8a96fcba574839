"""Integer linear layers on CUDA, in the emulator: by hand, exact integers, extremes, real numbers, every family."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil

import numpy as np
import pytest

from compiler.quant.grids import GRIDS
from compiler.quant.ir import QuantWeight
from compiler.quant.reference import quantize_activations
from schedules.cuda import linear_int8, linear_int8_mma, linear_int8_wmma
from schedules.cuda.linear_int8 import read
from schedules.cuda.packed import Layout, blocks, storage_bits, weight_packings
from schedules.geometry import Geometry
from schedules.kernel import NotSuited
from tests.schedules.cuda.linears import Activations, arguments, lowered, request, run
from tests.schedules.kernels import EPS32
from tests.schedules.test_linear_grids import exact_terms, spans, weight

QMAX = 127
FEW = [  # grid, offset, m, n, k, group, scale: dense and padded spans, all runs, several tiles, short last groups
    ("int2", True, 3, 33, 96, 16, "float32"), ("int3", False, 1, 40, 2048, 128, "float16"),
    ("int4", False, 1, 40, 256, 32, "float16"), ("int4", True, 1, 33, 1408, 64, "float16"),
    ("int4", True, 4, 64, 172, 43, "float32"), ("int4", False, 2, 7, 704, 704, "float16"),
    ("int4", False, 3, 16, 72, 24, "float32"), ("int5", True, 1, 40, 256, 32, "float32"),
    ("int6", False, 4, 33, 172, 172, "float16"), ("int8", False, 1, 40, 640, 128, "float16"),
    ("int8", True, 3, 33, 172, 43, "float32"), ("nf4", False, 1, 40, 640, 64, "float16"),
    ("iq4_nl", False, 3, 16, 64, 32, "float32"),
]  # fmt: skip
MANY = [
    ("int4", False, 70, 136, 256, 128, "float16"), ("int4", True, 17, 131, 96, 32, "float32"),
    ("int4", False, 5, 33, 172, 43, "float16"), ("int8", False, 33, 72, 256, 128, "float16"),
    ("int6", True, 6, 33, 40, 8, "float32"), ("nf4", False, 16, 40, 128, 64, "float16"),
]  # fmt: skip
ON = [("dp4a", "jetson-nano", case) for case in (FEW[2], (*MANY[2][:2], 9, *MANY[2][3:]))]
ON += [("dp4a", "jetson-orin", case) for case in FEW]
ON += [("mma", "jetson-orin", case) for case in MANY] + [("wmma", "jetson-xavier", case) for case in MANY]


def case_weight(case: tuple[str, bool, int, int, int, int, str], whole: bool) -> QuantWeight:
    grid, offset, _, n, k, group, scale = case
    w = weight(grid, offset, n, k, group, whole)
    return replace(w, scale=w.scale.astype(scale))


def residual_of(m: int, n: int) -> np.ndarray:
    return np.random.default_rng(3).integers(-1000, 1000, (m, n)).astype(np.float32)


def test_one_row_by_hand() -> None:
    """Two groups of 4, stored 8 wide: see tests/schedules/test_linear_int8.py.

    (1 - 8) 1 + (2 - 8) 2 + (3 - 8) 3 + (4 - 8) 4 = -50 and 15 (-127) + 1 (1) + 1 (-1) + 2 (1) = -1903.
    -50 * 0.5 * 2 = -50 and -1903 * -1 * 0.25 = 475.75; the residual is 1000.
    """
    w = QuantWeight(
        np.array([[1, 2, 3, 4, 15, 1, 1, 2]], np.uint8), np.array([[0.5, -1]], np.float16),
        np.array([[8, 0]], np.int16), "int4", 4,
    )  # fmt: skip
    q = np.zeros((1, 2, 8), np.int8)
    q[0, :, :4] = [[1, 2, 3, 4], [-127, 1, -1, 1]]
    activations = (q, np.array([[2, 0.25]], np.float32), np.array([[10, -126]], np.int32))
    residual = np.array([[1000]], np.float32)
    assert run(lowered(activations, w, "jetson-orin", residual=residual), activations, w, residual) == 1425.75


@pytest.mark.parametrize(("family", "gpu", "case"), ON, ids=lambda v: "-".join(map(str, v)) if len(v) == 7 else v)
def test_integers_are_exact(family: str, gpu: str, case: tuple[str, bool, int, int, int, int, str]) -> None:
    grid, _, m, n, k, _, _ = case
    w = case_weight(case, whole=True)
    activations = spans(w, np.random.default_rng(1).integers(-QMAX, QMAX + 1, (m, k)))
    residual = residual_of(m, n) if m % 2 else None
    kernel = lowered(activations, w, gpu, residual=residual)
    assert f"_{family}_" in kernel.name
    terms, unit = exact_terms(w, activations[0], activations[2]), 1.0
    if GRIDS[grid].values is not None:  # products with the value of one level are rounded, once a span, then summed
        unit = float(GRIDS[grid].unit)
    want = terms.sum(-1) * unit + (0 if residual is None else residual)
    bound = 0 if unit == 1 else (terms.shape[-1] + 4) * EPS32 * (np.abs(terms).sum(-1) * unit + np.abs(want))
    assert (np.abs(run(kernel, activations, w, residual) - want) <= bound).all()


@pytest.mark.parametrize(
    ("gpu", "m", "knobs"),
    [
        ("cuda-sm90", 1, {"warps": 8, "split": 4, "loads": 8, "tokens": 1}),
        ("jetson-orin", 1, {"warps": 2, "split": 2, "loads": 16, "tokens": 1}),
        ("jetson-orin", 3, {"warps": 4, "split": 1, "loads": 4, "tokens": 2}),
        ("jetson-orin", 40, {"order": 1, "tokens": 32, "rows": 32, "warps": 2, "stages": 4}),
        ("jetson-xavier", 40, {"order": 1, "tokens": 16, "rows": 64, "warps": 1}),
    ],
    ids=str,
)
def test_knobs_change_order_only(gpu: str, m: int, knobs: dict[str, int]) -> None:
    k = 3200  # the last of 4 tiles has 4 lanes
    w = weight("int4", False, 70, k, 64, whole=True)
    activations = spans(w, np.random.default_rng(1).integers(-QMAX, QMAX + 1, (m, k)))
    call = request(arguments(activations, w, None), w, gpu)
    family = {"loads": linear_int8, "stages": linear_int8_mma}.get(list(knobs)[-2 if m < 5 else -1], linear_int8_wmma)
    family.SPACES[call.op](call).check(knobs)
    kernel = lowered(activations, w, gpu, knobs)
    want = exact_terms(w, activations[0], activations[2]).sum(-1)
    assert np.array_equal(run(kernel, activations, w), want)


def test_activations_that_do_not_fit_shared_memory() -> None:
    w = weight("int4", False, 5, 40 * 1024 + 128, 128, whole=True)
    activations = spans(w, np.random.default_rng(1).integers(-QMAX, QMAX + 1, (1, w.type.k)))
    kernel = lowered(activations, w, "jetson-orin")
    assert "constexpr int STAGED = 0;" in kernel.source
    assert np.array_equal(run(kernel, activations, w), exact_terms(w, activations[0], activations[2]).sum(-1))


@pytest.mark.parametrize(("gpu", "m"), [("jetson-orin", 1), ("jetson-orin", 16), ("jetson-xavier", 16)])
@pytest.mark.parametrize("grid", ["int4", "int8"])
def test_no_sum_leaves_its_range(grid: str, gpu: str, m: int) -> None:
    """All codes and zeros at their ends, activations at theirs: the bits of 1.5 * 2^23 hold integers below 2^22.

    Row r has scale 1 in group r (modulo their number) and 0 elsewhere, so an output is one group's integer, below 2^24.
    """
    n, k, group, top = 8, 512, 128, GRIDS[grid].levels - 1
    scale = (np.arange(n)[:, None] % 4 == np.arange(4)).astype(np.float16)
    kernel = None
    for code, zero, sign in product((0, top), (0, top), (1, -1)):
        w = QuantWeight(np.full((n, k), code, np.uint8), scale, np.full((n, 4), zero, np.int16), grid, group)
        activations = spans(w, np.full((m, k), sign * QMAX))
        kernel = kernel or lowered(activations, w, gpu)
        want = np.full((m, n), (code - zero) * sign * QMAX * group)
        assert np.array_equal(run(kernel, activations, w), want)


def real(m: int, k: int, w: QuantWeight) -> Activations:
    x = np.random.default_rng(4).standard_normal((m, k)).astype(np.float32)
    return quantize_activations(x, Geometry(k, w.group_size).source)


@pytest.mark.parametrize(("gpu", "m"), [("cuda-sm90", 1), ("jetson-orin", 33), ("jetson-xavier", 33)])
@pytest.mark.parametrize("offset", [False, True])
def test_real_numbers(gpu: str, m: int, offset: bool) -> None:
    """A term has its scales' product, its product and perhaps an offset's two: 4 roundings; sums one each."""
    n, k, group = 24, 704, 43
    w = weight("int4", offset, n, k, group)
    q, ascale, asum = activations = real(m, k, w)
    got = run(lowered(activations, w, gpu), activations, w)
    terms = exact_terms(replace(w, offset=None), q, asum) * ascale[:, None]
    size = np.abs(terms)
    if offset:
        assert w.offset is not None
        extra = w.offset[:, Geometry(k, group).weight_group] * (asum * ascale.astype(np.float64))[:, None]
        terms, size = terms + extra, size + np.abs(extra)
    roundings = 4 + 2 * terms.shape[-1] * ceil(48 / 32)  # a span of 48 codes may be two lanes' at most
    assert (np.abs(got - terms.sum(-1)) <= roundings * EPS32 * size.sum(-1)).all()


@pytest.mark.parametrize(("bits", "k", "group"), [(4, 256, 32), (4, 172, 43), (8, 704, 128), (3, 2048, 128)])
def test_packing_loses_nothing(bits: int, k: int, group: int) -> None:
    n, stored = 37, storage_bits(bits)
    layout = Layout(Geometry(k, group), stored)
    codes = np.random.default_rng(0).integers(0, 1 << bits, (n, k), dtype=np.uint8)
    packed = weight_packings(3, n, layout, "float16", "zero")[3].pack(codes)
    assert packed.shape == (blocks(n), layout.positions, 4, 4) and sorted(layout.place) == list(range(layout.positions))
    rows = packed[:, layout.place].transpose(0, 2, 1, 3).reshape(-1, layout.positions, 4)
    units = np.concatenate([rows & 15, rows >> 4], -1) if stored == 4 else rows ^ 128
    source = layout.geometry.source.reshape(-1)
    assert np.array_equal(units.reshape(len(rows), -1)[:n, source >= 0], codes[:, source[source >= 0]])
    parts = [weight_packings(3, n, layout, "float16", "zero")[3].pack(p) for p in (codes[:20], codes[20:])]
    assert np.array_equal(np.concatenate(parts), packed)


@pytest.mark.parametrize("group", [8, 24, 32, 43, 64, 96, 128])
@pytest.mark.parametrize("grid", ["int4", "int8"])
def test_a_load_of_a_fragment_touches_every_bank_once(grid: str, group: int) -> None:
    """What is served at a time, 128 bytes of tokens and of codes, lies in 32 different banks of 4 bytes."""
    w = weight(grid, False, 64, 4 * group, group)
    activations = spans(w, np.zeros((64, 4 * group)))
    call = read(request(arguments(activations, w, None), w, "jetson-orin"))
    tokens, units = linear_int8_mma.strides(call)
    k_steps, _ = linear_int8_mma.steps(call)
    size = 8 if k_steps % 2 else 16  # bytes of a lane's load, of its own part of a span
    lane = np.arange(128 // size)
    token = lane // 4 * tokens + lane % 4 * 8 * k_steps
    assert len({int(at + i) // 4 % 32 for at in token for i in range(0, size, 4)}) == 32
    code = (np.arange(8) // 4 * units + np.arange(8) % 4) * 16
    assert len({int(at + i) // 4 % 32 for at in code for i in range(0, 16, 4)}) == 32


def test_families_by_device_and_tokens() -> None:
    w = weight("int4", False, 64, 256, 128)
    names = {
        (gpu, m): lowered(spans(w, np.zeros((m, 256))), w, gpu).name.split("_")[2]
        for gpu in ("jetson-nano", "jetson-xavier", "jetson-orin", "cuda-sm90")
        for m in (1, 4, 5, 128)
    }
    many = {"jetson-nano": "dp4a", "jetson-xavier": "wmma", "jetson-orin": "mma", "cuda-sm90": "mma"}
    assert names == {(gpu, m): "dp4a" if m <= 4 else many[gpu] for gpu, m in names}
    with pytest.raises(NotSuited):
        lowered(spans(w, np.zeros((8, 256))), w, "cuda-sm90", lower=linear_int8_wmma.lower)
