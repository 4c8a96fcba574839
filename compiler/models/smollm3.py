"""SmolLM3: Llama of which every fourth layer does not rotate its queries and keys.

Source of the arithmetic and of the module names: transformers' SmolLM3ForCausalLM. Layers without rotation have a
rotary table of their own, whose angles are all 0.
"""

from __future__ import annotations

from compiler.checkpoint.config import Config
from compiler.checkpoint.gguf_architecture import Architecture
from compiler.errors import ConfigError
from compiler.graph.rope import Rotation, inverse_frequencies
from compiler.models import Describe, Model, Options
from compiler.models.decoder import Decoder, read_rotation, read_shape, read_windows

GGUF = Architecture("smollm3", interleaved=True)  # and every fourth layer, by llama.cpp's knowledge of the model


def build(config: Config, describe: Describe, options: Options) -> Model:
    """no_rope_layers has a 1 for each layer that rotates, a 0 for the others. A window, if any, is in the latter."""
    shape = read_shape(config, tied=True)
    config.string("hidden_act", ("silu",), default="silu")
    on_attention = config.boolean("attention_bias", default=False)
    on_ffn = config.boolean("mlp_bias", default=False)
    interval = config.integer("no_rope_layer_interval", 1, 1024, default=4)
    usual = tuple(int((i + 1) % interval != 0) for i in range(shape.layers))
    turns = config.integers("no_rope_layers", 0, 1, default=usual)
    if turns != usual:
        raise ConfigError(
            f"{config.where('no_rope_layers')} is {list(turns)}, but no_rope_layer_interval, {interval}, means "
            f"{list(usual)}. Make them agree."
        )
    used = config.boolean("use_sliding_window", default=False)
    windows = read_windows(config, shape.layers, lambda i: not turns[i], used)
    rotation = read_rotation(config, shape, options, theta=2e6)
    still = Rotation(0 * inverse_frequencies(shape.head_dim, 1.0))
    net = Decoder(config, shape, rotation, describe, options)
    blocks = [
        net.pre_norm(
            i,
            net.attention(
                i,
                qkv_bias=on_attention,
                o_bias=on_attention,
                window=window,
                rotation=rotation if turns[i] else still,
            ),
            net.ffn(i, bias=on_ffn),
        )
        for i, window in enumerate(windows)
    ]
    return net.model("smollm3", blocks)
