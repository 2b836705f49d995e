"""CUDA C++ of the steps of an encoder, for the kernels of `plain_source`, and of `normed_source` and `gated_source`.

The integers are those of `neurons.backends.triton_encode`; quotients are made of correctly rounded inverses. A row
has one or two groups of neighbouring channels (`neurons.backends.triton_encode_tiles.runs_of`). Macros: GROUPS (1 or
2), RANGE_MODE (of two groups: 0 own ranges, 1 one for both, 2 own ones with commensurate thresholds), OFFSET, OUT
(dtype of the row). Those of `LAYOUT`, where the layout is part of the compiled kernel: CHANNELS, POSITIONS, START0 ..
FIRST1 (`Run`).
"""

__all__ = ["ENCODING", "LAYOUT"]

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
// Of the bits of floats, or of two 16-bit ones (HALVES). As signed integers the largest is that of the largest float, 0
// at least; as unsigned ones it is that of the least float, if one is below 0. NaN is beyond infinity in both.
struct Ends { unsigned above, below; };
template <bool HALVES, int N> INLINE void widen_ends(Ends& e, const unsigned (&w)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 2)
    e.above = largest<HALVES>(w[i], w[i + 1], e.above), e.below = farthest<HALVES>(w[i], w[i + 1], e.below);
}
// Magnitudes below and above 0, as bits of floats, of a group.
template <bool HALVES> INLINE void take_range(unsigned (&range)[4], int group, const Ends& e) {
  if (HALVES) {
    const unsigned far = max(e.below & 0xffffu, e.below >> 16);
    range[2 * group] = far > 0x8000u ? (unsigned)__float_as_int(low_of(far & 0x7fffu)) : 0u;
    range[2 * group + 1] = (unsigned)__float_as_int(low_of(max(e.above & 0xffffu, e.above >> 16)));
  } else range[2 * group] = e.below > 0x80000000u ? e.below & 0x7fffffffu : 0u, range[2 * group + 1] = e.above;
}
// The largest of a warp of the first N; in lane i also as the result.
template <int N> INLINE unsigned largest_of_warp(unsigned (&range)[4], int lane) {
  unsigned one = 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    range[i] = maximum_of_warp(range[i]);
    if (lane == i) one = range[i];
  }
  return one;
}
// Of both groups: capacities, their inverses, clip factors, capacities in both halves of a word. If thresholds are
// commensurate: the largest multiples, those tried (of the second group one in each lane of four), and their inverses.
struct Tops { float most[2], inverse[2], clip[2]; unsigned halves[2]; float multiple[2], tried[2], share[2]; };
INLINE Tops tops_of(const float* most, const float* clip) {
  Tops tops;
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    tops.most[g] = most[g], tops.inverse[g] = inverse_of(most[g]), tops.clip[g] = clip[g];
    tops.halves[g] = (unsigned)most[g] * 0x10001u;
    if (!GRID) continue;
    tops.multiple[g] = floorf(short_quotient(255.0f, most[g], tops.inverse[g]));
    tops.tried[g] = fmaxf(tops.multiple[g] - (g ? (float)(threadIdx.x % 4) : 0.0f), 1.0f);
    tops.share[g] = inverse_of(tops.tried[g]);
  }
  return tops;
}
// Thresholds below it take the short way, others functions of their own: instructions that are not run are not to lie
// between those that are.
#define NEAR 1e20f
// A number that orders what lanes of four have tried: by its cost, up to 1e30 or NaN, then by the lane.
INLINE unsigned rank_of(float cost) {
  return ((unsigned)__float_as_int(fminf(cost, 1e30f)) - 0x3f000000u) * 4 + threadIdx.x % 4;  // a cost is above 1/2
}
INLINE float unit_of(const float (&finest)[2]) {  // 19 bits, so that multiples are exact
  return __int_as_float(__float_as_int(__fmul_rn(larger(finest[0], finest[1]), 1.000003814697265625f)) & ~31);
}
INLINE float multiple_of(float units, float most) {  // rounded up
  return fminf(__fadd_rn(add_up(units, 8388608.0f), -8388608.0f), most);  // 2^23 and an integer
}
// The parameters of both groups with thresholds rounded up to multiples of one unit (neurons.thresholds.commensurate),
// of the unit that this lane tries, and its rank. The least is the one to take: of equal costs the largest multiple.
INLINE unsigned grid_of(Spikes (&spikes)[2], const float (&below)[2], const float (&threshold)[2], const Tops& tops) {
  float finest[2], cost[2];
#pragma unroll
  for (int g = 0; g < 2; g++) finest[g] = short_quotient(threshold[g], tops.tried[g], tops.share[g]);
  const float unit = unit_of(finest), inverse = inverse_of(unit);
#pragma unroll
  for (int g = 0; g < 2; g++) {
    const float s = threshold[g], multiple = multiple_of(short_quotient(s, unit, inverse), tops.multiple[g]);
    const float raised = __fmul_rn(unit, multiple);
    spikes[g] = near_spikes_of(below[g], raised, tops.most[g]);
    spikes[g].unit = unit, spikes[g].multiple = multiple;
    cost[g] = quotient(raised, s, inverse_of(s));
  }
  return rank_of(larger(cost[0], cost[1]));
}
INLINE void take_from(Spikes& s, int lane) {
  s.zero = of_lane(s.zero, lane), s.inverse = of_lane(s.inverse, lane);
  s.unit = of_lane(s.unit, lane), s.multiple = of_lane(s.multiple, lane);
  s.threshold = __fmul_rn(s.unit, s.multiple);
}
INLINE void take_from(Spikes (&spikes)[2], int lane) { take_from(spikes[0], lane), take_from(spikes[1], lane); }
INLINE int lane_of(unsigned rank) { return GRID ? minimum_of_warp(rank) % 4 : 0; }
// What both groups reach below and above, clipped.
struct Reach { float below[2], above[2]; };
INLINE Reach reach_of(const unsigned (&range)[4], const Tops& tops) {
  Reach reach;
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    const int of = RANGE_MODE == 1 ? 0 : 2 * g;
    reach.below[g] = __fmul_rn(__int_as_float(range[of]), tops.clip[g]);
    reach.above[g] = __fmul_rn(__int_as_float(range[of + 1]), tops.clip[g]);
  }
  return reach;
}
// The parameters of any ranges, of both groups and every lane.
struct Both { Spikes of[2]; };
__noinline__ __device__ Both far_spikes_of(uint4 ranges, const float* capacity, const float* clip) {
  const unsigned range[4] = {ranges.x, ranges.y, ranges.z, ranges.w};
  const Tops tops = tops_of(capacity, clip);
  const auto [below, above] = reach_of(range, tops);
  Both both;
  float threshold[2];
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    threshold[g] = threshold_of(below[g], above[g], tops.most[g], tops.inverse[g]);
    both.of[g] = spikes_of(below[g], threshold[g], tops.most[g]);
  }
  if (GROUPS == 1) both.of[1] = both.of[0];
  if (!GRID) return both;
  const float scale = scale_of(larger(threshold[0], threshold[1]));
  float finest[2], cost[2];
