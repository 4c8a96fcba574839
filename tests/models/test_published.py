"""config.json of models that people have, from memory but for keys that say nothing: each is understood, or truly not.

No weights: the checkpoint describes whatever shape the configuration calls for, so this is about keys alone.
"""

from __future__ import annotations

from typing import Any

import pytest

from compiler import models
from compiler.checkpoint.config import Config
from compiler.errors import UnsupportedError, UserError
from compiler.models import Model, Options, gemma3
from compiler.quant.ir import WeightType

COMMON: dict[str, Any] = {
    "architectures": ["SomeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0", "use_cache": True, "tie_word_embeddings": False,
}  # fmt: skip


def of(type_: str, sizes: str, positions: int, **own: Any) -> dict[str, Any]:
    """sizes: hidden, ffn, layers, heads, kv heads, vocabulary."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    numbers = dict(zip((*names, "vocab_size"), map(int, sizes.split()), strict=True))
    return {**COMMON, "model_type": type_, **numbers, "max_position_embeddings": positions, **own}


LLAMA = {"attention_bias": False, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0}
LLAMA3 = {**LLAMA, "mlp_bias": False, "rope_theta": 500000.0, "bos_token_id": 128000,
          "eos_token_id": [128001, 128008, 128009]}  # fmt: skip
SCALED = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
          "rope_type": "llama3"}  # fmt: skip
QWEN2 = {"max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768,
         "use_sliding_window": False, "bos_token_id": 151643, "eos_token_id": 151645}  # fmt: skip
TIED = {"tie_word_embeddings": True}
QWEN3 = {**QWEN2, "head_dim": 128, "attention_bias": False, "rope_scaling": None, "sliding_window": None}
GEMMA2 = {"attention_bias": False, "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
          "eos_token_id": [1, 107], "final_logit_softcapping": 30.0, "head_dim": 256, "pad_token_id": 0,
          "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
          "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096, **TIED}  # fmt: skip
WIDE = {"head_dim": 128, "query_pre_attn_scalar": 144, "sliding_window_size": 4096}
GEMMA3 = {"attention_bias": False, "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": [1, 106],
          "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256, "pad_token_id": 0,
          "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
          "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, **TIED}  # fmt: skip
SMALL_GEMMA3 = {"_sliding_window_pattern": 6, "use_bidirectional_attention": False,
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3}  # fmt: skip
for config in (GEMMA3, SMALL_GEMMA3):
    config["hidden_act"] = None  # COMMON's is not Gemma's
PHI3 = {"attention_bias": False, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0,
        "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rope_scaling": None,
        "rope_theta": 10000.0}  # fmt: skip


def long(kind: str, width: int) -> dict[str, Any]:
    """Two sets of divisors for `width` rotating elements."""
    factors = {"short_factor": [1.0] * (width // 2), "long_factor": [2.5] * (width // 2)}
    return {"rope_scaling": {"type": kind, **factors}}


PHI4_MINI = {**PHI3, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1, **TIED,
             "partial_rotary_factor": 0.75, "sliding_window": 262144, **long("longrope", 96)}  # fmt: skip
GRANITE = {"attention_bias": False, "mlp_bias": False, "attention_multiplier": 0.015625, "logits_scaling": 8.0,
           "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 1e7,
           **TIED}  # fmt: skip
OLMO2 = {"attention_bias": False, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 500000, "pad_token_id": 1}
SMOL = {**LLAMA, "is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000, "mlp_bias": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, **TIED}  # fmt: skip

UNDERSTOOD: dict[str, dict[str, Any]] = {
    "Llama-2-7B": of("llama", "4096 11008 32 32 32 32000", 4096, **LLAMA),
    "Llama-3-8B": of("llama", "4096 14336 32 32 8 128256", 8192, **LLAMA3),
    "Llama-3.1-8B": of("llama", "4096 14336 32 32 8 128256", 131072, **{**LLAMA3, "rope_scaling": SCALED}),
    "Llama-3.2-1B": of("llama", "2048 8192 16 32 8 128256", 131072,
                       **{**LLAMA3, **TIED, "head_dim": 64, "rope_scaling": {**SCALED, "factor": 32.0}}),
    "TinyLlama-1.1B": of("llama", "2048 5632 22 32 4 32000", 2048, **LLAMA),
    "Mistral-7B-v0.1": of("mistral", "4096 14336 32 32 8 32000", 32768, rope_theta=10000.0, sliding_window=4096),
    "Mistral-7B-v0.2": of("mistral", "4096 14336 32 32 8 32000", 32768, rope_theta=1e6, sliding_window=None),
    "Mistral-7B-v0.3": of("mistral", "4096 14336 32 32 8 32768", 32768, rope_theta=1e6, sliding_window=None),
    "Mistral-Nemo": of("mistral", "5120 14336 40 32 8 131072", 131072, rope_theta=1e6, sliding_window=None,
                       head_dim=128),
    "Qwen2-0.5B": of("qwen2", "896 4864 24 14 2 151936", 32768, **{**QWEN2, **TIED, "max_window_layers": 24}),
    "Qwen2.5-3B": of("qwen2", "2048 11008 36 16 2 151936", 32768, **{**QWEN2, **TIED, "use_mrope": False}),
    "Qwen2.5-7B": of("qwen2", "3584 18944 28 28 4 152064", 32768, **QWEN2),
    "Qwen2.5-7B, long": of("qwen2", "3584 18944 28 28 4 152064", 131072, **QWEN2, rope_scaling={
        "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}),
    "Qwen3-0.6B": of("qwen3", "1024 3072 28 16 8 151936", 40960, **{**QWEN3, **TIED}),
    "Qwen3-8B": of("qwen3", "4096 12288 36 32 8 151936", 40960, **{**QWEN3, "max_window_layers": 36}),
    "Gemma-2-2B": of("gemma2", "2304 9216 26 8 4 256000", 8192, **GEMMA2),
    "Gemma-2-9B": of("gemma2", "3584 14336 42 16 8 256000", 8192, **GEMMA2, sliding_window_size=4096),
    "Gemma-2-27B": of("gemma2", "4608 36864 46 32 16 256000", 8192, **{**GEMMA2, **WIDE}),
    "Gemma-3-270M": of("gemma3_text", "640 2048 18 4 1 262144", 32768,
                       **{**GEMMA3, **SMALL_GEMMA3, "sliding_window": 512}),
    "Gemma-3-1B": of("gemma3_text", "1152 6912 26 4 1 262144", 32768, **GEMMA3, sliding_window=512,
                     sliding_window_pattern=6),
    "Gemma-3-4B": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "torch_dtype": "bfloat16", "vision_config": {"model_type": "siglip_vision_model"},
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_window": 1024}},
    "Phi-3-mini-4k": of("phi3", "3072 8192 32 32 32 32064", 4096, **PHI3, sliding_window=2047),
    "Phi-3-mini-128k, first": of("phi3", "3072 8192 32 32 32 32064", 131072,
                                 **{**PHI3, **long("su", 96), "sliding_window": 262144}),
    "Phi-3.5-mini": of("phi3", "3072 8192 32 32 32 32064", 131072,
                       **{**PHI3, **long("longrope", 96), "sliding_window": 262144}),
    "Phi-4": of("phi3", "5120 17920 40 40 10 100352", 16384,
                **{**PHI3, "original_max_position_embeddings": 16384, "rope_theta": 250000, "sliding_window": None}),
    "Phi-4-mini": of("phi3", "3072 8192 32 24 8 200064", 131072, **PHI4_MINI),
    "Granite-3.1-2B": of("granite", "2048 8192 40 32 8 49155", 131072, **GRANITE),
    "OLMo-2-7B": of("olmo2", "4096 11008 32 32 32 100352", 4096, **OLMO2),
    "SmolLM2-135M": of("llama", "576 1536 30 9 3 49152", 8192, **SMOL),
    "Danube-1.8B": of("mistral", "2560 6912 24 32 8 32000", 16384, rope_theta=10000.0, sliding_window=4096),
    "Danube3-4B": of("llama", "3840 10240 24 32 8 32000", 8192, **{**LLAMA, "head_dim": 120, "rope_theta": 100000}),
}  # fmt: skip
UNHANDLED = (
    ": quern does not know this key and will not guess what it changes. If it changes nothing in the computation, "
    "remove it; otherwise the model is not supported."
)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen2.5-7B-1M": (
        {**UNDERSTOOD["Qwen2.5-7B"], "dual_chunk_attention_config": {"chunk_size": 262144}},
        'config.json: dual_chunk_attention_config is {"chunk_size": 262144}' + UNHANDLED,
    ),
    "Mixtral": (
        {**UNDERSTOOD["Mistral-7B-v0.1"], "num_local_experts": 8},
        "config.json: num_local_experts is 8" + UNHANDLED,
    ),
}


def build(config: dict[str, Any], context: int | None = None) -> Model:
    """Layers that repeat are cut to eight: the table is about keys."""
    stated = {**gemma3.DEFAULTS, "head_dim": 256, **config["text_config"]} if "text_config" in config else config
    heads, kv = stated["num_attention_heads"], stated["num_key_value_heads"]
    hidden, ffn, vocab = (stated[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    head = stated.get("head_dim", hidden // heads)
    shapes = {
        "q_proj": (heads * head, hidden), "k_proj": (kv * head, hidden), "v_proj": (kv * head, hidden),
        "o_proj": (hidden, heads * head), "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn), "embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden),
        "qkv_proj": ((heads + 2 * kv) * head, hidden), "gate_up_proj": (2 * ffn, hidden),
    }  # fmt: skip
    layers = min(stated["num_hidden_layers"], 8)
    cut = {**config, "num_hidden_layers": layers}
    if "layer_types" in cut:
        cut["layer_types"] = cut["layer_types"][:layers]
    if "text_config" in cut:
        del cut["num_hidden_layers"]
    options = Options(context, (), "float16", lambda weight: weight, lambda weight: weight)
    described = Config.of(cut, "config.json")
    return models.build(described, lambda m: WeightType(*shapes[m.rpartition(".")[2]], "float16", 0), options)


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_understood(name: str) -> None:
    assert build(UNDERSTOOD[name]).context == min(UNDERSTOOD[name].get("max_position_embeddings", 4096), 4096)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    config, message = REFUSED[name]
    with pytest.raises(UserError) as caught:
        build(config)
    assert str(caught.value) == message


def test_a_model_of_another_kind_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"^config\.json: model_type is 'mamba', but quern knows "):
        build({**UNDERSTOOD["Llama-2-7B"], "model_type": "mamba"})
