"""Integer linear layers of one or a few tokens: dot products of four bytes (dp4a), weights read once in 16-byte pieces.

The operators and their formula are those of schedules.linear_int8; layout: schedules.cuda.packed. A warp works on a
block of four rows, or on a part of one (`split` warps share the inputs). Its lanes take neighbouring pieces of 16 bytes,
512 bytes an instruction; a lane's `run` pieces belong to one span, so it scales four integers for up to 128 codes.

Sums are exact: integers of a span stay below 2^22 (4 bits: 15 * 127 * 128 and a zero's part of the same size; 8 bits are
stored minus 128: 128 * 127 * 32 in a lane, 128 * 127 * 128 for the zero), so that 1.5 * 2^23 + integer is, as the bits
of an fp32, exactly that number: no conversion instruction, which runs at a quarter of the rate. Across spans fp32, lanes
by lanes and then as a tree; within a span the CPU's operations.

Bytes and instructions at 4 bits, groups of 128 (32), one token. A weight is 4.19 (4.75) bits with its scale in fp16 and
its zero. A thread's run of 128 codes is 4 loads of 16 bytes, 4 of activations, 32 dp4a, 32 masks, and scaling: 4 rows x
(3 integer, 5 fp32) and 2 loads, with the addresses 150 instructions of PTX: 1.2 a weight, 0.75 of them integer.
What a multiprocessor may spend on a weight at the memory's speed (128 lanes a clock, 64 of them integer), and what must
be on its way from memory if that answers after 0.7 us:
                     bytes/clock  weights/clock  instructions  integer  in flight
  Orin Nano              13.6         26             4.9         2.5      5.9 KB
  AGX Orin 64 GB          9.8         19             6.7         3.4      9.0 KB
  Xavier NX               9.0         17             7.5         3.8      7.0 KB
  H100                   12.8         24             5.3         2.6     17.8 KB
So memory is the limit by a factor of 3 at least, where enough bytes are on their way: a lane asks for `loads` pieces before
it needs the first one, that is 4 KB a warp at 8, and before the block's activations are staged in shared memory. At 80
registers 24 warps are resident: 96 KB. The ceiling of a call is its bytes / read_mb_per_s; activations come on top from
the second-level cache, a byte for each 16 of a block's weights (8 warps, `split` 1).
sm_53 has no dp4a: a multiply-add an input, 3.4 instructions of PTX a weight against 128 lanes * 921 MHz / 31 G weights/s =
3.8: right, and not the mode to take there. None of this has been timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from schedules.cuda.kernel import CudaKernel, Launch
from schedules.cuda.packed import LANES, ROWS, Layout, blocks, storage_bits, weight_packings
from schedules.geometry import Geometry
from schedules.kernel import Request, Space
from schedules.linear_int8 import int8_levels
from schedules.packed import affine_of

CODES, SCALE = 3, 4  # argument positions of the weight; its zero or offset is next
SHARED_MOST = 40 << 10  # bytes of activations that a block stages; beyond, lanes read them from the cache
WARPS_A_MULTIPROCESSOR = 32  # that the default wants: half of what is resident at 64 registers


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
    def scale(self) -> str:
        """dtype of the weight's scales."""
        return self.request.args[SCALE].dtype

    def packings(self):
        """The weight arguments' layouts."""
        return weight_packings(CODES, self.n, self.layout, self.scale, self.affine)

    def name(self, family: str, tail: str = "") -> str:
        """Family, shape and kind, as a C identifier."""
        request, geometry = self.request, self.layout.geometry
        assert request.target.gpu is not None
        kind = request.attrs.get("grid", f"w{self.layout.bits}")
        more = ("_offset" if self.affine == "offset" else "") + ("_residual" if self.residual else "") + tail
        shape = f"m{self.m}_n{self.n}_k{geometry.k}_g{geometry.group}_s{self.scale[5:]}"
        return f"linear_{kind}a8_{family}_{request.target.gpu.arch}_{shape}{more}"

    def parameters(self) -> str:
        """The C parameter list of every kernel here, in the operator's order."""
        third = {"zero": f"const {self.zero_type}* zero, ", "offset": "const float* offset, ", "table": ""}[self.affine]
        base = "const float* residual, " if self.residual else ""
        return (
            "const int8_t* q, const float* ascale, const int32_t* asum, const uint4* codes, "
            f"const Scale* scale, {third}{base}float* out"
        )

    @property
    def zero_type(self) -> str:
        """C type of four zeros side by side: a word of bytes."""
        return "uint32_t"

    @property
    def places(self) -> tuple[int, ...]:
        """Arguments of a launch: all of the operator's, then the output."""
        return tuple(range(len(self.request.args) + 1))

    def constants(self, **more: int) -> str:
        """Sizes as C++ constants, and the types and functions that depend on how codes are stored."""
        layout, geometry = self.layout, self.layout.geometry
        sizes = {
            "M": self.m, "N": self.n, "SPANS": geometry.spans, "WIDTH": geometry.width, "BITS": layout.bits,
            "UNITS": layout.units, "RUN": layout.run, "SLOTS": layout.slots, "TILES": layout.tiles,
            "POSITIONS": layout.positions, "ROW_BLOCKS": blocks(self.n), "ROWS": ROWS,
            "ZERO": self.affine == "zero", "OFFSET": self.affine == "offset", "TABLE": self.affine == "table",
            "RESIDUAL": self.residual, "HALF_SCALE": self.scale == "float16", **more,
        }  # fmt: skip
        lines = "".join(f"constexpr int {name} = {int(value)};\n" for name, value in sizes.items())
        return f'#include "quern.cuh"\n{lines}{self._table()}{COMMON}'

    def _table(self) -> str:
        """The int8 levels of a table grid as four words, and the value of one level."""
        levels, unit = int8_levels(self.request.table) if self.request.table is not None else ((0,) * 16, 1.0)
        words = [int.from_bytes(bytes(v & 255 for v in levels[i : i + 4]), "little") for i in range(0, 16, 4)]
        listed = "".join(f"constexpr uint32_t LEVELS_{i} = {word:#010x};\n" for i, word in enumerate(words))
        return f"{listed}constexpr float UNIT = {float(unit).hex()}f;\n"


