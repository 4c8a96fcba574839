"""AMX linear layers, on the hardware or under the emulator: exact integers, extremes, the other kernels bit for bit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest

import targets
from compiler.quant.grids import GRIDS
from compiler.quant.ir import QuantWeight
from compiler.quant.reference import quantize_activations
from schedules import linear_int8, linear_int8_amx
from schedules.geometry import Geometry
from schedules.kernel import Lower, NotSuited, Space, TensorSpec, lowerings, space
from tests.emulator import x86
from tests.schedules.kernels import EPS32, Built, build, request, spec
from tests.schedules.linears import require
from tests.schedules.test_linear_grids import exact_terms, spans, weight, weight_arguments

AMX = replace(
    targets.load("x86-64"), name="amx", mcpu="x86-64-v4", features=tuple(f"+{name}" for name in linear_int8_amx.NEEDS)
)
VNNI = replace(AMX, features=tuple(f for f in AMX.features if "amx" not in f))
QMAX = 127


@dataclass(frozen=True)
class Case:
    """A layer of m tokens; residual and fp16 scales for every other one."""

    grid: str
    offset: bool
    m: int
    n: int
    k: int
    group: int
    residual: bool = False
    scale: str = "float32"

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.k, self.group)

    def __str__(self) -> str:
        tail = ("-offset" if self.offset else "") + ("-residual" if self.residual else "")
        return f"{self.grid}-m{self.m}-n{self.n}-k{self.k}-g{self.group}-{self.scale}{tail}"


CASES = [  # tiles of 8 to 64 inputs, one or two a span; one to seven tiles of tokens, the last one overlapping or not
    Case("int2", False, 16, 40, 128, 64, scale="float16"), Case("int2", True, 33, 33, 96, 16, residual=True),
    Case("int3", False, 17, 1, 256, 128, residual=True), Case("int3", True, 40, 32, 172, 64),
    Case("int4", False, 16, 64, 256, 128, residual=True, scale="float16"), Case("int4", False, 100, 105, 172, 172),
    Case("int4", False, 31, 16, 172, 43, scale="float16"), Case("int4", True, 48, 33, 256, 32, residual=True),
    Case("int5", False, 16, 17, 172, 48, residual=True), Case("int5", True, 32, 40, 64, 40),
    Case("int6", False, 20, 33, 144, 72, scale="float16"), Case("int8", False, 33, 40, 64, 8, residual=True),
    Case("int8", False, 32, 105, 704, 704), Case("int8", True, 16, 33, 172, 43),
    Case("nf4", False, 32, 33, 172, 43, residual=True), Case("iq4_nl", False, 16, 16, 64, 32),
]  # fmt: skip
by_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _amx() -> None:
    require(AMX)


def compiled(lower: Lower, case: Case, target: targets.Target, knobs: dict[str, int] | None = None) -> Built:
    """The kernel, packed arguments in."""
    grid = GRIDS[case.grid]
    kind = "_table" if grid.values is not None else "_offset" if case.offset else ""
    args: list[np.ndarray] = [
        *spans(sample(case), np.zeros((case.m, case.k))),
        *weight_arguments(sample(case)),
        *([np.zeros((case.m, case.n), np.float32)] if case.residual else []),
    ]
    attrs: dict[str, Any] = {"bits": grid.bits, "group": case.group}
    if grid.values is not None:
        attrs["grid"] = case.grid
    op = f"quern.linear_int8{kind}{'_residual' if case.residual else ''}"
    call = request(op, args, [TensorSpec((case.m, case.n), "float32")], target, knobs, **attrs)
    kernel = lower(replace(call, table=grid.values))
    specs = [kernel.packings[i].spec if i in kernel.packings else s for i, s in enumerate(call.args)]
    return build(lambda _: kernel, replace(call, args=tuple(specs)))


@cache
def amx(case: Case) -> Built:
    return compiled(linear_int8_amx.lower, case, AMX)


@cache
def sample(case: Case, whole: bool = False) -> QuantWeight:
    """Random codes, and scales of two decades or (whole) small powers of two."""
    made = weight(case.grid, case.offset, case.n, case.k, case.group, whole)
    return replace(made, scale=made.scale.astype(case.scale))


def run(built: Built, activations: Any, w: QuantWeight, residual: np.ndarray | None = None) -> np.ndarray:
    args = [*activations, *weight_arguments(w), *([] if residual is None else [residual])]
    packings = built.kernel.packings
    packed = [packings[i].pack(a) if i in packings else a for i, a in enumerate(args)]
    assert [spec(packed[i]) for i in packings] == [p.spec for p in packings.values()]
    (out,) = built(*packed)
    return out


def residual_of(case: Case) -> np.ndarray | None:
    whole = np.random.default_rng(3).integers(-1000, 1000, (case.m, case.n)).astype(np.float32)
    return whole if case.residual else None


@by_case
def test_integers_are_exact(case: Case) -> None:
    """Against numpy: scales are powers of two, so that sums are exact, or off by a rounding a span on table grids."""
    w, residual = sample(case, whole=True), residual_of(case)
    q, scale, asum = spans(w, np.random.default_rng(1).integers(-QMAX, QMAX + 1, (case.m, case.k)))
    got, terms = run(amx(case), (q, scale, asum), w, residual), exact_terms(w, q, asum)
    unit = 1.0 if GRIDS[case.grid].values is None else float(GRIDS[case.grid].unit)
    want = terms.sum(-1) * unit + (0 if residual is None else residual)
    if unit == 1:
        assert np.abs(terms).sum(-1).max() + 1000 < 2**23  # halves are the smallest part
        assert np.array_equal(got, want)
    else:
        size = np.abs(terms * unit).sum(-1) + (0 if residual is None else np.abs(residual))
        assert (np.abs(got - want) <= 2 * (terms.shape[-1] + 1) * EPS32 * size).all()


@by_case
def test_equal_to_vnni_to_the_bit(case: Case) -> None:
    w, residual = sample(case), residual_of(case)
    x = np.random.default_rng(4).standard_normal((case.m, case.k)).astype(np.float32)
    activations = quantize_activations(x, case.geometry.source)
    want = run(compiled(linear_int8.lower, case, VNNI), activations, w, residual)
    assert np.array_equal(run(amx(case), activations, w, residual), want)
    assert np.abs(want).max() > 1


def extremes(case: Case) -> Iterator[tuple[QuantWeight, np.ndarray]]:
    """All codes and zeros at an end, all activations at an end or alternating; row r has scale 1 in one group only."""
    top, shape = GRIDS[case.grid].levels - 1, (case.n, sample(case).scale.shape[1])
    scale = (np.arange(shape[0])[:, None] % shape[1] == np.arange(shape[1])).astype(case.scale)
    plain = case.offset or GRIDS[case.grid].values is not None
    signs = [np.ones(case.k), -np.ones(case.k), np.where(np.arange(case.k) % 2, 1, -1)]
    for code, zero, sign in product((0, top), (0,) if plain else (0, top), signs):
        w = replace(
            sample(case), stored=np.full((case.n, case.k), code, np.uint8), scale=scale,
            zero=np.full(shape, zero, np.int16), offset=np.zeros(shape, np.float32) if case.offset else None,
        )  # fmt: skip
        yield w, np.tile(QMAX * sign, (case.m, 1))


@pytest.mark.parametrize("case", [c for c in CASES if c.m <= 33], ids=str)
def test_no_accumulator_overflows(case: Case) -> None:
    residual, unit = residual_of(case), np.float32(1 if GRIDS[case.grid].values is None else GRIDS[case.grid].unit)
    for w, values in extremes(case):
        q, scale, asum = spans(w, values)
        want = exact_terms(w, q, asum).sum(-1).astype(np.float32) * unit
        got = run(amx(case), (q, scale, asum), w, residual)
        if unit == 1:
            assert np.array_equal(got, want + (0 if residual is None else residual))
        else:  # the value of a level is rounded with the scale, then with the residual
            size = np.abs(want) + (0 if residual is None else np.abs(residual))
            assert (np.abs(got - want - (0 if residual is None else residual)) <= 4 * EPS32 * size).all()


@pytest.mark.parametrize("knobs", [
    {"token_tiles": 1, "prefetch_bytes": 0}, {"row_blocks": 1}, {"token_tiles": 3, "row_blocks": 1},
    {"prefetch_bytes": 1 << 20},
], ids=str)  # fmt: skip
def test_knobs_change_no_bit(knobs: dict[str, int]) -> None:
    """One token tile leaves room for the B tiles of a whole span, which then stay where they are."""
    case = Case("int4", False, 50, 64, 256, 128, residual=True)
    w, residual = sample(case), residual_of(case)
    x = np.random.default_rng(4).standard_normal((case.m, case.k)).astype(np.float32)
    activations = quantize_activations(x, case.geometry.source)
    other = compiled(linear_int8_amx.lower, case, AMX, knobs)
    assert np.array_equal(run(other, activations, w, residual), run(amx(case), activations, w, residual))


def test_what_tuning_may_try() -> None:
    """Points that fit eight tiles and divide the rows; fewer tokens than a tile has are another family's."""
    case = Case("int4", False, 128, 96, 256, 128)  # six blocks of rows

    def asked(m: int) -> Space | None:
        args = [*spans(sample(case), np.zeros((m, case.k))), *weight_arguments(sample(case))]
        call = request("quern.linear_int8", args, [TensorSpec((m, 96), "float32")], AMX, bits=4, group=case.group)
        return space(call)

    found = asked(128)
    assert found is not None
    assert found.schedule == "linear_int8.amx" and found.macs == 128 * 96 * 256
    tiles = {(p["token_tiles"], p["row_blocks"]) for p in [found.default, *found.points()]}
    assert tiles == {(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1)}
    few = asked(16)
    assert few is not None and few.choices["token_tiles"] == (1,)
    one = asked(8)
    assert one is not None and one.schedule == "linear_int8.avx512_vnni"


