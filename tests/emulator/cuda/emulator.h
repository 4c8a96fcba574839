// The device as quern.cuh sees it, on this machine's CPU: types, places, and every wrapper that is inline PTX there.
//
// A kernel is compiled with -fsanitize=thread, for which engine.cpp has the hooks: so every access to memory is seen.
// Warp functions collect the operands of all 32 lanes; the last lane to arrive computes for all of them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define QUERN_INLINE static inline __attribute__((always_inline))
#define QUERN_SM QUERN_EMULATED_SM
#define __CUDA_ARCH__ (QUERN_EMULATED_SM * 10)
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)
#define __shared__ static __attribute__((section("quern_shared")))
#define __constant__ static const

// ---- the engine (engine.cpp)
struct QuernPlace {
  unsigned x, y, z;
};
struct QuernThread {  // of the thread that runs
  QuernPlace thread, block, block_size, grid_size;
  int lane;
};
extern "C" {
extern QuernThread quern_thread;
using QuernPerform = void (*)(void* const* operands);  // operands of lanes 0 to 31; results are written into them
void quern_collective(QuernPerform perform, void* operands, const char* what);
void quern_block_sync();
void quern_warp_sync();
void* quern_dynamic_shared();
void quern_check(const void* address, int bytes, int alignment, int write, const char* what);
void quern_fail(const char* what, const char* why);
void quern_async_copy(void* to, const void* from, int size, int bytes);
void quern_async_commit();
void quern_async_wait(int groups);
}
#define threadIdx (quern_thread.thread)
#define blockIdx (quern_thread.block)
#define blockDim (quern_thread.block_size)
#define gridDim (quern_thread.grid_size)

// ---- types that NVRTC has
#define QUERN_VECTOR(T, NAME, BYTES)                    \
  struct alignas(2 * sizeof(T)) NAME##2 {               \
    T x, y;                                             \
  };                                                    \
  struct NAME##3 {                                      \
    T x, y, z;                                          \
  };                                                    \
  struct alignas(BYTES) NAME##4 {                       \
    T x, y, z, w;                                       \
  };
QUERN_VECTOR(unsigned, uint, 16)
QUERN_VECTOR(int, int, 16)
QUERN_VECTOR(float, float, 16)
QUERN_VECTOR(unsigned short, ushort, 8)
QUERN_VECTOR(short, short, 8)
QUERN_VECTOR(unsigned char, uchar, 4)
QUERN_VECTOR(signed char, char, 4)
#undef QUERN_VECTOR
#define QUERN_MAKE(T, NAME)                                                                     \
  QUERN_INLINE NAME##2 make_##NAME##2(T x, T y) { return NAME##2{x, y}; }                       \
  QUERN_INLINE NAME##4 make_##NAME##4(T x, T y, T z, T w) { return NAME##4{x, y, z, w}; }
QUERN_MAKE(unsigned, uint)
QUERN_MAKE(int, int)
QUERN_MAKE(float, float)
#undef QUERN_MAKE
template <class T>
QUERN_INLINE std::enable_if_t<std::is_integral_v<T>, T> min(T a, T b) { return a < b ? a : b; }
template <class T>
QUERN_INLINE std::enable_if_t<std::is_integral_v<T>, T> max(T a, T b) { return a > b ? a : b; }

