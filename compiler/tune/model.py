"""What candidates cost on a CPU that is not at hand: executed instructions, and the cycles that llvm-mca makes of them.

Every candidate is compiled for the target and called once under qemu-user, by one thread, beside nothing: its results
must be the default's, every instruction is counted, and the counts are turned into cycles by the model of the target's
pipelines (compiler.measure.cycles). No clock is asked. The figures are the same in every run and on every machine with
the same llvm-mca, so one evaluation is enough and nothing is repeated. Caches and memory are not in the model: it says
which loop is shorter on that core, never how long it takes, and it cannot see the good of a prefetch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from compiler.errors import UserError
from compiler.measure import cycles, emulator, instructions
from compiler.tune import candidates
from compiler.tune.measure import MODEL, Batch, Cost, Setting, Timing
from schedules.kernel import Kernel, Request, Space
from targets import Target

Knobs = Mapping[str, int]
ONE_THREAD = 1


def require(target: Target) -> None:
    """Raise UserError where there is no model of the target, or a tool is missing."""
    if target.gpu is not None:
        raise UserError(f"{target.name}: tune compares the kernels of CPUs, and this target computes on a GPU.")
    emulator.qemu(target)
    if target.arch != "aarch64" or target.mcpu == "generic":
        raise UserError(
            f"--cost model needs the pipeline of a core, and target {target.name!r} ({target.arch}, {target.mcpu}) has "
            f"none that is modelled here. Name a target of one core: rpi3, rpi4, rpi5."
        )
    cycles.tools()


@dataclass
class ModelMeasurer:
    """A Measurer that asks no clock. What a candidate costs is remembered while its workload is open."""

    setting: Setting
    _request: Request | None = None
    _call: candidates.Call | None = None
    _reference: list[np.ndarray] = field(default_factory=list)
    _costs: dict[tuple[tuple[str, int], ...], Cost | str] = field(default_factory=dict)

    @classmethod
    def of(cls, target: Target) -> ModelMeasurer:
        """For a target. Raises UserError as `require` does."""
        require(target)
        setting = Setting.here(ONE_THREAD)
        return cls(replace(setting, cpu=f"{target.mcpu} by llvm-mca {cycles.tools()[0]}", measured=MODEL))

    def measure(self, request: Request, space: Space, candidates: Sequence[Knobs], rounds: int) -> Batch:
        """See Measurer. There are no rounds: another one would give the same."""
        if self._request != request:
            self._open(request, space)
        assert self._call is not None
        default = self._costs[_key(space.default)]
        assert isinstance(default, Cost)
        timings = [_timing(self._cost(knobs), default) for knobs in candidates]
        return Batch(timings, _timing(default, default), [], 0, self._call.bytes_per_call)

    def close(self) -> None:
        """Forget the workload."""
        self._request = self._call = None

    def _open(self, request: Request, space: Space) -> None:
        """The default's results, which count as right, and its cost."""
        self.close()
        call = candidates.Call.of(request, space.default)
        assert isinstance(call.kernel, Kernel), "a CPU's"
        self._reference, cost = run(call.kernel, call, request)
        if not all(np.isfinite(out).all() for out in self._reference if out.dtype.kind == "f"):
            raise RuntimeError(f"{space.schedule} {dict(space.workload)}: the default's results are no numbers")
        self._request, self._call, self._costs = request, call, {_key(space.default): cost}

    def _cost(self, knobs: Knobs) -> Cost | str:
        """Or why there is none."""
        if _key(knobs) not in self._costs:
            assert self._request is not None and self._call is not None
            try:
                kernel = candidates.candidate(self._request, knobs, self._call.kernel)
                assert isinstance(kernel, Kernel), "a CPU's"
                outs, cost = run(kernel, self._call, self._request)
                candidates.check(outs, self._reference)
                self._costs[_key(knobs)] = cost
            except Exception as error:  # whatever TVM, zig and qemu make of a candidate is a result
                self._costs[_key(knobs)] = f"{type(error).__name__}: {error}"[-500:]
        return self._costs[_key(knobs)]


def run(kernel: Kernel, call: candidates.Call, request: Request) -> tuple[list[np.ndarray], Cost]:
    """One call of a kernel under qemu, with the arguments of `call`: its results, and what it cost."""
    tensors: dict[str, np.ndarray | tuple[tuple[int, ...], str]] = dict(call.arrays)
    outs = {f"out{i}": (out.shape, out.dtype) for i, out in enumerate(request.outs)}
    tensors |= outs
    with tempfile.TemporaryDirectory(prefix="quern-model-") as folder:
        made = candidates.generate({kernel.name: kernel.func}, request.target)
        (code,) = (module for module in (made.mod, *made.mod.imports) if module.kind == "llvm")
        program = emulator.link(code, [kernel.name], request.target, Path(folder) / "program")
        results, executed = program.watch(tensors, [emulator.Call(kernel.name, tuple(tensors))], list(outs))
        parts = instructions.by_function(executed, program.symbols(), {kernel.name})
    modelled = cycles.of(parts, request.target)
    return results, Cost(sum(one.count for one in parts[kernel.name]), round(modelled[kernel.name], 2))


def _timing(cost: Cost | str, default: Cost) -> Timing:
    if isinstance(cost, str):
        return Timing([], [], cost)
    return Timing([], [default.cycles / cost.cycles], cost=cost)


def _key(knobs: Knobs) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(knobs.items()))
