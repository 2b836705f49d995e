"""CUDA C++ that encodes rows as they are, few or many.

A row has a block of ROW_THREADS threads. A thread has VECTOR neighbouring channels of every ROW_THREADS * VECTOR, and
holds them as they come. The layout is part of the compiled kernel: the group of most vectors is known then. Where a
thread has one vector, it makes what a count needs for its own group only.

Where rows are not few, instructions are waited for: of more than four warps, one makes the parameters for all. Blocks
that start beside the linear in front (REHEARSING) go through all of their work before the row is there; elsewhere that
warp rehearses its part while the row comes. What rows of extreme ranges need is a function of its own (`encode_far`),
out of the way.

A quotient costs two instructions where x has at most 11 bits: an inverse of two floats, `inverse + rest`, makes it
right to 2^-47. It decides every count as the rounded quotient does, which was tried for all x, zero points and counts
at the thresholds next to each border (`tests/snnllm/test_cuda_plain.py`). Other x take a Newton step more, from a
faithful quotient (Markstein 1990). Counts are in 1/256, so that the instruction that adds the bias also clips.

Macros besides those of `encode_source.ENCODING` and `LAYOUT`: ROW_THREADS, RESIDENT (blocks on a multiprocessor, at
least), VECTOR (4, 8 or 16), FEW (rows), REHEARSING (so many first blocks go through their work twice).
"""

from snnllm.kernels.cuda.encode_source import ENCODING, LAYOUT
from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES, SHARED

__all__ = ["BODY", "SHARED_BYTES", "SOURCE"]

SHARED_BYTES = 32 + 64
"""Shared memory of a block: ranges and sums of a row, its parameters."""