// ---- half precision
struct Half {
  uint16_t bits;
};
struct alignas(4) Half2 {
  uint32_t bits;
};
QUERN_INLINE float to_float(Half x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return static_cast<float>(y);
}
QUERN_INLINE Half to_half(float x) {
  _Float16 y = static_cast<_Float16>(x);
  Half z;
  std::memcpy(&z, &y, 2);
  return z;
}
QUERN_INLINE Half2 pack_half2(Half low, Half high) { return Half2{low.bits | uint32_t(high.bits) << 16}; }
QUERN_INLINE Half low_half(Half2 x) { return Half{static_cast<uint16_t>(x.bits)}; }
QUERN_INLINE Half high_half(Half2 x) { return Half{static_cast<uint16_t>(x.bits >> 16)}; }
QUERN_INLINE Half2 low_twice(Half2 x) { return pack_half2(low_half(x), low_half(x)); }
QUERN_INLINE Half2 high_twice(Half2 x) { return pack_half2(high_half(x), high_half(x)); }
// Sums and products of fp16 are exact in double (22 bits of a product, exponents within 2^-48..2^32, so sums of a
// product and an fp16 fit 53 bits unless they lie more than 2^30 apart, where the nearest fp16 is the larger one's;
// only a tie of the larger one could be decided by what was lost). One rounding follows.
QUERN_INLINE Half quern_rounded(double x) {
  _Float16 y = static_cast<_Float16>(x);
  Half z;
  std::memcpy(&z, &y, 2);
  return z;
}
#define QUERN_HALF2(NAME, EXPRESSION)                                             \
  QUERN_INLINE Half NAME##_one(double a, double b, double c) {                    \
    (void)c;                                                                      \
    return quern_rounded(EXPRESSION);                                             \
  }
QUERN_HALF2(add_half2, a + b)
QUERN_HALF2(sub_half2, a - b)
QUERN_HALF2(mul_half2, a * b)
QUERN_HALF2(fma_half2, a * b + c)
#undef QUERN_HALF2
#define QUERN_HALF2(NAME)                                                                                    \
  QUERN_INLINE Half2 NAME(Half2 a, Half2 b) {                                                                \
    return pack_half2(NAME##_one(to_float(low_half(a)), to_float(low_half(b)), 0),                           \
                      NAME##_one(to_float(high_half(a)), to_float(high_half(b)), 0));                        \
  }
QUERN_HALF2(add_half2)
QUERN_HALF2(sub_half2)
QUERN_HALF2(mul_half2)
#undef QUERN_HALF2
QUERN_INLINE Half2 fma_half2(Half2 a, Half2 b, Half2 c) {
  return pack_half2(fma_half2_one(to_float(low_half(a)), to_float(low_half(b)), to_float(low_half(c))),
                    fma_half2_one(to_float(high_half(a)), to_float(high_half(b)), to_float(high_half(c))));
}

// ---- fp32, integers
QUERN_INLINE uint32_t float_bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
QUERN_INLINE float bits_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
QUERN_INLINE float quern_flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
QUERN_INLINE float exp2_approx(float x) { return quern_flushed(std::exp2(quern_flushed(x))); }
QUERN_INLINE float reciprocal_approx(float x) { return quern_flushed(1.0f / quern_flushed(x)); }
QUERN_INLINE int32_t round_to_int(float x) {  // as the device: what does not fit becomes the nearest int, NaN 0
  if (x != x) return 0;
  if (x >= 0x1p31f) return INT32_MAX;
  return x < -0x1p31f ? INT32_MIN : static_cast<int32_t>(std::nearbyint(x));
}
template <int TABLE>
QUERN_INLINE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(TABLE >= 0 && TABLE < 256, "lop3: a table has 8 bits");
  uint32_t y = 0;
  for (int i = 0; i < 8; ++i)
    if (TABLE >> i & 1) y |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return y;
}
QUERN_INLINE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t both = a | uint64_t(b) << 32;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t s = selector >> 4 * i;
    uint32_t byte = both >> 8 * (s & 7) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    y |= byte << 8 * i;
  }
  return y;
}
QUERN_INLINE int32_t dp4a(int32_t a, int32_t b, int32_t c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
}
QUERN_INLINE int32_t dp4a_unsigned(uint32_t a, int32_t b, int32_t c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<uint8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
}
QUERN_INLINE void trap() { quern_fail("trap", "the kernel found what it does not expect"); }
QUERN_INLINE int32_t opaque(int32_t x) { return x; }
template <int HALF>
QUERN_INLINE int32_t dp2a(int32_t a, uint32_t b, int32_t c) {
  for (int i = 0; i < 2; ++i) c += static_cast<int16_t>(a >> 16 * i) * static_cast<int8_t>(b >> (16 * HALF + 8 * i));
  return c;
}
QUERN_INLINE int32_t __float2int_rn(float x) { return round_to_int(x); }
QUERN_INLINE uint32_t __float_as_uint(float x) { return float_bits(x); }
QUERN_INLINE float __uint_as_float(uint32_t x) { return bits_float(x); }

