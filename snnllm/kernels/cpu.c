/* Collapsed spiking linear on the CPU: encode float rows to spike counts, multiply the counts by
 * integer weight levels, scale the exact int32 accumulators back to float.
 *
 * Contract (the reference backend is the judge; every result is equal bit for bit):
 *   lo = min(0, min x), hi = max(0, max x)                     per row and channel group
 *   s = max((hi - lo) / capacity, 1e-5)                        float32, IEEE division
 *   z = clip(round_half_even(-lo / s), 0, capacity)
 *   q = clip(floor(x / s + (z + 0.5)), 0, capacity)
 *   A[seg] = sum_k (q - z) (w - zw) = sum_k q w' - sum(q) c1 - z c2,   c1 = zw + shift of w',
 *                                                                      c2 = sum_k (w - zw)
 *   y = sum_seg (s * float(A)) * sw + bias                     in this order
 * Compile with -ffp-contract=off: a fused multiply-add would round differently.
 *
 * Intermediate integers may wrap modulo 2^32 (unsigned arithmetic); A itself fits int32, which
 * LinearSpec has checked.
 *
 * Packed weight, [n_padded / 8][k_padded / 8][bytes], 8 outputs ("lanes") x 8 channels ("octet"):
 *   NIBBLE  32 bytes  byte 4 * lane + i holds channel i (low nibble) and 4 + i (high), level + 8
 *   BYTE    64 bytes  byte 32 * half + 4 * lane + i holds channel 4 * half + i
 *   WIDE    64 bytes  byte 16 * pair + 2 * lane + i holds channel 2 * pair + i
 * Counts are uint8 rows for NIBBLE and BYTE, int16 rows for WIDE. Every segment starts at an octet;
 * the padding has count 0. A lane is thus 32 bits everywhere, and a broadcast of 32 bits of counts
 * meets 8 outputs: vpmaddubsw (u8 x s8, pairs summed in int16) or vpmaddwd (int16, pairs in int32).
 */
#include "cpu_encode.h"
#include "cpu_tile.h"

/* ---------------------------------------------------------------- epilogue */

/* Turns raw sums of one row into centred accumulators. */
INLINE void centre(int32_t *restrict raw, const int32_t *restrict c1, const int32_t *restrict c2,
                   int32_t count_sum, int32_t zero) {
    for (int i = 0; i < COLUMNS; i++)
        raw[i] = (int32_t)((uint32_t)raw[i] - (uint32_t)count_sum * (uint32_t)c1[i] -
                           (uint32_t)zero * (uint32_t)c2[i]);
}

/* One tile of `rows` x 32 outputs: y float [m][n], or the accumulators int32 [segments][m][n]. */
static void run_tile(const Layer *layer, Rows encoded, int64_t m, int64_t row, int rows,
                     int64_t column, float *y, int32_t *accumulator) {
    const int64_t octet_bytes = layer->layout == NIBBLE ? 32 : 64;
    const int64_t block_stride = layer->k_padded / OCTET * octet_bytes;
    const int64_t bytes = count_bytes(layer);
    const int64_t left = layer->n - column < COLUMNS ? layer->n - column : COLUMNS;
    int32_t raw[ROWS * COLUMNS];
    float total[ROWS * COLUMNS];
    for (int64_t i = 0; i < layer->segments; i++) {
        const Segment *seg = layer->segment + i;
        const int64_t at = i * layer->n_padded + column;
        memset(raw, 0, sizeof(int32_t) * (size_t)(rows * COLUMNS));
        tile_raw(layer, seg, rows,
                 encoded.count + (row * layer->k_padded + seg->padded_start) * bytes,
                 layer->weight + column / LANES * block_stride +
                     seg->padded_start / OCTET * octet_bytes,
                 block_stride, raw);
        for (int r = 0; r < rows; r++) {
            const int64_t g = (row + r) * layer->groups + seg->act_group;
            centre(raw + r * COLUMNS, layer->count_coefficient + at, layer->zero_coefficient + at,
                   encoded.sum[(row + r) * layer->segments + i], encoded.zero_point[g]);
            if (accumulator) {
                memcpy(accumulator + (i * m + row + r) * layer->n + column, raw + r * COLUMNS,
                       sizeof(int32_t) * (size_t)left);
                continue;
            }
            const float s = encoded.threshold[g];
            const float *scale = layer->scale + at;
            float *t = total + r * COLUMNS;
            for (int j = 0; j < COLUMNS; j++) {
                const float term = (s * (float)raw[r * COLUMNS + j]) * scale[j];
                t[j] = i == 0 ? term : t[j] + term;
            }
        }
    }
    for (int r = 0; r < rows && y; r++) {
        float *t = total + r * COLUMNS;
        for (int j = 0; layer->bias && j < COLUMNS; j++) t[j] += layer->bias[column + j];
        memcpy(y + (row + r) * layer->n + column, t, sizeof(float) * (size_t)left);
    }
}

