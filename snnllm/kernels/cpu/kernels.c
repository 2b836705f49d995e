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
 * With commensurate thresholds, s = m u is a multiple of one unit per row, A counts units:
 *   A[seg] = m sum_k (q - z) (w - zw)
 *   y = sum_seg (u * float(A)) * sw + bias, or (u * float(sum_seg A)) * sw + bias where merged
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
#include "attention.h"
#include "encode.h"
#include "head.h"
#include "rotation.h"
#include "tile.h"

/* ---------------------------------------------------------------- epilogue */

/* Turns the raw sums of one row into centred accumulators, A = raw - sum(q) c1 - z c2.
 * 32-bit multiplication is slow, so both products are split at bit 15 and taken together by
 * vpmaddwd:  sum c1 + z c2 = (sum_low c1 + z c2_low) + ((sum_high c1 + z c2_high) << 15). */
INLINE void centre(int32_t *raw, const int32_t *low, const int32_t *high, int32_t sum,
                   int32_t zero) {
    const int32_t sum_low = sum & 0x7fff, sum_high = sum >> 15;
#ifdef SNN_AVX2
    const __m256i left_low = _mm256_set1_epi32(sum_low | zero << 16);
    const __m256i left_high = _mm256_set1_epi32(sum_high | zero << 16);
    for (int i = 0; i < COLUMNS; i += LANES) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(raw + i));
        __m256i right_low = _mm256_loadu_si256((const __m256i *)(low + i));
        __m256i right_high = _mm256_loadu_si256((const __m256i *)(high + i));
        __m256i upper = _mm256_slli_epi32(_mm256_madd_epi16(left_high, right_high), 15);
        a = _mm256_sub_epi32(a, _mm256_madd_epi16(left_low, right_low));
        _mm256_storeu_si256((__m256i *)(raw + i), _mm256_sub_epi32(a, upper));
    }
#else
    for (int i = 0; i < COLUMNS; i++) {
        const int32_t c1 = (int16_t)low[i], c2_low = low[i] >> 16, c2_high = high[i] >> 16;
        const uint32_t lower = (uint32_t)(sum_low * c1 + zero * c2_low);
        const uint32_t upper = (uint32_t)(sum_high * c1 + zero * c2_high) << 15;
        raw[i] = (int32_t)((uint32_t)raw[i] - lower - upper);
    }
#endif
}

/* raw *= multiple */
INLINE void multiply(int32_t *raw, int32_t multiple) {
    for (int j = 0; j < COLUMNS; j++) raw[j] = (int32_t)((uint32_t)raw[j] * (uint32_t)multiple);
}

/* sum = raw, or sum + raw behind the first segment */
INLINE void merge(int32_t *sum, const int32_t *raw, int first) {
    for (int j = 0; j < COLUMNS; j++)
        sum[j] = (int32_t)((uint32_t)raw[j] + (first ? 0 : (uint32_t)sum[j]));
}

/* One tile of `rows` x 32 outputs: y float [m][n], or the accumulators int32 [segments][m][n]. */
static void run_tile(const Layer *layer, Rows encoded, uint64_t active, const Panel *panel,
                     int64_t m, int64_t row, int rows, int64_t column, float *y,
                     int32_t *accumulator, int add) {
    const int64_t bytes = count_bytes(layer);
    const int64_t left = layer->n - column < COLUMNS ? layer->n - column : COLUMNS;
    int32_t raw[ROWS * COLUMNS], sum[ROWS * COLUMNS];
    float total[ROWS * COLUMNS];
    for (int64_t i = 0; i < layer->segments; i++) {
        const Segment *seg = layer->segment + i;
        const int64_t at = i * layer->n_padded + column;
        if (!(active >> seg->act_group & 1)) {
            for (int r = 0; r < rows && !add; r++)
                memset(accumulator + (i * m + row + r) * layer->n + column, 0,
                       sizeof(int32_t) * (size_t)left);
            continue;
        }
        for (int r = 0; r < rows; r++) {
            const int32_t start = panel->missing * encoded.sum[(row + r) * layer->segments + i];
            for (int j = 0; j < COLUMNS; j++) raw[r * COLUMNS + j] = start;
        }
        tile_raw(seg, panel, rows,
                 encoded.count + (row * layer->k_padded + seg->padded_start) * bytes,
                 layer->k_padded * bytes, raw);
        for (int r = 0; r < rows; r++) {
            const int64_t g = (row + r) * layer->groups + seg->act_group;
            centre(raw + r * COLUMNS, layer->low + at, layer->high + at,
                   encoded.sum[(row + r) * layer->segments + i], encoded.zero_point[g]);
            const int32_t *a = raw + r * COLUMNS;
            if (encoded.multiple) multiply(raw + r * COLUMNS, encoded.multiple[g]);
            if (accumulator) {
                int32_t *to = accumulator + (i * m + row + r) * layer->n + column;
                for (int64_t j = 0; j < left; j++) to[j] = a[j] + (add ? to[j] : 0);
                continue;
            }
            if (layer->merged) {
                merge(sum + r * COLUMNS, a, i == 0);
                if (i + 1 < layer->segments) continue;
                a = sum + r * COLUMNS;
            }
            const float s = encoded.unit ? encoded.unit[row + r] : encoded.threshold[g];
            const float *scale = layer->scale + at;
            float *t = total + r * COLUMNS;
            if (i == 0 || layer->merged)
                for (int j = 0; j < COLUMNS; j++) t[j] = (s * (float)a[j]) * scale[j];
            else
                for (int j = 0; j < COLUMNS; j++) t[j] += (s * (float)a[j]) * scale[j];
        }
    }
    for (int r = 0; r < rows && y; r++) {
        float *t = total + r * COLUMNS;
        if (layer->bias)
            for (int j = 0; j < COLUMNS; j++) t[j] += layer->bias[column + j];
        float *to = y + (row + r) * layer->n + column;
        if (left == COLUMNS) memcpy(to, t, sizeof(float) * COLUMNS); /* inlined */
        else memcpy(to, t, sizeof(float) * (size_t)left);
    }
}

