"""Qwen3: Llama whose query and key heads are RMS-normed, each by itself, before they are rotated.

Source of the arithmetic and of the module names: transformers' Qwen3ForCausalLM.
"""

from __future__ import annotations

from compiler.checkpoint.config import Config
from compiler.checkpoint.gguf_architecture import Architecture
from compiler.models import Describe, Model, Options
from compiler.models.decoder import Decoder, Part, read_rotation, read_shape, read_windows

GGUF = Architecture("qwen3")


def build(config: Config, describe: Describe, options: Options) -> Model:
    """head_dim is a number of its own: heads * head_dim need not be hidden_size."""
    shape = read_shape(config, head_dim=128)
    config.string("hidden_act", ("silu",), default="silu")
    bias = config.boolean("attention_bias", default=False)
    first = config.integer("max_window_layers", 0, 1024, default=28)
    used = config.boolean("use_sliding_window", default=False)
    windows = read_windows(config, shape.layers, lambda i: i >= first, used)
    net = Decoder(config, shape, read_rotation(config, shape, options), describe, options)

    def block(i: int) -> Part:
        norms = (shape.head_dim, shape.head_dim)
        attention = net.attention(i, qkv_bias=bias, o_bias=bias, norm_widths=norms, window=windows[i])
        return net.pre_norm(i, attention, net.ffn(i))

    return net.model("qwen3", [block(i) for i in range(shape.layers)])
