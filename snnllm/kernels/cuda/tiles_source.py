"""CUDA C++ of the collapsed linear of many rows: asynchronous warpgroup products (wgmma), int8.

A block of threads makes tiles of BN outputs and BM rows, one after the other. One warp copies (counts and packed
weights by the copy engine into a ring of stages of 128 positions, ahead across tiles), one warp lays out the
scales and zero points of the tile, and WORKERS warpgroups multiply: packed weights go from shared memory
to registers (ldmatrix), where they are the left operand after three operations per 8 codes; the counts
are the right operand, in shared memory. While a product runs, the next operand is unpacked.

Of two segments the second (few salient channels) comes first; its sums wait in registers and in shared memory (KEPT
of them in registers) for those of the first, and are scaled with them. A float sum of two does not depend on the order.
Where the thresholds of both are equal (MERGED), they have one sum.

A residual goes to the L2 cache while the tile is multiplied, one of 16 bits from there to registers, 16 rows at a time.
The tiles from `first_tile` up to `last_tile` are made: the last ones may be split for another launch (SPLIT = 2).

Macros: BM, BN, WORKERS, STAGES, KEPT, SPLIT, SEGMENTS (1 or 2), MERGED (then JOINT, too), BIAS, RESIDUAL, JOINT (one
scale and zero point of weights for all segments), OUT (`primitives.OUTPUTS`).
"""

from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES, SHARED
from snnllm.kernels.cuda.tiles_workers_source import WORKERS

__all__ = ["BODY", "SOURCE", "shared_bytes"]


