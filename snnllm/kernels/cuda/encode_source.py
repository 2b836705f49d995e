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
// Capacities and clip factors of both groups.
struct Tops { float most[2], clip[2]; };
INLINE Tops tops_of(const float* most, const float* clip) {
  return {{most[0], most[GROUPS - 1]}, {clip[0], clip[GROUPS - 1]}};
}
// Rounds thresholds up to multiples of one unit (neurons.thresholds); a lane of four tries one multiple of the second.
INLINE float larger(float a, float b) { return a > b || a != a ? a : b; }  // NaN stays
INLINE void make_commensurate(Spikes (&s)[2], const float (&below)[2]) {
  const float most0 = floorf(__fdiv_rn(255.0f, s[0].most)), most1 = floorf(__fdiv_rn(255.0f, s[1].most));
  const int k = threadIdx.x % 4;
  const float n = fmaxf(most1 - (float)k, 1.0f), s0 = s[0].threshold, s1 = s[1].threshold;
  // 19 bits of a unit, so that its multiples are exact.
  const float above = __fmul_rn(larger(__fdiv_rn(s0, most0), __fdiv_rn(s1, n)), 1.000003814697265625f);
  float unit = __int_as_float(__float_as_int(above) & ~31);
  float m0 = fminf(ceilf(__fdiv_rn(s0, unit)), most0), m1 = fminf(ceilf(__fdiv_rn(s1, unit)), most1);
  float cost = larger(__fdiv_rn(__fmul_rn(unit, m0), s0), __fdiv_rn(__fmul_rn(unit, m1), s1));
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const float cost_ = of_partner(cost, step), unit_ = of_partner(unit, step);
    const float m0_ = of_partner(m0, step), m1_ = of_partner(m1, step);
    if (cost_ < cost || (cost_ == cost && k & step)) cost = cost_, unit = unit_, m0 = m0_, m1 = m1_;
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
      make_commensurate(spikes, below);
    }
  } else spikes[1] = spikes[0];
}
// Counts of neighbours as bytes of a word, as neurons.backends.triton_encode_row.quotient.
INLINE unsigned counts_of(const float (&x)[4], const Spikes& s, float inverse, int& sum) {
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float q = __fmul_rn(x[i], inverse);
    if (s.threshold < 1e30f) {  // the same for all
      q = fmaf(fmaf(q, -s.threshold, x[i]), inverse, q);
      q = fmaf(fmaf(q, -s.threshold, x[i]), inverse, q);
    } else q = __fdiv_rn(x[i], s.threshold);
    const int count = count_of(q, s) * (GROUPS == 2 && RANGE_MODE == 2 ? (int)s.multiple : 1);
    sum += count;
    word |= (unsigned)count << 8 * i;
  }
  return word;
}
"""
