"""Llama and what shares its graph: RMSNorm, rotary attention with grouped queries, SwiGLU, no biases.

Source of the arithmetic and of the module names: transformers' LlamaForCausalLM.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax

from compiler.checkpoint.config import Config
from compiler.errors import ConfigError, UnsupportedError
from compiler.graph import rope
from compiler.graph.build import Function, Graph
from compiler.graph.kv_cache import KvCache
from compiler.graph.weights import Constant, Linear, Table, Vector, Weight
from compiler.models import Describe, Model, Options, expect
from compiler.quant.ir import WeightType

MOST = 1 << 20  # upper bound of any width in config.json
DEFAULT_CONTEXT = 4096  # positions kept when the model allows more and --context does not ask


@dataclass(frozen=True)
class Shape:
    """The numbers of config.json that the graph needs."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    theta: float
    tied: bool
    positions: int


@dataclass(frozen=True)
class Layer:
    """Weights of one block."""

    attention_norm: Vector
    qkv: Linear
    o: Linear
    ffn_norm: Vector
    gate_up: Linear
    down: Linear

    @property
    def all(self) -> tuple[Weight, ...]:
        """In the order of use."""
        return (self.attention_norm, self.qkv, self.o, self.ffn_norm, self.gate_up, self.down)


def read_shape(config: Config) -> Shape:
    """Typed and checked. Raises ConfigError for values that cannot be and UnsupportedError for other mathematics."""
    hidden = config.integer("hidden_size", 1, MOST)
    heads = config.integer("num_attention_heads", 1, 4096)
    kv_heads = config.integer("num_key_value_heads", 1, 4096, default=heads)
    head_dim = config.integer("head_dim", 2, 4096, default=max(hidden // heads, 2))
    if heads % kv_heads:
        raise ConfigError(
            f"{config.where('num_key_value_heads')} is {kv_heads}, but it must divide num_attention_heads, {heads}."
        )
    if head_dim % 2:
        raise ConfigError(f"{config.where('head_dim')} is {head_dim}, but rotary embedding needs an even number.")
    if not config.has("head_dim") and hidden % heads:
        raise ConfigError(
            f"{config.where('num_attention_heads')} is {heads}, but it must divide hidden_size, {hidden}."
        )
    config.string("hidden_act", ("silu",), default="silu")
    for bias in ("attention_bias", "mlp_bias"):
        if config.boolean(bias, default=False):
            raise UnsupportedError(f"{config.where(bias)} is true, but quern's llama has no biases in linear layers.")
    return Shape(
        hidden=hidden,
        ffn=config.integer("intermediate_size", 1, MOST),
        layers=config.integer("num_hidden_layers", 1, 1024),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=config.integer("vocab_size", 1, 1 << 22),
        eps=config.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        theta=_rope_theta(config),
        tied=config.boolean("tie_word_embeddings", default=False),
        positions=config.integer("max_position_embeddings", 1, 1 << 24),
    )


def _rope_theta(config: Config) -> float:
    """Base of the rotary frequencies, in either spelling (transformers 4: rope_theta, 5: rope_parameters)."""
    section = next((key for key in ("rope_parameters", "rope_scaling") if config.has(key)), None)
    theta = config.number("rope_theta", 1.0, 1e12, default=10000.0)
    if section is None:
        config.accept("rope_parameters", "rope_scaling")
        return theta
    values = config.section(section)
    key = "rope_type" if values.has("rope_type") else "type"  # transformers before 4.45 wrote "type"
    kind = values.string(key, default="default")
    if kind != "default":
        raise UnsupportedError(
            f"{values.where(key)} is {kind!r}, but quern's llama has plain rotary embedding ('default') only."
        )
    return values.number("rope_theta", 1.0, 1e12, default=theta)


def weights(
    config: Config, shape: Shape, describe: Describe, options: Options
) -> tuple[Table, list[Layer], Vector, Linear]:
    """Every weight with its checkpoint modules, each shape checked against config.json."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    heads = "num_attention_heads,num_key_value_heads,head_dim,hidden_size"
    ffn = "intermediate_size,hidden_size"

    def linear(name: str, keys: str, k: int, parts: dict[str, int]) -> Linear:
        types = [expect(describe, module, n, k, config, keys) for module, n in parts.items()]
        first = types[0]
        if len({(t.grid, t.group_size) for t in types}) > 1:
            kinds = ", ".join(f"{m} {t.grid} g{t.group_size}" for m, t in zip(parts, types, strict=True))
            raise UnsupportedError(f"{kinds}: layers that read the same input must be quantised alike.")
        scale = "float32" if any(t.scale == "float32" for t in types) else "float16"
        joined = WeightType(sum(t.n for t in types), k, first.grid, first.group_size, scale)
        return Linear(name, tuple(parts), (options.head if name == "head" else options.linear)(joined))

    def layer(i: int) -> Layer:
        name, module = f"layers.{i}", f"model.layers.{i}"
        attention, mlp = f"{module}.self_attn", f"{module}.mlp"
        qkv = {f"{attention}.q_proj": q, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv}
        gate_up = {f"{mlp}.gate_proj": shape.ffn, f"{mlp}.up_proj": shape.ffn}
        return Layer(
            Vector(f"{name}.attention_norm", f"{module}.input_layernorm", shape.hidden),
            linear(f"{name}.qkv", heads, shape.hidden, qkv),
            linear(f"{name}.o", heads, q, {f"{attention}.o_proj": shape.hidden}),
            Vector(f"{name}.ffn_norm", f"{module}.post_attention_layernorm", shape.hidden),
            linear(f"{name}.gate_up", ffn, shape.hidden, gate_up),
            linear(f"{name}.down", ffn, shape.ffn, {f"{mlp}.down_proj": shape.hidden}),
        )

    embedding = expect(describe, "model.embed_tokens", shape.vocab, shape.hidden, config, "vocab_size,hidden_size")
    if not embedding.dense:
        raise UnsupportedError(
            f"model.embed_tokens is quantised ({embedding.grid}), but quern's embeddings are dense: "
            f"take a checkpoint with dense ones."
        )
    head = "model.embed_tokens" if shape.tied else "lm_head"
    return (
        Table("embedding", "model.embed_tokens", embedding),
        [layer(i) for i in range(shape.layers)],
        Vector("norm", "model.norm", shape.hidden),
        linear("head", "vocab_size,hidden_size", shape.hidden, {head: shape.vocab}),
    )


def build(config: Config, describe: Describe, options: Options) -> Model:
    """Functions: decode (1 token to logits), prefill_M (M tokens to hidden states), head_M (those to logits)."""
    shape = read_shape(config)
    bos = config.integer("bos_token_id", 0, shape.vocab - 1, default=-1) if config.has("bos_token_id") else None
    eos = config.integers("eos_token_id", 0, shape.vocab - 1, default=())
    config.accept("pad_token_id", "bos_token_id")
    if not options.context:
        context = min(shape.positions, DEFAULT_CONTEXT)
    elif options.context > shape.positions:
        raise ConfigError(
            f"--context asks for {options.context} positions, but {config.where('max_position_embeddings')} "
            f"is {shape.positions}. Ask for at most that."
        )
    else:
        context = options.context
    table, layers, norm, head = weights(config, shape, describe, options)
    cache = KvCache.for_context(shape.kv_heads, shape.head_dim, context, options.cache_dtype)
    rotation = Constant("rope", rope.table(cache.capacity, rope.inverse_frequencies(shape.head_dim, shape.theta)))

    def hidden(f: Function) -> relax.Var:
        cos_sin = f.argument(rotation.name, rotation.values.shape, "float32")
        x = f.embedding(table)
        for i, layer in enumerate(layers):
            qkv = f.linear(f.rms_norm(x, layer.attention_norm, shape.eps), layer.qkv)
            x = f.add(x, f.linear(f.attention(qkv, cos_sin, cache, i, shape.heads), layer.o))
            gate_up = f.linear(f.rms_norm(x, layer.ffn_norm, shape.eps), layer.gate_up)
            x = f.add(x, f.linear(f.swiglu(gate_up), layer.down))
        return x

    def logits(f: Function, x: relax.Var) -> relax.Var:
        return f.linear(f.rms_norm(x, norm, shape.eps), head)

    graph = Graph()
    decode = Function(graph, "decode", 1)
    decode.finish(logits(decode, hidden(decode)))
    for m in options.chunks:
        prefill = Function(graph, f"prefill_{m}", m)
        prefill.finish(hidden(prefill))
    for m in (1, *options.chunks):
        top = Function(graph, f"head_{m}", m)
        top.finish(logits(top, top.argument("hidden", (m, shape.hidden), "float32")))
    used = [table, *(w for layer in layers for w in layer.all), norm, head, rotation]
    count = _parameters(used, shape.tied)
    return Model("llama", graph, tuple(used), (cache,) * shape.layers, context, shape.vocab, bos, eos, count)


def _parameters(used: list[Weight], tied: bool) -> int:
    """Trained numbers; a tied head counts once."""
    sizes = [w.type.n * w.type.k for w in used if isinstance(w, Linear | Table) and not (tied and w.name == "head")]
    return sum(sizes) + sum(w.n for w in used if isinstance(w, Vector))