// ---- memory
template <class T>
QUERN_INLINE T load_stream(const T* p) {
  quern_check(p, sizeof(T), sizeof(T), 0, "load_stream");
  return *p;
}
template <class T>
QUERN_INLINE T load_constant(const T* p) {
  quern_check(p, sizeof(T), sizeof(T), 0, "load_constant");
  return *p;
}
template <class T>
QUERN_INLINE T load(const T* p) {
  quern_check(p, sizeof(T), alignof(T), 0, "load");
  return *p;
}
template <class T>
QUERN_INLINE void store(T* p, std::common_type_t<T> value) {
  quern_check(p, sizeof(T), alignof(T), 1, "store");
  *p = value;
}
QUERN_INLINE uint8_t* dynamic_shared() { return static_cast<uint8_t*>(quern_dynamic_shared()); }
QUERN_INLINE void __syncthreads() { quern_block_sync(); }
QUERN_INLINE void block_sync() { quern_block_sync(); }
QUERN_INLINE void warp_sync() { quern_warp_sync(); }
template <int BYTES>
QUERN_INLINE void async_copy(void* to, const void* from) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "async_copy: 4, 8 or 16 bytes");
  quern_async_copy(to, from, BYTES, BYTES);
}
QUERN_INLINE void async_copy16(void* to, const void* from, int bytes = 16) { quern_async_copy(to, from, 16, bytes); }
QUERN_INLINE void async_commit() { quern_async_commit(); }
template <int GROUPS>
QUERN_INLINE void async_wait() { quern_async_wait(GROUPS); }

// ---- warp functions
namespace quern {
struct Shuffle {
  uint32_t in;
  int number;
  uint32_t out;
};
static void exchange(void* const* operands, int (*source)(int lane, int number)) {
  uint32_t in[32];
  for (int i = 0; i < 32; ++i) in[i] = static_cast<Shuffle*>(operands[i])->in;
  for (int i = 0; i < 32; ++i) {
    auto* s = static_cast<Shuffle*>(operands[i]);
    s->out = in[source(i, s->number)];
  }
}
}  // namespace quern
QUERN_INLINE uint32_t shuffle_xor(uint32_t x, int mask) {
  quern::Shuffle s{x, mask, 0};
  quern_collective([](void* const* o) { quern::exchange(o, [](int lane, int n) { return (lane ^ n) & 31; }); }, &s,
                   "shuffle_xor");
  return s.out;
}
QUERN_INLINE uint32_t shuffle(uint32_t x, int lane) {
  quern::Shuffle s{x, lane, 0};
  quern_collective([](void* const* o) { quern::exchange(o, [](int, int n) { return n & 31; }); }, &s, "shuffle");
  return s.out;
}
QUERN_INLINE uint32_t shuffle_down(uint32_t x, int by) {
  quern::Shuffle s{x, by, 0};
  quern_collective(
      [](void* const* o) { quern::exchange(o, [](int lane, int n) { return lane + n < 32 ? lane + n : lane; }); }, &s,
      "shuffle_down");
  return s.out;
}
QUERN_INLINE uint32_t ballot(bool x) {
  quern::Shuffle s{x, 0, 0};
  quern_collective(
      [](void* const* o) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; ++i) bits |= static_cast<quern::Shuffle*>(o[i])->in << i;
        for (int i = 0; i < 32; ++i) static_cast<quern::Shuffle*>(o[i])->out = bits;
      },
      &s, "ballot");
  return s.out;
}

