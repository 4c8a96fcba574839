"""What the threads of a CUDA function execute, from its PTX: instructions by kind, and the memory that they touch.

Shapes are constants of a kernel, so nothing but thread and block numbers, and `span` and `ids` in memory, decides which
way its branches go. `walk` follows them for all threads of a few blocks at once: it computes what branches and
addresses depend on, and nothing else. Where a branch hangs on what is not known (a row's maximum) the code behind it
counts as executed: the instruction that skips it is taken for not taken.

PTX is not machine code. Callers scale by the size of the machine code (nvrtc.Resources.instructions).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[np.int64]
WARP, LINE = 32, 128
SPACE_BITS = 40  # addresses: the number of the argument, or SHARED, then an offset
SHARED = 0x7F
LOOKS = 3  # how often the addresses of an instruction are looked at: later rounds of a loop repeat them
# Kinds of instructions. What becomes nothing in machine code, mostly, is FREE.
FREE, FLOAT, HALF, INTEGER, LOGIC, SHIFT, COMPARE, MULTIPLY, DOT, TO_FLOAT, TO_HALF, CONVERT, SPECIAL = range(13)
SHUFFLE, MEMORY, SHARED_MEMORY, MATRIX, CONTROL = range(13, 18)
KINDS = 18
DIVISION = 10  # machine instructions of div.rn.f32, sqrt.rn.f32, rcp.rn.f32 and of integer divisions, about
ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)^\{(.*?)^\}", re.DOTALL | re.MULTILINE)
PARAMETER = re.compile(r"_param_(\d+)")
SHARED_ARRAY = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d*)\]")
REGISTER = re.compile(r"%?[a-zA-Z_$][\w$.]*")
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


@dataclass
class Executed:
    """Totals of a launch, in warps: an instruction that 32 threads execute together counts once.

    kinds: instructions by kind, of PTX. warps: that were started. loads: bytes by number of the argument they are
    loaded from, as the threads ask for them. stored: bytes stored to global memory. lines: 128-byte lines that each
    global access of a warp touches, summed; moved: the same in units of 128 bytes, if every byte were wanted.
    banks: turns that shared memory needs. rounds: of the warp that has most, how often it waits for global memory; at
    most once between two branches, because machine code has its loads ahead of what uses them.
    macs: of matrix instructions, by the bits of their operands. longest: PTX instructions of the longest warp.
    unknown: branches that hang on what is not known.
    """

    kinds: NDArray[np.float64]
    warps: float
    loads: dict[int, float]
    stored: float
    lines: float
    moved: float
    banks: float
    rounds: float
    macs: dict[int, float]
    longest: float
    unknown: int


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


def _needed(function: Function, addresses: bool) -> set[str]:
    """Registers that branches depend on, and addresses if wanted."""
    wanted: set[str] = set()
    writers: dict[str, list[Instruction]] = {}
    for block in function.blocks:
        for code in block.code:
            for name in code.writes:
                writers.setdefault(name, []).append(code)
            if code.op[0] in ("bra", "ret", "exit") and code.guard:
                wanted.add(code.guard.lstrip("!"))
            if addresses and code.address is not None:
                wanted |= {code.address[0], code.guard.lstrip("!")}
    todo = list(wanted)
    while todo:
        for code in writers.get(todo.pop(), ()):
            for name in (*code.reads, code.guard.lstrip("!")):
                if name not in wanted and REGISTER.fullmatch(name):
                    wanted.add(name)
                    todo.append(name)
    return wanted


Dim3 = tuple[int, int, int]


def walk(function: Function, grid: Dim3, block: Dim3, memory: Mapping[int, NDArray[np.int32]], most: int) -> Executed:
    """What a launch executes. memory: contents of arguments that branches depend on, by their numbers; of the others
    nothing is known. At most about `most` blocks are followed, evenly spread; totals are scaled to the grid.
    """
    return _Walk(function, grid, block, memory, most).executed()


class _Walk:
    """One walk: registers of all threads, an array each, or None where the value is not known."""

    def __init__(
        self, function: Function, grid: Dim3, block: Dim3, memory: Mapping[int, NDArray[np.int32]], most: int
    ) -> None:
        self.function, self.memory = function, memory
        blocks = grid[0] * grid[1] * grid[2]
        chosen = np.unique(np.linspace(0, blocks - 1, min(most, blocks)).round().astype(np.int64))
        self.scale = blocks / len(chosen)
        threads = block[0] * block[1] * block[2]
        padded = -(-threads // WARP) * WARP
        thread = np.tile(np.arange(padded, dtype=np.int64), len(chosen))
        number = np.repeat(chosen, padded)
        self.exists = thread < threads
        self.warps = len(thread) // WARP
        self.registers: dict[str, Lanes | None] = {
            "%tid.x": thread % block[0], "%tid.y": thread // block[0] % block[1],
            "%tid.z": thread // (block[0] * block[1]), "%laneid": thread % WARP,
            "%ctaid.x": number % grid[0], "%ctaid.y": number // grid[0] % grid[1],
            "%ctaid.z": number // (grid[0] * grid[1]),
        }  # fmt: skip
        for prefix, size in (("%ntid", block), ("%nctaid", grid)):
            for axis, value in zip("xyz", size, strict=True):
                self.registers[f"{prefix}.{axis}"] = np.full(len(thread), value, np.int64)
        for array, offset in function.shared.items():
            self.registers[array] = np.full(len(thread), (SHARED << SPACE_BITS) + offset, np.int64)
        self.full, self.control = _needed(function, True), _needed(function, False)
        self.waits, self.pending = np.zeros(self.warps), frozenset[str]()
        self.reads = [frozenset(name for code in b.code for name in code.reads) for b in function.blocks]
        self.loads = [frozenset(n for c in b.code if _is_load(c) for n in c.writes) for b in function.blocks]
        self.looked: dict[int, list[tuple[float, ...]]] = {}
        self.unknown: set[int] = set()
        self.result = Executed(np.zeros(KINDS), self.warps * self.scale, {}, 0, 0, 0, 0, 0, {}, 0, 0)

    def executed(self) -> Executed:
        """Follow all threads: those at the earliest block go first, so that they meet again behind a branch."""
        blocks = self.function.blocks
        at = np.where(self.exists, 0, len(blocks))
        passes = np.zeros((len(blocks), self.warps))
        costs = [_cost(block) for block in blocks]
        seen = [0] * len(blocks)
        while (now := int(at.min())) < len(blocks):
            active = at == now
            by_warp = active.reshape(-1, WARP).any(1)
            passes[now] += by_warp
            seen[now] += 1
            if self._waits(now):
                self.waits += by_warp
            at = np.where(active, self._run(now, active, seen[now] <= LOOKS, float(by_warp.sum())), at)
        total = passes.sum(1)
        for i, (kinds, macs) in enumerate(costs):
            self.result.kinds += kinds * total[i] * self.scale
            for bits, count in macs.items():
                self.result.macs[bits] = self.result.macs.get(bits, 0) + count * total[i] * self.scale
        sizes = np.array([kinds.sum() for kinds, _ in costs])
        self.result.longest = float((sizes @ passes).max())
        self.result.rounds = float(self.waits.max())
        self.result.unknown = len(self.unknown)
        return self.result

    def _waits(self, number: int) -> bool:
        """Whether a block needs what was loaded from global memory, by itself or before."""
        pending, reads = self.pending | self.loads[number], self.reads[number]
        found = bool(pending & reads)
        self.pending = self.loads[number] - reads if found else pending
        return found

    def _run(self, number: int, active: NDArray[np.bool_], look: bool, warps: float) -> NDArray[np.int64]:
        """Execute a block; gives the next block of every thread."""
        block, wanted = self.function.blocks[number], self.full if look else self.control
        following = np.full(len(active), number + 1, np.int64)
        for code in block.code:
            guard = self._guard(code)
            if code.op[0] in ("bra", "ret", "exit"):
                if guard is None:
                    self.unknown.add(number)
                    continue
                to = block.target if code.op[0] == "bra" else len(self.function.blocks)
                following = np.where(guard, to, following)
                continue
            if code.address is not None and "param" not in code.op and code.op[0] != "prefetch":
                self._access(code, active if guard is None else active & guard, look, warps)
            if any(name in wanted for name in code.writes):
                self._compute(code, active, guard)
        return following

    def _guard(self, code: Instruction) -> NDArray[np.bool_] | None:
        """Which threads an instruction is for; None: not known."""
        if not code.guard:
            return self.exists
        value = self.registers.get(code.guard.lstrip("!"))
        return None if value is None else (value == 0) == code.guard.startswith("!")

    def _access(self, code: Instruction, active: NDArray[np.bool_], look: bool, warps: float) -> None:
        """Count an access. What it touches is that of the first rounds, a warp; what is not known counts as dense."""
        looked = self.looked.setdefault(id(code), [])
        size = _access_bytes(code)
        base = self.registers.get(code.address[0]) if code.address is not None else None
        if look or not looked:
            lanes = float(active.sum()) / max(1.0, warps)
            if base is None:
                looked.append((-1.0, lanes * size, lanes * size / LINE, lanes * size / LINE))
            else:
                looked.append(_touched(base + (code.address or ("", 0))[1], active, size, max(1.0, warps)))
        argument, nbytes, lines, banks = looked[-1]
        result, times = self.result, warps * self.scale
        if "shared" in code.op and code.op[0] != "cp":
            result.banks += times * banks
            return
        result.lines, result.moved = result.lines + times * lines, result.moved + times * nbytes / LINE
        if code.op[0] == "st":
            result.stored += times * nbytes
        else:
            result.loads[int(argument)] = result.loads.get(int(argument), 0) + times * nbytes

    def _compute(self, code: Instruction, active: NDArray[np.bool_], guard: NDArray[np.bool_] | None) -> None:
        value = None if guard is None else self._value(code)
        for name in code.writes:
            old = self.registers.get(name)
            if value is None:
                self.registers[name] = None
            elif code.guard and guard is not None:
                self.registers[name] = None if old is None else np.where(active & guard, value, old)
            else:
                self.registers[name] = value if old is None or active.all() else np.where(active, value, old)

    def _value(self, code: Instruction) -> Lanes | None:
        """The result of an instruction on integers, with 32 bits as unsigned numbers; None: not known."""
        if len(code.writes) != 1:
            return None
        if code.op[:2] == ("ld", "param"):
            return np.full(len(self.exists), _argument(code.reads[0]) << SPACE_BITS, np.int64)
        if code.op[0] == "ld":
            return self._load(code)
        given = []
        for name in code.reads:
            value = self._operand(name)
            if value is None:
                return None
            given.append(value)
        return _arithmetic(code.op, given)

    def _operand(self, name: str) -> Lanes | None:
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", name):
            return np.full(len(self.exists), int(name, 0), np.int64)
        return self.registers.get(name)

    def _load(self, code: Instruction) -> Lanes | None:
        base = self.registers.get(code.address[0]) if code.address is not None else None
        if base is None or code.op[-1] not in ("s32", "u32", "b32") or "shared" in code.op:
            return None
        address = base + (code.address or ("", 0))[1]
        known = self.memory.get(int(address[0] >> SPACE_BITS))
        if known is None or (address >> SPACE_BITS != address[0] >> SPACE_BITS).any():
            return None
        place = np.clip((address & ((1 << SPACE_BITS) - 1)) // 4, 0, len(known) - 1)
        return known[place].astype(np.int64) & 0xFFFFFFFF


def _is_load(code: Instruction) -> bool:
    return code.op[0] == "ld" and "global" in code.op


def _cost(block: Block) -> tuple[NDArray[np.float64], dict[int, float]]:
    """Of one pass of one warp: instructions by kind, multiply-adds of matrices."""
    kinds, macs = np.zeros(KINDS), dict[int, float]()
    for code in block.code:
        number, count = kind(code.op)
        kinds[number] += count
        if number == MATRIX:
            m, n, k = map(int, re.findall(r"\d+", next(p for p in code.op if re.match(r"m\d+n\d+k", p))))
            bits = 8 if "s8" in code.op else 16
            macs[bits] = macs.get(bits, 0) + m * n * k
    return kinds, macs


def _argument(name: str) -> int:
    found = PARAMETER.search(name)
    if found is None:
        raise PtxError(f"{name} is no parameter")
    return int(found[1])


def _access_bytes(code: Instruction) -> int:
    """Bytes of one thread's access."""
    op = code.op
    if op[0] == "ldmatrix":
        return 4 * int(next(p for p in op if p in ("x1", "x2", "x4"))[1:])
    if op[0] == "wmma":
        return 32 if op[-1] in ("f32", "s32") else 16
    if op[0] == "cp":
        return next(int(name) for name in code.reads if name.isdigit())
    parts = {"v2": 2, "v4": 4}
    return int(re.sub(r"\D", "", op[-1])) // 8 * next((parts[p] for p in op if p in parts), 1)


