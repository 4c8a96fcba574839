"""The smallest Relax module that leaves all kinds of traces in a library: a kernel, a call to libm, VM bytecode.

main(x f32[4, 8], w f32[8, 3]) -> exp(x @ w) f32[4, 3]
"""
from __future__ import annotations

from typing import Any

import tvm
from tvm.script import ir as I
from tvm.script import relax as R

from targets import Target

# Inputs are in -1..1, a sum has 8 terms: exp's argument is off by at most 8 * 8 * 2^-24. Both expf add an ulp or two.
EXP_MATMUL_RTOL = 64 * 2.0**-24 + 4 * 2.0**-23


@I.ir_module
class ExpMatmul:
    @R.function
    def main(x: R.Tensor((4, 8), "float32"), w: R.Tensor((8, 3), "float32")) -> R.Tensor((4, 3), "float32"):
        with R.dataflow():
            y = R.exp(R.matmul(x, w))
            R.output(y)
        return y


def compiled(target: Target) -> Any:
    """The module as an executable for `target`."""
    return tvm.compile(ExpMatmul, tvm.target.Target(target.tvm_target()))
