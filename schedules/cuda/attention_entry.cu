// The function of a prompt's kernel over keys and values as they are.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
KERNEL(const float* __restrict__ q, const Item* __restrict__ keys, const Item* __restrict__ values,
       const int* __restrict__ span, float* __restrict__ out) {
  run(q, keys, values, nullptr, nullptr, span, out);
}
