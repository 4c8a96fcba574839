// Keys and values of a block of positions as fp16 in shared memory, for tensor cores. Constants as attention_mma.cu;
// SWIZZLED: whether halves of a key row change places. PITCH of values: neighbouring rows are 16 bytes apart modulo
// 128.

constexpr bool CODES = sizeof(Item) == 1;
constexpr int BLOCKS = BLOCK / 16, STEPS = PADDED / 16, PITCH = PADDED + 8;
constexpr int KEY_UNITS = CODES ? D : 2 * D;  // 16 bytes each, of the 16 keys of a block

// Place of element e of positions 8 u.. of 16-key block b. Swizzled, the 8 rows that
// ldmatrix reads at once lie in all 32 banks.
QUERN_INLINE int key_place(int b, int e, int u) {
  return (b * PADDED + e) * 16 + (SWIZZLED ? u ^ (e >> 2 & 1) : u) * 8;
}

QUERN_INLINE Half as_half(Half x) { return x; }
QUERN_INLINE Half as_half(int8_t x) { return to_half(x); }
QUERN_INLINE Half2 codes_to_half2(uint32_t words, int low, int high) {
  return to_half2(static_cast<float>(static_cast<int8_t>(words >> 8 * low)),
                  static_cast<float>(static_cast<int8_t>(words >> 8 * high)));
}

// Whether all positions of a block are places of the cache, used or not.
constexpr bool INSIDE = WINDOW == 0 && CAPACITY % BLOCK == 0;
// Both caches lie as they are copied, 16 bytes a thread. Then a thread's copies differ by constants, here and there:
// `unit` is its first, a multiple of THREADS behind it are the others. (Codes on their way take registers, which long
// heads and many copies do not leave: 8 to 16 bytes would spill.)
constexpr bool KEYS_EVEN = D % 16 == 0 && (!CODES || (D <= 128 && BLOCKS * KEY_UNITS <= 4 * THREADS));
constexpr bool VALUES_EVEN = !CODES && D % 8 == 0 && THREADS % (D % 8 == 0 ? D / 8 : 1) == 0;

QUERN_INLINE void stage_unit_of_codes(const uint4& x, Half* to, Half* next) {  // pairs of two neighbours
#pragma unroll
  for (int j = 0; j < 2; ++j)
    *reinterpret_cast<uint4*>(j == 0 ? to : next) =
        uint4{codes_to_half2(x.x, j, 2 + j).bits, codes_to_half2(x.y, j, 2 + j).bits,
              codes_to_half2(x.z, j, 2 + j).bits, codes_to_half2(x.w, j, 2 + j).bits};
}

// Keys of positions base.. to staged[key_place]. What lies beyond the capacity repeats something of it.
QUERN_INLINE void stage_keys(const Item* keys, int base, Half* staged) {
  constexpr int PER_UNIT = 16 / sizeof(Item), UNITS = BLOCKS * KEY_UNITS;
  if constexpr (KEYS_EVEN) {
    const int unit = threadIdx.x, e = CODES ? unit / 2 * 2 : unit / 2;
    const Item* from = keys + int64_t(base) * D + unit * PER_UNIT;
    Half* to = staged + key_place(0, e, unit % 2);
#pragma unroll
    for (int i = 0; i < UNITS; i += THREADS) {
      if (UNITS % THREADS != 0 && unit + i >= UNITS) continue;
      const int room = (CAPACITY - base) * D - (unit + i + 1) * PER_UNIT;  // less than 0: beyond
      const Item* source = from + i * PER_UNIT + (INSIDE ? 0 : min(room, 0));
      if constexpr (CODES) {  // 8 positions of two elements, in pairs
        stage_unit_of_codes(load_constant(reinterpret_cast<const uint4*>(source)), to + i * 16, to + i * 16 + 16);
      } else {
        async_copy16(to + i * 8, source);
      }
    }
  } else {
    for (unsigned i = threadIdx.x; i < UNITS; i += THREADS) {
      const int b = i / KEY_UNITS, unit = i % KEY_UNITS;
      const int from = base + b * 16 < CAPACITY ? base + b * 16 : CAPACITY - 16;
      const Item* source = keys + int64_t(from) * D + unit * PER_UNIT;
      if constexpr (CODES) {
        const int e = unit / 2 * 2, u = unit % 2;
        stage_unit_of_codes(load_constant(reinterpret_cast<const uint4*>(source)), staged + key_place(b, e, u),
                            staged + key_place(b, e + 1, u));
      } else {
        async_copy16(staged + key_place(b, unit / 2, unit % 2), source);
      }
    }
  }
}

// Values of positions base..end-1 to staged[p * PITCH + column], zeros where there is none.
QUERN_INLINE void stage_values(const Item* values, int base, int end, Half* staged) {
  if constexpr (CODES) {  // two positions side by side
    for (unsigned i = threadIdx.x; i < BLOCK / 2 * (PADDED / 8); i += THREADS) {
      const int p = i / (PADDED / 8) * 2, column = i % (PADDED / 8) * 8;
      uint4 x = uint4{0, 0, 0, 0};
      if (base + p < end)
        x = load_constant(reinterpret_cast<const uint4*>(values + int64_t(base + p) * PADDED + 2 * column));
      Half* to = staged + p * PITCH + column;
      stage_unit_of_codes(x, to, to + PITCH);  // one past the end has weight 0
    }
  } else if constexpr (VALUES_EVEN) {
    constexpr int ROW = D / 8, APART = THREADS / ROW;
    const int p = threadIdx.x / ROW, column = threadIdx.x % ROW * 8, left = end - base - p;
    const Item* from = values + int64_t(base + p) * D + column;
    Half* to = staged + p * PITCH + column;
#pragma unroll
    for (int i = 0; i < BLOCK; i += APART) {
      if (BLOCK % APART != 0 && p + i >= BLOCK) continue;
      const bool there = i < left;
      async_copy16(to + i * PITCH, INSIDE || there ? from + i * D : values, there ? 16 : 0);
    }
  } else if constexpr (D % 8 == 0) {
    for (unsigned i = threadIdx.x; i < BLOCK * (D / 8); i += THREADS) {
      const int p = i / (D / 8), column = i % (D / 8) * 8, real = base + p < end ? base + p : end - 1;
      async_copy16(staged + p * PITCH + column, values + int64_t(real) * D + column, base + p < end ? 16 : 0);
    }
  } else {
    for (unsigned i = threadIdx.x; i < BLOCK * D; i += THREADS) {
      const int p = i / D, column = i % D;
      staged[p * PITCH + column] = base + p < end ? as_half(values[int64_t(base + p) * D + column]) : Half{0};
    }
  }
}

// The padding that stage_* leave alone: elements from D on are 0.
QUERN_INLINE void clear_padding(Half* keys, Half* values) {
  constexpr int REST = PADDED - D;
  if constexpr (REST > 0) {
    for (int i = threadIdx.x; i < BLOCK * REST; i += THREADS) {
      const int e = D + i % (REST > 0 ? REST : 1), p = i / (REST > 0 ? REST : 1);
      keys[key_place(p / 16, e, p / 8 % 2) + p % 8] = Half{0};
      if constexpr (!CODES) values[p * PITCH + e] = Half{0};  // codes come with theirs
    }
  }
}

// A power of two that brings `most` to 1..2, and its inverse, so that fp16 neither overflows nor loses small queries.
QUERN_INLINE float to_one(float most, float& back) {
  const uint32_t exponent = float_bits(most) & 0x7f800000u, some = exponent < 0x00800000u ? 0x00800000u : exponent;
  back = bits_float(some);
  return bits_float(0x7f000000u - some);
}
