"""CUDA C++ of the collapsed linear of many rows: asynchronous warpgroup products (wgmma), int8.

A block of threads makes tiles of BN outputs and BM rows, one after the other. One warp copies (counts and packed
weights by the copy engine into a ring of stages of 128 positions, ahead across tiles), one warp lays out the
scales and zero points of the tile, and WORKERS warpgroups multiply: packed weights go from shared memory
to registers (ldmatrix), where they are the left operand after three operations per 8 codes; the counts
are the right operand, in shared memory. While a product runs, the next operand is unpacked.

Of two segments the second (few salient channels) comes first; its sums wait in registers and in shared memory (KEPT
of them in registers) for those of the first, and are scaled with them. A float sum of two does not depend on the order.

A residual goes to the L2 cache while the tile is multiplied, one of 16 bits from there to registers, 16 rows at a time.
The tiles from `first_tile` up to `last_tile` are made: the last ones may be split for another launch (SPLIT = 2).

Macros: BM, BN, WORKERS, STAGES, KEPT, SPLIT, SEGMENTS (1 or 2), SHIFT, BIAS, RESIDUAL, JOINT (one scale and zero point
of weights for all segments), OUT (`primitives.OUTPUTS`).
"""

from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES, SHARED

__all__ = ["BODY", "SOURCE", "shared_bytes"]


