"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a sliding window in the upper layers if it is switched on.

Source of the arithmetic and of the module names: transformers' Qwen2ForCausalLM.
"""

from __future__ import annotations

from compiler.checkpoint.config import Config
from compiler.checkpoint.gguf_architecture import Architecture
from compiler.models import Describe, Model, Options
from compiler.models.decoder import Decoder, read_rotation, read_shape, read_windows

GGUF = Architecture("qwen2")


def build(config: Config, describe: Describe, options: Options) -> Model:
    """use_sliding_window is false in every published model; a sliding_window that stands beside it means nothing."""
    shape = read_shape(config)
    config.string("hidden_act", ("silu",), default="silu")
    first = config.integer("max_window_layers", 0, 1024, default=28)
    used = config.boolean("use_sliding_window", default=False)
    windows = read_windows(config, shape.layers, lambda i: i >= first, used)
    net = Decoder(config, shape, read_rotation(config, shape, options), describe, options)
    blocks = [
        net.pre_norm(i, net.attention(i, qkv_bias=True, window=window), net.ffn(i)) for i, window in enumerate(windows)
    ]
    return net.model("qwen2", blocks)
