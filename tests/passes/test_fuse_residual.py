"""FuseResidual: the four linear layers, and what it must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R

from compiler.passes.fuse_residual import FuseResidual

FUSE: Any = FuseResidual()
X, Y = R.Tensor((2, 64), "float32"), R.Tensor((2, 16), "float32")
Weight, Codes = R.Tensor((16, 64), "uint16"), R.Tensor((16, 64), "uint8")
Scales, Zeros = R.Tensor((16, 2), "float16"), R.Tensor((16, 2), "int16")
Q, Scale, Sum = R.Tensor((2, 2, 32), "int8"), R.Tensor((2, 2), "float32"), R.Tensor((2, 2), "int32")


@I.ir_module
class Before:
    @R.function
    def dense(x: X, weight: Weight, residual: Y) -> Y:
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_dense", x, weight, ty_args=Y)
            total = R.call_pure_packed("quern.add", residual, y, ty_args=Y)
            out = total
            R.output(out)
        return out

    @R.function
    def exact(x: X, codes: Codes, scale: Scales, zero: Zeros, residual: Y) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_exact", x, codes, scale, zero, 4, 32, ty_args=Y)
            total = R.call_pure_packed("quern.add", residual, y, ty_args=Y)
            out = total
            R.output(out)
        return out

    @R.function
    def half(x: X, codes: Codes, scale: Scales, zero: Zeros, residual: Y) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_half", x, codes, scale, zero, 4, 32, ty_args=Y)
            total = R.call_pure_packed("quern.add", residual, y, ty_args=Y)
            out = total
            R.output(out)
        return out

    @R.function
    def int8(q: Q, ascale: Scale, asum: Sum, codes: Codes, scale: Scales, zero: Zeros, residual: Y) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_int8", q, ascale, asum, codes, scale, zero, 8, 32, ty_args=Y)
            total = R.call_pure_packed("quern.add", residual, y, ty_args=Y)
            out = total
            R.output(out)
        return out


@I.ir_module
class Expected:
    @R.function
    def dense(x: X, weight: Weight, residual: Y) -> Y:
        R.func_attr({"num_input": 1})
        with R.dataflow():
            total = R.call_pure_packed("quern.linear_dense_residual", x, weight, residual, ty_args=Y)
            out = total
            R.output(out)
        return out

    @R.function
    def exact(x: X, codes: Codes, scale: Scales, zero: Zeros, residual: Y) -> Y:
        with R.dataflow():
            total = R.call_pure_packed("quern.linear_exact_residual", x, codes, scale, zero, residual, 4, 32, ty_args=Y)
            out = total
            R.output(out)
        return out

    @R.function
    def half(x: X, codes: Codes, scale: Scales, zero: Zeros, residual: Y) -> Y:
        with R.dataflow():
            total = R.call_pure_packed("quern.linear_half_residual", x, codes, scale, zero, residual, 4, 32, ty_args=Y)
            out = total
            R.output(out)
        return out

    @R.function
    def int8(q: Q, ascale: Scale, asum: Sum, codes: Codes, scale: Scales, zero: Zeros, residual: Y) -> Y:
        with R.dataflow():
            total = R.call_pure_packed(
                "quern.linear_int8_residual", q, ascale, asum, codes, scale, zero, residual, 8, 32, ty_args=Y
            )
            out = total
            R.output(out)
        return out


@I.ir_module
class SecondUser:
    @R.function
    def main(x: X, weight: Weight, residual: Y) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_dense", x, weight, ty_args=Y)
            total = R.call_pure_packed("quern.add", residual, y, ty_args=Y)
            again = R.call_pure_packed("quern.add", y, total, ty_args=Y)
            out = again
            R.output(out)
        return out


@I.ir_module
class SecondUserUnderAnotherName:
    @R.function
    def main(x: X, weight: Weight, residual: Y) -> R.Tuple(Y, Y):
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_dense", x, weight, ty_args=Y)
            z = y
            total = R.call_pure_packed("quern.add", residual, z, ty_args=Y)
            both = R.call_pure_packed("quern.nothing", z, total, ty_args=R.Tuple(Y, Y))
            out = both
            R.output(out)
        return out


@I.ir_module
class WithItself:
    @R.function
    def main(x: X, weight: Weight) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_dense", x, weight, ty_args=Y)
            total = R.call_pure_packed("quern.add", y, y, ty_args=Y)
            out = total
            R.output(out)
        return out


@I.ir_module
class NoLinear:
    @R.function
    def main(gate_up: R.Tensor((2, 32), "float32"), residual: Y) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("quern.swiglu", gate_up, ty_args=Y)
            total = R.call_pure_packed("quern.add", residual, y, ty_args=Y)
            out = total
            R.output(out)
        return out


@I.ir_module
class HasResidual:
    @R.function
    def main(x: X, weight: Weight, residual: Y) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_dense_residual", x, weight, residual, ty_args=Y)
            total = R.call_pure_packed("quern.add", residual, y, ty_args=Y)
            out = total
            R.output(out)
        return out


@I.ir_module
class UnknownLinear:
    @R.function
    def main(x: X, weight: Weight, residual: Y) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("other.linear_dense", x, weight, ty_args=Y)
            total = R.call_pure_packed("quern.add", residual, y, ty_args=Y)
            out = total
            R.output(out)
        return out


def test_every_linear() -> None:
    tvm.ir.assert_structural_equal(FUSE(Before), Expected)


UNTOUCHED = {
    "second user": SecondUser,
    "added to itself": WithItself,
    "no linear": NoLinear,
    "already has one": HasResidual,
    "unknown": UnknownLinear,
    "its own result": Expected,
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_leaves_alone(case: str) -> None:
    tvm.ir.assert_structural_equal(FUSE(UNTOUCHED[case]), UNTOUCHED[case])


def test_uses_under_another_name_count() -> None:  # the other name goes, the operators stay
    script = FUSE(SecondUserUnderAnotherName).script()
    assert '"quern.linear_dense"' in script
    assert "_residual" not in script
