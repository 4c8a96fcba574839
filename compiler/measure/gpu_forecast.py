"""What a published shape will do on Jetson boards that are not at hand: a model from bytes, launches and data sheets.

    decode   seconds = bytes of weights and cache a token / (share * bandwidth) + launches * gap
    prefill  seconds of a chunk = the larger of multiplications / (efficiency * peak) and bytes / (share * bandwidth),
             + launches * gap
with share, gap and efficiency of SHARE, GAP_S and EFFICIENCY for low, expected and high. Nothing of it was measured by
quern on such a board. Published figures that the expected share can be held against: Llama-2-7B at 4 bits with MLC
reads 61 of an Orin Nano's 68 GB/s (16 tokens/s) and 178 of an AGX Orin's 205 GB/s (46.9); TinyLlama with llama.cpp
reads 4.5 of a Nano's 16.5 GB/s (6.7). Arithmetic of a token is left out: the kernels' instructions hide behind their
loads where the bandwidth is as small as here, or the forecast is too good.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import numpy as np

from compiler import models, pipeline
from compiler.errors import UserError
from compiler.graph import ops
from compiler.graph.build import Function, Graph
from compiler.graph.weights import Linear
from compiler.measure import shapes
from compiler.measure.forecast import Spread
from compiler.passes.lower_to_launches import Launches, lower_to_launches
from targets import Gpu, Target

SHARE = (0.5, 0.8, 0.92)  # of the stated bandwidth: low, expected, high
GAP_S = (10e-6, 3e-6, 1e-6)  # between two kernels: launched one by one on a slow CPU, a graph's usual, its best
EFFICIENCY = (0.1, 0.3, 0.6)  # of the peak in a prompt's matrix products
CHUNK = 128  # prompt tokens a call
# Multiply-adds of a multiprocessor in a clock, on the units that the default activations use. sm_53: 128 lanes of
# half2. sm_72: int8 tensor cores, 22 TOPS of AGX Xavier / (2 * 8 * 1.377 GHz). sm_87: 20 dense TOPS of Orin Nano /
# (2 * 8 * 0.625 GHz). sm_90: 1979 dense TOPS of H100 SXM / (2 * 132 * 1.83 GHz).
PEAK_MACS = {53: 256, 72: 1024, 87: 2048, 90: 4096}


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
class Forecast:
    """tokens/s on one board, and whether the planned memory fits into it at all."""

    board: str
    decode_tok_s: Spread
    prefill_tok_s: Spread
    fits: bool


@dataclass(frozen=True)
class Report:
    """What does not depend on the board, and what follows for each. planned_mib leaves the driver's own memory out."""

    launches_per_token: int
    weight_bytes_per_token: int
    cache_bytes_per_token: int
    macs_per_prompt_token: int
    planned_mib: float
    boards: tuple[Forecast, ...]


