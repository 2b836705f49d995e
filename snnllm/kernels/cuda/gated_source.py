"""CUDA C++ that encodes few rows of `silu(gate) * up`, which may start before the kernel in front ends.

A cluster of CLUSTER blocks of threads has a row, rotated in Hadamard blocks, each a power of two from 16 to 256 that
begins at a multiple of its size; one block of threads would take twice the time. A thread has 16 neighbouring
channels; it mixes them in registers, and the threads of a Hadamard block then exchange theirs through shared memory.
The rotation is that of `snnllm.hadamard.OnlineRotation`, operation by operation. Macros besides those of
`encode_source.ENCODING`: THREADS (a multiple of 32), CLUSTER (up to 8).
"""

from snnllm.kernels.cuda.encode_source import ENCODING
from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES, SHARED

__all__ = ["BODY", "SOURCE", "shared_bytes"]


def shared_bytes(threads: int) -> int:
    """Shared memory of a block of threads: channels on their way, maxima of warps and blocks, sums."""
    return 4 * (17 * threads + 4 * (threads // 32) + 2 * 4 * 8)


BODY = r"""
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
  Ends ends = {0, 0};  // of the one group of this thread
#pragma unroll
  for (int v = 0; v < 4; v++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      parts[v][i] = inside ? __fmul_rn(x[4 * v + i], root) : 0.0f;
      if (OFFSET && inside) parts[v][i] = __fadd_rn(parts[v][i], -off[v][i]);
    }
    unsigned bits[4];
#pragma unroll
    for (int i = 0; i < 4; i++) bits[i] = (unsigned)__float_as_int(parts[v][i]);
    widen_ends<false>(ends, bits);
  }
  unsigned range[4] = {};
  if (OWN_RANGES && group) take_range<false>(range, 1, ends);
  else take_range<false>(range, 0, ends);
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < 2 || OWN_RANGES) {
      range[i] = maximum_of_warp(range[i]);
      if (lane == 0) of_warps[4 * warp + i] = range[i];
    }
  __syncthreads();
  if (threadIdx.x < 4 * CLUSTER && (threadIdx.x % 4 < 2 || OWN_RANGES)) {
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
  unsigned all[4] = {};
#pragma unroll
  for (int i = 0; i < (OWN_RANGES ? 4 : 2); i++) all[i] = maximum_of_warp(of_blocks[threadIdx.x % CLUSTER * 4 + i]);
  spikes_of_row(spikes, all, tops, capacity, clip);
  const Spikes mine = of_group(spikes, group);
  int sum[2] = {0, 0}, total = 0;
  unsigned words[4];
  if (__builtin_expect(are_near(spikes), 1)) {
    const Divider divider = divider_of(mine, group ? tops.halves[1] : tops.halves[0]);
#pragma unroll
    for (int v = 0; v < 4; v++) words[v] = counts_by<false>(parts[v], divider), total = sum_4(words[v], total);
  } else {
#pragma unroll
    for (int v = 0; v < 4; v++) {
      const int2 both = far_counts_of({parts[v][0], parts[v][1], parts[v][2], parts[v][3]}, mine);
      words[v] = (unsigned)both.x, total += both.y;
    }
  }
  if (inside) {
    *(uint4*)(count + row * positions + run.start + c - run.first) = {words[0], words[1], words[2], words[3]};
    sum[group] = total;
  }
  if (rank == 0) {
    for (int g = 0; g < GROUPS; g++)
      for (int i = runs[g].start + runs[g].many + threadIdx.x; i < runs[g].stop; i += THREADS)
        count[row * positions + i] = 0;
    if (threadIdx.x < GROUPS) {
      const Spikes of = of_group(spikes, threadIdx.x);
      threshold[row * GROUPS + threadIdx.x] = of.unit;
      zero_point[row * GROUPS + threadIdx.x] = (int)(of.zero * of.multiple);
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
    int together = 0;
#pragma unroll
    for (int of = 0; of < CLUSTER; of++) together += sums[2 * of + threadIdx.x];
    count_sum[row * GROUPS + threadIdx.x] = together;
  }
}
"""

SOURCE = PREAMBLE + PRIMITIVES + SHARED + ENCODING + BODY
