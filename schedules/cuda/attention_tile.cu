// A tile of tokens of one kv head against the context, in fp32: for chips without tensor cores, and for fp32 caches.
// See attention_tile.py. Constants: M, HEADS, KV_HEADS, GROUP, D, CAPACITY, SHARED query heads of one
// kv head, TOKENS of a tile, ROWS >= TOKENS * SHARED, BLOCK positions, THREADS, PADDED, QUERY_FACTOR; Item: Half, float
// or int8_t. Row r is token r / SHARED, and query head r % SHARED of them.

constexpr int WIDE = (D + 3) / 4 * 4;               // columns of a value in shared memory
constexpr int KEY_COLUMNS = ROWS * BLOCK / (4 * THREADS);  // scores of a thread: 4 rows x these positions
constexpr int ROW_THREADS = ROWS / 4;
constexpr int COLUMN_THREADS = THREADS / ROW_THREADS;      // each with every COLUMN_THREADS-th four columns
constexpr int FOURS = (WIDE / 4 + COLUMN_THREADS - 1) / COLUMN_THREADS;
constexpr int SOFTMAX_THREADS = THREADS / ROWS;            // of a row
constexpr int PITCH = ROWS + 4;                            // of the scores: a multiple of four floats

constexpr bool CODES = sizeof(Item) == 1;
constexpr int ITEMS = 16 / sizeof(Item);  // of a 128-bit load

// Element i of 16 bytes.
QUERN_INLINE float element(const uint32_t (&words)[4], int i) {
  if (CODES) return static_cast<float>(static_cast<int8_t>(words[i / 4] >> i % 4 * 8));
  if (sizeof(Item) == 2) return to_float(Half{static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)});
  return bits_float(words[i % 4]);
}

QUERN_INLINE float load_one(const Half* p) { return to_float(load_constant(p)); }
QUERN_INLINE float load_one(const float* p) { return load_constant(p); }
QUERN_INLINE float load_one(const int8_t* p) { return static_cast<float>(*p); }

// Keys of positions base.., element by element: to[e][p]. What lies beyond the capacity repeats its last block.
QUERN_INLINE void stage_keys(const Item* keys, const float* scales, int base, float* to) {
  constexpr int LOADS = 16 * D / ITEMS;  // of 16 positions
  for (int i = threadIdx.x; i < LOADS * (BLOCK / 16); i += THREADS) {
    const int b = i / LOADS, first = i % LOADS * ITEMS;  // of the items of 16 positions
    const int from = base + b * 16 < CAPACITY ? base + b * 16 : CAPACITY - 16;
    const uint4 x = load_constant(reinterpret_cast<const uint4*>(keys + int64_t(from) * D + first));
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
    if constexpr (CODES) {  // of two elements side by side
      const int e = first / 32 * 2, t = first / 2 % 16;
#pragma unroll
      for (int j = 0; j < 16; ++j)
        to[(e + j % 2) * BLOCK + b * 16 + t + j / 2] = element(words, j) * load_constant(scales + from + t + j / 2);
    } else {
      float* row = to + first / 16 * BLOCK + b * 16 + first % 16;
#pragma unroll
      for (int j = 0; j < ITEMS; j += 4)
        *reinterpret_cast<float4*>(row + j) =
            float4{element(words, j), element(words, j + 1), element(words, j + 2), element(words, j + 3)};
    }
  }
}

// Values of positions base..end-1: to[p][column], zeros where there is none.
QUERN_INLINE void stage_values(const Item* values, const float* scales, int base, int end, float* to) {
  if constexpr (CODES) {  // two positions side by side
    for (int i = threadIdx.x; i < BLOCK / 2 * (PADDED / 8); i += THREADS) {
      const int p = i / (PADDED / 8) * 2, column = i % (PADDED / 8) * 8;
      uint4 x = uint4{0, 0, 0, 0};
      if (base + p < end)
        x = load_constant(reinterpret_cast<const uint4*>(values + int64_t(base + p) * PADDED + 2 * column));
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float scale = base + p + t < end ? load_constant(scales + base + p + t) : 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (D % 16 == 0 || column + j < WIDE)
            to[(p + t) * WIDE + column + j] = base + p + t < end ? element(words, 2 * j + t) * scale : 0.0f;
      }
    }
  } else if constexpr (D % ITEMS == 0) {
    for (int i = threadIdx.x; i < BLOCK * D / ITEMS; i += THREADS) {
      const int p = i / (D / ITEMS);
      uint4 x = uint4{0, 0, 0, 0};
      if (base + p < end) x = load_constant(reinterpret_cast<const uint4*>(values + int64_t(base) * D + i * ITEMS));
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < ITEMS; j += 4)
        *reinterpret_cast<float4*>(to + i * ITEMS + j) =
            float4{element(words, j), element(words, j + 1), element(words, j + 2), element(words, j + 3)};
    }
  } else {
    for (int i = threadIdx.x; i < BLOCK * WIDE; i += THREADS) {
      const int p = i / WIDE, column = i % WIDE;
      float x = 0;
      if (base + p < end && column < D) {
        x = load_one(values + int64_t(base + p) * D + column);
      }
      to[i] = x;
    }
  }
}