def report(shape: str, bits: int, group_size: int, head_bits: int, context: int, target: Target) -> Report:
    """Lower the shape for the target; nothing is compiled. Raises UserError."""
    gpu = target.gpu
    assert gpu is not None
    source = shapes.RandomSource(shape, bits, group_size, head_bits)
    limit = int(shapes.SHAPES[shape]["max_position_embeddings"])
    room = min(limit, max(2048, context + CHUNK))
    if context + CHUNK > room:
        raise UserError(f"--context is {context}, but {shape} has {limit} positions: leave {CHUNK} for the prompt.")
    activations = pipeline.default_activations(target)
    request = pipeline.Request(
        Path(), target, activations=activations, head_bits=head_bits, context=room, chunks=(CHUNK,)
    )
    model = models.build(shapes.config(shape), source.describe, pipeline.model_options(request))
    launches = lower_to_launches(pipeline.fuse(model.graph.module(), request), target)
    sizes = {w.name: w.type.n * w.type.k for w in model.weights if isinstance(w, Linear)}
    weights = _weight_bytes(launches, model.graph, by_row=True)
    caches = sum(prod(a.shape) * np.dtype(a.dtype).itemsize for cache in model.caches for a in cache.arrays)
    macs = sum(count for name, count in sizes.items() if name != "head")
    planned = (_weight_bytes(launches, model.graph, by_row=False) + caches + launches.arena_bytes) / (1 << 20)
    steps = {plan.name: len(plan.steps) for plan in launches.functions}
    read = weights + caches * context // room
    boards = BOARDS.get(target.name, (_own(target, gpu),))
    found = tuple(
        Forecast(
            board.name,
            _speeds(1, 0, read, steps["decode"], board, gpu),
            _speeds(CHUNK, macs * CHUNK, read, steps[f"prefill_{CHUNK}"], board, gpu),
            planned <= board.memory_mib,
        )
        for board in boards
    )
    return Report(steps["decode"], weights, caches // room, macs, planned, found)


def _own(target: Target, gpu: Gpu) -> Board:
    return Board(target.description, gpu.multiprocessors, gpu.clock_mhz, gpu.read_mb_per_s, 1 << 20)


def _weight_bytes(launches: Launches, graph: Graph, by_row: bool) -> int:
    """Bytes of the weights that decode names, packed; of tables, one row if `by_row`."""
    total = 0
    for name, shape, dtype in _parameters(graph, "decode"):
        packing = launches.packings.get(name)
        if packing is not None:
            shape, dtype = packing.spec.shape, packing.spec.dtype
        size = prod(shape) * np.dtype(dtype).itemsize
        total += size // shape[0] if by_row and name.partition(".")[0] in ("embedding", "rope") else size
    return total


def _parameters(graph: Graph, function: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of every weight that a function of the graph takes."""
    made = next(f for var, f in graph.module().functions_items() if var.name_hint == function)
    cached = (".k", ".v", ".k_scale", ".v_scale")
    return [
        (p.name, ops.shape_of(p.ty), str(p.ty.dtype))
        for p in made.params
        if p.name not in Function.INPUTS and not p.name.endswith(cached)
    ]


def _speeds(tokens: int, macs: int, nbytes: int, launches: int, board: Board, gpu: Gpu) -> Spread:
    """tokens/s of a call that takes `tokens` tokens."""
    peak = PEAK_MACS[gpu.sm] * board.multiprocessors * board.clock_mhz * 1e6
    seconds = [
        max(macs / (efficiency * peak), nbytes / (share * board.read_mb_per_s * 1e6)) + launches * gap
        for share, gap, efficiency in zip(SHARE, GAP_S, EFFICIENCY, strict=True)
    ]
    return Spread(*(tokens / s for s in seconds))


def show(options: argparse.Namespace, target: Target) -> None:
    """What `bench --cost model` prints for a target with a GPU."""
    head = options.head_bits or options.bits
    made = report(options.shape, options.bits, options.group_size, head, options.context, target)
    if options.json:
        asked = {"cost": "model", "shape": options.shape, "target": options.target, "bits": options.bits}
        asked |= {"group_size": options.group_size, "context": options.context}
        print(json.dumps({**asked, **asdict(made)}))  # noqa: T201
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("a model, not a measurement", "", "expected", "low", "high", box=None, pad_edge=False)
    for board in made.boards:
        rows = ((f"decode after {options.context} (tokens/s)", board.decode_tok_s), ("prefill", board.prefill_tok_s))
        for label, spread in rows:
            cells = (f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in (spread.expected, spread.low, spread.high))
            table.add_row(board.board if spread is board.decode_tok_s else "", label, *cells)
        if not board.fits:
            table.add_row("", "does not fit into its memory")
    console = Console(highlight=False, width=120)
    console.print(table)
    console.print(
        f"{made.launches_per_token} launches and {made.weight_bytes_per_token / 1e6:.1f} MB of weights a token, "
        f"{made.planned_mib:.0f} MiB planned, without the driver's own"
    )
