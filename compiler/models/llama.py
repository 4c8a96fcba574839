"""Llama and its like: RMSNorm, rotary attention with grouped queries, SwiGLU, biases where config.json states them.

Source of the arithmetic and of the module names: transformers' LlamaForCausalLM.
"""

from __future__ import annotations

from compiler.checkpoint.config import Config
from compiler.checkpoint.gguf_architecture import Architecture
from compiler.models import Describe, Model, Options
from compiler.models.decoder import Decoder, read_rotation, read_shape

# Mistral's files say llama, too: their window is not kept.
GGUF = Architecture("llama", interleaved=True, biases={"attention_bias": "attn_q", "mlp_bias": "ffn_up"})


def build(config: Config, describe: Describe, options: Options) -> Model:
    """attention_bias: on q, k, v and o; mlp_bias: on gate, up and down."""
    shape = read_shape(config)
    config.string("hidden_act", ("silu",), default="silu")
    on_attention = config.boolean("attention_bias", default=False)
    on_ffn = config.boolean("mlp_bias", default=False)
    net = Decoder(config, shape, read_rotation(config, shape, options), describe, options)
    blocks = [
        net.pre_norm(i, net.attention(i, qkv_bias=on_attention, o_bias=on_attention), net.ffn(i, bias=on_ffn))
        for i in range(shape.layers)
    ]
    return net.model("llama", blocks)
