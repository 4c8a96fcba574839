// 2^x for x <= 127 as schedules.vector.exp2 has it, and the gated activations; constants: quantize.py.
QUERN_INLINE float exp2_polynomial(float x) {
  x = fmaxf(x, -127.0f);
  const int32_t whole = round_to_int(x);
  const float f = x - static_cast<float>(whole);
  float power = EXP2_0;
  power = fmaf(power, f, EXP2_1);
  power = fmaf(power, f, EXP2_2);
  power = fmaf(power, f, EXP2_3);
  power = fmaf(power, f, EXP2_4);
  power = fmaf(power, f, 1.0f);
  return bits_float(float_bits(power) + (static_cast<uint32_t>(whole) << 23));
}
QUERN_INLINE float sigmoid_times(float gate, float exponent) {  // gate / (1 + 2^exponent)
  return gate / (1.0f + exp2_polynomial(fminf(exponent, 127.0f)));
}
QUERN_INLINE float silu(float gate) { return sigmoid_times(gate, gate * -LOG2_E); }
QUERN_INLINE float gelu_tanh(float gate) {
  return sigmoid_times(gate, gate * fmaf(gate * gate, GELU_CUBED, GELU_FACTOR));
}
