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
// A lane has a group, of which it makes the parameters for all: divisions are long, and so is code that is not near.
INLINE int group_of_lane() { return GROUPS == 2 ? threadIdx.x / 4 % 2 : 0; }
// Capacities of both groups. Of the lane's group capacity and clip factor; its largest multiple, if thresholds are
// commensurate, and what the threshold is divided by: the largest multiple of the first group, and the one of the
// second that this lane of four tries.
struct Tops { float most[2], own, clip, multiple, divisor, inverse; };
INLINE Tops tops_of(const float* most, const float* clip) {
  const int g = group_of_lane();
  Tops tops = {{most[0], most[GROUPS - 1]}, most[g], clip[g]};
  if (RANGE_MODE == 2) {
    tops.multiple = floorf(__fdiv_rn(255.0f, tops.own));
    tops.divisor = fmaxf(tops.multiple - (g ? (float)(threadIdx.x % 4) : 0.0f), 1.0f);
    tops.inverse = __fdiv_rn(1.0f, tops.divisor);
  }
  return tops;
}
INLINE float larger(float a, float b) { return a > b || a != a ? a : b; }  // NaN stays
// Rounds the thresholds of both groups up to multiples of one unit (neurons.thresholds.commensurate).
INLINE Spikes commensurate(const Spikes& s, float below, const Tops& tops) {
  const bool plain = !(larger(s.threshold, of_partner(s.threshold, 4)) < 1e30f);  // `quotient` takes no others
  auto ratio = [&](float x, float divisor, float inverse) {
    return plain ? __fdiv_rn(x, divisor) : quotient(x, divisor, inverse);
  };
  const float finest = ratio(s.threshold, tops.divisor, tops.inverse);
  // 19 bits, so that multiples are exact.
  const float above = __fmul_rn(larger(finest, of_partner(finest, 4)), 1.000003814697265625f);
  float unit = __int_as_float(__float_as_int(above) & ~31);
  float multiple = fminf(ceilf(ratio(s.threshold, unit, __fdiv_rn(1.0f, unit))), tops.multiple);
  float cost = ratio(__fmul_rn(unit, multiple), s.threshold, s.inverse);
  cost = larger(cost, of_partner(cost, 4));
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const float cost_ = of_partner(cost, step), unit_ = of_partner(unit, step), multiple_ = of_partner(multiple, step);
    if (cost_ < cost || (cost_ == cost && threadIdx.x & step)) cost = cost_, unit = unit_, multiple = multiple_;
  }
  const float threshold = __fmul_rn(unit, multiple);
  return {threshold, zero_of(below, threshold, s.most), s.most, multiple, unit, __fdiv_rn(1.0f, threshold)};
}
// The parameters of both groups from the ranges of WARPS warps (or blocks), a power of two.
template <int WARPS>
INLINE void spikes_of_all(Spikes (&spikes)[2], const unsigned* ranges, const Tops& tops) {
  unsigned range[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < 2 || (GROUPS == 2 && RANGE_MODE != 1)) range[i] = maximum_of_warp(ranges[threadIdx.x % WARPS * 4 + i]);
  const bool second = RANGE_MODE != 1 && group_of_lane();
  const unsigned below = second ? range[2] : range[0], above = second ? range[3] : range[1];
  Spikes own = spikes_of(below, above, tops.own, tops.clip);
  if (GROUPS == 2 && RANGE_MODE == 2) own = commensurate(own, __fmul_rn(__int_as_float(below), tops.clip), tops);
#pragma unroll
  for (int g = 0; g < 2; g++) {
    const int from = 4 * g * (GROUPS - 1);
    spikes[g] = {of_lane(own.threshold, from), of_lane(own.zero, from), tops.most[g], of_lane(own.multiple, from),
                 of_lane(own.unit, from), of_lane(own.inverse, from)};
  }
}
// By value: an index that is not known would put both in memory.
INLINE Spikes of_group(const Spikes (&s)[2], bool second) {
  return {second ? s[1].threshold : s[0].threshold, second ? s[1].zero : s[0].zero, second ? s[1].most : s[0].most,
          second ? s[1].multiple : s[0].multiple, second ? s[1].unit : s[0].unit,
          second ? s[1].inverse : s[0].inverse};
}
// Counts of neighbours as bytes of a word.
INLINE unsigned counts_of(const float (&x)[4], const Spikes& s, int& sum) {
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    // The same for all.
    const float q = s.threshold < 1e30f ? quotient(x[i], s.threshold, s.inverse) : __fdiv_rn(x[i], s.threshold);
    const int count = count_of(q, s) * (GROUPS == 2 && RANGE_MODE == 2 ? (int)s.multiple : 1);
    sum += count;
    word |= (unsigned)count << 8 * i;
  }
  return word;
}
"""
