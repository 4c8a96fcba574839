"""bitsandbytes tensors to canonical codes: NF4 and FP4, with and without double quantisation, and LLM.int8().

4 bits (arXiv:2305.14314), names below M.weight, B = n * k / blocksize blocks, which run along the rows:
weight u8[n*k/2, 1]              two codes a byte, high nibble first, row-major [n, k]; any storage dtype, same bytes
absmax f32[B] | u8[B]            u8 with double quantisation
quant_map f32[16]                the real numbers of the codes: the standard table, which is the grid here
quant_state.bitsandbytes__nf4    JSON as bytes: quant_type, blocksize, dtype, shape [n, k] and the nested values
nested_absmax f32[B/256], nested_quant_map f32[256], nested_offset: absmax = map[code] * nested_absmax + offset, in f32
->  codes u8[n, k], scale f32[n, k/blocksize] = absmax, zero 0; w = absmax * table[code] in f32, as the library does it

8 bits (arXiv:2208.07339): weight i8[n, k], SCB f32[n] -> codes weight + 128, scale f32[n, 1] = SCB * (1/127), zero 128.
The library has two orders of operation: its forward takes q * (SCB * (1 / 127)), as here, so that weights are equal bit
for bit; `int8_vectorwise_dequant` takes (q * SCB) * (1 / 127), which differs by at most one unit in the last place.
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from compiler.errors import FormatError, UnsupportedError
from compiler.quant.formats.dense import DenseSource
from compiler.quant.grids import GRIDS, integer_grid
from compiler.quant.ir import DenseWeight, QuantWeight, WeightType
from compiler.quant.reference import F32
from compiler.quant.source import CheckpointView, ConfigView, Source, read_bias, spelled

NAME = "bitsandbytes"
KINDS = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what the library itself accepts
MOST_STATE_BYTES = 4096
STATE_KEYS = frozenset({"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype",
                        "nested_offset"})
STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32")
TABLE_TOLERANCE = 2.0 ** -20  # old versions computed their tables; the library decodes with its own constants anyway
# How a library runs the model, never what the tensors mean.
HARMLESS = frozenset({
    "bnb_4bit_compute_dtype", "llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight", "modules_to_not_convert",
})


@dataclass(frozen=True)
class State:
    """The quant_state of one module. offset is None without double quantisation."""

    kind: str
    n: int
    k: int
    block: int
    nested_block: int
    offset: float | None


def claims(config: dict[str, Any]) -> bool:
    """quant_method says bitsandbytes; files from before that key existed have load_in_4bit or load_in_8bit."""
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    return method == "bitsandbytes" or (
        method is None and bool({"load_in_4bit", "load_in_8bit"} & quantization.keys()))


def open(checkpoint: CheckpointView) -> Source:  # noqa: A001 - what every format calls it
    """Read the quantisation configuration; no tensor is touched."""
    quantization = checkpoint.config.quantization
    assert quantization is not None, "claims() saw one"
    return BitsandbytesSource(checkpoint, *_read_config(quantization))


class BitsandbytesSource:
    """What a module is, its tensors say: a quant_state means 4 bits, an SCB 8 bits, and neither dense."""

    def __init__(self, checkpoint: CheckpointView, bits: int, kind: str | None) -> None:
        self._checkpoint = checkpoint
        self._bits = bits
        self._kind = kind
        self._dense = DenseSource(checkpoint)

    def modules(self) -> list[str]:
        """All modules, in the order of the file."""
        found = dict.fromkeys(name.removesuffix(".weight") for name in self._checkpoint.tensors
                              if name.endswith(".weight"))
        return [module for module in found
                if len(self._checkpoint.tensors[f"{module}.weight"].shape) == 2]

    def has(self, module: str) -> bool:
        """Whether there is such a weight matrix."""
        return self._dense.has(module)

    def describe(self, module: str) -> WeightType:
        """Shape and kind; of a 4-bit module the small quant_state is read, which alone knows its shape."""
        bits = self._bits_of(module)
        if bits == 4:
            state = self._checked_state(module)
            return WeightType(state.n, state.k, state.kind, state.block, "float32")
        if bits == 8:
            n, k = self._checked_int8(module)
            return WeightType(n, k, integer_grid(8).name, k, "float32", symmetric=True)
        return self._dense.describe(module)

    def load(self, module: str) -> QuantWeight | DenseWeight:
        """Decode one module."""
        bits = self._bits_of(module)
        if bits == 4:
            return self._load_4bit(module)
        if bits == 8:
            return self._load_int8(module)
        return self._dense.load(module)

    def bias(self, module: str) -> F32 | None:
        """What the linear layer adds, if anything; bitsandbytes leaves it dense."""
        return read_bias(self._checkpoint, module, self.describe(module).n)

    def vector(self, name: str) -> F32:
        """A norm weight as float32."""
        return self._dense.vector(name)

    def _bits_of(self, module: str) -> int:
        """4, 8 or 0 = dense. Raises FormatError for the width that config.json does not announce."""
        tensors = self._checkpoint.tensors
        bits = 0
        if any(f"{module}.weight.{part}" in tensors for part in ("absmax", *(_state_name(kind) for kind in KINDS))):
            bits = 4
        elif f"{module}.SCB" in tensors:
            bits = 8
        if bits and f"{module}.weight" not in tensors:
            raise FormatError(f"{self._checkpoint.path}: {module} has quantisation tensors but no .weight. "
                              f"Fetch the checkpoint again.")
        if bits and bits != self._bits:
            raise FormatError(f"{tensors[f'{module}.weight'].file}: {module} has {bits}-bit tensors, but the "
                              f"quantisation configuration says load_in_{self._bits}bit. The configuration belongs to "
                              f"another checkpoint, or was edited.")
        return bits

    def _checked_state(self, module: str) -> State:
        """The quant_state, with the shape of every tensor checked against it."""
        tensors, name = self._checkpoint.tensors, f"{module}.weight"
        found = [kind for kind in KINDS if f"{name}.{_state_name(kind)}" in tensors]
        if len(found) != 1:
            raise FormatError(f"{tensors[name].file}: {name} has {len(found)} quant_states, but needs one of "
                              f"{', '.join(map(_state_name, KINDS))}. Fetch the checkpoint again, or save it again "
                              f"with a current bitsandbytes.")
        if self._kind not in (None, found[0]):
            raise FormatError(f"{tensors[name].file}: {name} is {found[0]}, but the quantisation configuration says "
                              f"bnb_4bit_quant_type = {self._kind!r}. The configuration belongs to another checkpoint, "
                              f"or was edited.")
        where = f"{name}.{_state_name(found[0])}"
        info = tensors[where]
        if info.dtype != "uint8" or len(info.shape) != 1 or info.shape[0] > MOST_STATE_BYTES:
            raise FormatError(f"{info.file}: {where} is {spelled(info)}, but must be JSON in at most "
                              f"uint8[{MOST_STATE_BYTES}]. Fetch the checkpoint again.")
        state = _read_state(self._checkpoint.array(where).tobytes(), f"{info.file}: {where}")
        if state.kind != found[0]:
            raise FormatError(f"{info.file}: {where} says quant_type {state.kind!r}. Fetch the checkpoint again.")
        self._check_4bit(name, state)
        return state

    def _check_4bit(self, name: str, state: State) -> None:
        blocks = state.n * state.k // state.block
        storage = self._checkpoint.tensors[name]
        if storage.dtype not in STORAGE or math.prod(storage.shape) * _width(storage.dtype) * 2 != state.n * state.k:
            raise FormatError(f"{storage.file}: {name} is {spelled(storage)}, but a {state.kind} weight of [{state.n}, "
                              f"{state.k}] needs uint8[{state.n * state.k // 2}, 1]. Fetch the checkpoint again.")
        needs = {"quant_map": ("float32", (16,)), "absmax": ("float32", (blocks,))}
        if state.offset is not None:
            needs |= {"absmax": ("uint8", (blocks,)), "nested_quant_map": ("float32", (256,)),
                      "nested_absmax": ("float32", (-(-blocks // state.nested_block),))}
        for part, need in needs.items():
            self._expect(f"{name}.{part}", *need)

    def _checked_int8(self, module: str) -> tuple[int, int]:
        info = self._checkpoint.tensors[f"{module}.weight"]
        if info.dtype != "int8" or len(info.shape) != 2 or 0 in info.shape:
            raise FormatError(f"{info.file}: {module}.weight is {spelled(info)}, but beside an SCB it is int8[n, k]. "
                              f"Fetch the checkpoint again.")
        self._expect(f"{module}.SCB", "float32", (info.shape[0],))
        return info.shape[0], info.shape[1]

    def _expect(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise FormatError(f"{self._checkpoint.path} has no tensor {name}, which bitsandbytes writes. "
                              f"Fetch the checkpoint again.")
        if (info.dtype, info.shape) != (dtype, shape):
            raise FormatError(f"{info.file}: {name} is {spelled(info)}, but must be {dtype}{list(shape)}. "
                              f"Fetch the checkpoint again.")

    def _load_4bit(self, module: str) -> QuantWeight:
        state, name = self._checked_state(module), f"{module}.weight"
        where, array = f"{self._checkpoint.tensors[name].file}: {name}", self._checkpoint.array
        table = GRIDS[state.kind].table
        if not (np.abs(array(f"{name}.quant_map") - table) <= TABLE_TOLERANCE).all():
            raise UnsupportedError(f"{where}.quant_map is not the standard {state.kind} table. "
                                   f"Quantise the model with an unchanged bitsandbytes.")
        absmax = array(f"{name}.absmax")
        if state.offset is not None:
            absmax = _unnest(absmax, array(f"{name}.nested_quant_map"), array(f"{name}.nested_absmax"), state)
        _refuse_not_finite(absmax, f"{where}.absmax")
        packed = array(name).reshape(-1).view(np.uint8).reshape(state.n, state.k // 2)
        codes = np.empty((state.n, state.k // 2, 2), np.uint8)
        np.right_shift(packed, 4, out=codes[:, :, 0])
        np.bitwise_and(packed, 15, out=codes[:, :, 1])
        scale = np.ascontiguousarray(absmax).reshape(state.n, -1)
        return QuantWeight(codes.reshape(state.n, state.k), scale, np.zeros(scale.shape, np.int16), state.kind,
                           state.block)

    def _load_int8(self, module: str) -> QuantWeight:
        n, k = self._checked_int8(module)
        file, array = self._checkpoint.tensors[f"{module}.weight"].file, self._checkpoint.array
        layout = f"{module}.weight_format"
        if layout in self._checkpoint.tensors and array(layout).any():
            raise UnsupportedError(f"{file}: {layout} is not 0 (row-major): the weight lies as a GPU kernel wants it. "
                                   f"Save the model again with a current bitsandbytes.")
        row_max = array(f"{module}.SCB")
        _refuse_not_finite(row_max, f"{file}: {module}.SCB")
        codes = array(f"{module}.weight").view(np.uint8) ^ np.uint8(128)
        scale = (row_max * np.float32(1 / 127)).reshape(n, 1)
        middle = np.full((n, 1), integer_grid(8).middle, np.int16)
        return QuantWeight(codes, scale, middle, integer_grid(8).name, k, symmetric=True)


def _state_name(kind: str) -> str:
    return f"quant_state.bitsandbytes__{kind}"


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2 if dtype in ("float16", "bfloat16") else 1


def _unnest(codes: NDArray[np.uint8], table: F32, outer: F32, state: State) -> F32:
    """Double quantisation: absmax f32[B] = table[code] * outer[block of 256] + offset, two roundings in float32."""
    assert state.offset is not None
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by name afterwards
        absmax: F32 = table[codes] * np.repeat(outer, state.nested_block)[:codes.size] + np.float32(state.offset)
    return absmax


def _refuse_not_finite(values: NDArray[Any], where: str) -> None:
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise FormatError(f"{where}: {bad} of {values.size} are NaN or infinite. The file is damaged or the "
                          f"quantisation failed: fetch it again, or quantise again.")


def _read_state(text: bytes, where: str) -> State:
    """The JSON of a quant_state. Raises FormatError, or UnsupportedError where blocks straddle rows."""
    def refuse(what: str) -> NoReturn:
        raise FormatError(f"{where}: {what}. Fetch the checkpoint again.")

    def integer(key: str, choices: tuple[int, ...]) -> int:
        value = state.get(key)
        if type(value) is not int or value not in choices:
            refuse(f"{key} is {str(value)[:40]!r}, but must be one of {', '.join(map(str, choices))}")
        return value

    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        refuse("not JSON")
    if not isinstance(state, dict):
        refuse("not a JSON object")
    if unknown := sorted(state.keys() - STATE_KEYS):
        refuse(f"has the key {unknown[0][:80]!r}, which quern does not know")
    kind, shape, offset = (state.get(key) for key in ("quant_type", "shape", "nested_offset"))
    if kind not in KINDS:
        refuse(f"quant_type is {str(kind)[:40]!r}, but must be one of {', '.join(KINDS)}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(x) is int and 0 < x < 1 << 31 for x in shape):
        refuse(f"shape is {str(shape)[:40]}, but must be two positive integers")
    n, k = shape
    block = integer("blocksize", BLOCK_SIZES)
    if k % block:
        raise UnsupportedError(
            f"{where}: rows of {k} are no multiple of blocksize {block}, so that one scale reaches across rows. "
            f"Quantise with a blocksize that divides {k}, or take the model unquantised and give --bits 4.")
    nested = {"nested_blocksize", "nested_dtype", "nested_offset"} & state.keys()
    if not nested:
        return State(kind, n, k, block, 0, None)
    if not isinstance(offset, int | float) or isinstance(offset, bool) or not abs(offset) < 1e30:
        refuse(f"nested_offset is {str(offset)[:40]!r}, but must be a finite number")
    return State(kind, n, k, block, integer("nested_blocksize", BLOCK_SIZES), float(offset))


def _read_config(config: ConfigView) -> tuple[int, str | None]:
    """(4 or 8, nf4 or fp4 where config.json names it)."""
    config.string("quant_method", [NAME], NAME)
    asked = [bits for bits in (4, 8)
             if config.boolean(f"load_in_{bits}bit", config.boolean(f"_load_in_{bits}bit", False))]
    if len(asked) != 1:
        raise FormatError(f"{config.where('load_in_4bit')} and load_in_8bit are "
                          f"{'both' if asked else 'neither'} true, but a checkpoint has one of the two. "
                          f"Set the one that the tensors have.")
    config.string("bnb_4bit_quant_storage", STORAGE, "uint8")
    config.boolean("bnb_4bit_use_double_quant", False)  # which modules are nested, their tensors say
    kind = config.string("bnb_4bit_quant_type", KINDS) if config.has("bnb_4bit_quant_type") and asked == [4] else None
    config.accept("bnb_4bit_quant_type")
    config.refuse_unhandled(HARMLESS)
    return asked[0], kind
