"""CUDA C++ that encodes rows as they are, few or many.

A row has a block of ROW_THREADS threads. A thread has VECTOR neighbouring channels of every ROW_THREADS * VECTOR, and
holds them as they come. The layout is part of the compiled kernel: the group of most vectors is known then.

Where rows are not few, instructions are waited for: one warp makes the parameters for all, and rehearses that while
the row comes; what rows of extreme ranges need is a function of its own (`encode_far`), out of the way.

A quotient costs two instructions where x has at most 11 bits: an inverse of two floats, `inverse + rest`, makes it
right to 2^-47. It decides every count as the rounded quotient does, which was tried for all x, zero points and counts
at the thresholds next to each border (`tests/snnllm/test_cuda_plain.py`). Other x take a Newton step more, from a
faithful quotient (Markstein 1990). Counts are in 1/256, so that the instruction that adds the bias also clips.

Macros besides those of `encode_source.ENCODING`: CHANNELS, POSITIONS, START0 .. FIRST1 (`Run`), ROW_THREADS,
RESIDENT (blocks on a multiprocessor, at least), VECTOR (4 or 8), EARLY (goes through its work twice).
"""

from snnllm.kernels.cuda.encode_source import ENCODING
from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES, SHARED

__all__ = ["BODY", "INSTRUCTIONS", "LANES", "SOURCE", "shared_bytes"]

_SPIKES = 28  # bytes of the parameters of a group


def shared_bytes(threads: int) -> int:
    """Shared memory of a block whose rows have so many threads: ranges and sums of its warps, parameters of a row."""
    return threads // 32 * (4 + 2) * 4 + 2 * _SPIKES


LANES = r"""
// Words of two channels are compared as they come, else floats.
#define PAIRED (OUT != 0 && !OFFSET)
"""

INSTRUCTIONS = r"""
INLINE unsigned largest(unsigned a, unsigned b, unsigned c) {  // signed
  return PAIRED ? __vimax3_s16x2(a, b, c) : (unsigned)__vimax3_s32((int)a, (int)b, (int)c);
}
INLINE unsigned farthest(unsigned a, unsigned b, unsigned c) {  // unsigned
  return PAIRED ? __vimax3_u16x2(a, b, c) : __vimax3_u32(a, b, c);
}
INLINE float high_of(unsigned pair) {
#if OUT == 2
  float v;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(v) : "r"(pair));
  return v;
#else
  return __int_as_float(pair & 0xffff0000u);
#endif
}
"""

