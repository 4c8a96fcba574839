// A tile of tokens of one kv head against the context, on tensor cores by mma.m16n8k16 (sm_80 on). See
// attention_mma.py. Constants: M, HEADS, GROUP, D, PADDED (D rounded up to 16), CAPACITY, SHARED query heads of one
// kv head, TOKENS of a tile, ROWS >= TOKENS * SHARED, BLOCK positions, THREADS = 2 ROWS, QUERY_FACTOR; Item: Half or
// int8_t. Row r is token r / SHARED, and query head r % SHARED of them. A warp has 16 rows; g = lane / 4 and t =
// lane % 4 as fragments count.

constexpr bool FAR_QUERY = D > 128;  // queries in shared memory, registers would not hold them

QUERN_INLINE void run(const float* q, const Item* keys, const Item* values, const float* k_scale, const float* v_scale,
                      const int* span, float* out) {
  alignas(16) __shared__ Half staged_keys[BLOCK * PADDED];
  alignas(16) __shared__ Half staged_values[BLOCK * PITCH];
  alignas(16) __shared__ uint4 queries[FAR_QUERY ? STEPS * THREADS : 1];
  __shared__ float k_scales[BLOCK], v_scales[BLOCK];
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int head = blockIdx.y * SHARED, kv = head / GROUP, token = blockIdx.x * TOKENS, valid = span[1];
  if (token >= valid) return;
  const int start = span[0] + token, last = span[0] + (token + TOKENS < valid ? token + TOKENS : valid) - 1;
  keys += int64_t(kv) * CAPACITY * D;
  values += int64_t(kv) * CAPACITY * (CODES ? PADDED : D);
  if constexpr (CODES) k_scale += kv * CAPACITY, v_scale += kv * CAPACITY;

  uint32_t query[FAR_QUERY ? 1 : STEPS][4];
  float factor[2], most[2] = {MASKED, MASKED}, total[2] = {0, 0};
  int own[2], place[2];  // of rows g and g + 8: position, and offset in q and out, -1 for what is no row
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = thread / 32 * 16 + h * 8 + g, of = token + r / SHARED;
    own[h] = start + r / SHARED;
    place[h] = r < TOKENS * SHARED && of < valid ? (of * HEADS + head + r % SHARED) * D : -1;
    const float* row = q + place[h];
    float largest = 0;
    if (place[h] >= 0)
      for (int i = t; i < D; i += 4) largest = fmaxf(largest, fabsf(load_constant(row + i)));
    const float one = to_one(warp_max<4>(largest), factor[h]);
    factor[h] *= QUERY_FACTOR;
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int e = s * 16 + c * 8 + 2 * t;
        const bool real = place[h] >= 0 && (D % 16 == 0 || e < D);
        const float low = real ? load_constant(row + e) * one : 0.0f;
        const float high = real && (D % 2 == 0 || e + 1 < D) ? load_constant(row + e + 1) * one : 0.0f;
        if constexpr (FAR_QUERY) {
          reinterpret_cast<uint32_t*>(queries + s * THREADS + thread)[2 * c + h] = to_half2(low, high).bits;
        } else {
          query[s][2 * c + h] = to_half2(low, high).bits;
        }
      }
  }
  float sums[2 * STEPS][4] = {}, unit = 0;  // unit: what a weight of 1 is worth in `sums`, with codes
  clear_padding(staged_keys, staged_values);

  int base = first_seen(start) / 16 * 16;
  stage_keys(keys, base, staged_keys);
  async_commit();
  for (; base <= last; base += BLOCK) {
    stage_values(values, base, last + 1, staged_values);
    async_commit();
    float largest_scale = 0;
    if constexpr (CODES) {
      for (int p = thread; p < BLOCK; p += THREADS) {
        k_scales[p] = base + p <= last ? load_constant(k_scale + base + p) : 0.0f;
        v_scales[p] = base + p <= last ? load_constant(v_scale + base + p) : 0.0f;
      }
    }
    async_wait<1>();
    block_sync();
    float scores[2 * BLOCKS][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      if constexpr (FAR_QUERY) {
        const uint4 x = queries[s * THREADS + thread];
        query[0][0] = x.x, query[0][1] = x.y, query[0][2] = x.z, query[0][3] = x.w;
      }
      const uint32_t(&a)[4] = query[FAR_QUERY ? 0 : s];
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        uint32_t loaded[4];
        load_matrix_x4_transposed(
            loaded, staged_keys + key_place(b, s * 16 + (lane / 8 % 2) * 8 + lane % 8, lane / 16));
        const uint32_t first[2] = {loaded[0], loaded[1]}, second[2] = {loaded[2], loaded[3]};
        mma_16x8x16(scores[2 * b], a, first);
        mma_16x8x16(scores[2 * b + 1], a, second);
      }
    }
    block_sync();
    if (base + BLOCK <= last) stage_keys(keys, base + BLOCK, staged_keys);
    async_commit();

    float old[2];
    if constexpr (CODES) {
      for (int p = 0; p < BLOCK; ++p) largest_scale = fmaxf(largest_scale, v_scales[p]);
    }
    const float new_unit = fmaxf(unit, largest_scale);
    const float per_unit = new_unit > 0 ? 1.0f / new_unit : 0.0f;
    const bool whole = base + BLOCK - 1 <= start && (WINDOW == 0 || base > last - WINDOW);
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < 2 * BLOCKS; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float scale = factor[h];
          if constexpr (CODES) scale *= k_scales[n * 8 + 2 * t + c];
          scores[n][2 * h + c] = capped(scores[n][2 * h + c] * scale);
        }
    if (!whole) {  // all threads go the same way, mostly around it
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int n = 0; n < 2 * BLOCKS; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if (!sees(own[h], base + n * 8 + 2 * t + c)) scores[n][2 * h + c] = MASKED;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float larger = most[h];
#pragma unroll
      for (int n = 0; n < 2 * BLOCKS; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) larger = fmaxf(larger, scores[n][2 * h + c]);
      larger = warp_max<4>(larger);
      float sum = 0;
#pragma unroll
      for (int n = 0; n < 2 * BLOCKS; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float weight = exp2_approx(scores[n][2 * h + c] - larger);
          sum += weight;
          if constexpr (CODES) {
            scores[n][2 * h + c] = weight * (v_scales[n * 8 + 2 * t + c] * per_unit);
          } else {
            scores[n][2 * h + c] = weight;
          }
        }
      old[h] = exp2_approx(most[h] - larger);
      total[h] = fmaf(total[h], old[h], warp_sum<4>(sum));
      most[h] = larger;
      if constexpr (CODES) old[h] *= unit * per_unit;
    }
    unit = new_unit;
