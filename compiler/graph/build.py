"""Builds one Relax function of a graph, operator by operator, in the words a model file uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import tvm
from tvm import relax

from compiler.graph import ops
from compiler.graph.kv_cache import KvCache
from compiler.graph.weights import STORAGE, Linear, Table, Vector
from compiler.quant.ir import WeightType


@dataclass(frozen=True)
class FunctionInfo:
    """A finished function: `tokens` rows a call, names of its arguments in order, type of its result."""

    name: str
    tokens: int
    inputs: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Attention:
    """How one layer attends. scale: None is 1/sqrt(head_dim); softcap and window: 0 is none.

    norms: RMS norms of q and k before rotation, whose weights have head_dim values or one for each column.
    """

    heads: int
    scale: float | None = None
    softcap: float = 0.0
    window: int = 0
    norms: tuple[Vector, Vector] | None = None
    norm_eps: float = 0.0


@dataclass
class Graph:
    """A module under construction. `functions` describes what has been finished."""

    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    functions: list[FunctionInfo] = field(default_factory=list)

    def module(self) -> tvm.IRModule:
        """All finished functions."""
        return self.builder.get()


class Function:
    """One function of a graph, `tokens` rows a call; ends with `finish`.

    Arguments come into being when first named, so a function takes only what it uses. What changes from call to call
    (INPUTS) stands first and is counted in the attribute `num_input`: the VM then checks no weight again on every call.
    """

    INPUTS = ("ids", "hidden", "span")

    def __init__(self, graph: Graph, name: str, tokens: int) -> None:
        self.tokens = tokens
        self._last_only = False
        self._graph, self._name = graph, name
        self._bb = graph.builder
        self._args: dict[str, relax.Var] = {}
        self._scopes = [self._bb.function(name), self._bb.dataflow()]
        for scope in self._scopes:
            scope.__enter__()

    def argument(self, name: str, shape: tuple[int, ...], dtype: str) -> relax.Var:
        """The argument of this name, made on first use."""
        if name not in self._args:
            self._args[name] = relax.Var(name, ops.tensor(shape, dtype))
        return self._args[name]

    def ids(self) -> relax.Var:
        """Token ids i32[tokens]."""
        return self.argument("ids", (self.tokens,), "int32")

    def span(self) -> relax.Var:
        """i32[2]: first position, and how many of the rows are real."""
        return self.argument("span", (2,), "int32")

    def keep_last(self) -> None:
        """The next attention's other rows only leave k and v: it and all behind it compute the last real row alone."""
        self._last_only = self.tokens > 1

    def finish(self, result: relax.Var) -> None:
        """Return `result` and close the function."""
        output = self._bb.emit_output(result)
        self._scopes.pop().__exit__(None, None, None)
        names = sorted(self._args, key=lambda name: name not in self.INPUTS)  # stable: the rest keeps its order
        made = self._bb.emit_func_output(output, params=[self._args[name] for name in names])
        self._scopes.pop().__exit__(None, None, None)
        inputs = sum(name in self.INPUTS for name in names)
        self._bb.update_func(made, self._bb.get()[made].with_attr("num_input", inputs))
        info = FunctionInfo(self._name, self.tokens, tuple(names), ops.shape_of(result.ty))
        self._graph.functions.append(info)

    def embedding(self, table: Table, scale: float = 1.0) -> relax.Var:
        """Rows of `table` for the ids, times `scale`. A quantised table stays in its codes."""
        if not table.type.dense:
            assert not table.type.permuted, table
            return self._coded("embedding_quantized", [self.ids()], table.name, table.type, times=scale)
        rows = self.argument(table.name, (table.type.n, table.type.k), STORAGE[table.type.grid])
        return self._emit("embedding", [self.ids(), rows], (self.tokens, table.type.k), scale=scale)

    def rms_norm(self, x: relax.Var, weight: Vector, eps: float) -> relax.Var:
        """x / sqrt(mean(x^2) + eps) * weight."""
        return self._emit("rms_norm", [x, self.vector(weight)], ops.shape_of(x.ty), eps=eps)

    def vector(self, weight: Vector) -> relax.Var:
        """The weight of a norm."""
        return self.argument(weight.name, (weight.n,), "float32")

    def linear(self, x: relax.Var, weight: Linear) -> relax.Var:
        """x W^T, plus the bias if there is one. Activations are exact; a pass decides whether they are quantised."""
        product = self._product(x, weight)
        if not weight.bias:
            return product
        bias = self.argument(f"{weight.name}.bias", (weight.type.n,), "float32")
        return self._emit("add_bias", [product, bias], ops.shape_of(product.ty))

    def linears(self, x: relax.Var, weights: Sequence[Linear]) -> relax.Var:
        """The columns of several linear layers on one x, side by side."""
        joined, *others = (self.linear(x, weight) for weight in weights)
        for other in others:
            (rows, first), (_, second) = ops.shape_of(joined.ty), ops.shape_of(other.ty)
            joined = self._emit("concat", [joined, other], (rows, first + second))
        return joined

    def _product(self, x: relax.Var, weight: Linear) -> relax.Var:
        n, k, name = weight.type.n, weight.type.k, weight.name
        out = (ops.shape_of(x.ty)[0], n)
        if weight.type.dense:
            return self._emit(
                "linear_dense", [x, self.argument(f"{name}.weight", (n, k), STORAGE[weight.type.grid])], out
            )
        if weight.type.permuted:
            x = self._emit("gather", [x, self.argument(f"{name}.permutation", (k,), "int32")], ops.shape_of(x.ty))
        return self._coded("linear_exact", [x], name, weight.type)

    def _coded(self, op: str, x: list[relax.Var], name: str, kind: WeightType, **attrs: ops.Attr) -> relax.Var:
        """`op` on a weight in codes: as it is with zeros (one in all if symmetric), or with an offset or a table."""
        args = [*x, self.argument(f"{name}.codes", (kind.n, kind.k), "uint8")]
        args.append(self.argument(f"{name}.scale", (kind.n, kind.groups), kind.scale))
        attrs = {"bits": kind.bits, "group": kind.group_size, **attrs}
        out = (ops.shape_of(x[0].ty)[0], kind.n if op.startswith("linear") else kind.k)
        if kind.table:
            return self._emit(f"{op}_table", args, out, grid=kind.grid, **attrs)
        if kind.offset:
            args.append(self.argument(f"{name}.offset", (kind.n, kind.groups), "float32"))
            return self._emit(f"{op}_offset", args, out, **attrs)
        zeros = (1, 1) if kind.symmetric else (kind.n, kind.groups)
        args.append(self.argument(f"{name}.zero", zeros, "int16"))
        return self._emit(op, args, out, **attrs)

    def attention(self, qkv: relax.Var, rope: relax.Var, cache: KvCache, layer: int, how: Attention) -> relax.Var:
        """Norm q and k if asked, rotate them, append k and v to the layer's cache, attend to what each token sees.

        After `keep_last` only the last real row attends.
        """
        past = [self.argument(f"layers.{layer}.{a.name}", a.shape, a.dtype) for a in cache.arrays]
        sizes = {"heads": how.heads, "kv_heads": cache.kv_heads, "head_dim": cache.head_dim}
        out = (self.tokens, how.heads * cache.head_dim)
        kind = "_int8" if cache.integer else ""
        if how.norms is None:
            appended = self._emit(f"rope_append{kind}", [qkv, rope, self.span(), *past], out, **sizes)
        else:
            norms = [self.vector(norm) for norm in how.norms]
            args = [qkv, rope, self.span(), *norms, *past]
            appended = self._emit(f"rope_append_norm{kind}", args, out, **sizes, eps=how.norm_eps)
        q, *past = (self._bb.emit(relax.TupleGetItem(appended, i)) for i in range(1 + len(past)))
        span = self.span()
        if self._last_only:
            q, span = self._last_row(q), self._bb.emit(ops.make("last_span", [span], {}, [span.ty]))
        attrs = {
            "scale": cache.head_dim**-0.5 if how.scale is None else how.scale,
            "softcap": how.softcap,
            "window": how.window if how.window < cache.capacity else 0,
        }
        return self._emit(f"attention{kind}", [q, *past, span], ops.shape_of(q.ty), **sizes, **attrs)

    def _last_row(self, x: relax.Var) -> relax.Var:
        """The last real row of x, f32[1, d]."""
        return self._emit("last_row", [x, self.span()], (1, ops.shape_of(x.ty)[1]))

    def swiglu(self, gate_up: relax.Var) -> relax.Var:
        """silu(gate) * up; gate is the first half of the columns."""
        return self._gated("swiglu", gate_up)

    def geglu(self, gate_up: relax.Var) -> relax.Var:
        """gelu(gate) * up, GELU by tanh."""
        return self._gated("geglu", gate_up)

    def _gated(self, name: str, gate_up: relax.Var) -> relax.Var:
        rows, columns = ops.shape_of(gate_up.ty)
        return self._emit(name, [gate_up], (rows, columns // 2))

    def softcap(self, x: relax.Var, cap: float) -> relax.Var:
        """cap * tanh(x / cap)."""
        return self._emit("softcap", [x], ops.shape_of(x.ty), cap=cap)

    def add(self, residual: relax.Var, x: relax.Var) -> relax.Var:
        """residual + x; where x is the last row alone, so is the sum."""
        if ops.shape_of(residual.ty)[0] > ops.shape_of(x.ty)[0]:
            residual = self._last_row(residual)
        return self._emit("add", [residual, x], ops.shape_of(x.ty))

    def _emit(self, name: str, args: list[relax.Var], out: tuple[int, ...], **attrs: ops.Attr) -> relax.Var:
        return self._bb.emit(ops.make(name, args, attrs, [ops.tensor(out, "float32")]))
