"""Mistral: Llama with a sliding window in every layer, when config.json states one.

Source of the arithmetic and of the module names: transformers' MistralForCausalLM.
"""

from __future__ import annotations

from compiler.checkpoint.config import Config
from compiler.models import Describe, Model, Options
from compiler.models.decoder import Decoder, read_rotation, read_shape, read_windows


def build(config: Config, describe: Describe, options: Options) -> Model:
    """A token sees itself and the sliding_window - 1 positions before it."""
    shape = read_shape(config)
    config.string("hidden_act", ("silu",), default="silu")
    windows = read_windows(config, shape.layers, absent=4096)
    net = Decoder(config, shape, read_rotation(config, shape, options), describe, options)
    blocks = [net.pre_norm(i, net.attention(i, window=window), net.ffn(i)) for i, window in enumerate(windows)]
    return net.model("mistral", blocks)
