"""GGUF's block formats to canonical codes. Blocks run along k within a row; all numbers little-endian.

32 weights a block, d and m f16, nibbles: byte j holds weight j low and weight j + 16 high:
q4_0  d, 16 nibble bytes                          int4  w = d * (q - 8)        q5_0 the same with u32 of fifth bits
q4_1  d, m, 16 nibble bytes                       int4  w = d * q + m          q5_1 the same with u32 of fifth bits
q8_0  d, i8[32]                                   int8  w = d * (q - 128), q stored minus 128
iq4_nl d, 16 nibble bytes                         table iq4_nl  w = d * table[q]
256 weights a block, groups of 32 (q2_k, q3_k, q6_k: 16), s the integer scale of the group:
q2_k  u4 s[16] low and u4 m[16] high in 16 bytes, bit pairs 2 x 32 bytes, d, dmin   int2  w = (d * s) * q - (dmin * m)
q3_k  third bits u8[32], bit i of byte j for run i of 32; bit pairs 2 x 32 bytes; u6 s[16] in 12 bytes, minus 32; d
                                                  int3  w = (d * s) * (q - 4)
q4_k  d, dmin, u6 s[8] and u6 m[8] in 12 bytes, nibbles 32 + 32 together       w = (d * s) * q - (dmin * m)
q5_k  the same, fifth bits u8[32], bit i of byte j for group i                 int5
q6_k  low nibbles 64 + 64, high bit pairs 4 x 32, i8 s[16], d                  int6  w = (d * s) * (q - 32)
iq4_xs d, s in 4 + 2 bits minus 32                table iq4_nl  w = (d * s) * table[q]
Products in brackets are rounded to float32 once, as in the gguf package: they are the scale and the offset here.

The converter moved rows of q and k (`interleaved`): ggml rotates neighbours, transformers halves. Rows are moved back
whole, blocks and all, which is exact.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compiler.errors import CheckpointError, FormatError, UnsupportedError
from compiler.quant.formats.dense import DenseSource
from compiler.quant.grids import GRIDS
from compiler.quant.ir import DENSE_STORAGE, DenseWeight, QuantWeight, WeightType
from compiler.quant.reference import F32
from compiler.quant.source import CheckpointView, Source, read_bias, spelled

NAME = "gguf"
U8 = NDArray[np.uint8]
# One block of each row: bytes u8[rows, type size] -> codes, scale [rows, groups], offset or None
Parts = tuple[U8, NDArray[Any], "F32 | None"]


@dataclass(frozen=True)
class Block:
    """How one type packs its weights. zero: the code that means 0, where there is no offset."""

    weights: int
    nbytes: int
    grid: str
    group: int
    scale: str
    zero: int
    offset: bool
    unpack: Callable[[U8], Parts]

    @property
    def symmetric(self) -> bool:
        """True when every zero is the grid's middle."""
        return not self.offset and GRIDS[self.grid].values is None


def claims(config: dict[str, Any]) -> bool:
    """Only a GGUF file becomes such a configuration; see compiler/checkpoint/gguf_model.py."""
    return (config.get("quantization_config") or {}).get("quant_method") == NAME


def open(checkpoint: CheckpointView) -> Source:  # noqa: A001 - what every format calls it
    """Read how the converter changed the model; no tensor is touched."""
    config = checkpoint.config.quantization
    assert config is not None, "claims() saw one"
    config.string("quant_method", [NAME])
    interleaved, plus_one = config.boolean("interleaved", False), config.boolean("norms_plus_one", False)
    config.refuse_unhandled()
    heads: dict[str, int] = {}
    if interleaved:
        count = checkpoint.config.integer("num_attention_heads", 1, 4096)
        heads = {"q_proj": count, "k_proj": checkpoint.config.integer("num_key_value_heads", 1, 4096, count)}
    return GgufSource(checkpoint, heads, plus_one)


