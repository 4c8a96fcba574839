"""For a GPU: every function becomes a list of launches, with a place in memory for every array. Needs stage `fused`.

Shapes are static, so nothing of a call is decided on the device's CPU: no virtual machine, only a table to walk.

Memory is one arena beside weights and caches. Its front holds what lives from call to call: the header (span i32[2],
then ids i32[tokens] from byte HEADER on, so that one copy brings both) and the hidden state that a prompt's function
leaves for the head. Behind it temporaries and results share space by lifetime, function by function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import tvm
from tvm import relax

from compiler.errors import UnsupportedError
from compiler.graph import ops
from compiler.graph.ops import Op
from compiler.passes.lower_to_schedules import Decide, Decision, key_of, request_of
from schedules.cuda.kernel import CudaKernel, Launch, lowerings
from schedules.kernel import Packing, TensorSpec, Unsupported
from targets import Target

ALIGNMENT = 256  # bytes: what cuMemAlloc promises, and more than any vector load or cp.async needs
HEADER = ALIGNMENT  # ids begin here, behind the span


@dataclass(frozen=True)
class Place:
    """Where an array lies: parameter number `at`, or byte `at` of the arena."""

    at: int
    parameter: bool = False


@dataclass(frozen=True)
class Step:
    """One launch, with places for its arguments."""

    launch: Launch
    arguments: tuple[Place, ...]


@dataclass(frozen=True)
class FunctionPlan:
    """A function as launches. It takes "ids", which lie in the header, or a "hidden" state at byte input_at.

    Its result is at byte result_at of the arena afterwards.
    """

    name: str
    takes: str
    input_at: int
    input_bytes: int
    result_at: int
    result_bytes: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Launches:
    """A whole module. `parameters` are the names of weights and caches in the order of their numbers.

    tuned: decisions that were applied, by kernel name.
    """

    functions: tuple[FunctionPlan, ...]
    parameters: tuple[str, ...]
    kernels: Mapping[str, CudaKernel]
    packings: Mapping[str, Packing]
    arena_bytes: int
    tuned: Mapping[str, Decision] = field(default_factory=dict)

    def script(self) -> str:
        """One line a launch, for people."""
        lines = [f"arena: {self.arena_bytes} bytes"]
        for plan in self.functions:
            lines.append(f"\n{plan.name}: {plan.takes} -> {plan.result_bytes} bytes at {plan.result_at}")
            for step in plan.steps:
                where = [self.parameters[p.at] if p.parameter else f"+{p.at}" for p in step.arguments]
                lines.append(
                    f"  {step.launch.function}<<<{step.launch.grid}, {step.launch.block}>>>({', '.join(where)})"
                )
        return "\n".join(lines) + "\n"


@dataclass
class _Array:
    """A temporary: its bytes, and the calls of the function between which it lives, both included."""

    nbytes: int
    first: int
    last: int
    at: int = -1


@dataclass
class _Call:
    kernel: CudaKernel
    values: list[Place | _Array]


@dataclass
class _Function:
    name: str
    calls: list[_Call] = field(default_factory=list)
    arrays: list[_Array] = field(default_factory=list)
    takes: str = "ids"
    ids: int = 0
    hidden: _Array | None = None
    result: Place | _Array | None = None
    result_bytes: int = 0


def lower_to_launches(mod: tvm.IRModule, target: Target, decide: Decide = lambda request: None) -> Launches:
    """quern.OP(args) -> launches of its CUDA kernel. `decide` gives the knobs of a request, or None for the default.

    Raises UnsupportedError where the target has no kernel for one.
    """
    made = _Lowering(target, decide)
    functions = [made.function(var.name_hint, f) for var, f in mod.functions_items() if isinstance(f, relax.Function)]
    functions.sort(key=lambda f: f.name)
    front = _up(HEADER + 4 * max((f.ids for f in functions), default=0))
    start = front + _up(max((f.result_bytes for f in functions if _leaves_hidden(f)), default=0))
    end = max((_place(f, front, start) for f in functions), default=start)
    plans = tuple(_plan(f) for f in functions)
    return Launches(plans, tuple(made.parameters), made.kernels, made.packings, end, made.tuned)


class _Lowering:
    """What the functions of a module share: kernels, layouts of weights, numbers of parameters."""

    def __init__(self, target: Target, decide: Decide) -> None:
        self.target, self.table, self.decide = target, lowerings(), decide
        self.tuned: dict[str, Decision] = {}
        self.parameters: list[str] = []
        self.kernels: dict[str, CudaKernel] = {}
        self.packings: dict[str, Packing] = {}
        self._known: dict[tuple[object, ...], CudaKernel] = {}

    def function(self, name: str, function: relax.Function) -> _Function:
        """Calls and lifetimes of one function."""
        found = _Function(name)
        values: dict[relax.Var, list[Place | _Array]] = {p: [self._parameter(p, found)] for p in function.params}
        (block,) = function.body.blocks
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.TupleGetItem):
                values[binding.var] = [values[value.tuple_value][value.index]]
            elif isinstance(value, relax.Var):
                values[binding.var] = values[value]
            else:
                op = ops.match(value)
                assert op is not None, f"@fused {name}: {value} is no known operator"
                values[binding.var] = self._call(op, values, found)
        (found.result,) = values[function.body.body]
        found.result_bytes = _nbytes(_spec(function.body.body.ty))
        _live(found.result, len(found.calls))
        return found

    def _parameter(self, var: relax.Var, function: _Function) -> Place | _Array:
        name = var.name
        if name == "span":
            return Place(0)
        if name == "ids":
            (function.ids,) = ops.shape_of(var.ty)
            return Place(HEADER)
        if name == "hidden":
            function.takes, function.hidden = "hidden", _Array(_nbytes(_spec(var.ty)), 0, 0)
            function.arrays.append(function.hidden)
            return function.hidden
        if name not in self.parameters:
            self.parameters.append(name)
        return Place(self.parameters.index(name), parameter=True)

    def _call(
        self, op: Op, values: Mapping[relax.Var, list[Place | _Array]], function: _Function
    ) -> list[Place | _Array]:
        """The places of its results, those that it updates in place included."""
        kernel, now = self._kernel(op), len(function.calls)
        given = [values[arg][0] for arg in op.args]
        for value in given:
            _live(value, now)
        written = [op.signature.args.index(arg) for arg in op.signature.inplace]
        outs = [_spec(t) for t in op.results[: len(op.results) - len(written)]]
        fresh = [_Array(_nbytes(spec), now, now) for spec in (*outs, *kernel.temporaries)]
        function.arrays += fresh
        function.calls.append(_Call(kernel, [*given, *fresh]))
        for index, packing in kernel.packings.items():
            name = op.args[index].name
            known = self.packings.setdefault(name, packing)
            assert known.name == packing.name and known.spec == packing.spec, f"{name}: {known.name} and {packing.name}"
        return [*fresh[: len(outs)], *(given[i] for i in written)]

    def _kernel(self, op: Op) -> CudaKernel:
        request = request_of(op, self.target)
        key = key_of(request)
        if key not in self._known:
            if request.op not in self.table:
                raise UnsupportedError(f"{self.target.name}: there is no CUDA kernel for {request.op}.")
            decision = self.decide(request)
            if decision is not None:
                request = replace(request, knobs=decision.knobs)
            try:
                kernel = self.table[request.op](request)
            except Unsupported as error:
                raise UnsupportedError(f"{self.target.name}: {error}") from error
            if decision is not None:
                self.tuned[kernel.name] = decision
            known = self.kernels.setdefault(kernel.name, kernel)
            assert known.source == kernel.source, f"two kernels are called {kernel.name}"
            self._known[key] = kernel
        return self._known[key]


def _leaves_hidden(function: _Function) -> bool:
    return function.name.startswith("prefill_")


def _live(value: Place | _Array, now: int) -> None:
    if isinstance(value, _Array):
        value.last = max(value.last, now)


def _place(function: _Function, front: int, start: int) -> int:
    """Give every array of a function its place, the largest first, each as low as its neighbours in time allow."""
    end, placed = start, list[_Array]()
    if _leaves_hidden(function):
        assert isinstance(function.result, _Array)
        function.result.at = front
    for array in sorted(function.arrays, key=lambda a: -a.nbytes):
        if array.at >= 0:
            continue
        others = sorted((o for o in placed if o.first <= array.last and array.first <= o.last), key=lambda o: o.at)
        at = start
        for other in others:
            if at + array.nbytes <= other.at:
                break
            at = max(at, _up(other.at + other.nbytes))
        array.at = at
        placed.append(array)
        end = max(end, _up(at + array.nbytes))
    return end


def _plan(function: _Function) -> FunctionPlan:
    def place(value: Place | _Array) -> Place:
        return value if isinstance(value, Place) else Place(value.at)

    steps = [
        Step(launch, tuple(place(call.values[i]) for i in launch.arguments))
        for call in function.calls
        for launch in call.kernel.launches
    ]
    assert function.result is not None
    taken = (0, 0) if function.hidden is None else (function.hidden.at, function.hidden.nbytes)
    left = (place(function.result).at, function.result_bytes)
    return FunctionPlan(function.name, function.takes, *taken, *left, tuple(steps))


def _spec(type_: relax.TensorType) -> TensorSpec:
    return TensorSpec(ops.shape_of(type_), str(type_.dtype))


def _nbytes(spec: TensorSpec) -> int:
    return prod(spec.shape) * tvm.DataType(spec.dtype).itemsize


def _up(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
