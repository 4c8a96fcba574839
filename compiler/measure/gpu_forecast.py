"""What a published shape will do on Jetson boards that are not at hand: a model from bytes, instructions, data sheets.

Every launch of a call, after its kernels were compiled for the chip and their instructions counted (ptx_walk.py):

    memory   bytes of weights and cache that it reads, and twice what it writes / (SHARE * bandwidth)
    issue    clocks of the busiest multiprocessor (gpu_issue.py) / (ISSUED * clock)
    latency  waves of blocks * (waits of a warp * LATENCY_S + instructions of a warp * a step / IN_FLIGHT / clock)
    seconds = the largest of the three + (1 - OVERLAP) * the lesser of memory and issue + GAP_S
with the constants for low, expected and high. A wave is as many blocks as fit at once; with few of them, too few bytes
are under way to fill the memory's latency, and `latency` is what tells.

Nothing of it was measured by quern on such a board; SHARE, ISSUED, OVERLAP, LATENCY_S, IN_FLIGHT and GAP_S are assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from compiler import models, pipeline
from compiler.codegen import nvrtc
from compiler.codegen.nvrtc import DeviceCode, Resources
from compiler.errors import UserError
from compiler.graph import ops
from compiler.graph.build import Function, Graph
from compiler.graph.weights import Linear
from compiler.measure import gpu_issue, ptx, ptx_walk, shapes
from compiler.measure.forecast import Spread
from compiler.measure.gpu_issue import CHIPS, Busy, Chip
from compiler.measure.gpu_speed import for_every_token
from compiler.passes.lower_to_launches import HEADER, FunctionPlan, Launches, Step, lower_to_launches
from targets import Gpu, Target

CASES = ("low", "expected", "high")
SHARE = (0.5, 0.8, 0.92)  # of the stated bandwidth. MLC reads 61 of an Orin Nano's 68 GB/s, 178 of an AGX Orin's 205
ISSUED = (0.4, 0.65, 0.85)  # of the clocks in which a multiprocessor could do something
OVERLAP = (0.5, 0.8, 1.0)  # of the lesser of memory and issue that hides behind the other
LATENCY_S = (1.0e-6, 0.7e-6, 0.45e-6)  # from a load to its data out of LPDDR4, LPDDR5
IN_FLIGHT = (1.0, 2.0, 3.0)  # instructions of one warp between which nothing waits
LINES_A_CLOCK = (1.0, 2.0, 4.0)  # of the first-level cache that are looked up for one load
GAP_S = (10e-6, 3e-6, 1e-6)  # between two kernels: launched one by one on a slow CPU, a graph's usual, its best
CHUNK = 128  # prompt tokens a call
FOLLOWED = 16  # blocks of a grid whose instructions are counted


@dataclass(frozen=True)
class Board:
    """A device by its data sheet."""

    name: str
    multiprocessors: int
    clock_mhz: int
    read_mb_per_s: int
    memory_mib: int


# NVIDIA's data sheets of the modules; the Nano's bandwidth as others measured it (25600 on its data sheet).
BOARDS = {
    "jetson-nano": (Board("Jetson Nano 4 GB", 1, 921, 16500, 4096),),
    "jetson-xavier": (
        Board("Jetson Xavier NX 8 GB", 6, 1100, 59700, 8192),
        Board("Jetson AGX Xavier 32 GB", 8, 1377, 136500, 32768),
    ),
    "jetson-orin": (
        Board("Jetson Orin Nano 8 GB", 8, 625, 68000, 8192),
        Board("Jetson AGX Orin 64 GB", 16, 1300, 204800, 65536),
    ),
}


@dataclass(frozen=True)
class Kernel:
    """One launch, `times` a call: what it does on any board of the chip. blocks: that have something to do; resident:
    that a multiprocessor holds.
    """

    name: str
    times: int
    blocks: int
    resident: int
    nbytes: float
    busy: Busy


@dataclass(frozen=True)
class Parts:
    """Expected seconds of a call by what its kernels wait for."""

    memory: float
    issue: float
    latency: float
    gaps: float


@dataclass(frozen=True)
class Forecast:
    """tokens/s on one board, where the time of the expected case goes, and whether the planned memory fits at all."""

    board: str
    decode_tok_s: Spread
    prefill_tok_s: Spread
    decode_s: Parts
    prefill_s: Parts
    fits: bool


@dataclass(frozen=True)
class Report:
    """What does not depend on the board, and what follows for each. planned_mib leaves the driver's own memory out.

    instructions_*: of machine code, executed by threads (32 a warp).
    """

    launches_per_token: int
    weight_bytes_per_token: int
    cache_bytes_per_token: int
    macs_per_prompt_token: int
    instructions_per_token: float
    instructions_per_prompt_token: float
    planned_mib: float
    decode: tuple[Kernel, ...]
    prefill: tuple[Kernel, ...]
    boards: tuple[Forecast, ...]


def report(shape: str, bits: int, group_size: int, head_bits: int, context: int, target: Target) -> Report:
    """Compile the shape's kernels for the target and count. Raises UserError."""
    gpu = target.gpu
    assert gpu is not None
    source = shapes.RandomSource(shape, bits, group_size, head_bits)
    limit = int(shapes.settings(shape)["max_position_embeddings"])
    room = min(limit, max(2048, context + CHUNK))
    if context + CHUNK > room:
        raise UserError(f"--context is {context}, but {shape} has {limit} positions: leave {CHUNK} for the prompt.")
    activations = pipeline.default_activations(target)
    request = pipeline.Request(
        Path(), target, activations=activations, head_bits=head_bits, context=room, chunks=(CHUNK,)
    )
    model = models.build(shapes.config(shape), source.describe, pipeline.model_options(request))
    launches = lower_to_launches(pipeline.fuse(model.graph.module(), request), target)
    one, many = (next(p for p in launches.functions if p.name == name) for name in ("decode", f"prefill_{CHUNK}"))
    wanted = {step.launch.function for plan in (one, many) for step in plan.steps}
    code = [
        nvrtc.compile(kernel.source, gpu)
        for kernel in launches.kernels.values()
        if wanted & {launch.function for launch in kernel.launches}
    ]
    counted = _Counted(code, _sizes(launches, model.graph), room, CHIPS[gpu.sm])
    decode, prefill = counted.kernels(one, context, 1), counted.kernels(many, 0, CHUNK)
    weights = _weight_bytes(launches, model.graph, by_row=True)
    caches = sum(prod(a.shape) * np.dtype(a.dtype).itemsize for cache in model.caches for a in cache.arrays)
    sizes = {w.name: w.type.n * w.type.k for w in model.weights if isinstance(w, Linear)}
    planned = (_weight_bytes(launches, model.graph, by_row=False) + caches + launches.arena_bytes) / (1 << 20)
    boards = BOARDS.get(target.name, (_own(target, gpu),))
    found = tuple(forecast(board, decode, prefill, CHIPS[gpu.sm], planned) for board in boards)
    return Report(
        len(one.steps), weights, caches // room,
        sum(count for name, count in sizes.items() if for_every_token(name, len(model.caches))), _instructions(decode),
        _instructions(prefill) / CHUNK, planned, decode, prefill, found,
    )  # fmt: skip


