"""Weights, blocks and functions of a decoder-only transformer: the parts a model file puts together.

`Decoder` makes parts: `norm`, `attention`, `ffn` name their weights, check them against the checkpoint's headers and
give a function from rows to rows. A model file joins them into blocks; `model` writes the graph's functions from these.
Names of checkpoint modules are transformers' own; what a model calls differently it passes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from types import MappingProxyType

from tvm import relax

from compiler.checkpoint.config import Config
from compiler.graph.build import Attention, Function, Graph
from compiler.graph.kv_cache import KvCache
from compiler.graph.rope import Rotation
from compiler.graph.weights import Constant, Linear, Table, Vector, Weight
from compiler.models import Describe, Model, Options, expect
from compiler.models.decoder.settings import Shape, kept_context
from compiler.quant.ir import WeightType

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
        rotation: Rotation,
        describe: Describe,
        options: Options,
        norm_plus: float = 0.0,
    ) -> None:
        self.config, self.shape, self.options = config, shape, options
        self.context = kept_context(config, shape, options)
        self.cache = KvCache.for_context(shape.kv_heads, shape.head_dim, self.context, options.cache_dtype)
        self._describe, self._norm_plus = describe, norm_plus
        self._weights: list[Weight] = []
        self._rotations: dict[Rotation, Constant] = {}
        self._rotation = rotation

    def table(self, rotation: Rotation) -> Constant:
        """The rotary table of a rotation, one for all layers that share it."""
        if rotation not in self._rotations:
            name = f"rope{len(self._rotations) or ''}"
            made = Constant(name, rotation.table(self.cache.capacity, self.shape.head_dim))
            self._rotations[rotation] = made
            self._weights.append(made)
        return self._rotations[rotation]

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
        order: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> tuple[Linear, ...]:
        """Layers on one input of k columns, rows by checkpoint module: one layer where all are quantised alike.

        order: for modules whose rows stand in another order in the graph, the checkpoint's row of each.
        """
        types = [(module, expect(self._describe, module, n, k, self.config, keys)) for module, n in sources.items()]
        runs = [list(run) for _, run in groupby(types, key=lambda item: item[1].kind)]
        made = []
        for i, run in enumerate(runs):
            modules, rows = tuple(module for module, _ in run), tuple(type_.n for _, type_ in run)
            scale = "float32" if any(type_.scale == "float32" for _, type_ in run) else "float16"
            symmetric = all(type_.symmetric for _, type_ in run)
            joined = kind(replace(run[0][1], n=sum(rows), scale=scale, symmetric=symmetric))
            label = f"{name}.{i}" if len(runs) > 1 else name
            made.append(Linear(label, modules, joined, rows, bias, _joined_order(modules, rows, order)))
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
        rotation: Rotation | None = None,
    ) -> Part:
        """Self-attention of layer i, from the projections of q, k, v to that of the output.

        fused: name of the one module that holds q, k and v, one below the other. norm_widths: q_norm and k_norm stand
        before the rotation, their weights so long: head_dim norms each head, q_width and kv_width norm all together.
        rotation: this layer's own, where it is not the model's.
        """
        shape, module = self.shape, f"model.layers.{i}.self_attn"
        rotation = rotation or self._rotation
        table = self.table(rotation)
        parts = {f"{module}.q_proj": shape.q_width, f"{module}.k_proj": shape.kv_width}
        parts[f"{module}.v_proj"] = shape.kv_width
        if fused is not None:
            parts = {f"{module}.{fused}": shape.q_width + 2 * shape.kv_width}
        linear = self.options.linear
        order = self._order(parts, rotation)
        assert not (order and norm_widths), "weights of norms would have to move with the rows"
        qkv = self.linears(f"layers.{i}.qkv", shape.hidden, parts, HEAD_KEYS, linear, qkv_bias, order)
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
            angles = f.argument(table.name, table.values.shape, "float32")
            return f.linears(f.attention(f.linears(x, qkv), angles, self.cache, i, how), o)

        return part

    def _order(self, parts: Mapping[str, int], rotation: Rotation) -> dict[str, tuple[int, ...]]:
        """Rows of q and k for heads that rotate in part; v, and o after it, stay as they are."""
        d = self.shape.head_dim
        if 2 * len(rotation.frequencies) == d:
            return {}
        head, turning = rotation.head_order(d), self.shape.heads + self.shape.kv_heads
        moved = [h * d + place for h in range(turning) for place in head]
        moved += range(turning * d, turning * d + self.shape.kv_width)
        if len(parts) == 1:
            return {module: tuple(moved) for module in parts}
        q, k, _ = parts
        return {q: tuple(moved[: self.shape.q_width]), k: tuple(moved[: self.shape.kv_width])}

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

    def four_norms(self, i: int, attention: Part, ffn: Part) -> Part:
        """Gemma's block: a norm before and a norm after each half."""
        before_attention = self.norm(i, "attention_norm", "input_layernorm")
        after_attention = self.norm(i, "attention_post_norm", "post_attention_layernorm")
        before_ffn = self.norm(i, "ffn_norm", "pre_feedforward_layernorm")
        after_ffn = self.norm(i, "ffn_post_norm", "post_feedforward_layernorm")

        def block(f: Function, x: relax.Var) -> relax.Var:
            x = f.add(x, after_attention(f, attention(f, before_attention(f, x))))
            return f.add(x, after_ffn(f, ffn(f, before_ffn(f, x))))

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
        """Functions: decode (1 token to logits), prefill_M (M tokens to the last one's hidden state), head_1 (that to
        logits), logits_M (M tokens to the logits after each).

        logits_scale is folded into the last norm's weight.
        """
        shape = self.shape
        rows = expect(self._describe, "model.embed_tokens", shape.vocab, shape.hidden, self.config, VOCABULARY_KEYS)
        table = Table("embedding", "model.embed_tokens", rows)
        self._weights.append(table)
        last = self.vector("norm", "model.norm", shape.hidden, times=logits_scale)
        source = {"model.embed_tokens" if shape.tied else "lm_head": shape.vocab}
        head = self.linears("head", shape.hidden, source, VOCABULARY_KEYS, self.options.head)

        def hidden(f: Function, last_only: bool = False) -> relax.Var:
            x = f.embedding(table, embedding_scale)
            for block in blocks[:-1]:
                x = block(f, x)
            if last_only:
                f.keep_last()
            return blocks[-1](f, x)

        def logits(f: Function, x: relax.Var) -> relax.Var:
            made = f.linears(f.rms_norm(x, last, shape.eps), head)
            return f.softcap(made, softcap) if softcap else made

        graph = Graph()
        decode = Function(graph, "decode", 1)
        decode.finish(logits(decode, hidden(decode)))
        for m in self.options.chunks:
            prefill = Function(graph, f"prefill_{m}", m)
            prefill.finish(hidden(prefill, last_only=True))
        top = Function(graph, "head_1", 1)
        top.finish(logits(top, top.argument("hidden", (1, shape.hidden), "float32")))
        for m in self.options.chunks:
            each = Function(graph, f"logits_{m}", m)
            each.finish(logits(each, hidden(each)))
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


def _joined_order(
    modules: tuple[str, ...], rows: tuple[int, ...], order: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...] | None:
    """The order of rows that lie one module below the other; None where every module keeps its own."""
    if not any(module in order for module in modules):
        return None
    starts = [sum(rows[:i]) for i in range(len(rows))]
    places = [order.get(module, tuple(range(n))) for module, n in zip(modules, rows, strict=True)]
    return tuple(start + place for start, part in zip(starts, places, strict=True) for place in part)


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
