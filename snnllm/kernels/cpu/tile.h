/* The integer tile: counts x packed weight levels, AVX2 and portable. See kernels.c for the layouts. */
#ifndef SNN_CPU_TILE_H
#define SNN_CPU_TILE_H

#include "encode.h"

#ifdef SNN_AVX2

#define UNROLL _Pragma("GCC unroll 8")

INLINE __m256i broadcast(const uint8_t *four_bytes) {
    int32_t word;
    memcpy(&word, four_bytes, sizeof word);
    return _mm256_set1_epi32(word);
}

INLINE void add_to(int32_t *to, __m256i value) {
    __m256i old = _mm256_loadu_si256((const __m256i *)to);
    _mm256_storeu_si256((__m256i *)to, _mm256_add_epi32(old, value));
}

/* raw[r][lane] += sum over octets of count x level, for R rows and C blocks of 8 outputs, in int16
 * until the end: the caller keeps the number of octets below the segment's chunk.
 * R, C and the layout are constants at every call, so all inner loops unroll into registers. */
INLINE void tile_narrow(const int R, const int C, const int layout, const uint8_t *count,
                        int64_t row_stride, const uint8_t *weight, int64_t block_stride,
                        int64_t octets, int32_t *raw) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i sum[ROWS][BLOCKS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) sum[r][c] = _mm256_setzero_si256();
    for (int64_t o = 0; o < octets; o++) {
        __m256i low[BLOCKS], high[BLOCKS];
        UNROLL for (int c = 0; c < C; c++) {
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
        UNROLL for (int r = 0; r < R; r++) {
            const __m256i first = broadcast(count + r * row_stride + o * OCTET);
            const __m256i second = broadcast(count + r * row_stride + o * OCTET + 4);
            UNROLL for (int c = 0; c < C; c++) {
                sum[r][c] = _mm256_add_epi16(sum[r][c], _mm256_maddubs_epi16(first, low[c]));
                sum[r][c] = _mm256_add_epi16(sum[r][c], _mm256_maddubs_epi16(second, high[c]));
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++)
            add_to(raw + r * COLUMNS + c * LANES, _mm256_madd_epi16(sum[r][c], ones));
}

/* The same for int16 counts, with int32 sums. */
INLINE void tile_wide(const int R, const int C, const uint8_t *count, int64_t row_stride,
                      const uint8_t *weight, int64_t block_stride, int64_t octets, int32_t *raw) {
    __m256i sum[ROWS][BLOCKS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) sum[r][c] = _mm256_setzero_si256();
    for (int64_t pair = 0; pair < 4 * octets; pair++) {
        __m256i level[BLOCKS];
        UNROLL for (int c = 0; c < C; c++) {
            const uint8_t *at = weight + c * block_stride + pair * 16;
            level[c] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at));
        }
        UNROLL for (int r = 0; r < R; r++) {
            const __m256i two = broadcast(count + r * row_stride + pair * 4);
            UNROLL for (int c = 0; c < C; c++)
                sum[r][c] = _mm256_add_epi32(sum[r][c], _mm256_madd_epi16(two, level[c]));
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) add_to(raw + r * COLUMNS + c * LANES, sum[r][c]);
}

/* Functions of their own, because the inner loops need every register. */
#define DEFINE_TILE(NAME, CALL)                                                                \
    static __attribute__((noinline)) void NAME(const uint8_t *count, int64_t row_stride,       \
                                               const uint8_t *weight, int64_t block_stride,    \
                                               int64_t octets, int32_t *raw) {                 \
        CALL;                                                                                  \
    }
#define ARGUMENTS count, row_stride, weight, block_stride, octets, raw
DEFINE_TILE(nibble_4x2, tile_narrow(ROWS, 2, NIBBLE, ARGUMENTS))
DEFINE_TILE(nibble_1x4, tile_narrow(1, 4, NIBBLE, ARGUMENTS))
DEFINE_TILE(byte_4x2, tile_narrow(ROWS, 2, BYTE, ARGUMENTS))
DEFINE_TILE(byte_1x4, tile_narrow(1, 4, BYTE, ARGUMENTS))
DEFINE_TILE(wide_4x2, tile_wide(ROWS, 2, ARGUMENTS))
DEFINE_TILE(wide_1x4, tile_wide(1, 4, ARGUMENTS))
#undef ARGUMENTS

typedef void Tile(const uint8_t *, int64_t, const uint8_t *, int64_t, int64_t, int32_t *);

/* raw[rows][32] += sum_k q level of one segment; rows is 1 or 4. */
static void tile_raw(const Segment *seg, const Panel *panel, int rows, const uint8_t *count,
                     int64_t row_stride, int32_t *raw) {
    static Tile *const tiles[3][2] = {
        {nibble_1x4, nibble_4x2}, {byte_1x4, byte_4x2}, {wide_1x4, wide_4x2}};
    Tile *const tile = tiles[panel->layout][rows == ROWS];
    const int blocks = rows == ROWS ? 2 : 4;
    const int64_t stride = panel->block_stride;
    const int64_t chunk = panel->missing ? seg->chunk_signed : seg->chunk;
    const int64_t octet_counts = panel->layout == WIDE ? 2 * OCTET : OCTET;
    const uint8_t *weight = panel->weight + seg->padded_start / OCTET * panel->octet_bytes;
    for (int c = 0; c < BLOCKS; c += blocks)
        for (int64_t o = 0; o < seg->octets; o += chunk)
            tile(count + o * octet_counts, row_stride,
                 weight + c * stride + o * panel->octet_bytes, stride,
                 seg->octets - o < chunk ? seg->octets - o : chunk, raw + c * LANES);
}

#else /* portable */

/* Channel c (0..7) and lane of one packed octet, as the level w'. */
INLINE int32_t level_at(int64_t layout, const uint8_t *octet, int c, int lane) {
    if (layout == NIBBLE) return octet[4 * lane + c % 4] >> (c < 4 ? 0 : 4) & 15;
    if (layout == BYTE) return (int8_t)octet[32 * (c / 4) + 4 * lane + c % 4];
    return (int8_t)octet[16 * (c / 2) + 2 * lane + c % 2];
}

static void tile_raw(const Segment *seg, const Panel *panel, int rows, const uint8_t *count,
                     int64_t row_stride, int32_t *raw) {
    const uint8_t *weight = panel->weight + seg->padded_start / OCTET * panel->octet_bytes;
    for (int64_t o = 0; o < seg->octets; o++)
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < OCTET; c++) {
                const uint8_t *row = count + r * row_stride;
                const int64_t at = o * OCTET + c;
                const int32_t q = panel->layout == WIDE ? ((const int16_t *)row)[at] : row[at];
                for (int column = 0; column < COLUMNS; column++) {
                    const uint8_t *octet = weight + column / LANES * panel->block_stride +
                                           o * panel->octet_bytes;
                    const int32_t level = level_at(panel->layout, octet, c, column % LANES);
                    uint32_t *to = (uint32_t *)raw + r * COLUMNS + column;
                    *to += (uint32_t)(q * level);
                }
            }
}

#endif

/* Unpacks the nibbles of 32 outputs once for many rows, as signed levels: smaller products, so
 * more of them fit int16. */
static void unpack_panel(Panel *panel, int64_t octets, uint8_t *to) {
    for (int block = 0; block < BLOCKS; block++)
        for (int64_t o = 0; o < octets; o++) {
            const uint8_t *from = panel->weight + block * panel->block_stride + o * 32;
            uint8_t *at = to + (block * octets + o) * 64;
            for (int i = 0; i < 32; i++) {
                at[i] = (uint8_t)((from[i] & 15) - 8);
                at[32 + i] = (uint8_t)((from[i] >> 4) - 8);
            }
        }
    *panel = (Panel){to, BYTE, 64, octets * 64, 8};
}

#endif
