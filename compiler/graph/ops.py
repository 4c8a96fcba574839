"""The operators a graph is made of. `SIGNATURES` is the whole vocabulary; schedules/ says what each computes.

In Relax an operator is a call of the external function "quern.NAME": tensor arguments first, then its attributes as
prim values or strings, in the order of its signature. Operators that write their arguments use `call_inplace_packed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

PREFIX = "quern."
Attr = int | float | str


@dataclass(frozen=True)
class Signature:
    """Names of the tensor arguments, names of the attributes, and which tensor arguments are updated in place."""

    args: tuple[str, ...]
    attrs: tuple[str, ...] = ()
    inplace: tuple[str, ...] = ()


def _linears(path: str, x: tuple[str, ...]) -> dict[str, Signature]:
    """Linear layers with quantised weights: with a zero, an offset or a table's values; each with a residual or not."""
    found = {}
    for affine, kind in (("zero", ""), ("offset", "_offset"), (None, "_table")):
        weight = ("codes", "scale", affine) if affine else ("codes", "scale")
        attrs = ("bits", "group") if affine else ("grid", "bits", "group")
        for tail in ((), ("residual",)):
            found["_".join((f"linear_{path}{kind}", *tail))] = Signature((*x, *weight, *tail), attrs)
    return found


def _caches(kind: str, cache: tuple[str, ...]) -> dict[str, Signature]:
    """What writes and reads a layer's cache of one kind."""
    sizes, x = ("heads", "kv_heads", "head_dim"), ("qkv", "rope", "span")
    return {
        f"rope_append{kind}": Signature((*x, *cache), sizes, cache),
        f"rope_append_norm{kind}": Signature((*x, "q_norm", "k_norm", *cache), (*sizes, "eps"), cache),
        f"attention{kind}": Signature(("q", *cache, "span"), (*sizes, "scale", "softcap", "window")),
    }


SIGNATURES: dict[str, Signature] = {
    "embedding": Signature(("ids", "table"), ("scale",)),
    "embedding_quantized": Signature(("ids", "codes", "scale", "zero"), ("bits", "group", "times")),
    "embedding_quantized_offset": Signature(("ids", "codes", "scale", "offset"), ("bits", "group", "times")),
    "embedding_quantized_table": Signature(("ids", "codes", "scale"), ("grid", "bits", "group", "times")),
    "rms_norm": Signature(("x", "weight"), ("eps",)),
    "rms_norm_quantize": Signature(("x", "weight"), ("eps", "group")),
    "rms_norm_quantize_permuted": Signature(("x", "weight", "permutation"), ("eps", "group")),
    "quantize": Signature(("x",), ("group",)),
    "quantize_permuted": Signature(("x", "permutation"), ("group",)),
    "swiglu": Signature(("gate_up",)),
    "swiglu_quantize": Signature(("gate_up",), ("group",)),
    "swiglu_quantize_permuted": Signature(("gate_up", "permutation"), ("group",)),
    "geglu": Signature(("gate_up",)),
    "geglu_quantize": Signature(("gate_up",), ("group",)),
    "geglu_quantize_permuted": Signature(("gate_up", "permutation"), ("group",)),
    **_caches("", ("k_cache", "v_cache")),
    **_caches("_int8", ("k_cache", "v_cache", "k_scale", "v_scale")),
    "last_row": Signature(("x", "span")),
    "last_span": Signature(("span",)),
    "add": Signature(("residual", "x")),
    "add_bias": Signature(("x", "bias")),
    "concat": Signature(("first", "second")),
    "softcap": Signature(("x",), ("cap",)),
    "gather": Signature(("x", "permutation")),
    **_linears("exact", ("x",)),
    **_linears("int8", ("q", "ascale", "asum")),
    **_linears("half", ("x",)),
    "linear_dense": Signature(("x", "weight")),
    "linear_dense_residual": Signature(("x", "weight", "residual")),
}


@dataclass(frozen=True)
class Op:
    """One operator call, taken apart: `name` without prefix, tensor arguments, attributes, and types of its results.

    Results of an operator that writes its arguments: the fresh ones, then the updated ones in signature order.
    """

    name: str
    args: tuple[relax.Expr, ...]
    attrs: Mapping[str, Attr]
    results: tuple[relax.TensorType, ...]

    @property
    def signature(self) -> Signature:
        """What the vocabulary says of it."""
        return SIGNATURES[self.name]


def tensor(shape: Sequence[int], dtype: str) -> relax.TensorType:
    """Type of an array of static shape."""
    return relax.TensorType(tuple(shape), dtype)


def make(
    name: str, args: Sequence[relax.Expr], attrs: Mapping[str, Attr], outs: Sequence[relax.Type]
) -> relax.Call:
    """The call. `outs` are its fresh results; tensors updated in place follow them in the result tuple."""
    signature = SIGNATURES[name]
    assert len(args) == len(signature.args), f"{name} takes {signature.args}"
    assert tuple(attrs) == signature.attrs, f"{name} has attributes {signature.attrs}, got {tuple(attrs)}"
    values = [_value(v) for v in attrs.values()]
    written = [signature.args.index(arg) for arg in signature.inplace]
    types = [*outs, *(args[i].ty for i in written)]
    if written:
        indices = [-1] * len(outs) + written
        return relax.op.call_inplace_packed(PREFIX + name, *args, *values, inplace_indices=indices, ty_args=types)
    result = types[0] if len(types) == 1 else relax.TupleType(types)
    return relax.call_pure_packed(PREFIX + name, *args, *values, ty_args=result)


def match(expr: object) -> Op | None:
    """The operator call that `expr` is, or None."""
    if not isinstance(expr, relax.Call) or not isinstance(expr.op, tvm.ir.Op):
        return None
    if expr.op.name not in ("relax.call_pure_packed", "relax.call_inplace_packed"):
        return None
    function = expr.args[0]
    if not isinstance(function, relax.ExternFunc) or not str(function.global_symbol).startswith(PREFIX):
        return None
    name = str(function.global_symbol)[len(PREFIX) :]
    signature = SIGNATURES.get(name)
    if signature is None:
        return None
    tensors, values = expr.args[1 : 1 + len(signature.args)], expr.args[1 + len(signature.args) :]
    attrs = {key: _attr(value) for key, value in zip(signature.attrs, values, strict=True)}
    types = expr.ty_args if len(expr.ty_args) > 1 else _fields(expr.ty_args[0])
    return Op(name, tuple(tensors), attrs, tuple(types))


def _value(attr: Attr) -> relax.Expr:
    if isinstance(attr, str):
        return tvm.ir.StringImm(attr)
    return relax.prim_value(tvm.tirx.const(attr, "int64" if isinstance(attr, int) else "float64"))


def _attr(value: Any) -> Attr:
    if isinstance(value, tvm.ir.StringImm):
        return str(value.value)
    number = value.value if hasattr(value, "value") else value
    while not isinstance(number, int | float):
        number = number.value
    return number


def _fields(result: relax.Type) -> list[relax.TensorType]:
    return list(result.fields) if isinstance(result, relax.TupleType) else [result]


def shape_of(value: relax.Type) -> tuple[int, ...]:
    """Static shape of a tensor type."""
    return tuple(int(extent) for extent in value.shape)
