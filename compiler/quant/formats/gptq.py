"""GPTQ tensors to canonical codes: v1 as AutoGPTQ, GPTQModel and AutoRound write it, and v2. Method: arXiv:2210.17323.

b bits, G = ceil(k / g) groups, all words int32, fields from the lowest bit up (3-bit fields straddle words):
qweight i32[k*b/32, n]   codes along k
qzeros  i32[G, n*b/32]   zeros along n; v1 stores zero - 1, v2 stores zero
scales  f16|bf16|f32[G, n]
g_idx   i32[k]           group of every input; absent or k // g without act-order
->  codes u8[n, k], scale f16|f32[n, G], zero i16[n, G], permutation i32[k] with act-order
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from compiler.errors import FormatError, UnsupportedError
from compiler.quant import act_order
from compiler.quant.codes import Fields
from compiler.quant.grids import integer_grid
from compiler.quant.ir import QuantWeight, WeightType, order_digest
from compiler.quant.packing import unpack
from compiler.quant.patterns import Rules
from compiler.quant.qweight_source import QweightSource
from compiler.quant.source import (
    CheckpointView,
    ConfigView,
    Source,
    TensorView,
    read_scales,
    refuse_not_finite,
    scale_type,
    spelled,
)

NAME = "gptq"
BITS = (2, 3, 4, 8)
PARTS = ("qweight", "qzeros", "scales")
MAX_GROUP_SIZE = 1 << 20
VERSION_CODES, VERSION_ROWS = 1 << 14, 64  # fewer codes say nothing about the version; more rows say nothing new
VERSION_SPREAD = 0.5  # seen in real files: at most 0.2
# How it was quantised, or how a library likes to run it. Which modules are quantised, the tensors themselves say.
HARMLESS = frozenset({
    "meta", "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "act_group_aware", "mse",
    "model_name_or_path", "model_file_base_name", "provider", "autoround_version", "iters", "nsamples", "seqlen", "lr",
    "minmax_lr", "batch_size", "enable_quanted_input", "enable_minmax_tuning", "low_gpu_mem_usage", "amp", "dataset",
    "tokenizer", "block_name_to_quantize", "to_quant_block_names", "modules_in_block_to_quantize",
    "module_name_preceding_first_block", "cache_block_outputs", "disable_exllama", "use_exllama", "use_cuda_fp16",
    "scale_dtype", "gradient_accumulate_steps", "enable_norm_bias_tuning", "low_cpu_mem_usage", "enable_alg_ext",
    "exllama_config", "max_input_length", "model_seqlen", "pad_token_id", "backend", "lm_head", "hyb_act", "quantizer",
    "offload_to_disk", "offload_to_disk_path",
})


@dataclass(frozen=True)
class GptqConfig:
    """How one module is packed. group_size -1 = one group a row. `borrows`: see _zeros."""

    bits: int
    group_size: int
    sym: bool
    version: int = 1
    borrows: bool = False


@dataclass(frozen=True)
class Raw:
    """The stored tensors of one module, as they lie in the file; scales already float16 or float32."""

    qweight: NDArray[np.int32]
    qzeros: NDArray[np.int32]
    scales: NDArray[Any]
    g_idx: NDArray[np.int32] | None = None


def claims(config: dict[str, Any]) -> bool:
    """quant_method says gptq; files from before that key existed have bits, group_size and desc_act."""
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    return method == "gptq" or (method is None and {"bits", "group_size", "desc_act"} <= quantization.keys())


def open(checkpoint: CheckpointView) -> Source:  # noqa: A001 - what every format calls it
    """Read the quantisation configuration; no tensor is touched."""
    quantization = checkpoint.config.quantization
    assert quantization is not None, "claims() saw one"
    return GptqSource(checkpoint, *_read_config(quantization))


class GptqSource(QweightSource[GptqConfig]):
    """GPTQ's part of QweightSource."""

    def describe_packed(self, module: str) -> WeightType:
        """From the header and g_idx."""
        config = self._config_of(module)
        k, n, group_size = _check_shapes(self._checkpoint, module, config)
        scale = scale_type(self._checkpoint, f"{module}.scales")
        order = act_order.permutation(self._g_idx(module), k, group_size, f"{self._where(module)}.g_idx")
        digest = "" if order is None else order_digest(order)
        return WeightType(n, k, integer_grid(config.bits).name, group_size, scale, permuted=bool(digest), order=digest,
                          symmetric=config.sym)

    def load_packed(self, module: str) -> QuantWeight:
        """Through GPTQ's own unpacking."""
        array = self._checkpoint.array
        scales = read_scales(self._checkpoint, f"{module}.scales")
        raw = Raw(array(f"{module}.qweight"), array(f"{module}.qzeros"), scales, self._g_idx(module))
        return decode(raw, self._config_of(module), self._where(module))

    def _g_idx(self, module: str) -> NDArray[np.int32] | None:
        name = f"{module}.g_idx"
        return self._checkpoint.array(name) if name in self._checkpoint.tensors else None


