"""Integer linear layers of one or a few tokens: dot products of four bytes (dp4a), weights read once in 16-byte pieces.

The operators and their formula are those of schedules.linear_int8; layout: schedules.cuda.packed. A warp works on a
block of four rows, or on a part of one (`split` warps share the inputs). Its lanes take neighbouring pieces of 16
bytes, 512 bytes an instruction; a lane's `run` pieces belong to one span, so it scales four integers for up to 128
codes.

Sums are exact: integers of a span stay below 2^22 (4 bits: 15 * 127 * 128 and a zero's part of the same size; 8 bits
are stored minus 128: 128 * 127 * 32 in a lane, 128 * 127 * 128 for the zero), so that 1.5 * 2^23 + integer is, as the
bits of an fp32, exactly that number: no conversion instruction, which runs at a quarter of the rate. Across spans
fp32, lanes by lanes and then as a tree; within a span the CPU's operations.

Bytes and instructions at 4 bits, groups of 128 (32), one token. A weight is 4.19 (4.75) bits with its scale in fp16 and
its zero. A thread's run of 32 codes of four rows is 4 loads of 16 bytes, 4 of activations, 32 dp4a, 32 masks, and
scaling: 4 rows x (3 integer, 5 fp32) and 2 loads; with addresses 178 instructions of PTX: 1.4 a weight, 0.9 of them
integer. Tables take 2.9, 2.5 of them integer, for the permutations that look levels up. 16 codes of 8 bits take 118.
What a multiprocessor may spend on a weight at the memory's speed (128 lanes a clock, 64 of them integer), and what must
be on its way from memory if that answers after 0.7 us:
                     bytes/clock  weights/clock  instructions  integer  in flight
  Orin Nano              13.6         26             4.9         2.5      5.9 KB
  AGX Orin 64 GB          9.8         19             6.7         3.4      9.0 KB
  Xavier NX               9.0         17             7.5         3.8      7.0 KB
  H100                   12.8         24             5.3         2.6     17.8 KB
So memory is the limit by a factor of 2.7 at least (tables: 1), where enough bytes are on their way: a lane asks for
`loads` pieces before it needs the first one, that is 4 KB a warp at 8, and before the block's activations are staged
in shared memory. At 128 registers 16 warps are resident: 64 KB. (A bound of 80 spills on some shapes.)
The ceiling of a call is its bytes / read_mb_per_s; activations come on top from the second-level cache, a byte for
each 16 of a block's weights (8 warps, `split` 1). sm_53 has no dp4a: a multiply-add an input, 3.6 instructions of PTX
a weight against 128 lanes * 921 MHz / 31 G weights a second = 3.8: right, and not the mode to take there. None of
this has been timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from schedules.cuda.kernel import CudaKernel, Dim3, Launch
from schedules.cuda.packed import LANES, MOST_RUN, ROWS, Layout, blocks, storage_bits, weight_packings
from schedules.cuda.source import source
from schedules.geometry import Geometry
from schedules.kernel import Packing, Request, Space
from schedules.linear_int8 import int8_levels
from schedules.packed import affine_of
from targets.target import Gpu

COMMON = "linear_int8_common.cu"
CODES, SCALE = 3, 4  # argument positions of the weight; its zero or offset is next
DP4A = 61  # the first compute capability with it
SHARED_MOST = 40 << 10  # bytes of activations that a block stages; beyond, lanes read them from the cache
MOST_AHEAD = 4  # runs that a lane asks for at once
WARPS_A_MULTIPROCESSOR = 32  # that the default wants: two for each that is resident


@dataclass(frozen=True)
class Call:
    """What the kernels of a linear layer need to know of a request."""

    request: Request
    m: int
    n: int
    layout: Layout
    affine: str
    residual: bool

    @property
    def gpu(self) -> Gpu:
        """The chip; targets without one are lowered elsewhere."""
        assert self.request.target.gpu is not None
        return self.request.target.gpu

    @property
    def scale(self) -> str:
        """dtype of the weight's scales."""
        return self.request.args[SCALE].dtype

    def packings(self) -> dict[int, Packing]:
        """The weight arguments' layouts."""
        return weight_packings(CODES, self.n, self.layout, self.scale, self.affine)

    def name(self, family: str, knobs: Mapping[str, int]) -> str:
        """Family, shape and kind, then the knobs by their first letters, as a C identifier."""
        request, geometry = self.request, self.layout.geometry
        kind = request.attrs.get("grid", f"w{self.layout.bits}")
        more = ("_offset" if self.affine == "offset" else "") + ("_residual" if self.residual else "")
        shape = f"m{self.m}_n{self.n}_k{geometry.k}_g{geometry.group}_s{self.scale[5:]}"
        chosen = "".join(f"{name[0]}{value}" for name, value in knobs.items())
        return f"linear_{kind}a8_{family}_{self.gpu.arch.replace('_', '')}_{shape}{more}_{chosen}"

    def kernel(
        self, name: str, files: tuple[str, ...], sizes: Mapping[str, int], grid: Dim3, warps: int, resident: int,
        shared: int = 0,
    ) -> CudaKernel:  # fmt: skip
        """The function of `files`, one launch of it.

        resident: warps that a multiprocessor must have registers for. Without a bound ptxas spills rather than take
        more than it likes.
        """
        layout, geometry = self.layout, self.layout.geometry
        constants: dict[str, int | float | str] = {
            "M": self.m, "N": self.n, "SPANS": geometry.spans, "WIDTH": geometry.width, "BITS": layout.bits,
            "UNITS": layout.units, "RUN": layout.run, "SLOTS": layout.slots, "TILES": layout.tiles,
            "POSITIONS": layout.positions, "ROW_BLOCKS": blocks(self.n), "ROWS": ROWS,
            "ZERO": int(self.affine == "zero"), "OFFSET": int(self.affine == "offset"),
            "TABLE": int(self.affine == "table"), "RESIDUAL": int(self.residual),
            "HALF_SCALE": int(self.scale == "float16"), **sizes, **self._table(),
        }  # fmt: skip
        third = {"zero": "const uint32_t* zero, ", "offset": "const uint4* offset, ", "table": ""}[self.affine]
        base = "const float* residual, " if self.residual else ""
        given = [self.affine == "zero" and "zero", self.affine == "offset" and "offset", self.residual and "residual"]
        bounds = f"THREADS, {max(1, resident // warps)}"
        entry = (
            f'extern "C" __global__ void __launch_bounds__({bounds})\nKERNEL(const int8_t* q, const float* ascale, '
            f"const int32_t* asum, const uint4* codes, const Scales* scale,\n{third}{base}float* out) {{\n"
            f"  layer({{q, ascale, asum, codes, scale, {', '.join(each or 'nullptr' for each in given)}, out}});\n}}"
        )
        launch = Launch(name, grid, (warps * LANES, 1, 1), tuple(range(len(self.request.args) + 1)), shared)
        return CudaKernel(name, source(name, constants, COMMON, *files, entry=entry), (launch,), self.packings())

    def _table(self) -> dict[str, int | float | str]:
        """The int8 levels of a table grid as four words, and the value of one level."""
        levels, unit = int8_levels(self.request.table) if self.request.table is not None else ((0,) * 16, 1.0)
        words = np.array(levels, np.int8).view("<i4").tolist()
        return {"UNIT": unit, **{f"LEVELS_{i}": word for i, word in enumerate(words)}}


