"""What a token of a published shape costs on a board that is not at hand: compiled for it, counted under qemu."""

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
from compiler.measure import cycles, emulator, forecast, instructions, shapes
from compiler.measure.forecast import Forecast, Work
from compiler.measure.instructions import Cost, Type
from compiler.passes.lower_to_schedules import lower_to_schedules
from targets import Target

CHUNK = 16  # prompt tokens that are counted; each of a call of 128 costs as much, and reads weights for an eighth


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
    limit = int(shapes.settings(shape)["max_position_embeddings"])
    room = min(limit, max(2048, context + CHUNK))
    if context + CHUNK > room:
        raise UserError(f"--context is {context}, but {shape} has {limit} positions: leave {CHUNK} for the prompt.")
    request = pipeline.Request(Path(), target, head_bits=head_bits, context=room)
    model = models.build(shapes.config(shape), source.describe, pipeline.model_options(request))
    lowered = lower_to_schedules(pipeline.fuse(model.graph.module(), request), target)
    macs = {f"{w.name}.codes": w.type.n * w.type.k for w in model.weights if isinstance(w, Linear)}
    with tempfile.TemporaryDirectory(prefix="quern-cost-") as folder:
        compiled = compile_module(lowered.mod, target)
        (code,) = (m for m in compiled.executable.mod.imports if m.kind == "llvm")
        program = instructions.link(lowered.mod, code, target, Path(folder) / "program")
        decode, prefill = (
            instructions.measure(program, lowered.mod, name, macs, context, tokens, modelled)
            for name, tokens in (("decode", 1), (f"prefill_{max(request.prompt_tokens)}", CHUNK))
        )
    inputs = instructions.steps(lowered.mod, "decode").inputs
    weights = _bytes({name: t for name, t in inputs.items() if not _cached(name)})
    token = weights - _bytes({name: t for name, t in inputs.items() if _by_row(name)})
    caches = _bytes({name: t for name, t in inputs.items() if _cached(name)})
    made = None
    if modelled and forecast.known(target):
        parallel = parallel_kernels(lowered.mod)
        read = token + caches * context // room
        one = _work(decode, parallel, read)
        many = _work(prefill, parallel, read, max(request.prompt_tokens) // CHUNK)
        made = forecast.forecast(one, many, weights + caches + compiled.activation_bytes, weights, target)
    return Report(decode, prefill, token, llvm, made)


def _work(cost: Cost, parallel: set[str], nbytes: int, times: int = 1) -> Work:
    """What one call of `times` the tokens does: kernels in `parallel` share their work among threads, others do not."""
    cycles_of = {name: n * (1 if name in cost.single else times) for name, n in cost.cycles_by_kernel.items()}
    shared = sum(n for name, n in cycles_of.items() if name in parallel)
    own = sum(n for name, n in cycles_of.items() if name not in parallel)
    launches = sum(n for name, n in cost.calls_by_kernel.items() if name in parallel)
    return Work(cost.tokens * times, shared, own, launches, nbytes)


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
