"""fp32 activations to int8 on CUDA, alone or behind a norm or a gated activation.

  quern.quantize[_permuted], quern.rms_norm_quantize[_permuted], quern.swiglu_quantize[_permuted] and
  quern.geglu_quantize[_permuted]: arguments, results and formulas as in schedules.quantize, .rms_norm, .swiglu, .geglu.

Some lanes of a warp, a power of two, own a span, four inputs each: its largest value and its sum take a few shuffles,
and its codes leave as whole words. A block has some warps with neighbouring spans of one token. A norm's sum of
squares is found by every block anew: 16 KB from the second-level cache are quicker than a second launch. It adds up
in 4 * THREADS sums, then as a tree: the error grows with d / (4 * THREADS), not with d. Quantisation itself gives the
CPU's bits; 2^x is the CPU's polynomial in its order (schedules.vector.exp2), fused where the CPU may fuse. Bytes: 4
in (8 behind a gate) and 1.06 out for an input, in decoding all from and to caches: launching it costs more.
"""

from __future__ import annotations

from math import pi, sqrt

from schedules import vector
from schedules.cuda.kernel import CudaKernel, Launch, block_size
from schedules.cuda.source import source
from schedules.geglu import CUBIC
from schedules.geometry import Geometry
from schedules.kernel import Request, Space, spelled
from schedules.quantize import SMALLEST

WARPS, TRIED = 8, (1, 2, 4, 8, 16)  # of a block
OF_LANE = 4  # inputs
KINDS = {"quantize": 0, "rms_norm_quantize": 1, "swiglu_quantize": 2, "geglu_quantize": 3}


# What gates.cu asks for.
GATES = {
    **{f"EXP2_{i}": value for i, value in enumerate(vector.EXP2)},
    "LOG2_E": vector.LOG2_E,
    "GELU_FACTOR": -2 * sqrt(2 / pi) * vector.LOG2_E,
    "GELU_CUBED": -2 * sqrt(2 / pi) * vector.LOG2_E * CUBIC,
}


def lower(request: Request) -> CudaKernel:
    """A block of warps for neighbouring spans of a token."""
    assert request.target.gpu is not None
    permuted = request.op.endswith("_permuted")
    kind = KINDS[request.op.removeprefix("quern.").removesuffix("_permuted")]
    m, columns = request.args[0].shape
    k, group = columns // 2 if kind >= 2 else columns, int(request.attrs["group"])
    geometry, eps = Geometry(k, group), float(request.attrs.get("eps", 0.0))
    warps = request.knobs.get("warps", WARPS)
    lanes = 1 << max(0, (geometry.width // OF_LANE - 1).bit_length())
    constants = {
        "K": k, "COLUMNS": columns, "GROUP": group, "PARTS": geometry.parts, "SPAN": geometry.span, "KIND": kind,
        "WIDTH": geometry.width, "SPANS": geometry.spans, "SPAN_LANES": lanes, "WARPS": warps,
        "PERMUTED": int(permuted), "VECTOR": int(all(n % OF_LANE == 0 for n in (k, group, geometry.span))),
        "EPS": eps, "SMALLEST": SMALLEST, **GATES,
    }  # fmt: skip
    name = f"{request.op.removeprefix('quern.')}_{request.target.gpu.arch}_m{m}_k{k}_g{group}"
    name += f"_eps{spelled(eps)}" if kind == 1 else ""
    name += f"_w{warps}"
    weight, order = "const float* weight, " if kind == 1 else "", "const int32_t* order, " if permuted else ""
    entry = (
        f'extern "C" __global__ void __launch_bounds__(THREADS)\nKERNEL(const float* x, {weight}{order}int8_t* q, '
        f"float* scale, int32_t* sum) {{\n  rows(x, {'weight' if kind == 1 else 'nullptr'}, "
        f"{'order' if permuted else 'nullptr'}, q, scale, sum);\n}}"
    )
    text = source(name, constants, "gates.cu", "quantize.cu", entry=entry)
    grid = (-(-geometry.spans // (warps * (32 // lanes))), m, 1)
    launch = Launch(name, grid, (warps * 32, 1, 1), tuple(range(len(request.args) + 3)))
    return CudaKernel(name, text, (launch,))


LOWERS = {f"quern.{op}{tail}": lower for op in KINDS for tail in ("", "_permuted")}


def space(request: Request) -> Space:
    """Warps of a block. A norm's sum of squares is found by each block: fewer, larger ones repeat less of it."""
    m, columns = request.args[0].shape
    return block_size(request, "warps", WARPS, TRIED, m=m, k=columns, group=int(request.attrs["group"]))


SPACES = dict.fromkeys(LOWERS, space)
