"""What a model file refuses, each message whole; and weights that are joined or kept apart."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler import models, pipeline, weights
from compiler.checkpoint.config import Config
from compiler.errors import CheckpointError, ConfigError, UnsupportedError
from compiler.graph.weights import Linear, Vector
from compiler.quant.ir import DenseWeight, QuantWeight, WeightType
from tests.models.oracle import SMALL

OPTIONS = models.Options(None, (4,), "float32", lambda weight: weight, lambda weight: weight)
WIDTHS = {
    "q_proj": (72, 72), "k_proj": (24, 72), "v_proj": (24, 72), "o_proj": (72, 72), "gate_proj": (104, 72),
    "up_proj": (104, 72), "down_proj": (72, 104), "embed_tokens": (131, 72), "lm_head": (131, 72),
}  # fmt: skip


def describe(module: str) -> WeightType:
    """A dense checkpoint of SMALL's shape."""
    return WeightType(*WIDTHS[module.rpartition(".")[2]], "float16", 0)


def build(model_type: str, **own: Any) -> models.Model:
    config = Config.of({"model_type": model_type, **SMALL, **own}, "config.json")
    return models.build(config, describe, OPTIONS)


def test_known_models_are_the_files_beside_llama() -> None:
    assert {"llama", "gemma2"} <= set(models.known())
    for name in models.known():
        assert callable(importlib.import_module(f"compiler.models.{name}").build), name


ROPE = "config.json: rope_scaling."
UNHANDLED = (
    ": quern does not know this key and will not guess what it changes. If it changes nothing in the computation, "
    "remove it; otherwise the model is not supported."
)
REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("gpt2", {}, UnsupportedError,
     "config.json: model_type is 'gpt2', but quern knows " + ", ".join(models.known()) + ". "
     "docs/adding.md shows how to add an architecture: it is one file."),
    ("llama", {"hidden_act": "gelu"}, ConfigError,
     "config.json: hidden_act is 'gelu', but it must be one of 'silu'."),
    ("llama", {"num_key_value_heads": 4}, ConfigError,
     "config.json: num_key_value_heads is 4, but it must divide num_attention_heads, 6."),
    ("llama", {"head_dim": 7}, ConfigError,
     "config.json: head_dim is 7, but rotary embedding needs an even number."),
    ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, ConfigError,
     "config.json: num_attention_heads is 5, but it must divide hidden_size, 72."),
    ("llama", {"intermediate_size": 96}, ConfigError,
     "config.json: intermediate_size: with intermediate_size,hidden_size as config.json states them, "
     "model.layers.0.mlp.gate_proj must be [96, 72], but the checkpoint's is [104, 72]. "
     "The configuration belongs to another checkpoint, or was edited."),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, UnsupportedError,
     ROPE + "rope_type is 'longrope', but quern knows 'default', 'linear', 'dynamic', 'llama3', 'yarn'."),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}, ConfigError,
     ROPE + "mscale is 0.7" + UNHANDLED),
    ("llama", {"rope_scaling": {"type": "ntk", "factor": 4.0}}, UnsupportedError,
     ROPE + "type is 'ntk', but quern knows 'default', 'linear', 'dynamic', 'llama3', 'yarn'."),
    ("llama", {"rope_scaling": {"type": "linear"}}, ConfigError,
     ROPE + "factor is missing, but it must be a number from 1 to 1e+06."),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, ConfigError,
     ROPE + "beta_fast is 32" + UNHANDLED),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
                                "original_max_position_embeddings": 32}}, ConfigError,
     ROPE + "low_freq_factor is 4, but it must be below high_freq_factor, 1."),
    ("llama", {"partial_rotary_factor": 0.5}, UnsupportedError,
     "config.json: partial_rotary_factor is 0.5, but this architecture rotates whole heads (1.0)."),
    ("llama", {"sliding_window": 9}, ConfigError, "config.json: sliding_window is 9" + UNHANDLED),
    ("mistral", {"attention_bias": True}, ConfigError, "config.json: attention_bias is true" + UNHANDLED),
    ("mistral", {"sliding_window": 0}, ConfigError,
     "config.json: sliding_window is 0, but it must be an integer from 1 to 16777216."),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9}, ConfigError,
     "config.json: layer_types has 'sliding_attention', but no sliding_window is in use, and those layers need one."),
    ("qwen2", {"layer_types": ["full_attention"]}, ConfigError,
     "config.json: layer_types names 1 layers, but num_hidden_layers is 2."),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, UnsupportedError,
     "config.json: layer_types has 'chunked_attention', but quern knows 'sliding_attention' and 'full_attention'."),
    ("gemma2", {"head_dim": 12, "hidden_activation": "gelu"}, ConfigError,
     "config.json: hidden_activation is 'gelu', but it must be one of 'gelu_pytorch_tanh'."),
    ("gemma2", {"head_dim": 12, "use_bidirectional_attention": True}, UnsupportedError,
     "config.json: use_bidirectional_attention is true, but quern's attention is causal."),
    ("granite", {"residual_multiplier": 0}, ConfigError,
     "config.json: residual_multiplier is 0, but it must be a number from 0.0001 to 10000."),
    ("phi3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, UnsupportedError,
     ROPE + "type is 'yarn', but quern knows 'default', 'longrope', 'su'."),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, ConfigError,
     ROPE + "short_factor is [1.0], but it must be 6 numbers from 1e-06 to 1e+06."),
    ("phi3", {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 8}}, ConfigError,
     ROPE + "original_max_position_embeddings is 8, but outside of this section it is 4096. Make them agree."),
    ("llama", {"clip_qkv": 8.0}, ConfigError, "config.json: clip_qkv is 8.0" + UNHANDLED),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "own", "error", "message"), REFUSED)