def test_the_family_for_every_token_count() -> None:
    """AMX from 16 tokens on where the target has it, and one layout of the weights for all."""
    names = {}
    for target, m in product((AMX, VNNI), (1, 15, 16, 128)):
        case = Case("int4", False, m, 40, 256, 128)
        op, grid = "quern.linear_int8", GRIDS["int4"]
        args = [*spans(sample(case), np.zeros((m, case.k))), *weight_arguments(sample(case))]
        call = request(op, args, [TensorSpec((m, 40), "float32")], target, bits=grid.bits, group=case.group)
        kernel = lowerings()[op](call)
        names[target.name if target == AMX else "vnni", m] = kernel.name.split("_")[2]
        assert {i: (p.name, p.spec) for i, p in kernel.packings.items()} == {
            i: (p.name, p.spec) for i, p in linear_int8.lower(call).packings.items()
        }
        if m < 16 or target == VNNI:
            with pytest.raises(NotSuited):
                linear_int8_amx.lower(call)
    assert names == {
        ("amx", 1): "avx512", ("amx", 15): "avx512", ("amx", 16): "amx", ("amx", 128): "amx",
        ("vnni", 1): "avx512", ("vnni", 15): "avx512", ("vnni", 16): "avx512", ("vnni", 128): "avx512",
    }  # fmt: skip


