// A tile of tokens of one kv head against the context, on tensor cores by wmma (sm_70 and 72). See attention_wmma.py.
// Constants as attention_mma.cu. A warp has 16 rows; lanes 2 r and 2 r + 1 have row r's softmax. Which lane holds
// what of a fragment is not told, so scores, weights and factors of rows go through shared memory.

constexpr int WARPS = ROWS / 16, SCORE_PITCH = BLOCK + 4, WEIGHT_PITCH = BLOCK + 8;

QUERN_INLINE void run(const float* q, const Item* keys, const Item* values, const float* k_scale, const float* v_scale,
                      const int* span, float* out) {
  alignas(32) __shared__ Half staged_keys[BLOCK * PADDED];
  alignas(32) __shared__ Half staged_values[BLOCK * PITCH];
  alignas(32) __shared__ Half query[ROWS * PITCH];
  alignas(32) __shared__ float all_scores[WARPS][16 * SCORE_PITCH];
  alignas(32) __shared__ Half all_weights[WARPS][16 * WEIGHT_PITCH];
  alignas(32) __shared__ float all_tiles[WARPS][16 * 16];
  __shared__ float k_scales[BLOCK], v_scales[BLOCK];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, row = lane / 2, side = lane % 2;
  const int head = blockIdx.y * SHARED, kv = head / GROUP, token = blockIdx.x * TOKENS, valid = span[1];
  if (token >= valid) return;
  const int start = span[0] + token, last = span[0] + (token + TOKENS < valid ? token + TOKENS : valid) - 1;
  keys += int64_t(kv) * CAPACITY * D;
  values += int64_t(kv) * CAPACITY * (CODES ? PADDED : D);
  if constexpr (CODES) k_scale += kv * CAPACITY, v_scale += kv * CAPACITY;
  float *scores = all_scores[warp], *tile = all_tiles[warp];
  Half* weights = all_weights[warp];

  const int r = warp * 16 + row, of = token + r / SHARED, own = start + r / SHARED;
  const int place = r < TOKENS * SHARED && of < valid ? (of * HEADS + head + r % SHARED) * D : -1;
  float largest = 0, factor;
  if (place >= 0)
    for (int i = side; i < D; i += 2) largest = fmaxf(largest, fabsf(load_constant(q + place + i)));
  const float one = to_one(warp_max<2>(largest), factor);
  factor *= QUERY_FACTOR;
  for (int i = side; i < PADDED; i += 2)
    query[r * PITCH + i] = to_half(place >= 0 && i < D ? load_constant(q + place + i) * one : 0.0f);
  clear_padding(staged_keys, staged_values);
  float sums[STEPS][8] = {}, most = MASKED, total = 0, unit = 0;  // unit: what a weight of 1 is worth, with codes

  for (int base = first_seen(start) / 16 * 16; base <= last; base += BLOCK) {
    stage_keys(keys, base, staged_keys);
    stage_values(values, base, last + 1, staged_values);
    if constexpr (CODES) {
      for (int p = thread; p < BLOCK; p += THREADS) {
        k_scales[p] = base + p <= last ? load_constant(k_scale + base + p) : 0.0f;
        v_scales[p] = base + p <= last ? load_constant(v_scale + base + p) : 0.0f;
      }
    }
    async_commit();
    async_wait<0>();
    block_sync();
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      float products[8] = {};
#pragma unroll 4
      for (int s = 0; s < STEPS; ++s) {
        uint32_t left[8], right[8];
        wmma_load_a(left, query + warp * 16 * PITCH + s * 16, PITCH);
        wmma_load_b_rows(right, staged_keys + (b * PADDED + s * 16) * 16, 16);
        wmma_multiply_rows(products, left, right);
      }
      wmma_store(scores + b * 16, products, SCORE_PITCH);
    }
    warp_sync();
    float largest_scale = 0, larger = most, sum = 0;
    if constexpr (CODES) {
      for (int p = 0; p < BLOCK; ++p) largest_scale = fmaxf(largest_scale, v_scales[p]);
    }
    const float new_unit = fmaxf(unit, largest_scale), per_unit = new_unit > 0 ? 1.0f / new_unit : 0.0f;
#pragma unroll
    for (int i = 0; i < BLOCK / 2; ++i) {
      const int p = 2 * i + side;
      float scale = factor;
      if constexpr (CODES) scale *= k_scales[p];
      const float score = sees(own, base + p) ? capped(scores[row * SCORE_PITCH + p] * scale) : MASKED;
      scores[row * SCORE_PITCH + p] = score;
      larger = fmaxf(larger, score);
    }
    larger = warp_max<2>(larger);
#pragma unroll
    for (int i = 0; i < BLOCK / 2; ++i) {
      const int p = 2 * i + side;
      float weight = exp2_approx(scores[row * SCORE_PITCH + p] - larger);
      sum += weight;
      if constexpr (CODES) weight *= v_scales[p] * per_unit;
      weights[row * WEIGHT_PITCH + p] = to_half(weight);
    }
    float old = exp2_approx(most - larger);
    total = fmaf(total, old, warp_sum<2>(sum));
    most = larger;
    if constexpr (CODES) old *= unit * per_unit;
    unit = new_unit;
#pragma unroll
    for (int i = 0; i < 8; ++i) tile[row * 16 + 2 * i + side] = old;
    warp_sync();
    float factors[8];
    wmma_load_c(factors, tile, 16);  // of the rows that the lane holds
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[s][i] *= factors[i];
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        uint32_t left[8], right[8];
        wmma_load_a(left, weights + b * 16, WEIGHT_PITCH);
        wmma_load_b_rows(right, staged_values + b * 16 * PITCH + s * 16, PITCH);
        wmma_multiply_rows(sums[s], left, right);
      }
    }
    block_sync();
  }
  const float inverse = (CODES ? unit : 1.0f) / total;
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    wmma_store(tile, sums[s], 16);
    warp_sync();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = s * 16 + 2 * i + side;
      if (place >= 0 && column < D) out[place + column] = tile[row * 16 + 2 * i + side] * inverse;
    }
    warp_sync();
  }
}