#if QUERN_EMULATED_SM >= 75
namespace quern {
template <int N, bool TRANSPOSED>
struct Matrices {
  const void* row;
  uint32_t r[N];
  static void perform(void* const* operands) {
    for (int matrix = 0; matrix < N; ++matrix) {
      uint16_t values[8][8];
      for (int row = 0; row < 8; ++row)
        std::memcpy(values[row], static_cast<Matrices*>(operands[8 * matrix + row])->row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        int first = 2 * (lane % 4), other = lane / 4;
        uint32_t low = TRANSPOSED ? values[first][other] : values[other][first];
        uint32_t high = TRANSPOSED ? values[first + 1][other] : values[other][first + 1];
        static_cast<Matrices*>(operands[lane])->r[matrix] = low | high << 16;
      }
    }
  }
  static void load(uint32_t (&r)[N], const void* row, const char* what) {
    Matrices m{row, {}};
    if (quern_thread.lane < 8 * N) quern_check(row, 16, 16, 0, what);
    quern_collective(perform, &m, what);
    std::memcpy(r, m.r, sizeof r);
  }
};
}  // namespace quern
QUERN_INLINE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  quern::Matrices<4, false>::load(r, row, "load_matrix_x4");
}
QUERN_INLINE void load_matrix_x2(uint32_t (&r)[2], const void* row) {
  quern::Matrices<2, false>::load(r, row, "load_matrix_x2");
}
QUERN_INLINE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  quern::Matrices<4, true>::load(r, row, "load_matrix_x4_transposed");
}
QUERN_INLINE void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
  quern::Matrices<2, true>::load(r, row, "load_matrix_x2_transposed");
}
#endif