def read(request: Request) -> Call:
    """Shapes and kind of a quern.linear_int8* call."""
    n, k = request.args[CODES].shape
    layout = Layout(Geometry(k, int(request.attrs["group"])), storage_bits(int(request.attrs["bits"])))
    residual = request.op.endswith("_residual")
    return Call(request, request.args[0].shape[0], n, layout, affine_of(request.op), residual)


# What all kernels of integer linear layers share: types, unpacking, scaling of one span's integers.
COMMON = r"""
template <bool HALF> struct ScaleType { typedef float Type; typedef uint4 Four; };
template <> struct ScaleType<true> { typedef Half Type; typedef uint2 Four; };
typedef ScaleType<HALF_SCALE>::Type Scale;   // of one row
typedef ScaleType<HALF_SCALE>::Four Scales;  // of a row block
template <int BITS> struct InputsOf { typedef uint2 Type; };
template <> struct InputsOf<8> { typedef uint32_t Type; };
typedef InputsOf<BITS>::Type Inputs;  // activations of a unit: 8 or 4 bytes

constexpr int32_t MAGIC = 0x4B400000;  // 1.5 * 2^23 as fp32: adding an integer below 2^22 adds it to the number
constexpr float MAGIC_VALUE = 12582912.0f;
// What 8-bit codes lost by being stored minus 128, where no zero point takes care of it.
constexpr int32_t STORED_ZERO = BITS == 8 ? -128 : 0;

// Bytes 4 i to 4 i + 3 of the unit, as the integers to multiply with.
QUERN_INLINE int32_t first_inputs(uint32_t word) { return BITS == 8 ? word : word & 0x0F0F0F0Fu; }
QUERN_INLINE int32_t last_inputs(uint32_t word) { return word >> 4 & 0x0F0F0F0Fu; }
// Levels of the eight codes of a word. A byte permutation looks up four codes below 8 at a time, their top bits chosen
// by another one, which spreads bit 3 of a code over a byte.
QUERN_INLINE uint32_t levels_of_four(uint32_t codes) {
  uint32_t low = permute_bytes(LEVELS_0, LEVELS_1, codes & 0x7777u);
  uint32_t high = permute_bytes(LEVELS_2, LEVELS_3, codes & 0x7777u);
  uint32_t top = codes & 0x8888u;
  uint32_t which = permute_bytes(0x00008000u, 0, top | top >> 3);  // byte 0, or the sign of byte 1: 0x00 or 0xFF
  return lop3<0xCA>(which, high, low);
}
QUERN_INLINE void table_inputs(uint32_t word, int32_t& first, int32_t& last) {
  uint32_t a = levels_of_four(word & 0xFFFFu), b = levels_of_four(word >> 16);  // inputs 0 4 1 5 and 2 6 3 7
  first = permute_bytes(a, b, 0x6420u);
  last = permute_bytes(a, b, 0x7531u);
}
QUERN_INLINE uint32_t word_of(const uint4& v, int row) {
  return row == 0 ? v.x : row == 1 ? v.y : row == 2 ? v.z : v.w;
}
QUERN_INLINE float scale_of(const uint2& four, int row) {
  return to_float(Half{static_cast<uint16_t>((row < 2 ? four.x : four.y) >> (row & 1) * 16)});
}
QUERN_INLINE float scale_of(const uint4& four, int row) { return bits_float(word_of(four, row)); }
QUERN_INLINE int32_t zero_of(uint32_t four, int row) {
  return BITS == 8 ? static_cast<int8_t>(four >> 8 * row) : static_cast<uint8_t>(four >> 8 * row);
}
"""

