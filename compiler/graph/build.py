"""Builds one Relax function of a graph, operator by operator, in the words a model file uses."""

from __future__ import annotations

from dataclasses import dataclass, field

import tvm
from tvm import relax

from compiler.graph import ops
from compiler.graph.kv_cache import KvCache
from compiler.graph.weights import STORAGE, Linear, Table, Vector


@dataclass(frozen=True)
class FunctionInfo:
    """A finished function: `tokens` rows a call, names of its arguments in order, type of its result."""

    name: str
    tokens: int
    inputs: tuple[str, ...]
    shape: tuple[int, ...]


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

    def embedding(self, table: Table) -> relax.Var:
        """Rows of `table` for the ids."""
        rows = self.argument(table.name, (table.type.n, table.type.k), STORAGE[table.type.grid])
        return self._emit("embedding", [self.ids(), rows], (self.tokens, table.type.k))

    def rms_norm(self, x: relax.Var, weight: Vector, eps: float) -> relax.Var:
        """x / sqrt(mean(x^2) + eps) * weight."""
        return self._emit(
            "rms_norm", [x, self.argument(weight.name, (weight.n,), "float32")], ops.shape_of(x.ty), eps=eps
        )

    def linear(self, x: relax.Var, weight: Linear) -> relax.Var:
        """x W^T with exact activations; a pass decides whether they are quantised."""
        n, k, name = weight.type.n, weight.type.k, weight.name
        out = (self.tokens, n)
        if weight.type.dense:
            return self._emit(
                "linear_dense", [x, self.argument(f"{name}.weight", (n, k), STORAGE[weight.type.grid])], out
            )
        kind = weight.type
        if kind.permuted:
            x = self._emit("gather", [x, self.argument(f"{name}.permutation", (k,), "int32")], ops.shape_of(x.ty))
        args = [x, self.argument(f"{name}.codes", (n, k), "uint8")]
        args.append(self.argument(f"{name}.scale", (n, kind.groups), kind.scale))
        attrs: dict[str, ops.Attr] = {"bits": kind.bits, "group": kind.group_size}
        if kind.table:
            return self._emit("linear_exact_table", args, out, grid=kind.grid, **attrs)
        if kind.offset:
            args.append(self.argument(f"{name}.offset", (n, kind.groups), "float32"))
            return self._emit("linear_exact_offset", args, out, **attrs)
        args.append(self.argument(f"{name}.zero", (n, kind.groups), "int16"))
        return self._emit("linear_exact", args, out, **attrs)

    def attention(self, qkv: relax.Var, rope: relax.Var, cache: KvCache, layer: int, heads: int) -> relax.Var:
        """Rotate q and k, append k and v to the layer's cache, attend to everything up to each token."""
        k_cache = self.argument(f"layers.{layer}.k", cache.key_shape, cache.dtype)
        v_cache = self.argument(f"layers.{layer}.v", cache.value_shape, cache.dtype)
        sizes = {"heads": heads, "kv_heads": cache.kv_heads, "head_dim": cache.head_dim}
        out = (self.tokens, heads * cache.head_dim)
        appended = self._emit("rope_append", [qkv, rope, self.span(), k_cache, v_cache], out, **sizes)
        q, keys, values = (self._bb.emit(relax.TupleGetItem(appended, i)) for i in range(3))
        return self._emit("attention", [q, keys, values, self.span()], out, **sizes)

    def swiglu(self, gate_up: relax.Var) -> relax.Var:
        """silu(gate) * up; gate is the first half of the columns."""
        return self._emit("swiglu", [gate_up], (self.tokens, ops.shape_of(gate_up.ty)[1] // 2))

    def add(self, residual: relax.Var, x: relax.Var) -> relax.Var:
        """residual + x."""
        return self._emit("add", [residual, x], ops.shape_of(x.ty))

    def _emit(self, name: str, args: list[relax.Var], out: tuple[int, ...], **attrs: ops.Attr) -> relax.Var:
        return self._bb.emit(ops.make(name, args, attrs, [ops.tensor(out, "float32")]))
