/* The integer tile: counts x packed weight levels, AVX2 and portable. See cpu.c for the layouts. */
#ifndef SNN_CPU_TILE_H
#define SNN_CPU_TILE_H

#include "cpu_encode.h"

#ifdef SNN_AVX2

INLINE __m256i broadcast(const uint8_t *four_bytes) {
    int32_t word;
    memcpy(&word, four_bytes, sizeof word);
    return _mm256_set1_epi32(word);
}

/* raw[r][lane] += sum over octets of count x level, for R rows and C blocks of 8 outputs.
 * R, C and the layout are constants at every call, so all inner loops unroll into registers. */
INLINE void tile_narrow(const int R, const int C, const int layout, const uint8_t *count,
                        int64_t row_stride, const uint8_t *weight, int64_t block_stride,
                        int64_t octets, int64_t chunk, int32_t *raw) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int64_t begin = 0; begin < octets; begin += chunk) {
        const int64_t end = begin + chunk < octets ? begin + chunk : octets;
        __m256i sum[R][C];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) sum[r][c] = _mm256_setzero_si256();
        for (int64_t o = begin; o < end; o++) {
            __m256i low[C], high[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                const uint8_t *at = weight + c * block_stride;
                if (layout == NIBBLE) {
                    __m256i both = _mm256_loadu_si256((const __m256i *)(at + o * 32));
                    low[c] = _mm256_and_si256(both, mask);
                    high[c] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
                } else {
                    low[c] = _mm256_loadu_si256((const __m256i *)(at + o * 64));
                    high[c] = _mm256_loadu_si256((const __m256i *)(at + o * 64 + 32));
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const __m256i first = broadcast(count + r * row_stride + o * OCTET);
                const __m256i second = broadcast(count + r * row_stride + o * OCTET + 4);
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) {
                    sum[r][c] = _mm256_add_epi16(sum[r][c], _mm256_maddubs_epi16(first, low[c]));
                    sum[r][c] = _mm256_add_epi16(sum[r][c], _mm256_maddubs_epi16(second, high[c]));
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                __m256i *to = (__m256i *)(raw + r * COLUMNS + c * LANES);
                __m256i wide = _mm256_madd_epi16(sum[r][c], ones);
                _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), wide));
            }
    }
}

INLINE void tile_wide(const int R, const int C, const uint8_t *count, int64_t row_stride,
                      const uint8_t *weight, int64_t block_stride, int64_t octets, int32_t *raw) {
    __m256i sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) sum[r][c] = _mm256_setzero_si256();
    for (int64_t pair = 0; pair < 4 * octets; pair++) {
        __m256i level[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            const uint8_t *at = weight + c * block_stride + pair * 16;
            level[c] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at));
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const __m256i two = broadcast(count + r * row_stride + pair * 4);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++)
                sum[r][c] = _mm256_add_epi32(sum[r][c], _mm256_madd_epi16(two, level[c]));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++)
            _mm256_storeu_si256((__m256i *)(raw + r * COLUMNS + c * LANES), sum[r][c]);
}

/* raw[rows][32], zeroed by the caller: sum_k q w' of one segment; rows is 1 or 4. */
static void tile_raw(const Layer *layer, const Segment *seg, int rows, const uint8_t *count,
                     const uint8_t *weight, int64_t block_stride, int32_t *raw) {
    const int64_t stride = layer->k_padded * count_bytes(layer);
#define NARROW(R, C, LAYOUT)                                                               \
    for (int c = 0; c < COLUMNS / LANES; c += C)                                           \
        tile_narrow(R, C, LAYOUT, count, stride, weight + c * block_stride, block_stride,  \
                    seg->octets, seg->chunk, raw + c * LANES)
#define WIDER(R, C)                                                                        \
    for (int c = 0; c < COLUMNS / LANES; c += C)                                           \
        tile_wide(R, C, count, stride, weight + c * block_stride, block_stride,            \
                  seg->octets, raw + c * LANES)
    if (layer->layout == NIBBLE) {
        if (rows == ROWS) NARROW(ROWS, 2, NIBBLE);
        else NARROW(1, 4, NIBBLE);
    } else if (layer->layout == BYTE) {
        if (rows == ROWS) NARROW(ROWS, 2, BYTE);
        else NARROW(1, 4, BYTE);
    } else {
        if (rows == ROWS) WIDER(ROWS, 2);
        else WIDER(1, 4);
    }
#undef NARROW
#undef WIDER
}

#else /* portable */

/* Channel c (0..7) and lane of one packed octet, as the level w'. */
INLINE int32_t level_at(int64_t layout, const uint8_t *octet, int c, int lane) {
    if (layout == NIBBLE) return octet[4 * lane + c % 4] >> (c < 4 ? 0 : 4) & 15;
    if (layout == BYTE) return (int8_t)octet[32 * (c / 4) + 4 * lane + c % 4];
    return (int8_t)octet[16 * (c / 2) + 2 * lane + c % 2];
}

static void tile_raw(const Layer *layer, const Segment *seg, int rows, const uint8_t *count,
                     const uint8_t *weight, int64_t block_stride, int32_t *raw) {
    const int64_t bytes = count_bytes(layer), octet_bytes = layer->layout == NIBBLE ? 32 : 64;
    for (int64_t o = 0; o < seg->octets; o++)
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < OCTET; c++) {
                const int64_t at = r * layer->k_padded + o * OCTET + c;
                const int32_t q = bytes == 1 ? count[at] : ((const int16_t *)count)[at];
                for (int column = 0; column < COLUMNS; column++) {
                    const uint8_t *octet =
                        weight + column / LANES * block_stride + o * octet_bytes;
                    raw[r * COLUMNS + column] = (int32_t)((uint32_t)raw[r * COLUMNS + column] +
                        (uint32_t)(q * level_at(layer->layout, octet, c, column % LANES)));
                }
            }
}

#endif

#endif
