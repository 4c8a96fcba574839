// What CUDA kernels of quern are written with: everything that is not plain C++ is a function here.
//
// For NVRTC every wrapper is inline PTX (the architecture's own instruction, or plain arithmetic where it has none).
// For the emulator (tests/emulator/cuda/emulator.h) the same names are C++ that checks its operands. Kernels include
// nothing else: no header of the CUDA toolkit is needed. NVRTC itself knows threadIdx, blockIdx, __shared__, uint4,
// float4, fmaf, fmaxf, fminf, fabsf, sqrtf, rintf, and so does the emulator.
//
// Floating point: device code is compiled without contraction and without fast math, so every +, *, / and sqrtf is
// rounded once, and a fused multiply-add is where it says fmaf. The emulator therefore gives the bits of the device,
// except for exp2_approx and reciprocal_approx, whose hardware results differ by 2 units in the last place at most.
//
// Shared memory: `__shared__` arrays inside a function, or dynamic_shared() for the launch's shared_bytes. All threads
// of a block must reach every block_sync(), all 32 lanes of a warp every warp function, none may have left before.
#pragma once

#ifndef __CUDACC_RTC__
#include "emulator.h"
#else

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

#define QUERN_INLINE __device__ __forceinline__
#define QUERN_SM (__CUDA_ARCH__ / 10)  // 53, 72, 87, 90

// ---- half precision: storage types; arithmetic by the functions below
struct Half {
  uint16_t bits;
};
struct alignas(4) Half2 {
  uint32_t bits;  // first element in the low half
};

QUERN_INLINE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
QUERN_INLINE Half to_half(float x) {  // nearest, ties to even
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
QUERN_INLINE Half2 pack_half2(Half low, Half high) {
  Half2 y;
  asm("mov.b32 %0, {%1, %2};" : "=r"(y.bits) : "h"(low.bits), "h"(high.bits));
  return y;
}
QUERN_INLINE Half low_half(Half2 x) { return Half{static_cast<uint16_t>(x.bits)}; }
QUERN_INLINE Half high_half(Half2 x) { return Half{static_cast<uint16_t>(x.bits >> 16)}; }
#define QUERN_HALF2_OP(NAME, PTX)                                                       \
  QUERN_INLINE Half2 NAME(Half2 a, Half2 b) {                                           \
    Half2 y;                                                                            \
    asm(PTX " %0, %1, %2;" : "=r"(y.bits) : "r"(a.bits), "r"(b.bits));                   \
    return y;                                                                           \
  }
QUERN_HALF2_OP(add_half2, "add.rn.f16x2")
QUERN_HALF2_OP(sub_half2, "sub.rn.f16x2")
QUERN_HALF2_OP(mul_half2, "mul.rn.f16x2")
#undef QUERN_HALF2_OP
QUERN_INLINE Half2 fma_half2(Half2 a, Half2 b, Half2 c) {  // a * b + c, rounded once
  Half2 y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y.bits) : "r"(a.bits), "r"(b.bits), "r"(c.bits));
  return y;
}

// One half of a pair twice: Maxwell's arithmetic takes either half of an operand twice, so it is no instruction there.
#define QUERN_TWICE(NAME, ONE)                                                                             \
  QUERN_INLINE Half2 NAME(Half2 x) {                                                                       \
    Half2 y;                                                                                               \
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {" ONE ", " ONE "};}" : "=r"(y.bits) : "r"(x.bits)); \
    return y;                                                                                              \
  }
QUERN_TWICE(low_twice, "low")
QUERN_TWICE(high_twice, "high")
#undef QUERN_TWICE

