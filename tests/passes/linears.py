"""Types of a linear layer [16, 172] in groups of 43, and modules that no pass over quantised weights may touch."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

X, Y = R.Tensor((3, 172), "float32"), R.Tensor((3, 16), "float32")
Codes, Scales, Zeros = R.Tensor((16, 172), "uint8"), R.Tensor((16, 4), "float16"), R.Tensor((16, 4), "int16")


@I.ir_module
class Dense:
    @R.function
    def main(x: X, weight: R.Tensor((16, 172), "float16")) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("quern.linear_dense", x, weight, ty_args=Y)
            out = y
            R.output(out)
        return out


@I.ir_module
class Unknown:
    @R.function
    def main(x: X, codes: Codes, scale: Scales, zero: Zeros) -> Y:
        with R.dataflow():
            y = R.call_pure_packed("other.linear_exact", x, codes, scale, zero, 4, 43, ty_args=Y)
            out = y
            R.output(out)
        return out
