"""What a token costs on a board that is not at hand: executed instructions and modelled cycles a multiplication.

The kernels of a function (decode, prefill_M) run in the order of the compiled graph under qemu-user, where every
instruction is counted; llvm-mca turns the counts into cycles. Threads share the work of a kernel on the board; here one
does it all. Weights are zeros, which cost no memory: kernels do not branch on values, and random weights gave the same
count to the instruction. The virtual machine that calls the kernels is not in it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from compiler.graph import ops
from compiler.measure import cycles, emulator
from compiler.measure.emulator import Call, Executed, Program
from targets import Target


@dataclass(frozen=True)
class Cost:
    """Totals of one call of a function. `cycles` is None where LLVM has no model of the target's core.

    single: kernels that compute one row, whatever the number of tokens.
    """

    tokens: int
    macs: int
    instructions: int
    cycles: float | None
    instructions_by_kernel: Mapping[str, int]
    cycles_by_kernel: Mapping[str, float]
    macs_by_kernel: Mapping[str, int]
    calls_by_kernel: Mapping[str, int]
    single: frozenset[str] = frozenset()

    @property
    def instructions_per_mac(self) -> float:
        """Everything that ran, over the multiplications of the weights alone."""
        return self.instructions / self.macs

    @property
    def cycles_per_mac(self) -> float | None:
        """The same of the modelled cycles."""
        return None if self.cycles is None else self.cycles / self.macs

    @property
    def largest(self) -> str:
        """The linear kernel that multiplies most."""
        return max(self.macs_by_kernel, key=self.macs_by_kernel.__getitem__)

    def of_kernel(self, name: str) -> tuple[float, float | None]:
        """(instructions, cycles) a multiplication of one linear kernel."""
        macs, modelled = self.macs_by_kernel[name], self.cycles_by_kernel.get(name)
        return self.instructions_by_kernel[name] / macs, None if modelled is None else modelled / macs


Type = tuple[tuple[int, ...], str]


@dataclass(frozen=True)
class Steps:
    """The kernel calls of one function in order; types of its parameters and of what its kernels write, by name."""

    calls: tuple[Call, ...]
    inputs: Mapping[str, Type]
    results: Mapping[str, Type]


def steps(mod: tvm.IRModule, function: str) -> Steps:
    """Read them off the straight line of a function of stage `scheduled`."""
    body = mod[function]
    names: dict[Any, tuple[str, ...]] = {p: (p.name,) for p in body.params}
    inputs = {p.name: _type(p.ty) for p in body.params}
    results: dict[str, Type] = {}
    calls = []
    for binding in (b for block in body.body.blocks for b in block.bindings):
        value = binding.value
        if isinstance(value, relax.TupleGetItem):
            names[binding.var] = (names[value.tuple_value][value.index],)
        elif isinstance(value, relax.Var):
            names[binding.var] = names[value]
        else:
            kernel, args = value.args[0], [names[arg][0] for arg in value.args[1].fields]
            types = list(value.ty.fields) if isinstance(value.ty, relax.TupleType) else [value.ty]
            inplace = value.attrs.inplace_indices if value.op.name == "relax.call_tir_inplace" else [-1] * len(types)
            made = []
            for i, (type_, index) in enumerate(zip(types, inplace, strict=True)):
                name = args[index] if index >= 0 else f"{binding.var.name}.{i}"
                if index < 0:
                    results[name] = _type(type_)
                made.append((name, index < 0))
            calls.append(Call(str(kernel.name_hint), (*args, *(name for name, fresh in made if fresh))))
            names[binding.var] = tuple(name for name, _ in made)
    return Steps(tuple(calls), inputs, results)


def _type(type_: relax.TensorType) -> Type:
    return ops.shape_of(type_), str(type_.dtype)


def link(mod: tvm.IRModule, llvm: Any, target: Target, out: Path) -> Program:
    """All kernels of a scheduled module with the driver."""
    kernels = [var.name_hint for var, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    return emulator.link(llvm, kernels, target, out)


def measure(
    program: Program, mod: tvm.IRModule, function: str, macs: Mapping[str, int], context: int, tokens: int,
    cycles_too: bool = True,
) -> Cost:  # fmt: skip
    """One call of `function` for `tokens` after `context` others, weights all zero. macs: a row's, by parameter.

    Kernels of one row, of a prompt's last one, multiply for that alone.
    """
    found = steps(mod, function)
    span = np.array([context, tokens], "int32")
    tensors: dict[str, np.ndarray | Type] = {**found.inputs, **found.results, "span": span}
    executed = program.count(tensors, found.calls)
    kernels = [call.kernel for call in found.calls]
    by_kernel = by_function(executed, program.symbols(), set(kernels))
    modelled = cycles.of(by_kernel, program.target) if cycles_too else {}
    work: Counter[str] = Counter()
    rows = {call.kernel: found.results[call.args[-1]][0][0] for call in found.calls}
    for call in found.calls:
        work[call.kernel] += min(rows[call.kernel], tokens) * sum(macs.get(arg, 0) for arg in call.args)
    counts = {name: sum(e.count for e in part) for name, part in by_kernel.items()}
    return Cost(
        tokens, sum(work.values()), sum(counts.values()), sum(modelled.values()) if cycles_too else None,
        counts, modelled, {name: n for name, n in work.items() if n}, Counter(kernels),
        frozenset(name for name, count in rows.items() if count == 1),
    )  # fmt: skip


def by_function(
    executed: Sequence[Executed], symbols: Sequence[tuple[int, str]], kernels: set[str]
) -> dict[str, list[Executed]]:
    """What each kernel executed: its wrapper, its body, and the unnamed bodies of its parallel loops behind it."""
    starts = [address for address, _ in symbols]
    found: dict[str, list[Executed]] = {}
    for one in executed:
        at = bisect_right(starts, one.address) - 1
        name = symbols[at][1].removeprefix("__tvm_ffi_").removesuffix("_compute_") if at >= 0 else ""
        if name in kernels:
            found.setdefault(name, []).append(one)
    return found
