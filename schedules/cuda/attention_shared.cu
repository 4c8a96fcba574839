// What all attention kernels say of scores. Constants: WINDOW, SOFTCAP (0: none), LOG2E_CAP = SOFTCAP log2 e.

constexpr float MASKED = -1e30f;  // below any score; 2^(MASKED - maximum) is exactly 0

// A product that was scaled for it, to an exponent of 2: capped where there is a cap.
QUERN_INLINE float capped(float score) {
  if (SOFTCAP == 0) return score;
  // tanh(x ln 2 / 2) = 1 - 2 / (2^x + 1): exact to 2^-23 of the cap, also where 2^x overflows or vanishes
  return LOG2E_CAP * fmaf(-2.0f, reciprocal_approx(exp2_approx(score) + 1.0f), 1.0f);
}

// Whether a row at position `own` sees `position`.
QUERN_INLINE bool sees(int own, int position) {
  return position <= own && (WINDOW == 0 || position > own - WINDOW);
}

// First position that a row at position `own` sees.
QUERN_INLINE int first_seen(int own) { return WINDOW != 0 && own >= WINDOW ? own - WINDOW + 1 : 0; }
