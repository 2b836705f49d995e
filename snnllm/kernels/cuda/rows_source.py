"""CUDA C++ of the collapsed linear of few rows: limited by the memory of the weights.

A block of threads owns 16 STRIPS outputs over the whole of K; each of its eight warps takes every eighth block of
128 positions, keeps a ring of STAGES of them in shared memory filled by copies that it asks for,
and multiplies on the tensor cores (m16n8k32). The integers of the warps are added at the end, in shared
memory. The weights of all stages are on their way before the counts are there (programmatic dependent
launch), and when its own have arrived it asks for what the linears behind it read first: the memory would
be idle while the kernels between two linears run. Where a multiprocessor has one block, these first weights come by
the copy engine: copies of threads would be in the way of what the encoder in front reads and shares there. The next
ones come by threads, which is faster.

A lane takes 16 packed bytes of a weight row, the positions `16 t ..` and `64 + 16 t ..` of the block,
where the product has other ones: the order of the positions within a sum is free.

Macros: ROWS8 (rows / 8, up), STRIPS, SEGMENTS (1 or 2), MERGED (one sum for both), BIAS, RESIDUAL, STAGES, RESIDENT
(blocks of threads of a multiprocessor, for which registers are set aside), OUT (`primitives.OUTPUTS`).
"""

from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES, SHARED

__all__ = ["BODY", "ROW_THREADS", "SOURCE", "shared_bytes"]

ROW_THREADS = 256
"""Eight warps."""


def shared_bytes(
    rows8: int, strips: int, stages: int, segments: int, merged: int, residual: int
) -> int:
    """Shared memory of a block: the rings, where the partial sums lie after them; tables.

    Args:
        rows8: As the macro; likewise the next ones.
        strips: Likewise.
        stages: Likewise.
        segments: Likewise.
        merged: Likewise.
        residual: Bytes of an element of the residual; 0 without one.
    """
    rings = 8 * stages * (strips * 1024 + rows8 * 1024)
    sums = 8 * (segments - merged) * rows8 * 8 * (16 * strips + 4) * 4
    tables = 4 * (16 * strips + segments * (3 * 16 * strips + 3 * rows8 * 8)) + 8 * 8 * stages
    return max(rings, sums) + tables + 16 * strips * 8 * rows8 * residual


