"""PTX as a list of instructions: its parts, what kind each is, and what those on integers compute.

PTX is not machine code. Callers scale by the size of the machine code (nvrtc.Resources.instructions).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[np.int64]
# Kinds of instructions. What becomes nothing in machine code, mostly, is FREE.
FREE, FLOAT, HALF, INTEGER, LOGIC, SHIFT, COMPARE, MULTIPLY, DOT, TO_FLOAT, TO_HALF, CONVERT, SPECIAL = range(13)
SHUFFLE, MEMORY, SHARED_MEMORY, MATRIX, CONTROL = range(13, 18)
KINDS = 18
DIVISION = 10  # machine instructions of div.rn.f32, sqrt.rn.f32, rcp.rn.f32 and of integer divisions, about
ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)^\{(.*?)^\}", re.DOTALL | re.MULTILINE)
SHARED_ARRAY = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d*)\]")
COMPARISONS: Mapping[str, Callable[[Lanes, Lanes], NDArray[np.bool_]]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


class PtxError(Exception):
    """PTX that this file cannot follow: a bug in it, or a kernel of a new kind."""


@dataclass(frozen=True)
class Instruction:
    """`op` in its parts, register operands without braces; address: the operand of a memory access, (base, offset)."""

    op: tuple[str, ...]
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    guard: str = ""  # "%p1", "!%p1" or ""
    address: tuple[str, int] | None = None
    label: str = ""  # of a branch


@dataclass
class Block:
    """Instructions of which none but the last is a branch, and the numbers of its successors."""

    code: list[Instruction] = field(default_factory=list)
    target: int = -1


@dataclass(frozen=True)
class Function:
    """An entry: blocks in their order, offsets of its shared arrays."""

    name: str
    blocks: tuple[Block, ...]
    shared: Mapping[str, int]


def functions(ptx: str) -> dict[str, Function]:
    """All entries of a PTX text."""
    found = {}
    for name, _, _, body in ENTRY.findall(ptx):
        shared, at = {}, 0
        for array, size in SHARED_ARRAY.findall(ptx):
            shared[array] = at
            at += int(size or 0)
        found[name] = Function(name, _blocks(body), shared)
    return found


def _blocks(body: str) -> tuple[Block, ...]:
    blocks, labels = [Block()], dict[str, int]()
    for text in _statements(body):
        if text.endswith(":"):
            if blocks[-1].code:
                blocks.append(Block())
            labels[text[:-1]] = len(blocks) - 1
            continue
        instruction = _instruction(text)
        blocks[-1].code.append(instruction)
        if instruction.op[0] in ("bra", "ret", "exit"):
            blocks.append(Block())
    for block in blocks:
        if block.code and block.code[-1].op[0] == "bra":
            block.target = labels[block.code[-1].label]
    return tuple(blocks)


def _statements(body: str) -> Iterator[str]:
    """Instructions and labels, without declarations, comments and the braces around inline assembly."""
    for line in re.sub(r"//[^\n]*", "", body).splitlines():
        line = line.strip()
        if re.fullmatch(r"[$\w]+:", line):
            yield line
            continue
        for part in line.split(";"):
            part = part.strip().removesuffix("}").strip() if part.count("}") > part.count("{") else part.strip()
            part = part.removeprefix("{").strip() if part.count("{") > part.count("}") else part
            if part and not part.startswith("."):
                yield part


def _instruction(text: str) -> Instruction:
    guard = ""
    if text.startswith("@"):
        head, text = text[1:].split(None, 1)
        guard = head
    name, _, rest = text.partition(" ") if " " in text.split("\t")[0] else text.partition("\t")
    op = tuple(name.strip().replace("::", "").split("."))
    operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,{}\[\]]+", rest) if part.strip(" \t,")]
    if op[0] == "bra":
        return Instruction(op, (), (), guard, label=operands[0])
    address, plain = None, []
    for operand in operands:
        if operand.startswith("["):
            base, _, offset = operand[1:-1].partition("+")
            if address is None or op[:2] == ("cp", "async"):  # of a copy the second is the one in global memory
                address = (base.strip(), int(offset or 0))
            plain.append(base.strip())
        else:
            plain.append(operand)
    stores = op[0] in ("st", "cp", "bar", "membar") or (op[0] == "wmma" and op[1] == "store")
    written = () if stores or not plain else _names(plain[0])
    read = tuple(name for operand in plain[0 if stores else 1 :] for name in _names(operand))
    return Instruction(op, written, read, guard, address)


def _names(operand: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in operand.strip("{}").split(",") if part.strip())


def kind(op: Sequence[str]) -> tuple[int, int]:
    """(kind, how many machine instructions a PTX instruction is, about)."""
    base, type_ = op[0], op[-1]
    wide = 2 if type_ in ("s64", "u64", "b64") else 1
    if base in ("ld", "st", "cp"):
        if "param" in op or (base == "cp" and "shared" not in op):
            return FREE, 0
        return (SHARED_MEMORY if "shared" in op and base != "cp" else MEMORY), 1
    if base in ("mma", "wmma", "ldmatrix"):
        return (MATRIX if base == "mma" or op[1] == "mma" else SHARED_MEMORY), 1
    if base in ("shfl", "vote", "redux"):
        return SHUFFLE, 1
    if base in ("bra", "ret", "exit", "bar", "membar"):
        return CONTROL, 1
    if base in ("mov", "cvta") or type_ == "pred":
        return FREE, 0
    if base in ("div", "sqrt", "rcp", "rem") and "approx" not in op:
        return FLOAT if type_ == "f32" else INTEGER, DIVISION
    if base in ("ex2", "rcp", "rsqrt", "lg2", "sqrt"):
        return SPECIAL, 1
    if type_ in ("f16x2", "f16") and base != "cvt":
        return HALF, 1
    if base == "cvt":
        return _conversion(op)
    if base in ("selp", "setp", "min", "max", "abs"):
        return COMPARE, wide
    if type_ == "f32":
        return FLOAT, 1
    if base in ("mul", "mad"):
        return MULTIPLY, wide
    table = {"dp4a": DOT, "dp2a": DOT, "shl": SHIFT, "shr": SHIFT, "shf": SHIFT, "bfe": SHIFT, "bfi": SHIFT}
    table |= {"prmt": SHIFT, "and": LOGIC, "or": LOGIC, "xor": LOGIC, "not": LOGIC, "lop3": LOGIC}
    return table.get(base, INTEGER), wide


def _conversion(op: Sequence[str]) -> tuple[int, int]:
    to, of = op[-2], op[-1]
    if to == "f32" and of == "f16":
        return TO_FLOAT, 1
    if to in ("f16", "f16x2") and of == "f32":
        return TO_HALF, 1
    if to.startswith("f") or of.startswith("f"):
        return CONVERT, 1
    return FREE, 0  # between widths of integers: another register name, a mask that is counted with its user


def _signed(value: Lanes, bits: int) -> Lanes:
    if bits >= 64:
        return value
    value = value & ((1 << bits) - 1)
    return np.where(value >> (bits - 1) != 0, value - (1 << bits), value)


def compute(op: Sequence[str], given: Sequence[Lanes]) -> Lanes | None:
    """An instruction on integers or predicates; None for any other."""
    type_ = op[-1]
    if type_ == "pred":
        return _wrap(_LOGIC[op[0]](*given), 1) if op[0] in _LOGIC else given[0] if op[0] == "mov" else None
    found = re.fullmatch(r"([subf])(\d+)", type_)
    if found is None or found[1] == "f" or any(p.startswith("f") for p in op[1:]):
        return None
    bits, signed = int(found[2]), found[1] == "s"
    values = [_signed(v, bits) if signed else _wrap(v, bits) for v in given]
    if op[0] == "setp":
        result = COMPARISONS[op[1]](_wrap(values[0], bits) if not signed else values[0], values[1])
        return result.astype(np.int64) if len(given) == 2 else None
    if op[0] == "selp":
        return np.where(given[2] != 0, _wrap(given[0], bits), _wrap(given[1], bits))
    if op[0] == "cvt":
        to = re.fullmatch(r"[sub](\d+)", op[-2])
        return None if to is None else _wrap(values[0], int(to[1]))
    if op[0] in ("mul", "mad"):
        product = values[0] * values[1]
        product = product >> bits if "hi" in op else product
        product = product + (given[2] if len(given) > 2 else 0)
        return _wrap(product, 2 * bits if "wide" in op else bits)
    if op[0] == "lop3":
        return _wrap(_lop3(int(given[3][0]), *given[:3]), bits)
    if op[0] == "bfi":
        a, b, start, count = given
        mask = ((1 << count) - 1) << start
        return _wrap((b & ~mask) | ((a << start) & mask), bits)
    if op[0] == "bfe":
        a, start, count = given
        cut = (_wrap(a, bits) >> start) & ((1 << count) - 1)
        return _wrap(_signed(cut, int(count[0])) if signed else cut, bits)
    known = _LOGIC.get(op[0]) or _INTEGER.get(op[0])
    return None if known is None else _wrap(known(*values), bits)


def _lop3(table: int, a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    found = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def _wrap(value: Lanes, bits: int) -> Lanes:
    return value if bits >= 64 else value & ((1 << bits) - 1)


def _quotient(a: Lanes, b: Lanes) -> Lanes:
    """Towards zero."""
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1))


_LOGIC: Mapping[str, Callable[..., Lanes]] = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip
_INTEGER: Mapping[str, Callable[..., Lanes]] = {
    "mov": lambda a: a, "cvta": lambda a: a, "add": np.add, "sub": np.subtract, "neg": np.negative,
    "shl": lambda a, b: np.where(b < 64, a << np.minimum(b, 63), 0), "shr": lambda a, b: a >> np.minimum(b, 63),
    "min": np.minimum, "max": np.maximum, "abs": np.abs, "div": _quotient, "rem": lambda a, b: a - _quotient(a, b) * b,
}  # fmt: skip
