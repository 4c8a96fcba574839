"""Spaces of knobs: every schedule's default lies in its own, every point of it compiles to the same results' shape."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from schedules import kernel
from schedules.kernel import Kernel, NotSuited, Request, Space, TensorSpec, lowerings, space
from targets import Target
from tests.schedules.kernels import ARM, AVX2, NATIVE


def linear(m: int, target: Target, group: int = 64, residual: bool = False) -> Request:
    specs = [((m, 192 // group, group), "int8"), ((m, 192 // group), "float32"), ((m, 192 // group), "int32"),
             ((96, 192), "uint8"), ((96, 192 // group), "float16"), ((96, 192 // group), "int16")]  # fmt: skip
    op = "quern.linear_int8" + ("_residual" if residual else "")
    args = [TensorSpec(shape, dtype) for shape, dtype in specs]
    args += [TensorSpec((m, 96), "float32")] if residual else []
    return Request(op, tuple(args), (TensorSpec((m, 96), "float32"),), {"bits": 4, "group": group}, target)


def attention(m: int, target: Target) -> Request:
    specs = [((m, 128), "float32"), ((2, 4, 32, 16), "float16"), ((2, 64, 32), "float16"), ((2,), "int32")]
    attrs = {"heads": 4, "kv_heads": 2, "head_dim": 32, "scale": 0.2, "softcap": 0.0, "window": 0}
    args = tuple(TensorSpec(shape, dtype) for shape, dtype in specs)
    return Request("quern.attention", args, (TensorSpec((m, 128), "float32"),), attrs, target)


REQUESTS = [linear(m, target) for m in (1, 16) for target in (NATIVE, AVX2, ARM)]
REQUESTS += [attention(m, target) for m in (1, 16) for target in (NATIVE, AVX2, ARM)]
by_request = pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"{r.op}-{r.args[0].shape[0]}-{r.target.name}")


@by_request
def test_the_default_is_a_point(request_: Request) -> None:
    found = space(request_)
    assert found is not None
    found.check(found.default)
    assert found.allowed(found.default)
    points = list(found.points())
    assert len(points) > 10 and found.default not in points
    for point in points:
        found.check(point)


@by_request
def test_the_corners_compile(request_: Request) -> None:  # as TIR; tune compiles every point it measures, and checks it
    found = space(request_)
    assert found is not None
    points = list(found.points())
    lower, plain = lowerings()[request_.op], lowerings()[request_.op](request_)
    for point in (points[0], points[len(points) // 2], points[-1]):
        made = lower(replace(request_, knobs=point))
        assert {i: p.name for i, p in made.packings.items()} == {i: p.name for i, p in plain.packings.items()}


def test_what_shares_a_record() -> None:
    here, avx2 = space(linear(1, NATIVE)), space(linear(1, AVX2))
    residual = space(linear(1, NATIVE, residual=True))
    assert here is not None and avx2 is not None and residual is not None
    assert (here.schedule, here.workload) == (residual.schedule, residual.workload)
    assert avx2.schedule == "linear_int8.avx2"
    assert here.workload == {"m": 1, "n": 96, "k": 192, "bits": 4, "group": 64, "kind": "zero"}
    assert here.macs == 96 * 192
    other = space(linear(1, NATIVE, group=32))
    assert other is not None and other.workload != here.workload


def test_no_space_where_nothing_can_be_chosen() -> None:
    add = Request("quern.add", (TensorSpec((1, 8), "float32"),) * 2, (TensorSpec((1, 8), "float32"),), {}, NATIVE)
    assert space(add) is None


def test_the_family_that_lowers_states_the_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that is suited counts, with or without a space; one that is not is passed over."""

    def refuse(request: Request) -> Any:
        raise NotSuited

    def accept(request: Request) -> Kernel:
        return Kernel("k", None)

    def room(request: Request) -> Space:
        return Space.around({"a": 1}, {"a": (2,)}, schedule="last", workload={})

    last = SimpleNamespace(LOWERS={"op": accept}, SPACES={"op": room})
    shy = SimpleNamespace(LOWERS={"op": refuse}, SPACES={"op": refuse})
    shy_too, plain = SimpleNamespace(LOWERS={"op": refuse}), SimpleNamespace(LOWERS={"op": accept})
    asked = Request("op", (), (), {}, NATIVE)
    for order, want in (([shy, shy_too, last], "last"), ([plain, last], None), ([shy], None)):
        monkeypatch.setattr(kernel, "families", lambda package, order=order: {"op": order})
        found = space(asked)
        assert (None if found is None else found.schedule) == want