def _touched(address: Lanes, active: NDArray[np.bool_], size: int, warps: float) -> tuple[float, float, float, float]:
    """(argument, bytes, lines, turns of the banks) of an access of one warp, on average."""
    if not active.any():
        return -1.0, 0.0, 0.0, 0.0
    rows, lanes = address.reshape(-1, WARP), active.reshape(-1, WARP)
    lines = np.sort(np.where(lanes, rows // LINE, -1), axis=1)
    distinct = ((lines[:, 1:] != lines[:, :-1]) & (lines[:, :-1] >= 0)).sum() + (lines[:, -1] >= 0).sum()
    group = min(WARP, max(1, LINE // size))  # so many threads are served at a time
    words = np.where(lanes, rows // 4, -1).reshape(-1, group)
    turns = 0
    for turn in words[(words >= 0).any(1)]:
        unique = np.unique(turn[turn >= 0])
        covered = np.unique((unique[:, None] + np.arange(max(1, size // 4))).ravel())
        turns += int(np.bincount(covered % WARP).max())
    space = int(address[int(active.argmax())] >> SPACE_BITS)
    return float(space), active.sum() * size / warps, distinct / warps, turns / warps


def _signed(value: Lanes, bits: int) -> Lanes:
    if bits >= 64:
        return value
    value = value & ((1 << bits) - 1)
    return np.where(value >> (bits - 1) != 0, value - (1 << bits), value)


def _arithmetic(op: Sequence[str], given: Sequence[Lanes]) -> Lanes | None:
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
