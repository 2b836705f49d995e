"""CUDA C++ of the collapsed linear of few rows: limited by the memory of the weights.

A block of threads owns 16 STRIPS outputs over the whole of K; each of its eight warps takes every eighth block of
128 positions, keeps a ring of STAGES of them in shared memory filled by asynchronous copies of its own,
and multiplies on the tensor cores (m16n8k32). The integers of the warps are added at the end, in shared
memory. The weights of all stages are on their way before the counts are there (programmatic dependent
launch), and when its own have arrived it asks for what the linears behind it read first: the memory would
be idle while the kernels between two linears run.

A single row has its counts as a whole in shared memory, instead of in the rings. With ENCODE they are not there yet:
every block of threads encodes the row for itself, which costs less than to wait for another kernel; the first one
also writes the sum of the row and what is added to it. A thread has four neighbouring channels of every 1024, so
that squares are added as `snnllm.norm` does.

A lane takes 16 packed bytes of a weight row, the positions `16 t ..` and `64 + 16 t ..` of the block,
where the product has other ones: the order of the positions within a sum is free.

Macros: ROWS8 (rows / 8, up), SINGLE (there is one row), STRIPS, SEGMENTS (1 or 2), SHIFT, BIAS, RESIDUAL, STAGES,
RESIDENT (blocks of threads of a multiprocessor, for which registers are set aside), OUT (`primitives.OUTPUTS`),
ENCODE (0: no; 1: the row; 2: its norm), and with it ADDED (something is added to the row first), GAIN (of the norm),
OFFSET, CHUNKS (channels / 1024, up) and those of `encode_source.ENCODING`.
"""

from snnllm.kernels.cuda.encode_source import ENCODING
from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES, SHARED

__all__ = ["BODY", "ROW_THREADS", "SOURCE", "shared_bytes"]

ROW_THREADS = 256
"""Eight warps."""


def shared_bytes(
    rows8: int, strips: int, stages: int, segments: int, residual: int, single: int
) -> int:
    """Shared memory of a block: the rings, where the partial sums lie after them; tables.

    Args:
        rows8: As the macro; likewise the next three.
        strips: Likewise.
        stages: Likewise.
        segments: Likewise.
        residual: Bytes of an element of the residual; 0 without one.
        single: Positions of a single row; 0: there are more.
    """
    rings = 8 * stages * (strips * 1024 + (0 if single else rows8 * 1024))
    sums = 8 * segments * rows8 * 8 * (16 * strips + 4) * 4
    tables = 4 * (16 * strips + segments * (4 * 16 * strips + 3 * rows8 * 8))
    own = single + 4 * 8 * 7 if single else 0
    return max(rings, sums) + tables + 16 * strips * 8 * rows8 * residual + own