def decode(raw: Raw, config: GptqConfig, where: str) -> QuantWeight:
    """Stored tensors, whose shapes agree with config, to canonical codes. `where` starts every message.

    Raises FormatError for scales that are not finite, for a g_idx that names no group or fills groups unevenly, for
    zeros that a symmetric weight cannot have, and for zeros of the other version.
    """
    k, n = raw.qweight.shape[0] * 32 // config.bits, raw.qweight.shape[1]
    group_size = k if config.group_size == -1 else min(config.group_size, k)
    refuse_not_finite(raw.scales, f"{where}.scales")
    zero = _zeros(raw.qzeros, config)
    middle = integer_grid(config.bits).middle
    if config.sym and (zero != middle).any():
        wrong = int(zero[zero != middle][0])
        raise FormatError(f"{where}.qzeros: a zero is {wrong}, but sym = true needs {middle} everywhere. If sym is "
                          f"right, checkpoint_format is wrong: 'gptq' stores zero - 1, 'gptq_v2' stores zero.")
    permutation = act_order.permutation(raw.g_idx, k, group_size, f"{where}.g_idx")
    if not config.sym:
        _refuse_other_version(raw.qweight, zero.T, config, where)
    codes = Fields(raw.qweight.T, config.bits, k, permutation)
    assert codes.shape == (n, k), codes.shape
    return QuantWeight(codes, np.ascontiguousarray(raw.scales.T), np.ascontiguousarray(zero.T),
                       integer_grid(config.bits).name, group_size, permutation, symmetric=config.sym)


