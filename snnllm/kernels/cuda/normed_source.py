"""CUDA C++ that encodes the norm of few rows, which may start before the kernel in front ends.

A block of 256 threads has a row, to which something is added first. A thread has four neighbouring channels of every
1024, so that squares are added as `snnllm.norm` does, and reads them once. Macros besides those of
`encode_source.ENCODING`: CHUNKS (channels / 1024, up), ADDED, GAIN.
"""

from snnllm.kernels.cuda.encode_source import ENCODING
from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES, SHARED

__all__ = ["BODY", "SHARED_BYTES", "SOURCE", "THREADS"]

THREADS = 256
"""Eight warps."""
SHARED_BYTES = THREADS // 32 * (4 + 2 + 1) * 4
"""Shared memory of a block: ranges, sums and squares of its warps."""

BODY = r"""
extern "C" __global__ void __launch_bounds__(256) encode_normed(
    const void* x, const void* added, const void* gain, const float* offset, const float* capacity,
    const float* clip, void* stream, unsigned char* count, float* threshold, int* zero_point, int* count_sum,
    float eps, int x_stride, int added_stride, int channels, int positions, int start0, int stop0, int many0,
    int first0, int start1, int stop1, int many1, int first1) {
  constexpr bool KEPT = CHUNKS <= 4;  // gains and offsets wait in registers
  extern __shared__ __align__(128) unsigned char memory[];
  unsigned* ranges = (unsigned*)memory;     // [8][4], of the warps
  int* sums = (int*)(ranges + 8 * 4);       // [8][2]
  float* squares = (float*)(sums + 8 * 2);  // [8]
  launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const i64 row = blockIdx.x;
  const Run runs[2] = {{start0, stop0, many0, first0}, {start1, stop1, many1, first1}};
  count += row * positions;
  auto channel = [&](int v) { return 1024 * v + 4 * (int)threadIdx.x; };
  auto group_of = [&](int c) { return GROUPS == 2 && c >= first1 && c < first1 + many1; };
  float own[CHUNKS][4], gains[CHUNKS][4], offsets[CHUNKS][4];
  auto load_constants = [&] {
#pragma unroll
    for (int v = 0; v < CHUNKS; v++) {
      if (channel(v) >= channels) continue;
      if (GAIN) load_four(gains[v], gain, channel(v));
      if (OFFSET) load_floats(offsets[v], offset + channel(v));
    }
  };
  if (KEPT) load_constants();
  const Tops tops = tops_of(capacity, clip);
  REHEARSED(true) {
    if (real) wait_for_kernel_in_front();

    float more[CHUNKS][4];  // read before anything is written: the compiler cannot know that these are other places
#pragma unroll
    for (int v = 0; v < CHUNKS; v++) {
#pragma unroll
      for (int i = 0; i < 4; i++) own[v][i] = more[v][i] = 0.0f;
      if (channel(v) >= channels || !real) continue;
      load_four(own[v], x, row * x_stride + channel(v));
      if (ADDED) load_four(more[v], added, row * added_stride + channel(v));
    }
    float lanes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int v = 0; v < CHUNKS; v++) {
      if (channel(v) >= channels) continue;
      if (ADDED) {
#pragma unroll
        for (int i = 0; i < 4; i++) own[v][i] = __fadd_rn(own[v][i], more[v][i]);
        round_four(own[v]);
        if (real) store_four(stream, row * channels + channel(v), own[v]);
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
    const float variance = __fdiv_rn(all, __int2float_rn(channels));
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(variance, eps)));
    unsigned range[4] = {0, 0, 0, 0};
#pragma unroll
    for (int v = 0; v < CHUNKS; v++) {
      if (channel(v) >= channels) continue;
#pragma unroll
      for (int i = 0; i < 4; i++) own[v][i] = __fmul_rn(own[v][i], scale);
      round_four(own[v]);
      if (GAIN) {
#pragma unroll
        for (int i = 0; i < 4; i++) own[v][i] = __fmul_rn(own[v][i], gains[v][i]);
        round_four(own[v]);
      }
      if (OFFSET)
#pragma unroll
        for (int i = 0; i < 4; i++) own[v][i] = __fadd_rn(own[v][i], -offsets[v][i]);
      widen(range, own[v], group_of(channel(v)));
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < 2 || OWN_RANGES) {
        range[i] = maximum_of_warp(range[i]);
        if (lane == 0) ranges[4 * warp + i] = range[i];
      }
    __syncthreads();
    Spikes spikes[2];
    spikes_of_all<8>(spikes, ranges, tops, capacity, clip);
    int sum[2] = {0, 0};
    auto keep = [&](int v, int g, unsigned word) {
      const Run run = g ? runs[1] : runs[0];
      if (real) *(unsigned*)(count + run.start + channel(v) - run.first) = word;
    };
    if (__builtin_expect(are_near(spikes), 1)) {
      Divider dividers[2];
      dividers_of(dividers, spikes, tops);
#pragma unroll
      for (int v = 0; v < CHUNKS; v++) {
        if (channel(v) >= channels) continue;
        const int g = group_of(channel(v));
        const unsigned word = counts_by<OUT != 0 && !OFFSET>(own[v], of_group(dividers, g));
        keep(v, g, word);
        const int total = sum_4(word, g ? sum[1] : sum[0]);
        if (g) sum[1] = total;
        else sum[0] = total;
      }
    } else {
#pragma unroll
      for (int v = 0; v < CHUNKS; v++) {
        if (channel(v) >= channels) continue;
        const int g = group_of(channel(v));
        const int2 both = far_counts_of({own[v][0], own[v][1], own[v][2], own[v][3]}, of_group(spikes, g));
        keep(v, g, (unsigned)both.x);
        if (g) sum[1] += both.y;
        else sum[0] += both.y;
      }
    }
    for (int g = 0; g < GROUPS; g++)
#pragma unroll 1
      for (int i = runs[g].start + runs[g].many + threadIdx.x; i < runs[g].stop && real; i += 256) count[i] = 0;
    sum[0] = sum_of_warp(sum[0]), sum[1] = sum_of_warp(sum[1]);
    if (lane < 2) sums[2 * warp + lane] = lane ? sum[1] : sum[0];
    __syncthreads();
    if (threadIdx.x < GROUPS && real) {
      const Spikes of = of_group(spikes, threadIdx.x);
      int together = 0;
#pragma unroll
      for (int w = 0; w < 8; w++) together += sums[2 * w + threadIdx.x];
      threshold[row * GROUPS + threadIdx.x] = of.unit;
      zero_point[row * GROUPS + threadIdx.x] = (int)(of.zero * of.multiple);
      count_sum[row * GROUPS + threadIdx.x] = together;
    }
    if (real) return;
  }
}
"""

SOURCE = PREAMBLE + PRIMITIVES + SHARED + ENCODING + BODY
