"""AWQ tensors in the gemm layout to canonical codes, as AutoAWQ, auto-round and GPTQModel write them.

Method: arXiv:2306.00978. 4 bits, G = ceil(k / g) groups; words are int32 along n, and nibble i of a word, counted from
the lowest, holds column ORDER[i] of its eight; nothing is stored minus one.
qweight i32[k, n/8]    codes
qzeros  i32[G, n/8]    zeros; auto-round's symmetric files have 8 everywhere
scales  f16|bf16|f32[G, n]
->  codes u8[n, k], scale f16|f32[n, G], zero i16[n, G]

AutoAWQ multiplies in float16, so its dequantised weights are these rounded to float16: half a unit in the last place.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from compiler.errors import FormatError, UnsupportedError
from compiler.quant.grids import integer_grid
from compiler.quant.ir import DENSE_STORAGE, QuantWeight, WeightType
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

NAME = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GRID = integer_grid(4)
PARTS = ("qweight", "qzeros", "scales")
BLOCK_WORDS = 1 << 17  # words unpacked at a time, so that the working buffers stay small
MAX_GROUP_SIZE = 1 << 20
# How it was quantised, or how a library likes to run it. Which modules are quantised, the tensors themselves say.
HARMLESS = frozenset({
    "meta", "lm_head",
    "provider", "autoround_version", "iters", "nsamples", "seqlen", "lr", "minmax_lr", "batch_size", "dataset", "amp",
    "enable_quanted_input", "enable_minmax_tuning", "low_gpu_mem_usage", "to_quant_block_names", "do_fuse",
    "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "backend", "gradient_accumulate_steps", "scale_dtype",
})


@dataclass(frozen=True)
class AwqConfig:
    """How modules are packed. group_size -1 = one group a row; sym = every zero is 8."""

    group_size: int
    sym: bool = False


@dataclass(frozen=True)
class Raw:
    """The stored tensors of one module, as they lie in the file; scales already float16 or float32."""

    qweight: NDArray[np.int32]
    qzeros: NDArray[np.int32]
    scales: NDArray[Any]


def claims(config: dict[str, Any]) -> bool:
    """quant_method says awq; files from before that key existed have w_bit and q_group_size."""
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    return method == "awq" or (method is None and {"w_bit", "q_group_size"} <= quantization.keys())


def open(checkpoint: CheckpointView) -> Source:  # noqa: A001 - what every format calls it
    """Read the quantisation configuration; no tensor is touched."""
    quantization = checkpoint.config.quantization
    assert quantization is not None, "claims() saw one"
    return AwqSource(checkpoint, _read_config(quantization), Rules[AwqConfig | None]())


class AwqSource(QweightSource[AwqConfig]):
    """AWQ's part of QweightSource."""

    def describe_packed(self, module: str) -> WeightType:
        """From the header alone."""
        config = self._config_of(module)
        k, n, group_size = _check_shapes(self._checkpoint, module, config)
        scale = scale_type(self._checkpoint, f"{module}.scales")
        return WeightType(n, k, GRID.name, group_size, scale, symmetric=config.sym)

    def load_packed(self, module: str) -> QuantWeight:
        """Through AWQ's own unpacking."""
        array = self._checkpoint.array
        raw = Raw(array(f"{module}.qweight"), array(f"{module}.qzeros"),
                  read_scales(self._checkpoint, f"{module}.scales"))
        return decode(raw, self._config_of(module), self._where(module))


def decode(raw: Raw, config: AwqConfig, where: str) -> QuantWeight:
    """Stored tensors, whose shapes agree with config, to canonical codes. `where` starts every message.

    Raises FormatError for scales that are not finite and for zeros that a symmetric weight cannot have.
    """
    k = raw.qweight.shape[0]
    group_size = k if config.group_size == -1 else min(config.group_size, k)
    refuse_not_finite(raw.scales, f"{where}.scales")
    zero = unpack(raw.qzeros).astype(np.int16)
    if config.sym and (zero != GRID.middle).any():
        wrong = int(zero[zero != GRID.middle][0])
        raise FormatError(f"{where}.qzeros: a zero is {wrong}, but zero_point = false needs {GRID.middle} everywhere. "
                          f"If the file has zero points, config.json must say zero_point = true.")
    scale = np.ascontiguousarray(raw.scales.T)
    return QuantWeight(unpack(raw.qweight), scale, zero, GRID.name, group_size, symmetric=config.sym)


