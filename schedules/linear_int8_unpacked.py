"""Integer linear layers for prompts on x86: codes of a block of rows are unpacked once, not for every tile.

Operators, arguments, layout of weights, sums and their order are those of schedules.linear_int8; results are equal to
the bit. How a quad of codes meets a quad of activations is the instruction set's (schedules.isa.ByQuads). A task is a
block of 16 rows with all tokens, in tiles of a few. Three bodies multiply a tile with the block:
  first   the first of many tiles: unpacks each step of codes, multiplies, and leaves the codes (or levels) and
          scales in the task's own memory: 16 rows x k bytes and more, in the second-level cache
  rest    all other tiles of a call with many: they read 64 bytes for every quad in one stream. With AVX-512 a quad of
          activations is the memory operand of its VPDPBUSD: beside the products there is a load a quad, and the scaling
  alone   every tile of a call with few: unpacks as it goes and leaves nothing, as what a task leaves costs as much as
          several tiles win
With many tiles each asks for its lines of the output and of the residual when it begins (tokens lie pages apart, so
nothing else would), and in `rest` for some of the next block's codes.
"""

from __future__ import annotations

from typing import cast

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import isa as isas
from schedules import storage as storages
from schedules.balance import balanced
from schedules.geometry import Geometry
from schedules.isa import ByQuads
from schedules.kernel import Kernel, NotSuited, Request
from schedules.linear_function import linear_function
from schedules.linear_int8 import CODES, SCALE, int8_levels
from schedules.linear_int8 import LOWERS as FAMILY
from schedules.packed import blocks, factors_of, interleave, name_tail, weight_packings
from schedules.unpacked_tile import Layer, Task

RANK = 7  # below AMX


def _suited(request: Request) -> ByQuads:
    """The instruction set. Raises NotSuited for one that does not multiply by quads, for too few tokens, for spans that
    are mostly scaling, for codes of a byte that are multiplied as they are, and tables whose levels must be signed.
    """
    m, isa = request.args[0].shape[0], isas.choose(request.target)
    if "unpacked_tokens" not in isa.KNOBS:
        raise NotSuited
    found = cast(ByQuads, isa)
    tokens, few, span = (isa.KNOBS[f"unpacked_{name}"] for name in ("tokens", "few", "span"))
    width = Geometry(request.args[CODES].shape[1], int(request.attrs["group"])).width
    planes = found.BYTE_PLANES if storages.choose(int(request.attrs["bits"]), width).bits == 8 else 0
    signed = request.table is not None and isa.TABLE_ZERO == 0
    if m % tokens or m // tokens <= few or width < span * max(1, planes) or planes == 1 or signed:
        raise NotSuited
    return found


def lower(request: Request) -> Kernel:
    """Prompt kernels of more than `unpacked_few` tiles; anybody else is asked next. No knobs."""
    isa = _suited(request)
    m, (n, k) = request.args[0].shape[0], request.args[CODES].shape
    geometry, affine = Geometry(k, int(request.attrs["group"])), factors_of(request, SCALE)
    scale_dtype, residual = request.args[SCALE].dtype, request.op.endswith("_residual")
    storage = storages.choose(int(request.attrs["bits"]), geometry.width)
    table, unit = (None, 1.0) if request.table is None else int8_levels(request.table)
    if table is not None:
        table = tuple(v + isa.TABLE_ZERO for v in table)
    kind, x = request.attrs.get("grid", storage.name), interleave(n, isa.KNOBS["row_blocks"])
    tail = name_tail(affine, residual)
    name = f"linear_{kind}a8_{isa.NAME}_unpacked_m{m}_n{n}_k{k}_g{geometry.group}_s{scale_dtype[5:]}{tail}"
    layer = Layer(m, n, geometry, storage, table, unit, x, isa.KNOBS["gemm_prefetch_bytes"], isa)
    function = linear_function(name, m, n, geometry, storage, scale_dtype, affine, residual, x)
    with IRBuilder() as builder, function as buffers, T.parallel(blocks(n)) as block:
        Task(layer, buffers, block).emit()
    return Kernel(name, balanced(builder.get()), weight_packings(CODES, n, geometry, storage, scale_dtype, affine, x))


LOWERS = dict.fromkeys(FAMILY, lower)