BODY = r"""
INLINE unsigned word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

extern "C" __global__ void __launch_bounds__(256, RESIDENT) linear_rows(
    const unsigned char* count, const unsigned char* weight, const float* threshold,
    const int* zero_point, const int* count_sum, const int* segments, const float* scale,
    const int* weight_zero, const int* row_sum, const int* shift, const float* bias,
    const void* residual, void* out, int rows, int columns, int width, int groups, int weight_groups,
    const unsigned char* ahead, int ahead_bytes, const unsigned char* further, int further_bytes
#if ENCODE
    , const void* x, const void* added, const void* gain, const float* offset, const float* capacity,
    const float* clip, void* stream, float eps, int channels, int start0, int stop0, int many0, int first0,
    int start1, int stop1, int many1, int first1
#endif
) {
  constexpr int OUTPUTS = 16 * STRIPS, ROWS = 8 * ROWS8, PIECES = OUTPUTS / (OUT == 0 ? 4 : 8);
  constexpr int WEIGHT_BYTES = OUTPUTS * 64, COUNT_BYTES = SINGLE ? 0 : ROWS * 128;
  constexpr int STAGE_BYTES = WEIGHT_BYTES + COUNT_BYTES;
  constexpr int PITCH = OUTPUTS + 4, SLAB = ROWS * PITCH;  // 4 words against bank conflicts
  constexpr int RINGS = 8 * STAGES * STAGE_BYTES, SUMS = 8 * SEGMENTS * SLAB * 4;
  extern __shared__ __align__(128) unsigned char memory[];
  launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int n0 = blockIdx.x * OUTPUTS, pitch = width / 2;
  const int blocks = width / 128, mine = (blocks - warp + 7) / 8;
  const unsigned ring = warp * STAGES * STAGE_BYTES;
  const unsigned base = shared_address(memory) + ring;
  float* bias_table = (float*)(memory + (RINGS > SUMS ? RINGS : SUMS));
  int* column_table = (int*)bias_table + OUTPUTS;          // [SEGMENTS][4][OUTPUTS]: sw, zu, row sum, shift
  int* row_table = column_table + SEGMENTS * 4 * OUTPUTS;  // [SEGMENTS][3][ROWS]: s, z, sum of counts
  int* residual_table = row_table + SEGMENTS * 3 * ROWS;   // [ROWS][OUTPUTS] of the type of the outputs
  // Behind it, all counts of a single row.
  unsigned char* codes = (unsigned char*)residual_table + RESIDUAL * ROWS * OUTPUTS * (OUT == 0 ? 4 : 2);

  auto copy_weights = [&](int i, int stage) {
#pragma unroll
    for (int e = 0; e < 2 * STRIPS; e++) {  // 8 rows of 64 bytes; the last ones again beyond the end
      const int n = min(n0 + 8 * e, columns - 8) + lane / 4;
      copy_16(base + stage * STAGE_BYTES + 512 * e + 16 * lane,
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
#pragma unroll
  for (int i = 0; i < STAGES; i++) {
    if (i < mine) copy_weights(i, i);
    if (SINGLE) commit_copies();
  }
  if (threadIdx.x < SEGMENTS * OUTPUTS) {
    const int of = threadIdx.x / OUTPUTS, i = threadIdx.x % OUTPUTS;
    const int n = min(n0 + i, columns - 1), j = n * weight_groups + segments[4 * of + 3];
    const unsigned to = shared_address(column_table + of * 4 * OUTPUTS + i);
    copy_4(to, scale + j);
    copy_4(to + 4 * OUTPUTS, weight_zero + j);
    copy_4(to + 8 * OUTPUTS, row_sum + n * SEGMENTS + of);
    if (SHIFT) copy_4(to + 12 * OUTPUTS, shift + n * SEGMENTS + of);
    if (BIAS && of == 0) copy_4(shared_address(bias_table + i), bias + n);
  }
  const int second = SEGMENTS == 2 ? segments[4] / 128 : blocks;
#if ENCODE
  const Run runs[2] = {{start0, stop0, many0, first0}, {start1, stop1, many1, first1}};
  unsigned* ranges = (unsigned*)(codes + width);  // [8][4], of the warps
  int* code_sums = (int*)(ranges + 8 * 4);        // [8][2]
  float* squares = (float*)(code_sums + 8 * 2);   // [8]
  constexpr bool KEPT = CHUNKS <= 4;  // gains and offsets wait in registers
  float own[CHUNKS][4], gains[CHUNKS][4], offsets[CHUNKS][4];
  auto load_constants = [&] {
#pragma unroll
    for (int v = 0; v < CHUNKS; v++) {
      const int c = 1024 * v + 4 * threadIdx.x;
      if (c >= channels) continue;
      if (GAIN) load_four(gains[v], gain, c);
      if (OFFSET) load_floats(offsets[v], offset + c);
    }
  };
  if (KEPT) load_constants();
  for (int g = 0; g < GROUPS; g++)
    for (int i = runs[g].start + runs[g].many + threadIdx.x; i < runs[g].stop; i += 256) codes[i] = 0;
  wait_for_kernel_in_front();
  float lanes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int v = 0; v < CHUNKS; v++) {
    const int c = 1024 * v + 4 * threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4; i++) own[v][i] = 0.0f;
    if (c >= channels) continue;
    load_four(own[v], x, c);
    if (ADDED) {
      float more[4];
      load_four(more, added, c);
#pragma unroll
      for (int i = 0; i < 4; i++) own[v][i] = __fadd_rn(own[v][i], more[i]);
      round_four(own[v]);
      if (blockIdx.x == 0) store_four(stream, c, own[v]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) lanes[i] = __fadd_rn(lanes[i], __fmul_rn(own[v][i], own[v][i]));
  }
  if (!KEPT) load_constants();
  if (ENCODE == 2) {  // in neighbours: lanes, threads, warps
    float all = __fadd_rn(__fadd_rn(lanes[0], lanes[1]), __fadd_rn(lanes[2], lanes[3]));
#pragma unroll
    for (int step = 1; step < 32; step *= 2) all = __fadd_rn(all, of_partner(all, step));
    if (lane == 0) squares[warp] = all;
    __syncthreads();
    all = squares[lane % 8];
#pragma unroll
    for (int step = 1; step < 8; step *= 2) all = __fadd_rn(all, of_partner(all, step));
    const float variance = __fdiv_rn(all, __int2float_rn(channels));
    const float norm = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(variance, eps)));
#pragma unroll
    for (int v = 0; v < CHUNKS; v++) {
#pragma unroll
      for (int i = 0; i < 4; i++) own[v][i] = __fmul_rn(own[v][i], norm);
      round_four(own[v]);
      if (!GAIN || 1024 * v + 4 * threadIdx.x >= channels) continue;
#pragma unroll
      for (int i = 0; i < 4; i++) own[v][i] = __fmul_rn(own[v][i], gains[v][i]);
      round_four(own[v]);
    }
  }
  unsigned range[4] = {0, 0, 0, 0};
  auto group_of = [&](int c) { return GROUPS == 2 && c >= first1 && c < first1 + many1; };
#pragma unroll
  for (int v = 0; v < CHUNKS; v++) {
    const int c = 1024 * v + 4 * threadIdx.x;
    if (c >= channels) continue;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (OFFSET) own[v][i] = __fadd_rn(own[v][i], -offsets[v][i]);
    widen(range, own[v], group_of(c));
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < 2 || (GROUPS == 2 && !ONE_RANGE)) {
      range[i] = maximum_of_warp(range[i]);
      if (lane == 0) ranges[4 * warp + i] = range[i];
    }
  __syncthreads();
  Spikes spikes[2];
  spikes_of_all<8>(spikes, ranges, capacity, clip);
  const float inverses[2] = {__fdiv_rn(1.0f, spikes[0].threshold), __fdiv_rn(1.0f, spikes[1].threshold)};
  int sum[2] = {0, 0};
#pragma unroll
  for (int v = 0; v < CHUNKS; v++) {
    const int c = 1024 * v + 4 * threadIdx.x;
    if (c >= channels) continue;
    const int g = group_of(c);
    int total = 0;
    const unsigned word = counts_of(own[v], g ? spikes[1] : spikes[0], g ? inverses[1] : inverses[0], total);
    const Run run = g ? runs[1] : runs[0];
    *(unsigned*)(codes + run.start + c - run.first) = SHIFT ? word ^ 0x80808080u : word;
    if (g) sum[1] += total;
    else sum[0] += total;
  }
  sum[0] = sum_of_warp(sum[0]), sum[1] = sum_of_warp(sum[1]);
  if (lane < 2) code_sums[2 * warp + lane] = lane ? sum[1] : sum[0];
  __syncthreads();
  if (threadIdx.x < GROUPS) {
    const Spikes of = threadIdx.x ? spikes[1] : spikes[0];
    int* row = row_table + threadIdx.x * 3 * ROWS;
    row[0] = __float_as_int(of.threshold), row[ROWS] = (int)of.zero, row[2 * ROWS] = 0;
#pragma unroll
    for (int w = 0; w < 8; w++) row[2 * ROWS] += code_sums[2 * w + threadIdx.x];
  }
#else
  wait_for_kernel_in_front();
  if (threadIdx.x < SEGMENTS * rows) {
    const int of = threadIdx.x / rows, m = threadIdx.x % rows, group = segments[4 * of + 2];
    const unsigned to = shared_address(row_table + of * 3 * ROWS + m);
    copy_4(to, threshold + m * groups + group);
    copy_4(to + 4 * ROWS, zero_point + m * groups + group);
    copy_4(to + 8 * ROWS, count_sum + m * SEGMENTS + of);
  }
#endif
  if (RESIDUAL && threadIdx.x < rows * PIECES) {
    const int m = threadIdx.x / PIECES, n = n0 + threadIdx.x % PIECES * (OUTPUTS / PIECES);
    if (n < columns)
      copy_16(shared_address(residual_table + 4 * threadIdx.x),
              (const unsigned char*)residual + ((i64)m * columns + n) * (OUT == 0 ? 4 : 2));
  }
  if (!SINGLE)
#pragma unroll
    for (int i = 0; i < STAGES; i++) {
      if (i < mine) copy_counts(i, i);
      commit_copies();
    }
  else if (!ENCODE) {
    for (int i = threadIdx.x; i < width / 16; i += 256) ((uint4*)codes)[i] = ((const uint4*)count)[i];
    __syncthreads();
  }

  const int g = lane / 4, t = lane % 4;
  int acc[SEGMENTS][STRIPS][ROWS8][4] = {};
  int stage = 0;
  for (int i = 0; i < mine; i++) {
    finish_copies<STAGES - 1>();
    __syncwarp();
    const unsigned char* here = memory + ring + stage * STAGE_BYTES;
    auto multiply = [&](int (&sums)[STRIPS][ROWS8][4]) {
      uint4 low[ROWS8], high[ROWS8];
#pragma unroll
      for (int e = 0; e < ROWS8; e++) {
        const unsigned char* at = here + WEIGHT_BYTES + (8 * e + g) * 128 + t * 16;
        int first = g % 2 * 64;
        if (SINGLE) {  // in the place of all
          at = codes + (8 * i + warp) * 128 + t * 16;
          first = 0;
        }
        low[e] = *(const uint4*)(at + first);
        high[e] = *(const uint4*)(at + (64 - first));
      }
#pragma unroll
      for (int strip = 0; strip < STRIPS; strip++) {
        const uint4 top = *(const uint4*)(here + strip * 1024 + lane * 16);
        const uint4 bottom = *(const uint4*)(here + strip * 1024 + 512 + lane * 16);
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
    else multiply(acc[SEGMENTS - 1]);
    __syncwarp();
    if (i + STAGES < mine) {
      copy_weights(i + STAGES, stage);
      if (!SINGLE) copy_counts(i + STAGES, stage);
    }
    commit_copies();
    if (++stage == STAGES) stage = 0;
  }

  auto fetch_share = [&](const unsigned char* from, int bytes) {
    const int warps = 8 * gridDim.x, share = (bytes + 16 * warps - 1) / (16 * warps) * 16;
    const int first = (8 * blockIdx.x + warp) * share;
    if (lane == 0 && first < bytes) fetch(from + first, min(share, bytes - first));
  };
  fetch_share(ahead, ahead_bytes);
  fetch_share(further, further_bytes);

  // The sums go where the rings were.
  finish_copies<0>();
  __syncthreads();
  int* sums = (int*)memory;
#pragma unroll
  for (int s = 0; s < SEGMENTS; s++)
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
      for (int i = 0; i < ROWS8; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          sums[(warp * SEGMENTS + s) * SLAB + (8 * i + 2 * t + e % 2) * PITCH + 16 * strip +
               8 * (e / 2) + g] = acc[s][strip][i][e];
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * OUTPUTS; i += 256) {
    const int m = i / OUTPUTS, c = i % OUTPUTS, n = n0 + c;
    if (m >= rows || n >= columns) continue;
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < SEGMENTS; s++) {
      int a = 0;
#pragma unroll
      for (int from = 0; from < 8; from++) a += sums[(from * SEGMENTS + s) * SLAB + m * PITCH + c];
      const int *column = column_table + s * 4 * OUTPUTS + c, *row = row_table + s * 3 * ROWS + m;
      a = a - row[ROWS] * column[2 * OUTPUTS] - column[OUTPUTS] * row[2 * ROWS] +
          (SHIFT ? column[3 * OUTPUTS] : 0);
      if (OUT == INTEGERS) {
        ((int*)out)[((i64)s * rows + m) * columns + n] = a;
        continue;
      }
      const float part = scaled(__int_as_float(row[0]), a, __int_as_float(column[0]));
      total = s == 0 ? part : __fadd_rn(total, part);
    }
    if (OUT == INTEGERS) continue;
    if (BIAS) total = __fadd_rn(total, bias_table[c]);
    if (RESIDUAL) total = plus(total, residual_table, i);
    store(out, (i64)m * columns + n, total);
  }
}
"""

SOURCE = PREAMBLE + PRIMITIVES + SHARED + ENCODING + BODY