#pragma unroll
  for (int g = 0; g < 2; g++) finest[g] = short_quotient(threshold[g], tops.tried[g], tops.share[g]);
  const float unit = unit_of(finest), scaled_unit = __fmul_rn(unit, scale), inverse = inverse_of(scaled_unit);
#pragma unroll
  for (int g = 0; g < 2; g++) {
    const float s = __fmul_rn(threshold[g], scale);
    const float multiple = multiple_of(short_quotient(s, scaled_unit, inverse), tops.multiple[g]);
    both.of[g] = spikes_of(below[g], __fmul_rn(unit, multiple), tops.most[g]);
    both.of[g].unit = unit, both.of[g].multiple = multiple;
    const float raised = __fmul_rn(scaled_unit, multiple);
    cost[g] = both.of[g].threshold < INFINITE ? quotient(raised, s, inverse_of(s)) : INFINITE;
  }
  take_from(both.of, lane_of(rank_of(larger(cost[0], cost[1]))));
#pragma unroll
  for (int g = 0; g < 2; g++) both.of[g].scale = scale_of(both.of[g].threshold);
  return both;
}
// Thresholds of both groups by the short way; whether it is right for them.
INLINE bool find_thresholds(float (&threshold)[2], const Reach& reach, const Tops& tops) {
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    const float range = __fadd_rn(reach.above[g], reach.below[g]);
    threshold[g] = larger(short_quotient(range, tops.most[g], tops.inverse[g]), 1e-5f);
  }
  return larger(threshold[0], threshold[GROUPS - 1]) < NEAR;
}
// Parameters of near thresholds: those of the lane of least rank, which is returned; of every lane where thresholds are
// not commensurate.
INLINE unsigned find_near_spikes(Spikes (&spikes)[2], const float (&below)[2], const float (&threshold)[2],
                                 const Tops& tops) {
  if (GRID) return grid_of(spikes, below, threshold, tops);
#pragma unroll
  for (int g = 0; g < GROUPS; g++) spikes[g] = near_spikes_of(below[g], threshold[g], tops.most[g]);
  if (GROUPS == 1) spikes[1] = spikes[0];
  return 0;
}
// The parameters of both groups, in every lane, from the ranges of a row.
INLINE void spikes_of_row(Spikes (&spikes)[2], const unsigned (&range)[4], const Tops& tops, const float* capacity,
                          const float* clip) {
  const Reach reach = reach_of(range, tops);
  float threshold[2];
  if (__builtin_expect(find_thresholds(threshold, reach, tops), 1)) {
    const unsigned rank = find_near_spikes(spikes, reach.below, threshold, tops);
    if (GRID) take_from(spikes, lane_of(rank));
  } else {
    const Both both = far_spikes_of({range[0], range[1], range[2], range[3]}, capacity, clip);
    spikes[0] = both.of[0], spikes[1] = both.of[1];
  }
}
// By value: an index that is not known would put both in memory.
INLINE Spikes of_group(const Spikes (&s)[2], bool second) {
  return {second ? s[1].threshold : s[0].threshold, second ? s[1].zero : s[0].zero, second ? s[1].most : s[0].most,
          second ? s[1].multiple : s[0].multiple, second ? s[1].unit : s[0].unit,
          second ? s[1].inverse : s[0].inverse, second ? s[1].scale : s[0].scale};
}
// What a count needs of a group: -256 thresholds, the two parts of their inverse, bias in 256 charges, the capacity in
// both halves of a word, the multiple.
struct Divider { float minus, inverse, rest, bias; unsigned most, multiple; };
INLINE Divider divider_of(const Spikes& s, unsigned most) {  // as `Tops` has it
  const float divisor = __fmul_rn(s.threshold, 256.0f), inverse = __fmul_rn(s.inverse, 0.00390625f);
  const float error = fmaf(-divisor, inverse, 1.0f), first = __fmul_rn(error, inverse);
  return {-divisor, inverse, fmaf(error, first, first), __fmul_rn(__fadd_rn(s.zero, 0.5f), 0.00390625f),
          most, (unsigned)__float_as_int(__fadd_rn(s.multiple, 8388608.0f)) & 0xffu};  // of an integer, beside 2^23
}
INLINE void dividers_of(Divider (&d)[2], const Spikes (&s)[2], const Tops& tops) {
#pragma unroll
  for (int g = 0; g < GROUPS; g++) d[g] = divider_of(s[g], tops.halves[g]);
  if (GROUPS == 1) d[1] = d[0];
}
INLINE Divider of_group(const Divider (&d)[2], bool second) {
  return {second ? d[1].minus : d[0].minus, second ? d[1].inverse : d[0].inverse, second ? d[1].rest : d[0].rest,
          second ? d[1].bias : d[0].bias, second ? d[1].most : d[0].most, second ? d[1].multiple : d[0].multiple};
}
// The count, not yet clipped above, in the last 16 bits. SHORT: x has at most 11 bits.
template <bool SHORT> INLINE float counted(float x, const Divider& d) {
  float q = fmaf(x, d.inverse, __fmul_rn(x, d.rest));
  if (!SHORT) q = fmaf(fmaf(q, d.minus, x), d.inverse, q);
  return add_down(add_saturated(q, d.bias), 32768.0f);
}
// Counts of four neighbours as bytes of a word, where thresholds are near.
template <bool SHORT> INLINE unsigned counts_by(const float* x, const Divider& d) {
  const unsigned even = smaller_halves(low_halves(counted<SHORT>(x[0], d), counted<SHORT>(x[2], d)), d.most);
  const unsigned odd = smaller_halves(low_halves(counted<SHORT>(x[1], d), counted<SHORT>(x[3], d)), d.most);
  return GRID ? even * d.multiple + odd * (d.multiple * 256) : even + odd * 256;
}
INLINE bool are_near(const Spikes (&s)[2]) { return s[0].threshold < NEAR && s[1].threshold < NEAR; }
// Likewise of any thresholds.
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
// Likewise; the word and the sum of its counts.
__noinline__ __device__ int2 far_counts_of(float4 x, Spikes s) {
  const float four[4] = {x.x, x.y, x.z, x.w};
  int sum = 0;
  const unsigned word = counts_of(four, s, sum);
  return {(int)word, sum};
}
"""

LAYOUT = r"""
INLINE bool in_second(int c) { return GROUPS == 2 && c >= FIRST1 && c < FIRST1 + MANY1; }
// Of channel c, which is in low .. high: known to the compiler unless both groups meet there.
INLINE int group_between(int low, int high, int c) {
  if (GROUPS == 1 || high <= FIRST1 || low >= FIRST1 + MANY1) return 0;
  if (low >= FIRST1 && high <= FIRST1 + MANY1) return 1;
  return (int)in_second(c);
}
INLINE unsigned char* place_of(unsigned char* count, int g, int c) {
  return count + c + (g ? START1 - FIRST1 : START0 - FIRST0);
}
// Calls `zero` of the positions behind the channels of each group, SIZE at a time, by so many threads.
template <int SIZE, int THREADS_OF_ROW, typename Zero> INLINE void pad(Zero zero) {
  auto between = [&](int i, int stop) {
#pragma unroll 1
    for (i += SIZE * threadIdx.x; i < stop; i += SIZE * THREADS_OF_ROW) zero(i);
  };
  if (START0 + MANY0 < STOP0) between(START0 + MANY0, STOP0);
  if (GROUPS == 2 && START1 + MANY1 < STOP1) between(START1 + MANY1, STOP1);
}
"""