/* ------------------------------------------------------------ entry points */

/* One block of scratch memory for m rows; *memory is to be freed. */
static int allocate_rows(const Layer *layer, int64_t m, int threads, Rows *rows, float **gathered,
                         void **memory) {
    const int64_t words = m * (2 * layer->groups + layer->segments) + threads * layer->k;
    char *at = *memory = malloc((size_t)(words * 4 + m * layer->k_padded * count_bytes(layer) + 64));
    if (!at) return 0;
    rows->threshold = (float *)at;
    rows->zero_point = (int32_t *)(at += m * layer->groups * 4);
    rows->sum = (int32_t *)(at += m * layer->groups * 4);
    *gathered = (float *)(at += m * layer->segments * 4);
    rows->count = (uint8_t *)(at + threads * layer->k * 4);
    return 1;
}

#ifdef _OPENMP
#include <omp.h>
static int thread_index(void) { return omp_get_thread_num(); }
#else
static int thread_index(void) { return 0; }
#endif

/* x float [m][k] -> y float [m][n] (or NULL), or accumulator int32 [segments][m][n] (or NULL). */
int snn_linear(const Layer *layer, const float *x, float *y, int32_t *accumulator, int64_t m,
               int threads) {
    Rows rows;
    float *gathered;
    void *memory;
    int finite = 1;
    if (m * layer->n * layer->k < PARALLEL_WORK) threads = 1;
    if (!allocate_rows(layer, m, threads, &rows, &gathered, &memory)) return NO_MEMORY;
    const int64_t columns = layer->n_padded / COLUMNS, row_blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; row++)
            if (!encode_row(layer, x, row, rows, gathered + thread_index() * layer->k)) {
#pragma omp atomic write
                finite = 0;
            }
        /* The barrier of the loop above makes every row and `finite` visible. */
        if (finite) {
#pragma omp for schedule(dynamic) nowait
            for (int64_t task = 0; task < columns * row_blocks; task++) {
                const int64_t column = task % columns * COLUMNS;
                int64_t row = task / columns * ROW_BLOCK;
                const int64_t end = row + ROW_BLOCK < m ? row + ROW_BLOCK : m;
                for (; row + ROWS <= end; row += ROWS)
                    run_tile(layer, rows, m, row, ROWS, column, y, accumulator);
                for (; row < end; row++)
                    run_tile(layer, rows, m, row, 1, column, y, accumulator);
            }
        }
    }
    free(memory);
    return finite ? OK : NON_FINITE;
}

/* x float [m][k] -> counts [m][k] in original channel order (int16 when WIDE, else uint8),
 * threshold and zero_point [m][groups]. */
