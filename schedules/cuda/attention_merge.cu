// The mean of query head blockIdx.x over the parts of the context that one token sees. Constants: HEADS, D, CHUNK,
// MERGE_THREADS. sums f32[parts, heads, d], stats f32[parts, heads, 2] = (maximum, sum of weights); out f32[heads, d].
// Only the parts that were computed are read.

extern "C" __global__ void __launch_bounds__(MERGE_THREADS)
KERNEL_merge(const float* __restrict__ sums, const float* __restrict__ stats, const int* __restrict__ span,
             float* __restrict__ out) {
  const int head = blockIdx.x, own = span[0], end = own / CHUNK + 1, begin = first_seen(own) / CHUNK;
  float most = MASKED, total = 0;
#pragma unroll 4
  for (int part = begin; part < end; ++part) most = fmaxf(most, load_constant(stats + (part * HEADS + head) * 2));
  constexpr int EACH = (D + MERGE_THREADS - 1) / MERGE_THREADS;
  float mean[EACH] = {};
#pragma unroll 4
  for (int part = begin; part < end; ++part) {
    const float* mine = stats + (part * HEADS + head) * 2;
    const float factor = exp2_approx(load_constant(mine) - most);
    total = fmaf(factor, load_constant(mine + 1), total);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int column = threadIdx.x + i * MERGE_THREADS;
      if (column < D) mean[i] = fmaf(factor, load_constant(sums + (part * HEADS + head) * D + column), mean[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int column = threadIdx.x + i * MERGE_THREADS;
    if (column < D) out[head * D + column] = mean[i] / total;
  }
}
