"""What a token of a published shape costs on a board that is not at hand, and from that its speed. A model.

Instructions are counted, exactly (instructions.py). Cycles are llvm-mca's. Seconds follow from the target's clock,
cores and memory bandwidth, none of it measured on that board by quern:

    arithmetic = cycles of parallel kernels / (cores * clock) + cycles of the others / clock
    memory     = bytes of weights and cache a token / bandwidth
    low: 1.3 arithmetic + memory / SUSTAINED + 20 us a parallel kernel     expected: the same with 1.0 and 5 us
    high: the larger of arithmetic and memory, nothing lost
The expected sum for llama.cpp's Q4_0 (0.379 cycles, 0.5625 bytes a multiplication) gives a Raspberry Pi 4 3.0 GB/s of
weights at 1.5 GHz and 3.2 at 1.8; published are 3.1 to 3.4 (Ollama, Q4_0 and Q4_K_M, Pi 4 and Pi 400).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from compiler import models, pipeline
from compiler.codegen.build import compile_module
from compiler.errors import UserError
from compiler.graph.weights import Linear
from compiler.measure import cycles, emulator, instructions, shapes
from compiler.measure.instructions import Cost, Type
from compiler.passes.lower_to_schedules import lower_to_schedules
from targets import Target

SUSTAINED = 0.93  # of the STREAM figure that a target states: what streaming kernels get (4.5 of 4.85 GB/s on a Pi 4)
SLOW_ARITHMETIC = 1.3  # cache misses and branches that llvm-mca leaves out
FORK_S = (5e-6, 20e-6)  # one fork and join of a parallel kernel
RUNTIME_MIB = (34, 80)  # beside weights, cache, activations: TVM's runtime alone; with Python and numpy
CHUNK = 16  # prompt tokens of the call that is counted


@dataclass(frozen=True)
class Spread:
    """A forecast: expected, and from low to high."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class Forecast:
    """Speeds in tokens/s, memory in MiB, seconds to read the weights from the board's storage (None: unknown)."""

    decode_tok_s: Spread
    prefill_tok_s: Spread
    peak_mib: Spread
    load_s: float | None


@dataclass(frozen=True)
class Report:
    """Counts of one decoded token and of a prompt's chunk, and what follows where the target states its numbers."""

    decode: Cost
    prefill: Cost
    weight_bytes_per_token: int
    llvm: int | None
    forecast: Forecast | None


def report(shape: str, bits: int, group_size: int, head_bits: int, context: int, target: Target) -> Report:
    """Compile decode and one chunk of the shape for the target, run both under qemu. Raises UserError."""
    emulator.qemu(target)
    modelled = target.arch == "aarch64" and target.mcpu != "generic"
    llvm = cycles.tools()[0] if modelled else None
    source = shapes.RandomSource(shape, bits, group_size, head_bits)
    limit = int(shapes.SHAPES[shape]["max_position_embeddings"])
    room = min(limit, max(2048, context + CHUNK))
    if context + CHUNK > room:
        raise UserError(f"--context is {context}, but {shape} has {limit} positions: leave {CHUNK} for the prompt.")
    request = pipeline.Request(Path(), target, head_bits=head_bits, context=room, chunks=(CHUNK,))
    model = models.build(shapes.config(shape), source.describe, pipeline.model_options(request))
    lowered = lower_to_schedules(pipeline.fuse(model.graph.module(), request), target)
    macs = {f"{w.name}.codes": w.type.n * w.type.k for w in model.weights if isinstance(w, Linear)}
    with tempfile.TemporaryDirectory(prefix="quern-cost-") as folder:
        compiled = compile_module(lowered.mod, target)
        (code,) = (m for m in compiled.executable.mod.imports if m.kind == "llvm")
        program = instructions.link(lowered.mod, code, target, Path(folder) / "program")
        decode, prefill = (
            instructions.measure(program, lowered.mod, name, macs, context, modelled)
            for name in ("decode", f"prefill_{CHUNK}")
        )
    inputs = instructions.steps(lowered.mod, "decode").inputs
    weights = _bytes({name: t for name, t in inputs.items() if not _cached(name)})
    token = weights - _bytes({name: t for name, t in inputs.items() if _by_row(name)})
    caches = _bytes({name: t for name, t in inputs.items() if _cached(name)})
    forecast = None
    if modelled and target.clock_mhz and target.dram_read_mb_per_s:
        parallel = parallel_kernels(lowered.mod)
        read = caches * context // room
        forecast = Forecast(
            _speed(decode, parallel, token + read, target),
            _speed(prefill, parallel, token + read, target),
            _peak(weights + caches + compiled.activation_bytes),
            weights / 1e6 / target.storage_read_mb_per_s if target.storage_read_mb_per_s else None,
        )
    return Report(decode, prefill, token, llvm, forecast)


def _cached(name: str) -> bool:
    return name.endswith((".k", ".v"))


def _by_row(name: str) -> bool:
    """Tables of which a token reads one row."""
    return name.partition(".")[0] in ("embedding", "rope")


def _bytes(types: Mapping[str, Type]) -> int:
    return sum(prod(shape) * np.dtype(dtype).itemsize for shape, dtype in types.values())


def parallel_kernels(mod: tvm.IRModule) -> set[str]:
    """Names of the kernels that share their work among threads."""
    functions = ((var.name_hint, f) for var, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc))
    return {name for name, function in functions if _has_parallel_loop(function.body)}


def _has_parallel_loop(statement: Any) -> bool:
    if isinstance(statement, tvm.tirx.For) and statement.kind == tvm.tirx.ForKind.PARALLEL:
        return True
    below = [getattr(statement, part, None) for part in ("body", "block", "then_case", "else_case")]
    below += list(getattr(statement, "seq", ()))
    return any(_has_parallel_loop(part) for part in below if part is not None)


def _speed(cost: Cost, parallel: set[str], nbytes: int, target: Target) -> Spread:
    """tokens/s of one call of a function that reads `nbytes`."""
    assert target.clock_mhz and target.dram_read_mb_per_s
    hertz, forks = target.clock_mhz * 1e6, sum(n for name, n in cost.calls_by_kernel.items() if name in parallel)
    arithmetic = sum(
        n / hertz / (target.cores if name in parallel else 1) for name, n in cost.cycles_by_kernel.items()
    )
    memory = nbytes / (target.dram_read_mb_per_s * 1e6)
    low = SLOW_ARITHMETIC * arithmetic + memory / SUSTAINED + forks * FORK_S[1]
    expected = arithmetic + memory / SUSTAINED + forks * FORK_S[0]
    return Spread(*(cost.tokens / seconds for seconds in (low, expected, max(arithmetic, memory))))


def _peak(planned: int) -> Spread:
    least, most = (planned / (1 << 20) + mib for mib in RUNTIME_MIB)
    return Spread(least, (least + most) / 2, most)
