"""FuseQuantize: both producers it knows, and what it must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from compiler.passes.fuse_quantize import FuseQuantize

FUSE: Any = FuseQuantize()
X, Weight, GateUp = R.Tensor((2, 64), "float32"), R.Tensor((64,), "float32"), R.Tensor((2, 128), "float32")
Q, Scale, Sum = R.Tensor((2, 2, 32), "int8"), R.Tensor((2, 2), "float32"), R.Tensor((2, 2), "int32")
Quantized = R.Tuple(Q, Scale, Sum)


@I.ir_module
class Before:
    @R.function
    def norm(x: X, weight: Weight) -> Scale:
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.call_pure_packed("quern.rms_norm", x, weight, T.float64(1e-5), ty_args=X)
            triple = R.call_pure_packed("quern.quantize", y, 32, ty_args=Quantized)
            scale = triple[1]
            out = scale
            R.output(out)
        return out

    @R.function
    def gate(gate_up: GateUp) -> Scale:
        with R.dataflow():
            y = R.call_pure_packed("quern.swiglu", gate_up, ty_args=X)
            triple = R.call_pure_packed("quern.quantize", y, 32, ty_args=Quantized)
            scale = triple[1]
            out = scale
            R.output(out)
        return out


@I.ir_module
class Expected:
    @R.function
    def norm(x: X, weight: Weight) -> Scale:
        R.func_attr({"num_input": 1})
        with R.dataflow():
            triple = R.call_pure_packed("quern.rms_norm_quantize", x, weight, T.float64(1e-5), 32, ty_args=Quantized)
            scale = triple[1]
            out = scale
            R.output(out)
        return out

    @R.function
    def gate(gate_up: GateUp) -> Scale:
        with R.dataflow():
            triple = R.call_pure_packed("quern.swiglu_quantize", gate_up, 32, ty_args=Quantized)
            scale = triple[1]
            out = scale
            R.output(out)
        return out


@I.ir_module
class SecondUser:
    @R.function
    def main(x: X, weight: Weight) -> R.Tuple(Scale, X):
        with R.dataflow():
            y = R.call_pure_packed("quern.rms_norm", x, weight, T.float64(1e-5), ty_args=X)
            triple = R.call_pure_packed("quern.quantize", y, 32, ty_args=Quantized)
            scale = triple[1]
            z = R.call_pure_packed("quern.add", x, y, ty_args=X)
            both = R.call_pure_packed("quern.nothing", scale, z, ty_args=R.Tuple(Scale, X))
            out = both
            R.output(out)
        return out


@I.ir_module
class OtherProducer:
    @R.function
    def main(x: X) -> Scale:
        with R.dataflow():
            y = R.call_pure_packed("quern.add", x, x, ty_args=X)
            triple = R.call_pure_packed("quern.quantize", y, 32, ty_args=Quantized)
            scale = triple[1]
            out = scale
            R.output(out)
        return out


@I.ir_module
class NoProducer:
    @R.function
    def main(x: X) -> Scale:
        with R.dataflow():
            triple = R.call_pure_packed("quern.quantize", x, 32, ty_args=Quantized)
            scale = triple[1]
            out = scale
            R.output(out)
        return out


@I.ir_module
class UnknownProducer:
    @R.function
    def main(x: X, weight: Weight) -> Scale:
        with R.dataflow():
            y = R.call_pure_packed("other.rms_norm", x, weight, T.float64(1e-5), ty_args=X)
            triple = R.call_pure_packed("quern.quantize", y, 32, ty_args=Quantized)
            scale = triple[1]
            out = scale
            R.output(out)
        return out


def test_norm_and_swiglu() -> None:
    tvm.ir.assert_structural_equal(FUSE(Before), Expected)


UNTOUCHED = {
    "second user": SecondUser,
    "another producer": OtherProducer,
    "no producer": NoProducer,
    "unknown producer": UnknownProducer,
    "its own result": Expected,
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_leaves_alone(case: str) -> None:
    tvm.ir.assert_structural_equal(FUSE(UNTOUCHED[case]), UNTOUCHED[case])