def test_refused(model_type: str, own: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        build(model_type, **own)
    assert str(caught.value) == message


class Biased:
    """A Source whose every linear layer (but one) has a bias, and whose norms are too short."""

    def __init__(self, value: float = 1.0, but: str = "") -> None:
        self._value, self._but = value, but

    def modules(self) -> list[str]:
        return []

    def has(self, module: str) -> bool:
        return True

    def describe(self, module: str) -> WeightType:
        return describe(module)

    def load(self, module: str) -> QuantWeight | DenseWeight:
        return DenseWeight(np.zeros(WIDTHS[module.rpartition(".")[2]], np.float16), "float16")

    def bias(self, module: str) -> np.ndarray | None:
        name = module.rpartition(".")[2]
        return None if name == self._but else np.full(WIDTHS[name][0], self._value, np.float32)

    def vector(self, name: str) -> np.ndarray:
        return np.ones(71, np.float32)


def test_a_bias_that_the_graph_does_not_add_is_refused() -> None:
    with pytest.raises(UnsupportedError) as caught:
        pipeline.refuse_other_biases(build("llama"), Biased())
    assert str(caught.value) == (
        "model.layers.0.self_attn.q_proj has a bias that is not zero, but with this config.json llama has none there. "
        "The checkpoint belongs to another architecture, or attention_bias or mlp_bias is missing."
    )


def test_a_bias_that_the_checkpoint_lacks_is_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        pipeline.refuse_other_biases(build("qwen2"), Biased(but="k_proj"))
    assert str(caught.value) == (
        "model.layers.0.self_attn.k_proj has no bias, but with this config.json qwen2 adds one there. The checkpoint "
        "belongs to another architecture, or attention_bias or mlp_bias is wrong."
    )


def test_biases_of_zeros_hurt_nobody_and_others_are_joined() -> None:
    pipeline.refuse_other_biases(build("llama"), Biased(0.0))
    (qkv,) = [w for w in build("qwen2").weights if w.name == "layers.0.qkv"]
    bias = dict(weights.load_weight(qkv, Biased(2.0)))["layers.0.qkv.bias"]
    assert isinstance(bias, np.ndarray)
    assert bias.tolist() == [2] * (72 + 24 + 24)


def test_constants_are_folded_into_norms() -> None:
    norm = Vector("norm", "model.norm", 71, plus=1.0, times=0.25)
    folded = dict(weights.load_weight(norm, Biased()))["norm"]
    assert isinstance(folded, np.ndarray)
    assert folded.tolist() == [0.5] * 71


def test_a_norm_of_another_width_is_refused() -> None:
    (norm,) = [w for w in build("llama").weights if w.name == "norm"]
    with pytest.raises(CheckpointError) as caught:
        list(weights.load_weight(norm, Biased()))
    assert str(caught.value) == (
        "model.norm has 71 values, but config.json's widths need 72. "
        "The configuration belongs to another checkpoint, or was edited."
    )


def test_layers_of_unlike_kinds_stay_apart() -> None:
    def mixed(module: str) -> WeightType:
        return WeightType(24, 72, "bfloat16", 0) if module.endswith("v_proj") else describe(module)

    config = Config.of({"model_type": "llama", **SMALL}, "config.json")
    model = models.build(config, mixed, OPTIONS)
    assert [(w.name, w.type.grid, w.rows) for w in model.weights if isinstance(w, Linear)][:3] == [
        ("layers.0.qkv.0", "float16", (72, 24)),
        ("layers.0.qkv.1", "bfloat16", (24,)),
        ("layers.0.o", "float16", (72,)),
    ]
    assert "quern.concat" in json.dumps(model.graph.module().script())


def test_weights_lie_in_the_order_of_use() -> None:
    names = [weight.name for weight in build("llama").weights]
    assert names[:4] == ["embedding", "layers.0.attention_norm", "rope", "layers.0.qkv"]
    assert names[-2:] == ["norm", "head"]


def test_parameters_count_each_trained_number_once(tmp_path: Path) -> None:
    layer = 72 * (72 + 24 + 24) + 72 * 72 + 3 * 72 * 104 + 2 * 72
    assert build("llama", tie_word_embeddings=True).parameters == 131 * 72 + 2 * layer + 72
    assert build("qwen2").parameters == 2 * 131 * 72 + 2 * (layer + 120) + 72
