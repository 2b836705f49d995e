"""CUDA C++ of the collapsed linear of many rows: asynchronous warpgroup products (wgmma), int8.

A block of threads makes tiles of BN outputs and BM rows, one after the other. One warp copies (counts and packed
weights by the copy engine into rings of blocks of 128 positions, ahead across tiles), one warp lays out the
scales and zero points of the tile, and WORKERS warpgroups multiply: packed weights go from shared memory
to registers (ldmatrix), where they are the left operand after three operations per 8 codes; the counts
are the right operand, in shared memory. While a product runs, the next operand is unpacked.

The outputs of a warpgroup come in pieces of 64, one or two. The first of two is LAG blocks ahead of the other: at the
end of a segment its sums are scaled (and stored) while the other piece multiplies, and the sums of the other piece while
the first one goes on with the next segment or tile, so that the tensor cores do not wait for either.

Of two segments the second (few salient channels) comes first; its scaled sums wait in registers and
in shared memory (KEPT of them in registers). A float sum of two does not depend on the order.

A residual of 16 bits goes to the L2 cache while the tile is multiplied, and from there, 16 rows at a time, to where
outputs are transposed, until they need the place.

Macros: BM, BN, WORKERS, COUNTS and WEIGHTS (blocks in the rings; of one piece, for weights), KEPT, LAG, SEGMENTS
(1 or 2), SHIFT, BIAS, RESIDUAL, OUT (`primitives.OUTPUTS`).
"""

from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES, SHARED

__all__ = ["BODY", "SOURCE", "pieces", "shared_bytes"]


def pieces(bn: int, workers: int) -> int:
    """Pieces of 64 outputs of a warpgroup; weights are copied in slices of one piece of every warpgroup."""
    return bn // workers // 64