BODY = r"""
constexpr int WORDS = OUT == 0 ? VECTOR : VECTOR / 2, VECTORS = CHANNELS / VECTOR, WARPS = ROW_THREADS / 32;
constexpr int CHUNKS = (VECTORS + ROW_THREADS - 1) / ROW_THREADS;
constexpr bool BY_ONE = WARPS > 4 && !EARLY;  // elsewhere it is slower
static_assert(sizeof(Spikes) == 28, "shared_bytes");

INLINE void load_words(unsigned (&w)[WORDS], const void* from) {
  if constexpr (WORDS == 2) {
    const uint2 v = *(const uint2*)from;
    w[0] = v.x, w[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      const uint4 v = *(const uint4*)((const unsigned*)from + i);
      w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
    }
  }
}
INLINE void floats_of(float (&x)[VECTOR], const unsigned (&w)[WORDS]) {
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
#if OUT == 0
    x[i] = __int_as_float(w[i]);
#else
    x[i] = i % 2 ? high_of(w[i / 2]) : low_of(w[i / 2]);
#endif
  }
}
template <int N> INLINE void take_offset(float (&x)[N], const float* offset) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    float off[4];
    load_floats(off, offset + i);
#pragma unroll
    for (int j = 0; j < 4; j++) x[i + j] = __fadd_rn(x[i + j], -off[j]);
  }
}
// Of the bits of floats. As signed integers the largest is that of the largest float, 0 at least; as unsigned ones it
// is that of the least float, if one is below 0. NaN is beyond infinity in both.
struct Ends { unsigned above, below; };
template <int N> INLINE void widen_ends(Ends& e, const unsigned (&w)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 2)
    e.above = largest(w[i], w[i + 1], e.above), e.below = farthest(w[i], w[i + 1], e.below);
}
INLINE unsigned magnitude_above(unsigned bits) {  // as `bits_above`
#if PAIRED
  const unsigned low = bits & 0xffffu, high = bits >> 16;
  return (unsigned)__float_as_int(low_of(max(low, high)));
#else
  return bits;
#endif
}
INLINE unsigned magnitude_below(unsigned bits) {
#if PAIRED
  const unsigned far = max(bits & 0xffffu, bits >> 16);
  return far > 0x8000u ? (unsigned)__float_as_int(low_of(far & 0x7fffu)) : 0u;
#else
  return bits > 0x80000000u ? bits & 0x7fffffffu : 0u;
#endif
}
INLINE void store_words(unsigned char* to, const unsigned (&w)[VECTOR / 4]) {
  if constexpr (VECTOR == 8) *(uint2*)to = {w[0], w[1]};
  else *(unsigned*)to = w[0];
}
INLINE void row_meets() {
  if (ROW_THREADS == 32) __syncwarp();
  else __syncthreads();
}

INLINE bool in_second(int c) { return GROUPS == 2 && c >= FIRST1 && c < FIRST1 + MANY1; }
INLINE unsigned char* place_of(unsigned char* count, int g, int c) {
  return count + c + (g ? START1 - FIRST1 : START0 - FIRST0);
}
// The counts of a row by divisions for all ranges, and their sums in a thread. Not inlined: instructions that are not
// run are not to lie between those that are.
__noinline__ __device__ int2 encode_far(const void* x, i64 at, const float* offset, unsigned char* count, Spikes first,
                                        Spikes second) {
  const Spikes spikes[2] = {first, second};
  int sum[2] = {0, 0};
#pragma unroll 1
  for (int c = 4 * threadIdx.x; c < CHANNELS; c += 4 * ROW_THREADS) {
    const bool g = in_second(c);
    float y[4];
    load_four(y, x, at + c);
    if (OFFSET) take_offset(y, offset + c);
    int total = 0;
    *(unsigned*)place_of(count, g, c) = counts_of(y, of_group(spikes, g), total);
    if (g) sum[1] += total;
    else sum[0] += total;
  }
  return {sum[0], sum[1]};
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS, RESIDENT) encode_plain(
    const void* x, const float* offset, const float* capacity, const float* clip, unsigned char* count,
    float* threshold, int* zero_point, int* count_sum, int x_stride) {
  extern __shared__ __align__(128) unsigned char memory[];
  unsigned* ranges = (unsigned*)memory;         // [WARPS][4], unless a warp has a row
  int* sums = (int*)(ranges + 4 * WARPS);       // [WARPS][2]
  Spikes* found = (Spikes*)(sums + 2 * WARPS);  // [2]
  launch_dependents();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const i64 row = blockIdx.x;
  const char* from = (const char*)x + (row * x_stride + VECTOR * thread) * (OUT == 0 ? 4 : 2);
  count += row * POSITIONS;
  auto inside = [&](int v) { return ROW_THREADS * (v + 1) <= VECTORS || ROW_THREADS * v + thread < VECTORS; };
  auto group_of = [&](int v) {  // known to the compiler unless both groups meet there
    const int low = ROW_THREADS * VECTOR * v, high = min(low + ROW_THREADS * VECTOR, CHANNELS);
    if (GROUPS == 1 || high <= FIRST1 || low >= FIRST1 + MANY1) return 0;
    if (low >= FIRST1 && high <= FIRST1 + MANY1) return 1;
    return (int)in_second(low + VECTOR * thread);
  };
  const Tops tops = tops_of(capacity, clip);
#if EARLY
  REHEARSED
#else
  const unsigned real = 1;
#endif
  {
    if (real) wait_for_kernel_in_front();

    unsigned own[CHUNKS][WORDS];
#pragma unroll
    for (int v = 0; v < CHUNKS; v++) {
#pragma unroll
      for (int i = 0; i < WORDS; i++) own[v][i] = 0;
      if (inside(v) && real) load_words(own[v], from + v * (ROW_THREADS * WORDS * 4));
    }
    auto values = [&](float (&y)[VECTOR], int v) {
      floats_of(y, own[v]);
      if (OFFSET) take_offset(y, offset + VECTOR * (ROW_THREADS * v + thread));
    };
    unsigned range[4];
    auto find_ranges = [&]() {  // those of a warp; of more, all of them in `ranges`
      Ends ends[2] = {{0, 0}, {0, 0}};
#pragma unroll
      for (int v = 0; v < CHUNKS; v++) {
        const bool second = OWN_RANGES && group_of(v);
        Ends e = second ? ends[1] : ends[0];
        if (OFFSET) {
          if (!inside(v)) continue;
          float y[VECTOR];
          values(y, v);
          unsigned bits[VECTOR];
#pragma unroll
          for (int i = 0; i < VECTOR; i++) bits[i] = (unsigned)__float_as_int(y[i]);
          widen_ends(e, bits);
        } else widen_ends(e, own[v]);
        if (second) ends[1] = e;
        else ends[0] = e;
      }
#pragma unroll
      for (int g = 0; g < (OWN_RANGES ? 2 : 1); g++)
        range[2 * g] = magnitude_below(ends[g].below), range[2 * g + 1] = magnitude_above(ends[g].above);
      if (WARPS == 1) return;
#pragma unroll
      for (int i = 0; i < (OWN_RANGES ? 4 : 2); i++) {
        const unsigned most = maximum_of_warp(range[i]);
        if (lane == 0) ranges[4 * warp + i] = most;
      }
      row_meets();
    };
    Spikes spikes[2];
    if constexpr (BY_ONE) {  // the first time of ranges that are not there yet, of which nothing is kept
      int best = 0;
#pragma unroll 1
      for (unsigned here = warp == 0 ? of_rehearsal() : 1u;; here = 1) {
        if (here) find_ranges();
        if (warp == 0) best = find_spikes_of_all<WARPS>(spikes, ranges, tops, 0u - here);
        if (here) break;
      }
      if (thread == best) found[0] = spikes[0], found[1] = spikes[1];
      row_meets();
      spikes[0] = found[0], spikes[1] = found[1];
    } else {
      find_ranges();
      spikes_of_all<WARPS>(spikes, WARPS == 1 ? range : ranges, tops);
    }
    int sum[2] = {0, 0};
    // The same for the whole row: a range near the end of float32, infinite or NaN takes the longer division.
    if (__builtin_expect(are_near(spikes), 1)) {
      const Divider dividers[2] = {divider_of(spikes[0]), divider_of(spikes[1])};
#pragma unroll
      for (int v = 0; v < CHUNKS; v++) {
        if (!inside(v)) continue;
        const int g = group_of(v);
        const Divider d = of_group(dividers, g);
        if (OFFSET && OUT != 0)  // floats again: those of before would take twice the registers
#pragma unroll
          for (int i = 0; i < WORDS; i++) not_before(own[v][i]);
        float y[VECTOR];
        values(y, v);
        unsigned words[VECTOR / 4];
        int total = g ? sum[1] : sum[0];
#pragma unroll
        for (int i = 0; i < VECTOR / 4; i++) words[i] = counts_by<PAIRED>(y + 4 * i, d), total = sum_4(words[i], total);
        if (real) store_words(place_of(count, g, VECTOR * (ROW_THREADS * v + thread)), words);
        if (g) sum[1] = total;
        else sum[0] = total;
      }
    } else if (real) {
      const int2 sums_here = encode_far(x, row * x_stride, offset, count, spikes[0], spikes[1]);
      sum[0] = sums_here.x, sum[1] = sums_here.y;
    }
    const unsigned nothing[VECTOR / 4] = {};
    auto pad = [&](int i, int stop) {
#pragma unroll 1
      for (i += VECTOR * thread; i < stop; i += VECTOR * ROW_THREADS)
        if (real) store_words(count + i, nothing);
    };
    if (START0 + MANY0 < STOP0) pad(START0 + MANY0, STOP0);
    if (GROUPS == 2 && START1 + MANY1 < STOP1) pad(START1 + MANY1, STOP1);
    sum[0] = sum_of_warp(sum[0]);
    if (GROUPS == 2) sum[1] = sum_of_warp(sum[1]);
    if (WARPS > 1) {
      if (lane < 2) sums[2 * warp + lane] = lane ? sum[1] : sum[0];
      row_meets();
    }
    if (thread < GROUPS && real) {
      const Spikes of = of_group(spikes, thread);
      int together = thread ? sum[1] : sum[0];
      if (WARPS > 1) {
        together = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) together += sums[2 * w + thread];
      }
      threshold[row * GROUPS + thread] = of.unit;
      zero_point[row * GROUPS + thread] = (int)(of.zero * of.multiple);
      count_sum[row * GROUPS + thread] = together;
    }
#if EARLY
    if (real) return;
#endif
  }
}
"""

SOURCE = PREAMBLE + PRIMITIVES + SHARED + ENCODING + LANES + INSTRUCTIONS + BODY
