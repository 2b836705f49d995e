"""CUDA C++ of the steps of an encoder of few rows, for the kernels of `normed_source` and `gated_source`.

The integers are those of `neurons.backends.triton_encode`, operation by operation. A row has one or two groups of
neighbouring channels (`neurons.backends.triton_encode_tiles.runs_of`). Macros: GROUPS (1 or 2), RANGE_MODE (of two
groups: 0 own ranges, 1 one for both, 2 own ones with commensurate thresholds), OFFSET, OUT (dtype of the row).
"""

__all__ = ["ENCODING"]

ENCODING = r"""
// Positions start .. stop of counts hold the many channels behind first, then zeros.
struct Run { int start, stop, many, first; };

INLINE void load_four(float (&x)[4], const void* from, i64 at) {
#if OUT == 0
  const float4 v = *(const float4*)((const float*)from + at);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
#else
  const uint2 v = *(const uint2*)((const unsigned short*)from + at);
  x[0] = low_of(v.x), x[1] = low_of(v.x >> 16), x[2] = low_of(v.y), x[3] = low_of(v.y >> 16);
#endif
}
INLINE void load_floats(float (&x)[4], const float* from) {
  const float4 v = *(const float4*)from;
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
INLINE void round_four(float (&x)[4]) {  // to the type of the row
#if OUT != 0
  const unsigned a = pair(x[0], x[1]), b = pair(x[2], x[3]);
  x[0] = low_of(a), x[1] = low_of(a >> 16), x[2] = low_of(b), x[3] = low_of(b >> 16);
#endif
}
INLINE void store_four(void* to, i64 at, const float (&x)[4]) {
#if OUT == 0
  *(float4*)((float*)to + at) = {x[0], x[1], x[2], x[3]};
#else
  *(uint2*)((unsigned short*)to + at) = {pair(x[0], x[1]), pair(x[2], x[3])};
#endif
}
INLINE void widen(unsigned (&range)[4], const float (&x)[4], int group) {  // below and above of each group
  unsigned below = 0, above = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) below = max(below, bits_above(-x[i])), above = max(above, bits_above(x[i]));
  if (RANGE_MODE == 1 || group == 0) range[0] = max(range[0], below), range[1] = max(range[1], above);
  else range[2] = max(range[2], below), range[3] = max(range[3], above);
}
// Correctly rounded by the correctly rounded inverse, as neurons.backends.triton_encode_row.quotient.
INLINE float quotient(float x, float divisor, float inverse) {
  float q = __fmul_rn(x, inverse);
  q = fmaf(fmaf(q, -divisor, x), inverse, q);
  return fmaf(fmaf(q, -divisor, x), inverse, q);
}
// Capacities and clip factors of both groups; what the thresholds are divided by if they are commensurate: the largest
// multiple of the first group, and the one of the second that this lane tries.
struct Tops { float most[2], clip[2], multiples[2], divisors[2], inverses[2]; };
INLINE Tops tops_of(const float* most, const float* clip) {
  Tops tops = {{most[0], most[GROUPS - 1]}, {clip[0], clip[GROUPS - 1]}};
#pragma unroll
  for (int g = 0; g < 2 && RANGE_MODE == 2; g++) {
    tops.multiples[g] = floorf(__fdiv_rn(255.0f, tops.most[g]));
    tops.divisors[g] = g ? fmaxf(tops.multiples[1] - (float)(threadIdx.x % 4), 1.0f) : tops.multiples[0];
    tops.inverses[g] = __fdiv_rn(1.0f, tops.divisors[g]);
  }
  return tops;
}
INLINE float larger(float a, float b) { return a > b || a != a ? a : b; }  // NaN stays
// Rounds thresholds up to multiples of one unit (neurons.thresholds.commensurate); four lanes try four units.
INLINE void make_commensurate(Spikes (&s)[2], const float (&below)[2], const Tops& tops) {
  const float s0 = s[0].threshold, s1 = s[1].threshold;
  const bool plain = !(larger(s0, s1) < 1e30f);  // the same for all; `quotient` takes no others
  auto ratio = [&](float x, float divisor, float inverse) {
    return plain ? __fdiv_rn(x, divisor) : quotient(x, divisor, inverse);
  };
  const float finest0 = ratio(s0, tops.divisors[0], tops.inverses[0]);
  const float finest = larger(finest0, ratio(s1, tops.divisors[1], tops.inverses[1]));
  // 19 bits, so that multiples are exact.
  float unit = __int_as_float(__float_as_int(__fmul_rn(finest, 1.000003814697265625f)) & ~31);
  const float inverse = __fdiv_rn(1.0f, unit);
  float m0 = fminf(ceilf(ratio(s0, unit, inverse)), tops.multiples[0]);
  float m1 = fminf(ceilf(ratio(s1, unit, inverse)), tops.multiples[1]);
  float cost = larger(ratio(__fmul_rn(unit, m0), s0, __fdiv_rn(1.0f, s0)),
                      ratio(__fmul_rn(unit, m1), s1, __fdiv_rn(1.0f, s1)));
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const float cost_ = of_partner(cost, step), unit_ = of_partner(unit, step);
    const float m0_ = of_partner(m0, step), m1_ = of_partner(m1, step);
    if (cost_ < cost || (cost_ == cost && threadIdx.x & step)) cost = cost_, unit = unit_, m0 = m0_, m1 = m1_;
  }
  const float multiples[2] = {m0, m1};
#pragma unroll
  for (int g = 0; g < 2; g++) {
    const float threshold = __fmul_rn(unit, multiples[g]);
    s[g] = {threshold, zero_of(below[g], threshold, s[g].most), s[g].most, multiples[g], unit};
  }
}
// The parameters of both groups from the ranges of WARPS warps (or blocks), a power of two.
template <int WARPS>
INLINE void spikes_of_all(Spikes (&spikes)[2], const unsigned* ranges, const Tops& tops) {
  unsigned range[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < 2 || (GROUPS == 2 && RANGE_MODE != 1)) range[i] = maximum_of_warp(ranges[threadIdx.x % WARPS * 4 + i]);
  spikes[0] = spikes_of(range[0], range[1], tops.most[0], tops.clip[0]);
  if (GROUPS == 2) {
    constexpr int of = RANGE_MODE == 1 ? 0 : 2;
    spikes[1] = spikes_of(range[of], range[of + 1], tops.most[1], tops.clip[1]);
    if (RANGE_MODE == 2) {
      const float below[2] = {__fmul_rn(__int_as_float(range[0]), tops.clip[0]),
                              __fmul_rn(__int_as_float(range[2]), tops.clip[1])};
      make_commensurate(spikes, below, tops);
    }
  } else spikes[1] = spikes[0];
}
// Counts of neighbours as bytes of a word.
INLINE unsigned counts_of(const float (&x)[4], const Spikes& s, float inverse, int& sum) {
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    // The same for all.
    const float q = s.threshold < 1e30f ? quotient(x[i], s.threshold, inverse) : __fdiv_rn(x[i], s.threshold);
    const int count = count_of(q, s) * (GROUPS == 2 && RANGE_MODE == 2 ? (int)s.multiple : 1);
    sum += count;
    word |= (unsigned)count << 8 * i;
  }
  return word;
}
"""
