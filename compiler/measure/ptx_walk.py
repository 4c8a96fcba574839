"""What the threads of a CUDA function execute: instructions of its PTX by kind, and the memory that they touch.

Shapes are constants of a kernel, so nothing but thread and block numbers, and `span` and `ids` in memory, decides which
way its branches go. `walk` follows them for all threads of a few blocks at once: it computes what branches and
addresses depend on, and nothing else. Where a branch hangs on what is not known (a row's maximum) the code behind it
counts as executed: the instruction that skips it is taken for not taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiler.measure.ptx import KINDS, MATRIX, Block, Function, Instruction, Lanes, PtxError, compute, kind

WARP, LINE = 32, 128
SPACE_BITS = 40  # addresses: the number of the argument, or SHARED, then an offset
SHARED = 0x7F
LOOKS = 3  # how often the addresses of an instruction are looked at: later rounds of a loop repeat them
PARAMETER = re.compile(r"_param_(\d+)")
REGISTER = re.compile(r"%?[a-zA-Z_$][\w$.]*")


@dataclass
class Executed:
    """Totals of a launch, in warps: an instruction that 32 threads execute together counts once.

    kinds: instructions by kind, of PTX. warps: that were started. loads: bytes by number of the argument they are
    loaded from, as the threads ask for them. stored: bytes stored to global memory. lines: 128-byte lines that each
    global access of a warp touches, summed; moved: the same in units of 128 bytes, if every byte were wanted.
    banks: turns that shared memory needs. rounds: of the warp that has most, how often it waits for global memory; at
    most once between two branches, because machine code has its loads ahead of what uses them.
    macs: of matrix instructions, by the bits of their operands. longest: PTX instructions of the longest warp.
    unknown: branches that hang on what is not known. working: blocks that do more than a tenth of what the busiest warp
    does: those that leave at once, as attention's beyond the position, wait for nothing and make nobody wait.
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
    working: float = 0.0


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
        self.scale, self.chosen = blocks / len(chosen), len(chosen)
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
        by_warp = sizes @ passes
        self.result.longest = float(by_warp.max())
        busiest = by_warp.reshape(self.chosen, -1).max(1)
        self.result.working = float((busiest > self.result.longest / 10).sum()) * self.scale
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
        return compute(code.op, given)

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
        return 4 * len(code.writes or code.reads[1:-1])  # a register each; fp16 fragments hold everything twice
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
