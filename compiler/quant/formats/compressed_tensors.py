"""compressed-tensors, as llm-compressor writes it, to canonical codes: pack-quantized and int-quantized.

q is signed, -2^(b-1)..2^(b-1)-1; codes and zeros are q + 2^(b-1). w = scale * (q - zero_point). G = ceil(k / g) groups;
strategy channel has one group a row, tensor one scale for all.
pack-quantized   weight_packed i32[n, ceil(k*b/32)], fields of q + 2^(b-1) from the lowest bit up; weight_shape i64[2];
                 asymmetric: weight_zero_point i32[ceil(n*b/32), G], packed along n (before version 0.9: i8[n, G])
int-quantized    weight i8[n, k]; asymmetric: weight_zero_point i8[n, G]
both             weight_scale f16|bf16|f32[n, G]; with actorder = group weight_g_idx i32[k]
->  codes u8[n, k], scale f16|f32[n, G], zero i16[n, G], permutation i32[k] with actorder = group

input_activations say what the checkpoint was made for, and quern does it its own way. W8A8 means int8 activations with
one scale a token, amax / 127.5 over all inputs (dynamic), or one stored scale for all (static: input_scale f32|bf16|f16
[1], checked and not used). quern's have one scale a token and span of at most 128 inputs, amax / 127: finer, so errors
are smaller, and results differ in the rounding; tests/quant/test_real_checkpoints.py has the bound. --activations exact
rounds no activation. The manifest keeps what the checkpoint was made for.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from compiler.errors import FormatError, UnsupportedError
from compiler.quant import act_order
from compiler.quant.codes import Fields
from compiler.quant.formats.dense import DenseSource
from compiler.quant.grids import integer_grid
from compiler.quant.ir import DENSE_STORAGE, DenseWeight, QuantWeight, WeightType, order_digest
from compiler.quant.patterns import Rules
from compiler.quant.reference import F32
from compiler.quant.source import (
    CheckpointView,
    ConfigView,
    Source,
    TensorView,
    read_bias,
    read_scales,
    scale_type,
    spelled,
)

NAME = "compressed-tensors"
PACKED, PLAIN = "pack-quantized", "int-quantized"
FORMATS = {PACKED: PACKED, PLAIN: PLAIN, "naive-quantized": PLAIN}
BITS = {PACKED: (2, 3, 4, 8), PLAIN: (4, 8)}
STRATEGIES = ("group", "channel", "tensor")
LINEAR = "Linear"  # the one class name that targets in real files have
MAX_GROUP_SIZE = 1 << 20
# How it was quantised, or how a library likes to run it. Which modules are quantised, the tensors themselves say.
HARMLESS = frozenset({"version", "global_compression_ratio", "observer", "observer_kwargs", "zp_dtype", "scale_dtype"})


@dataclass(frozen=True)
class Scheme:
    """How one group of modules is stored. group_size 0 = one group a row; activations as WeightType has them."""

    bits: int
    group_size: int
    symmetric: bool
    packed: bool
    permuted: bool
    activations: str


@dataclass(frozen=True)
class Shapes:
    """What the tensors of a module add up to."""

    n: int
    k: int
    group_size: int
    groups: int


def claims(config: dict[str, Any]) -> bool:
    """quant_method says so."""
    return (config.get("quantization_config") or {}).get("quant_method") == NAME


def open(checkpoint: CheckpointView) -> Source:  # noqa: A001 - what every format calls it
    """Read the quantisation configuration; no tensor is touched."""
    quantization = checkpoint.config.quantization
    assert quantization is not None, "claims() saw one"
    return CompressedSource(checkpoint, _read_config(quantization))


class CompressedSource:
    """Modules with a weight_scale are decoded, all others come as they are."""

    def __init__(self, checkpoint: CheckpointView, rules: Rules[Scheme | None]) -> None:
        self._checkpoint = checkpoint
        self._rules = rules
        self._dense = DenseSource(checkpoint)

    def modules(self) -> list[str]:
        """Quantised and dense modules, in the order of the file."""
        packed = [name.removesuffix(".weight_packed") for name in self._checkpoint.tensors
                  if name.endswith(".weight_packed")]
        return packed + self._dense.modules()

    def has(self, module: str) -> bool:
        """Whether there is such a weight matrix, in any form."""
        return self._part(module, "weight_packed") is not None or self._dense.has(module)

    def describe(self, module: str) -> WeightType:
        """Shape and kind from headers, weight_shape and g_idx; every shape is checked against the configuration."""
        if not self._quantised(module):
            return self._dense.describe(module)
        scheme, shapes = self._checked(module)
        order = self._order(module, scheme, shapes)
        digest = "" if order is None else order_digest(order)
        return WeightType(shapes.n, shapes.k, integer_grid(scheme.bits).name, shapes.group_size,
                          scale_type(self._checkpoint, f"{module}.weight_scale"), permuted=bool(digest),
                          activations=scheme.activations, order=digest, symmetric=scheme.symmetric)

    def load(self, module: str) -> QuantWeight | DenseWeight:
        """Decode one module."""
        if not self._quantised(module):
            return self._dense.load(module)
        scheme, shapes = self._checked(module)
        scale = read_scales(self._checkpoint, f"{module}.weight_scale")
        if scale.ndim < 2:  # strategy tensor
            scale = scale.reshape(-1, 1)
        order = self._order(module, scheme, shapes)
        codes = self._codes(module, scheme, shapes, order)
        scale = np.ascontiguousarray(np.broadcast_to(scale, (shapes.n, shapes.groups)))
        zero = self._zeros(module, scheme, shapes)
        self._refuse_wrong_input_scale(module, scheme)
        return QuantWeight(codes, scale, zero, integer_grid(scheme.bits).name, shapes.group_size, order,
                           activations=scheme.activations, symmetric=scheme.symmetric)

    def bias(self, module: str) -> F32 | None:
        """What the linear layer adds, if anything."""
        return read_bias(self._checkpoint, module, self.describe(module).n)

    def vector(self, name: str) -> F32:
        """A norm weight as float32."""
        return self._dense.vector(name)

    def _part(self, module: str, part: str) -> TensorView | None:
        return self._checkpoint.tensors.get(f"{module}.{part}")

    def _quantised(self, module: str) -> bool:
        packed = self._part(module, "weight_packed") is not None
        if packed and self._dense.has(module):
            raise FormatError(f"{self._checkpoint.path}: {module} has both .weight and .weight_packed. "
                              f"Remove the one that is not the model's.")
        return packed or self._part(module, "weight_scale") is not None

    def _scheme(self, module: str) -> Scheme:
        scheme = self._rules.first(module, None)
        if scheme is None:
            raise FormatError(f"{self._checkpoint.path}: {module} is quantised, but no group of config_groups has it "
                              f"among its targets. The configuration belongs to another checkpoint, or was edited.")
        return scheme

    def _codes(self, module: str, scheme: Scheme, shapes: Shapes, order: NDArray[np.int32] | None,
               ) -> NDArray[np.uint8] | Fields:
        array = self._checkpoint.array
        if scheme.packed:
            return Fields(array(f"{module}.weight_packed"), scheme.bits, shapes.k, order)
        codes = _unsigned(array(f"{module}.weight"), scheme.bits, f"{self._where(module)}.weight")
        return codes if order is None else np.take(codes, order, axis=1)

    def _zeros(self, module: str, scheme: Scheme, shapes: Shapes) -> NDArray[np.int16]:
        middle = integer_grid(scheme.bits).middle
        info = self._part(module, "weight_zero_point")
        if info is None:
            return np.full((shapes.n, shapes.groups), middle, np.int16)
        name = f"{module}.weight_zero_point"
        stored = self._checkpoint.array(name)
        if info.dtype == "int32":
            zero = np.ascontiguousarray(Fields(stored.T, scheme.bits, shapes.n).rows(0, shapes.groups).T)
        else:
            zero = _unsigned(stored.reshape(-1, 1) if stored.ndim < 2 else stored, scheme.bits, f"{info.file}: {name}")
        zero = np.broadcast_to(zero, (shapes.n, shapes.groups))
        if scheme.symmetric and (zero != middle).any():
            wrong = int(zero[zero != middle][0]) - middle
            raise FormatError(f"{info.file}: {name}: a zero point is {wrong}, but symmetric = true needs 0 everywhere. "
                              f"If the file has zero points, config.json must say symmetric = false.")
        return zero.astype(np.int16)

    def _refuse_wrong_input_scale(self, module: str, scheme: Scheme) -> None:
        """A static checkpoint has one positive scale for its activations: one that has none was made otherwise."""
        if scheme.activations != "int8-static":
            return
        name = f"{module}.input_scale"
        info = self._part(module, "input_scale")
        if info is None:
            raise FormatError(f"{self._checkpoint.path}: {module} has no .input_scale, which config_groups with static "
                              f"input_activations says it has. The configuration belongs to another checkpoint, or the "
                              f"file is damaged.")
        if info.shape not in ((), (1,)) or info.dtype not in DENSE_STORAGE:
            raise FormatError(f"{info.file}: {name} is {spelled(info)}, but static input_activations need one 16- or "
                              f"32-bit float. config_groups is of another checkpoint, or the file is damaged.")
        if not (values := read_scales(self._checkpoint, name)).all() or (values < 0).any():
            raise FormatError(f"{info.file}: {name} is {float(values.reshape(-1)[0]):g}, but a scale is above 0. The "
                              f"file is damaged: fetch it again.")

    def _order(self, module: str, scheme: Scheme, shapes: Shapes) -> NDArray[np.int32] | None:
        if self._part(module, "weight_g_idx") is None:
            return None
        name = f"{module}.weight_g_idx"
        if not scheme.permuted:
            raise FormatError(f"{self._where(module)}.weight_g_idx is there, but actorder is not 'group'. The "
                              f"configuration belongs to another checkpoint, or was edited.")
        g_idx = self._checkpoint.array(name)
        if (g_idx == -1).all():  # as the library initialises it: no order
            return None
        return act_order.permutation(g_idx, shapes.k, shapes.group_size, f"{self._where(module)}.weight_g_idx")

    def _where(self, module: str) -> str:
        return f"{self._checkpoint.tensors[f'{module}.weight_scale'].file}: {module}"

    def _checked(self, module: str) -> tuple[Scheme, Shapes]:
        """The module's scheme and shapes. Raises FormatError naming the first tensor that disagrees."""
        scheme = self._scheme(module)
        main = "weight_packed" if scheme.packed else "weight"

        def refuse(part: str, info: TensorView, need: str) -> NoReturn:
            kind = f"{PACKED if scheme.packed else PLAIN} with {scheme.bits} bits"
            size = f"group_size {scheme.group_size}" if scheme.group_size else "one group a row"
            raise FormatError(f"{info.file}: {module}.{part} is {spelled(info)}, but {kind} and {size} needs {need}. "
                              f"config_groups is of another checkpoint, or the file is damaged.")

        needed = ["weight_scale", main, *(["weight_shape"] if scheme.packed else [])]
        if not scheme.symmetric:
            needed.append("weight_zero_point")
        found = {}
        for part in needed:
            info = self._part(module, part)
            if info is None:
                raise FormatError(f"{self._checkpoint.path}: {module} has no .{part}, which config_groups says it "
                                  f"has. The configuration belongs to another checkpoint, or the file is damaged.")
            found[part] = info
        info = found[main]
        if len(info.shape) != 2 or 0 in info.shape or info.dtype != ("int32" if scheme.packed else "int8"):
            refuse(main, info, f"{'int32' if scheme.packed else 'int8'} in two dimensions, neither of them 0")
        n, k = info.shape
        if scheme.packed:
            shape = found["weight_shape"]
            if shape.shape != (2,) or shape.dtype not in ("int64", "int32"):
                refuse("weight_shape", shape, "int64[2]")
            rows, k = (int(size) for size in self._checkpoint.array(f"{module}.weight_shape"))
            if rows != n or k < 1 or info.shape[1] != -(-k * scheme.bits // 32):
                refuse(main, info, f"int32[n, ceil(k * {scheme.bits} / 32)], and weight_shape says n = {rows}, k = {k}")
        group_size = min(scheme.group_size or k, k)
        shapes = Shapes(n, k, group_size, -(-k // group_size))
        self._check_parts(module, scheme, shapes, refuse)
        return scheme, shapes

    def _check_parts(self, module: str, scheme: Scheme, shapes: Shapes, refuse: Any) -> None:
        """Scales, zero points and g_idx against shapes."""
        one = [(), (1,), (1, 1)] if not scheme.group_size else []  # strategy tensor: one number for all rows
        scale = self._part(module, "weight_scale")
        assert scale is not None, "_checked saw it"
        want = (shapes.n, shapes.groups)
        if scale.shape not in (want, *one) or scale.dtype not in DENSE_STORAGE:
            refuse("weight_scale", scale, f"16- or 32-bit floats {list(want)}")
        zero = self._part(module, "weight_zero_point")
        packed = (-(-shapes.n * scheme.bits // 32), shapes.groups)
        if zero is not None and not (zero.dtype == "int8" and zero.shape in (want, *one)) and not (
                scheme.packed and zero.dtype == "int32" and zero.shape == packed):
            refuse("weight_zero_point", zero, f"int32{list(packed)}" if scheme.packed else f"int8{list(want)}")
        order = self._part(module, "weight_g_idx")
        if order is not None and (order.dtype != "int32" or order.shape != (shapes.k,)):
            refuse("weight_g_idx", order, f"int32[{shapes.k}]")


def _unsigned(values: NDArray[np.int8], bits: int, where: str) -> NDArray[np.uint8]:
    """q + 2^(b-1) as u8. Raises FormatError for a q that `bits` bits cannot hold."""
    if bits == 8:
        return np.bitwise_xor(values.view(np.uint8), np.uint8(128))
    middle = 1 << (bits - 1)
    if values.min() < -middle or values.max() >= middle:
        wrong = int(values.min() if values.min() < -middle else values.max())
        raise FormatError(f"{where}: a value is {wrong}, but num_bits = {bits} allows {-middle} to {middle - 1}. "
                          f"The configuration belongs to another checkpoint, or the file is damaged.")
    return (values + np.int8(middle)).astype(np.uint8)


def _read_config(config: ConfigView) -> Rules[Scheme | None]:
    """Every group's scheme for its targets: exact names, then patterns in alphabetical order, then the class name."""
    config.string("quant_method", [NAME])
    config.string("quantization_status", ["compressed", "frozen"], "compressed")  # frozen: older W8A8 files
    config.strings("ignore", ())  # which are quantised, the tensors themselves say
    for key in ("sparsity_config", "transform_config", "kv_cache_scheme"):
        _refuse_used(config, key)
    common = config.string("format")
    rules = Rules[Scheme | None]()
    patterns: list[tuple[str, Scheme, str]] = []
    groups = config.section("config_groups")
    for name in groups.names():
        group = groups.section(name)
        scheme = _scheme(group, group.string("format", default=common), group.where("format"))
        for target in group.strings("targets"):
            if target.startswith("re:"):
                patterns.append((target, scheme, group.where("targets")))
            elif target == LINEAR:
                patterns.append(("re:", scheme, group.where("targets")))
            else:
                rules.name(target, scheme)
    for target, scheme, where in sorted(patterns, key=lambda item: (item[0] == "re:", item[0])):
        rules.expression(target.removeprefix("re:"), scheme, where)
    config.refuse_unhandled(HARMLESS)
    return rules


def _refuse_used(config: ConfigView, key: str) -> None:
    """A part that changes the mathematics must be empty."""
    if not config.has(key):
        return
    section = config.section(key)
    names = section.names()
    none = "format" in names and section.string("format") == "dense"  # a sparsity_config that says there is none
    if not none and any(section.data[name] not in ({}, []) for name in names):
        raise UnsupportedError(f"{config.where(key)} is not empty, and quern does not support it. Take the model "
                               f"without it.")
    section.accept(*names)


def _scheme(group: ConfigView, layout: str, where: str) -> Scheme:
    if layout not in FORMATS:
        raise UnsupportedError(f"{where} is {layout[:40]!r}, but quern reads {PACKED} and {PLAIN}. Take the model in "
                               f"one of these.")
    if group.has("output_activations"):
        raise UnsupportedError(f"{group.where('output_activations')} is set, but quern does not quantise what linear "
                               f"layers put out. Take the model without that.")
    weights = group.section("weights")
    weights.string("type", ["int"], "int")
    bits = weights.integer("num_bits", 1, 32, 8)
    allowed = BITS[FORMATS[layout]]
    if bits not in allowed:
        raise UnsupportedError(f"{weights.where('num_bits')} is {bits}, but quern decodes {layout} with "
                               f"{', '.join(map(str, allowed))} bits. Take the model with one of these.")
    if weights.boolean("dynamic", False):
        raise UnsupportedError(f"{weights.where('dynamic')} is true: the weights have no stored scales.")
    size = weights.integer("group_size", -1, MAX_GROUP_SIZE, 0)
    strategy = weights.string("strategy", STRATEGIES, "group" if size > 0 else "channel" if size < 0 else "tensor")
    if (strategy == "group") != (size > 0):
        raise FormatError(f"{weights.where('group_size')} is {size}, but strategy is {strategy!r}: a group needs at "
                          f"least 1, anything else none.")
    if weights.has("block_structure"):
        raise UnsupportedError(f"{weights.where('block_structure')} is set, but quern has groups within rows only.")
    order = weights.string("actorder", ["group", "dynamic", "weight", "static"], "weight")
    return Scheme(bits, max(size, 0), weights.boolean("symmetric", True), FORMATS[layout] == PACKED,
                  order in ("group", "dynamic"), _activations(group))


def _activations(group: ConfigView) -> str:
    """What the checkpoint expects of the inputs: kept as a remark, because quern's own int8 path is finer."""
    if not group.has("input_activations"):
        return "any"
    inputs = group.section("input_activations")
    inputs.string("type", ["int"], "int")
    inputs.integer("num_bits", 8, 8, 8)
    inputs.boolean("symmetric", True)
    inputs.accept("group_size", "block_structure", "actorder")
    inputs.string("strategy", ["token", "tensor", "group"], "tensor")
    return "int8-token" if inputs.boolean("dynamic", False) else "int8-static"
