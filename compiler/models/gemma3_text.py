"""Gemma 3, text: Gemma 2's blocks with normed query and key heads, and a rotation of their own in sliding layers.

Source of the arithmetic and of the module names: transformers' Gemma3ForCausalLM. Folded here: norms multiply by
1 + weight, those of q and k too. Embeddings are multiplied by sqrt(hidden_size) in fp32; a bfloat16 run of transformers
rounds that factor to bfloat16 first. Checkpoints with an image tower have model_type gemma3: see gemma3.py.
"""

from __future__ import annotations

from compiler.checkpoint.config import Config
from compiler.checkpoint.gguf_architecture import Architecture, Values
from compiler.errors import UnsupportedError
from compiler.graph.build import Function
from compiler.graph.rope import Rotation, inverse_frequencies
from compiler.models import Describe, Model, Options, gemma2
from compiler.models.decoder import (
    FULL,
    KINDS,
    SLIDING,
    Decoder,
    Shape,
    kept_context,
    read_section,
    read_shape,
    read_windows,
)

PATTERN = 6  # every sixth layer sees everything
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4

def unsaid(config: Values) -> Values:
    """As Gemma 2's. The file's rotation is that of layers that see everything; no window there means none anywhere."""
    rotations = {FULL: config.get("rope_parameters"), SLIDING: {"rope_type": "default"}}
    window = config.get("sliding_window")
    return {**gemma2.unsaid(config, layers_27b=62), "rope_parameters": rotations, "sliding_window": window}


GGUF = Architecture(
    "gemma3",
    model_type="gemma3_text",
    norms_plus_one=True,
    keys={"rope.freq_base_swa": "rope_local_base_freq"},
    names=gemma2.NAMES,
    rest=unsaid,
)


def build(config: Config, describe: Describe, options: Options) -> Model:
    """Scores are scaled by 1 / sqrt(query_pre_attn_scalar). Soft caps of scores are refused: transformers has none."""
    shape = read_shape(config, head_dim=256, tied=True)
    for key in ("hidden_activation", "hidden_act"):
        config.string(key, ("gelu_pytorch_tanh",), default="gelu_pytorch_tanh")
    if config.boolean("use_bidirectional_attention", default=False):
        raise UnsupportedError(
            f"{config.where('use_bidirectional_attention')} is true, but quern's attention is causal."
        )
    config.accept("cache_implementation")  # how transformers stores keys and values
    scale = config.number("query_pre_attn_scalar", 1e-6, 1e6, default=256.0) ** -0.5
    logit_cap = config.number("final_logit_softcapping", 0.0, 1e6, default=0.0)
    bias = config.boolean("attention_bias", default=False)
    pattern = config.integer("sliding_window_pattern", 1, 1024, default=PATTERN)
    config.neutral(_sliding_window_pattern=pattern)
    if config.has("layer_types"):
        config.accept("_sliding_window_pattern")  # says how the list came about
    windows = read_windows(config, shape.layers, lambda i: (i + 1) % pattern != 0, absent=4096)
    full, local = read_rotations(config, shape, options)
    net = Decoder(config, shape, full, describe, options, norm_plus=1.0)
    blocks = [
        net.four_norms(
            i,
            net.attention(
                i,
                qkv_bias=bias,
                o_bias=bias,
                norm_widths=(shape.head_dim, shape.head_dim),
                scale=scale,
                window=window,
                rotation=local if window else full,
            ),
            net.ffn(i, gate=Function.geglu),
        )
        for i, window in enumerate(windows)
    ]
    return net.model("gemma3_text", blocks, embedding_scale=shape.hidden**0.5, softcap=logit_cap)


def read_rotations(config: Config, shape: Shape, options: Options) -> tuple[Rotation, Rotation]:
    """Rotation of layers that see everything, and of sliding ones. Scaling as transformers 4 writes it is the former's.

    transformers 5 writes rope_parameters with a section for each.
    """
    full = config.number("rope_theta", 1.0, 1e12, default=GLOBAL_THETA)
    local = config.number("rope_local_base_freq", 1.0, 1e12, default=LOCAL_THETA)
    context = kept_context(config, shape, options)

    def read(section: Config | None, theta: float) -> Rotation:
        if section is None:
            return Rotation(inverse_frequencies(shape.head_dim, theta))
        return read_section(section, shape.head_dim, theta, kinds=KINDS, context=context, shape=shape)

    if config.has("rope_parameters"):
        both = config.section("rope_parameters")
        sections = [both.section(kind) if both.has(kind) else None for kind in (FULL, SLIDING)]
    else:
        config.accept("rope_parameters", "rope_scaling")
        sections = [config.section("rope_scaling") if config.has("rope_scaling") else None, None]
    return read(sections[0], full), read(sections[1], local)
