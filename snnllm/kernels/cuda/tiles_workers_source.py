"""CUDA C++ of the warpgroups that multiply in `tiles_source`: products, and outputs of their sums."""

__all__ = ["WORKERS"]

WORKERS = r"""
    take_registers<MORE>();
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
    int kept[SUMS == 2 && KEPT > 0 ? KEPT : 1];
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
    // Sums of the second segment wait for those of the first: a piece is kept while the other one is multiplied.
    auto far_at = [&](int position) {
      return waiting + ((thread / 32) * (WAITING / 4) + (position - KEPT) / 4) * 32;
    };
    auto slabs_are_free = [&]() {
      if (IN_BOXES && lane == 0) stores_have_read();
      __syncwarp();
    };
    auto keep = [&](int p) {
      if (p == 0) slabs_are_free();
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
    };
    // A block of positions: the first of the tile, the first behind those of the second segment, or another.
    enum Place { FIRST, NEXT, OTHER };
    auto multiply_block = [&](Place place, bool more) {
      const u64 counts_here = descriptor + (u64)(stage * (STAGE_BYTES / 16));
#pragma unroll
      for (int j = 0; j < GROUPS; j++) {
        finish<1>();  // the product that reads this operand
        if (j == 1 && place != FIRST) release();
        if (place == NEXT && j % 2 == 0) {
          if (PIECES == 1) finish<0>();
          keep(j / 2);
        }
        unsigned(&a)[8] = operand[j % 2];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          not_before(packed[j][e]);
          a[e] = packed[j][e] & NIBBLES;
          a[4 + e] = packed[j][e] >> 4 & NIBBLES;
        }
        fence();
        multiply(acc[j / 2], a, counts_here + 2 * (j % 2), place == OTHER || j % 2 > 0);
        multiply(acc[j / 2], a + 4, counts_here + 2 * (j % 2) + 4, 1);
        commit();
      }
      if (++stage == STAGES) stage = 0, parity ^= 1;
      if (more) load_block();  // while the products run
    };
    auto multiply_tile = [&](auto meanwhile) {
      load_block();
      const int second = blocks - base_blocks;  // blocks of the second segment, which comes first
      for (int i = 0; i < second; i++) multiply_block(i ? OTHER : FIRST, true);
      if (SUMS == 2) multiply_block(NEXT, base_blocks > 1);
      for (int i = SUMS - 1; i < base_blocks; i++)
        multiply_block(SUMS == 2 || i ? OTHER : FIRST, i + 1 < base_blocks);
      meanwhile();  // while the last products run
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
    // Where the outputs of 16 rows, number j, are transposed: in places of their own, or where the sums of the 16 rows
    // before have waited, those of the last piece.
    auto turning_at = [&](int j) {
      if (TURNS == 1 && j > 0) return (unsigned char*)far_at((PIECES - 1) * VALUES + 8 * (j - 1));
      return turning + (thread / 32) * TURNING + (TURNS == 1 ? 0 : j) * (WARPS * TURNING);
    };
    auto store_rows = [&](Tile tile, int j) {
      const unsigned char* from = turning_at(j);
      uint4 eight[PIECES];
#pragma unroll
      for (int p = 0; p < PIECES; p++)
        eight[p] = *(const uint4*)(from + turned(LINES * p + line, chunk));
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
    // What the zero points take off a sum: q zu, z and the row sum of weights.
    auto centred = [&](int a, const int4& column, int row_sum, const int4& factors, const int4& counted, int s, int e) {
      const int second = e % 2 ? counted.w : counted.z;
      a = multiply_add(column.y, s == 0 ? e % 2 ? counted.y : counted.x : second, a);
      a = multiply_add(e % 2 ? factors.w : factors.z, row_sum, a);
      return MERGED ? multiply_add(second, column.w, a) : a;
    };
    constexpr bool AHEAD = WARPS == 4 && SUMS == 1;  // there are registers for it
    int taken[AHEAD ? PIECES * VALUES : 1];
    if (RESIDUAL) wait_for_kernel_in_front();
    for (int index = first_tile + blockIdx.x; index < last_tile; index += gridDim.x, table_parity ^= 1) {
      const Tile tile = tile_at(index, tiles_m, tiles_n, height);
      int4 of_column[PIECES][2][SUMS];  // zu and row sums with the sign that they are added with
      float add[PIECES][2];
      multiply_tile([&] {
        barrier_wait(table_full, table_parity);
#pragma unroll
        for (int p = 0; p < PIECES; p++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            add[p][e] = BIAS ? bias_table[first_output + p * 16 + 8 * e + g] : 0.0f;
#pragma unroll
            for (int s = 0; s < SUMS; s++) {
              const int4 column = column_table[s * BN + first_output + p * 16 + 8 * e + g];
              of_column[p][e][s] = make_int4(column.x, -column.y, -column.z, -column.w);
            }
          }
        if (!AHEAD) return;
#pragma unroll
        for (int v = 0; v < VALUES; v += 4) {
          const int4 *entry = row_table + (v + t) * (SUMS + 1), factors = entry[0], counted = entry[1];
#pragma unroll
          for (int p = 0; p < PIECES; p++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const int4& column = of_column[p][e / 2][0];
              const int off = centred(0, column, column.z, factors, counted, 0, e);
              taken[p * VALUES + v + e] = finished(off);
            }
        }
      });
      if (RESIDUAL && IN_PAIRS) load_residual(tile, 0);
      if (SUMS == 1) slabs_are_free();
      int4 of_row[SUMS + 1];
#pragma unroll
      for (int q = 0; q <= SUMS; q++) of_row[q] = row_table[t * (SUMS + 1) + q];
#pragma unroll
      for (int j = 0; j < PARTS; j++) {
        unsigned pairs[PIECES][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int m = 16 * j + 8 * i + 2 * t, v = 8 * j + 4 * i;
          int4 row[SUMS + 1];
#pragma unroll
          for (int q = 0; q <= SUMS; q++) row[q] = of_row[q];
          if (i == 0 || j + 1 < PARTS)  // the next rows
#pragma unroll
            for (int q = 0; q <= SUMS; q++) of_row[q] = row_table[(m / 2 + 4) * (SUMS + 1) + q];
#pragma unroll
          for (int p = 0; p < PIECES; p++) {
            const int position = p * VALUES + v;
            int other[4] = {0, 0, 0, 0};
            if (SUMS == 2 && position < KEPT) {
#pragma unroll
              for (int e = 0; e < 4; e++) other[e] = kept[position + e];
            } else if (SUMS == 2) {
              const int4 four = far_at(position)[lane];
              other[0] = four.x, other[1] = four.y, other[2] = four.z, other[3] = four.w;
            }
            float value[4];
#pragma unroll
            for (int s = SUMS - 1; s >= 0; s--)
#pragma unroll
              for (int e = 0; e < 4; e++) {
                const int4 column = of_column[p][e / 2][JOINT ? 0 : s], factors = row[2 * s];
                int a = s == 1 ? other[e] : finished(acc[p][v + e]);
                if (AHEAD) a += taken[p * VALUES + v + e];
                else a = centred(a, column, of_column[p][e / 2][s].z, factors, row[1], s, e);
                if (OUT == INTEGERS) {
                  const int at_m = tile.m + m + e % 2;
                  const int at_n = tile.n + first_output + p * 16 + 8 * (e / 2) + g;
                  if (at_m < rows && at_n < columns)
                    ((int*)out)[((i64)s * rows + at_m) * columns + at_n] = a;
                  continue;
                }
                const float term = scaled(__int_as_float(e % 2 ? factors.y : factors.x), a, __int_as_float(column.x));
                value[e] = s == SUMS - 1 ? term : __fadd_rn(term, value[e]);
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
        if (!IN_BOXES && j > 0) store_rows(tile, j - 1);
        const int lane_row = lane / 16 * 8 + lane % 8, lane_chunk = lane / 8 % 2;
#pragma unroll
        for (int p = 0; p < PIECES; p++)
          store_transposed(shared_address(turning_at(j) + turned(lane_row, 2 * p + lane_chunk)), pairs[p]);
        if (IN_BOXES) show_to_stores();
        __syncwarp();
        if (IN_BOXES && lane == 0)
          box_store(&outputs, 2 * (tile.n + first_output), tile.m + 16 * j, shared_address(turning_at(j)));
      }
      if (IN_PAIRS && !IN_BOXES) store_rows(tile, PARTS - 1);
      __syncwarp();
      if (lane == 0) barrier_arrive(table_empty);
    }
    if (IN_BOXES && lane == 0) finish_stores();
"""
