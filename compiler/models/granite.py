"""Granite 3: Llama with four multipliers, none of which costs anything once compiled.

Source of the arithmetic and of the module names: transformers' GraniteForCausalLM. Where the multipliers go:

  embedding_multiplier e, residual_multiplier r   h = e * embedding, then h = h + r * part(norm(h)) for each part. The
      graph keeps h / r, which starts as (e / r) * embedding and adds parts as they are. Norms do not see the difference
      when eps becomes eps / r^2: norm(h) = h / sqrt(mean(h^2) + eps) = (h / r) / sqrt(mean((h / r)^2) + eps / r^2).
  attention_multiplier   the scale of the scores, instead of 1 / sqrt(head_dim)
  logits_scaling   divides the logits: folded into the last norm's weight
Equal in real numbers; in fp32 the difference is rounding. Hidden states between functions of the bundle are h / r.
"""

from __future__ import annotations

from dataclasses import replace

from compiler.checkpoint.config import Config
from compiler.checkpoint.gguf_architecture import Architecture
from compiler.models import Describe, Model, Options
from compiler.models.decoder import Decoder, Part, read_rotation, read_shape

SMALLEST, LARGEST = 1e-4, 1e4  # multipliers outside are damage

GGUF = Architecture(
    "granite",
    interleaved=True,
    keys={
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "attention.scale": "attention_multiplier",
        "logit_scale": "logits_scaling",
    },
    biases={"attention_bias": "attn_q", "mlp_bias": "ffn_up"},
)


def build(config: Config, describe: Describe, options: Options) -> Model:
    """An absent multiplier is 1, as in transformers, that of attention too."""
    embedding, attention_scale, residual, logits = (
        config.number(key, SMALLEST, LARGEST, default=1.0)
        for key in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    )
    shape = read_shape(config)
    shape = replace(shape, eps=shape.eps / residual**2)
    config.string("hidden_act", ("silu",), default="silu")
    on_attention = config.boolean("attention_bias", default=False)
    on_ffn = config.boolean("mlp_bias", default=False)
    net = Decoder(config, shape, read_rotation(config, shape, options), describe, options)

    def block(i: int) -> Part:
        attention = net.attention(i, qkv_bias=on_attention, o_bias=on_attention, scale=attention_scale)
        return net.pre_norm(i, attention, net.ffn(i, bias=on_ffn))

    blocks = [block(i) for i in range(shape.layers)]
    return net.model("granite", blocks, embedding_scale=embedding / residual, logits_scale=1 / logits)
