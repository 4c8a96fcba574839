"""Linear layers on fp32 activations, in fp32: the path that the fast ones are compared with, and dense weights.

  quern.linear_exact[_offset|_table][_residual]  quern.linear_dense[_residual]      arguments: schedules/linear_float.py
A warp computes one output of up to TOKENS tokens: its lanes share the inputs, every weight is made fp32 once,
    w = scale * (code - zero), scale * code + offset, scale * value of the code, or the dense weight
and multiplied into each token's sum by a fused multiply-add. Sums of a lane have k / 32 terms, then five additions join
the lanes. Layout of codes: a row's planes as in schedules/embedding_quantized.py; dense weights lie as they come, and
those of two bytes are read 16 bytes at a time where rows allow it.
"""

from __future__ import annotations

from schedules import storage as storages
from schedules.cuda.embedding import ELEMENTS, table_of, widened
from schedules.cuda.kernel import CudaKernel, Launch
from schedules.embedding_quantized import packings, row_bytes
from schedules.kernel import Request, Space
from schedules.packed import affine_of
from schedules.storage import QUAD

TOKENS = 8  # sums a thread: few enough for 64 registers
WARPS = 8  # outputs a block


def default_knobs(request: Request) -> dict[str, int]:
    """The stated default."""
    return {"tokens": min(request.args[0].shape[0], TOKENS), "warps": WARPS}


def _knobs(request: Request) -> tuple[int, int, str]:
    """Tokens, warps, and both as the end of a name."""
    knobs = default_knobs(request) | dict(request.knobs)
    return knobs["tokens"], knobs["warps"], f"_t{knobs['tokens']}w{knobs['warps']}"


