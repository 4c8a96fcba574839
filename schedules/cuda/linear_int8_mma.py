"""Integer linear layers of many tokens on tensor cores, sm_80 and later: mma.m16n8k32 on int8, copies beside it.

Operators, formula and layout as in schedules.cuda.linear_int8. A block makes `tokens` x `rows` outputs. Activations and
codes of the next spans are under way to shared memory (cp.async, `stages` buffers) while the tensor cores work on this
one. A warp has 32 (or 16) tokens and some columns of 8 rows; for each column it adds up a span in int32, exactly, starting
from 1.5 * 2^23, and scales that into fp32 sums: the order over spans is the CPU's.

Where an input stands in k is free as long as both operands agree: lane t of four takes inputs 8 t to 8 t + 7 of each
32, which is one word of codes at 4 bits (two at 8) and one 64-bit load of a token. So both fragments are plain loads of
unpacked order, without bank conflicts by the strides chosen below, and ldmatrix would read no fewer bytes. The parts
of a span beyond a multiple of 32 inputs multiply zeros.

A warp's 32 tokens x 32 rows x 128 inputs: 32 mma (each 4096 multiply-adds: 8 clocks of a quarter of an sm_87
multiprocessor, 256 in all), 16 words of codes with 48 operations to unpack, 32 x 4 operations of scaling, and a span's
activations, read once for all columns: about 390 instructions of PTX, and 100 more for the copies of 8 warps. An
instruction a clock: half of the peak of sm_87 is in reach, at groups of 32 a fifth. sm_90 has four times the tensor cores
for these instructions' clocks and is bound by scaling alone. Shared memory fits 48 KB, which every device has without
asking. From the second-level cache a block reads (tokens + rows / 2) bytes an input for tokens * rows multiply-adds: at
64 x 128, 32 bytes a clock of sm_87 at its peak. Nothing of this has been timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from schedules.cuda.kernel import CudaKernel, Launch
from schedules.cuda.linear_int8 import Call, read, workload
from schedules.cuda.packed import LANES, ROWS
from schedules.kernel import NotSuited, Request, Space

RANK = 2
SINCE = 80  # compute capability: mma.m16n8k32 on int8 and cp.async
FEW = 4  # tokens that the dot-product kernel serves
K_STEP = 32  # inputs of an mma
STAGE_INPUTS = 128  # at most, of one token in one buffer
SHARED = 48 << 10
TILES = ((64, 128), (64, 64), (32, 64), (16, 64), (16, 32))  # tokens x rows of a block, the least memory traffic first

BODY = r"""
constexpr int WARPS = WARPS_M * WARPS_N, THREADS = WARPS * 32;
constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N, MT = WM / 16, NT = WN / 8;
constexpr int RUNS_IN_SPAN = UNITS / RUN, LAST_LANES = SLOTS - (TILES - 1) * 32;
constexpr int STEP_UNITS = 32 * BITS / 32;  // units of 32 inputs: 4, or 8 of 8 bits
constexpr int BLOCKS = BN / ROWS;
constexpr int STEPS = (SPANS + STAGE_SPANS - 1) / STAGE_SPANS;
constexpr int PIECE = WIDTH % 16 == 0 ? 16 : 8;

struct Stage {
  alignas(16) uint8_t tokens[BM * A_STRIDE];
  alignas(16) uint4 codes[BLOCKS * W_STRIDE];
  alignas(16) Scales scale[BLOCKS * STAGE_SPANS];
  alignas(16) uint4 offset[OFFSET ? BLOCKS * STAGE_SPANS : 1];
  alignas(16) uint32_t zero[ZERO ? BLOCKS * STAGE_SPANS : 1];
  alignas(16) float token_scale[BM * STAGE_SPANS];
  alignas(16) int32_t token_sum[BM * STAGE_SPANS];
};
static_assert(sizeof(Stage) * STAGES == SHARED_BYTES, "the launch asks for this much");

struct Pointers {
  const int8_t* q;
  const float* ascale;
  const int32_t* asum;
  const uint4* codes;
  const Scales* scale;
  const uint32_t* zero;
  const uint4* offset;
};