def shared_bytes(
    bm: int, bn: int, workers: int, counts: int, weights: int, kept: int, segments: int
) -> int:
    """Shared memory of a block: rings, waiting sums, tables, transposition, barriers, alignment."""
    values = bm * bn // 128 - workers * kept  # sums of all warpgroups, a thread's each
    waiting = values * 512 if segments == 2 else 0
    table = segments * 16 * (bm + bn) + 4 * bn
    rings = counts * bm * 128 + weights * (bn // pieces(bn, workers)) * 64
    return rings + waiting + table + workers * 4 * 512 + 256 + 1024


BODY = r"""
constexpr int PIECES = BN / WORKERS / 64, VALUES = BM / 2, WAITING = PIECES * VALUES - KEPT;
constexpr int SLICE = BN / PIECES, COUNT_BYTES = BM * 128, WEIGHT_BYTES = SLICE * 64;
constexpr int WARPS = 4 * WORKERS, PARTS = BM / 16;
constexpr bool IN_PAIRS = OUT != 0 && OUT != INTEGERS;  // outputs of 16 bits

struct Tile { int m, n; };
// Rasters of `height` tiles along the rows: what runs at a time shares operands in the L2 cache.
INLINE Tile tile_at(int index, int tiles_m, int tiles_n, int height) {
  const int first = index / (height * tiles_n) * height, tall = min(tiles_m - first, height);
  const int inside = index % (height * tiles_n);
  return {(first + inside % tall) * BM, inside / tall * BN};
}

template <int SIZE> struct Ring {
  int at = 0, parity;
  INLINE Ring(int parity) : parity(parity) {}
  INLINE void next() { if (++at == SIZE) at = 0, parity ^= 1; }
};

// Blocks that are multiplied for a segment of so many: what is short of LAG are zeros.
INLINE int at_least(int blocks) { return PIECES == 1 || blocks > LAG ? blocks : LAG; }
// The order in which pieces multiply the blocks of a segment.
struct Step { int piece, block; };
INLINE Step step_at(int index, int blocks) {
  if (PIECES == 1 || index < LAG) return {0, index};
  if (index >= 2 * blocks - LAG) return {1, index - blocks};
  return {(index - LAG) % 2, (index - LAG) / 2 + (index - LAG + 1) % 2 * LAG};
}

extern "C" __global__ void __launch_bounds__(128 + 128 * WORKERS, 1) linear_tiles(
    const __grid_constant__ Map counts, const __grid_constant__ Map weights, const float* threshold,
    const int* zero_point, const int* count_sum, const int* segments, const float* scale,
    const int* weight_zero, const int* row_sum, const int* shift, const float* bias,
    const void* residual, void* out, int rows, int columns, int width, int groups, int weight_groups,
    int height) {
  extern __shared__ unsigned char unaligned[];
  unsigned char* memory = unaligned + (-shared_address(unaligned) & 1023);  // still known as shared
  float* waiting = (float*)(memory + COUNTS * COUNT_BYTES + WEIGHTS * WEIGHT_BYTES);
  int4* row_table = (int4*)(waiting + (SEGMENTS == 2 ? WAITING * 128 * WORKERS : 0));  // [SEGMENTS][BM]: s, z, sum
  int4* column_table = row_table + SEGMENTS * BM;      // [SEGMENTS][BN]: sw, zu, row sum, shift
  float* bias_table = (float*)(column_table + SEGMENTS * BN);
  unsigned char* turning = (unsigned char*)(bias_table + BN);  // 512 bytes a warp
  const unsigned base = shared_address(memory), weight_base = base + COUNTS * COUNT_BYTES;
  const unsigned count_full = shared_address(turning + WARPS * 512);
  const unsigned count_empty = count_full + 8 * COUNTS, weight_full = count_empty + 8 * COUNTS;
  const unsigned weight_empty = weight_full + 8 * WEIGHTS, table_full = weight_empty + 8 * WEIGHTS;
  const unsigned table_empty = table_full + 8 * SEGMENTS;
  const int group_of_warps = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int tiles_m = (rows + BM - 1) / BM, tiles_n = (columns + BN - 1) / BN;
  const int tiles = tiles_m * tiles_n;
  const int blocks = width / 128, base_blocks = SEGMENTS == 2 ? segments[4] / 128 : blocks;
  if (threadIdx.x == 0) {
    for (int i = 0; i < COUNTS; i++) {
      barrier_init(count_full + 8 * i, 1);
      barrier_init(count_empty + 8 * i, WARPS);
    }
    for (int i = 0; i < WEIGHTS; i++) {
      barrier_init(weight_full + 8 * i, 1);
      barrier_init(weight_empty + 8 * i, WARPS);
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
      Ring<COUNTS> of_counts(1);
      Ring<WEIGHTS> of_weights(1);
      auto copy_weights = [&](Tile tile, int piece, int block) {  // zeros behind the last block
        const unsigned full = weight_full + 8 * of_weights.at;
        barrier_wait(weight_empty + 8 * of_weights.at, of_weights.parity);
        barrier_expect(full, WEIGHT_BYTES);
        box_copy(weight_base + of_weights.at * WEIGHT_BYTES, &weights, block * 64,
                 tile.n + piece * SLICE, full);
        of_weights.next();
      };
      auto copy_counts = [&](Tile tile, int block) {
        const unsigned full = count_full + 8 * of_counts.at;
        barrier_wait(count_empty + 8 * of_counts.at, of_counts.parity);
        barrier_expect(full, COUNT_BYTES);
        box_copy(base + of_counts.at * COUNT_BYTES, &counts, block * 128, tile.m, full);
        of_counts.next();
      };
      int early = -1;  // weights copied already; they do not depend on the kernel in front
      for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile = tile_at(index, tiles_m, tiles_n, height);
        for (int s = SEGMENTS - 1; s >= 0; s--) {
          const int steps = PIECES * at_least(s == 0 ? base_blocks : blocks - base_blocks);
          auto block_at = [&](Step step) {
            if (s == 0) return step.block < base_blocks ? step.block : blocks;
            return min(base_blocks + step.block, blocks);
          };
          if (early < 0) {
            early = min(WEIGHTS, steps);
            for (int i = 0; i < early; i++) {
              const Step step = step_at(i, steps / PIECES);
              copy_weights(tile, step.piece, block_at(step));
            }
            wait_for_kernel_in_front();
          }
          for (int i = 0; i < steps; i++) {
            const Step step = step_at(i, steps / PIECES);
            if (step.piece == 0) copy_counts(tile, block_at(step));
            if (i >= early) copy_weights(tile, step.piece, block_at(step));
          }
          early = 0;
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
          wait_for_kernel_in_front();
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
    const int g = lane / 4, t = lane % 4, in_slice = worker * 64 + warp * 16;
    // ldmatrix: lanes 0-7 give the rows of the first matrix, and so on; chunks of 16 bytes, swizzled.
    const int matrix_row = in_slice + lane % 16, swizzle = matrix_row / 2 % 4;
    const unsigned weight_at = weight_base + matrix_row * 64;
    const unsigned chunk_at[2] = {(unsigned)((lane / 16) ^ swizzle) * 16,
                                  (unsigned)((2 + lane / 16) ^ swizzle) * 16};
    // A descriptor: address / 16, 1024 bytes between groups of 8 rows, swizzle of 128 bytes.
    const u64 descriptor = 1ull << 62 | (u64)(1024 / 16) << 32 | 1ull << 16 | (base >> 4);
    unsigned char* mine = turning + (thread / 32) * 512;
    int acc[PIECES][VALUES];
    float kept[SEGMENTS == 2 && KEPT > 0 ? KEPT : 1];
    unsigned packed[2][4], operand[2][8];
    Ring<COUNTS> of_counts[2] = {0, 0};  // of each piece
    Ring<WEIGHTS> of_weights(0);
    unsigned due = 0;  // barrier of the counts that the last product of both pieces reads
    auto release = [&]() {
      if (due && lane == 0) barrier_arrive(due);
      due = 0;
    };
    // Half h of a block of the piece p; a group of products runs while the operand of the next one is unpacked.
    auto multiply_half = [&](int p, int h, bool add) {
      if (h == 0) {
        if (p == 0) barrier_wait(count_full + 8 * of_counts[0].at, of_counts[0].parity);
        barrier_wait(weight_full + 8 * of_weights.at, of_weights.parity);
        const unsigned here = weight_at + of_weights.at * WEIGHT_BYTES;
        load_matrices(packed[0], here + chunk_at[0]);
        load_matrices(packed[1], here + chunk_at[1]);
      }
      finish<1>();  // of two groups, the one that reads this operand
      if (h == 1) release();
      unsigned(&a)[8] = operand[h];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        a[e] = packed[h][e] & NIBBLES;
        a[4 + e] = packed[h][e] >> 4 & NIBBLES;
      }
      const u64 counts_here = descriptor + (u64)(of_counts[p].at * (COUNT_BYTES / 16) + 2 * h);
      fence();
      multiply(acc[p], a, counts_here, add);
      multiply(acc[p], a + 4, counts_here + 4, 1);
      commit();
      if (h == 1) {
        __syncwarp();
        if (lane == 0) barrier_arrive(weight_empty + 8 * of_weights.at);
        of_weights.next();
        if (p == PIECES - 1) due = count_empty + 8 * of_counts[p].at;
        of_counts[p].next();
      }
    };
    auto multiply_block = [&](int p, bool add) {
      multiply_half(p, 0, add);
      multiply_half(p, 1, true);
    };
    auto copy_residual = [&](Tile tile, int p, int j) {  // a lane copies what it adds
      const int at_m = tile.m + 16 * j + lane / 2, at_n = tile.n + p * SLICE + in_slice + lane % 2 * 8;
      if (at_m < rows && at_n < columns)
        copy_16(shared_address(mine + lane * 16),
                (const unsigned short*)residual + (i64)at_m * columns + at_n);
      commit_copies();
    };
    int4 of_column[2];
    float add_bias[2];
    auto load_columns = [&](int s, int p) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int n = p * SLICE + in_slice + 8 * e + g;
        of_column[e] = column_table[s * BN + n];
        add_bias[e] = BIAS && s == 0 ? bias_table[n] : 0.0f;
      }
    };
    // The sums of 16 rows, number j, of a piece: scaled, and kept (s = 1) or stored.
    auto convert = [&](Tile tile, int s, int p, int j) {
      unsigned pairs[4];
      const int first_n = tile.n + p * SLICE + in_slice;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int m = 16 * j + 8 * i + 2 * t, v = 8 * j + 4 * i, position = p * VALUES + v;
        const int4 of_row[2] = {row_table[s * BM + m], row_table[s * BM + m + 1]};
        float value[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int4 row = of_row[e % 2], column = of_column[e / 2];
          const int a =
              finished(acc[p][v + e]) - row.y * column.z - column.y * row.z + (SHIFT ? column.w : 0);
          if (OUT == INTEGERS) {
            const int at_m = tile.m + m + e % 2, at_n = first_n + 8 * (e / 2) + g;
            if (at_m < rows && at_n < columns)
              ((int*)out)[((i64)s * rows + at_m) * columns + at_n] = a;
          } else {
            value[e] = scaled(__int_as_float(row.x), a, __int_as_float(column.x));
          }
        }
        if (OUT == INTEGERS) continue;
        float4* far =
            (float4*)waiting + ((thread / 32) * (WAITING / 4) + (position - KEPT) / 4) * 32 + lane;
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
          for (int e = 0; e < 4; e++) value[e] = __fadd_rn(value[e], add_bias[e / 2]);
        if (OUT == 0) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int at_m = tile.m + m + e % 2, at_n = first_n + 8 * (e / 2) + g;
            const i64 at = (i64)at_m * columns + at_n;
            if (at_m < rows && at_n < columns)
              ((float*)out)[at] = RESIDUAL ? plus(value[e], residual, at) : value[e];
          }
        } else {
          pairs[2 * i] = pair(value[0], value[1]);
          pairs[2 * i + 1] = pair(value[2], value[3]);
        }
      }
      if (s == 1 || !IN_PAIRS) return;
      uint4 more;
      if (RESIDUAL) {
        finish_copies<0>();
        more = *(const uint4*)(mine + lane * 16);
      }
      // Transpose 16 outputs x 16 rows: neighbours in memory become neighbours in a warp.
      const int lane_row = lane / 16 * 8 + lane % 8, lane_chunk = lane / 8 % 2;
      __syncwarp();
      store_transposed(
          shared_address(mine + lane_row * 32 + (lane_chunk ^ lane_row / 4 % 2) * 16), pairs);
      __syncwarp();
      const int at_m = tile.m + 16 * j + lane / 2, at_n = first_n + lane % 2 * 8;
      uint4 line = *(const uint4*)(mine + lane / 2 * 32 + (lane % 2 ^ lane / 8 % 2) * 16);
      if (RESIDUAL)
        line = {sums(line.x, more.x), sums(line.y, more.y), sums(line.z, more.z), sums(line.w, more.w)};
      if (at_m < rows && at_n < columns)
        *(uint4*)((unsigned short*)out + (i64)at_m * columns + at_n) = line;
      if (RESIDUAL && j + 1 < PARTS) {
        __syncwarp();
        copy_residual(tile, p, j + 1);
      }
    };
    auto start_residual = [&](Tile tile, int s, int p) {
      if (RESIDUAL && IN_PAIRS && s == 0) {
        __syncwarp();
        copy_residual(tile, p, 0);
      }
    };
    auto release_table = [&](int s) {
      __syncwarp();
      if (lane == 0) barrier_arrive(table_empty + 8 * s);
    };
    // Convert the piece q of a segment s while the other piece multiplies LAG blocks.
    auto beside = [&](bool add, Tile tile, int s, int q) {
#pragma unroll
      for (int j = 0; j < PARTS; j++) {
#pragma unroll
        for (int i = j * 2 * LAG / PARTS; i < (j + 1) * 2 * LAG / PARTS; i++)
          multiply_half(1 - q, i % 2, add || i > 0);
        if (j == 0) {
          finish<1>();  // what came before the first of these
          load_columns(s, q);
        }
        convert(tile, s, q, j);
      }
    };
    if (RESIDUAL) wait_for_kernel_in_front();
    int table_parity = 0;
    Tile before = {rows, columns};  // of the tile before, the last piece is still to be converted
    for (int index = blockIdx.x; index < tiles; index += gridDim.x, table_parity ^= 1) {
      const Tile tile = tile_at(index, tiles_m, tiles_n, height);
#pragma unroll
      for (int turn = 0; turn < SEGMENTS; turn++) {
        const int s = SEGMENTS - 1 - turn, many = at_least(s == 0 ? base_blocks : blocks - base_blocks);
        if (PIECES == 1) {
          start_residual(tile, s, 0);
          for (int i = 0; i < many; i++) multiply_block(0, i > 0);
          finish<0>();
          release();
          barrier_wait(table_full + 8 * s, table_parity);
          load_columns(s, 0);
#pragma unroll
          for (int j = 0; j < PARTS; j++) convert(tile, s, 0, j);
          release_table(s);
          continue;
        }
        const int other = turn == 0 ? 0 : 1;
        beside(false, turn > 0 ? tile : before, other, 1);
        if (turn > 0 || before.m < rows) release_table(other);
        start_residual(tile, s, 0);
        for (int i = LAG; i < many; i++) {
          multiply_block(0, true);
          multiply_block(1, i > LAG);
        }
        barrier_wait(table_full + 8 * s, table_parity);
        beside(many > LAG, tile, s, 0);
        start_residual(tile, s, 1);
      }
      before = tile;
      finish<0>();  // else the compiler, which moves sums here, lets every product wait for the one in front
    }
    if (PIECES == 2) {
      load_columns(0, 1);
#pragma unroll
      for (int j = 0; j < PARTS; j++) convert(before, 0, 1, j);
    }
  }
}
"""

SOURCE = PREAMBLE + PRIMITIVES + SHARED + BODY
