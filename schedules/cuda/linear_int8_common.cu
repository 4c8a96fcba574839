// What the kernels of integer linear layers share: types, what a call points to, unpacking, scales and zeros.
template <bool HALF> struct ScaleType { typedef float Type; typedef uint4 Four; };
template <> struct ScaleType<true> { typedef Half Type; typedef uint2 Four; };
typedef ScaleType<HALF_SCALE>::Type Scale;   // of one row
typedef ScaleType<HALF_SCALE>::Four Scales;  // of a row block
template <int BITS> struct InputsOf { typedef uint2 Type; };
template <> struct InputsOf<8> { typedef uint32_t Type; };
typedef InputsOf<BITS>::Type Inputs;  // activations of a unit: 8 or 4 bytes

constexpr int32_t MAGIC = 0x4B400000;  // 1.5 * 2^23 as fp32: adding an integer below 2^22 adds it to the number
constexpr float MAGIC_VALUE = 12582912.0f;
// What 8-bit codes lost by being stored minus 128, where no zero point takes care of it.
constexpr int32_t STORED_ZERO = BITS == 8 ? -128 : 0;

// Bytes 4 i to 4 i + 3 of the unit, as the integers to multiply with.
QUERN_INLINE int32_t first_inputs(uint32_t word) { return BITS == 8 ? word : word & 0x0F0F0F0Fu; }
QUERN_INLINE int32_t last_inputs(uint32_t word) { return word >> 4 & 0x0F0F0F0Fu; }
// Levels of the eight codes of a word. A byte permutation looks up four codes below 8 at a time, by the low 16 bits of
// its selector; another one spreads the codes' top bits over bytes, and these choose between codes below 8 and the rest.
QUERN_INLINE uint32_t levels_of_four(uint32_t codes, uint32_t tops) {
  uint32_t low = permute_bytes(LEVELS_0, LEVELS_1, codes), high = permute_bytes(LEVELS_2, LEVELS_3, codes);
  uint32_t which = permute_bytes(0x00008000u, 0, tops);  // byte 0, or the sign of byte 1: 0x00 or 0xFF
  return lop3<0xCA>(which, high, low);
}
QUERN_INLINE void table_inputs(uint32_t word, int32_t& first, int32_t& last) {
  uint32_t codes = word & 0x77777777u, top = word & 0x88888888u, tops = top | top >> 3;
  uint32_t a = levels_of_four(codes, tops), b = levels_of_four(codes >> 16, tops >> 16);  // inputs 0 4 1 5, 2 6 3 7
  first = permute_bytes(a, b, 0x6420u);
  last = permute_bytes(a, b, 0x7531u);
}
QUERN_INLINE uint32_t word_of(const uint4& v, int row) {
  return row == 0 ? v.x : row == 1 ? v.y : row == 2 ? v.z : v.w;
}
QUERN_INLINE float scale_of(const uint2& four, int row) {
  return to_float(Half{static_cast<uint16_t>((row < 2 ? four.x : four.y) >> (row & 1) * 16)});
}
QUERN_INLINE float scale_of(const uint4& four, int row) { return bits_float(word_of(four, row)); }
QUERN_INLINE int32_t zero_of(uint32_t four, int row) {
  return BITS == 8 ? static_cast<int8_t>(four >> 8 * row) : static_cast<uint8_t>(four >> 8 * row);
}

struct Pointers {
  const int8_t* q;       // [M, SPANS, WIDTH]
  const float* ascale;   // [M, SPANS]
  const int32_t* asum;   // [M, SPANS]
  const uint4* codes;    // [ROW_BLOCKS, POSITIONS]
  const Scales* scale;   // [ROW_BLOCKS, SPANS]
  const uint32_t* zero;  // the same, four bytes, where ZERO
  const uint4* offset;   // the same, four floats, where OFFSET
  const float* residual; // [M, N] where RESIDUAL
  float* out;            // [M, N]
};