// Starts the copies of the spans of one step.
QUERN_INLINE void copy(Stage& stage, const Pointers& p, int first_span, int first_token, int first_block) {
  const unsigned spans = min(STAGE_SPANS, SPANS - first_span);
  for (unsigned i = threadIdx.x; i < BM * STAGE_SPANS * (WIDTH / PIECE); i += THREADS) {
    const unsigned piece = i % (WIDTH / PIECE), span = i / (WIDTH / PIECE) % STAGE_SPANS;
    const unsigned token = i / (WIDTH / PIECE * STAGE_SPANS);
    if (span < spans)
      async_copy<PIECE>(
          stage.tokens + token * A_STRIDE + span * K_STEPS * 32 + piece * PIECE,
          p.q + (static_cast<int64_t>(min(first_token + int(token), M - 1)) * SPANS + first_span + span) * WIDTH + piece * PIECE);
  }
  for (unsigned i = threadIdx.x; i < BLOCKS * UNITS * STAGE_SPANS; i += THREADS) {
    // Neighbouring threads take neighbouring lanes of the layout: the same step of the runs beside each other.
    const unsigned run = i % (RUNS_IN_SPAN * STAGE_SPANS), step = i / (RUNS_IN_SPAN * STAGE_SPANS) % RUN;
    const unsigned block = i / (UNITS * STAGE_SPANS), span = run / RUNS_IN_SPAN;
    const unsigned slot = first_span * RUNS_IN_SPAN + run, tile = slot / 32;
    const unsigned place = tile * 32 * RUN + step * (tile == TILES - 1 ? LAST_LANES : 32) + slot % 32;
    if (span < spans)
      async_copy<16>(stage.codes + block * W_STRIDE + span * K_STEPS * STEP_UNITS + run % RUNS_IN_SPAN * RUN + step,
                     p.codes + static_cast<int64_t>(min(first_block + int(block), ROW_BLOCKS - 1)) * POSITIONS + place);
  }
  for (unsigned i = threadIdx.x; i < BLOCKS * STAGE_SPANS; i += THREADS) {
    const unsigned span = i % STAGE_SPANS;
    const unsigned from = min(first_block + int(i / STAGE_SPANS), ROW_BLOCKS - 1) * SPANS + first_span + span;
    if (span < spans) {
      async_copy<sizeof(Scales)>(stage.scale + i, p.scale + from);
      if (ZERO) async_copy<4>(stage.zero + i, p.zero + from);
      if (OFFSET) async_copy<16>(stage.offset + i, p.offset + from);
    }
  }
  for (unsigned i = threadIdx.x; i < BM * STAGE_SPANS; i += THREADS) {
    const unsigned span = i % STAGE_SPANS, from = min(first_token + int(i / STAGE_SPANS), M - 1) * SPANS + first_span + span;
    if (span < spans) {
      async_copy<4>(stage.token_scale + i, p.ascale + from);
      async_copy<4>(stage.token_sum + i, p.asum + from);
    }
  }
}

QUERN_INLINE void fragment_of_codes(uint32_t (&b)[2], const uint4* units, int lane) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(units) + lane / 4 % 4;  // of the row
  if (BITS == 8) {
    b[0] = words[lane % 4 * 8], b[1] = words[lane % 4 * 8 + 4];
  } else if (TABLE) {
    int32_t low, high;
    table_inputs(words[lane % 4 * 4], low, high);
    b[0] = low, b[1] = high;
  } else {
    const uint32_t word = words[lane % 4 * 4];
    b[0] = first_inputs(word), b[1] = last_inputs(word);
  }
}

