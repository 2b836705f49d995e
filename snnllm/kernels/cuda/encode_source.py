"""CUDA C++ that encodes few rows, which may start before the kernel in front ends.

The integers are those of `neurons.backends.triton_encode`, the norm that of `snnllm.norm`, the rotation that of
`snnllm.hadamard.OnlineRotation`, operation by operation. A row has one or two groups of neighbouring channels
(`neurons.backends.triton_encode_tiles.runs_of`). `ENCODING` has the steps of an encoder. Macros: GROUPS (1 or 2),
ONE_RANGE (of both groups), OFFSET, OUT (dtype of the row).

`GATED`: a cluster of CLUSTER blocks of threads encodes a row of `silu(gate) * up`, rotated in Hadamard blocks, each a
power of two from 16 to 256 that begins at a multiple of its size; one block of threads would take twice the time. A
thread has 16 neighbouring channels; it mixes them in registers, and the threads of a Hadamard block then exchange
theirs through shared memory. Macros besides: THREADS (a multiple of 32), CLUSTER (up to 8).

`NORMED`: a block of 256 threads encodes the norm of a row, to which something is added first. A thread has four
neighbouring channels of every 1024, so that squares are added as `snnllm.norm` does, and reads them once. Macros
besides: CHUNKS (channels / 1024, up), ADDED, GAIN.
"""

from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES, SHARED

__all__ = [
    "ENCODING",
    "GATED",
    "GATED_SOURCE",
    "NORMED",
    "NORMED_SOURCE",
    "NORMED_THREADS",
    "gated_shared_bytes",
    "normed_shared_bytes",
]

NORMED_THREADS = 256
"""Eight warps."""


