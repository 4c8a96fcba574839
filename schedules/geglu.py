"""GeGLU's elementwise half (GELU by tanh, as Gemma has it), alone or with the quantisation that follows it.

  quern.geglu           gate_up f32[m, 2f] -> f32[m, f]      columns 0..f-1 are the gate, f..2f-1 are up
  quern.geglu_quantize  gate_up f32[m, 2f]; group -> as quern.quantize with k = f

    u = sqrt(2 / pi) * (gate + 0.044715 gate^3)
    out = gate * (1 + tanh(u)) / 2 * up = gate / (1 + 2^(-2 u log2 e)) * up
fp32; the error of the sigmoid is that of schedules.swiglu with 2 |u| in place of |gate|. Method: arXiv:1606.08415.
"""

from __future__ import annotations

from math import pi, sqrt

from schedules import vector
from schedules.kernel import Kernel, Request
from schedules.swiglu import gated
from schedules.vector import Expr

CUBIC = 0.044715


def _gelu_tanh(gate: Expr, lanes: int) -> Expr:
    """The exponent of sigmoid(2 u)."""
    factor = -2 * sqrt(2 / pi) * vector.LOG2_E
    cubic = gate * gate * vector.splat(factor * CUBIC, lanes) + vector.splat(factor, lanes)
    return gate * cubic


def lower(request: Request) -> Kernel:
    """GeGLU."""
    return gated(request, "geglu", _gelu_tanh)


LOWERS = {"quern.geglu": lower, "quern.geglu_quantize": lower, "quern.geglu_quantize_permuted": lower}
