// One token against the part blockIdx.x of its context: CHUNK positions of one kv head, for ROWS of its query heads.
// See attention_decode.py. Constants: HEADS, GROUP, ROWS, D, CAPACITY, CHUNK, PARTS, THREADS, COLUMNS, QUERY_FACTOR;
// Item: Half or float.

constexpr int WARPS = THREADS / 32;
constexpr int KEYS = 16 / sizeof(Item);        // keys of a 128-bit load
constexpr int LANES_PER_ELEMENT = 16 / KEYS;   // that load the 16 keys of a block
constexpr int ELEMENTS = 32 / LANES_PER_ELEMENT;  // of d, that a warp loads at once
constexpr int COLUMN_THREADS = D / COLUMNS;    // that read a position's value
constexpr int POSITIONS = THREADS / COLUMN_THREADS;  // whose values are read at once

QUERN_INLINE void widen(uint4 x, float (&to)[8]) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = to_float2(Half2{words[i]});
    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
  }
}
QUERN_INLINE void widen(uint4 x, float (&to)[4]) {
  to[0] = bits_float(x.x), to[1] = bits_float(x.y), to[2] = bits_float(x.z), to[3] = bits_float(x.w);
}

// COLUMNS values from p on, by the widest load that their alignment allows.
QUERN_INLINE void load_values(const Half* p, float (&to)[COLUMNS]) {
  uint32_t words[COLUMNS / 2 + 1];
  if constexpr (COLUMNS == 8) {
    const uint4 x = load_constant(reinterpret_cast<const uint4*>(p));
    words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
  } else if constexpr (COLUMNS == 4) {
    const uint2 x = load_constant(reinterpret_cast<const uint2*>(p));
    words[0] = x.x, words[1] = x.y;
  } else if constexpr (COLUMNS == 2) {
    words[0] = load_constant(reinterpret_cast<const uint32_t*>(p));
  } else {
    words[0] = load_constant(p).bits;
  }
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) to[i] = to_float(Half{static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)});
}
QUERN_INLINE void load_values(const float* p, float (&to)[COLUMNS]) {
  if constexpr (COLUMNS == 4) {
    const uint4 x = load_constant(reinterpret_cast<const uint4*>(p));
    to[0] = bits_float(x.x), to[1] = bits_float(x.y), to[2] = bits_float(x.z), to[3] = bits_float(x.w);
  } else if constexpr (COLUMNS == 2) {
    const uint2 x = load_constant(reinterpret_cast<const uint2*>(p));
    to[0] = bits_float(x.x), to[1] = bits_float(x.y);
  } else {
    to[0] = load_constant(p);
  }
}

// Products of 16 keys with all rows: lane by lane a few elements of d, then a tree that hands each lane one key.
QUERN_INLINE void score_block(const Item* keys, const float (*query)[ROWS], float (*score)[ROWS], int lane) {
  float sums[ROWS][KEYS] = {};
  const int part = lane % LANES_PER_ELEMENT;
#pragma unroll (D <= 16 * ELEMENTS ? (D + ELEMENTS - 1) / ELEMENTS : 8)
  for (int step = 0; step < (D + ELEMENTS - 1) / ELEMENTS; ++step) {
    const int e = step * ELEMENTS + lane / LANES_PER_ELEMENT;
    if (D % ELEMENTS == 0 || e < D) {
      float key[KEYS];
      widen(load_constant(reinterpret_cast<const uint4*>(keys + e * 16 + part * KEYS)), key);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float value = query[e][r];
#pragma unroll
        for (int i = 0; i < KEYS; ++i) sums[r][i] = fmaf(value, key[i], sums[r][i]);
      }
    }
  }
  int own = part * KEYS;
#pragma unroll
  for (int half = KEYS / 2, mask = 16; half > 0; half /= 2, mask /= 2) {
    const bool upper = (lane & mask) != 0;
    own += upper ? half : 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float given = upper ? sums[r][i] : sums[r][i + half];
        sums[r][i] = (upper ? sums[r][i + half] : sums[r][i]) + shuffle_xor(given, mask);
      }
  }
  constexpr int LAST = 32 / KEYS / 2;  // two lanes (four of fp32 keys: KEYS 4, LANES_PER_ELEMENT 4) share a key now
#pragma unroll
  for (int mask = LAST; mask >= LANES_PER_ELEMENT; mask /= 2)
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r][0] += shuffle_xor(sums[r][0], mask);
  if ((lane & (2 * LAST - 1)) < LANES_PER_ELEMENT) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) score[own][r] = capped(sums[r][0]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
KERNEL(const float* __restrict__ q, const Item* __restrict__ keys, const Item* __restrict__ values,
       const int* __restrict__ span, float* __restrict__ out, float* __restrict__ stats) {
  alignas(16) __shared__ float query[D][ROWS];
  alignas(16) __shared__ float score[CHUNK][ROWS];
  __shared__ float total[ROWS];
  alignas(16) __shared__ float gathered[2][THREADS][COLUMNS];
  const int own = span[0], first = blockIdx.x * CHUNK, low = first_seen(own);
  if (first > own || first + CHUNK <= low) return;  // the grid has room for the whole capacity
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int head = blockIdx.y * ROWS, kv = head / GROUP;
  const int count = own - first < CHUNK ? own - first + 1 : CHUNK;

  for (int i = thread; i < ROWS * D; i += THREADS)
    query[i % D][i / D] = load_constant(q + head * D + i) * QUERY_FACTOR;
  block_sync();
  const int begin = low > first ? low - first : 0;
  for (int b = begin / 16 + warp; b * 16 < count; b += WARPS)
    score_block(keys + (int64_t(kv) * (CAPACITY / 16) + first / 16 + b) * (D * 16), query, score + b * 16, lane);
  block_sync();
  for (int r = warp; r < ROWS; r += WARPS) {
    float most = MASKED, sum = 0;
    for (int p = begin + lane; p < count; p += 32) most = fmaxf(most, score[p][r]);
    most = warp_max(most);
    for (int p = begin + lane; p < count; p += 32) {
      const float weight = exp2_approx(score[p][r] - most);
      score[p][r] = weight;
      sum += weight;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      total[r] = sum;
      if (PARTS > 1) {
        float* mine = stats + (blockIdx.x * HEADS + head + r) * 2;
        mine[0] = most, mine[1] = sum;
      }
    }
  }
  block_sync();

  float sums[ROWS][COLUMNS] = {};
  const int column = thread % COLUMN_THREADS * COLUMNS;
  const Item* value = values + (int64_t(kv) * CAPACITY + first) * D + column;
  if (thread < POSITIONS * COLUMN_THREADS) {
#pragma unroll 4
    for (int p = begin + thread / COLUMN_THREADS; p < count; p += POSITIONS) {
      float loaded[COLUMNS];
      load_values(value + int64_t(p) * D, loaded);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float weight = score[p][r];
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) sums[r][i] = fmaf(weight, loaded[i], sums[r][i]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {  // two buffers: a row is written while the last one is still read
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) gathered[r % 2][thread][i] = sums[r][i];
    block_sync();
    for (int i = thread; i < D; i += THREADS) {
      float sum = 0;
      for (int p = 0; p < POSITIONS; ++p) sum += (&gathered[r % 2][p * COLUMN_THREADS][0])[i];
      out[(blockIdx.x * HEADS + head + r) * D + i] = PARTS > 1 ? sum : sum / total[r];
    }
  }
}
