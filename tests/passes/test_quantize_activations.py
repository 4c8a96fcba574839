"""QuantizeActivations: integer weights get integer activations, everything else stays."""

from __future__ import annotations

from typing import Any

import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R

from compiler.graph import ops
from compiler.passes.quantize_activations import QuantizeActivations, quantized_types
from tests.passes.linears import Codes, Dense, Scales, Unknown, X, Y, Zeros

QUANTIZE: Any = QuantizeActivations()
Quantized = R.Tuple(R.Tensor((3, 4, 48), "int8"), R.Tensor((3, 4), "float32"), R.Tensor((3, 4), "int32"))


@I.ir_module
class Before:
    @R.function
    def main(x: X, codes: Codes, scale: Scales, zero: Zeros) -> Y:
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_exact", x, codes, scale, zero, 4, 43, ty_args=Y)
            out = y
            R.output(out)
        return out


@I.ir_module
class Expected:
    @R.function
    def main(x: X, codes: Codes, scale: Scales, zero: Zeros) -> Y:
        R.func_attr({"num_input": 1})
        with R.dataflow():
            triple = R.call_pure_packed("quern.quantize", x, 43, ty_args=Quantized)
            q = triple[0]
            ascale = triple[1]
            asum = triple[2]
            y = R.call_pure_packed("quern.linear_int8", q, ascale, asum, codes, scale, zero, 4, 43, ty_args=Y)
            out = y
            R.output(out)
        return out


def test_integer_weights() -> None:
    tvm.ir.assert_structural_equal(QUANTIZE(Before), Expected)


@pytest.mark.parametrize("untouched", [Dense, Unknown, Expected], ids=["dense", "unknown", "its own result"])
def test_leaves_alone(untouched: tvm.IRModule) -> None:
    tvm.ir.assert_structural_equal(QUANTIZE(untouched), untouched)


def test_types_by_hand() -> None:  # 704 in one group: 6 parts of 118, stored in 120
    shapes = [(ops.shape_of(t), str(t.dtype)) for t in quantized_types(2, 704, 704)]
    assert shapes == [((2, 6, 120), "int8"), ((2, 6), "float32"), ((2, 6), "int32")]