def _frame(name: str, tables: str, arguments: list[str], request: Request, loop: str) -> CudaKernel:
    """The kernel around a `loop` that adds to sum[u] for the token `first + u`; `row` is the output, `last` a token."""
    (m, k), n, residual = request.args[0].shape, request.outs[0].shape[1], request.op.endswith("_residual")
    tokens, warps, _ = _knobs(request)
    given = ["const float* x", *arguments, *(["const float* residual"] if residual else []), "float* out"]
    base = f"load_constant(residual + int64_t(first + u) * {n} + row) + " if residual else ""
    source = f"""#include "quern.cuh"
{tables}extern "C" __global__ void {name}({", ".join(given)}) {{
  const int lane = threadIdx.x % 32, row = blockIdx.x * {warps} + threadIdx.x / 32, first = blockIdx.y * {tokens};
  if (row >= {n}) return;  // whole warps
  float sum[{tokens}] = {{}};
  const float* own[{tokens}];  // of tokens beyond the last one, the last one's
  for (int u = 0; u < {tokens}; ++u) own[u] = x + int64_t(first + u < {m} ? first + u : {m - 1}) * {k};
{loop}
  for (int u = 0; u < {tokens}; ++u) {{
    const float total = warp_sum(sum[u]);
    if (lane == 0 && first + u < {m}) out[int64_t(first + u) * {n} + row] = {base}total;
  }}
}}
"""
    grid = (-(-n // warps), -(-m // tokens), 1)
    launch = Launch(name, grid, (32 * warps, 1, 1), tuple(range(len(request.args) + 1)))
    return CudaKernel(name, source, (launch,))


def lower_exact(request: Request) -> CudaKernel:
    """Weights in codes."""
    (m, k), (n, groups), scale = request.args[0].shape, request.args[2].shape, request.args[2].dtype
    group, affine = int(request.attrs["group"]), affine_of(request.op)
    storage = storages.choose(int(request.attrs["bits"]), k * QUAD)
    part, per = k // storage.quads, storage.per_vector
    kind = f"{request.attrs.get('grid', storage.name)}_{affine}" + "_residual" * request.op.endswith("_residual")
    tokens, _, chosen = _knobs(request)
    name = f"linear_exact_{kind}_m{m}_n{n}_k{k}_g{group}_s{scale[5:]}{chosen}"
    lines = []
    for segment in range(storage.quads):  # inputs segment * part + j, whose fields have one place in each plane
        low, shift = segment % (storage.quads // per) * part, segment * per // storage.quads * storage.low
        code = f"uint32_t(codes_of[{low} + j]) >> {shift} & {(1 << storage.low) - 1}u"
        if storage.high:
            high = f"uint32_t(codes_of[{k * storage.low // 8} + j]) >> {segment * storage.high}"
            code = f"({code}) | ({high} & {(1 << storage.high) - 1}u) << {storage.low}"
        weight = {
            "zero": "float(int(code) - int(more_of[g])) * factor",
            "offset": "fmaf(float(code), factor, more_of[g])",
            "table": f"{name}_values[code] * factor",
        }[affine]
        lines.append(f"""    {{
      const int c = {segment * part} + j, g = c / {group};
      const uint32_t code = {code};
      const float factor = {widened(scale, "scale_of[g]")};
      const float w = {weight};
      for (int u = 0; u < {tokens}; ++u) sum[u] = fmaf(w, load_constant(own[u] + c), sum[u]);
    }}""")
    more = {"zero": ["const uint8_t* more"], "offset": ["const float* more"], "table": []}[affine]
    loop = f"""  const uint8_t* codes_of = codes + int64_t(row) * {row_bytes(k, storage)};
  const {ELEMENTS[scale]}* scale_of = scale + int64_t(row) * {groups};
"""
    loop += f"  const auto* more_of = more + int64_t(row) * {groups};\n" if more else ""
    loop += f"  for (int j = lane; j < {part}; j += 32) {{\n" + "\n".join(lines) + "\n  }"
    arguments = ["const uint8_t* codes", f"const {ELEMENTS[scale]}* scale", *more]
    made = _frame(name, table_of(request.table, name), arguments, request, loop)
    return CudaKernel(name, made.source, made.launches, packings(request, storage))


def lower_dense(request: Request) -> CudaKernel:
    """Weights as the checkpoint has them."""
    (m, k), (n, _), dtype = request.args[0].shape, request.args[1].shape, request.args[1].dtype
    kind = {"float16": "f16", "uint16": "bf16", "float32": "f32"}[dtype] + "_residual" * request.op.endswith(
        "_residual"
    )
    tokens, _, chosen = _knobs(request)
    name = f"linear_dense_{kind}_m{m}_n{n}_k{k}{chosen}"
    loop = f"  const {ELEMENTS[dtype]}* weights = weight + int64_t(row) * {k};\n"
    if dtype == "float32" or k % 8:
        loop += f"""  for (int c = lane; c < {k}; c += 32) {{
    const float w = {widened(dtype, "weights[c]")};
    for (int u = 0; u < {tokens}; ++u) sum[u] = fmaf(w, load_constant(own[u] + c), sum[u]);
  }}"""
    else:
        halves = ("to_float(low_half(Half2{words[i]}))", "to_float(high_half(Half2{words[i]}))")
        if dtype == "uint16":
            halves = ("bits_float(words[i] << 16)", "bits_float(words[i] & 0xffff0000u)")
        loop += f"""  for (int c = 8 * lane; c < {k}; c += 256) {{
    const uint4 eight = load_stream(reinterpret_cast<const uint4*>(weights + c));
    const uint32_t words[4] = {{eight.x, eight.y, eight.z, eight.w}};
    for (int i = 0; i < 4; ++i) {{
      const float even = {halves[0]}, odd = {halves[1]};
      for (int u = 0; u < {tokens}; ++u) {{
        const uint2 pair = load_constant(reinterpret_cast<const uint2*>(own[u] + c) + i);
        sum[u] = fmaf(odd, bits_float(pair.y), fmaf(even, bits_float(pair.x), sum[u]));
      }}
    }}
  }}"""
    return _frame(name, "", [f"const {ELEMENTS[dtype]}* weight"], request, loop)


LOWERS = {
    f"quern.linear_exact{affine}{tail}": lower_exact
    for affine in ("", "_offset", "_table")
    for tail in ("", "_residual")
}
LOWERS |= {f"quern.linear_dense{tail}": lower_dense for tail in ("", "_residual")}


def space(request: Request) -> Space:
    """What tuning may try: tokens that share a weight, and outputs that share a block. A residual changes little."""
    (m, k), n = request.args[0].shape, request.outs[0].shape[1]
    kind, _, affine = request.op.removeprefix("quern.linear_").removesuffix("_residual").partition("_")
    workload: dict[str, int | str] = {"m": m, "n": n, "k": k, "kind": affine or "zero"}
    if kind == "dense":
        workload["kind"] = request.args[1].dtype
    else:
        workload |= {"bits": int(request.attrs["bits"]), "group": int(request.attrs["group"])}
        workload["kind"] = str(request.attrs.get("grid", workload["kind"]))
    gpu = request.target.gpu
    assert gpu is not None, request.target.name
    # Not 16 warps: nothing bounds the registers, and sm_53 gives a block 32 K, 64 for each of 512 threads.
    tried = {"tokens": tuple(t for t in (1, 2, 4, 8, 16) if t <= m), "warps": (2, 4, 8)}
    return Space.around(
        default_knobs(request), tried, schedule=f"cuda.linear_{kind}.{gpu.arch}", workload=workload, macs=m * n * k
    )


SPACES = dict.fromkeys(LOWERS, space)