// ---- fp32
QUERN_INLINE float exp2_approx(float x) {  // 2^x, within 2 units in the last place; denormal results are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
QUERN_INLINE float reciprocal_approx(float x) {  // 1 / x, within 1 unit in the last place
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
QUERN_INLINE int32_t round_to_int(float x) {  // nearest, ties to even
  int32_t y;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
QUERN_INLINE uint32_t float_bits(float x) { return __float_as_uint(x); }
QUERN_INLINE float bits_float(uint32_t x) { return __uint_as_float(x); }

// x, which the compiler then knows nothing of: it unrolls loops of known length in spite of `#pragma unroll 1`.
QUERN_INLINE int32_t opaque(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Ends the launch with an error: for what must not happen.
QUERN_INLINE void trap() { asm volatile("trap;"); }

// ---- integers
template <int TABLE>
QUERN_INLINE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {  // TABLE: 0xF0 for a, 0xCC for b, 0xAA for c
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(y) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
  return y;
}
QUERN_INLINE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {  // bytes 0..3 are a's, 4..7 b's
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
  return y;
}
// c + sum of four products of bytes, as a signed 32-bit integer. Exact; sm_53 has no instruction for it.
QUERN_INLINE int32_t dp4a(int32_t a, int32_t b, int32_t c) {  // both signed
#if __CUDA_ARCH__ >= 610
  int32_t y;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
#else
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
#endif
}
QUERN_INLINE int32_t dp4a_unsigned(uint32_t a, int32_t b, int32_t c) {  // a unsigned, b signed
#if __CUDA_ARCH__ >= 610
  int32_t y;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
#else
  for (int i = 0; i < 32; i += 8) c += static_cast<uint8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
#endif
}

// c + the products of two signed 16-bit numbers with two signed bytes, the low two of b (HALF 0) or the high two (1).
template <int HALF>
QUERN_INLINE int32_t dp2a(int32_t a, uint32_t b, int32_t c) {
#if __CUDA_ARCH__ >= 610
  int32_t y;
  if constexpr (HALF == 0) {
    asm("dp2a.lo.s32.s32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("dp2a.hi.s32.s32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  }
  return y;
#else  // a byte is widened once for all that multiply it; a product of 16 bits is one XMAD
  c += static_cast<int16_t>(a) * static_cast<int8_t>(b >> 16 * HALF);
  return c + static_cast<int16_t>(a >> 16) * static_cast<int8_t>(b >> (16 * HALF + 8));
#endif
}

// ---- global memory. Addresses are multiples of the type's size: 1, 2, 4, 8 or 16 bytes.
#if __CUDA_ARCH__ >= 700
#define QUERN_STREAM "ld.global.nc.L1::no_allocate"
#else
#define QUERN_STREAM "ld.global.nc"
#endif
#define QUERN_LOADS(NAME, PTX)                                                                                \
  QUERN_INLINE uint4 NAME(const uint4* p) {                                                                   \
    uint4 y;                                                                                                  \
    asm volatile(PTX ".v4.u32 {%0, %1, %2, %3}, [%4];"                                                        \
                 : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w) : "l"(p));                                      \
    return y;                                                                                                 \
  }                                                                                                           \
  QUERN_INLINE uint2 NAME(const uint2* p) {                                                                   \
    uint2 y;                                                                                                  \
    asm volatile(PTX ".v2.u32 {%0, %1}, [%2];" : "=r"(y.x), "=r"(y.y) : "l"(p));                              \
    return y;                                                                                                 \
  }                                                                                                           \
  QUERN_INLINE uint32_t NAME(const uint32_t* p) {                                                             \
    uint32_t y;                                                                                               \
    asm volatile(PTX ".u32 %0, [%1];" : "=r"(y) : "l"(p));                                                    \
    return y;                                                                                                 \
  }                                                                                                           \
  QUERN_INLINE float NAME(const float* p) {                                                                   \
    float y;                                                                                                  \
    asm volatile(PTX ".f32 %0, [%1];" : "=f"(y) : "l"(p));                                                    \
    return y;                                                                                                 \
  }                                                                                                           \
  QUERN_INLINE Half NAME(const Half* p) {                                                                     \
    Half y;                                                                                                   \
    asm volatile(PTX ".u16 %0, [%1];" : "=h"(y.bits) : "l"(p));                                               \
    return y;                                                                                                 \
  }                                                                                                           \
  QUERN_INLINE uint8_t NAME(const uint8_t* p) {                                                               \
    uint16_t y;                                                                                               \
    asm volatile(PTX ".u8 %0, [%1];" : "=h"(y) : "l"(p));                                                     \
    return static_cast<uint8_t>(y);                                                                           \
  }
QUERN_LOADS(load_stream, QUERN_STREAM)   // what is read once: weights. Must not be written by this launch.
QUERN_LOADS(load_constant, "ld.global.nc")  // what neighbours read again. Must not be written by this launch.
#undef QUERN_LOADS
#undef QUERN_STREAM
template <class T>
QUERN_INLINE T load(const T* p) { return *p; }  // global or shared, perhaps written before by this launch
template <class T>
struct QuernSame {
  typedef T Type;
};
template <class T>
QUERN_INLINE void store(T* p, typename QuernSame<T>::Type value) { *p = value; }

// ---- shared memory, barriers
extern __shared__ uint4 quern_dynamic_shared[];
QUERN_INLINE uint8_t* dynamic_shared() { return reinterpret_cast<uint8_t*>(quern_dynamic_shared); }  // 16-aligned
QUERN_INLINE void block_sync() { __syncthreads(); }
QUERN_INLINE void warp_sync() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }
QUERN_INLINE uint32_t shared_address(const void* p) {  // not by inline PTX, which would hide offsets from the compiler
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies from global to shared memory that run beside the computation (sm_80 on; plain copies before). BYTES is 4, 8 or
// 16, and both addresses are multiples of it. The copies of a thread since its last commit are a group; async_wait<N>
// returns when all but its last N groups are there, for this thread: others see them after a block_sync().
template <int BYTES>
struct QuernPiece;
template <>
struct QuernPiece<4> {
  typedef uint32_t Type;
};
template <>
struct QuernPiece<8> {
  typedef uint2 Type;
};
template <>
struct QuernPiece<16> {
  typedef uint4 Type;
};
template <int BYTES>
QUERN_INLINE void async_copy(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  if (BYTES == 16)  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES) : "memory");
#else
  typedef typename QuernPiece<BYTES>::Type Piece;
  *static_cast<Piece*>(to) = load_constant(static_cast<const Piece*>(from));
#endif
}
QUERN_INLINE void async_copy16(void* to, const void* from) { async_copy<16>(to, from); }
// The same, but only the first `bytes` (0 to 16) are read; the rest becomes 0. With 0 bytes nothing is read.
QUERN_INLINE void async_copy16(void* to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
#else
  uint4 value = uint4{0, 0, 0, 0};
  if (bytes == 16) {
    value = load_constant(static_cast<const uint4*>(from));
  } else {
    uint32_t words[4] = {0, 0, 0, 0};
    for (int i = 0; i < 16; ++i)
      if (i < bytes) words[i / 4] |= uint32_t(static_cast<const uint8_t*>(from)[i]) << (i % 4 * 8);
    value = uint4{words[0], words[1], words[2], words[3]};
  }
  *static_cast<uint4*>(to) = value;
#endif
}
QUERN_INLINE void async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int GROUPS>
QUERN_INLINE void async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

// ---- warp functions: all 32 lanes take part
QUERN_INLINE uint32_t shuffle_xor(uint32_t x, int mask) {  // of lane ^ mask
  uint32_t y;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(y) : "r"(x), "r"(mask));
  return y;
}
QUERN_INLINE uint32_t shuffle(uint32_t x, int lane) {  // of the lane given
  uint32_t y;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(y) : "r"(x), "r"(lane));
  return y;
}
QUERN_INLINE uint32_t shuffle_down(uint32_t x, int by) {  // of lane + by; beyond lane 31 the lane's own
  uint32_t y;
  asm volatile("shfl.sync.down.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(y) : "r"(x), "r"(by));
  return y;
}
QUERN_INLINE uint32_t ballot(bool x) {  // bit i: lane i's
  uint32_t y;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, 0xffffffff; }"
               : "=r"(y) : "r"(uint32_t(x)));
  return y;
}