#if QUERN_EMULATED_SM >= 80
namespace quern {
// Element `i` of the 32 bits of a fragment's register.
template <class T>
static float element(uint32_t word, int i) {
  if constexpr (std::is_same_v<T, Half>)
    return to_float(Half{static_cast<uint16_t>(word >> 16 * i)});
  else
    return static_cast<T>(word >> 8 * i);
}
template <class A, class B, class C>
struct Mma {
  C c[4];
  uint32_t a[4], b[2];
  static void perform(void* const* operands) {
    constexpr int PER_WORD = 4 / sizeof(A), K = 8 * PER_WORD;
    float a[16][K], b[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      auto* o = static_cast<Mma*>(operands[lane]);
      int group = lane / 4, first = lane % 4 * PER_WORD;
      for (int i = 0; i < PER_WORD; ++i) {
        for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][first + i + r / 2 * K / 2] = element<A>(o->a[r], i);
        for (int r = 0; r < 2; ++r) b[first + i + r * K / 2][group] = element<B>(o->b[r], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      auto* o = static_cast<Mma*>(operands[lane]);
      for (int r = 0; r < 4; ++r) {
        double sum = o->c[r];  // exact products; tensor cores round sums in an order that nobody states
        for (int k = 0; k < K; ++k) sum += double(a[lane / 4 + r / 2 * 8][k]) * b[k][lane % 4 * 2 + r % 2];
        o->c[r] = static_cast<C>(sum);
      }
    }
  }
  static void multiply(C (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const C (&to)[4], const char* what) {
    Mma m;
    std::memcpy(m.c, to, sizeof c);
    std::memcpy(m.a, a, sizeof a);
    std::memcpy(m.b, b, sizeof b);
    quern_collective(perform, &m, what);
    std::memcpy(c, m.c, sizeof c);
  }
};
}  // namespace quern
#define QUERN_MMA(NAME, A, B, C)                                                                             \
  QUERN_INLINE void NAME(C (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const C (&to)[4]) {      \
    quern::Mma<A, B, C>::multiply(c, a, b, to, #NAME);                                                       \
  }                                                                                                          \
  QUERN_INLINE void NAME(C (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { NAME(c, a, b, c); }
QUERN_MMA(mma_16x8x32, int8_t, int8_t, int32_t)
QUERN_MMA(mma_16x8x32_unsigned_a, uint8_t, int8_t, int32_t)
QUERN_MMA(mma_16x8x16, Half, Half, float)
#undef QUERN_MMA
#endif

#if QUERN_EMULATED_SM >= 70
namespace quern {
// Real fragments hold elements in an order that is not documented. Here an order that no kernel could guess: the
// 16x16 elements are dealt to the lanes by a multiplication that permutes 0..255. Those of int8 are in the order that
// ptxas gives sm_72, as four mma.m8n8k16: linear_int8_wmma.cu relies on it, and asks.
enum Operand { LEFT, RIGHT, SUM };
template <bool INTEGERS>
constexpr int dealt(Operand operand, int lane, int i) {  // element i of the lane's 8 -> 16 * row + column
  if (!INTEGERS) return ((8 * lane + i) * 77 + 31) & 255;
  const int group = lane / 4, quad = lane % 4;
  if (operand == SUM) return 16 * (group + i / 2 % 2 * 8) + i / 4 * 8 + quad * 2 + i % 2;
  const int side = group + i / 4 * 8, k = quad * 4 + i % 4;
  return operand == LEFT ? 16 * side + k : 16 * k + side;
}

template <class T, int REGISTERS>
struct Fragment {
  uint32_t r[REGISTERS];
  const T* p;
  int stride;
  bool by_column;
};
template <class T>
static T bits_of(uint32_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}
// Rows start at multiples of what a lane holds of a matrix: 8 bytes of int8, 32 of fp16, fp32 and int32 (PTX ISA,
// wmma.load); strides may be odd multiples of 16 bytes all the same (CUDA C++ guide, 7.24).
static void check_matrix(const void* p, size_t stride_bytes, int element, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % (element == 1 ? 8 : 32)) quern_fail(what, "the matrix starts at a wrong multiple");
  if (stride_bytes % (element == 1 ? 8 : 16)) quern_fail(what, "the stride is a wrong multiple");
}
// a or b: 256 elements of 1 or 2 bytes over 32 lanes: 8 of a lane (fp16 fragments hold each twice, so do these).
template <class T, int REGISTERS>
static void load_fragment(uint32_t (&r)[REGISTERS], const T* p, int stride, bool by_column, const char* what) {
  constexpr int PER_WORD = 4 / sizeof(T);
  std::memset(r, 0, sizeof r);
  for (int i = 0; i < 8; ++i) {
    int place = dealt<sizeof(T) == 1>(by_column ? RIGHT : LEFT, quern_thread.lane, i);
    int row = place / 16, column = place % 16;
    const T* from = p + (by_column ? column * stride + row : row * stride + column);
    quern_check(from, sizeof(T), sizeof(T), 0, what);
    uint32_t bits = 0;
    std::memcpy(&bits, from, sizeof(T));
    r[i / PER_WORD] |= bits << (8 * sizeof(T) * (i % PER_WORD));
  }
  check_matrix(p, stride * sizeof(T), sizeof(T), what);
}
template <class T, class C, int REGISTERS>
struct Wmma {
  static constexpr bool INTEGERS = sizeof(T) == 1;
  C c[8];
  uint32_t a[REGISTERS], b[REGISTERS];
  bool rows;
  static double at(const uint32_t* r, int i) {
    constexpr int PER_WORD = 4 / sizeof(T);
    uint32_t word = r[i / PER_WORD] >> (8 * sizeof(T) * (i % PER_WORD));
    if constexpr (std::is_same_v<T, Half>)
      return to_float(Half{static_cast<uint16_t>(word)});
    else
      return static_cast<T>(word);
  }
  static void perform(void* const* operands) {
    double a[256], b[256], c[256];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 8; ++i) {
        auto* o = static_cast<Wmma*>(operands[lane]);
        a[dealt<INTEGERS>(LEFT, lane, i)] = at(o->a, i), b[dealt<INTEGERS>(RIGHT, lane, i)] = at(o->b, i);
        c[dealt<INTEGERS>(SUM, lane, i)] = o->c[i];
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 8; ++i) {
        int place = dealt<INTEGERS>(SUM, lane, i), row = place / 16, column = place % 16;
        double sum = c[place];
        for (int k = 0; k < 16; ++k) sum += a[16 * row + k] * b[16 * k + column];
        static_cast<Wmma*>(operands[lane])->c[i] = static_cast<C>(sum);
      }
  }
  static void multiply(C (&c)[8], const uint32_t (&a)[REGISTERS], const uint32_t (&b)[REGISTERS], const char* what) {
    Wmma m;
    std::memcpy(m.c, c, sizeof c);
    std::memcpy(m.a, a, sizeof a);
    std::memcpy(m.b, b, sizeof b);
    quern_collective(perform, &m, what);
    std::memcpy(c, m.c, sizeof c);
  }
};
template <class C>
static void load_accumulator(C (&c)[8], const C* p, int stride, const char* what) {
  for (int i = 0; i < 8; ++i) {
    int place = dealt<std::is_same_v<C, int32_t>>(SUM, quern_thread.lane, i);
    const C* from = p + place / 16 * stride + place % 16;
    quern_check(from, sizeof(C), sizeof(C), 0, what);
    c[i] = *from;
  }
  check_matrix(p, stride * sizeof(C), sizeof(C), what);
}
// A real load is a warp's: nobody passes before all have come.
static void together(const char* what) {
  char none = 0;
  quern_collective([](void* const*) {}, &none, what);
}
}  // namespace quern
QUERN_INLINE void wmma_load_a(uint32_t (&r)[8], const Half* p, int stride) {
  quern::load_fragment(r, p, stride, false, "wmma_load_a");
  quern::together("wmma_load_a");
}
QUERN_INLINE void wmma_load_b(uint32_t (&r)[8], const Half* p, int stride) {
  quern::load_fragment(r, p, stride, true, "wmma_load_b");
  quern::together("wmma_load_b");
}
QUERN_INLINE void wmma_load_b_rows(uint32_t (&r)[8], const Half* p, int stride) {
  quern::load_fragment(r, p, stride, false, "wmma_load_b_rows");
  quern::together("wmma_load_b_rows");
}
QUERN_INLINE void wmma_load_c(float (&c)[8], const float* p, int stride) {
  quern::load_accumulator(c, p, stride, "wmma_load_c");
  quern::together("wmma_load_c");
}
QUERN_INLINE void wmma_store(float* p, const float (&c)[8], int stride) {
  quern::check_matrix(p, stride * sizeof(float), 4, "wmma_store");
  for (int i = 0; i < 8; ++i) {
    int place = quern::dealt<false>(quern::SUM, quern_thread.lane, i);
    float* to = p + place / 16 * stride + place % 16;
    quern_check(to, 4, 4, 1, "wmma_store");
    *to = c[i];
  }
  quern::together("wmma_store");
}
QUERN_INLINE void wmma_multiply(float (&c)[8], const uint32_t (&a)[8], const uint32_t (&b)[8]) {
  quern::Wmma<Half, float, 8>::multiply(c, a, b, "wmma_multiply");
}
QUERN_INLINE void wmma_multiply_rows(float (&c)[8], const uint32_t (&a)[8], const uint32_t (&b)[8]) {
  quern::Wmma<Half, float, 8>::multiply(c, a, b, "wmma_multiply_rows");
}
#endif
#if QUERN_EMULATED_SM >= 72
QUERN_INLINE void wmma_load_a(uint32_t (&r)[2], const int8_t* p, int stride) {
  quern::load_fragment(r, p, stride, false, "wmma_load_a");
  quern::together("wmma_load_a");
}
QUERN_INLINE void wmma_load_b(uint32_t (&r)[2], const int8_t* p, int stride) {
  quern::load_fragment(r, p, stride, true, "wmma_load_b");
  quern::together("wmma_load_b");
}
QUERN_INLINE void wmma_load_c(int32_t (&c)[8], const int32_t* p, int stride) {
  quern::load_accumulator(c, p, stride, "wmma_load_c");
  quern::together("wmma_load_c");
}
QUERN_INLINE void wmma_multiply(int32_t (&c)[8], const uint32_t (&a)[2], const uint32_t (&b)[2]) {
  quern::Wmma<int8_t, int32_t, 2>::multiply(c, a, b, "wmma_multiply");
}
#endif
