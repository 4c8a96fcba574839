"""How a GGUF file of one general.architecture differs from the model that transformers knows.

Every model file that GGUF has a name for says so itself: `GGUF = Architecture("olmo2", ...)`. What all have in common,
as llama.cpp's converter writes it, stands here.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Keys without the architecture's prefix -> config.json.
KEYS = {
    "embedding_length": "hidden_size", "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim", "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
}
# Tensors -> modules; those of a layer without blk.N and model.layers.N.
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Where there are norms behind both halves of a block.
POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}

Values = Mapping[str, Any]


def _nothing(_config: Values) -> Values:
    return {}


def quotient(config: Values, key: str, by: str) -> float | None:
    """config[key] / config[by], or None where these are not two positive integers."""
    a, b = config.get(key), config.get(by)
    return a / b if isinstance(a, int) and isinstance(b, int) and b > 0 else None


@dataclass(frozen=True)
class Architecture:
    """name: general.architecture. model_type: the model file's name, where it is another.

    interleaved: the converter moved the rows of q and k for ggml's rotary embedding. norms_plus_one: it added one to
    every norm. keys, names: beside KEYS and NAMES, or instead of them. biases: keys of config.json that are true when
    the first layer's tensor has a bias. partial: rope.dimension_count may be less than a head.
    rest: config.json keys that GGUF leaves unsaid, from config.json so far. Its values may be of any kind still.
    """

    name: str
    model_type: str = ""
    interleaved: bool = False
    norms_plus_one: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    partial: bool = False
    rest: Callable[[Values], Values] = _nothing

    def module_name(self, tensor: str) -> str | None:
        """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight; None for a name that is not known."""
        matched = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,3})\.)?([a-z_]+)\.(weight|bias)", tensor)
        names = {**NAMES, **self.names}
        if matched is None or matched[2] not in names:
            return None
        layer, name, kind = matched[1], names[matched[2]], matched[3]
        inside = matched[2] not in ("token_embd", "output_norm", "output")
        if inside != (layer is not None):
            return None
        return f"model.layers.{layer}.{name}.{kind}" if inside else f"{name}.{kind}"