// acc += this span of the stage, of the warp's tokens and rows.
QUERN_INLINE void multiply(float (&acc)[MT][NT][4], const Stage& stage, int span, int warp_m, int warp_n, int lane) {
  const int group = lane / 4, quad = lane % 4;
  uint32_t a[MT][K_STEPS][4];
  float by[MT][2];
  int32_t sum[MT][2];
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = warp_m * WM + mt * 16 + half * 8 + group;
      by[mt][half] = stage.token_scale[token * STAGE_SPANS + span] * UNIT;
      sum[mt][half] = stage.token_sum[token * STAGE_SPANS + span];
#pragma unroll
      for (int k = 0; k < K_STEPS; ++k) {
        const uint2 inputs = *reinterpret_cast<const uint2*>(
            stage.tokens + token * A_STRIDE + (span * K_STEPS + k) * 32 + 8 * quad);
        a[mt][k][half] = inputs.x, a[mt][k][half + 2] = inputs.y;
      }
    }
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    const int column = warp_n * WN + nt * 8;  // first of 8 rows
    const int block = (column / ROWS + quad / 2) * STAGE_SPANS + span, row = quad % 2 * 2;  // of 2 rows of the lane
    const Scales scales = stage.scale[block];
    const uint32_t zeros = ZERO ? stage.zero[block] : 0;
    int32_t c[MT][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t minus_zero = ZERO ? -zero_of(zeros, row + i % 2) : -STORED_ZERO;
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) c[mt][i] = TABLE ? MAGIC : MAGIC + minus_zero * sum[mt][i / 2];
    }
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) {
      uint32_t b[2];
      fragment_of_codes(b, stage.codes + (column / ROWS + group / 4) * W_STRIDE + (span * K_STEPS + k) * STEP_UNITS, lane);
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) mma_16x8x32(c[mt], a[mt][k], b);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = scale_of(scales, row + i % 2);
      const float offset = OFFSET ? scale_of(stage.offset[OFFSET ? block : 0], row + i % 2) : 0.0f;
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        const float centred = bits_float(static_cast<uint32_t>(c[mt][i])) - MAGIC_VALUE;
        float& to = acc[mt][nt][i];
        to = fmaf(centred, scale * by[mt][i / 2], to);
        if (OFFSET) to = fmaf(offset, static_cast<float>(sum[mt][i / 2]) * by[mt][i / 2], to);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) @NAME@(@PARAMETERS@) {
  Stage* stages = reinterpret_cast<Stage*>(dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
  const int first_token = blockIdx.y * BM, first_row = blockIdx.x * BN;
  const Pointers p = {q, ascale, asum, codes, reinterpret_cast<const Scales*>(scale), @ZERO@, @OFFSET@};
  if (WIDTH % 32) {  // what copies never reach meets zeros
    uint4* all = reinterpret_cast<uint4*>(stages);
    for (int i = threadIdx.x; i < SHARED_BYTES / 16; i += THREADS) all[i] = uint4{0, 0, 0, 0};
    block_sync();
  }
  float acc[MT][NT][4] = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < STEPS) copy(stages[s], p, s * STAGE_SPANS, first_token, first_row / ROWS);
    async_commit();
  }
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    async_wait<STAGES - 2>();
    block_sync();
    const int next = step + STAGES - 1;
    if (next < STEPS) copy(stages[next % STAGES], p, next * STAGE_SPANS, first_token, first_row / ROWS);
    async_commit();
