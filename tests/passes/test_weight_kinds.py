"""Every kind of weight through graph and passes: act-order joins the quantise step, layers on one x share it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import targets
from compiler.graph import ops
from compiler.graph.build import Function, Graph
from compiler.graph.weights import Linear, Vector
from compiler.passes.fuse_quantize import FuseQuantize
from compiler.passes.lower_to_schedules import lower_to_schedules
from compiler.passes.quantize_activations import QuantizeActivations
from compiler.passes.verify import verify
from compiler.quant.ir import WeightType

K = 64
PLAIN = WeightType(32, K, "int4", 32)
KINDS = {
    "int3": WeightType(32, K, "int3", 32),
    "symmetric": WeightType(32, K, "int4", 32, symmetric=True),
    "offset": WeightType(32, K, "int4", 32, offset=True),
    "nf4": WeightType(32, K, "nf4", 64, "float32"),
    "permuted": WeightType(32, K, "int4", 32, permuted=True, order="a"),
    "permuted offset": WeightType(32, K, "int6", 16, offset=True, permuted=True, order="b"),
}


def graph(*kinds: WeightType, norm: bool = True) -> Any:
    """The columns of one layer a kind on one x, normed first or not."""
    made = Graph()
    f = Function(made, "main", 2)
    x = f.argument("hidden", (2, K), "float32")
    f.span()
    if norm:
        x = f.rms_norm(x, Vector("norm", "norm", K), 1e-5)
    f.finish(f.linears(x, [Linear(f"w{i}", (f"m{i}",), kind, (kind.n,)) for i, kind in enumerate(kinds)]))
    return made.module()


def names(mod: Any) -> list[str]:
    """Operators of main in order."""
    verify(mod, "fused")
    bindings = mod["main"].body.blocks[0].bindings
    found = [ops.match(binding.value) for binding in bindings]
    return [op.name for op in found if op is not None]


def fused(mod: Any) -> Any:
    steps: list[Any] = [QuantizeActivations(), FuseQuantize()]
    for step in steps:
        mod = step(mod)
    return mod


@pytest.mark.parametrize(("kind", "exact", "int8"), [
    ("int3", ["rms_norm", "linear_exact"], ["rms_norm_quantize", "linear_int8"]),
    ("offset", ["rms_norm", "linear_exact_offset"], ["rms_norm_quantize", "linear_int8_offset"]),
    ("nf4", ["rms_norm", "linear_exact_table"], ["rms_norm_quantize", "linear_int8_table"]),
    ("permuted", ["rms_norm", "gather", "linear_exact"], ["rms_norm_quantize_permuted", "linear_int8"]),
    ("permuted offset", ["rms_norm", "gather", "linear_exact_offset"],
     ["rms_norm_quantize_permuted", "linear_int8_offset"]),
])  # fmt: skip
def test_one_layer(kind: str, exact: list[str], int8: list[str]) -> None:
    assert names(graph(KINDS[kind])) == exact
    assert names(fused(graph(KINDS[kind]))) == int8


def test_a_gather_alone_joins_the_quantise_step() -> None:
    assert names(fused(graph(KINDS["permuted"], norm=False))) == ["quantize_permuted", "linear_int8"]


def test_layers_with_equal_groups_share_one_quantise_step() -> None:
    kinds = (PLAIN, KINDS["int3"], KINDS["offset"])
    assert names(fused(graph(*kinds))) == [
        "rms_norm_quantize", "linear_int8", "linear_int8", "linear_int8_offset", "concat", "concat"]


def test_layers_with_orders_of_their_own_gather_from_one_norm() -> None:
    """The norm has two users, so it stays; each gather joins its quantise step."""
    assert names(fused(graph(KINDS["permuted"], KINDS["permuted offset"]))) == [
        "rms_norm", "quantize_permuted", "linear_int8", "quantize_permuted", "linear_int8_offset", "concat"]


def test_parameters_are_what_the_kind_needs() -> None:
    def parameters(kind: WeightType) -> dict[str, tuple[tuple[int, ...], str]]:
        found = {p.name: (ops.shape_of(p.ty), str(p.ty.dtype)) for p in graph(kind, norm=False)["main"].params}
        return {name: type_ for name, type_ in found.items() if name.startswith("w0")}

    codes, scale = {"w0.codes": ((32, K), "uint8")}, {"w0.scale": ((32, 2), "float16")}
    assert parameters(KINDS["symmetric"]) == codes | scale | {"w0.zero": ((1, 1), "int16")}
    assert parameters(KINDS["nf4"]) == {"w0.codes": ((32, K), "uint8"), "w0.scale": ((32, 1), "float32")}
    assert parameters(KINDS["permuted offset"]) == {
        "w0.permutation": ((K,), "int32"), "w0.codes": ((32, K), "uint8"), "w0.scale": ((32, 4), "float16"),
        "w0.offset": ((32, 4), "float32")}


@pytest.mark.parametrize("path", ["exact", "int8"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_has_kernels_and_layouts(kind: str, path: str) -> None:
    mod = graph(KINDS[kind])
    lowered = lower_to_schedules(fused(mod) if path == "int8" else mod, targets.load("x86-64"))
    verify(lowered.mod, "scheduled")
    parts = {name.partition(".")[2] for name in lowered.packings}
    assert parts == {"codes", "scale"} | ({"offset"} if KINDS[kind].offset else {"zero"} if kind != "nf4" else set())
    codes = lowered.packings["w0.codes"].pack(np.zeros((32, K), np.uint8))
    assert codes.nbytes * 8 == 32 * K * KINDS[kind].bits  # nothing is stored wider than it is
