"""Llama from config.json and headers: one small graph by hand, then refusals that test_refusals.py lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compiler import models
from compiler.checkpoint.config import Config
from compiler.errors import CheckpointError, ConfigError, UnsupportedError, UserError
from compiler.graph import ops, rope
from compiler.graph.kv_cache import KvCache
from compiler.graph.weights import Constant, Linear, Table, Vector
from compiler.models import Describe, Model, Options
from compiler.models.decoder.settings import DEFAULT_CONTEXT
from compiler.passes.verify import verify
from compiler.quant.ir import WeightType

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10, "max_position_embeddings": 40,
    "rms_norm_eps": 1e-5, "rope_theta": 500.0, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}  # fmt: skip
OPTIONS = Options(None, (16,), "float16", linear=lambda weight: weight, head=lambda weight: weight)
SHAPES = {
    "embed_tokens": (10, 16), "lm_head": (10, 16), "q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16),
    "o_proj": (16, 16), "gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24),
}  # fmt: skip
DENSE = ("embed_tokens", "lm_head")


def describe(**changed: WeightType) -> Describe:
    """A checkpoint of int4 weights in groups of 8 with dense embeddings and head; `changed` by last name."""

    def of(module: str) -> WeightType:
        part = module.rpartition(".")[2]
        if part in changed:
            return changed[part]
        n, k = SHAPES[part]
        return WeightType(n, k, "bfloat16", 0) if part in DENSE else WeightType(n, k, "int4", 8)

    return of


def config(**changes: Any) -> Config:
    """CONFIG with changes; None takes a key out."""
    return Config.of({key: value for key, value in {**CONFIG, **changes}.items() if value is not None}, "config.json")


def build(describes: Describe | None = None, options: Options = OPTIONS, **changes: Any) -> Model:
    return models.build(config(**changes), describes or describe(), options)


def message(kind: type[UserError], *arguments: Any, **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        build(*arguments, **changes)
    assert type(caught.value) is kind
    return str(caught.value)


def rotation_of(model: Model) -> np.ndarray:
    (rotation,) = (weight.values for weight in model.weights if isinstance(weight, Constant))
    return rotation


def linears(model: Model) -> dict[str, Linear]:
    return {weight.name: weight for weight in model.weights if isinstance(weight, Linear)}


def test_weights_by_hand() -> None:  # in the order in which decode names them first, the rotary table after a norm
    table, norm, rotation, qkv, o, ffn_norm, gate_up, down, *rest = build(num_hidden_layers=2).weights
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert table == Table("embedding", "model.embed_tokens", WeightType(10, 16, "bfloat16", 0))
    assert norm == Vector("layers.0.attention_norm", "model.layers.0.input_layernorm", 16)
    assert isinstance(rotation, Constant)
    assert rotation.name == "rope"
    assert np.array_equal(rotation.values, rope.Rotation(rope.inverse_frequencies(4, 500.0)).table(48, 4))
    sources = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
    assert qkv == Linear("layers.0.qkv", sources, WeightType(32, 16, "int4", 8), (16, 8, 8))
    assert o == Linear("layers.0.o", (f"{attention}.o_proj",), WeightType(16, 16, "int4", 8), (16,))
    assert ffn_norm == Vector("layers.0.ffn_norm", "model.layers.0.post_attention_layernorm", 16)
    both = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    assert gate_up == Linear("layers.0.gate_up", both, WeightType(48, 16, "int4", 8), (24, 24))
    assert down == Linear("layers.0.down", (f"{mlp}.down_proj",), WeightType(16, 24, "int4", 8), (16,))
    assert [w.name for w in rest[:6]] == [f"layers.1.{w.name[9:]}" for w in (norm, qkv, o, ffn_norm, gate_up, down)]
    assert rest[6:] == [
        Vector("norm", "model.norm", 16),
        Linear("head", ("lm_head",), WeightType(10, 16, "bfloat16", 0), (10,)),
    ]


def test_the_model_by_hand() -> None:
    model = build()
    assert (model.type, model.vocab_size, model.context, model.bos, model.eos) == ("llama", 10, 40, 1, (2, 3))
    assert model.caches == (KvCache(2, 4, 48, "float16"),) * 2  # 40 positions take 3 blocks of 16
    # embedding and head 2 x 160; a layer: qkv 512, o 256, gate and up 768, down 384, norms 32; the last norm 16
    assert model.parameters == 320 + 2 * (512 + 256 + 768 + 384 + 32) + 16


def test_functions_by_hand() -> None:
    model = build(options=replace(OPTIONS, chunks=(16, 128)))
    functions = {f.name: (f.tokens, f.shape, f.inputs[:2]) for f in model.graph.functions}
    assert functions == {
        "decode": (1, (1, 10), ("ids", "span")),
        "prefill_16": (16, (1, 16), ("ids", "span")),
        "prefill_128": (128, (1, 16), ("ids", "span")),
        "head_1": (1, (1, 10), ("hidden", "norm")),
        "logits_16": (16, (16, 10), ("ids", "span")),
        "logits_128": (128, (128, 10), ("ids", "span")),
    }
    verify(model.graph.module(), "graph")


def operators(model: Model, function: str) -> list[ops.Op]:
    (block,) = model.graph.module()[function].body.blocks
    return [op for binding in block.bindings if (op := ops.match(binding.value)) is not None]


def test_operators_of_a_prompt_by_hand() -> None:
    layer = ["rms_norm", "linear_exact", "rope_append", "attention", "linear_exact", "add"]
    layer += ["rms_norm", "linear_exact", "swiglu", "linear_exact", "add"]
    found = operators(build(), "prefill_16")
    last = [*layer[:3], "last_row", "last_span", *layer[3:5], "last_row", *layer[5:]]
    assert [op.name for op in found] == ["embedding", *layer, *last]
    rows = [ops.shape_of(op.results[0])[0] for op in found]
    assert rows == [16] * (1 + len(layer) + 3) + [1, 2] + [1] * (len(last) - 5)
    assert {tuple(op.attrs.items()) for op in found if op.name == "rms_norm"} == {(("eps", 1e-5),)}
    heads = {"heads": 4, "kv_heads": 2, "head_dim": 4}
    assert [dict(op.attrs) for op in found if op.name == "rope_append"] == [heads] * 2
    how = {**heads, "scale": 0.5, "softcap": 0.0, "window": 0}
    assert [dict(op.attrs) for op in found if op.name == "attention"] == [how] * 2
    head = ["rms_norm", "linear_dense"]
    assert [op.name for op in operators(build(), "head_1")] == head
    assert [op.name for op in operators(build(), "decode")] == ["embedding", *layer, *layer, *head]
    assert [op.name for op in operators(build(), "logits_16")] == ["embedding", *layer, *layer, *head]


def test_every_argument_is_an_input_a_cache_or_a_weight() -> None:
    model = build()
    known = {"ids", "span", "hidden"} | {f"layers.{i}.{part}" for i in range(2) for part in "kv"}
    for weight in model.weights:
        integers = isinstance(weight, Linear) and not weight.type.dense
        parts = ("codes", "scale", "zero") if integers else ("weight",)
        known |= {f"{weight.name}.{part}" for part in parts} if isinstance(weight, Linear) else {weight.name}
    used = {name for f in model.graph.functions for name in f.inputs}
    assert used == known


def test_a_tied_head_reads_the_embedding_and_counts_once() -> None:
    tied, untied = build(tie_word_embeddings=True), build()
    assert linears(tied)["head"].sources == ("model.embed_tokens",)
    assert linears(untied)["head"].sources == ("lm_head",)
    assert untied.parameters - tied.parameters == 160


def test_an_untied_head_must_be_there() -> None:
    def without_head(module: str) -> WeightType:
        if module == "lm_head":
            raise CheckpointError("folder has no lm_head")
        return describe()(module)

    assert message(CheckpointError, without_head) == "folder has no lm_head"
    build(without_head, tie_word_embeddings=True)


def test_options_decide_the_kind_of_dense_weights() -> None:
    def to(bits: int) -> Callable[[WeightType], WeightType]:
        return lambda weight: replace(weight, grid=f"int{bits}", group_size=8) if weight.dense else weight

    plain = {name: WeightType(*shape, "float16", 0) for name, shape in SHAPES.items()}
    found = linears(build(describe(**plain), replace(OPTIONS, linear=to(4), head=to(8))))
    assert {weight.type.grid for name, weight in found.items() if name != "head"} == {"int4"}
    assert found["head"].type == WeightType(10, 16, "int8", 8)
    assert linears(build(options=replace(OPTIONS, linear=to(8))))["layers.0.qkv"].type.grid == "int4"


def test_scales_of_one_float32_make_all_float32() -> None:
    found = linears(build(describe(k_proj=WeightType(8, 16, "int4", 8, "float32"))))
    assert found["layers.0.qkv"].type == WeightType(32, 16, "int4", 8, "float32")
    assert found["layers.0.o"].type.scale == "float16"


@pytest.mark.parametrize(
    ("asked", "positions", "kept", "capacity"),
    [
        (None, 40, 40, 48),
        (17, 40, 17, 32),
        (40, 40, 40, 48),
        (None, 8192, DEFAULT_CONTEXT, 4096),
        (8192, 8192, 8192, 8192),
    ],
)
def test_context(asked: int | None, positions: int, kept: int, capacity: int) -> None:
    model = build(options=replace(OPTIONS, context=asked), max_position_embeddings=positions)
    assert (model.context, model.caches[0].capacity) == (kept, capacity)


def test_defaults_are_those_of_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama").LlamaConfig()
    absent: dict[str, Any] = dict.fromkeys(
        ("num_key_value_heads", "rms_norm_eps", "rope_theta", "bos_token_id", "eos_token_id")
    )
    one_kv_head_each = {"k_proj": WeightType(16, 16, "int4", 8), "v_proj": WeightType(16, 16, "int4", 8)}
    model = build(describe(**one_kv_head_each), **absent)
    assert model.caches[0].kv_heads == 4
    eps = {op.attrs["eps"] for op in operators(model, "head_1") if op.name == "rms_norm"}
    assert eps == {llama.rms_norm_eps}
    assert np.array_equal(rotation_of(model), rope.Rotation(rope.inverse_frequencies(4, 10000.0)).table(48, 4))
    assert (model.bos, model.eos) == (None, ())
    assert not llama.tie_word_embeddings
    assert linears(model)["head"].sources == ("lm_head",)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 77.0},
        {"rope_theta": 77.0, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 77.0, "rope_scaling": {"type": "default"}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 77.0}},
    ],
)
def test_every_spelling_of_the_rotary_base(spelling: dict[str, Any]) -> None:
    assert np.array_equal(rotation_of(build(**spelling)), rope.Rotation(rope.inverse_frequencies(4, 77.0)).table(48, 4))


REFUSED: list[tuple[type[UserError], dict[str, Any], str]] = [
    (UnsupportedError, {"rope_parameters": {"rope_type": "longrope", "rope_theta": 500.0}},
     "config.json: rope_parameters.rope_type is 'longrope', but quern knows 'default', 'linear', 'dynamic', "
     "'llama3', 'yarn'."),
    (ConfigError, {"rope_parameters": {"rope_type": "default", "factor": 4.0}},
     "config.json: rope_parameters.factor is 4.0: quern does not know this key and will not guess what it changes. "
     "If it changes nothing in the computation, remove it; otherwise the model is not supported."),
    (ConfigError, {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "linear"}},
     'config.json: rope_scaling is {"rope_type": "linear"}: quern does not know this key and will not guess what it '
     "changes. If it changes nothing in the computation, remove it; otherwise the model is not supported."),
    (ConfigError, {"num_key_value_heads": 8},
     "config.json: num_key_value_heads is 8, but it must divide num_attention_heads, 4."),
    (ConfigError, {"hidden_size": 12},
     "config.json: head_dim is 3, but rotary embedding needs an even number."),
    (ConfigError, {"hidden_size": None},
     "config.json: hidden_size is missing, but it must be an integer from 1 to 1048576."),
    (ConfigError, {"num_hidden_layers": 0},
     "config.json: num_hidden_layers is 0, but it must be an integer from 1 to 1024."),
    (ConfigError, {"rms_norm_eps": "1e-5"},
     "config.json: rms_norm_eps is '1e-5', but it must be a number from 0 to 1."),
    (ConfigError, {"eos_token_id": [2, 10]},
     "config.json: eos_token_id is [2, 10], but it must be an integer from 0 to 9, or a list of them."),
    (ConfigError, {"bos_token_id": 10},
     "config.json: bos_token_id is 10, but it must be an integer from 0 to 9."),
    (ConfigError, {"head_dim": 8},
     "config.json: num_attention_heads: with num_attention_heads,num_key_value_heads,head_dim,hidden_size as "
     "config.json states them, model.layers.0.self_attn.q_proj must be [32, 16], but the checkpoint's is [16, 16]. "
     "The configuration belongs to another checkpoint, or was edited."),
    (ConfigError, {"vocab_size": 11},
     "config.json: vocab_size: with vocab_size,hidden_size as config.json states them, model.embed_tokens must be "
     "[11, 16], but the checkpoint's is [10, 16]. The configuration belongs to another checkpoint, or was edited."),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(kind: type[UserError], changes: dict[str, Any], said: str) -> None:
    assert message(kind, **changes) == said


def test_a_context_beyond_the_model() -> None:
    said = message(ConfigError, options=replace(OPTIONS, context=41))
    assert said == (
        "--context asks for 41 positions, but config.json: max_position_embeddings is 40. Ask for at most that."
    )


def test_what_is_quantised_in_another_way_stays_apart() -> None:
    """Kinds differ in bits or group, or one is dense; neighbours that are alike are still joined."""
    int8, longer = WeightType(8, 16, "int8", 8), WeightType(8, 16, "int4", 16)
    dense = WeightType(24, 16, "float16", 0)
    found = linears(build(describe(k_proj=int8, v_proj=longer, up_proj=dense)))
    first = {name: w for name, w in found.items() if name.startswith("layers.0")}
    assert [(name, w.type.grid, w.type.group_size, w.rows) for name, w in first.items()] == [
        ("layers.0.qkv.0", "int4", 8, (16,)),
        ("layers.0.qkv.1", "int8", 8, (8,)),
        ("layers.0.qkv.2", "int4", 16, (8,)),
        ("layers.0.o", "int4", 8, (16,)),
        ("layers.0.gate_up.0", "int4", 8, (24,)),
        ("layers.0.gate_up.1", "float16", 0, (24,)),
        ("layers.0.down", "int4", 8, (16,)),
    ]
    assert linears(build(describe(v_proj=int8)))["layers.0.qkv.0"].rows == (16, 8)


def test_quantised_embeddings_stay_in_their_codes() -> None:
    kind = WeightType(10, 16, "int4", 8)
    model = build(describe(embed_tokens=kind))
    assert model.weights[0] == Table("embedding", "model.embed_tokens", kind)
    first = operators(model, "prefill_16")[0]
    assert (first.name, dict(first.attrs)) == ("embedding_quantized", {"bits": 4, "group": 8, "times": 1.0})


def test_keys_that_change_nothing_pass() -> None:
    build(architectures=["LlamaForCausalLM"], transformers_version="5.0.0", use_cache=False, attention_dropout=0.1)