def _refuse_other_version(qweight: NDArray[np.int32], zero: NDArray[np.int16], config: GptqConfig, where: str) -> None:
    """Raise FormatError when asymmetric zeros make sense only as the other version stores them.

    Weights of a layer add up to almost nothing: over all layers of our samples and small models the mean of code - zero
    is within 0.2 at up to 4 bits (0.6 at 8), and the wrong version moves it by 1. Rows of a made-up checkpoint, whose
    zeros have nothing to do with its codes, spread further than VERSION_SPREAD, and then nothing is concluded.
    """
    if config.bits > 4 or qweight.size * 32 // config.bits < VERSION_CODES:
        return
    rows = slice(None, None, max(1, len(zero) // VERSION_ROWS))
    codes = unpack(np.ascontiguousarray(qweight[:, rows]), config.bits, axis=0)
    by_row = codes.mean(axis=0) - zero[rows].mean(axis=1)
    mean = float(by_row.mean())
    other = mean + (1 if config.version == 1 else -1)
    if abs(mean) > 0.75 and abs(other) < 0.25 and by_row.std() < VERSION_SPREAD:
        said, better = ("gptq", "gptq_v2") if config.version == 1 else ("gptq_v2", "gptq")
        raise FormatError(f"{where}.qzeros: read as {said!r}, weights are {mean:+.2f} steps on average, as {better!r} "
                          f"{other:+.2f}, and they should be near 0. checkpoint_format is wrong: 'gptq' stores zero - "
                          f"1, 'gptq_v2' stores zero.")


def _zeros(qzeros: NDArray[np.int32], config: GptqConfig) -> NDArray[np.int16]:
    """i32[G, n*b/32] -> i16[G, n].

    v1 stores zero - 1, and writers differ in what that does to a zero of 0. GPTQModel subtracts the constant
    0x11111111 (4 bits) from the whole word, so that a 0 borrows from the next field: add it back to the whole word.
    Its 3-bit files and all other writers subtract in each field, so that a 0 becomes all ones: add in each field.
    """
    if config.version == 2:
        return unpack(qzeros, config.bits, axis=1).astype(np.int16)
    if config.borrows and config.bits != 3:
        ones = np.uint32(sum(1 << shift for shift in range(0, 32, config.bits)))
        restored = (np.ascontiguousarray(qzeros).view(np.uint32) + ones).view(np.int32)
        return unpack(restored, config.bits, axis=1).astype(np.int16)
    return (unpack(qzeros, config.bits, axis=1).astype(np.int16) + 1) & ((1 << config.bits) - 1)


def _check_shapes(checkpoint: CheckpointView, module: str, config: GptqConfig) -> tuple[int, int, int]:
    """(k, n, resolved group size) of a module. Raises FormatError naming the first tensor that disagrees."""
    parts: dict[str, TensorView] = {}
    for part in PARTS:
        if f"{module}.{part}" not in checkpoint.tensors:
            raise FormatError(f"{checkpoint.path}: {module} has .qweight but no .{part}. Fetch the checkpoint again.")
        parts[part] = checkpoint.tensors[f"{module}.{part}"]
    bits = config.bits

    def refuse(part: str, need: str) -> NoReturn:
        info = parts[part]
        advice = "If another tool packed it, config.json must name its quant_method."
        if _looks_like_awq(parts, bits):
            advice = "These are the shapes of AWQ: if AutoAWQ packed it, config.json must say quant_method = 'awq'."
        raise FormatError(f"{info.file}: {module}.{part} is {spelled(info)}, but GPTQ with {bits} bits and group_size "
                          f"{config.group_size} needs {need}. {advice}")

    for part, info in parts.items():
        if len(info.shape) != 2 or 0 in info.shape:
            refuse(part, "two dimensions, neither of them 0")
    if parts["qweight"].dtype != "int32":
        refuse("qweight", "int32")
    n = parts["scales"].shape[1]
    words = parts["qweight"].shape[0]
    k = words * 32 // bits
    if f"{module}.g_idx" in checkpoint.tensors:
        parts["g_idx"] = checkpoint.tensors[f"{module}.g_idx"]
        if parts["g_idx"].dtype != "int32" or len(parts["g_idx"].shape) != 1:
            refuse("g_idx", "int32[k]")
        k = parts["g_idx"].shape[0]
    if k * bits % 32 or n * bits % 32:
        refuse("scales", f"k and n that fill whole words, not k = {k} and n = {n}")
    if parts["qweight"].shape != (k * bits // 32, n):
        refuse("qweight", f"int32[{k * bits // 32}, {n}] for k = {k} and n = {n}")
    group_size = k if config.group_size == -1 else min(config.group_size, k)
    groups = -(-k // group_size)
    if parts["scales"].shape != (groups, n) or parts["scales"].dtype not in ("float16", "bfloat16", "float32"):
        refuse("scales", f"16- or 32-bit floats [{groups}, {n}]")
    if parts["qzeros"].shape != (groups, n * bits // 32) or parts["qzeros"].dtype != "int32":
        refuse("qzeros", f"int32[{groups}, {n * bits // 32}]")
    return k, n, group_size


def _looks_like_awq(parts: dict[str, TensorView], bits: int) -> bool:
    """AWQ packs qweight along n, as i32[k, n*b/32], so its width equals that of qzeros and not that of scales."""
    shapes = [info.shape for info in parts.values() if len(info.shape) == 2]
    return len(shapes) == 3 and shapes[0][1] == shapes[1][1] and shapes[2][1] * bits == shapes[0][1] * 32


def _read_config(config: ConfigView) -> tuple[GptqConfig, Rules[GptqConfig | None]]:
    """The settings for all modules, and those of modules that GPTQModel's `dynamic` sets apart."""
    config.string("quant_method", ["gptq"], "gptq")
    config.string("method", ["gptq"], "gptq")
    config.string("pack_dtype", ["int32"], "int32")
    config.string("data_type", ["int"], "int")
    config.boolean("desc_act", False)  # g_idx tells the order, whatever this says
    if config.boolean("is_marlin_format", False):
        raise UnsupportedError(f"{config.where('is_marlin_format')} is true: weights repacked for the Marlin kernel "
                               f"are not supported. Take the checkpoint in plain GPTQ form.")
    layout = {config.string(key, ["gptq", "gptq_v2"], "gptq") for key in ("checkpoint_format", "format")
              if config.has(key)}
    if len(layout) > 1:
        raise FormatError(f"{config.where('checkpoint_format')} and {config.where('format')} differ: one says gptq, "
                          f"the other gptq_v2. Set both to the form that the file has.")
    common = GptqConfig(_bits(config), _group_size(config), config.boolean("sym", False),
                        2 if layout == {"gptq_v2"} else 1, _writer_borrows(config.data))
    rules = _read_dynamic(config.section("dynamic"), common) if config.has("dynamic") else Rules[GptqConfig | None]()
    config.refuse_unhandled(HARMLESS)
    return common, rules


def _read_dynamic(dynamic: ConfigView, common: GptqConfig) -> Rules[GptqConfig | None]:
    """GPTQModel's rules: the first pattern that matches a module's name from its start on decides (its dynamic_get).

    "-:PATTERN" = not quantised (None here), "+:PATTERN" or PATTERN = with these settings instead of the common ones.
    """
    rules = Rules[GptqConfig | None]()
    for key in dynamic.names():
        own = None
        if key.startswith("-:"):
            dynamic.accept(key)
        else:
            own = _override(dynamic.section(key), common)
        rules.expression(key[2:] if key[:2] in ("+:", "-:") else key, own, dynamic.where(key))
    return rules


def _override(own: ConfigView, common: GptqConfig) -> GptqConfig:
    own.boolean("desc_act", False)
    own.string("pack_dtype", ["int32"], "int32")
    return GptqConfig(_bits(own, common.bits), _group_size(own, common.group_size), own.boolean("sym", common.sym),
                      common.version, common.borrows)


def _bits(config: ConfigView, *default: int) -> int:
    bits = config.integer("bits", 1, 32, *default)
    if bits not in BITS:
        raise UnsupportedError(f"{config.where('bits')} is {bits}, but quern decodes GPTQ with "
                               f"{', '.join(map(str, BITS))} bits. Take the model with one of these.")
    return bits


def _group_size(config: ConfigView, *default: int) -> int:
    group_size = config.integer("group_size", -1, MAX_GROUP_SIZE, *default)
    if group_size == 0:
        raise FormatError(f"{config.where('group_size')} is 0, but it must be -1 (one group a row) or at least 1.")
    return group_size


def _writer_borrows(quantization: dict[str, Any]) -> bool:
    """GPTQModel signs its files in meta.quantizer, which is a string or a list of them."""
    meta = quantization.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    signed = quantizer if isinstance(quantizer, list) else [quantizer]
    return any(isinstance(item, str) and item.lower().startswith("gptqmodel") for item in signed)
