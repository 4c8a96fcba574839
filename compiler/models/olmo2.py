"""OLMo 2: norms after both halves of a block and none before; q and k are RMS-normed over all heads together.

Source of the arithmetic and of the module names: transformers' Olmo2ForCausalLM.
"""

from __future__ import annotations

from tvm import relax

from compiler.checkpoint.config import Config
from compiler.checkpoint.gguf_architecture import POST_NORMS, Architecture
from compiler.graph.build import Function
from compiler.models import Describe, Model, Options
from compiler.models.decoder import Decoder, Part, read_rotation, read_shape

GGUF = Architecture("olmo2", names=POST_NORMS)


def build(config: Config, describe: Describe, options: Options) -> Model:
    """attention_bias is on q, k, v and o."""
    shape = read_shape(config, eps=1e-5)
    config.string("hidden_act", ("silu",), default="silu")
    bias = config.boolean("attention_bias", default=False)
    net = Decoder(config, shape, read_rotation(config, shape, options), describe, options)

    def block(i: int) -> Part:
        norms = (shape.q_width, shape.kv_width)
        attention, ffn = net.attention(i, qkv_bias=bias, o_bias=bias, norm_widths=norms), net.ffn(i)
        after_attention = net.norm(i, "attention_norm", "post_attention_layernorm")
        after_ffn = net.norm(i, "ffn_norm", "post_feedforward_layernorm")

        def forward(f: Function, x: relax.Var) -> relax.Var:
            x = f.add(x, after_attention(f, attention(f, x)))
            return f.add(x, after_ffn(f, ffn(f, x)))

        return forward

    return net.model("olmo2", [block(i) for i in range(shape.layers)])