def _instructions(kernels: Sequence[Kernel]) -> float:
    return 32 * sum(kernel.times * kernel.busy.instructions for kernel in kernels)


def _own(target: Target, gpu: Gpu) -> Board:
    return Board(target.description, gpu.multiprocessors, gpu.clock_mhz, gpu.read_mb_per_s, 1 << 20)


class _Counted:
    """Counts kernels once for their launch. sizes: bytes of the parameters, by number; caches are longer than used."""

    def __init__(
        self, code: Sequence[DeviceCode], sizes: Sequence[tuple[int, bool]], room: int, chip: Chip
    ) -> None:
        self.sizes, self.room, self.chip = sizes, room, chip
        self.resources: dict[str, Resources] = {}
        self.functions: dict[str, ptx.Function] = {}
        for made in code:
            self.resources |= made.functions
            self.functions |= ptx.functions(made.ptx.decode())

    def kernels(self, plan: FunctionPlan, position: int, tokens: int) -> tuple[Kernel, ...]:
        """Every launch of a call of `tokens` tokens at a position, equal ones once."""
        found: dict[object, tuple[Step, int]] = {}
        for step in plan.steps:
            # The same kernel reads as much, whatever layer it is in.
            key = (step.launch, tuple(self._key(place.at, place.parameter) for place in step.arguments))
            found[key] = (step, found.get(key, (step, 0))[1] + 1)
        return tuple(self._kernel(step, times, position, tokens) for step, times in found.values())

    def _key(self, at: int, parameter: bool) -> object:
        return self.sizes[at] if parameter else at in (0, HEADER)

    def _kernel(self, step: Step, times: int, position: int, tokens: int) -> Kernel:
        launch, memory = step.launch, dict[int, np.ndarray]()
        for i, place in enumerate(step.arguments):
            if not place.parameter and place.at == 0:
                memory[i] = np.array([position, tokens], np.int32)
            if not place.parameter and place.at == HEADER:
                memory[i] = np.zeros(tokens, np.int32)
        function, used = self.functions[launch.function], self.resources[launch.function]
        done = ptx_walk.walk(function, launch.grid, launch.block, memory, FOLLOWED)
        nbytes = 2 * done.stored
        for argument, loaded in done.loads.items():
            if 0 <= argument < len(step.arguments) and step.arguments[argument].parameter:
                size, cache = self.sizes[step.arguments[argument].at]
                nbytes += min(loaded, size * (position + tokens) / self.room if cache else size)
        return Kernel(
            launch.function, times, max(1, round(done.working)),
            gpu_issue.resident(prod(launch.block), launch.shared_bytes, used, self.chip), nbytes,
            gpu_issue.busy(done, gpu_issue.scale(function, used), self.chip),
        )  # fmt: skip