def read(request: Request) -> Call:
    """Shapes and kind of a quern.linear_int8* call."""
    n, k = request.args[CODES].shape
    layout = Layout(Geometry(k, int(request.attrs["group"])), storage_bits(int(request.attrs["bits"])))
    residual = request.op.endswith("_residual")
    return Call(request, request.args[0].shape[0], n, layout, affine_of(request.op), residual)


def default_knobs(call: Call) -> dict[str, int]:
    """One token: the fewest warps a row block that still fill the device; each keeps 8 loads of a lane under way.

    Up to 4 tokens share what is unpacked; more make the registers of a thread scarce.
    """
    wanted, split = call.gpu.multiprocessors * WARPS_A_MULTIPROCESSOR, 1
    tokens = min(call.m, 4)
    while 2 * split <= min(8, call.layout.tiles) and blocks(call.n) * split < wanted:
        split *= 2
    loads = min(8 if tokens == 1 else 4, MOST_AHEAD * call.layout.run)
    return {"warps": 8, "split": split, "loads": loads, "tokens": tokens}


def _reads_ahead(call: Call, tokens: int) -> bool:
    """Whether a lane asks for several runs at once.

    Short runs have a scale for each load: several of them for several tokens would take too many registers. So do the
    many products that stand for a dp4a.
    """
    return call.gpu.sm >= DP4A and (tokens == 1 or call.layout.run == MOST_RUN)