def gated_shared_bytes(threads: int) -> int:
    """Shared memory of a block of threads: channels on their way, maxima of warps and blocks, sums."""
    return 4 * (17 * threads + 4 * (threads // 32) + 2 * 4 * 8)


def normed_shared_bytes() -> int:
    """Shared memory of a block of threads: ranges, sums and squares of its warps."""
    return 4 * NORMED_THREADS // 32 * (4 + 2 + 1)


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

GATED = r"""
// One level of butterflies among 16 numbers.
template <int H> INLINE void butterflies(float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < 16; i++)
    if (!(i & H)) {
      const float a = x[i], b = x[i + H];
      x[i] = __fadd_rn(a, b), x[i + H] = __fadd_rn(a, -b);
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS) encode_gated(
    const void* gate, const void* up, const float* offset, const float* capacity, const float* clip,
    unsigned char* count, float* threshold, int* zero_point, int* count_sum, int gate_stride, int up_stride,
    int channels, int positions, int start0, int stop0, int many0, int first0, int start1, int stop1, int many1,
    int first1) {
  constexpr int WARPS = THREADS / 32;
  extern __shared__ __align__(128) unsigned char memory[];
  float* mixed = (float*)memory;                        // [THREADS][17]
  unsigned* of_warps = (unsigned*)(mixed + 17 * THREADS);  // [WARPS][4]
  unsigned* of_blocks = of_warps + 4 * WARPS;              // [8][4]
  int* sums = (int*)(of_blocks + 4 * 8);                   // [8][2], and room
  launch_dependents();
  if (CLUSTER > 1) cluster_arrives();  // who writes to another block waits until it is there
  const int rank = blockIdx.x % CLUSTER, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const i64 row = blockIdx.x / CLUSTER;
  const Run runs[2] = {{start0, stop0, many0, first0}, {start1, stop1, many1, first1}};
  const int c = 16 * (rank * THREADS + threadIdx.x);
  const bool inside = c < channels;
  const int group = GROUPS == 2 && c >= first1 && c < first1 + many1;
  const Run run = runs[group];
  // The block of the rotation: its size, and which 16 of it are here.
  int size = 256, base = (c - run.first) / 256 * 256;
  if (base + 256 > run.many)
    for (size = 128; size > 16; size /= 2) {
      if (!(run.many & size)) continue;
      if (c - run.first < base + size) break;
      base += size;
    }
  const int tiles = inside ? size / 16 : 1, own = inside ? (c - run.first - base) / 16 : 0;
  float off[4][4], x[16];
#pragma unroll
  for (int v = 0; v < 4; v++)
    if (OFFSET && inside) load_floats(off[v], offset + c + 4 * v);
  const Tops tops = tops_of(capacity, clip);
  if (CLUSTER > 1) cluster_waits();
  wait_for_kernel_in_front();

#pragma unroll
  for (int v = 0; v < 4; v++) {
    float g[4] = {}, u[4] = {};
    if (inside) {
      load_four(g, gate, row * gate_stride + c + 4 * v);
      load_four(u, up, row * up_stride + c + 4 * v);
    }
    float silu[4];
#pragma unroll
    for (int i = 0; i < 4; i++) silu[i] = __fmul_rn(g[i], sigmoid(g[i]));
    round_four(silu);
#pragma unroll
    for (int i = 0; i < 4; i++) silu[i] = __fmul_rn(silu[i], u[i]);
    round_four(silu);
#pragma unroll
    for (int i = 0; i < 4; i++) x[4 * v + i] = silu[i];
  }
  butterflies<1>(x), butterflies<2>(x), butterflies<4>(x), butterflies<8>(x);
  // Number j of the own-th 16 of a block goes to j tiles + own.
  const int block = 16 * (threadIdx.x - own);
#pragma unroll
  for (int j = 0; j < 16; j++) {
    const int to = block + j * tiles + own;
    mixed[to + to / 16] = x[j];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 16; j++) x[j] = mixed[17 * threadIdx.x + j];
  if (tiles > 1) butterflies<1>(x);
  if (tiles > 2) butterflies<2>(x);
  if (tiles > 4) butterflies<4>(x);
  if (tiles > 8) butterflies<8>(x);
  const float root = size == 256 ? 0.0625f : size == 128 ? 0.08838834764831845f : size == 64 ? 0.125f
                   : size == 32 ? 0.1767766952966369f : 0.25f;
  float parts[4][4];
  unsigned range[4] = {0, 0, 0, 0};
#pragma unroll
  for (int v = 0; v < 4; v++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      parts[v][i] = inside ? __fmul_rn(x[4 * v + i], root) : 0.0f;
      if (OFFSET && inside) parts[v][i] = __fadd_rn(parts[v][i], -off[v][i]);
    }
    widen(range, parts[v], group);
  }
  const bool two = GROUPS == 2 && !ONE_RANGE;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < 2 || two) {
      range[i] = maximum_of_warp(range[i]);
      if (lane == 0) of_warps[4 * warp + i] = range[i];
    }
  __syncthreads();
  if (threadIdx.x < 4 * CLUSTER && (threadIdx.x % 4 < 2 || two)) {
    const int i = threadIdx.x % 4;
    unsigned most = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) most = max(most, of_warps[4 * w + i]);
    if (CLUSTER > 1) to_block((int*)of_blocks + 4 * rank + i, threadIdx.x / 4, most);
    else of_blocks[i] = most;
  }
  if (CLUSTER > 1) cluster_arrives(), cluster_waits();
  else __syncthreads();
  Spikes spikes[2];
  spikes_of_all<CLUSTER>(spikes, of_blocks, tops);
  const Spikes mine = group ? spikes[1] : spikes[0];
  const float inverse = __fdiv_rn(1.0f, mine.threshold);
  int sum[2] = {0, 0}, total = 0;
  uint4 words;
  words.x = counts_of(parts[0], mine, inverse, total);
  words.y = counts_of(parts[1], mine, inverse, total);
  words.z = counts_of(parts[2], mine, inverse, total);
  words.w = counts_of(parts[3], mine, inverse, total);
  if (inside) {
    *(uint4*)(count + row * positions + run.start + c - run.first) = words;
    sum[group] = total;
  }
  if (rank == 0) {
    for (int g = 0; g < GROUPS; g++)
      for (int i = runs[g].start + runs[g].many + threadIdx.x; i < runs[g].stop; i += THREADS)
        count[row * positions + i] = 0;
    if (threadIdx.x < GROUPS) {
      const Spikes of = threadIdx.x ? spikes[1] : spikes[0];
      threshold[row * GROUPS + threadIdx.x] = of.threshold;
      zero_point[row * GROUPS + threadIdx.x] = (int)of.zero;
    }
  }
  // Sums of warps, in the place of their ranges; then those of the blocks, in the first one.
#pragma unroll
  for (int g = 0; g < 2; g++) {
    sum[g] = sum_of_warp(sum[g]);
    if (lane == 0) of_warps[4 * warp + g] = sum[g];
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    int all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) all += of_warps[4 * w + threadIdx.x];
    if (CLUSTER > 1) to_block(sums + 2 * rank + threadIdx.x, 0, all);
    else sums[threadIdx.x] = all;
  }
  if (CLUSTER > 1) cluster_arrives();
  if (rank != 0) return;  // nobody writes to this block from here on
  if (CLUSTER > 1) cluster_waits();
  if (threadIdx.x < GROUPS) {
    int all = 0;
#pragma unroll
    for (int of = 0; of < CLUSTER; of++) all += sums[2 * of + threadIdx.x];
    count_sum[row * GROUPS + threadIdx.x] = all;
  }
}
"""

NORMED = r"""
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
  wait_for_kernel_in_front();

#pragma unroll
  for (int v = 0; v < CHUNKS; v++) {
#pragma unroll
    for (int i = 0; i < 4; i++) own[v][i] = 0.0f;
    if (channel(v) < channels) load_four(own[v], x, row * x_stride + channel(v));
  }
  float lanes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int v = 0; v < CHUNKS; v++) {
    if (channel(v) >= channels) continue;
    if (ADDED) {
      float more[4];
      load_four(more, added, row * added_stride + channel(v));
#pragma unroll
      for (int i = 0; i < 4; i++) own[v][i] = __fadd_rn(own[v][i], more[i]);
      round_four(own[v]);
      store_four(stream, row * channels + channel(v), own[v]);
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
    if (i < 2 || (GROUPS == 2 && !ONE_RANGE)) {
      range[i] = maximum_of_warp(range[i]);
      if (lane == 0) ranges[4 * warp + i] = range[i];
    }
  __syncthreads();
  Spikes spikes[2];
  spikes_of_all<8>(spikes, ranges, tops);
  const float inverses[2] = {__fdiv_rn(1.0f, spikes[0].threshold), __fdiv_rn(1.0f, spikes[1].threshold)};
  int sum[2] = {0, 0};
#pragma unroll
  for (int v = 0; v < CHUNKS; v++) {
    if (channel(v) >= channels) continue;
    const int g = group_of(channel(v));
    const Run run = g ? runs[1] : runs[0];
    int total = 0;
    *(unsigned*)(count + run.start + channel(v) - run.first) =
        counts_of(own[v], g ? spikes[1] : spikes[0], g ? inverses[1] : inverses[0], total);
    if (g) sum[1] += total;
    else sum[0] += total;
  }
  for (int g = 0; g < GROUPS; g++)
    for (int i = runs[g].start + runs[g].many + threadIdx.x; i < runs[g].stop; i += 256) count[i] = 0;
  sum[0] = sum_of_warp(sum[0]), sum[1] = sum_of_warp(sum[1]);
  if (lane < 2) sums[2 * warp + lane] = lane ? sum[1] : sum[0];
  __syncthreads();
  if (threadIdx.x < GROUPS) {
    const Spikes of = threadIdx.x ? spikes[1] : spikes[0];
    int together = 0;
#pragma unroll
    for (int w = 0; w < 8; w++) together += sums[2 * w + threadIdx.x];
    threshold[row * GROUPS + threadIdx.x] = of.threshold;
    zero_point[row * GROUPS + threadIdx.x] = (int)of.zero;
    count_sum[row * GROUPS + threadIdx.x] = together;
  }
}
"""

GATED_SOURCE = PREAMBLE + PRIMITIVES + SHARED + ENCODING + GATED
NORMED_SOURCE = PREAMBLE + PRIMITIVES + SHARED + ENCODING + NORMED
