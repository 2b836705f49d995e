"""CUDA C++ of the steps of an encoder of few rows, for the kernels of `normed_source` and `gated_source`.

The integers are those of `neurons.backends.triton_encode`, operation by operation. A row has one or two groups of
neighbouring channels (`neurons.backends.triton_encode_tiles.runs_of`). Macros: GROUPS (1 or 2), ONE_RANGE (of both
groups), OFFSET, OUT (dtype of the row).
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
  if (ONE_RANGE || group == 0) range[0] = max(range[0], below), range[1] = max(range[1], above);
  else range[2] = max(range[2], below), range[3] = max(range[3], above);
}
// Capacities and clip factors of both groups.
struct Tops { float most[2], clip[2]; };
INLINE Tops tops_of(const float* most, const float* clip) {
  return {{most[0], most[GROUPS - 1]}, {clip[0], clip[GROUPS - 1]}};
}
// The parameters of both groups from the ranges of WARPS warps (or blocks), a power of two.
template <int WARPS>
INLINE void spikes_of_all(Spikes (&spikes)[2], const unsigned* ranges, const Tops& tops) {
  unsigned range[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < 2 || (GROUPS == 2 && !ONE_RANGE)) range[i] = maximum_of_warp(ranges[threadIdx.x % WARPS * 4 + i]);
  spikes[0] = spikes_of(range[0], range[1], tops.most[0], tops.clip[0]);
  if (GROUPS == 2) {
    constexpr int of = ONE_RANGE ? 0 : 2;
    spikes[1] = spikes_of(range[of], range[of + 1], tops.most[1], tops.clip[1]);
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
    const int count = count_of(q, s);
    sum += count;
    word |= (unsigned)count << 8 * i;
  }
  return word;
}
"""