/* All tiles of one block of rows and 32 outputs. `scratch` holds an unpacked panel. */
static void run_block(const Layer *layer, Rows encoded, uint64_t active, int64_t m, int64_t row,
                      int64_t column, uint8_t *scratch, float *y, int32_t *accumulator,
                      int add) {
    const int64_t octets = layer->k_padded / OCTET, octet_bytes = layer->layout == NIBBLE ? 32 : 64;
    const int64_t end = row + ROW_BLOCK < m ? row + ROW_BLOCK : m;
    Panel panel = {layer->weight + column * octets * octet_bytes / LANES, layer->layout,
                   octet_bytes, octets * octet_bytes, 0};
    if (layer->layout == NIBBLE && end - row >= UNPACK_ROWS) unpack_panel(&panel, octets, scratch);
    for (; row + ROWS <= end; row += ROWS)
        run_tile(layer, encoded, active, &panel, m, row, ROWS, column, y, accumulator, add);
    for (; row < end; row++)
        run_tile(layer, encoded, active, &panel, m, row, 1, column, y, accumulator, add);
}

/* ------------------------------------------------------------ entry points */

/* Scratch memory of one call: the encoded rows, and for every thread `scratch` bytes that hold
 * either k floats or an unpacked panel. `memory` is to be freed. */
typedef struct {
    void *memory;
    Rows rows;
    uint8_t *thread;
    int64_t scratch;
} Work;

/* The next cache line; a panel across lines costs a tenth of the speed. */
static int64_t align(int64_t bytes) { return (bytes + 64) / 64 * 64; }

static int allocate(const Layer *layer, int64_t m, int threads, Work *work) {
    const int in_units = layer->range == COMMENSURATE;
    const int64_t words = m * ((2 + in_units) * layer->groups + layer->segments + in_units);
    const int64_t counts = m * layer->k_padded * count_bytes(layer);
    const int unpacks = layer->layout == NIBBLE && m >= UNPACK_ROWS;
    work->scratch = align((unpacks ? COLUMNS : 4) * layer->k_padded);
    work->memory = malloc((size_t)(align(0) + threads * work->scratch + align(counts) + 4 * words));
    if (!work->memory) return 0;
    work->thread = (uint8_t *)align((int64_t)work->memory);
    work->rows.count = work->thread + threads * work->scratch;
    work->rows.threshold = (float *)(work->rows.count + align(counts));
    work->rows.zero_point = (int32_t *)work->rows.threshold + m * layer->groups;
    work->rows.sum = work->rows.zero_point + m * layer->groups;
    work->rows.multiple = in_units ? work->rows.sum + m * layer->segments : NULL;
    work->rows.unit = in_units ? (float *)(work->rows.multiple + m * layer->groups) : NULL;
    return 1;
}

#ifdef _OPENMP
#include <omp.h>
static int thread_index(void) { return omp_get_thread_num(); }
#else
static int thread_index(void) { return 0; }
#endif

typedef struct {
    const float *x;      /* [m][k], to be encoded; or NULL and */
    const void *count;   /* [m][k] in original order, uint8 or (WIDE) int16, with */
    const int32_t *zero; /* [m][groups] */
    uint64_t active;     /* bit g: group g may have counts; the others are taken as zeros */
} Input;

static int run_layer(const Layer *layer, Input input, float *y, int32_t *accumulator, int64_t m,
                     int threads) {
    Work work;
    int finite = 1;
    if (m * layer->n * layer->k < PARALLEL_WORK) threads = 1;
    if (!allocate(layer, m, threads, &work)) return NO_MEMORY;
    if (!input.x) work.rows.multiple = NULL; /* sums of given counts are in thresholds */
    const int64_t columns = layer->n_padded / COLUMNS, row_blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint8_t *scratch = work.thread + thread_index() * work.scratch;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; row++) {
            if (!input.x) {
                load_row(layer, input.count, input.zero, input.active, row, work.rows);
            } else if (!encode_row(layer, input.x, row, work.rows, (float *)scratch)) {
#pragma omp atomic write
                finite = 0;
            }
        }
        /* The barrier of the loop above makes every row and `finite` visible. */
        if (finite) {
#pragma omp for schedule(dynamic) nowait
            for (int64_t task = 0; task < columns * row_blocks; task++)
                run_block(layer, work.rows, input.active, m, task / columns * ROW_BLOCK,
                          task % columns * COLUMNS, scratch, y, accumulator, 0);
        }
    }
    free(work.memory);
    return finite ? OK : NON_FINITE;
}

