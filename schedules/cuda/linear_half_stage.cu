// 32 inputs of TOKENS tokens and ROWS rows as halves in shared memory, for kernels that take both from there: two
// threads a row. Constants as linear_half_shared.cu, TOKENS, ROWS, WARPS = ROWS / 16.

constexpr int THREADS = 32 * WARPS, STEP = 32, PITCH = STEP + 8;
constexpr int UNITS = (TOKENS * 4 + THREADS - 1) / THREADS;           // of 8 activations, a thread's
constexpr int PART = SPAN < STEP ? SPAN : STEP, PARTS = STEP / PART;  // inputs with one scale, and how many of them
constexpr int WORDS = BITS / 2;                                       // of 16 codes, a thread's

struct Ahead {  // what a thread has read of the next step
  uint4 activations[UNITS];
  uint32_t words[WORDS];
  float scale[PARTS], least[PARTS];
  uint32_t zero[PARTS];
};

QUERN_INLINE int group_of(int place) {
  const int group = place / WIDTH;
  return group < GROUPS ? group : GROUPS - 1;  // padding, whose activations are 0
}

QUERN_INLINE void read_ahead(const Half* rounded, const uint32_t* codes, const Scale* scale, const uint8_t* zero,
                             const float* offset, int token, int row, int step, Ahead& to) {
  const int thread = threadIdx.x, place = step + thread % 4 * 8;
#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    const int own = thread / 4 + u * (THREADS / 4), of = token + own;
    to.activations[u] = uint4{0, 0, 0, 0};
    if (own < TOKENS && of < M && place < STORED)
      to.activations[u] = load_constant(reinterpret_cast<const uint4*>(rounded + int64_t(of) * STORED + place));
  }
  const int own = row + thread / 2, side = thread % 2;
  const int first = step + (BITS == 8 ? side * 16 : 0);  // the chunk's
  const uint32_t* from = codes + (int64_t(own) * (STORED / CHUNK) + first / CHUNK) * 4 + (BITS == 8 ? 0 : 2 * side);
#pragma unroll
  for (int i = 0; i < WORDS; i += 2) {
    const uint2 two = first < STORED ? load_stream(reinterpret_cast<const uint2*>(from + i)) : uint2{0, 0};
    to.words[i] = two.x, to.words[i + 1] = two.y;
  }
#pragma unroll
  for (int p = 0; p < PARTS; ++p) {
    const int64_t at = (int64_t(own / 8) * GROUPS + group_of(step + p * PART)) * 8 + own % 8;
    to.scale[p] = real(load_constant(scale + at));
    to.zero[p] = CENTRE;
    to.least[p] = 0;
    if constexpr (AFFINE == 0) to.zero[p] = load_constant(zero + at);
    if constexpr (AFFINE == 1) to.least[p] = fmaf(to.scale[p], static_cast<float>(CENTRE), load_constant(offset + at));
  }
}

// What was read to shared memory: activations [TOKENS][PITCH], weights [ROWS][PITCH], scales and least by part and row.
QUERN_INLINE void put(const Ahead& from, const Half* table, Half* activations, Half* weights, float (*scales)[ROWS],
                      float (*leasts)[ROWS]) {
  const int thread = threadIdx.x, own = thread / 2, side = thread % 2;
#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    const int of = thread / 4 + u * (THREADS / 4);
    if (of < TOKENS) *reinterpret_cast<uint4*>(activations + of * PITCH + thread % 4 * 8) = from.activations[u];
  }
  Half2 found[WORDS][PAIRS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    if constexpr (AFFINE == 2) {
      pairs(from.words[i], table, found[i]);
    } else {
      pairs(from.words[i], zero_of(BITS == 8 && side == 1 ? from.zero[PARTS - 1] : from.zero[0], 0), found[i]);
      if constexpr (BITS == 4 && PARTS > 1) {
        Half2 second[PAIRS];
        pairs(from.words[i], zero_of(from.zero[PARTS - 1], 0), second);
        found[i][2] = second[2], found[i][3] = second[3];
      }
    }
  }
  Half* row = weights + own * PITCH;
#pragma unroll
  for (int j = 0; j < PAIRS; ++j) {  // pair j of words t.. : 16 (j / 2) + 8 (j % 2) + 2 t
    if constexpr (BITS == 8) {
      *reinterpret_cast<uint4*>(row + side * 16 + j * 8) =
          uint4{found[0][j].bits, found[1][j].bits, found[WORDS - 2][j].bits, found[WORDS - 1][j].bits};
    } else {
      *reinterpret_cast<uint2*>(row + j / 2 * 16 + j % 2 * 8 + side * 4) = uint2{found[0][j].bits, found[1][j].bits};
    }
  }
  if (side == 0) {
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
      scales[p][own] = from.scale[p];
      if constexpr (AFFINE == 1) leasts[p][own] = from.least[p];
    }
  }
}

// Sum of a token's activations over part p of the step.
QUERN_INLINE float part_sum(const float* sums, int token, int step, int p) {
  const int place = step + p * PART;
  if (token >= M || place >= STORED || (SPAN > PART && place % SPAN != 0)) return 0;
  return load_constant(sums + token * (STORED / SPAN) + place / SPAN);
}
