"""Gemma 2: norms before and after both halves of a block, soft caps, GeGLU, a sliding window in every second layer.

Source of the arithmetic and of the module names: transformers' Gemma2ForCausalLM. Folded here: norms multiply by
1 + weight, which the compiler adds up once in fp32, as transformers does on every call. Embeddings are multiplied by
sqrt(hidden_size) in fp32; a bfloat16 run of transformers rounds that factor to bfloat16 first.
"""

from __future__ import annotations

from compiler.checkpoint.config import Config
from compiler.checkpoint.gguf_architecture import POST_NORMS, Architecture, Values, quotient
from compiler.errors import UnsupportedError
from compiler.graph.build import Function
from compiler.models import Describe, Model, Options
from compiler.models.decoder import Decoder, read_rotation, read_shape, read_windows


def unsaid(config: Values, layers_27b: int = 46) -> Values:
    """llama.cpp knows the 27B model by its layers, and scales scores by hidden_size / heads there, else by head_dim."""
    wide = config.get("num_hidden_layers") == layers_27b
    scalar = quotient(config, "hidden_size", "num_attention_heads") if wide else config.get("head_dim")
    return {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"}


NAMES = {"ffn_norm": "pre_feedforward_layernorm", **POST_NORMS}
GGUF = Architecture("gemma2", norms_plus_one=True, names=NAMES, rest=unsaid)


def build(config: Config, describe: Describe, options: Options) -> Model:
    """Scores are scaled by 1 / sqrt(query_pre_attn_scalar). A cap that is null is none."""
    shape = read_shape(config, head_dim=256, tied=True)
    for key in ("hidden_activation", "hidden_act"):  # transformers reads the first, and writes both
        config.string(key, ("gelu_pytorch_tanh",), default="gelu_pytorch_tanh")
    if config.boolean("use_bidirectional_attention", default=False):
        raise UnsupportedError(
            f"{config.where('use_bidirectional_attention')} is true, but quern's attention is causal."
        )
    config.accept("cache_implementation")  # how transformers stores keys and values
    scale = config.number("query_pre_attn_scalar", 1e-6, 1e6, default=256.0) ** -0.5
    score_cap, logit_cap = (
        config.number(key, 0.0, 1e6, default=0.0 if key in config.data else absent)
        for key, absent in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
    )
    config.neutral(sliding_window_size=config.data.get("sliding_window", 4096))  # an old name beside the new one
    bias = config.boolean("attention_bias", default=False)
    windows = read_windows(config, shape.layers, lambda i: i % 2 == 0, absent=4096)
    net = Decoder(config, shape, read_rotation(config, shape, options), describe, options, norm_plus=1.0)
    blocks = [
        net.four_norms(
            i,
            net.attention(i, qkv_bias=bias, o_bias=bias, scale=scale, softcap=score_cap, window=window),
            net.ffn(i, gate=Function.geglu),
        )
        for i, window in enumerate(windows)
    ]
    return net.model("gemma2", blocks, embedding_scale=shape.hidden**0.5, softcap=logit_cap)
