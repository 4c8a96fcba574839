"""Linear layers in fp16, one token: quantised weights times activations rounded to fp16.

    out[m, n] = (residual[m, n] +) sum_k w[n, k] * x[m, k],  w = scale * (code - zero), scale * code + offset, scale * table[code]

Operators as quern.linear_exact*, with their arguments and attributes: linear_half, linear_half_offset, linear_half_table,
each also with _residual. Layout: schedules.cuda.packed_half.
"""

from __future__ import annotations

from dataclasses import dataclass

from schedules.cuda.kernel import CudaKernel, Launch
from schedules.cuda.packed_half import Places, padded_rows, stored_bits, weight_packings
from schedules.cuda.source import Constant, source
from schedules.kernel import NotSuited, Packing, Request, Space
from schedules.packed import affine_of
from targets.target import Gpu

RANK = 10  # first of all for one token
AFFINES = {"zero": 0, "offset": 1, "table": 2}
TEXTS = {"float16": "Half", "float32": "float"}
MOST_THREADS = 256
BLOCKS_WANTED = 4  # a multiprocessor, else fewer rows share a block's activations


@dataclass(frozen=True)
class Layer:
    """An operator's call: m tokens, n outputs, codes of `bits` in `places`."""

    gpu: Gpu
    m: int
    n: int
    bits: int
    places: Places
    scale: str
    affine: str
    residual: bool
    table: tuple[float, ...]
    kind: str

    @property
    def shape_name(self) -> str:
        """Part of a kernel's name."""
        tail = ("_offset" if self.affine == "offset" else "") + ("_residual" if self.residual else "")
        shape = f"m{self.m}_n{self.n}_k{self.places.k}_g{self.places.group}_s{self.scale[5:]}{tail}"
        return f"{self.kind}_{self.gpu.arch.replace('_', '')}_{shape}"

    @property
    def packings(self) -> dict[int, Packing]:
        """Of the weight's arguments."""
        return weight_packings(1, self.n, self.places, self.scale, self.affine)

    @property
    def weight_arguments(self) -> tuple[int, ...]:
        """Places of codes, scale, and zero or offset."""
        return (1, 2) if self.affine == "table" else (1, 2, 3)

    @property
    def out(self) -> int:
        """Place of the result, behind all arguments."""
        return 1 + len(self.weight_arguments) + self.residual

    @property
    def weight_parameters(self) -> str:
        """Of a kernel's entry."""
        third = {"zero": ", const uint8_t* __restrict__ zero", "offset": ", const float* __restrict__ offset", "table": ""}
        return f"const uint32_t* __restrict__ codes, const Scale* __restrict__ scale{third[self.affine]}"

    @property
    def weight_values(self) -> str:
        """What an entry hands on: codes, scale, zero, offset."""
        return "codes, scale, " + {"zero": "zero, nullptr", "offset": "nullptr, offset", "table": "nullptr, nullptr"}[self.affine]

    def text(self, name: str, constants: dict[str, Constant], entry: str, *files: str) -> str:
        """Source of the files for this layer, with its constants and more."""
        places = self.places
        common: dict[str, Constant] = {
            "M": self.m,
            "N": self.n,
            "K": places.k,
            "BITS": places.bits,
            "GROUP": places.group,
            "WIDTH": places.width,
            "GROUPS": places.groups,
            "STORED": places.stored,
            "CHUNK": places.chunk,
            "SPAN": places.span,
            "DENSE": int(places.dense),
            "AFFINE": AFFINES[self.affine],
            "CENTRE": 1 << (self.bits - 1),
            "RESIDUAL": int(self.residual),
            "Scale": TEXTS[self.scale],
            "TABLE": self.table + (0.0,) * (16 - len(self.table)),
        }
        return source(name, common | constants, "linear_half_shared.cu", *files, entry=entry)


def layer_of(request: Request) -> Layer:
    """The request taken apart."""
    gpu = request.target.gpu
    assert gpu is not None, request.target.name
    (m, k), (n, _) = request.args[0].shape, request.args[1].shape
    bits, affine = int(request.attrs["bits"]), affine_of(request.op)
    places = Places(k, int(request.attrs["group"]), stored_bits(bits))
    kind = str(request.attrs.get("grid", f"w{bits}"))
    residual = request.op.endswith("_residual")
    return Layer(gpu, m, n, bits, places, request.args[2].dtype, affine, residual, request.table or (), kind)


def default_knobs(layer: Layer) -> dict[str, int]:
    """As many rows a block as still fill the chip: its activations are read and rounded once for all of them."""
    wanted = BLOCKS_WANTED * layer.gpu.multiprocessors
    rows = 16 if padded_rows(layer.n) // 16 >= wanted else 8
    return {"rows": rows, "threads": MOST_THREADS}


def lower(request: Request) -> CudaKernel:
    """A block for every `rows` rows."""
    layer = layer_of(request)
    if layer.m > 1:
        raise NotSuited
    knobs = default_knobs(layer) | dict(request.knobs)
    chunks = layer.places.stored // layer.places.chunk
    rounds = -(-chunks // knobs["threads"])
    threads = -(-chunks // (32 * rounds)) * 32
    name = f"linear_half_{layer.shape_name}_r{knobs['rows']}t{threads}"
    base = ", const float* __restrict__ residual" if layer.residual else ""
    entry = f"""extern "C" __global__ void __launch_bounds__(THREADS, 1)
KERNEL(const float* __restrict__ x, {layer.weight_parameters}{base}, float* __restrict__ out) {{
  run(x, {layer.weight_values}, {"residual" if layer.residual else "nullptr"}, out);
}}"""
    text = layer.text(name, {"ROWS": knobs["rows"], "THREADS": threads}, entry, "linear_half_gemv.cu")
    grid = (padded_rows(layer.n) // knobs["rows"], 1, 1)
    launch = Launch(name, grid, (threads, 1, 1), tuple(range(layer.out + 1)))
    return CudaKernel(name, text, (launch,), layer.packings)


LOWERS = {f"quern.linear_half{kind}{tail}": lower for kind in ("", "_offset", "_table") for tail in ("", "_residual")}


def space(request: Request) -> Space:
    """What tuning may try. Scale's dtype and a residual change a few bytes of the traffic: such calls share records."""
    layer = layer_of(request)
    if layer.m > 1:
        raise NotSuited
    workload: dict[str, int | str] = {"m": 1, "n": layer.n, "k": layer.places.k, "bits": layer.bits}
    workload |= {"group": layer.places.group, "kind": layer.kind}
    tried = {"rows": (8, 16), "threads": (64, 128, 256)}
    macs = layer.n * layer.places.k
    schedule = f"cuda.linear_half.{layer.gpu.arch}"
    return Space.around(default_knobs(layer), tried, schedule=schedule, workload=workload, macs=macs)


SPACES = dict.fromkeys(LOWERS, space)
