"""Weights, blocks and functions of a decoder-only transformer: the parts a model file puts together.

`Decoder` makes parts: `norm`, `attention`, `ffn` name their weights, check them against the checkpoint's headers and
give a function from rows to rows. A model file joins them into blocks; `model` writes the graph's functions from these.
Names of checkpoint modules are transformers' own; what a model calls differently it passes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from tvm import relax

from compiler.checkpoint.config import Config
from compiler.errors import ConfigError
from compiler.graph import rope
from compiler.graph.build import Attention, Function, Graph
from compiler.graph.kv_cache import KvCache
from compiler.graph.weights import Constant, Linear, Table, Vector, Weight
from compiler.models import Describe, Model, Options, expect
from compiler.models.decoder.settings import Shape
from compiler.quant.ir import WeightType

DEFAULT_CONTEXT = 4096  # positions kept when the model allows more and --context does not ask
HEAD_KEYS = "num_attention_heads,num_key_value_heads,head_dim,hidden_size"
FFN_KEYS = "intermediate_size,hidden_size"
VOCABULARY_KEYS = "vocab_size,hidden_size"

Part = Callable[[Function, relax.Var], relax.Var]  # rows f32[m, a] to rows f32[m, b]


class Decoder:
    """A model under construction. norm_plus is added to every norm's weight (Gemma stores them less one)."""

    def __init__(
        self,
        config: Config,
        shape: Shape,
        frequencies: rope.Frequencies,
        describe: Describe,
        options: Options,
        norm_plus: float = 0.0,
    ) -> None:
        self.config, self.shape, self.options = config, shape, options
        self.context = _context(config, shape, options)
        self.cache = KvCache.for_context(shape.kv_heads, shape.head_dim, self.context, options.cache_dtype)
        self.rotation = Constant("rope", rope.table(self.cache.capacity, frequencies))
        self._describe, self._norm_plus = describe, norm_plus
        self._weights: list[Weight] = [self.rotation]

    def vector(self, name: str, module: str, n: int, times: float = 1.0) -> Vector:
        """The weight of a norm over n values; `times` is folded into it."""
        made = Vector(name, module, n, self._norm_plus, times)
        self._weights.append(made)
        return made

    def linears(
        self,
        name: str,
        k: int,
        sources: Mapping[str, int],
        keys: str,
        kind: Callable[[WeightType], WeightType],
        bias: bool = False,
    ) -> tuple[Linear, ...]:
        """Layers on one input of k columns, rows by checkpoint module: one layer where all are quantised alike."""
        types = [(module, expect(self._describe, module, n, k, self.config, keys)) for module, n in sources.items()]
        runs = [list(run) for _, run in groupby(types, key=lambda item: item[1].kind)]
        made = []
        for i, run in enumerate(runs):
            modules, rows = tuple(module for module, _ in run), tuple(type_.n for _, type_ in run)
            scale = "float32" if any(type_.scale == "float32" for _, type_ in run) else "float16"
            joined = kind(replace(run[0][1], n=sum(rows), scale=scale))
            made.append(Linear(f"{name}.{i}" if len(runs) > 1 else name, modules, joined, rows, bias))
        self._weights.extend(made)
        return tuple(made)

    def norm(self, i: int, name: str, module: str) -> Part:
        """RMS norm of layer i over the hidden state."""
        weight = self.vector(f"layers.{i}.{name}", f"model.layers.{i}.{module}", self.shape.hidden)
        return lambda f, x: f.rms_norm(x, weight, self.shape.eps)

    def attention(
        self,
        i: int,
        *,
        fused: str | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        norm_widths: tuple[int, int] | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        window: int = 0,
    ) -> Part:
        """Self-attention of layer i, from the projections of q, k, v to that of the output.

        fused: name of the one module that holds q, k and v, one below the other. norm_widths: q_norm and k_norm stand
        before the rotation, their weights so long: head_dim norms each head, q_width and kv_width norm all together.
        """
        shape, module = self.shape, f"model.layers.{i}.self_attn"
        parts = {f"{module}.q_proj": shape.q_width, f"{module}.k_proj": shape.kv_width}
        parts[f"{module}.v_proj"] = shape.kv_width
        if fused is not None:
            parts = {f"{module}.{fused}": shape.q_width + 2 * shape.kv_width}
        linear = self.options.linear
        qkv = self.linears(f"layers.{i}.qkv", shape.hidden, parts, HEAD_KEYS, linear, qkv_bias)
        norms = None
        if norm_widths is not None:
            q_norm, k_norm = (
                self.vector(f"layers.{i}.{side}_norm", f"{module}.{side}_norm", width)
                for side, width in zip("qk", norm_widths, strict=True)
            )
            norms = (q_norm, k_norm)
        how = Attention(shape.heads, scale, softcap, window, norms, shape.eps)
        out = {f"{module}.o_proj": shape.hidden}
        o = self.linears(f"layers.{i}.o", shape.q_width, out, HEAD_KEYS, linear, o_bias)

        def part(f: Function, x: relax.Var) -> relax.Var:
            table = f.argument(self.rotation.name, self.rotation.values.shape, "float32")
            return f.linears(f.attention(f.linears(x, qkv), table, self.cache, i, how), o)

        return part

    def ffn(
        self, i: int, *, fused: str | None = None, bias: bool = False, gate: Callable[..., relax.Var] = Function.swiglu
    ) -> Part:
        """Gated feed-forward network of layer i. fused: name of the one module with gate above up."""
        shape, module = self.shape, f"model.layers.{i}.mlp"
        parts = {f"{module}.gate_proj": shape.ffn, f"{module}.up_proj": shape.ffn}
        if fused is not None:
            parts = {f"{module}.{fused}": 2 * shape.ffn}
        gate_up = self.linears(f"layers.{i}.gate_up", shape.hidden, parts, FFN_KEYS, self.options.linear, bias)
        out = {f"{module}.down_proj": shape.hidden}
        down = self.linears(f"layers.{i}.down", shape.ffn, out, FFN_KEYS, self.options.linear, bias)
        return lambda f, x: f.linears(gate(f, f.linears(x, gate_up)), down)

    def pre_norm(self, i: int, attention: Part, ffn: Part) -> Part:
        """The usual block: x + attention(norm(x)), then x + ffn(norm(x))."""
        before_attention = self.norm(i, "attention_norm", "input_layernorm")
        before_ffn = self.norm(i, "ffn_norm", "post_attention_layernorm")

        def block(f: Function, x: relax.Var) -> relax.Var:
            x = f.add(x, attention(f, before_attention(f, x)))
            return f.add(x, ffn(f, before_ffn(f, x)))

        return block

    def model(
        self,
        type_: str,
        blocks: Sequence[Part],
        *,
        embedding_scale: float = 1.0,
        logits_scale: float = 1.0,
        softcap: float = 0.0,
    ) -> Model:
        """Functions: decode (1 token to logits), prefill_M (M tokens to hidden states), head_M (those to logits).

        logits_scale is folded into the last norm's weight.
        """
        shape = self.shape
        rows = expect(self._describe, "model.embed_tokens", shape.vocab, shape.hidden, self.config, VOCABULARY_KEYS)
        table = Table("embedding", "model.embed_tokens", rows)
        self._weights.append(table)
        last = self.vector("norm", "model.norm", shape.hidden, times=logits_scale)
        source = {"model.embed_tokens" if shape.tied else "lm_head": shape.vocab}
        head = self.linears("head", shape.hidden, source, VOCABULARY_KEYS, self.options.head)

        def hidden(f: Function) -> relax.Var:
            x = f.embedding(table, embedding_scale)
            for block in blocks:
                x = block(f, x)
            return x

        def logits(f: Function, x: relax.Var) -> relax.Var:
            made = f.linears(f.rms_norm(x, last, shape.eps), head)
            return f.softcap(made, softcap) if softcap else made

        graph = Graph()
        decode = Function(graph, "decode", 1)
        decode.finish(logits(decode, hidden(decode)))
        for m in self.options.chunks:
            prefill = Function(graph, f"prefill_{m}", m)
            prefill.finish(hidden(prefill))
        for m in (1, *self.options.chunks):
            top = Function(graph, f"head_{m}", m)
            top.finish(logits(top, top.argument("hidden", (m, shape.hidden), "float32")))
        return Model(
            type=type_,
            graph=graph,
            weights=_in_order_of_use(self._weights, graph.functions[0].inputs),
            caches=(self.cache,) * shape.layers,
            context=self.context,
            vocab_size=shape.vocab,
            bos=shape.bos,
            eos=shape.eos,
            parameters=_parameters(self._weights, shape.tied),
        )


def _context(config: Config, shape: Shape, options: Options) -> int:
    """Positions to keep."""
    if not options.context:
        return min(shape.positions, DEFAULT_CONTEXT)
    if options.context > shape.positions:
        raise ConfigError(
            f"--context asks for {options.context} positions, but {config.where('max_position_embeddings')} "
            f"is {shape.positions}. Ask for at most that."
        )
    return options.context


def _in_order_of_use(weights: Sequence[Weight], parameters: Sequence[str]) -> tuple[Weight, ...]:
    """The weights as `parameters` names them first, so that reading the file goes forward."""

    def place(weight: Weight) -> int:
        return next(i for i, name in enumerate(parameters) if name == weight.name or name.startswith(f"{weight.name}."))

    return tuple(sorted(weights, key=place))


def _parameters(weights: Sequence[Weight], tied: bool) -> int:
    """Trained numbers; a tied head counts once."""
    count = 0
    for weight in weights:
        if isinstance(weight, Vector):
            count += weight.n
        elif isinstance(weight, Table) or (isinstance(weight, Linear) and not (tied and weight.name == "head")):
            count += weight.type.n * weight.type.k
        if isinstance(weight, Linear) and weight.bias:
            count += weight.type.n
    return count
