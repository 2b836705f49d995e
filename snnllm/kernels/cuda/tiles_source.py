"""CUDA C++ of the collapsed linear of many rows: asynchronous warpgroup products (wgmma), int8.

A block of threads makes tiles of BN outputs and BM rows, one after the other. One warp copies (counts and packed
weights by the copy engine into a ring of stages of 128 positions, ahead across tiles), one warp lays out the
scales and zero points of the tile, and WORKERS warpgroups multiply: packed weights go from shared memory
to registers (ldmatrix), where they are the left operand after three operations per 8 codes; the counts
are the right operand, in shared memory. While a product runs, the next operand is unpacked.

Of two segments the second (few salient channels) comes first; its scaled sums wait in registers and
in shared memory (KEPT of them in registers). A float sum of two does not depend on the order.

A residual of 16 bits goes to the L2 cache while the tile is multiplied, and from there, 16 rows at a time, to where
outputs are transposed, until they need the place.

Macros: BM, BN, WORKERS, STAGES, KEPT, SEGMENTS (1 or 2), SHIFT, BIAS, RESIDUAL, OUT (`primitives.OUTPUTS`).
"""

from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES, SHARED

__all__ = ["BODY", "SOURCE", "shared_bytes"]


def shared_bytes(bm: int, bn: int, stages: int, kept: int, segments: int) -> int:
    """Shared memory of a block: ring, waiting sums, tables, transposition, barriers, alignment."""
    values = bm * bn // 128  # sums of all warpgroups, a thread's each
    waiting = (values - kept) * 512 if segments == 2 else 0
    table = segments * 16 * (bm + bn) + 4 * bn
    return stages * (bm * 128 + bn * 64) + waiting + table + bn * 32 + 256 + 1024