QUERN_INLINE void run(const float* q, const Item* keys, const Item* values, const float* k_scale, const float* v_scale,
                      const int* span, float* out) {
  alignas(16) __shared__ float query[D][ROWS];
  alignas(16) __shared__ float staged[(D > WIDE ? D : WIDE) * BLOCK];  // keys, then values
  alignas(16) __shared__ float score[BLOCK][PITCH];
  alignas(16) __shared__ float factor[ROWS];
  const int thread = threadIdx.x, head = blockIdx.y * SHARED, kv = head / GROUP;
  const int token = blockIdx.x * TOKENS, valid = span[1];
  if (token >= valid) return;
  const int start = span[0] + token, end = span[0] + (token + TOKENS < valid ? token + TOKENS : valid);
  keys += int64_t(kv) * CAPACITY * D;
  values += int64_t(kv) * CAPACITY * (CODES ? PADDED : D);
  if constexpr (CODES) k_scale += kv * CAPACITY, v_scale += kv * CAPACITY;

  for (int i = thread; i < ROWS * D; i += THREADS) {
    const int r = i / D, t = token + r / SHARED;
    const bool real = r < TOKENS * SHARED && t < M;
    query[i % D][r] = real ? q[(t * HEADS + head + r % SHARED) * D + i % D] * QUERY_FACTOR : 0.0f;
  }
  float sums[4][FOURS][4] = {}, most = MASKED, total = 0;
  const int row4 = thread / COLUMN_THREADS * 4, column4 = thread % COLUMN_THREADS * 4;
  const int key_row = thread % ROW_THREADS * 4, key_column = thread / ROW_THREADS * KEY_COLUMNS;
  const int own_row = thread / SOFTMAX_THREADS, own = start + own_row / SHARED;

  for (int base = first_seen(start) / 16 * 16; base < end; base += BLOCK) {
    block_sync();  // the last block's values have been read
    stage_keys(keys, k_scale, base, staged);
    block_sync();
    float products[4][KEY_COLUMNS] = {};
#pragma unroll 4
    for (int e = 0; e < D; ++e) {
      const float4 x = *reinterpret_cast<const float4*>(&query[e][key_row]);
      const float rows[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int c = 0; c < KEY_COLUMNS; ++c) {
        const float key = staged[e * BLOCK + key_column + c];
#pragma unroll
        for (int r = 0; r < 4; ++r) products[r][c] = fmaf(rows[r], key, products[r][c]);
      }
    }
#pragma unroll
    for (int c = 0; c < KEY_COLUMNS; ++c)
      *reinterpret_cast<float4*>(&score[key_column + c][key_row]) =
          float4{capped(products[0][c]), capped(products[1][c]), capped(products[2][c]), capped(products[3][c])};
    block_sync();
    stage_values(values, v_scale, base, end, staged);
    float larger = most;
    for (int p = thread % SOFTMAX_THREADS; p < BLOCK; p += SOFTMAX_THREADS)
      if (sees(own, base + p)) larger = fmaxf(larger, score[p][own_row]);
    larger = warp_max<SOFTMAX_THREADS>(larger);
    float sum = 0;
    for (int p = thread % SOFTMAX_THREADS; p < BLOCK; p += SOFTMAX_THREADS) {
      const float weight = sees(own, base + p) ? exp2_approx(score[p][own_row] - larger) : 0.0f;
      score[p][own_row] = weight;
      sum += weight;
    }
    const float old = exp2_approx(most - larger);
    total = fmaf(total, old, warp_sum<SOFTMAX_THREADS>(sum));
    most = larger;
    if (thread % SOFTMAX_THREADS == 0) factor[own_row] = old;
    block_sync();
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int f = 0; f < FOURS; ++f)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r][f][i] *= factor[row4 + r];
#pragma unroll 2
    for (int p = 0; p < BLOCK; ++p) {
      const float4 w = *reinterpret_cast<const float4*>(&score[p][row4]);
      const float weights[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int f = 0; f < FOURS; ++f) {
        const int column = column4 + f * COLUMN_THREADS * 4;
        if (WIDE % (COLUMN_THREADS * 4) == 0 || column < WIDE) {
          const float4 v = *reinterpret_cast<const float4*>(&staged[p * WIDE + column]);
          const float loaded[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[r][f][i] = fmaf(weights[r], loaded[i], sums[r][f][i]);
        }
      }
    }
  }
  block_sync();
  if (thread % SOFTMAX_THREADS == 0) factor[own_row] = total;
  block_sync();
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = row4 + r, t = token + row / SHARED;
    if (row >= TOKENS * SHARED || t >= valid) continue;
#pragma unroll
    for (int f = 0; f < FOURS; ++f)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = column4 + f * COLUMN_THREADS * 4 + i;
        if (column < D) out[(t * HEADS + head + row % SHARED) * D + column] = sums[r][f][i] / factor[row];
      }
  }
}