BODY = r"""
INLINE unsigned word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

extern "C" __global__ void __launch_bounds__(256, RESIDENT) linear_rows(
    const unsigned char* count, const unsigned char* weight, const __grid_constant__ Map boxes, const float* threshold,
    const int* zero_point, const int* count_sum, const int* segments, const float* scale,
    const int* weight_zero, const int* row_sum, const float* bias,
    const void* residual, void* out, int rows, int columns, int width, int groups, int weight_groups) {
  constexpr int OUTPUTS = 16 * STRIPS, ROWS = 8 * ROWS8, CHUNKS = OUTPUTS / (OUT == 0 ? 4 : 8);
  constexpr int WEIGHT_BYTES = OUTPUTS * 64, STAGE_BYTES = WEIGHT_BYTES + ROWS * 128;
  constexpr int PITCH = OUTPUTS + 4, SLAB = ROWS * PITCH;  // 4 words against bank conflicts
  constexpr int SUMS = SEGMENTS - MERGED;
  constexpr bool IN_BOXES = RESIDENT == 1;
  constexpr int RINGS = 8 * STAGES * STAGE_BYTES, SUM_BYTES = 8 * SUMS * SLAB * 4;
  extern __shared__ __align__(1024) unsigned char memory[];  // where the swizzle of boxes begins
  launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int n0 = blockIdx.x * OUTPUTS, pitch = width / 2;
  const int blocks = width / 128, mine = (blocks - warp + 7) / 8;
  const unsigned ring = warp * STAGES * STAGE_BYTES;
  const unsigned base = shared_address(memory) + ring;
  u64* barriers = (u64*)(memory + (RINGS > SUM_BYTES ? RINGS : SUM_BYTES));  // [8][STAGES], of the first weights
  float* bias_table = (float*)(barriers + 8 * STAGES);
  int* column_table = (int*)bias_table + OUTPUTS;          // [SEGMENTS][3][OUTPUTS]: sw, zu, row sum
  int* row_table = column_table + SEGMENTS * 3 * OUTPUTS;  // [SEGMENTS][3][ROWS]: s, z, sum of counts
  int* residual_table = row_table + SEGMENTS * 3 * ROWS;   // [ROWS][OUTPUTS] of the type of the outputs

  // First position, group and group of weights of both segments: asked for before the weights, behind which it is late.
  const int* last = segments + 4 * (SEGMENTS - 1);
  const int second_at = last[0], group_of[2] = {segments[2], last[2]}, weight_group_of[2] = {segments[3], last[3]};
  const unsigned full = shared_address(barriers + warp * STAGES);
  // Where 16 bytes of 8 rows of 64 lie: boxes are swizzled.
  const int lane_at = IN_BOXES ? lane / 4 * 64 + (lane % 4 ^ lane / 8) * 16 : 16 * lane;
  auto copy_weights = [&](int i, int stage) {
#pragma unroll
    for (int e = 0; e < 2 * STRIPS; e++) {  // the last rows again beyond the end
      const int n = min(n0 + 8 * e, columns - 8) + lane / 4;
      copy_16(base + stage * STAGE_BYTES + 512 * e + lane_at,
              weight + (i64)n * pitch + (8 * i + warp) * 64 + lane % 4 * 16);
    }
  };
  auto copy_counts = [&](int i, int stage) {
#pragma unroll
    for (int e = 0; e < 2 * ROWS8; e++) {  // 4 rows of 128 bytes; odd ones with swapped halves: banks
      const int m = 4 * e + lane / 8;
      if (m < rows)
        copy_16(base + stage * STAGE_BYTES + WEIGHT_BYTES + m * 128 + (lane % 8 ^ m % 2 * 4) * 16,
                count + (i64)m * width + (8 * i + warp) * 128 + lane % 8 * 16);
    }
  };
  if (!IN_BOXES) {
#pragma unroll
    for (int i = 0; i < STAGES; i++)
      if (i < mine) copy_weights(i, i);
  } else if (lane == 0) {
#pragma unroll
    for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1);
    barrier_fence();
#pragma unroll
    for (int i = 0; i < STAGES; i++)
      if (i < mine) {
        barrier_expect(full + 8 * i, WEIGHT_BYTES);
        box_copy(base + i * STAGE_BYTES, &boxes, (8 * i + warp) * 64, n0, full + 8 * i);
      }
  }
  __syncwarp();
#pragma unroll
  for (int at = threadIdx.x; at < SEGMENTS * OUTPUTS; at += 256) {
    const int of = at / OUTPUTS, i = at % OUTPUTS;
    const int n = min(n0 + i, columns - 1), j = n * weight_groups + (of ? weight_group_of[1] : weight_group_of[0]);
    const unsigned to = shared_address(column_table + of * 3 * OUTPUTS + i);
    copy_4(to, scale + j);
    copy_4(to + 4 * OUTPUTS, weight_zero + j);
    copy_4(to + 8 * OUTPUTS, row_sum + n * SEGMENTS + of);
    if (BIAS && of == 0) copy_4(shared_address(bias_table + i), bias + n);
  }
  const int second = SUMS == 2 ? second_at / 128 : blocks;
  wait_for_kernel_in_front();
  if (threadIdx.x < SEGMENTS * rows) {
    const int of = threadIdx.x / rows, m = threadIdx.x % rows, group = of ? group_of[1] : group_of[0];
    const unsigned to = shared_address(row_table + of * 3 * ROWS + m);
    copy_4(to, threshold + m * groups + group);
    copy_4(to + 4 * ROWS, zero_point + m * groups + group);
    copy_4(to + 8 * ROWS, count_sum + m * SEGMENTS + of);
  }
  for (int at = threadIdx.x; RESIDUAL && at < rows * CHUNKS; at += 256) {
    const int m = at / CHUNKS, n = n0 + at % CHUNKS * (OUTPUTS / CHUNKS);
    if (n < columns)
      copy_16(shared_address(residual_table + 4 * at),
              (const unsigned char*)residual + ((i64)m * columns + n) * (OUT == 0 ? 4 : 2));
  }
#pragma unroll
  for (int i = 0; i < STAGES; i++) {
    if (i < mine) copy_counts(i, i);
    commit_copies();
  }

  const int g = lane / 4, t = lane % 4;
  int acc[SUMS][STRIPS][ROWS8][4] = {};
  int stage = 0;
  for (int i = 0; i < mine; i++) {
    if (IN_BOXES && i < STAGES) barrier_wait(full + 8 * i, 0);
    finish_copies<STAGES - 1>();
    __syncwarp();
    const unsigned char* here = memory + ring + stage * STAGE_BYTES;
    auto multiply = [&](int (&sums)[STRIPS][ROWS8][4]) {
      uint4 low[ROWS8], high[ROWS8];
#pragma unroll
      for (int e = 0; e < ROWS8; e++) {
        const unsigned char* at = here + WEIGHT_BYTES + (8 * e + g) * 128 + t * 16;
        low[e] = *(const uint4*)(at + g % 2 * 64);
        high[e] = *(const uint4*)(at + (1 - g % 2) * 64);
      }
#pragma unroll
      for (int strip = 0; strip < STRIPS; strip++) {
        const uint4 top = *(const uint4*)(here + strip * 1024 + lane_at);
        const uint4 bottom = *(const uint4*)(here + strip * 1024 + 512 + lane_at);
#pragma unroll
        for (int q = 0; q < 4; q++) {
          const unsigned a = word(top, q), b = word(bottom, q);
#pragma unroll
          for (int e = 0; e < ROWS8; e++)
            multiply_16x8(sums[strip][e], a & NIBBLES, b & NIBBLES, a >> 4 & NIBBLES,
                          b >> 4 & NIBBLES, word(low[e], q), word(high[e], q));
        }
      }
    };
    if (8 * i + warp < second) multiply(acc[0]);
    else multiply(acc[SUMS - 1]);
    __syncwarp();
    if (i + STAGES < mine) {
      copy_weights(i + STAGES, stage);
      copy_counts(i + STAGES, stage);
    }
    commit_copies();
    if (++stage == STAGES) stage = 0;
  }

  // The sums go where the rings were.
  finish_copies<0>();
  __syncthreads();
  int* sums = (int*)memory;
#pragma unroll
  for (int s = 0; s < SUMS; s++)
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
      for (int i = 0; i < ROWS8; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          sums[(warp * SUMS + s) * SLAB + (8 * i + 2 * t + e % 2) * PITCH + 16 * strip +
               8 * (e / 2) + g] = acc[s][strip][i][e];
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * OUTPUTS; i += 256) {
    const int m = i / OUTPUTS, c = i % OUTPUTS, n = n0 + c;
    if (m >= rows || n >= columns) continue;
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < SUMS; s++) {
      int a = 0;
#pragma unroll
      for (int from = 0; from < 8; from++) a += sums[(from * SUMS + s) * SLAB + m * PITCH + c];
#pragma unroll
      for (int part = s; part <= s + MERGED; part++) {
        const int *column = column_table + part * 3 * OUTPUTS + c, *row = row_table + part * 3 * ROWS + m;
        a += -row[ROWS] * column[2 * OUTPUTS] - column[OUTPUTS] * row[2 * ROWS];
      }
      if (OUT == INTEGERS) {
        ((int*)out)[((i64)s * rows + m) * columns + n] = a;
        continue;
      }
      const float threshold = __int_as_float(row_table[s * 3 * ROWS + m]);
      const float term = scaled(threshold, a, __int_as_float(column_table[s * 3 * OUTPUTS + c]));
      total = s == 0 ? term : __fadd_rn(total, term);
    }
    if (OUT == INTEGERS) continue;
    if (BIAS) total = __fadd_rn(total, bias_table[c]);
    if (RESIDUAL) total = plus(total, residual_table, i);
    store(out, (i64)m * columns + n, total);
  }
}
"""

SOURCE = PREAMBLE + PRIMITIVES + SHARED + BODY