def unpack(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """i32[rows, n/8] -> u8[n, rows], a block of words at a time."""
    rows, count = words.shape
    out = np.empty((count, 8, rows), np.uint8)
    step = max(1, BLOCK_WORDS // rows)
    for start in range(0, count, step):
        block = np.ascontiguousarray(words[:, start:start + step].T).view(np.uint32)
        for nibble, column in enumerate(ORDER):
            out[start:start + step, column] = (block >> np.uint32(4 * nibble)).astype(np.uint8) & 15
    return out.reshape(count * 8, rows)


def pack(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """u8[n, rows] -> i32[rows, n/8]: the inverse of `unpack`, for n a multiple of 8."""
    columns = codes.reshape(-1, 8, codes.shape[1]).astype(np.uint32)
    words = np.zeros((columns.shape[0], columns.shape[2]), np.uint32)
    for nibble, column in enumerate(ORDER):
        words |= columns[:, column] << np.uint32(4 * nibble)
    return np.ascontiguousarray(words.T).view(np.int32)


def _check_shapes(checkpoint: CheckpointView, module: str, config: AwqConfig) -> tuple[int, int, int]:
    """(k, n, resolved group size) of a module. Raises FormatError naming the first tensor that disagrees."""
    parts: dict[str, TensorView] = {}
    for part in PARTS:
        if f"{module}.{part}" not in checkpoint.tensors:
            raise FormatError(f"{checkpoint.path}: {module} has .qweight but no .{part}. Fetch the checkpoint again.")
        parts[part] = checkpoint.tensors[f"{module}.{part}"]

    def refuse(part: str, need: str) -> NoReturn:
        info = parts[part]
        advice = "If another tool packed it, config.json must name its quant_method."
        if f"{module}.g_idx" in checkpoint.tensors or _looks_like_gptq(parts):
            advice = "This looks like GPTQ: if it is, config.json must say quant_method = 'gptq'."
        raise FormatError(f"{info.file}: {module}.{part} is {spelled(info)}, but AWQ with group_size "
                          f"{config.group_size} needs {need}. {advice}")

    for part, info in parts.items():
        if len(info.shape) != 2 or 0 in info.shape:
            refuse(part, "two dimensions, neither of them 0")
    n = parts["scales"].shape[1]
    if n % 8:
        refuse("scales", f"n that fills whole words, not {n}")
    k = parts["qweight"].shape[0]
    if parts["qweight"].shape != (k, n // 8) or parts["qweight"].dtype != "int32":
        refuse("qweight", f"int32[k, {n // 8}] for n = {n}")
    group_size = k if config.group_size == -1 else min(config.group_size, k)
    groups = -(-k // group_size)
    if parts["scales"].shape != (groups, n) or parts["scales"].dtype not in DENSE_STORAGE:
        refuse("scales", f"16- or 32-bit floats [{groups}, {n}]")
    if parts["qzeros"].shape != (groups, n // 8) or parts["qzeros"].dtype != "int32":
        refuse("qzeros", f"int32[{groups}, {n // 8}]")
    return k, n, group_size


def _looks_like_gptq(parts: dict[str, TensorView]) -> bool:
    """GPTQ packs qweight along k, as i32[k*b/32, n], so that it is as wide as the scales."""
    shapes = [info.shape for info in parts.values() if len(info.shape) == 2]
    return len(shapes) == 3 and shapes[0][1] == shapes[2][1]


def _read_config(config: ConfigView) -> AwqConfig:
    config.string("quant_method", ["awq"], "awq")
    config.string("data_type", ["int"], "int")
    config.string("method", ["awq"], "awq")
    config.string("pack_dtype", ["int32"], "int32")
    if config.boolean("desc_act", False):
        raise UnsupportedError(f"{config.where('desc_act')} is true, but AWQ's gemm layout has no act-order.")
    for key in ("version", "format", "checkpoint_format"):  # the last two are GPTQModel's names for it
        version = config.string(key, default="gemm")
        if version.lower() != "gemm":
            raise UnsupportedError(f"{config.where(key)} is {version[:40]!r}, but quern decodes AWQ's gemm layout. "
                                   f"Take the model in that form, which most are in.")
    for key in ("bits", "w_bit"):
        bits = config.integer(key, 1, 32, GRID.bits)
        if bits != GRID.bits:
            raise UnsupportedError(f"{config.where(key)} is {bits}, but AWQ's gemm layout has {GRID.bits} bits. "
                                   f"Take the model with those.")
    sizes = [config.integer(key, -1, MAX_GROUP_SIZE, 128) for key in ("group_size", "q_group_size") if config.has(key)]
    size = sizes[0] if sizes else config.integer("group_size", -1, MAX_GROUP_SIZE)
    if size == 0 or len(set(sizes)) > 1:
        raise FormatError(f"{config.where('group_size')} must be -1 (one group a row) or at least 1, and the same as "
                          f"q_group_size where both are given.")
    zero_point = config.boolean("zero_point", not config.boolean("sym", False))
    if config.boolean("sym", not zero_point) is zero_point:
        raise FormatError(f"{config.where('sym')} and {config.where('zero_point')} contradict each other: a symmetric "
                          f"weight has no zero points. Set both as the file was made.")
    config.strings("modules_to_not_convert", ())  # which are quantised, the tensors themselves say
    config.refuse_unhandled(HARMLESS)
    return AwqConfig(size, not zero_point)
