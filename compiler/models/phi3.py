"""Phi-3 and Phi-4: Llama whose checkpoint keeps q, k, v in one module, and gate, up in another.

Source of the arithmetic and of the module names: transformers' Phi3ForCausalLM. Long-context variants have two sets of
rotary divisors: see decoder/rotary.py for which one is taken. Phi-4-mini rotates three quarters of each head.
"""

from __future__ import annotations

from compiler.checkpoint.config import Config
from compiler.checkpoint.gguf_architecture import Architecture
from compiler.models import Describe, Model, Options
from compiler.models.decoder import LONG, Decoder, read_rotation, read_shape, read_windows

GGUF = Architecture(
    "phi3",
    keys={"rope.scaling.original_context_length": "original_max_position_embeddings"},
    names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    partial=True,
)


def build(config: Config, describe: Describe, options: Options) -> Model:
    """A sliding_window holds in every layer."""
    shape = read_shape(config, eps=1e-5)
    config.string("hidden_act", ("silu",), default="silu")
    windows = read_windows(config, shape.layers)
    config.accept("embd_pdrop", "resid_pdrop")  # dropout is for training
    trained = config.integer("original_max_position_embeddings", 1, 1 << 24, default=4096)
    rotation = read_rotation(config, shape, options, kinds=("default", *LONG), partial=True, trained=trained)
    net = Decoder(config, shape, rotation, describe, options)
    blocks = [
        net.pre_norm(i, net.attention(i, fused="qkv_proj", window=window), net.ffn(i, fused="gate_up_proj"))
        for i, window in enumerate(windows)
    ]
    return net.model("phi3", blocks)