def shared_bytes(
    bm: int, bn: int, workers: int, stages: int, kept: int, segments: int, merged: int
) -> int:
    """Shared memory of a block: ring, waiting sums, tables, transposition, barriers, alignment."""
    values = bm * bn // 128 - workers * kept  # that wait here, a thread's of every warpgroup
    sums = segments - merged  # of an output
    waiting = values * 512 if sums == 2 else 0
    tables = 8 * bm * (sums + 1) + 16 * bn * sums + 4 * bn
    elsewhere = sums == 2 and kept <= bm * (bn // workers - 64) // 128  # all but the first 16 rows
    turning = bn * 32 * (1 if elsewhere else bm // 16)
    return stages * (bm * 128 + bn * 64) + waiting + tables + turning + 256 + 1024


COPIES = r"""
constexpr int OWN = BN / WORKERS, PIECES = OWN / 64, VALUES = BM / 2, WAITING = PIECES * VALUES - KEPT;
constexpr int COUNT_BYTES = BM * 128, STAGE_BYTES = COUNT_BYTES + BN * 64, WARPS = 4 * WORKERS;
constexpr int GROUPS = 2 * PIECES, PARTS = BM / 16, TURNING = PIECES * 512;
constexpr int SUMS = SEGMENTS - MERGED;
constexpr int TURNS = SUMS == 2 && KEPT <= (PIECES - 1) * VALUES ? 1 : PARTS;
static_assert(PIECES == 1 || PIECES == 2, "a piece is 64 outputs, of which a warp handles 16");
static_assert(KEPT % 4 == 0 && KEPT <= PIECES * VALUES, "sums wait in fours");
// Registers of a thread when it starts, of one that copies, and of one that multiplies; who waits for more than the
// block has waits for ever. One warpgroup, or three, leave room for the kernel behind, which starts early where it has
// some: half of the multiprocessor's registers, or those of 256 threads with 48 (a residual takes more).
constexpr int THREADS = 128 + 32 * WARPS, REGISTERS = WARPS == 4 ? 128 : WARPS == 8 ? 168 : RESIDUAL ? 128 : 104;
constexpr int LESS = WARPS == 12 ? 32 : 40, MORE = WARPS == 4 ? 216 : WARPS == 8 ? 232 : RESIDUAL ? 160 : 128;
static_assert(128 * LESS + 32 * WARPS * MORE <= REGISTERS * THREADS, "registers");
static_assert(STAGES >= 2 && 16 * STAGES + 16 <= 256 && STAGE_BYTES % 1024 == 0, "the ring");
constexpr bool IN_PAIRS = OUT != 0 && OUT != INTEGERS;  // outputs of 16 bits
constexpr bool IN_BOXES = IN_PAIRS && !RESIDUAL;        // the copy engine stores them

struct Tile { int m, n; };
// Rasters of `height` tiles along the rows: what runs at a time shares operands in the L2 cache.
// With SPLIT = 2 a tile of that raster is two of the kernel, neighbours along the outputs.
INLINE Tile tile_at(int index, int tiles_m, int tiles_n, int height) {
  const int whole = index / SPLIT;
  const int first = whole / (height * tiles_n) * height, tall = min(tiles_m - first, height);
  const int inside = whole % (height * tiles_n);
  return {(first + inside % tall) * BM, (inside / tall * SPLIT + index % SPLIT) * BN};
}

// Where a chunk of 8 outputs lies in a slab, 16 rows of 2 PIECES chunks: as boxes have it, without conflicts of banks.
INLINE int turned(int row, int chunk) {
  return row * 32 * PIECES + (chunk ^ row * PIECES / 4 % (2 * PIECES)) * 16;
}

extern "C" __global__ void __maxnreg__(REGISTERS) linear_tiles(
    const __grid_constant__ Map counts, const __grid_constant__ Map weights, const __grid_constant__ Map outputs,
    const float* threshold, const int* zero_point, const int* count_sum, const int* segments, const float* scale,
    const int* weight_zero, const int* row_sum, const float* bias,
    const void* residual, void* out, int rows, int columns, int width, int groups, int weight_groups,
    int height, int first_tile, int last_tile) {
  extern __shared__ unsigned char unaligned[];
  unsigned char* memory = unaligned + (-shared_address(unaligned) & 1023);  // still known as shared
  unsigned char* after_ring = memory + STAGES * STAGE_BYTES;
  int4* waiting = (int4*)after_ring;
  unsigned char* after_waiting = after_ring + (SUMS == 2 ? WAITING * 128 * WARPS : 0);
  // Of two rows: s, s, z, z; sums of counts of the first segment, of the second; s, s, z, z of the second.
  // Of one sum for both segments: s, s, z, z; sums of all counts, z, z of the second.
  int4* row_table = (int4*)after_waiting;                         // [BM / 2][SUMS + 1]
  int4* column_table = row_table + BM / 2 * (SUMS + 1);           // [SUMS][BN]: sw, zu, row sum, the other if there is
  float* bias_table = (float*)(column_table + SUMS * BN);
  unsigned char* turning = (unsigned char*)(bias_table + BN);     // TURNS times, of every warp, TURNING bytes
  const unsigned base = shared_address(memory);
  const unsigned full = shared_address(turning + WARPS * TURNS * TURNING), empty = full + 8 * STAGES;
  const unsigned table_full = empty + 8 * STAGES, table_empty = table_full + 8;
  const int group_of_warps = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int tiles_m = (rows + BM - 1) / BM, tiles_n = (columns + BN * SPLIT - 1) / (BN * SPLIT);
  const int blocks = width / 128, base_blocks = SUMS == 2 ? segments[4] / 128 : blocks;
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
    give_registers<LESS>();
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
        for (int s = 0; s < SUMS; s++) {
          const int weight_group = segments[4 * s + 3];
          for (int i = lane; i < BN; i += 32) {
            const int n = min(tile.n + i, columns - 1), of = n * weight_groups + weight_group;
            const unsigned to = shared_address(column_table + s * BN + i);
            copy_4(to, scale + of);
            copy_4(to + 4, weight_zero + of);
            copy_4(to + 8, row_sum + n * SEGMENTS + s);
            if (MERGED) copy_4(to + 12, row_sum + n * SEGMENTS + 1);
            if (BIAS && s == 0) copy_4(shared_address(bias_table + i), bias + n);
          }
        }
        wait_for_kernel_in_front();  // weights do not depend on it
        int both[MERGED ? BM / 32 : 1];  // asked for together
        if (MERGED)
#pragma unroll
          for (int i = 0; i < BM / 32; i++) {
            const int2 sum = ((const int2*)count_sum)[min(tile.m + 32 * i + lane, rows - 1)];
            both[i] = sum.x + sum.y;
          }
#pragma unroll
        for (int s = 0; s < SEGMENTS; s++) {
          const int group = segments[4 * s + 2];
#pragma unroll
          for (int j = 0; j < BM / 32; j++) {
            const int i = 32 * j + lane;
            const int m = min(tile.m + i, rows - 1), of = m * groups + group;
            const int* sum = count_sum + m * SEGMENTS;
            int4* entry = row_table + i / 2 * (SUMS + 1);
            const unsigned to = shared_address(entry) + i % 2 * 4;
            if (MERGED && s == 0) ((int*)(entry + 1))[i % 2] = both[j];
            if (!MERGED) copy_4(to + 16 + s * 8, sum + s);
            if (s < SUMS) copy_4(to + s * 32, threshold + of);
            copy_4(to + (MERGED ? 16 : 32) * s + 8, zero_point + of);
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
"""
END = r"""
  }
}
"""

BODY = COPIES + WORKERS + END
SOURCE = PREAMBLE + PRIMITIVES + SHARED + BODY