BODY = r"""
constexpr int THREADS = WARPS * 32, GROUPS = WARPS / SPLIT, STEPS = (TILES + SPLIT - 1) / SPLIT;
constexpr int RUNS_IN_SPAN = UNITS / RUN;
constexpr int LAST_LANES = SLOTS - (TILES - 1) * 32;

struct Fetched {
  uint4 units[RUN];
  Scales scale;
  uint32_t zero;
  uint4 offset;
};
QUERN_INLINE int position(int tile, int step, int lane) {
  return tile * 32 * RUN + step * (tile == TILES - 1 ? LAST_LANES : 32) + lane;
}
QUERN_INLINE void fetch(Fetched& f, const uint4* codes, const Scales* scale, const uint32_t* zero, const uint4* offset,
                        int tile, int lane) {
  int slot = tile * 32 + lane;
  if (slot >= SLOTS) return;
#pragma unroll
  for (int i = 0; i < RUN; ++i) f.units[i] = load_stream(codes + position(tile, i, lane));
  f.scale = load_constant(scale + slot / RUNS_IN_SPAN);
  if (ZERO) f.zero = load_constant(zero + slot / RUNS_IN_SPAN);
  if (OFFSET) f.offset = load_constant(offset + slot / RUNS_IN_SPAN);
}
// Lanes 8 r to 8 r + 7 get the sum of v[r] over all lanes: 6 shuffles for four sums.
QUERN_INLINE float sum_rows(const float (&v)[ROWS], int lane) {
  bool up = lane & 16, odd = lane & 8;
  float a = (up ? v[2] : v[0]) + shuffle_xor(up ? v[0] : v[2], 16);
  float b = (up ? v[3] : v[1]) + shuffle_xor(up ? v[1] : v[3], 16);
  float c = (odd ? b : a) + shuffle_xor(odd ? a : b, 8);
  return warp_sum<8>(c);
}

extern "C" __global__ void __launch_bounds__(THREADS) @NAME@(@PARAMETERS@) {
  __shared__ Inputs staged[STAGED ? TOKENS * POSITIONS : 1];
  __shared__ float staged_scale[TOKENS * SPANS];
  __shared__ int32_t staged_sum[TOKENS * SPANS];
  __shared__ float part_sums[SPLIT > 1 ? WARPS * TOKENS * ROWS : 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % SPLIT;
  const int block = blockIdx.x * GROUPS + warp / SPLIT, mine = min(block, ROW_BLOCKS - 1);
  const int token = blockIdx.y * TOKENS;

  const uint4* my_codes = codes + static_cast<int64_t>(mine) * POSITIONS;
  const Scales* my_scale = reinterpret_cast<const Scales*>(scale) + mine * SPANS;
  const uint32_t* my_zero = @ZERO@;
  const uint4* my_offset = @OFFSET@;
  Fetched ahead[AHEAD];
#pragma unroll
  for (int a = 0; a < AHEAD; ++a)
    if (part + a * SPLIT < TILES) fetch(ahead[a], my_codes, my_scale, my_zero, my_offset, part + a * SPLIT, lane);

  for (unsigned i = threadIdx.x; i < TOKENS * SPANS; i += THREADS) {
    int from = min(token + int(i / SPANS), M - 1) * SPANS + i % SPANS;
    staged_scale[i] = load_constant(ascale + from) * UNIT;
    staged_sum[i] = static_cast<int32_t>(load_constant(reinterpret_cast<const uint32_t*>(asum) + from));
  }
  const Inputs* activations = reinterpret_cast<const Inputs*>(q);
  if (STAGED)
    for (unsigned i = threadIdx.x; i < TOKENS * POSITIONS; i += THREADS) {
      unsigned t = i / POSITIONS, unit = i % POSITIONS, slot = unit / RUN;
      staged[t * POSITIONS + position(slot / 32, unit % RUN, slot % 32)] =
          load_constant(activations + static_cast<int64_t>(min(token + int(t), M - 1)) * POSITIONS + unit);
    }
  block_sync();

  float acc[TOKENS][ROWS] = {};
#pragma unroll 1
  for (int i = 0; i < STEPS; i += AHEAD) {
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const int tile = part + (i + a) * SPLIT, slot = tile * 32 + lane;
      if (tile >= TILES || slot >= SLOTS) continue;
      Fetched& f = ahead[a];
      const int span = slot / RUNS_IN_SPAN;
      const bool first = RUNS_IN_SPAN == 1 || slot % RUNS_IN_SPAN == 0;  // the span's zero is one lane's
      int32_t sum[TOKENS][ROWS], sixteen[TOKENS][ROWS];
#pragma unroll
      for (int t = 0; t < TOKENS; ++t)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          int32_t zero = ZERO ? zero_of(f.zero, r) : STORED_ZERO;
          sum[t][r] = !TABLE && first ? MAGIC - zero * staged_sum[t * SPANS + span] : MAGIC;
          sixteen[t][r] = 0;
        }
#pragma unroll
      for (int s = 0; s < RUN; ++s) {
        Inputs x[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; ++t)
          x[t] = STAGED ? staged[t * POSITIONS + position(tile, s, lane)]
                        : load_constant(activations + static_cast<int64_t>(min(token + t, M - 1)) * POSITIONS +
                                        slot * RUN + s);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const uint32_t word = word_of(f.units[s], r);
@PRODUCT@
        }
      }
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        const float by = staged_scale[t * SPANS + span];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const float centred = bits_float(static_cast<uint32_t>(sum[t][r] + (sixteen[t][r] >> 4))) - MAGIC_VALUE;
          acc[t][r] = fmaf(centred, scale_of(f.scale, r) * by, acc[t][r]);
          if (OFFSET && first)
            acc[t][r] = fmaf(scale_of(f.offset, r), static_cast<float>(staged_sum[t * SPANS + span]) * by, acc[t][r]);
        }
      }
      if (tile + AHEAD * SPLIT < TILES) fetch(f, my_codes, my_scale, my_zero, my_offset, tile + AHEAD * SPLIT, lane);
    }
  }

#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    float sum = sum_rows(acc[t], lane);
    if (SPLIT > 1) {
      if (lane % 8 == 0) part_sums[(warp * TOKENS + t) * ROWS + lane / 8] = sum;
    } else if (lane % 8 == 0 && block < ROW_BLOCKS) {
      int row = block * ROWS + lane / 8, i = (token + t) * N + row;
      if (row < N && token + t < M) out[i] = RESIDUAL ? @RESIDUAL@ + sum : sum;
    }
  }
  if (SPLIT > 1) {
    block_sync();
    for (int j = threadIdx.x; j < GROUPS * TOKENS * ROWS; j += THREADS) {
      int group = j / (TOKENS * ROWS), t = j / ROWS % TOKENS, row = (blockIdx.x * GROUPS + group) * ROWS + j % ROWS;
      float sum = 0.0f;
      for (int p = 0; p < SPLIT; ++p) sum += part_sums[(group * SPLIT + p) * TOKENS * ROWS + j % (TOKENS * ROWS)];
      int i = (token + t) * N + row;
      if (row < N && token + t < M) out[i] = RESIDUAL ? @RESIDUAL@ + sum : sum;
    }
  }
}
"""
PRODUCTS = {  # of a word with the activations of all tokens
    "w8": "for (int t = 0; t < TOKENS; ++t) sum[t][r] = dp4a(word, x[t], sum[t][r]);",
    # The high nibbles stay where they are: their products count 16 times.
    "w4": (
        "for (int t = 0; t < TOKENS; ++t) {\n"
        "  sum[t][r] = dp4a(first_inputs(word), x[t].x, sum[t][r]);\n"
        "  sixteen[t][r] = dp4a_unsigned(word & 0xF0F0F0F0u, x[t].y, sixteen[t][r]);\n"
        "}"
    ),
    "table": (
        "int32_t low, high;\n"
        "table_inputs(word, low, high);\n"
        "for (int t = 0; t < TOKENS; ++t) sum[t][r] = dp4a(high, x[t].y, dp4a(low, x[t].x, sum[t][r]));"
    ),
}