#pragma unroll 1
    for (int span = 0; span < min(STAGE_SPANS, SPANS - step * STAGE_SPANS); ++span)
      multiply(acc, stages[step % STAGES], span, warp_m, warp_n, lane);
  }
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first_token + warp_m * WM + mt * 16 + half * 8 + lane / 4;
        const int row = first_row + warp_n * WN + nt * 8 + lane % 4 * 2;
        const int64_t i = static_cast<int64_t>(token) * N + row;
        const float x = acc[mt][nt][2 * half], y = acc[mt][nt][2 * half + 1];
        if (token < M && N % 2 == 0 && row < N) {
          float2 base = {0.0f, 0.0f};
          if (RESIDUAL) base = *reinterpret_cast<const float2*>(@RESIDUAL@ + i);
          *reinterpret_cast<float2*>(out + i) = float2{base.x + x, base.y + y};
        } else if (token < M) {
          if (row < N) out[i] = RESIDUAL ? (@RESIDUAL@)[i] + x : x;
          if (row + 1 < N) out[i + 1] = RESIDUAL ? (@RESIDUAL@)[i + 1] + y : y;
        }
      }
}
"""


def steps(call: Call) -> tuple[int, int]:
    """(k-steps of a span, spans of a buffer)."""
    k_steps = -(-call.layout.geometry.width // K_STEP)
    return k_steps, min(max(1, STAGE_INPUTS // (k_steps * K_STEP)), call.layout.geometry.spans)


def strides(call: Call) -> tuple[int, int]:
    """(bytes between tokens, units between row blocks): the lanes of a load then touch every bank once.

    Tokens: 32 times an odd number, so that four neighbours' 32 bytes fill 128. Row blocks, four of whose 16-byte units
    (every second one of 8 bits) two blocks read at once: 4 above a multiple of 8, or odd.
    """
    k_steps, spans = steps(call)
    inputs, units = k_steps * spans * K_STEP, k_steps * spans * call.layout.bits
    tokens = inputs if inputs // 32 % 2 else inputs + 32
    if call.layout.bits == 8:
        return tokens, units + 1
    return tokens, next(u for u in range(units, units + 8) if u % 8 == 4)


def stage_bytes(call: Call, tokens: int, rows: int) -> int:
    """Size of `Stage`."""
    _, spans = steps(call)
    a_stride, w_stride = strides(call)
    blocks, scale = rows // ROWS, 8 if call.scale == "float16" else 16
    parts = [
        tokens * a_stride,
        blocks * w_stride * 16,
        blocks * spans * scale,
        blocks * spans * 16 if call.affine == "offset" else 16,
        blocks * spans * 4 if call.affine == "zero" else 4,
        tokens * spans * 4,
        tokens * spans * 4,
    ]
    return sum(-(-part // 16) * 16 for part in parts)


def default_knobs(call: Call) -> dict[str, int]:
    """The largest tile that fits twice into 48 KB, is not mostly padding, and leaves no multiprocessor idle."""
    gpu = call.request.target.gpu
    assert gpu is not None
    fitting = [tile for tile in TILES if 2 * stage_bytes(call, *tile) <= SHARED]
    useful = [(t, r) for t, r in fitting if t <= 16 * -(-call.m // 16)] or fitting[-1:]
    filling = [(t, r) for t, r in useful if -(-call.m // t) * -(-call.n // r) >= gpu.multiprocessors]
    tokens, rows = (filling or useful[-1:])[0]
    stages = 3 if 3 * stage_bytes(call, tokens, rows) <= SHARED else 2
    return {"tokens": tokens, "rows": rows, "warps": rows // 16, "stages": stages}


def lower(request: Request) -> CudaKernel:
    """A block of warps a tile of the output. Raises NotSuited before sm_80 and for few tokens."""
    call = suited(request)
    knobs = default_knobs(call) | dict(request.knobs)
    tokens, rows, stages = knobs["tokens"], knobs["rows"], knobs["stages"]
    k_steps, spans = steps(call)
    a_stride, w_stride = strides(call)
    warps_m = max(1, tokens // 32)
    shared = stages * stage_bytes(call, tokens, rows)
    name = call.name("mma")
    constants = call.constants(
        BM=tokens, BN=rows, WARPS_M=warps_m, WARPS_N=knobs["warps"] // warps_m, K_STEPS=k_steps, STAGE_SPANS=spans,
        A_STRIDE=a_stride, W_STRIDE=w_stride, STAGES=stages, SHARED_BYTES=shared,
    )  # fmt: skip
    body = BODY
    for key, text in {
        "NAME": name,
        "PARAMETERS": call.parameters(),
        "ZERO": "zero" if call.affine == "zero" else "nullptr",
        "OFFSET": "reinterpret_cast<const uint4*>(offset)" if call.affine == "offset" else "nullptr",
        "RESIDUAL": "residual" if call.residual else "out",
    }.items():
        body = body.replace(f"@{key}@", text)
    grid = (-(-call.n // rows), -(-call.m // tokens), 1)
    launch = Launch(name, grid, (knobs["warps"] * LANES, 1, 1), call.places, shared)
    return CudaKernel(name, constants + body, (launch,), call.packings())


def suited(request: Request) -> Call:
    """The call, if it is one for tensor cores of sm_80."""
    assert request.target.gpu is not None
    call = read(request)
    if request.target.gpu.sm < SINCE or call.m <= FEW:
        raise NotSuited
    return call


LOWERS = {
    f"quern.linear_int8{affine}{tail}": lower for affine in ("", "_offset", "_table") for tail in ("", "_residual")
}


def points(call: Call) -> Iterator[tuple[int, int]]:
    """Tiles that fit."""
    return (tile for tile in TILES if 2 * stage_bytes(call, *tile) <= SHARED)


def space(request: Request) -> Space:
    """What tuning may try."""
    call = suited(request)
    assert request.target.gpu is not None

    def allowed(knobs: Mapping[str, int]) -> bool:
        tokens, rows, warps = knobs["tokens"], knobs["rows"], knobs["warps"]
        warps_m = max(1, tokens // 32)
        whole = warps % warps_m == 0 and rows % (8 * (warps // warps_m)) == 0
        return whole and knobs["stages"] * stage_bytes(call, tokens, rows) <= SHARED

    tried = {"tokens": (16, 32, 64), "rows": (32, 64, 128), "warps": (2, 4, 8), "stages": (2, 3, 4)}
    macs = call.m * call.n * call.layout.geometry.k
    return Space.around(
        default_knobs(call), tried, schedule=f"cuda.linear_int8_mma.{request.target.gpu.arch}", workload=workload(call),
        macs=macs, allowed=allowed,
    )  # fmt: skip


SPACES = dict.fromkeys(LOWERS, space)