BODY = r"""
// Words of two channels are compared as they come, else floats.
#define PAIRED (OUT != 0 && !OFFSET)
constexpr int WORDS = OUT == 0 ? VECTOR : VECTOR / 2, VECTORS = CHANNELS / VECTOR, WARPS = ROW_THREADS / 32;
constexpr int CHUNKS = (VECTORS + ROW_THREADS - 1) / ROW_THREADS;
constexpr bool BY_ONE = WARPS > 4 && !FEW;  // elsewhere it is not faster
// The channels of a thread, and those of a warp, are of one group.
constexpr bool OF_ONE = GROUPS == 2 && CHUNKS == 1 && MANY0 > 0 && MANY1 > 0;
constexpr bool starts_warp(int channel) { return channel % (32 * VECTOR) == 0 || channel == CHANNELS; }
constexpr bool WARP_OF_ONE = OF_ONE && OWN_RANGES && WARPS > 1 && starts_warp(FIRST1) && starts_warp(FIRST1 + MANY1);
// What a thread makes for all. `most` of the dividers is 0 where a threshold is not near.
struct __align__(16) Found { Divider dividers[2]; float unit[2]; int zero_point[2]; };
static_assert(sizeof(Found) == 64, "SHARED_BYTES");
INLINE void give_parameters(Found* found, int g, const Spikes& s) {
  found->unit[g] = s.unit, found->zero_point[g] = (int)(s.zero * s.multiple);
}

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
INLINE void store_words(unsigned char* to, const unsigned (&w)[VECTOR / 4]) {
  if constexpr (VECTOR == 16) *(uint4*)to = {w[0], w[1], w[2], w[3]};
  else if constexpr (VECTOR == 8) *(uint2*)to = {w[0], w[1]};
  else *(unsigned*)to = w[0];
}
INLINE void row_meets() {
  if (ROW_THREADS == 32) __syncwarp();
  else __syncthreads();
}

// The parameters and counts of a row by divisions for all ranges, and the sums of counts in a thread. Not inlined:
// instructions that are not run are not to lie between those that are.
__noinline__ __device__ int2 encode_far(const void* x, i64 at, const float* offset, const float* capacity,
                                        const float* clip, uint4 ranges, unsigned char* count, Found* found) {
  const Both both = far_spikes_of(ranges, capacity, clip);
  const Spikes spikes[2] = {both.of[0], both.of[1]};
  if (threadIdx.x < GROUPS) give_parameters(found, threadIdx.x, of_group(spikes, threadIdx.x));
  int sum[2] = {0, 0};
#pragma unroll 1
  for (int i = 0; i < CHUNKS * VECTOR; i += 4) {
    const int c = (i / VECTOR * ROW_THREADS + threadIdx.x) * VECTOR + i % VECTOR;
    if (c >= CHANNELS) break;
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
  unsigned* ranges = (unsigned*)memory;  // [4], of all warps
  int* sums = (int*)(ranges + 4);        // [2], likewise
  Found* found = (Found*)(sums + 4);
  launch_dependents();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  // Kept where time counts: else it is asked for again and again.
  const i64 row = FEW || REHEARSING ? of_lane(blockIdx.x, 0) : blockIdx.x;
  const char* from = (const char*)x + (row * x_stride + VECTOR * thread) * (OUT == 0 ? 4 : 2);
  count += row * POSITIONS;
  auto inside = [&](int v) { return ROW_THREADS * (v + 1) <= VECTORS || ROW_THREADS * v + thread < VECTORS; };
  auto group_of = [&](int v) {
    const int low = ROW_THREADS * VECTOR * v, high = min(low + ROW_THREADS * VECTOR, CHANNELS);
    return group_between(low, high, min(low + VECTOR * thread, CHANNELS - VECTOR));  // beyond the end as at it
  };
  const int group = OF_ONE ? group_of(0) : 0;
  const Tops tops = tops_of(capacity, clip);
  if (WARPS > 1) {
    if (thread < 6) ranges[thread] = 0;
    row_meets();
  }
#if REHEARSING
  REHEARSED(blockIdx.x < REHEARSING)
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
    constexpr int RANGES = OWN_RANGES && !WARP_OF_ONE ? 4 : 2;  // of a warp
    unsigned range[4] = {};
    auto find_ranges = [&]() {  // in `range` where a warp has a row, else in `ranges`
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
          widen_ends<PAIRED>(e, bits);
        } else widen_ends<PAIRED>(e, own[v]);
        if (second) ends[1] = e;
        else ends[0] = e;
      }
      if (WARP_OF_ONE && group) ends[0] = ends[1];
#pragma unroll
      for (int g = 0; g < RANGES / 2; g++) take_range<PAIRED>(range, g, ends[g]);
      const unsigned one = largest_of_warp<RANGES>(range, lane);
      if (WARPS == 1) return;
      if (lane < RANGES && real) raise(ranges + (WARP_OF_ONE && group ? 2 : 0) + lane, one);
      row_meets();
    };
    Spikes spikes[2];
    Divider dividers[2];
    auto find_parameters = [&](unsigned known) {  // those of the lane that is returned
      if (WARPS > 1)
#pragma unroll
        for (int i = 0; i < 4; i++) range[i] = ranges[i] & known;
      const Reach reach = reach_of(range, tops);
      float threshold[2];
      const bool near = find_thresholds(threshold, reach, tops);
      const unsigned rank = find_near_spikes(spikes, reach.below, threshold, tops);
      bool far = !near || !are_near(spikes);
      if (BY_ONE) dividers_of(dividers, spikes, tops);
      const int best = lane_of(rank);
      if (!BY_ONE && GRID) far = any_of_warp(far && lane == best);
      if (!BY_ONE && OF_ONE) {
        if (GRID && !WARP_OF_ONE) take_from(spikes, best);
        spikes[0] = of_group(spikes, group);
        if (GRID && WARP_OF_ONE) take_from(spikes[0], best);
        dividers[0] = divider_of(spikes[0], group ? tops.halves[1] : tops.halves[0]);
      } else if (!BY_ONE) {
        if (GRID) take_from(spikes, best);
        dividers_of(dividers, spikes, tops);
      }
      if (far) dividers[0].most = dividers[1].most = 0;
      return best;
    };
    if constexpr (BY_ONE) {
      int best = 0;
      // The first time of ranges that are not there yet, of which nothing is kept.
#pragma unroll 1
      for (unsigned here = REHEARSING || warp > 0 ? 1u : of_rehearsal();; here = 1) {
        if (here) find_ranges();
        if (warp == 0) best = find_parameters(0u - here);
        if (here) break;
      }
      if (thread == best)
#pragma unroll
        for (int g = 0; g < GROUPS; g++) found->dividers[g] = dividers[g], give_parameters(found, g, spikes[g]);
      row_meets();
      if (OF_ONE) dividers[0] = found->dividers[group];
      else dividers[0] = found->dividers[0], dividers[1] = found->dividers[GROUPS - 1];
    } else {
      find_ranges();
      find_parameters(~0u);
      const bool first = OF_ONE && VECTOR * thread == (group ? FIRST1 : FIRST0);
      if (first && dividers[0].most != 0) give_parameters(found, group, spikes[0]);  // `encode_far` gives others
      if (!OF_ONE && thread < GROUPS) give_parameters(found, thread, of_group(spikes, thread));
    }
    int sum[2] = {0, 0};
    // The same for the whole row: a range near the end of float32, infinite or NaN takes the longer division.
    if (__builtin_expect(dividers[0].most != 0, 1)) {
#pragma unroll
      for (int v = 0; v < CHUNKS; v++) {
        if (!inside(v)) continue;
        const int g = group_of(v);
        const Divider d = of_group(dividers, g && !OF_ONE);
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
      if (WARPS > 1)
#pragma unroll
        for (int i = 0; i < 4; i++) range[i] = ranges[i];
      const uint4 all = {range[0], range[1], range[2], range[3]};
      const int2 sums_here = encode_far(x, row * x_stride, offset, capacity, clip, all, count, found);
      sum[0] = sums_here.x, sum[1] = sums_here.y;
    }
    const unsigned nothing[VECTOR / 4] = {};
    pad<VECTOR, ROW_THREADS>([&](int i) {
      if (real) store_words(count + i, nothing);
    });
    if (WARP_OF_ONE) {
      sum[0] = sum_of_warp(sum[0] + sum[1]);  // one of them is 0
      if (lane == 0 && real) add_to(sums + group, sum[0]);
    } else {
      sum[0] = sum_of_warp(sum[0]);
      if (GROUPS == 2) sum[1] = sum_of_warp(sum[1]);
      if (WARPS > 1 && lane < GROUPS && real) add_to(sums + lane, lane ? sum[1] : sum[0]);
    }
    row_meets();
    if (thread < GROUPS && real) {
      const i64 at = row * GROUPS + thread;
      threshold[at] = found->unit[thread], zero_point[at] = found->zero_point[thread];
      count_sum[at] = WARPS > 1 ? sums[thread] : thread ? sum[1] : sum[0];
    }
#if REHEARSING
    if (real) return;
#endif
  }
}
"""

SOURCE = PREAMBLE + PRIMITIVES + SHARED + ENCODING + LAYOUT + BODY
