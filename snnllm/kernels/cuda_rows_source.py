"""CUDA C++ of the collapsed linear of few rows: limited by the memory of the weights.

A block of threads owns 32 outputs over the whole of K. Before the counts are there (programmatic
dependent launch) it asks for all its weights to come to the L2 cache and for the first ones to come to
shared memory; the copy engine then keeps a ring of stages filled, each 1024 positions of the weights and of all
rows. Eight warps take a block of 128 positions of every stage each and multiply on the tensor cores
(m16n8k32); their integers are added at the end, in shared memory.

A lane takes 16 packed bytes of a weight row, the positions `16 t ..` and `64 + 16 t ..` of the block,
where the product has other ones: the order of the positions within a sum is free.

Macros: ROWS8 (rows / 8, up), SEGMENTS (1 or 2), SHIFT, BIAS, STAGES, OUT (`cuda_common.OUTPUTS`).
"""

from snnllm.kernels.cuda_common import COMMON

__all__ = ["ROW_THREADS", "SOURCE", "shared_bytes"]

ROW_THREADS = 288
"""Eight warps that multiply, one that copies."""
_WEIGHT_PITCH, _COUNT_PITCH = 576, 1088  # bytes of 1024 positions, and 64 against bank conflicts


def shared_bytes(rows: int, stages: int, segments: int) -> int:
    """Shared memory of a block: the ring, which the partial sums use after it; barriers."""
    ring = stages * (32 * _WEIGHT_PITCH + rows * _COUNT_PITCH)
    sums = 8 * segments * (-(-rows // 8) * 8) * 36 * 4
    return max(ring, sums) + 128


SOURCE = (
    COMMON
    + r"""
extern "C" __global__ void __launch_bounds__(288) linear_rows(
    const unsigned char* count, const unsigned char* weight, const float* threshold,
    const int* zero_point, const int* count_sum, const int* segments, const float* scale,
    const int* weight_zero, const int* row_sum, const int* shift, const float* bias, void* out,
    int rows, int columns, int width, int groups, int weight_groups) {
  constexpr int WP = 576, CP = 1088;
  extern __shared__ __align__(1024) unsigned char memory[];
  const int stage_bytes = 32 * WP + rows * CP;
  const int ring_bytes = STAGES * stage_bytes, sum_bytes = 8 * SEGMENTS * ROWS8 * 8 * 36 * 4;
  const unsigned base = shared_address(memory);
  const unsigned full = base + (ring_bytes > sum_bytes ? ring_bytes : sum_bytes);
  const unsigned empty = full + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int n0 = blockIdx.x * 32, pitch = width / 2;
  const int blocks = width / 128, chunks = (blocks + 7) / 8;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 8);
    }
    barrier_fence();
  }
  __syncthreads();
  launch_dependents();

  if (warp == 8) {  // copies
    const int n = min(n0 + lane, columns - 1);
    const unsigned char* weight_at = weight + (i64)n * pitch;
    const unsigned char* count_at = count + (i64)lane * width;
    auto announce = [&](int c) {
      const int taken = min(8, blocks - 8 * c);
      if (lane == 0)
        barrier_expect(full + 8 * (c % STAGES), taken * (32 * 64 + rows * 128));
      __syncwarp();
      bulk_copy(base + (c % STAGES) * stage_bytes + lane * WP, weight_at + 512 * c, taken * 64,
                full + 8 * (c % STAGES));
    };
    auto copy_counts = [&](int c) {
      if (lane < rows)
        bulk_copy(base + (c % STAGES) * stage_bytes + 32 * WP + lane * CP, count_at + 1024 * c,
                  min(8, blocks - 8 * c) * 128, full + 8 * (c % STAGES));
    };
    const int first = min(STAGES, chunks);
    for (int c = 0; c < first; c++) announce(c);
    if (lane == 0)
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(weight + (i64)n0 * pitch),
                   "r"(min(32, columns - n0) * pitch));
    wait_for_kernel_in_front();
    for (int c = 0; c < first; c++) copy_counts(c);
    for (int c = first; c < chunks; c++) {
      barrier_wait(empty + 8 * (c % STAGES), (c / STAGES - 1) & 1);
      announce(c);
      copy_counts(c);
    }
    return;
  }

  // What the outputs of this thread need, loaded while nothing else is to do.
  const int n = min(n0 + lane, columns - 1);
  int r[SEGMENTS], zu[SEGMENTS], group[SEGMENTS], more[SEGMENTS];
  float sw[SEGMENTS];
#pragma unroll
  for (int s = 0; s < SEGMENTS; s++) {
    group[s] = segments[4 * s + 2];
    const int j = n * weight_groups + segments[4 * s + 3];
    r[s] = row_sum[n * SEGMENTS + s];
    zu[s] = weight_zero[j];
    sw[s] = scale[j];
    more[s] = SHIFT ? shift[n * SEGMENTS + s] : 0;
  }
  const float add = BIAS ? bias[n] : 0.0f;
  const int second = SEGMENTS == 2 ? segments[4] / 128 : blocks;
  wait_for_kernel_in_front();

  const int g = lane / 4, t = lane % 4;
  int acc[SEGMENTS][2][ROWS8][4] = {};
  for (int c = 0; c < chunks; c++) {
    const unsigned stage = base + (c % STAGES) * stage_bytes;
    const int b = 8 * c + warp;
    barrier_wait(full + 8 * (c % STAGES), (c / STAGES) & 1);
    if (b < blocks) {
      uint4 w[2][2], low[ROWS8], high[ROWS8];
#pragma unroll
      for (int i = 0; i < 4; i++)
        w[i / 2][i % 2] = shared_load(stage + (8 * i + g) * WP + warp * 64 + t * 16);
#pragma unroll
      for (int i = 0; i < ROWS8; i++) {
        const unsigned at =
            stage + 32 * WP + min(8 * i + g, rows - 1) * CP + warp * 128 + t * 16;
        low[i] = shared_load(at);
        high[i] = shared_load(at + 64);
      }
      auto multiply = [&](int (&sums)[2][ROWS8][4]) {
#pragma unroll
        for (int strip = 0; strip < 2; strip++)
#pragma unroll
          for (int q = 0; q < 4; q++) {
            const unsigned top = word(w[strip][0], q), bottom = word(w[strip][1], q);
#pragma unroll
            for (int i = 0; i < ROWS8; i++)
              multiply_16x8(sums[strip][i], top & NIBBLES, bottom & NIBBLES, top >> 4 & NIBBLES,
                            bottom >> 4 & NIBBLES, word(low[i], q), word(high[i], q));
          }
      };
      if (b < second) multiply(acc[0]);
      else multiply(acc[SEGMENTS - 1]);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * (c % STAGES));
  }
  named_barrier(1, 256);  // the ring is free
  int* sums = (int*)memory;
  constexpr int SLAB = ROWS8 * 8 * 36;  // [row][36], 32 outputs and 4 words against bank conflicts
#pragma unroll
  for (int s = 0; s < SEGMENTS; s++)
#pragma unroll
    for (int strip = 0; strip < 2; strip++)
#pragma unroll
      for (int i = 0; i < ROWS8; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          sums[(warp * SEGMENTS + s) * SLAB + (8 * i + 2 * t + e % 2) * 36 + 16 * strip +
               8 * (e / 2) + g] = acc[s][strip][i][e];
  named_barrier(1, 256);
#pragma unroll
  for (int i = 0; i < ROWS8; i++) {
    const int m = 8 * i + warp;
    if (m >= rows || n0 + lane >= columns) continue;
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < SEGMENTS; s++) {
      int a = 0;
#pragma unroll
      for (int from = 0; from < 8; from++) a += sums[(from * SEGMENTS + s) * SLAB + m * 36 + lane];
      a = a - zero_point[m * groups + group[s]] * r[s] - zu[s] * count_sum[m * SEGMENTS + s] + more[s];
      if (OUT == INTEGERS) {
        ((int*)out)[((i64)s * rows + m) * columns + n] = a;
        continue;
      }
      const float part = scaled(threshold[m * groups + group[s]], a, sw[s]);
      total = s == 0 ? part : __fadd_rn(total, part);
    }
    if (OUT == INTEGERS) continue;
    if (BIAS) total = __fadd_rn(total, add);
    store(out, (i64)m * columns + n, total);
  }
}
"""
)
