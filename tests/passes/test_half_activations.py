"""HalfActivations: quantised weights get fp16 activations, everything else stays."""

from __future__ import annotations

from typing import Any

import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R

from compiler.passes.half_activations import HalfActivations
from tests.passes.linears import Codes, Dense, Scales, Unknown, X, Y, Zeros

HALVE: Any = HalfActivations()
Offsets = R.Tensor((16, 4), "float32")


@I.ir_module
class Before:
    @R.function
    def zero(x: X, codes: Codes, scale: Scales, zero: Zeros) -> Y:
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_exact", x, codes, scale, zero, 4, 43, ty_args=Y)
            out = y
            R.output(out)
        return out

    @R.function
    def offset(x: X, codes: Codes, scale: Scales, offset: Offsets) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_exact_offset", x, codes, scale, offset, 4, 43, ty_args=Y)
            out = y
            R.output(out)
        return out

    @R.function
    def table(x: X, codes: Codes, scale: Scales) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_exact_table", x, codes, scale, R.str("nf4"), 4, 43, ty_args=Y)
            out = y
            R.output(out)
        return out


@I.ir_module
class Expected:
    @R.function
    def zero(x: X, codes: Codes, scale: Scales, zero: Zeros) -> Y:
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_half", x, codes, scale, zero, 4, 43, ty_args=Y)
            out = y
            R.output(out)
        return out

    @R.function
    def offset(x: X, codes: Codes, scale: Scales, offset: Offsets) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_half_offset", x, codes, scale, offset, 4, 43, ty_args=Y)
            out = y
            R.output(out)
        return out

    @R.function
    def table(x: X, codes: Codes, scale: Scales) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_half_table", x, codes, scale, R.str("nf4"), 4, 43, ty_args=Y)
            out = y
            R.output(out)
        return out


def test_every_kind_of_weight() -> None:
    tvm.ir.assert_structural_equal(HALVE(Before), Expected)


@pytest.mark.parametrize("untouched", [Dense, Unknown, Expected], ids=["dense", "unknown", "its own result"])
def test_leaves_alone(untouched: tvm.IRModule) -> None:
    tvm.ir.assert_structural_equal(HALVE(untouched), untouched)