class GgufSource:
    """Block-quantised matrices are decoded, float ones come as they are. heads: of the modules whose rows moved."""

    def __init__(self, checkpoint: CheckpointView, heads: dict[str, int], norms_plus_one: bool) -> None:
        self._checkpoint = checkpoint
        self._heads = heads
        self._norms_plus_one = norms_plus_one
        self._dense = DenseSource(checkpoint)

    def modules(self) -> list[str]:
        """All modules, in the order of the file."""
        return self._dense.modules()

    def has(self, module: str) -> bool:
        """Whether there is such a weight matrix."""
        return self._dense.has(module)

    def describe(self, module: str) -> WeightType:
        """Shape and kind from the header."""
        info = self._checkpoint.tensors.get(f"{module}.weight")
        if info is None or info.dtype in DENSE_STORAGE:
            return self._dense.describe(module)
        if info.dtype not in BLOCKS:
            raise UnsupportedError(f"{info.file}: {module} is {info.dtype}, but quern decodes "
                                   f"{', '.join(sorted({*BLOCKS, *DENSE_STORAGE}))}. Take the model as Q4_K_M, Q5_K_M, "
                                   f"Q6_K or Q8_0.")
        if len(info.shape) != 2 or 0 in info.shape:
            raise FormatError(f"{info.file}: {module} is {spelled(info)}, but a weight needs two dimensions, neither "
                              f"of them 0. Fetch the file again.")
        block = BLOCKS[info.dtype]
        return WeightType(*info.shape, block.grid, block.group, block.scale, block.offset, symmetric=block.symmetric)

    def load(self, module: str) -> QuantWeight | DenseWeight:
        """Decode one module, rows back in transformers' order."""
        kind = self.describe(module)
        raw = self._checkpoint.array(f"{module}.weight")
        order = self._order(module, kind.n)
        if order is not None:
            raw = raw[order]
        if kind.dense:
            return DenseWeight(raw, kind.grid)
        info = self._checkpoint.tensors[f"{module}.weight"]
        return decode(raw, info.dtype, f"{info.file}: {module}")

    def bias(self, module: str) -> F32 | None:
        """What the linear layer adds, if anything; it moved with the rows."""
        n = self.describe(module).n
        bias, order = read_bias(self._checkpoint, module, n), self._order(module, n)
        return bias if bias is None or order is None else bias[order]

    def vector(self, name: str) -> F32:
        """A norm weight as float32. Where the converter stored 1 + w it is w again, exact for every w above -0.5."""
        values = self._dense.vector(name)
        return values - np.float32(1) if self._norms_plus_one else values

    def _order(self, module: str, n: int) -> NDArray[np.int64] | None:
        """Row of the file for every row of the module: head h, half s, pair j lies at h, j, s."""
        heads = self._heads.get(module.rpartition(".")[2])
        if heads is None:
            return None
        if n % (2 * heads):
            raise CheckpointError(f"{self._checkpoint.path}: {module} has {n} rows, which are not {heads} heads of "
                                  f"even width. Fetch the file again.")
        return np.arange(n).reshape(heads, n // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def decode(raw: U8, kind: str, where: str) -> QuantWeight:
    """u8[n, bytes of a row] of one type to canonical codes. Raises FormatError when a scale is not finite."""
    block = BLOCKS[kind]
    n, count = raw.shape[0], raw.shape[1] // block.nbytes
    blocks = np.ascontiguousarray(raw).reshape(n * count, block.nbytes)
    with np.errstate(invalid="ignore"):  # infinity times zero: refused below
        codes, scale, offset = block.unpack(blocks)
    groups = count * block.weights // block.group
    scale = np.ascontiguousarray(scale).reshape(n, groups)
    offset = None if offset is None else np.ascontiguousarray(offset).reshape(n, groups)
    for values in (scale, offset):
        if values is not None and not np.isfinite(values).all():
            bad = int(values.size - np.isfinite(values).sum())
            raise FormatError(f"{where}: {bad} of {values.size} scales or offsets are NaN or infinite. The file is "
                              f"damaged or the quantisation failed: fetch it again.")
    zero = np.full((n, groups), block.zero, np.int16)
    return QuantWeight(codes.reshape(n, count * block.weights), scale, zero, block.grid, block.group, offset=offset,
                       symmetric=block.symmetric)


def _half(blocks: U8, at: int) -> NDArray[np.float16]:
    """The f16 at byte `at` of every block, [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at:at + 2]).view("<f2")


def _nibbles(packed: U8, run: int) -> U8:
    """u8[blocks, bytes] -> u8[blocks, 2 * bytes]: of every `run` bytes first the low nibbles, then the high ones."""
    split = packed.reshape(packed.shape[0], -1, 1, run)
    codes = np.empty((*split.shape[:2], 2, run), np.uint8)
    np.bitwise_and(split, 15, out=codes[:, :, :1])
    np.right_shift(split, 4, out=codes[:, :, 1:])
    return codes.reshape(packed.shape[0], -1)


def _legacy(offset: bool, fifth: bool) -> Callable[[U8], Parts]:
    """q4_0, q4_1, q5_0, q5_1: d, then m, then 32 fifth bits, then the nibbles."""
    def unpack(blocks: U8) -> Parts:
        at = 4 if offset else 2
        codes = _nibbles(blocks[:, at + 4 * fifth:], 16)
        if fifth:
            codes |= np.unpackbits(blocks[:, at:at + 4], axis=1, bitorder="little") << np.uint8(4)
        return codes, _half(blocks, 0), _half(blocks, 2).astype(np.float32) if offset else None

    return unpack


def _q8_0(blocks: U8) -> Parts:
    return blocks[:, 2:] ^ np.uint8(128), _half(blocks, 0), None


def _iq4_nl(blocks: U8) -> Parts:
    return _nibbles(blocks[:, 2:], 16), _half(blocks, 0), None


def _iq4_xs(blocks: U8) -> Parts:
    high, low, packed = np.ascontiguousarray(blocks[:, 2:4]).view("<u2"), blocks[:, 4:8], blocks[:, 8:]
    upper = (high >> np.arange(0, 16, 2, dtype=np.uint16)).astype(np.uint8) & np.uint8(3)
    six = _nibbles(low, 1) | upper << np.uint8(4)
    return _nibbles(packed, 16), _half(blocks, 0).astype(np.float32) * (six.astype(np.float32) - np.float32(32)), None


def _scales(packed: U8) -> tuple[U8, U8]:
    """12 bytes -> u6 s[8], u6 m[8]: bytes 0-3 s[0:4], 4-7 m[0:4]; 8-11 low nibbles of s and m[4:8], the top two bits
    of bytes 0-7 their rest.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    top = np.uint8(0x30)
    s = np.concatenate([first & 63, third & 15 | first >> 2 & top], axis=1)
    m = np.concatenate([second & 63, third >> 4 | second >> 2 & top], axis=1)
    return s, m


def _k(fifth: bool) -> Callable[[U8], Parts]:
    """q4_k and q5_k."""
    def unpack(blocks: U8) -> Parts:
        s, m = _scales(blocks[:, 4:16])
        codes = _nibbles(blocks[:, 48 if fifth else 16:], 32)
        if fifth:
            bits = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little")  # byte j, group i
            codes |= bits.swapaxes(1, 2).reshape(codes.shape) << np.uint8(4)
        d, low = _half(blocks, 0).astype(np.float32), _half(blocks, 2).astype(np.float32)
        return codes, d * s.astype(np.float32), -(low * m.astype(np.float32))

    return unpack


def _pairs(packed: U8) -> U8:
    """u8[blocks, 32 * r] -> u8[blocks, 128 * r]: of every 32 bytes first the lowest two bits, then the next ..."""
    runs = packed.reshape(packed.shape[0], -1, 1, 32)
    found: U8 = runs >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & np.uint8(3)
    return found.reshape(packed.shape[0], -1)


def _q2_k(blocks: U8) -> Parts:
    s, m = (blocks[:, :16] & np.uint8(15)).astype(np.float32), (blocks[:, :16] >> np.uint8(4)).astype(np.float32)
    d, low = _half(blocks, 80).astype(np.float32), _half(blocks, 82).astype(np.float32)
    return _pairs(blocks[:, 16:80]), d * s, -(low * m)


def _q3_k(blocks: U8) -> Parts:
    third = np.unpackbits(blocks[:, :32, None], axis=2, bitorder="little").swapaxes(1, 2)  # run i, byte j
    codes = _pairs(blocks[:, 32:96]) | third.reshape(-1, 256) << np.uint8(2)
    low, high = _nibbles(blocks[:, 96:104], 8), blocks[:, 104:108].reshape(-1, 1, 4)
    upper = high >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1) & np.uint8(3)
    six = (low | upper.reshape(low.shape) << np.uint8(4)).astype(np.float32)
    return codes, _half(blocks, 108).astype(np.float32) * (six - np.float32(32)), None