def lower(request: Request) -> CudaKernel:
    """A block of warps a few row blocks, for some tokens."""
    call = read(request)
    knobs = default_knobs(call) | dict(request.knobs)
    tokens, warps, split = knobs["tokens"], knobs["warps"], knobs["split"]
    geometry, run = call.layout.geometry, call.layout.run
    ahead = max(1, min(MOST_AHEAD, knobs["loads"] // run)) if _reads_ahead(call, tokens) else 1
    sizes = {
        "TOKENS": tokens, "WARPS": warps, "SPLIT": split, "AHEAD": ahead,
        "STAGED": int(tokens * geometry.spans * (geometry.width + 8) <= SHARED_MOST),
    }  # fmt: skip
    grid = (-(-blocks(call.n) // (warps // split)), -(-call.m // tokens), 1)
    resident = 16 if call.gpu.sm >= DP4A and tokens == 1 and run == MOST_RUN and knobs["loads"] <= 8 else 8
    return call.kernel(call.name("dp4a", knobs), ("linear_int8.cu",), sizes, grid, warps, resident)


LOWERS = {
    f"quern.linear_int8{affine}{tail}": lower for affine in ("", "_offset", "_table") for tail in ("", "_residual")
}


def workload(call: Call) -> dict[str, int | str]:
    """What tells calls apart for tuning, as on CPUs: a scale's dtype and a residual change few bytes of the traffic."""
    geometry, attrs = call.layout.geometry, call.request.attrs
    shape = {"m": call.m, "n": call.n, "k": geometry.k, "bits": int(attrs["bits"]), "group": geometry.group}
    return shape | {"kind": str(attrs.get("grid", call.affine))}


def _held(call: Call, knobs: Mapping[str, int]) -> bool:
    """Whether a block's registers hold it: sm_53 gives it 32 K, 64 for each thread of 16 warps, others twice that.

    ptxas wants 253 for 8 tokens without dp4a, 127 for 4, 64 for 2; with it up to 254 for 4 tokens and 4 runs ahead.
    """
    tokens, warps = knobs["tokens"], knobs["warps"]
    if call.gpu.sm < DP4A:
        return tokens * warps <= 32
    return warps <= 8 or tokens * min(MOST_AHEAD, knobs["loads"] // call.layout.run) <= 8


def space(request: Request) -> Space:
    """What tuning may try."""
    call = read(request)
    default, run = default_knobs(call), call.layout.run

    def allowed(knobs: Mapping[str, int]) -> bool:
        some = run <= knobs["loads"] <= MOST_AHEAD * run
        loads = some if _reads_ahead(call, knobs["tokens"]) else knobs["loads"] == default["loads"]
        return knobs["split"] <= knobs["warps"] and loads and _held(call, knobs)

    tried = {
        "warps": (2, 4, 8, 16),
        "split": tuple(s for s in (1, 2, 4, 8) if s <= call.layout.tiles),
        "loads": (4, 8, 16),
        "tokens": tuple(t for t in (1, 2, 4, 8) if t <= call.m),
    }
    macs = call.m * call.n * call.layout.geometry.k
    return Space.around(
        default, tried, schedule=f"cuda.linear_int8.{call.gpu.arch}", workload=workload(call),
        macs=macs, allowed=allowed,
    )  # fmt: skip


SPACES = dict.fromkeys(LOWERS, space)
