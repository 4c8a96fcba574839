"""Linear layers in fp16, one token: quantised weights times activations rounded to fp16, sums in fp32.

    out[m, n] = (residual[m, n] +) sum_k w[n, k] * x[m, k]
    w = scale * (code - zero), or scale * code + offset, or scale * table[code]

  quern.linear_half, linear_half_offset, linear_half_table, each also with _residual: arguments and attributes of
  quern.linear_exact*. Layout: schedules.cuda.packed_half, the same for every chip and number of tokens.

A block stages the activations in shared memory: neighbouring lanes read 16 neighbouring bytes each, 8 (4) lanes bring a
chunk of 32 (16, of 8 bits) below 8 by a power of two of its own, and round it to halves. Then 8 rows are a team's, of
one warp or more; a lane has a chunk of all 8, 128 bits of a row, so a warp reads 512 consecutive bytes and every weight
is read once. code - zero is exact in fp16, a sum has 8 multiply-adds before it meets the other half of the chunk and
becomes fp32: no sum can leave fp16, |sum| <= 16 * 255 * 8 = 32640. With an offset, codes count from the middle, and the
sum of the activations (a chunk's, in fp32) meets offset + middle * scale: both parts stay small.

Bytes a weight, 4 bits in groups of 128: 0.523. Instructions for 32 weights of a row: 1 load, 20 LOP3 and shifts, 8 for
code - zero, 16 products, 9 to scale and sum, 54 in all; with its share of scales and activations 64, 2 a weight. The
whole kernel executes 2.5 by count of its PTX (2.7 of 8 bits).
What can be issued while memory brings one weight, and the ceiling of a matrix of 10^9 weights:
  Nano         16.5 GB/s   118 G lanes/s   3.7 instructions a weight     32 tokens/s
  Xavier NX    59.7 GB/s   422 G lanes/s   3.7                          114 tokens/s
  Orin Nano    68.0 GB/s   640 G lanes/s   4.9, but half2 at half rate  130 tokens/s
  H100         3350 GB/s   33.4 T lanes/s  5.2                         6400 tokens/s
so memory is the limit everywhere. A table's values come from 16 halves in shared memory, 3 instructions a weight.
Nothing of this has been timed on hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
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
MOST_CHUNKS = 256  # of a row, whose activations are in shared memory at a time: 20 KiB, so that three blocks fit
TEAM_ROWS = 8  # of a team of warps: their scales are one load
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
        third = {
            "zero": ", const uint8_t* __restrict__ zero",
            "offset": ", const float* __restrict__ offset",
            "table": "",
        }
        return f"const uint32_t* __restrict__ codes, const Scale* __restrict__ scale{third[self.affine]}"

    @property
    def weight_values(self) -> str:
        """What an entry hands on: codes, scale, zero, offset."""
        return (
            "codes, scale, "
            + {"zero": "zero, nullptr", "offset": "nullptr, offset", "table": "nullptr, nullptr"}[self.affine]
        )

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
    """As many rows a block as still fill the chip: its activations are read and rounded once for all of them. Where
    rows are few, several warps share them."""
    wanted = BLOCKS_WANTED * layer.gpu.multiprocessors
    rows = next((r for r in (64, 32, 16) if padded_rows(layer.n) // r >= wanted), TEAM_ROWS)
    teams, team = rows // TEAM_ROWS, 1
    while team * teams * 32 < MOST_THREADS and team * 32 < _chunks(layer):
        team *= 2
    return {"rows": rows, "threads": teams * team * 32}


def _chunks(layer: Layer) -> int:
    """Pieces of 128 bits in a row: more threads would have nothing to do."""
    return layer.places.stored // layer.places.chunk


def lower(request: Request) -> CudaKernel:
    """A block for every `rows` rows."""
    layer = layer_of(request)
    if layer.m > 1:
        raise NotSuited
    knobs = default_knobs(layer) | dict(request.knobs)
    rows, threads, chunks = knobs["rows"], knobs["threads"], _chunks(layer)
    slices = -(-chunks // MOST_CHUNKS)
    sizes: dict[str, Constant] = {"ROWS": rows, "THREADS": threads, "SLICE": -(-chunks // (32 * slices)) * 32}
    name = f"linear_half_{layer.shape_name}_r{rows}t{threads}"
    base = ", const float* __restrict__ residual" if layer.residual else ""
    entry = f"""extern "C" __global__ void __launch_bounds__(THREADS, 1)
KERNEL(const float* __restrict__ x, {layer.weight_parameters}{base}, float* __restrict__ out) {{
  run(x, {layer.weight_values}, {"residual" if layer.residual else "nullptr"}, out);
}}"""
    text = layer.text(name, sizes, entry, "linear_half_gemv.cu")
    launch = Launch(name, (padded_rows(layer.n) // rows, 1, 1), (threads, 1, 1), tuple(range(layer.out + 1)))
    return CudaKernel(name, text, (launch,), layer.packings)


LOWERS = {f"quern.linear_half{kind}{tail}": lower for kind in ("", "_offset", "_table") for tail in ("", "_residual")}


def workload(layer: Layer) -> dict[str, int | str]:
    """What tells calls apart for tuning. Scale's dtype and a residual change a few bytes of the traffic."""
    shape = {"m": layer.m, "n": layer.n, "k": layer.places.k, "bits": layer.bits, "group": layer.places.group}
    return {**shape, "kind": layer.kind}


def space(request: Request) -> Space:
    """What tuning may try."""
    layer = layer_of(request)
    if layer.m > 1:
        raise NotSuited
    default = default_knobs(layer)

    def allowed(knobs: Mapping[str, int]) -> bool:
        team = knobs["threads"] // 32 * TEAM_ROWS / knobs["rows"]
        return team == int(team) >= 1 and 32 * (team - 1) < _chunks(layer)

    tried = {"rows": (8, 16, 32, 64), "threads": (32, 64, 128, 256)}
    macs = layer.n * layer.places.k
    schedule = f"cuda.linear_half.{layer.gpu.arch}"
    return Space.around(default, tried, schedule=schedule, workload=workload(layer), macs=macs, allowed=allowed)


SPACES = dict.fromkeys(LOWERS, space)
