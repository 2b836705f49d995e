"""CUDA C++ of the steps of an encoder, for the kernels of `plain_source`, and of `normed_source` and `gated_source`.

The integers are those of `neurons.backends.triton_encode`; quotients are made of correctly rounded inverses. A row
has one or two groups of neighbouring channels (`neurons.backends.triton_encode_tiles.runs_of`). Macros: GROUPS (1 or
2), RANGE_MODE (of two groups: 0 own ranges, 1 one for both, 2 own ones with commensurate thresholds), OFFSET, OUT
(dtype of the row).
"""

__all__ = ["ENCODING"]

ENCODING = r"""
// Positions start .. stop of counts hold the many channels behind first, then zeros.
struct Run { int start, stop, many, first; };
// Two groups have ranges of their own; and thresholds that are commensurate.
constexpr bool OWN_RANGES = GROUPS == 2 && RANGE_MODE != 1, GRID = GROUPS == 2 && RANGE_MODE == 2;

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
// Of both groups: capacities, their inverses, clip factors. If thresholds are commensurate: the largest multiples,
// those tried (of the second group one in each lane of four), and the inverses of these.
struct Tops { float most[2], inverse[2], clip[2], multiple[2], tried[2], share[2]; };
INLINE Tops tops_of(const float* most, const float* clip) {
  Tops tops;
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    tops.most[g] = most[g], tops.inverse[g] = inverse_of(most[g]), tops.clip[g] = clip[g];
    if (!GRID) continue;
    tops.multiple[g] = floorf(quotient(255.0f, most[g], tops.inverse[g]));
    tops.tried[g] = fmaxf(tops.multiple[g] - (g ? (float)(threadIdx.x % 4) : 0.0f), 1.0f);
    tops.share[g] = inverse_of(tops.tried[g]);
  }
  return tops;
}
// The parameters of both groups with thresholds rounded up to multiples of one unit (neurons.thresholds.commensurate): of
// the unit that this lane tries. Returns its cost as a number, up to 1e30 or NaN, with the lane of four at its end: the
// least is the one to take, of equal costs the largest multiple.
INLINE unsigned grid_of(Spikes (&spikes)[2], const float (&below)[2], const float (&threshold)[2], const Tops& tops) {
  const float scale = scale_of(larger(threshold[0], threshold[1]));
  float finest[2], cost[2];
#pragma unroll
  for (int g = 0; g < 2; g++) finest[g] = quotient(threshold[g], tops.tried[g], tops.share[g]);
  // 19 bits, so that multiples are exact.
  const float above = __fmul_rn(larger(finest[0], finest[1]), 1.000003814697265625f);
  const float unit = __int_as_float(__float_as_int(above) & ~31);
  const float scaled_unit = __fmul_rn(unit, scale), inverse = inverse_of(scaled_unit);
#pragma unroll
  for (int g = 0; g < 2; g++) {
    const float s = __fmul_rn(threshold[g], scale);
    const float above_zero = add_up(quotient(s, scaled_unit, inverse), 8388608.0f);  // 2^23 and an integer
    const float multiple = fminf(__fadd_rn(above_zero, -8388608.0f), tops.multiple[g]);
    const float raised = __fmul_rn(scaled_unit, multiple);
    spikes[g] = spikes_of(below[g], __fmul_rn(unit, multiple), tops.most[g]);
    spikes[g].unit = unit, spikes[g].multiple = multiple;
    cost[g] = spikes[g].threshold < INFINITE ? quotient(raised, s, inverse_of(s)) : INFINITE;
  }
  const unsigned bits = (unsigned)__float_as_int(fminf(larger(cost[0], cost[1]), 1e30f));
  return (bits - 0x3f000000u) * 4 + threadIdx.x % 4;  // costs are above 1/2: two bits are free
}
// The parameters of both groups from the ranges of WARPS warps (or blocks), a power of two: those of the lane that is
// returned.
template <int WARPS>
INLINE int find_spikes_of_all(Spikes (&spikes)[2], const unsigned* ranges, const Tops& tops) {
  unsigned range[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < 2 || OWN_RANGES) range[i] = maximum_of_warp(ranges[threadIdx.x % WARPS * 4 + i]);
  float below[2], threshold[2];
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    const int of = RANGE_MODE == 1 ? 0 : 2 * g;
    below[g] = __fmul_rn(__int_as_float(range[of]), tops.clip[g]);
    const float above = __fmul_rn(__int_as_float(range[of + 1]), tops.clip[g]);
    threshold[g] = threshold_of(below[g], above, tops.most[g], tops.inverse[g]);
  }
  if (GRID) return minimum_of_warp(grid_of(spikes, below, threshold, tops)) % 4;
#pragma unroll
  for (int g = 0; g < GROUPS; g++) spikes[g] = spikes_of(below[g], threshold[g], tops.most[g]);
  if (GROUPS == 1) spikes[1] = spikes[0];
  return 0;
}
// Those of every lane.
template <int WARPS>
INLINE void spikes_of_all(Spikes (&spikes)[2], const unsigned* ranges, const Tops& tops) {
  const int best = find_spikes_of_all<WARPS>(spikes, ranges, tops);
  if (!GRID) return;
  const float unit = of_lane(spikes[0].unit, best);
#pragma unroll
  for (int g = 0; g < 2; g++) {
    Spikes& s = spikes[g];
    s = {of_lane(s.threshold, best), of_lane(s.zero, best), s.most, of_lane(s.multiple, best), unit,
         of_lane(s.inverse, best), 0.0f};
    s.scale = scale_of(s.threshold);
  }
}
// By value: an index that is not known would put both in memory.
INLINE Spikes of_group(const Spikes (&s)[2], bool second) {
  return {second ? s[1].threshold : s[0].threshold, second ? s[1].zero : s[0].zero, second ? s[1].most : s[0].most,
          second ? s[1].multiple : s[0].multiple, second ? s[1].unit : s[0].unit,
          second ? s[1].inverse : s[0].inverse, second ? s[1].scale : s[0].scale};
}
// Counts of neighbours as bytes of a word.
INLINE unsigned counts_of(const float (&x)[4], const Spikes& s, int& sum) {
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int count = count_of(in_thresholds(x[i], s), s) * (GRID ? (int)s.multiple : 1);
    sum += count;
    word |= (unsigned)count << 8 * i;
  }
  return word;
}
"""