def shared_bytes(bm: int, bn: int, workers: int, stages: int, kept: int, segments: int) -> int:
    """Shared memory of a block: ring, waiting sums, tables, transposition, barriers, alignment."""
    values = bm * bn // 128 - workers * kept  # that wait here, a thread's of every warpgroup
    waiting = values * 512 if segments == 2 else 0
    tables = 8 * bm * (segments + 1) + 16 * bn * segments + 4 * bn
    two_places = segments == 1 or kept > bm * (bn // workers - 64) // 128
    turning = bn * 32 * (2 if two_places else 1)
    return stages * (bm * 128 + bn * 64) + waiting + tables + turning + 256 + 1024


BODY = r"""
constexpr int OWN = BN / WORKERS, PIECES = OWN / 64, VALUES = BM / 2, WAITING = PIECES * VALUES - KEPT;
constexpr int COUNT_BYTES = BM * 128, STAGE_BYTES = COUNT_BYTES + BN * 64, WARPS = 4 * WORKERS;
constexpr int GROUPS = 2 * PIECES, PARTS = BM / 16, TURNING = PIECES * 512;
constexpr int TURNS = SEGMENTS == 2 && KEPT <= (PIECES - 1) * VALUES ? 1 : 2;
static_assert(PIECES == 1 || PIECES == 2, "a piece is 64 outputs, of which a warp handles 16");
static_assert(KEPT % 4 == 0 && KEPT <= PIECES * VALUES, "sums wait in fours");
static_assert(STAGES >= 2 && 16 * STAGES + 16 <= 256 && STAGE_BYTES % 1024 == 0, "the ring");
constexpr bool IN_PAIRS = OUT != 0 && OUT != INTEGERS;  // outputs of 16 bits

struct Tile { int m, n; };
// Rasters of `height` tiles along the rows: what runs at a time shares operands in the L2 cache.
// With SPLIT = 2 a tile of that raster is two of the kernel, neighbours along the outputs.
INLINE Tile tile_at(int index, int tiles_m, int tiles_n, int height) {
  const int whole = index / SPLIT;
  const int first = whole / (height * tiles_n) * height, tall = min(tiles_m - first, height);
  const int inside = whole % (height * tiles_n);
  return {(first + inside % tall) * BM, (inside / tall * SPLIT + index % SPLIT) * BN};
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
    int height, int first_tile, int last_tile) {
  extern __shared__ unsigned char unaligned[];
  unsigned char* memory = unaligned + (-shared_address(unaligned) & 1023);  // still known as shared
  unsigned char* after_ring = memory + STAGES * STAGE_BYTES;
  int4* waiting = (int4*)after_ring;
  unsigned char* after_waiting = after_ring + (SEGMENTS == 2 ? WAITING * 512 * WORKERS : 0);
  // Of two rows: s, s, z, z; sums of counts of the first segment, of the second; s, s, z, z of the second.
  int4* row_table = (int4*)after_waiting;                         // [BM / 2][SEGMENTS + 1]
  int4* column_table = row_table + BM / 2 * (SEGMENTS + 1);       // [SEGMENTS][BN]: sw, zu, row sum, shift
  float* bias_table = (float*)(column_table + SEGMENTS * BN);
  unsigned char* turning = (unsigned char*)(bias_table + BN);     // TURNS times, of every warp, TURNING bytes
  const unsigned base = shared_address(memory);
  const unsigned full = shared_address(turning + WARPS * TURNS * TURNING), empty = full + 8 * STAGES;
  const unsigned table_full = empty + 8 * STAGES, table_empty = table_full + 8;
  const int group_of_warps = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int tiles_m = (rows + BM - 1) / BM, tiles_n = (columns + BN * SPLIT - 1) / (BN * SPLIT);
  const int blocks = width / 128, base_blocks = SEGMENTS == 2 ? segments[4] / 128 : blocks;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, WARPS);
    }
    barrier_init(table_full, 32);
    barrier_init(table_empty, WARPS);
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
      for (int index = first_tile + blockIdx.x; index < last_tile; index += gridDim.x) {
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
    } else if (warp == 1) {  // tables
      int parity = 1;
      for (int index = first_tile + blockIdx.x; index < last_tile; index += gridDim.x, parity ^= 1) {
        const Tile tile = tile_at(index, tiles_m, tiles_n, height);
        barrier_wait(table_empty, parity);
        for (int s = 0; s < SEGMENTS; s++) {
          const int weight_group = segments[4 * s + 3];
          for (int i = lane; i < BN; i += 32) {
            const int n = min(tile.n + i, columns - 1), of = n * weight_groups + weight_group;
            const unsigned to = shared_address(column_table + s * BN + i);
            copy_4(to, scale + of);
            copy_4(to + 4, weight_zero + of);
            copy_4(to + 8, row_sum + n * SEGMENTS + s);
            if (SHIFT) copy_4(to + 12, shift + n * SEGMENTS + s);
            if (BIAS && s == 0) copy_4(shared_address(bias_table + i), bias + n);
          }
        }
        wait_for_kernel_in_front();  // weights do not depend on it
        for (int s = 0; s < SEGMENTS; s++) {
          const int group = segments[4 * s + 2];
          for (int i = lane; i < BM; i += 32) {
            const int m = min(tile.m + i, rows - 1), of = m * groups + group;
            const unsigned to = shared_address(row_table + i / 2 * (SEGMENTS + 1)) + i % 2 * 4;
            copy_4(to + s * 32, threshold + of);
            copy_4(to + s * 32 + 8, zero_point + of);
            copy_4(to + 16 + s * 8, count_sum + m * SEGMENTS + s);
          }
        }
        commit_copies();
        const int last_m = RESIDUAL && tile.n < columns ? min(tile.m + BM, rows) : 0;
        for (int m = tile.m + lane; m < last_m; m += 32) {
          constexpr int BYTES = OUT == 0 ? 4 : 2;
          fetch((const unsigned char*)residual + ((i64)m * columns + tile.n) * BYTES,
                min(BN, columns - tile.n) * BYTES);
        }
        finish_copies<0>();
        barrier_arrive(table_full);
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
    int kept[SEGMENTS == 2 && KEPT > 0 ? KEPT : 1];
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
          not_before(packed[j][e]);
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
      release();
    };
    // The outputs of a row that a warp makes are CHUNKS times 16 bytes; it stores LINES rows at a time.
    constexpr int CHUNKS = 2 * PIECES, LINES = 32 / CHUNKS;
    const int line = lane / CHUNKS, chunk = lane % CHUNKS;
    // What a lane adds to the outputs that it stores of 16 rows; asked for ahead.
    uint4 added[PIECES];
    auto load_residual = [&](Tile tile, int j) {
#pragma unroll
      for (int p = 0; p < PIECES; p++) {
        const int at_m = tile.m + 16 * j + LINES * p + line, at_n = tile.n + first_output + chunk * 8;
        if (at_m < rows && at_n < columns)
          added[p] = *(const uint4*)((const unsigned short*)residual + (i64)at_m * columns + at_n);
      }
    };
    auto far_at = [&](int position) {
      return waiting + ((thread / 32) * (WAITING / 4) + (position - KEPT) / 4) * 32;
    };
    // Where the outputs of 16 rows, number j, are transposed: in turn in two places, or where the sums of the 16 rows
    // before have waited, those of the last piece.
    auto turning_at = [&](int j) {
      if (TURNS == 1 && j > 0) return (unsigned char*)far_at((PIECES - 1) * VALUES + 8 * (j - 1));
      return turning + (thread / 32) * TURNING + j % TURNS * (WARPS * TURNING);
    };
    auto store_rows = [&](Tile tile, int j) {
      const unsigned char* from = turning_at(j);
      uint4 eight[PIECES];
#pragma unroll
      for (int p = 0; p < PIECES; p++)
        eight[p] = *(const uint4*)(from + turned(chunk / 2, LINES * p + line, chunk % 2));
#pragma unroll
      for (int p = 0; p < PIECES; p++) {
        const int at_m = tile.m + 16 * j + LINES * p + line, at_n = tile.n + first_output + chunk * 8;
        const uint4 own = eight[p], more = added[p];
        const uint4 all = RESIDUAL ? uint4{sums(own.x, more.x), sums(own.y, more.y),
                                           sums(own.z, more.z), sums(own.w, more.w)}
                                   : own;
        if (at_m < rows && at_n < columns)
          *(uint4*)((unsigned short*)out + (i64)at_m * columns + at_n) = all;
      }
      if (RESIDUAL && j + 1 < PARTS) load_residual(tile, j + 1);
    };
    if (RESIDUAL) wait_for_kernel_in_front();
    for (int index = first_tile + blockIdx.x; index < last_tile; index += gridDim.x, table_parity ^= 1) {
      const Tile tile = tile_at(index, tiles_m, tiles_n, height);
      if (SEGMENTS == 2) {
        multiply_segment(blocks - base_blocks);
#pragma unroll
        for (int p = 0; p < PIECES; p++)
#pragma unroll
          for (int v = 0; v < VALUES; v += 4) {
            const int position = p * VALUES + v;
            int four[4];
#pragma unroll
            for (int e = 0; e < 4; e++) four[e] = finished(acc[p][v + e]);
            if (position < KEPT) {
#pragma unroll
              for (int e = 0; e < 4; e++) kept[position + e] = four[e];
            } else {
              far_at(position)[lane] = make_int4(four[0], four[1], four[2], four[3]);
            }
          }
      }
      multiply_segment(base_blocks);
      barrier_wait(table_full, table_parity);
      if (RESIDUAL && IN_PAIRS) load_residual(tile, 0);
      int4 of_column[PIECES][2][SEGMENTS];  // zu and the row sum with the sign that they are added with
      float add[PIECES][2];
#pragma unroll
      for (int p = 0; p < PIECES; p++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          add[p][e] = BIAS ? bias_table[first_output + p * 16 + 8 * e + g] : 0.0f;
#pragma unroll
          for (int s = 0; s < SEGMENTS; s++) {
            const int4 column = column_table[s * BN + first_output + p * 16 + 8 * e + g];
            of_column[p][e][s] = make_int4(column.x, -column.y, -column.z, column.w);
          }
        }
      int4 of_row[SEGMENTS + 1];
#pragma unroll
      for (int q = 0; q <= SEGMENTS; q++) of_row[q] = row_table[t * (SEGMENTS + 1) + q];
#pragma unroll
      for (int j = 0; j < PARTS; j++) {
        unsigned pairs[PIECES][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int m = 16 * j + 8 * i + 2 * t, v = 8 * j + 4 * i;
          int4 row[SEGMENTS + 1];
#pragma unroll
          for (int q = 0; q <= SEGMENTS; q++) row[q] = of_row[q];
          if (i == 0 || j + 1 < PARTS)  // the next rows
#pragma unroll
            for (int q = 0; q <= SEGMENTS; q++)
              of_row[q] = row_table[(m / 2 + 4) * (SEGMENTS + 1) + q];
#pragma unroll
          for (int p = 0; p < PIECES; p++) {
            const int position = p * VALUES + v;
            int other[4] = {0, 0, 0, 0};
            if (SEGMENTS == 2 && position < KEPT) {
#pragma unroll
              for (int e = 0; e < 4; e++) other[e] = kept[position + e];
            } else if (SEGMENTS == 2) {
              const int4 four = far_at(position)[lane];
              other[0] = four.x, other[1] = four.y, other[2] = four.z, other[3] = four.w;
            }
            float value[4];
#pragma unroll
            for (int s = SEGMENTS - 1; s >= 0; s--)
#pragma unroll
              for (int e = 0; e < 4; e++) {
                const int4 column = of_column[p][e / 2][s], factors = row[2 * s], counted = row[1];
                const int zero = e % 2 ? factors.w : factors.z;
                const int count = s == 0 ? (e % 2 ? counted.y : counted.x) : (e % 2 ? counted.w : counted.z);
                const int scale_of = JOINT ? of_column[p][e / 2][0].x : column.x;
                const int zero_of = JOINT ? of_column[p][e / 2][0].y : column.y;
                const int a = (s == 1 ? other[e] : finished(acc[p][v + e])) + zero * column.z +
                              zero_of * count + (SHIFT ? column.w : 0);
                if (OUT == INTEGERS) {
                  const int at_m = tile.m + m + e % 2;
                  const int at_n = tile.n + first_output + p * 16 + 8 * (e / 2) + g;
                  if (at_m < rows && at_n < columns)
                    ((int*)out)[((i64)s * rows + at_m) * columns + at_n] = a;
                  continue;
                }
                const float term = scaled(__int_as_float(e % 2 ? factors.y : factors.x), a,
                                          __int_as_float(scale_of));
                value[e] = s == 1 || SEGMENTS == 1 ? term : __fadd_rn(term, value[e]);
              }
            if (OUT == INTEGERS) continue;
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
        if (!IN_PAIRS) continue;
        // Transpose 16 outputs x 16 rows a piece: neighbours in memory become neighbours in a warp.
        if (j > 0) store_rows(tile, j - 1);
        const int lane_row = lane / 16 * 8 + lane % 8, lane_chunk = lane / 8 % 2;
#pragma unroll
        for (int p = 0; p < PIECES; p++)
          store_transposed(shared_address(turning_at(j) + turned(p, lane_row, lane_chunk)), pairs[p]);
        __syncwarp();
      }
      if (IN_PAIRS) store_rows(tile, PARTS - 1);
      __syncwarp();
      if (lane == 0) barrier_arrive(table_empty);
    }
  }
}
"""

SOURCE = PREAMBLE + PRIMITIVES + SHARED + BODY
