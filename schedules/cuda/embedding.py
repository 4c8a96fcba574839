"""Rows of an embedding table, one a token, dense or in its codes, to the bit of what the CPU's kernels make.

  quern.embedding  quern.embedding_quantized  quern.embedding_quantized_offset  quern.embedding_quantized_table
A row in codes lies as on the CPU: its low plane, then its high plane, a byte's fields d / (fields a byte) inputs apart.
ids must lie in 0..vocab-1: the runtime checks them, the kernel does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from schedules import storage as storages
from schedules.cuda.elementwise import BLOCK, BLOCKS, literal
from schedules.cuda.kernel import CudaKernel, Launch, block_size
from schedules.embedding_quantized import packings, row_bytes
from schedules.kernel import Request, Space, spelled
from schedules.packed import affine_of
from schedules.storage import QUAD, Storage

ELEMENTS = {"float16": "Half", "uint16": "uint16_t", "float32": "float", "uint8": "uint8_t"}


def widened(dtype: str, address: str) -> str:
    """A dense element of that type as float: uint16 holds the bits of a bfloat16."""
    if dtype == "float16":
        return f"to_float({address})"
    return f"bits_float(uint32_t({address}) << 16)" if dtype == "uint16" else address


def field(storage: Storage, d: int, c: str) -> str:
    """C++ for the code of input `c` of a row at `row`, which has d inputs."""
    low = _plane("row", d, storage.low, c)
    if not storage.high:
        return low
    return f"({low} | {_plane(f'(row + {d * storage.low // 8})', d, storage.high, c)} << {storage.low})"


def _plane(start: str, d: int, bits: int, c: str) -> str:
    part = d * bits // 8  # bytes of the plane: as many inputs lie between two fields of a byte
    if bits == 8:
        return f"uint32_t({start}[{c}])"
    return f"(uint32_t({start}[{c} % {part}]) >> ({c} / {part} * {bits}) & {(1 << bits) - 1}u)"


def table_of(values: Sequence[float] | None, name: str) -> str:
    """A constant array of the values that codes stand for, or nothing."""
    if values is None:
        return ""
    return f"__constant__ float {name}_values[{len(values)}] = {{{', '.join(map(literal, values))}}};\n"


def lower(request: Request) -> CudaKernel:
    """Dense rows."""
    (m,), (vocab, d), dtype = request.args[0].shape, request.args[1].shape, request.args[1].dtype
    scale = float(request.attrs["scale"])
    name = f"embedding_{dtype}_m{m}_v{vocab}_d{d}" + (f"_x{spelled(scale)}" if scale != 1 else "")
    block, times = request.knobs.get("threads", BLOCK), f" * {literal(scale)}" if scale != 1 else ""
    name += f"_t{block}"
    source = f"""#include "quern.cuh"
extern "C" __global__ void {name}(const int32_t* ids, const {ELEMENTS[dtype]}* table, float* out) {{
  const int c = blockIdx.x * {block} + threadIdx.x, t = blockIdx.y;
  if (c < {d}) out[t * {d} + c] = {widened(dtype, f"table[int64_t(ids[t]) * {d} + c]")}{times};
}}
"""
    return CudaKernel(name, source, (Launch(name, (-(-d // block), m, 1), (block, 1, 1), (0, 1, 2)),))


def lower_quantized(request: Request) -> CudaKernel:
    """Rows in codes."""
    (m,), (vocab, d), scales = request.args[0].shape, request.args[1].shape, request.args[2]
    group, times = int(request.attrs["group"]), float(request.attrs["times"])
    groups, affine = scales.shape[1], affine_of(request.op)
    storage = storages.choose(int(request.attrs["bits"]), d * QUAD)
    kind = f"{request.attrs.get('grid', storage.name)}_g{group}_s{scales.dtype[5:]}"
    name = f"embedding_{kind}_{affine}_m{m}_v{vocab}_d{d}" + (f"_x{spelled(times)}" if times != 1 else "")
    block = request.knobs.get("threads", BLOCK)
    name += f"_t{block}"
    value = {
        "zero": f"float(int(code) - int(more[int64_t(id) * {groups} + c / {group}])) * factor",
        "offset": f"float(code) * factor + more[int64_t(id) * {groups} + c / {group}]",
        "table": f"{name}_values[code] * factor",
    }[affine]
    more = {"zero": "const uint8_t* more, ", "offset": "const float* more, ", "table": ""}[affine]
    source = f"""#include "quern.cuh"
{table_of(request.table, name)}extern "C" __global__ void {name}(const int32_t* ids, const uint8_t* codes,
    const {ELEMENTS[scales.dtype]}* scale, {more}float* out) {{
  const int c = blockIdx.x * {block} + threadIdx.x, t = blockIdx.y;
  if (c < {d}) {{
    const int id = ids[t];
    const uint8_t* row = codes + int64_t(id) * {row_bytes(d, storage)};
    const uint32_t code = {field(storage, d, "c")};
    const float factor = {widened(scales.dtype, f"scale[int64_t(id) * {groups} + c / {group}]")};
    out[t * {d} + c] = ({value}){f" * {literal(times)}" if times != 1 else ""};
  }}
}}
"""
    launch = Launch(name, (-(-d // block), m, 1), (block, 1, 1), tuple(range(len(request.args) + 1)))
    return CudaKernel(name, source, (launch,), packings(request, storage))


LOWERS = {
    "quern.embedding": lower,
    **{f"quern.embedding_quantized{affine}": lower_quantized for affine in ("", "_offset", "_table")},
}


def space(request: Request) -> Space:
    """Threads of a block, each of which makes one element."""
    m, d = request.outs[0].shape
    kind = str(request.attrs.get("grid", request.attrs.get("bits", request.args[1].dtype)))
    return block_size(request, "threads", BLOCK, BLOCKS, m=m, d=d, kind=kind)


SPACES = dict.fromkeys(LOWERS, space)