#if __CUDA_ARCH__ >= 750
// 8x8 matrices of 16-bit elements from shared memory: lane 8 i + j gives the address of row j of matrix i (16 bytes,
// 16-aligned); register i gets, of matrix i, elements 2 (lane % 4) and one more of row lane / 4. _transposed: of column.
QUERN_INLINE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
QUERN_INLINE void load_matrix_x2(uint32_t (&r)[2], const void* row) {  // addresses of lanes 0 to 15
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
QUERN_INLINE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
QUERN_INLINE void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
#endif

#if __CUDA_ARCH__ >= 800
// c[16, 8] += a[16, k] b[k, 8], with g = lane / 4 and t = lane % 4:
//   c[0], c[1]: row g, columns 2 t and 2 t + 1; c[2], c[3]: row g + 8
// int8, k = 32. a[0], a[1]: rows g and g + 8, inputs 4 t to 4 t + 3; a[2], a[3]: inputs 16 + 4 t. b[0]: column g, inputs
// 4 t to 4 t + 3; b[1]: 16 + 4 t. fp16, k = 16. a[0], a[1]: rows g and g + 8, inputs 2 t, 2 t + 1; a[2], a[3]: 8 + 2 t;
// b[0]: column g, inputs 2 t, 2 t + 1; b[1]: 8 + 2 t. (PTX ISA, matrix fragments for mma.m16n8k16 and m16n8k32)
// The fourth operand, where there is one, is added instead of c, which is then only written.
#define QUERN_MMA(NAME, PTX, TYPE, LETTER)                                                                     \
  QUERN_INLINE void NAME(TYPE (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const TYPE (&to)[4]) {  \
    TYPE d[4];                                                                                                 \
    asm volatile(PTX " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                    \
                 : "=" LETTER(d[0]), "=" LETTER(d[1]), "=" LETTER(d[2]), "=" LETTER(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), LETTER(to[0]),             \
                   LETTER(to[1]), LETTER(to[2]), LETTER(to[3]));                                                \
    c[0] = d[0], c[1] = d[1], c[2] = d[2], c[3] = d[3];                                                        \
  }                                                                                                            \
  QUERN_INLINE void NAME(TYPE (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { NAME(c, a, b, c); }
QUERN_MMA(mma_16x8x32, "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", int32_t, "r")
QUERN_MMA(mma_16x8x32_unsigned_a, "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32", int32_t, "r")
QUERN_MMA(mma_16x8x16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", float, "f")
#undef QUERN_MMA
#endif

#if __CUDA_ARCH__ >= 700
// 16x16x16 products of a warp (sm_70 fp16, sm_72 int8). Which lane holds what is unknown: load an array of numbers with
// wmma_load_c to find out. `stride` counts elements; a is [16, stride] by rows, b is [16 columns, stride]: column by
// column, that is k runs fastest in both. Addresses are 32-aligned; strides are multiples of 16 bytes.
QUERN_INLINE void wmma_load_a(uint32_t (&r)[8], const Half* p, int stride) {
  asm volatile("wmma.load.a.sync.aligned.row.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7])
               : "r"(shared_address(p)), "r"(stride) : "memory");
}
QUERN_INLINE void wmma_load_b(uint32_t (&r)[8], const Half* p, int stride) {
  asm volatile("wmma.load.b.sync.aligned.col.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7])
               : "r"(shared_address(p)), "r"(stride) : "memory");
}
QUERN_INLINE void wmma_load_b_rows(uint32_t (&r)[8], const Half* p, int stride) {  // b is [16 k, stride] by rows
  asm volatile("wmma.load.b.sync.aligned.row.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7])
               : "r"(shared_address(p)), "r"(stride) : "memory");
}
QUERN_INLINE void wmma_load_c(float (&r)[8], const float* p, int stride) {
  asm volatile("wmma.load.c.sync.aligned.row.m16n16k16.shared.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
               : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3]), "=f"(r[4]), "=f"(r[5]), "=f"(r[6]), "=f"(r[7])
               : "r"(shared_address(p)), "r"(stride) : "memory");
}
QUERN_INLINE void wmma_store(float* p, const float (&r)[8], int stride) {  // to shared memory
  asm volatile("wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [%8], {%0, %1, %2, %3, %4, %5, %6, %7}, %9;" ::
               "f"(r[0]), "f"(r[1]), "f"(r[2]), "f"(r[3]), "f"(r[4]), "f"(r[5]), "f"(r[6]), "f"(r[7]),
               "r"(shared_address(p)), "r"(stride) : "memory");
}
QUERN_INLINE void wmma_multiply(float (&c)[8], const uint32_t (&a)[8], const uint32_t (&b)[8]) {  // c += a b
  asm volatile("wmma.mma.sync.aligned.row.col.m16n16k16.f32.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
               "{%8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19, %20, %21, %22, %23}, "
               "{%0, %1, %2, %3, %4, %5, %6, %7};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]),
                 "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(b[4]), "r"(b[5]), "r"(b[6]), "r"(b[7]));
}
QUERN_INLINE void wmma_multiply_rows(float (&c)[8], const uint32_t (&a)[8], const uint32_t (&b)[8]) {  // b of _rows
  asm volatile("wmma.mma.sync.aligned.row.row.m16n16k16.f32.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
               "{%8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19, %20, %21, %22, %23}, "
               "{%0, %1, %2, %3, %4, %5, %6, %7};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]),
                 "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(b[4]), "r"(b[5]), "r"(b[6]), "r"(b[7]));
}
#endif
#if __CUDA_ARCH__ >= 720
QUERN_INLINE void wmma_load_a(uint32_t (&r)[2], const int8_t* p, int stride) {
  asm volatile("wmma.load.a.sync.aligned.row.m16n16k16.shared.s8 {%0, %1}, [%2], %3;"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(p)), "r"(stride) : "memory");
}
QUERN_INLINE void wmma_load_b(uint32_t (&r)[2], const int8_t* p, int stride) {
  asm volatile("wmma.load.b.sync.aligned.col.m16n16k16.shared.s8 {%0, %1}, [%2], %3;"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(p)), "r"(stride) : "memory");
}
QUERN_INLINE void wmma_load_c(int32_t (&r)[8], const int32_t* p, int stride) {
  asm volatile("wmma.load.c.sync.aligned.row.m16n16k16.shared.s32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7])
               : "r"(shared_address(p)), "r"(stride) : "memory");
}
QUERN_INLINE void wmma_multiply(int32_t (&c)[8], const uint32_t (&a)[2], const uint32_t (&b)[2]) {  // c += a b, s8
  asm volatile("wmma.mma.sync.aligned.row.col.m16n16k16.s32.s8.s8.s32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
               "{%8, %9}, {%10, %11}, {%0, %1, %2, %3, %4, %5, %6, %7};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]), "+r"(c[4]), "+r"(c[5]), "+r"(c[6]), "+r"(c[7])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]));
}
#endif

#endif  // NVRTC

// ---- from here on plain C++, the same text for both
QUERN_INLINE Half2 to_half2(float low, float high) { return pack_half2(to_half(low), to_half(high)); }
QUERN_INLINE Half2 splat_half2(Half x) { return pack_half2(x, x); }
QUERN_INLINE float2 to_float2(Half2 x) { return float2{to_float(low_half(x)), to_float(high_half(x))}; }

QUERN_INLINE float shuffle_xor(float x, int mask) { return bits_float(shuffle_xor(float_bits(x), mask)); }
QUERN_INLINE float shuffle(float x, int lane) { return bits_float(shuffle(float_bits(x), lane)); }
QUERN_INLINE float shuffle_down(float x, int by) { return bits_float(shuffle_down(float_bits(x), by)); }
QUERN_INLINE int32_t shuffle_xor(int32_t x, int mask) { return int32_t(shuffle_xor(uint32_t(x), mask)); }
QUERN_INLINE int32_t shuffle(int32_t x, int lane) { return int32_t(shuffle(uint32_t(x), lane)); }
QUERN_INLINE int32_t shuffle_down(int32_t x, int by) { return int32_t(shuffle_down(uint32_t(x), by)); }

// Over groups of `LANES` neighbouring lanes (a power of two); every lane gets the result, the same one.
template <int LANES = 32, class T>
QUERN_INLINE T warp_sum(T x) {
  for (int mask = LANES / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
template <int LANES = 32>
QUERN_INLINE float warp_max(float x) {
  for (int mask = LANES / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}