def test_instructions() -> None:
    """Per span and step 8 products, 4 stores and 8 loads of tiles, and nothing that moves a tile elsewhere."""
    assembly = compiled(linear_int8_amx.lower, Case("int4", False, 128, 64, 256, 128), AMX).assembly
    found = re.findall(r"^\t(ldtilecfg|sttilecfg|tile\w+|tdp\w+)\t?", assembly, re.MULTILINE)
    assert {name: found.count(name) for name in set(found)} == {
        "ldtilecfg": 1, "tilezero": 4, "tileloadd": 8, "tdpbssd": 8, "tilestored": 4, "tilerelease": 1,
    }  # fmt: skip
    assert found[0] == "ldtilecfg" and found[-1] == "tilerelease"
    assert assembly.count("__TVMBackendAllocWorkspace@GOTPCREL") <= 3  # once a task each, and no loop is around it
    configuration = re.search(r"(vmov\w+)\t%([xyz]mm\d+), (\S+)\n\tldtilecfg\t(\S+)\n", assembly)
    assert configuration and (configuration[2][:3], configuration[3]) == ("zmm", configuration[4])
    loops = [code for code in re.split(r"^\.?\w+:", assembly, flags=re.MULTILINE) if "vcvtdq2ps" in code]
    scaling = [code.partition("\tjne\t")[0] for code in loops if "tdp" not in code]
    assert len(scaling) == 2  # one for each token tile: a load, a product, a multiply-add and a store a vector
    for code in scaling:
        assert code.count("vcvtdq2ps") == code.count("vfmadd") == code.count("vmulps")
        assert "(%rsp)" not in code, "spilled"


def test_no_tiles_without_the_feature() -> None:
    case = Case("int4", False, 16, 64, 256, 128)
    assembly = compiled(linear_int8.lower, case, VNNI).assembly
    assert "vpdpbusd" in assembly
    assert not re.search(r"^\t(ldtilecfg|tile\w+|tdp\w+)\b", assembly, re.MULTILINE)


def test_every_task_configures_its_own_tiles() -> None:
    """160 rows are five tasks; in each, tokens make two steps of four products for each half of both spans.

    A task may run on any thread: tests/end_to_end/test_amx.py has two of them.
    """
    case = Case("int4", False, 40, 160, 256, 128)
    x = np.random.default_rng(4).standard_normal((case.m, case.k)).astype(np.float32)
    built, activations = amx(case), quantize_activations(x, case.geometry.source)
    before = x86.counts()
    run(built, activations, sample(case))
    executed = {name: count - before[name] for name, count in x86.counts().items()}
    emulated = {"configurations": 5, "releases": 5, "products": 5 * 2 * 2 * 2 * 4, "vnni": 0}
    assert executed == (emulated if "amx_tile" in x86.enable() else dict.fromkeys(emulated, 0))
