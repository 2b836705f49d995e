"""CUDA C++ that encodes the norm of few rows, which may start before the kernel in front ends.

A block of 256 threads has a row, to which something is added first. A thread has four neighbouring channels of every
1024, so that squares are added as `snnllm.norm` does, and reads them once. The layout is part of the compiled kernel.
The linear behind starts when the row is there: its weights would be in front of it in the queues of the memory.

Macros besides those of `encode_source.ENCODING` and `LAYOUT`: ADDED, GAIN.
"""

from snnllm.kernels.cuda.encode_source import ENCODING, LAYOUT
from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES, SHARED

__all__ = ["BODY", "SHARED_BYTES", "SOURCE", "THREADS"]

THREADS = 256
"""Eight warps."""
SHARED_BYTES = (4 + 2 + THREADS // 32) * 4
"""Shared memory of a block: ranges and sums of the row, squares of its warps."""

BODY = r"""
constexpr int CHUNKS = (CHANNELS + 1023) / 1024, WORDS = OUT == 0 || OFFSET ? 4 : 2;
constexpr bool HALVES = WORDS == 2;       // ranges of words of two channels
constexpr bool KEPT = CHUNKS <= 4;        // gains and offsets wait in registers

// To the type of the row; and the words of that.
INLINE void round_words(unsigned (&w)[WORDS], float (&x)[4]) {
  if constexpr (HALVES) {
    w[0] = pair(x[0], x[1]), w[1] = pair(x[2], x[3]);
    x[0] = low_of(w[0]), x[1] = high_of(w[0]), x[2] = low_of(w[1]), x[3] = high_of(w[1]);
  } else {
    round_four(x);
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = (unsigned)__float_as_int(x[i]);
  }
}

extern "C" __global__ void __launch_bounds__(256) encode_normed(
    const void* x, const void* added, const void* gain, const float* offset, const float* capacity,
    const float* clip, void* stream, unsigned char* count, float* threshold, int* zero_point, int* count_sum,
    float eps, int x_stride, int added_stride) {
  extern __shared__ __align__(128) unsigned char memory[];
  unsigned* ranges = (unsigned*)memory;  // [4], of all warps
  int* sums = (int*)(ranges + 4);        // [2], likewise
  float* squares = (float*)(sums + 2);   // [8], of the warps
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const i64 row = blockIdx.x;
  count += row * POSITIONS;
  auto channel = [&](int v) { return 1024 * v + 4 * thread; };
  auto inside = [&](int v) { return 1024 * (v + 1) <= CHANNELS || channel(v) < CHANNELS; };
  auto group_of = [&](int v) { return group_between(1024 * v, min(1024 * (v + 1), CHANNELS), channel(v)); };
  float own[CHUNKS][4], gains[CHUNKS][4], offsets[CHUNKS][4];
  auto load_constants = [&] {
#pragma unroll
    for (int v = 0; v < CHUNKS; v++) {
      if (!inside(v)) continue;
      if (GAIN) load_four(gains[v], gain, channel(v));
      if (OFFSET) load_floats(offsets[v], offset + channel(v));
    }
  };
  if (KEPT) load_constants();
  if (thread < 6) ranges[thread] = 0;
  const Tops tops = tops_of(capacity, clip);
  REHEARSED(true) {
    if (real) wait_for_kernel_in_front();

    float more[CHUNKS][4];  // read before anything is written: the compiler cannot know that these are other places
#pragma unroll
    for (int v = 0; v < CHUNKS; v++) {
#pragma unroll
      for (int i = 0; i < 4; i++) own[v][i] = more[v][i] = 0.0f;
      if (!inside(v) || !real) continue;
      load_four(own[v], x, row * x_stride + channel(v));
      if (ADDED) load_four(more[v], added, row * added_stride + channel(v));
    }
    unsigned loaded = 0;
#pragma unroll
    for (int v = 0; v < CHUNKS; v++)
      loaded |= (unsigned)__float_as_int(own[v][0]) | (unsigned)__float_as_int(more[v][0]);
    if (real) launch_dependents_behind(loaded);
    float lanes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int v = 0; v < CHUNKS; v++) {
      if (!inside(v)) continue;
      if (ADDED) {
#pragma unroll
        for (int i = 0; i < 4; i++) own[v][i] = __fadd_rn(own[v][i], more[v][i]);
        round_four(own[v]);
        if (real) store_four(stream, row * CHANNELS + channel(v), own[v]);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) lanes[i] = __fadd_rn(lanes[i], __fmul_rn(own[v][i], own[v][i]));
    }
    if (!KEPT) load_constants();
    // In neighbours: lanes, threads, warps.
    float all = __fadd_rn(__fadd_rn(lanes[0], lanes[1]), __fadd_rn(lanes[2], lanes[3]));
#pragma unroll
    for (int step = 1; step < 32; step *= 2) all = __fadd_rn(all, of_partner(all, step));
    if (lane == 0) squares[warp] = all;
    __syncthreads();
    all = squares[lane % 8];
#pragma unroll
    for (int step = 1; step < 8; step *= 2) all = __fadd_rn(all, of_partner(all, step));
    constexpr bool POWER = (CHANNELS & CHANNELS - 1) == 0;  // of two: a product is the quotient
    const float variance = POWER ? __fmul_rn(all, 1.0f / CHANNELS) : __fdiv_rn(all, (float)CHANNELS);
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(variance, eps)));
    Ends ends[2] = {{0, 0}, {0, 0}};
#pragma unroll
    for (int v = 0; v < CHUNKS; v++) {
      if (!inside(v)) continue;
      unsigned words[WORDS];
#pragma unroll
      for (int i = 0; i < 4; i++) own[v][i] = __fmul_rn(own[v][i], scale);
      round_words(words, own[v]);
      if (GAIN) {
#pragma unroll
        for (int i = 0; i < 4; i++) own[v][i] = __fmul_rn(own[v][i], gains[v][i]);
        round_words(words, own[v]);
      }
      if constexpr (OFFSET != 0)
#pragma unroll
        for (int i = 0; i < 4; i++)
          own[v][i] = __fadd_rn(own[v][i], -offsets[v][i]), words[i] = (unsigned)__float_as_int(own[v][i]);
      const bool second = OWN_RANGES && group_of(v);
      Ends e = second ? ends[1] : ends[0];
      widen_ends<HALVES>(e, words);
      if (second) ends[1] = e;
      else ends[0] = e;
    }
    constexpr int RANGES = OWN_RANGES ? 4 : 2;
    unsigned range[4] = {};
#pragma unroll
    for (int g = 0; g < RANGES / 2; g++) take_range<HALVES>(range, g, ends[g]);
    const unsigned one = largest_of_warp<RANGES>(range, lane);
    if (lane < RANGES && real) raise(ranges + lane, one);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < RANGES; i++) range[i] = ranges[i];
    Spikes spikes[2];
    spikes_of_row(spikes, range, tops, capacity, clip);
    int sum[2] = {0, 0};
    auto keep = [&](int v, int g, unsigned word, int total) {
      if (real) *(unsigned*)place_of(count, g, channel(v)) = word;
      if (g) sum[1] = total;
      else sum[0] = total;
    };
    if (__builtin_expect(are_near(spikes), 1)) {
      Divider dividers[2];
      dividers_of(dividers, spikes, tops);
#pragma unroll
      for (int v = 0; v < CHUNKS; v++) {
        if (!inside(v)) continue;
        const int g = group_of(v);
        const unsigned word = counts_by<HALVES>(own[v], of_group(dividers, g));
        keep(v, g, word, sum_4(word, g ? sum[1] : sum[0]));
      }
    } else {
#pragma unroll
      for (int v = 0; v < CHUNKS; v++) {
        if (!inside(v)) continue;
        const int g = group_of(v);
        const int2 both = far_counts_of({own[v][0], own[v][1], own[v][2], own[v][3]}, of_group(spikes, g));
        keep(v, g, (unsigned)both.x, (g ? sum[1] : sum[0]) + both.y);
      }
    }
    pad<4, 256>([&](int i) {
      if (real) *(unsigned*)(count + i) = 0;
    });
    sum[0] = sum_of_warp(sum[0]);
    if (GROUPS == 2) sum[1] = sum_of_warp(sum[1]);
    if (lane < GROUPS && real) add_to(sums + lane, lane ? sum[1] : sum[0]);
    __syncthreads();
    if (thread < GROUPS && real) {
      const Spikes of = of_group(spikes, thread);
      threshold[row * GROUPS + thread] = of.unit;
      zero_point[row * GROUPS + thread] = (int)(of.zero * of.multiple);
      count_sum[row * GROUPS + thread] = sums[thread];
    }
    if (real) return;
  }
}
"""

SOURCE = PREAMBLE + PRIMITIVES + SHARED + ENCODING + LAYOUT + BODY