def source(call: Call, name: str, knobs: Mapping[str, int]) -> str:
    """The kernel's text."""
    tokens, run = knobs["tokens"], call.layout.run
    staged = tokens * call.layout.geometry.spans * call.layout.geometry.width <= SHARED_MOST
    constants = call.constants(
        TOKENS=tokens, WARPS=knobs["warps"], SPLIT=knobs["split"], AHEAD=max(1, knobs["loads"] // run), STAGED=staged
    )
    product = PRODUCTS["table" if call.affine == "table" else f"w{call.layout.bits}"]
    texts = {
        "NAME": name,
        "PARAMETERS": call.parameters(),
        "ZERO": "zero + mine * SPANS" if call.affine == "zero" else "nullptr",
        "OFFSET": "reinterpret_cast<const uint4*>(offset) + mine * SPANS" if call.affine == "offset" else "nullptr",
        "RESIDUAL": "load_constant(residual + i)" if call.residual else "0.0f",
        "PRODUCT": product.replace("for (int t", "_Pragma(\"unroll\")\nfor (int t"),
    }
    body = BODY
    for key, text in texts.items():
        body = body.replace(f"@{key}@", text)
    return constants + body


def default_knobs(call: Call) -> dict[str, int]:
    """One token: the fewest warps a row block that still fill the device; each keeps 8 loads of a lane under way.

    Up to 4 tokens share what is unpacked; more make the registers of a thread scarce.
    """
    gpu = call.request.target.gpu
    assert gpu is not None
    wanted, split = gpu.multiprocessors * WARPS_A_MULTIPROCESSOR, 1
    tokens = min(call.m, 4)
    while 2 * split <= min(8, call.layout.tiles) and blocks(call.n) * split < wanted:
        split *= 2
    return {"warps": 8, "split": split, "loads": 8 if tokens == 1 else 4, "tokens": tokens}


def lower(request: Request) -> CudaKernel:
    """A block of warps a few row blocks, for some tokens."""
    call = read(request)
    knobs = default_knobs(call) | dict(request.knobs)
    name = call.name("dp4a")
    groups = knobs["warps"] // knobs["split"]
    grid = (-(-blocks(call.n) // groups), -(-call.m // knobs["tokens"]), 1)
    launch = Launch(name, grid, (knobs["warps"] * LANES, 1, 1), call.places)
    return CudaKernel(name, source(call, name, knobs), (launch,), call.packings())


LOWERS = {
    f"quern.linear_int8{affine}{tail}": lower for affine in ("", "_offset", "_table") for tail in ("", "_residual")
}


def workload(call: Call) -> dict[str, int | str]:
    """What tells calls apart for tuning, as on CPUs: a scale's dtype and a residual change a few bytes of the traffic."""
    geometry, attrs = call.layout.geometry, call.request.attrs
    kind = str(attrs.get("grid", call.affine))
    return {"m": call.m, "n": call.n, "k": geometry.k, "bits": int(attrs["bits"]), "group": geometry.group, "kind": kind}


def space(request: Request) -> Space:
    """What tuning may try."""
    call = read(request)
    assert request.target.gpu is not None

    def allowed(knobs: Mapping[str, int]) -> bool:
        return knobs["split"] <= knobs["warps"] and knobs["loads"] >= call.layout.run

    tried = {
        "warps": (2, 4, 8, 16),
        "split": tuple(s for s in (1, 2, 4, 8) if s <= call.layout.tiles),
        "loads": (4, 8, 16),
        "tokens": tuple(t for t in (1, 2, 4, 8) if t <= call.m),
    }
    macs = call.m * call.n * call.layout.geometry.k
    return Space.around(
        default_knobs(call), tried, schedule=f"cuda.linear_int8.{request.target.gpu.arch}", workload=workload(call),
        macs=macs, allowed=allowed,
    )  # fmt: skip


SPACES = dict.fromkeys(LOWERS, space)
