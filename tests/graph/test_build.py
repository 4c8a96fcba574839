"""Functions built operator by operator: order of the arguments, types of the results, and what the VM must check."""

from __future__ import annotations

import pytest

from compiler.graph import ops
from compiler.graph.build import Attention, Function, FunctionInfo, Graph
from compiler.graph.kv_cache import KvCache
from compiler.graph.weights import Linear, Table, Vector
from compiler.passes.verify import verify
from compiler.quant.ir import WeightType

CACHE = KvCache(kv_heads=1, head_dim=4, capacity=32, dtype="float16")
TABLE = Table("embedding", "model.embed_tokens", WeightType(10, 8, "bfloat16", 0))
NORM = Vector("norm", "model.norm", 8)
QKV = Linear("layers.0.qkv", ("q", "k", "v"), WeightType(16, 8, "int4", 3, "float32"), (8, 4, 4))
GATE_UP = Linear("layers.0.gate_up", ("gate", "up"), WeightType(12, 8, "float16", 0), (6, 6))


def whole(tokens: int) -> Graph:
    """One function with every kind of operator, in which the rotary table is named before ids and span."""
    graph = Graph()
    f = Function(graph, f"main_{tokens}", tokens)
    rope = f.argument("rope", (32, 4), "float32")
    x = f.embedding(TABLE)
    attended = f.attention(f.linear(f.rms_norm(x, NORM, 1e-5), QKV), rope, CACHE, 0, Attention(2))
    f.finish(f.swiglu(f.linear(f.add(x, attended), GATE_UP)))
    return graph


@pytest.mark.parametrize("tokens", [1, 16])
def test_what_changes_comes_first_and_the_rest_keeps_its_order(tokens: int) -> None:
    graph = whole(tokens)
    names = (
        "ids", "span", "rope", "embedding", "norm", "layers.0.qkv.codes", "layers.0.qkv.scale", "layers.0.qkv.zero",
        "layers.0.k", "layers.0.v", "layers.0.gate_up.weight",
    )  # fmt: skip
    assert graph.functions == [FunctionInfo(f"main_{tokens}", tokens, names, (tokens, 6))]
    function = graph.module()[f"main_{tokens}"]
    assert tuple(param.name for param in function.params) == names
    assert int(function.attrs["num_input"]) == 2
    assert ops.shape_of(function.ret_ty) == (tokens, 6)
    verify(graph.module(), "graph")


def test_types_of_the_arguments() -> None:
    types = {p.name: (ops.shape_of(p.ty), str(p.ty.dtype)) for p in whole(3).module()["main_3"].params}
    assert types == {
        "ids": ((3,), "int32"),
        "span": ((2,), "int32"),
        "rope": ((32, 4), "float32"),
        "embedding": ((10, 8), "uint16"),  # bfloat16 goes by its bits
        "norm": ((8,), "float32"),
        "layers.0.qkv.codes": ((16, 8), "uint8"),
        "layers.0.qkv.scale": ((16, 3), "float32"),
        "layers.0.qkv.zero": ((16, 3), "int16"),
        "layers.0.k": ((1, 2, 4, 16), "float16"),
        "layers.0.v": ((1, 32, 4), "float16"),
        "layers.0.gate_up.weight": ((12, 8), "float16"),
    }


def test_operators_in_order_with_their_attributes() -> None:
    (block,) = whole(1).module()["main_1"].body.blocks
    found = [op for binding in block.bindings if (op := ops.match(binding.value)) is not None]
    heads = {"heads": 2, "kv_heads": 1, "head_dim": 4}
    assert [(op.name, op.attrs) for op in found] == [
        ("embedding", {"scale": 1.0}),
        ("rms_norm", {"eps": 1e-5}),
        ("linear_exact", {"bits": 4, "group": 3}),
        ("rope_append", heads),
        ("attention", {**heads, "scale": 0.5, "softcap": 0.0, "window": 0}),
        ("add", {}),
        ("linear_dense", {}),
        ("swiglu", {}),
    ]
    results = [ops.shape_of(op.results[0]) for op in found]
    assert results == [(1, 8), (1, 8), (1, 16), (1, 8), (1, 8), (1, 8), (1, 12), (1, 6)]


def test_attention_reads_the_caches_that_were_appended_to() -> None:
    (block,) = whole(1).module()["main_1"].body.blocks
    made = {binding.var: binding.value for binding in block.bindings}
    (attention,) = (op for value in made.values() if (op := ops.match(value)) is not None and op.name == "attention")
    appended = {made[arg].tuple_value for arg in attention.args[:3]}
    assert [made[arg].index for arg in attention.args[:3]] == [0, 1, 2]
    (append,) = (ops.match(made[value]) for value in appended)
    assert append is not None
    assert append.name == "rope_append"


def test_a_function_of_hidden_states() -> None:
    graph = Graph()
    f = Function(graph, "head_4", 4)
    f.finish(f.rms_norm(f.argument("hidden", (4, 8), "float32"), NORM, 1e-6))
    assert graph.functions == [FunctionInfo("head_4", 4, ("hidden", "norm"), (4, 8))]
    assert int(graph.module()["head_4"].attrs["num_input"]) == 1


def test_functions_of_one_graph_share_nothing_but_the_module() -> None:
    graph = Graph()
    for tokens in (1, 2):
        f = Function(graph, f"head_{tokens}", tokens)
        f.finish(f.rms_norm(f.argument("hidden", (tokens, 8), "float32"), NORM, 1e-6))
    assert sorted(v.name_hint for v in graph.module().get_global_vars()) == ["head_1", "head_2"]
    assert [info.shape for info in graph.functions] == [(1, 8), (2, 8)]
    verify(graph.module(), "graph")