def forecast(board: Board, decode: Sequence[Kernel], prefill: Sequence[Kernel], chip: Chip, planned: float) -> Forecast:
    """Of a decoded token, and of a prompt's chunk, from their launches."""
    parts = [[_parts(kernels, board, chip, case) for case in range(3)] for kernels in (decode, prefill)]
    one, many = (
        Spread(*(tokens / sum(vars(made).values()) for made in row))
        for row, tokens in zip(parts, (1, CHUNK), strict=True)
    )
    return Forecast(board.name, one, many, parts[0][1], parts[1][1], planned <= board.memory_mib)


def seconds(kernel: Kernel, board: Board, chip: Chip, case: int) -> tuple[float, float, float]:
    """(memory, issue, latency) of one launch, each as if it were alone. case: 0 low, 1 expected, 2 high."""
    memory = kernel.nbytes / (SHARE[case] * board.read_mb_per_s * 1e6)
    clock = board.clock_mhz * 1e6
    # Clocks of all blocks, on the multiprocessor that gets one more than others.
    share = -(-kernel.blocks // board.multiprocessors) / kernel.blocks
    issue = kernel.busy.clocks(LINES_A_CLOCK[case]) * share / (ISSUED[case] * clock)
    waves = -(-kernel.blocks // (kernel.resident * board.multiprocessors))
    chain = kernel.busy.chain * max(1.0, chip.step / IN_FLIGHT[case]) / clock
    return memory, issue, waves * (kernel.busy.rounds * LATENCY_S[case] + chain)


def _parts(kernels: Sequence[Kernel], board: Board, chip: Chip, case: int) -> Parts:
    total = dict.fromkeys(("memory", "issue", "latency", "gaps"), 0.0)
    for kernel in kernels:
        found = dict(zip(("memory", "issue", "latency"), seconds(kernel, board, chip, case), strict=True))
        longest = max(found, key=lambda name: found[name])
        lesser = (1 - OVERLAP[case]) * min(found["memory"], found["issue"])
        total[longest] += kernel.times * (found[longest] + lesser)
        total["gaps"] += kernel.times * GAP_S[case]
    return Parts(**total)


def _weight_bytes(launches: Launches, graph: Graph, by_row: bool) -> int:
    """Bytes of the weights that decode names, packed; of tables, one row if `by_row`."""
    total = 0
    for name, shape, dtype in _parameters(graph, "decode"):
        if _cached(name):
            continue
        size, rows = _bytes(launches, name, shape, dtype)
        total += size // rows if by_row and name.partition(".")[0] in ("embedding", "rope") else size
    return total


def _sizes(launches: Launches, graph: Graph) -> list[tuple[int, bool]]:
    """(bytes, whether it is a cache) of every parameter of the launches, by number."""
    found = {}
    for function, _ in graph.module().functions_items():
        for name, shape, dtype in _parameters(graph, function.name_hint):
            found[name] = (_bytes(launches, name, shape, dtype)[0], _cached(name))
    return [found[name] for name in launches.parameters]


def _bytes(launches: Launches, name: str, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """(bytes, rows) as packed."""
    packing = launches.packings.get(name)
    if packing is not None:
        shape, dtype = packing.spec.shape, packing.spec.dtype
    return prod(shape) * np.dtype(dtype).itemsize, shape[0]


def _cached(name: str) -> bool:
    return name.endswith((".k", ".v", ".k_scale", ".v_scale"))


def _parameters(graph: Graph, function: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of every weight and cache that a function of the graph takes."""
    made = next(f for var, f in graph.module().functions_items() if var.name_hint == function)
    return [
        (p.name, ops.shape_of(p.ty), str(p.ty.dtype)) for p in made.params if p.name not in Function.INPUTS
    ]