BODY = r"""
constexpr int OWN = BN / WORKERS, PIECES = OWN / 64, VALUES = BM / 2, WAITING = PIECES * VALUES - KEPT;
constexpr int COUNT_BYTES = BM * 128, STAGE_BYTES = COUNT_BYTES + BN * 64, WARPS = 4 * WORKERS;
constexpr int GROUPS = 2 * PIECES;
constexpr bool IN_PAIRS = OUT != 0 && OUT != INTEGERS;  // outputs of 16 bits

struct Tile { int m, n; };
// Rasters of `height` tiles along the rows: what runs at a time shares operands in the L2 cache.
INLINE Tile tile_at(int index, int tiles_m, int tiles_n, int height) {
  const int first = index / (height * tiles_n) * height, tall = min(tiles_m - first, height);
  const int inside = index % (height * tiles_n);
  return {(first + inside % tall) * BM, inside / tall * BN};
}

// Where 8 outputs of a piece, 16 rows of 2 chunks, are transposed: without conflicts of banks.
INLINE int turned(int piece, int row, int chunk) {
  return piece * 512 + ((row * 32 + (chunk ^ row / 4 % 2) * 16) ^ piece * 64);
}

extern "C" __global__ void __launch_bounds__(128 + 128 * WORKERS, 1) linear_tiles(
    const __grid_constant__ Map counts, const __grid_constant__ Map weights, const float* threshold,
    const int* zero_point, const int* count_sum, const int* segments, const float* scale,
    const int* weight_zero, const int* row_sum, const int* shift, const float* bias,
    const void* residual, void* out, int rows, int columns, int width, int groups, int weight_groups,
    int height) {
  extern __shared__ unsigned char unaligned[];
  unsigned char* memory = unaligned + (-shared_address(unaligned) & 1023);  // still known as shared
  unsigned char* after_ring = memory + STAGES * STAGE_BYTES;
  float* waiting = (float*)after_ring;
  unsigned char* after_waiting = after_ring + (SEGMENTS == 2 ? WAITING * 512 * WORKERS : 0);
  int4* row_table = (int4*)after_waiting;              // [SEGMENTS][BM]: s, z, sum of counts
  int4* column_table = row_table + SEGMENTS * BM;      // [SEGMENTS][BN]: sw, zu, row sum, shift
  float* bias_table = (float*)(column_table + SEGMENTS * BN);
  unsigned char* turning = (unsigned char*)(bias_table + BN);  // 512 bytes a warp and piece
  const unsigned base = shared_address(memory);
  const unsigned full = shared_address(turning + WARPS * PIECES * 512), empty = full + 8 * STAGES;
  const unsigned table_full = empty + 8 * STAGES, table_empty = table_full + 8 * SEGMENTS;
  const int group_of_warps = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int tiles_m = (rows + BM - 1) / BM, tiles_n = (columns + BN - 1) / BN;
  const int tiles = tiles_m * tiles_n;
  const int blocks = width / 128, base_blocks = SEGMENTS == 2 ? segments[4] / 128 : blocks;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, WARPS);
    }
    for (int s = 0; s < SEGMENTS; s++) {
      barrier_init(table_full + 8 * s, 32);
      barrier_init(table_empty + 8 * s, WARPS);
    }
    barrier_fence();
  }
  __syncthreads();
  launch_dependents();

  if (group_of_warps == 0) {
    give_registers<WORKERS == 2 ? 40 : 32>();
    if (warp == 0 && lane == 0) {  // copies
      auto copy_weights = [&](Tile tile, int i, int s) {
        barrier_expect(full + 8 * s, STAGE_BYTES);
        const int b = (i + base_blocks) % blocks;
        box_copy(base + s * STAGE_BYTES + COUNT_BYTES, &weights, b * 64, tile.n, full + 8 * s);
      };
      auto copy_counts = [&](Tile tile, int i, int s) {
        const int b = (i + base_blocks) % blocks;
        box_copy(base + s * STAGE_BYTES, &counts, b * 128, tile.m, full + 8 * s);
      };
      int stage = 0, parity = 1;
      bool waited = false;
      for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile = tile_at(index, tiles_m, tiles_n, height);
        int i = 0;
        if (!waited) {  // weights do not depend on the kernel in front
          const int first = min(STAGES, blocks);
          for (int s = 0; s < first; s++) copy_weights(tile, s, s);
          wait_for_kernel_in_front();
          for (int s = 0; s < first; s++) copy_counts(tile, s, s);
          waited = true;
          i = first;
          stage = first % STAGES;
          parity = first == STAGES ? 0 : 1;
        }
        for (; i < blocks; i++) {
          barrier_wait(empty + 8 * stage, parity);
          copy_weights(tile, i, stage);
          copy_counts(tile, i, stage);
          if (++stage == STAGES) stage = 0, parity ^= 1;
        }
      }
    } else if (warp == 1) {  // tables, those of the segment that comes first while the tile in front goes on
      int parity = 1;
      for (int index = blockIdx.x; index < tiles; index += gridDim.x, parity ^= 1) {
        const Tile tile = tile_at(index, tiles_m, tiles_n, height);
        for (int s = SEGMENTS - 1; s >= 0; s--) {
          const int group = segments[4 * s + 2], weight_group = segments[4 * s + 3];
          barrier_wait(table_empty + 8 * s, parity);
          for (int i = lane; i < BN; i += 32) {
            const int n = min(tile.n + i, columns - 1), of = n * weight_groups + weight_group;
            const unsigned to = shared_address(column_table + s * BN + i);
            copy_4(to, scale + of);
            copy_4(to + 4, weight_zero + of);
            copy_4(to + 8, row_sum + n * SEGMENTS + s);
            if (SHIFT) copy_4(to + 12, shift + n * SEGMENTS + s);
            if (BIAS && s == 0) copy_4(shared_address(bias_table + i), bias + n);
          }
          wait_for_kernel_in_front();  // weights do not depend on it
          for (int i = lane; i < BM; i += 32) {
            const int m = min(tile.m + i, rows - 1), of = m * groups + group;
            const unsigned to = shared_address(row_table + s * BM + i);
            copy_4(to, threshold + of);
            copy_4(to + 4, zero_point + of);
            copy_4(to + 8, count_sum + m * SEGMENTS + s);
          }
          commit_copies();
          for (int m = tile.m + lane; RESIDUAL && s == 0 && m < min(tile.m + BM, rows); m += 32) {
            constexpr int BYTES = OUT == 0 ? 4 : 2;
            fetch((const unsigned char*)residual + ((i64)m * columns + tile.n) * BYTES,
                  min(BN, columns - tile.n) * BYTES);
          }
          finish_copies<0>();
          barrier_arrive(table_full + 8 * s);
        }
      }
    }
  } else {
    take_registers<WORKERS == 2 ? 232 : 160>();
    const int worker = group_of_warps - 1, thread = threadIdx.x - 128;
    const int g = lane / 4, t = lane % 4;
    const int first_output = worker * OWN + warp * 16 * PIECES;  // of the warp in its tile
    // ldmatrix: lanes 0-7 give the rows of the first matrix, and so on; chunks of 16 bytes, swizzled.
    const int matrix_row = first_output + lane % 16;
    const int swizzle = matrix_row / 2 % 4;
    const unsigned weight_at = base + COUNT_BYTES + matrix_row * 64;
    const unsigned chunk_at[2] = {(unsigned)((lane / 16) ^ swizzle) * 16,
                                  (unsigned)((2 + lane / 16) ^ swizzle) * 16};
    // A descriptor: address / 16, 1024 bytes between groups of 8 rows, swizzle of 128 bytes.
    const u64 descriptor = 1ull << 62 | (u64)(1024 / 16) << 32 | 1ull << 16 | (base >> 4);
    int acc[PIECES][VALUES];
    float kept[SEGMENTS == 2 && KEPT > 0 ? KEPT : 1];
    unsigned operand[2][8];
    int stage = 0, parity = 0, table_parity = 0;
    auto release = [&]() {  // the stage before the current one
      if (lane == 0) barrier_arrive(empty + 8 * (stage == 0 ? STAGES - 1 : stage - 1));
    };
    unsigned packed[GROUPS][4];
    auto load_block = [&]() {
      barrier_wait(full + 8 * stage, parity);
      const unsigned weights_here = weight_at + stage * STAGE_BYTES;
#pragma unroll
      for (int j = 0; j < GROUPS; j++)
        load_matrices(packed[j], weights_here + j / 2 * (16 * 64) + chunk_at[j % 2]);
    };
    auto multiply_block = [&](int i, bool more) {
      const u64 counts_here = descriptor + (u64)(stage * (STAGE_BYTES / 16));
#pragma unroll
      for (int j = 0; j < GROUPS; j++) {
        finish<1>();  // the product that reads this operand
        if (j == 1 && i > 0) release();
        unsigned(&a)[8] = operand[j % 2];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          a[e] = packed[j][e] & NIBBLES;
          a[4 + e] = packed[j][e] >> 4 & NIBBLES;
        }
        fence();
        multiply(acc[j / 2], a, counts_here + 2 * (j % 2), i > 0 || j % 2 > 0);
        multiply(acc[j / 2], a + 4, counts_here + 2 * (j % 2) + 4, 1);
        commit();
      }
      if (++stage == STAGES) stage = 0, parity ^= 1;
      if (more) load_block();  // while the products run
    };
    auto multiply_segment = [&](int count) {
      load_block();
      for (int i = 0; i < count; i++) multiply_block(i, i + 1 < count);
      finish<0>();
#pragma unroll
      for (int p = 0; p < PIECES; p++)
#pragma unroll
        for (int v = 0; v < VALUES; v++) finished(acc[p][v]);
      release();
    };
    // The outputs of a row that a warp makes are CHUNKS times 16 bytes; it stores LINES rows at a time.
    constexpr int CHUNKS = 2 * PIECES, LINES = 32 / CHUNKS;
    const int line = lane / CHUNKS, chunk = lane % CHUNKS;
    auto copy_residual = [&](Tile tile, int j) {  // a lane copies what it adds
      const unsigned to = shared_address(turning + (thread / 32) * PIECES * 512 + lane * 16);
      const int at_n = tile.n + first_output + chunk * 8;
#pragma unroll
      for (int p = 0; p < PIECES; p++) {
        const int at_m = tile.m + 16 * j + LINES * p + line;
        if (at_m < rows && at_n < columns)
          copy_16(to + p * 512, (const unsigned short*)residual + (i64)at_m * columns + at_n);
      }
      commit_copies();
    };
    if (RESIDUAL) wait_for_kernel_in_front();
    for (int index = blockIdx.x; index < tiles; index += gridDim.x, table_parity ^= 1) {
      const Tile tile = tile_at(index, tiles_m, tiles_n, height);
#pragma unroll
      for (int turn = 0; turn < SEGMENTS; turn++) {
        const int s = SEGMENTS - 1 - turn;
        if (RESIDUAL && IN_PAIRS && s == 0) copy_residual(tile, 0);
        multiply_segment(s == 0 ? base_blocks : blocks - base_blocks);
        barrier_wait(table_full + 8 * s, table_parity);
        int4 of_column[PIECES][2];
        float add[PIECES][2];
#pragma unroll
        for (int p = 0; p < PIECES; p++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int n = first_output + p * 16 + 8 * e + g;
            of_column[p][e] = column_table[s * BN + n];
            add[p][e] = BIAS && s == 0 ? bias_table[n] : 0.0f;
          }
#pragma unroll
        for (int j = 0; j < BM / 16; j++) {
          unsigned pairs[PIECES][4];
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int m = 16 * j + 8 * i + 2 * t;
            const int4 of_row[2] = {row_table[s * BM + m], row_table[s * BM + m + 1]};
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
              float value[4];
              const int v = 8 * j + 4 * i, position = p * VALUES + v;
#pragma unroll
              for (int e = 0; e < 4; e++) {
                const int4 row = of_row[e % 2], column = of_column[p][e / 2];
                const int a = acc[p][v + e] - row.y * column.z - column.y * row.z +
                              (SHIFT ? column.w : 0);
                if (OUT == INTEGERS) {
                  const int at_m = tile.m + m + e % 2;
                  const int at_n = tile.n + first_output + p * 16 + 8 * (e / 2) + g;
                  if (at_m < rows && at_n < columns)
                    ((int*)out)[((i64)s * rows + at_m) * columns + at_n] = a;
                } else {
                  value[e] = scaled(__int_as_float(row.x), a, __int_as_float(column.x));
                }
              }
              if (OUT == INTEGERS) continue;
              float4* far = (float4*)waiting + ((thread / 32) * (WAITING / 4) + (position - KEPT) / 4) * 32 + lane;
              if (s == 1) {
                if (position < KEPT) {
#pragma unroll
                  for (int e = 0; e < 4; e++) kept[position + e] = value[e];
                } else {
                  *far = make_float4(value[0], value[1], value[2], value[3]);
                }
                continue;
              }
              if (SEGMENTS == 2) {
                if (position < KEPT) {
#pragma unroll
                  for (int e = 0; e < 4; e++) value[e] = __fadd_rn(value[e], kept[position + e]);
                } else {
                  const float4 other = *far;
                  value[0] = __fadd_rn(value[0], other.x);
                  value[1] = __fadd_rn(value[1], other.y);
                  value[2] = __fadd_rn(value[2], other.z);
                  value[3] = __fadd_rn(value[3], other.w);
                }
              }
              if (BIAS)
#pragma unroll
                for (int e = 0; e < 4; e++) value[e] = __fadd_rn(value[e], add[p][e / 2]);
              if (OUT == 0) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                  const int at_m = tile.m + m + e % 2;
                  const int at_n = tile.n + first_output + p * 16 + 8 * (e / 2) + g;
                  const i64 at = (i64)at_m * columns + at_n;
                  if (at_m < rows && at_n < columns)
                    ((float*)out)[at] = RESIDUAL ? plus(value[e], residual, at) : value[e];
                }
              } else {
                pairs[p][2 * i] = pair(value[0], value[1]);
                pairs[p][2 * i + 1] = pair(value[2], value[3]);
              }
            }
          }
          if (s == 1 || !IN_PAIRS) continue;
          unsigned char* mine = turning + (thread / 32) * PIECES * 512;
          uint4 more[PIECES];
          if (RESIDUAL) {
            finish_copies<0>();
#pragma unroll
            for (int p = 0; p < PIECES; p++) more[p] = *(const uint4*)(mine + p * 512 + lane * 16);
          }
          // Transpose 16 outputs x 16 rows a piece: neighbours in memory become neighbours in a warp.
          const int lane_row = lane / 16 * 8 + lane % 8, lane_chunk = lane / 8 % 2;
          __syncwarp();
#pragma unroll
          for (int p = 0; p < PIECES; p++)
            store_transposed(shared_address(mine + turned(p, lane_row, lane_chunk)), pairs[p]);
          __syncwarp();
          const int at_n = tile.n + first_output + chunk * 8;
#pragma unroll
          for (int p = 0; p < PIECES; p++) {
            const int of_16 = LINES * p + line, at_m = tile.m + 16 * j + of_16;
            uint4 eight = *(const uint4*)(mine + turned(chunk / 2, of_16, chunk % 2));
            if (RESIDUAL)
              eight = {sums(eight.x, more[p].x), sums(eight.y, more[p].y),
                       sums(eight.z, more[p].z), sums(eight.w, more[p].w)};
            if (at_m < rows && at_n < columns)
              *(uint4*)((unsigned short*)out + (i64)at_m * columns + at_n) = eight;
          }
          if (RESIDUAL && j + 1 < BM / 16) {
            __syncwarp();
            copy_residual(tile, j + 1);
          }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(table_empty + 8 * s);
      }
    }
  }
}
"""

SOURCE = PREAMBLE + PRIMITIVES + SHARED + BODY
