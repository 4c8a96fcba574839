"""verify: what each stage accepts and what it refuses, with the message."""

from __future__ import annotations

import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from compiler.graph import ops
from compiler.passes.verify import STAGES, verify

X = R.Tensor((2, 4), "float32")


@I.ir_module
class Graph:
    @R.function
    def main(x: X, y: X) -> X:
        with R.dataflow():
            z = R.call_pure_packed("quern.add", x, y, ty_args=X)
            out = z
            R.output(out)
        return out


@I.ir_module
class Scheduled:
    @T.prim_func(private=True, s_tir=True)
    def copy(x: T.Buffer((2, 4), "float32"), out: T.Buffer((2, 4), "float32")):
        for i, j in T.grid(2, 4):
            with T.sblock("copy"):
                vi, vj = T.axis.remap("SS", [i, j])
                out[vi, vj] = x[vi, vj]

    @R.function
    def main(x: X) -> X:
        cls = Scheduled
        with R.dataflow():
            y = R.call_tir(cls.copy, (x,), out_ty=X)
            out = y
            R.output(out)
        return out


@I.ir_module
class Both:
    @T.prim_func(private=True, s_tir=True)
    def copy(x: T.Buffer((2, 4), "float32"), out: T.Buffer((2, 4), "float32")):
        for i, j in T.grid(2, 4):
            with T.sblock("copy"):
                vi, vj = T.axis.remap("SS", [i, j])
                out[vi, vj] = x[vi, vj]

    @R.function
    def main(x: X) -> X:
        cls = Both
        with R.dataflow():
            y = R.call_tir(cls.copy, (x,), out_ty=X)
            z = R.call_pure_packed("quern.add", x, y, ty_args=X)
            out = z
            R.output(out)
        return out


@I.ir_module
class UnknownOperator:
    @R.function
    def main(x: X) -> X:
        with R.dataflow():
            y = R.call_pure_packed("quern.nothing", x, ty_args=X)
            out = y
            R.output(out)
        return out


@I.ir_module
class RelaxOperator:
    @R.function
    def main(x: X) -> X:
        with R.dataflow():
            y = R.nn.relu(x)
            out = y
            R.output(out)
        return out


@I.ir_module
class AConstant:
    @R.function
    def main(x: X) -> X:
        with R.dataflow():
            y = R.const(1.0, "float32")  # noqa: F841
            z = R.call_pure_packed("quern.add", x, x, ty_args=X)
            out = z
            R.output(out)
        return out


@I.ir_module
class OutsideADataflowBlock:
    @R.function
    def main(x: X) -> X:
        y = R.call_pure_packed("quern.add", x, x, ty_args=X)
        z = R.call_pure_packed("quern.add", x, y, ty_args=X)
        return z  # noqa: RET504


def undefined_variable() -> tvm.IRModule:
    x, elsewhere, out = (relax.Var(name, ops.tensor((2, 4), "float32")) for name in ("x", "elsewhere", "out"))
    body = relax.SeqExpr([relax.DataflowBlock([relax.VarBinding(out, elsewhere)])], out)
    return tvm.IRModule({"main": relax.Function([x], body, ops.tensor((2, 4), "float32"))})


@pytest.mark.parametrize("stage", STAGES)
def test_accepts(stage: str) -> None:
    verify(Scheduled if stage == "scheduled" else Graph, stage)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bad", [UnknownOperator, RelaxOperator, Both], ids=["unknown", "relax", "both kinds"])
def test_refuses_a_foreign_call(bad: tvm.IRModule, stage: str) -> None:
    said = "was not lowered" if stage == "scheduled" else "is no known operator"
    with pytest.raises(AssertionError, match=rf"(?s)^@{stage} main: R\.\w.* {said}"):
        verify(bad, stage)


def test_refuses_what_belongs_to_another_stage() -> None:
    with pytest.raises(AssertionError, match=r"^@scheduled main: R\.call_pure_packed.* was not lowered"):
        verify(Graph, "scheduled")
    with pytest.raises(AssertionError, match=r"(?s)^@fused main: .* is no known operator"):
        verify(Scheduled, "fused")


@pytest.mark.parametrize("stage", STAGES)
def test_refuses_a_constant_and_loose_bindings(stage: str) -> None:
    with pytest.raises(AssertionError, match=f"^@{stage} main: unexpected \\w*Const"):
        verify(AConstant, stage)
    with pytest.raises(AssertionError, match=f"^@{stage} main: not one dataflow block"):
        verify(OutsideADataflowBlock, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_refuses_a_module_that_is_not_well_formed(stage: str) -> None:
    with pytest.raises(ValueError, match="Var elsewhere is not defined"):
        verify(undefined_variable(), stage)


def test_refuses_a_stage_it_does_not_know() -> None:
    with pytest.raises(AssertionError, match=r"^linked"):
        verify(Graph, "linked")