int snn_encode(const Layer *layer, const float *x, void *count, float *threshold,
               int32_t *zero_point, int64_t m, int threads) {
    Rows rows;
    float *gathered;
    void *memory;
    int finite = 1;
    const int64_t bytes = count_bytes(layer);
    if (m * layer->k < PARALLEL_WORK) threads = 1;
    if (!allocate_rows(layer, m, threads, &rows, &gathered, &memory)) return NO_MEMORY;
    rows.threshold = threshold;
    rows.zero_point = zero_point;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < m; row++) {
        if (!encode_row(layer, x, row, rows, gathered + thread_index() * layer->k)) {
#pragma omp atomic write
            finite = 0;
            continue;
        }
        const uint8_t *from = rows.count + row * layer->k_padded * bytes;
        for (int64_t i = 0; i < layer->segments; i++) {
            const Segment *seg = layer->segment + i;
            for (int64_t k = seg->start; k < seg->stop; k++) {
                const int64_t at = seg->padded_start + k - seg->start;
                const int64_t to = row * layer->k + (layer->order ? layer->order[k] : k);
                if (bytes == 1) ((uint8_t *)count)[to] = from[at];
                else ((int16_t *)count)[to] = ((const int16_t *)from)[at];
            }
        }
    }
    free(memory);
    return finite ? OK : NON_FINITE;
}

/* Dot products of one int16 row with `columns` int16 rows of `length`, a multiple of 16. */
static void dot_row(const int16_t *a, const int16_t *b, int64_t length, int64_t columns,
                    int32_t *out) {
    int64_t n = 0;
#ifdef SNN_AVX2
    for (; n + 4 <= columns; n += 4) {
        const int16_t *at = b + n * length;
        __m256i sum[4];
        for (int j = 0; j < 4; j++) sum[j] = _mm256_setzero_si256();
        for (int64_t k = 0; k < length; k += 16) {
            const __m256i left = _mm256_loadu_si256((const __m256i *)(a + k));
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m256i right = _mm256_loadu_si256((const __m256i *)(at + j * length + k));
                sum[j] = _mm256_add_epi32(sum[j], _mm256_madd_epi16(left, right));
            }
        }
        const __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]),
                                                 _mm256_hadd_epi32(sum[2], sum[3]));
        _mm_storeu_si128((__m128i *)(out + n),
                         _mm_add_epi32(_mm256_castsi256_si128(halves),
                                       _mm256_extracti128_si256(halves, 1)));
    }
#endif
    for (; n < columns; n++) {
        int32_t sum = 0;
        for (int64_t k = 0; k < length; k++) sum += (int32_t)a[k] * b[n * length + k];
        out[n] = sum;
    }
}

/* Copies int8 rows of k to int16 rows of `length`, zero filled. */
static void widen_rows(const int8_t *from, int64_t rows, int64_t k, int64_t length, int16_t *to) {
    for (int64_t r = 0; r < rows; r++, from += k, to += length) {
        for (int64_t i = 0; i < k; i++) to[i] = from[i];
        for (int64_t i = k; i < length; i++) to[i] = 0;
    }
}

/* a int8 [batch][m][k], b int8 [batch][n][k] -> out int32 [batch][m][n] = a b^T. */
int snn_int_bmm(const int8_t *a, const int8_t *b, int32_t *out, int64_t batch, int64_t m, int64_t n,
                int64_t k, int threads) {
    const int64_t length = (k + 15) / 16 * 16, blocks = (n + DOT_COLUMNS - 1) / DOT_COLUMNS;
    if (batch * m * n * k < PARALLEL_WORK) threads = 1;
    int16_t *wide = malloc((size_t)((batch * m + threads * DOT_COLUMNS) * length * 2 + 64));
    if (!wide) return NO_MEMORY;
    int16_t *panels = wide + batch * m * length;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < batch * m; row++)
            widen_rows(a + row * k, 1, k, length, wide + row * length);
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < batch * blocks; task++) {
            const int64_t item = task / blocks, column = task % blocks * DOT_COLUMNS;
            const int64_t columns = n - column < DOT_COLUMNS ? n - column : DOT_COLUMNS;
            int16_t *panel = panels + thread_index() * DOT_COLUMNS * length;
            widen_rows(b + (item * n + column) * k, columns, k, length, panel);
            for (int64_t row = item * m; row < (item + 1) * m; row++)
                dot_row(wide + row * length, panel, length, columns, out + row * n + column);
        }
    }
    free(wide);
    return OK;
}
