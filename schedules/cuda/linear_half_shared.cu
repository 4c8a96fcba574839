// What fp16 linear layers share. Constants: M, N, K, BITS (4 or 8) of a stored code, GROUP, WIDTH, GROUPS, STORED,
// CHUNK (see packed_half.py), DENSE, AFFINE (0 zero, 1 offset, 2 table), CENTRE, RESIDUAL; Scale: Half or float; TABLE.

constexpr int PAIRS = 16 / BITS;  // of a word
constexpr int HALVES = CHUNK / 16;  // of a chunk: its inputs 0 to 15 and 16 to 31

QUERN_INLINE float real(Half x) { return to_float(x); }
QUERN_INLINE float real(float x) { return x; }

// The scales of rows r and r + 1 of 8.
QUERN_INLINE float2 two_scales(const Half* p) {
  return to_float2(Half2{load_constant(reinterpret_cast<const uint32_t*>(p))});
}
QUERN_INLINE float2 two_scales(const float* p) {
  const uint2 x = load_constant(reinterpret_cast<const uint2*>(p));
  return float2{bits_float(x.x), bits_float(x.y)};
}

// What `pairs` subtracts, from byte r of four zero points: 1024 + zero twice, and with 4 bits -(64 + zero) twice.
// Exact.
struct Zero {
  Half2 whole, sixteenth;
};
QUERN_INLINE Zero zero_of(uint32_t four, int r) {
  const Half2 whole = Half2{permute_bytes(four, 0x64646464u, 0x4040u + 0x0101u * r)};
  return Zero{whole, sub_half2(Half2{0x63806380u}, whole)};
}

// A word's codes as pairs of halves, code - zero: exact, for no number is beyond 2048. 4 bits: 4 pairs by 1 shift, 4
// LOP3 (an or puts the code's bits below those of 1024, whose last bit is 1; or as its bits 4 to 7, where they count
// 16), 2 subtractions and 2 multiply-adds. 8 bits: 2 pairs by 2 PRMT and 2 subtractions.
QUERN_INLINE void pairs(uint32_t word, Zero zero, Half2 (&to)[PAIRS]) {
  if constexpr (BITS == 4) {
    constexpr int AND_OR = (0xF0 & 0xCC) | 0xAA;
    const Half2 sixteenth = Half2{0x2c002c00u};
    const uint32_t high = word >> 8;
    to[0] = sub_half2(Half2{lop3<AND_OR>(word, 0x000f000fu, 0x64006400u)}, zero.whole);
    to[1] = fma_half2(Half2{lop3<AND_OR>(word, 0x00f000f0u, 0x64006400u)}, sixteenth, zero.sixteenth);
    to[2] = sub_half2(Half2{lop3<AND_OR>(high, 0x000f000fu, 0x64006400u)}, zero.whole);
    to[3] = fma_half2(Half2{lop3<AND_OR>(high, 0x00f000f0u, 0x64006400u)}, sixteenth, zero.sixteenth);
  } else {
    to[0] = sub_half2(Half2{permute_bytes(word, 0x64646464u, 0x4140u)}, zero.whole);
    to[1] = sub_half2(Half2{permute_bytes(word, 0x64646464u, 0x4342u)}, zero.whole);
  }
}

// A word's codes as pairs of a table's values; 16 halves lie in 8 banks, so no two lanes ever wait for each other.
QUERN_INLINE void pairs(uint32_t word, const Half* table, Half2 (&to)[PAIRS]) {
#pragma unroll
  for (int j = 0; j < PAIRS; ++j)
    to[j] = pack_half2(table[word >> 4 * j & 15], table[word >> (4 * j + 16) & 15]);
}

QUERN_INLINE void fill_table(Half* table) {
  if (AFFINE == 2 && threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < 16; ++i) table[i] = to_half(TABLE[i]);
  }
}

// Input of place p, -1 where there is none.
QUERN_INLINE int input_of(int p) {
  if constexpr (DENSE) return p;
  const int inside = p % WIDTH, k = p / WIDTH * GROUP + inside;
  return inside < GROUP && k < K ? k : -1;
}

// A power of two that brings `most` to 4..8, and its inverse. Sums of 8 products with codes of up to 8 bits, and two
// such sums together, then stay below 16 * 255 * 8 < 65504, and what fp16 cannot hold is 2^-17 of the largest or less.
QUERN_INLINE float to_eight(float most, float& back) {
  uint32_t exponent = float_bits(most) & 0x7f800000u;
  exponent = exponent < 0x02000000u ? 0x02000000u : exponent;
  back = bits_float(exponent - 0x01000000u);
  return bits_float(0x80000000u - exponent);
}