/* x float [m][k] -> y float [m][n] (or NULL), or accumulator int32 [segments][m][n] (or NULL). */
int snn_linear(const Layer *layer, const float *x, float *y, int32_t *accumulator, int64_t m,
               int threads) {
    return run_layer(layer, (Input){x, NULL, NULL, ~(uint64_t)0}, y, accumulator, m, threads);
}

/* Centred accumulators of given counts: the spikes of one step, say. */
int snn_accumulate(const Layer *layer, const void *count, const int32_t *zero, uint64_t active,
                   int32_t *accumulator, int64_t m, int threads) {
    return run_layer(layer, (Input){NULL, count, zero, active}, NULL, accumulator, m, threads);
}

/* The unrolled view: the neurons of x [m][k] run for `steps` [groups], every step one matmul over
 * its spikes, summed to centred accumulators; threshold [m][groups] comes out, too, or the unit in
 * its place. */
int snn_unrolled(const Layer *layer, const float *x, const int64_t *steps, int64_t levels,
                 int32_t *accumulator, float *threshold, int64_t m, int threads) {
    Work work;
    int finite = 1;
    const int64_t columns = layer->n_padded / COLUMNS, row_blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK;
    int64_t length = 0;
    for (int64_t g = 0; g < layer->groups; g++) length = steps[g] > length ? steps[g] : length;
    if (m * layer->n * layer->k < PARALLEL_WORK) threads = 1;
    if (!allocate(layer, m, threads, &work)) return NO_MEMORY;
    work.rows.threshold = threshold;
    Neurons neurons = {malloc(sizeof(float) * (size_t)(m * layer->k_padded) + 1), steps, levels, 0};
    if (!neurons.membrane) {
        free(work.memory);
        return NO_MEMORY;
    }
#pragma omp parallel num_threads(threads) if (threads > 1) firstprivate(neurons)
    {
        uint8_t *scratch = work.thread + thread_index() * work.scratch;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; row++) {
            if (!charge_row(layer, x, row, work.rows, (float *)scratch, &neurons)) {
#pragma omp atomic write
                finite = 0;
            } else if (work.rows.unit) {
                for (int64_t g = 0; g < layer->groups; g++)
                    threshold[row * layer->groups + g] = work.rows.unit[row];
            }
        }
        for (neurons.step = 0; finite && neurons.step < length; neurons.step++) {
            uint64_t active = 0;
            for (int64_t g = 0; g < layer->groups; g++)
                active |= (uint64_t)(steps[g] > neurons.step) << g;
#pragma omp for schedule(static)
            for (int64_t row = 0; row < m; row++) fire_row(layer, row, work.rows, &neurons);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < columns * row_blocks; task++)
                run_block(layer, work.rows, active, m, task / columns * ROW_BLOCK,
                          task % columns * COLUMNS, scratch, NULL, accumulator, neurons.step > 0);
        }
    }
    free(neurons.membrane);
    free(work.memory);
    return finite ? OK : NON_FINITE;
}

/* x float [m][k] -> counts [m][k] in original channel order (int16 when WIDE, else uint8),
 * threshold, zero_point and, if COMMENSURATE, multiple [m][groups]. */
int snn_encode(const Layer *layer, const float *x, void *count, float *threshold,
               int32_t *zero_point, int32_t *multiple, int64_t m, int threads) {
    Work work;
    int finite = 1;
    const int64_t bytes = count_bytes(layer);
    if (m * layer->k < PARALLEL_VALUES) threads = 1;
    if (!allocate(layer, m, threads, &work)) return NO_MEMORY;
    work.rows.threshold = threshold;
    work.rows.zero_point = zero_point;
    work.rows.multiple = multiple;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < m; row++) {
        float *gathered = (float *)(work.thread + thread_index() * work.scratch);
        if (!encode_row(layer, x, row, work.rows, gathered)) {
#pragma omp atomic write
            finite = 0;
            continue;
        }
        const uint8_t *from = work.rows.count + row * layer->k_padded * bytes;
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
    free(work.memory);
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

/* x [rows][k] -> out [rows][k], rotated (rotation.h). Row r has the order (r / share) % heads, if any. */
void snn_rotate(const float *x, const uint8_t *order, float *out, int64_t rows, int64_t k,
                int64_t share, int64_t heads, const int64_t *blocks, const float *roots,
                int64_t count, int turned, int threads) {
    if (rows * k < PARALLEL_WORK) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        rotate_row(x + row * k, order ? order + row / share % heads * k : 0, out + row * k, blocks,
                   roots, count, turned);
}
