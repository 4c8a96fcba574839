// Activations to fp16 for many tokens, a block a token: rounded f16[M, STORED] = x * 2^e in the places of the
// weights' inputs, back f32[M] = 2^-e, sums f32[M, STORED / SPAN] of what was rounded (for offsets). Constants as
// linear_half_shared.cu.

constexpr int ROUND_THREADS = 256;

extern "C" __global__ void __launch_bounds__(ROUND_THREADS, 1)
KERNEL_round(const float* __restrict__ x, Half* __restrict__ rounded, float* __restrict__ back,
             float* __restrict__ sums) {
  __shared__ float largest[ROUND_THREADS / 32];
  const int token = blockIdx.x, thread = threadIdx.x;
  float most = 0;
  for (int k = thread; k < K; k += ROUND_THREADS) most = fmaxf(most, fabsf(load_constant(x + token * K + k)));
  most = warp_max(most);
  if (thread % 32 == 0) largest[thread / 32] = most;
  block_sync();
#pragma unroll
  for (int w = 0; w < ROUND_THREADS / 32; ++w) most = fmaxf(most, largest[w]);
  float size;
  const float times = to_eight(most, size);
  if (thread == 0) back[token] = size;
  for (int p = 2 * thread; p < STORED; p += 2 * ROUND_THREADS) {
    const int low = input_of(p), high = input_of(p + 1);
    *reinterpret_cast<Half2*>(rounded + token * STORED + p) =
        to_half2(low < 0 ? 0.0f : load_constant(x + token * K + low) * times,
                 high < 0 ? 0.0f : load_constant(x + token * K + high) * times);
  }
  if constexpr (AFFINE == 1) {
    block_sync();
    for (int s = thread; s < STORED / SPAN; s += ROUND_THREADS) {
      float sum = 0;
      for (int i = 0; i < SPAN; ++i) sum += to_float(rounded[token * STORED + s * SPAN + i]);
      sums[token * (STORED / SPAN) + s] = sum;
    }
  }
}
