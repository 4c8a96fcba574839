// The function of a prompt's kernel over codes.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
KERNEL(const float* __restrict__ q, const int8_t* __restrict__ keys, const int8_t* __restrict__ values,
       const float* __restrict__ k_scale, const float* __restrict__ v_scale, const int* __restrict__ span,
       float* __restrict__ out) {
  run(q, keys, values, k_scale, v_scale, span, out);
}
