// A tile of tokens of one kv head against the context, on tensor cores by wmma (sm_70 and 72). See attention_wmma.py.
// Constants as attention_mma.cu. A warp has 16 rows; lanes 2 r and 2 r + 1 have row r's softmax. Which lane holds
// what of a fragment is not told, so scores, weights and factors of rows go through shared memory.

// A lane reads four scores of its row at a time: with these pitches neither loads nor stores meet in a bank.
constexpr int WARPS = ROWS / 16, SCORE_PITCH = BLOCK + 8, WEIGHT_PITCH = BLOCK + 8, TILE_PITCH = 20;
// Scores, and once they are read, a tile of 16 x 16 and behind it the weights.
constexpr int TILE = 16 * TILE_PITCH, BOTH = TILE + 16 * WEIGHT_PITCH / 2;
constexpr int OWN = BOTH > 16 * SCORE_PITCH ? BOTH : 16 * SCORE_PITCH;

QUERN_INLINE void run(const float* q, const Item* keys, const Item* values, const float* k_scale, const float* v_scale,
                      const int* span, float* out) {
  alignas(32) __shared__ Half staged_keys[BLOCK * PADDED];
  alignas(32) __shared__ Half staged_values[BLOCK * PITCH];
  alignas(32) __shared__ Half query[ROWS * PITCH];
  alignas(32) __shared__ float all_scores[WARPS][OWN];
  __shared__ float k_scales[BLOCK], v_scales[BLOCK];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, row = lane / 2, side = lane % 2;
  const int head = blockIdx.y * SHARED, kv = head / GROUP, token = blockIdx.x * TOKENS, valid = span[1];
  if (token >= valid) return;
  const int start = span[0] + token, last = span[0] + (token + TOKENS < valid ? token + TOKENS : valid) - 1;
  keys += int64_t(kv) * CAPACITY * D;
  values += int64_t(kv) * CAPACITY * (CODES ? PADDED : D);
  if constexpr (CODES) k_scale += kv * CAPACITY, v_scale += kv * CAPACITY;
  float *scores = all_scores[warp], *tile = scores;
  Half* weights = reinterpret_cast<Half*>(tile + TILE);

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
    {  // a step's fragment of the queries serves all positions
      float products[BLOCKS][8] = {};
#pragma unroll 4
      for (int s = 0; s < STEPS; ++s) {
        uint32_t left[8];
        wmma_load_a(left, query + warp * 16 * PITCH + s * 16, PITCH);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
          uint32_t right[8];
          wmma_load_b_rows(right, staged_keys + (b * PADDED + s * 16) * 16, 16);
          wmma_multiply_rows(products[b], left, right);
        }
      }
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) wmma_store(scores + b * 16, products[b], SCORE_PITCH);
    }
    warp_sync();
    float largest_scale = 0, larger = most, sum = 0;
    if constexpr (CODES) {
      for (int p = 0; p < BLOCK; ++p) largest_scale = fmaxf(largest_scale, v_scales[p]);
    }
    const float new_unit = fmaxf(unit, largest_scale), per_unit = new_unit > 0 ? 1.0f / new_unit : 0.0f;
    float own_scores[BLOCK / 2];
#pragma unroll
    for (int i = 0; i < BLOCK / 8; ++i) {
      const float4 four = *reinterpret_cast<const float4*>(scores + row * SCORE_PITCH + 8 * i + 4 * side);
      own_scores[4 * i] = four.x, own_scores[4 * i + 1] = four.y;
      own_scores[4 * i + 2] = four.z, own_scores[4 * i + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < BLOCK / 2; ++i) {
      const int p = i / 4 * 8 + 4 * side + i % 4;
      float scale = factor;
      if constexpr (CODES) scale *= k_scales[p];
      own_scores[i] = sees(own, base + p) ? capped(own_scores[i] * scale) : MASKED;
      larger = fmaxf(larger, own_scores[i]);
    }
    larger = warp_max<2>(larger);  // all lanes have read their scores, too
    warp_sync();
#pragma unroll
    for (int i = 0; i < BLOCK / 8; ++i) {
      float weight[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        weight[j] = exp2_approx(own_scores[4 * i + j] - larger);
        sum += weight[j];
        if constexpr (CODES) weight[j] *= v_scales[8 * i + 4 * side + j] * per_unit;
      }
      *reinterpret_cast<uint2*>(weights + row * WEIGHT_PITCH + 8 * i + 4 * side) =
          uint2{to_half2(weight[0], weight[1]).bits, to_half2(weight[2], weight[3]).bits};
    }
    float old = exp2_approx(most - larger);
    total = fmaf(total, old, warp_sum<2>(sum));
    most = larger;
    if constexpr (CODES) old *= unit * per_unit;
    unit = new_unit;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      *reinterpret_cast<float4*>(tile + row * TILE_PITCH + 8 * side + 4 * i) = float4{old, old, old, old};
    warp_sync();
    float factors[8];
    wmma_load_c(factors, tile, TILE_PITCH);  // of the rows that the lane holds
    uint32_t left[BLOCKS][8];
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) wmma_load_a(left[b], weights + b * 16, WEIGHT_PITCH);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[s][i] *= factors[i];
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        uint32_t right[8];
        wmma_load_b_rows(right, staged_values + b * 16 * PITCH + s * 16, PITCH);
        wmma_multiply_rows(sums[s], left[b], right);
      }
    }
    block_sync();
  }
  const float inverse = (CODES ? unit : 1.0f) / total;
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    wmma_store(tile, sums[s], TILE_PITCH);
    warp_sync();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = s * 16 + 2 * i + side;
      if (place >= 0 && column < D) out[place + column] = tile[row * TILE_PITCH + 2 * i + side] * inverse;
    }
    warp_sync();
  }
}