def _q6_k(blocks: U8) -> Parts:
    codes = _nibbles(blocks[:, :128], 64) | _pairs(blocks[:, 128:192]) << np.uint8(4)
    s = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return codes, _half(blocks, 208).astype(np.float32) * s.astype(np.float32), None


BLOCKS = {
    "q4_0": Block(32, 18, "int4", 32, "float16", 8, False, _legacy(offset=False, fifth=False)),
    "q4_1": Block(32, 20, "int4", 32, "float16", 0, True, _legacy(offset=True, fifth=False)),
    "q5_0": Block(32, 22, "int5", 32, "float16", 16, False, _legacy(offset=False, fifth=True)),
    "q5_1": Block(32, 24, "int5", 32, "float16", 0, True, _legacy(offset=True, fifth=True)),
    "q8_0": Block(32, 34, "int8", 32, "float16", 128, False, _q8_0),
    "iq4_nl": Block(32, 18, "iq4_nl", 32, "float16", 0, False, _iq4_nl),
    "q2_k": Block(256, 84, "int2", 16, "float32", 0, True, _q2_k),
    "q3_k": Block(256, 110, "int3", 16, "float32", 4, False, _q3_k),
    "q4_k": Block(256, 144, "int4", 32, "float32", 0, True, _k(fifth=False)),
    "q5_k": Block(256, 176, "int5", 32, "float32", 0, True, _k(fifth=True)),
    "q6_k": Block(256, 210, "int6", 16, "float32", 32, False, _q6_k),
    "iq4_xs": Block(256, 136, "iq4_nl", 32, "float32", 0, False, _iq4_xs),
}
assert all(block.grid in GRIDS for block in BLOCKS.values())