#pragma unroll
    for (int n = 0; n < 2 * STEPS; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[n][c] *= old[c / 2];
    async_wait<1>();
    block_sync();
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const uint32_t weights[4] = {to_half2(scores[2 * b][0], scores[2 * b][1]).bits,
                                   to_half2(scores[2 * b][2], scores[2 * b][3]).bits,
                                   to_half2(scores[2 * b + 1][0], scores[2 * b + 1][1]).bits,
                                   to_half2(scores[2 * b + 1][2], scores[2 * b + 1][3]).bits};
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        uint32_t loaded[4];
        load_matrix_x4_transposed(
            loaded, staged_values + (b * 16 + (lane / 8 % 2) * 8 + lane % 8) * PITCH + s * 16 + lane / 16 * 8);
        const uint32_t first[2] = {loaded[0], loaded[1]}, second[2] = {loaded[2], loaded[3]};
        mma_16x8x16(sums[2 * s], weights, first);
        mma_16x8x16(sums[2 * s + 1], weights, second);
      }
    }
    block_sync();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (place[h] < 0) continue;
    const float inverse = (CODES ? unit : 1.0f) / total[h];
#pragma unroll
    for (int n = 0; n < 2 * STEPS; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + 2 * t + c;
        if (D % 16 == 0 || column < D) out[place[h] + column] = sums[n][2 * h + c] * inverse;
      }
  }
}
