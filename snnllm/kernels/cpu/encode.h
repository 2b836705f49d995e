/* Types of the CPU kernels, and the encoder: float rows to spike counts. See kernels.c. */
#ifndef SNN_CPU_ENCODE_H
#define SNN_CPU_ENCODE_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__) && !defined(SNN_PORTABLE)
#define SNN_AVX2 1
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { NIBBLE = 0, BYTE = 1, WIDE = 2 };
enum { SPLIT = 0, SHARED = 1, COMMENSURATE = 2 }; /* neurons.modes.ValueRange.code */
enum { OK = 0, NON_FINITE = 1, NO_MEMORY = 2 };
enum { OCTET = 8, LANES = 8, COLUMNS = 32, ROWS = 4, ROW_BLOCK = 64, DOT_COLUMNS = 128 };
enum { LAYER_GROUPS = 64 };    /* groups of a layer, at most */
enum { LARGEST_CHARGE = 255 }; /* of commensurate thresholds */
enum { BLOCKS = COLUMNS / LANES };
enum { UNPACK_ROWS = 8 }; /* rows from which unpacking nibbles to memory pays */
enum { PARALLEL_WORK = 1 << 21 }; /* multiply-adds below which a second thread does not pay */
enum { PARALLEL_VALUES = 1 << 14 }; /* the same for values to encode */

typedef struct {
    int64_t start, stop;  /* encoded channels */
    int64_t padded_start; /* where they start in the padded count row, a multiple of 8 */
    int64_t octets;       /* padded length / 8 */
    int64_t act_group;
    int64_t chunk;        /* octets whose products fit int16 (NIBBLE, BYTE) */
    int64_t chunk_signed; /* the same for unpacked nibbles, which are signed */
} Segment;

typedef struct {
    int64_t k, n, k_padded, n_padded, groups, segments, layout;
    int64_t range;            /* SPLIT, SHARED or COMMENSURATE */
    int64_t merged;           /* the segments have one int32 sum, scaled once */
    const float *clip;        /* factor on the range of every group */
    const int32_t *order;     /* original channel of every encoded position, or NULL */
    const int64_t *sizes;     /* channels of every group */
    const int64_t *capacity;  /* of every group */
    const Segment *segment;
    const uint8_t *weight;    /* packed */
    const float *scale;       /* [segments][n_padded], as the two below */
    const int32_t *low;       /* int16 pairs c1, c2 mod 2^15: see centre() in kernels.c */
    const int32_t *high;      /* int16 pairs c1, c2 div 2^15 */
    const float *bias;        /* [n_padded] or NULL */
} Layer;

_Static_assert(sizeof(void *) == 8, "the layer is described by 64-bit words");

/* The weights of 32 outputs, packed or unpacked to bytes. */
typedef struct {
    const uint8_t *weight;
    int64_t layout, octet_bytes;
    int64_t block_stride; /* bytes from 8 outputs to the next 8 */
    int32_t missing;      /* what every level lacks of w' */
} Panel;

/* Encoded rows of one call. */
typedef struct {
    uint8_t *count; /* [m][k_padded], uint8 or int16 */
    float *threshold;    /* [m][groups] */
    int32_t *zero_point; /* [m][groups] */
    int32_t *sum;        /* [m][segments], sums of counts */
    int32_t *multiple;   /* [m][groups], thresholds in units; NULL unless COMMENSURATE */
    float *unit;         /* [m]; NULL unless COMMENSURATE */
} Rows;

static int64_t count_bytes(const Layer *layer) { return layer->layout == WIDE ? 2 : 1; }

/* Widens [lo, hi] to the values; returns 0 when one is NaN or infinite. */
static int widen_range(const float *x, int64_t n, float *lo, float *hi) {
    int64_t i = 0;
    uint32_t largest = 0; /* largest |x| as bits: NaN and infinity lie above all finite floats */
#ifdef SNN_AVX2
    if (n >= 8) {
        __m256 low = _mm256_set1_ps(*lo), high = _mm256_set1_ps(*hi);
        __m256i top = _mm256_setzero_si256();
        const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
        for (; i + 8 <= n; i += 8) {
            __m256 v = _mm256_loadu_ps(x + i);
            low = _mm256_min_ps(low, v);
            high = _mm256_max_ps(high, v);
            top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
        }
        float lows[8], highs[8];
        uint32_t tops[8];
        _mm256_storeu_ps(lows, low);
        _mm256_storeu_ps(highs, high);
        _mm256_storeu_si256((__m256i *)tops, top);
        for (int j = 0; j < 8; j++) {
            *lo = lows[j] < *lo ? lows[j] : *lo;
            *hi = highs[j] > *hi ? highs[j] : *hi;
            largest = tops[j] > largest ? tops[j] : largest;
        }
    }
#endif
    for (; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffffu;
        largest = bits > largest ? bits : largest;
        *lo = x[i] < *lo ? x[i] : *lo;
        *hi = x[i] > *hi ? x[i] : *hi;
    }
    return largest < 0x7f800000u;
}

/* Threshold of the range of one row and group, and its zero point. */
static float threshold_of(float lo, float hi, float capacity) {
    const float s = (hi - lo) / capacity;
    return s < 1e-5f ? 1e-5f : s;
}

static int32_t bias_charge(float lo, float s, float capacity) {
    float z = rintf(-lo / s);
    z = z < 0.0f ? 0.0f : z;
    return (int32_t)(z > capacity ? capacity : z);
}

/* Rounds the finite thresholds of a row up to multiples of one unit, which it returns: see
 * neurons.thresholds.commensurate. */
static float round_up(const Layer *layer, float *threshold, int32_t *multiple) {
    const int64_t groups = layer->groups, last = groups - 1;
    float most[LAYER_GROUPS], least = 0.0f, best = 0.0f, unit = threshold[0];
    multiple[0] = 1;
    if (groups < 2) return unit;
    for (int64_t g = 0; g < groups; g++) {
        most[g] = (float)(LARGEST_CHARGE / layer->capacity[g]);
        if (g < last && threshold[g] / most[g] > least) least = threshold[g] / most[g];
    }
    for (float n = most[last]; n > most[last] - 4.0f && n >= 1.0f; n--) {
        float u = threshold[last] / n, cost = 0.0f;
        uint32_t bits;
        u = (least > u ? least : u) * (1.0f + 0x1p-18f);
        memcpy(&bits, &u, sizeof bits);
        bits &= ~(uint32_t)31;
        memcpy(&u, &bits, sizeof bits);
        for (int64_t g = 0; g < groups; g++) {
            float m = ceilf(threshold[g] / u);
            m = m < most[g] ? m : most[g];
            const float raised = u * m / threshold[g];
            cost = raised > cost ? raised : cost;
        }
        cost = cost < 1e30f ? cost : 1e30f;
        if (n == most[last] || cost < best) {
            best = cost;
            unit = u;
        }
    }
    for (int64_t g = 0; g < groups; g++) {
        float m = ceilf(threshold[g] / unit);
        m = m < most[g] ? m : most[g];
        multiple[g] = (int32_t)m;
        threshold[g] = unit * m;
    }
    return unit;
}

/* Counts of n values. Clipped below at 0 first, so truncation is floor. Returns their sum. */
#define DEFINE_COUNT(NAME, TYPE)                                                               \
    static int32_t NAME(const float *restrict x, int64_t n, float s, int32_t zero, float top,  \
                        TYPE *restrict count) {                                                \
        const float bias = (float)zero + 0.5f;                                                 \
        int32_t sum = 0;                                                                       \
        for (int64_t i = 0; i < n; i++) {                                                      \
            float v = x[i] / s + bias;                                                         \
            v = v > 0.0f ? v : 0.0f;                                                           \
            v = v < top ? v : top;                                                             \
            int32_t q = (int32_t)v;                                                            \
            count[i] = (TYPE)q;                                                                \
            sum += q;                                                                          \
        }                                                                                      \
        return sum;                                                                            \
    }
DEFINE_COUNT(count_u8, uint8_t)
DEFINE_COUNT(count_i16, int16_t)

/* Sets the parameters of row m of x and returns the row in encoded order (`gathered` has room for k
 * floats), or NULL for non-finite input. */
static const float *set_row(const Layer *layer, const float *x, int64_t m, Rows rows,
                            float *gathered) {
    const int64_t groups = layer->groups, shared = layer->range == SHARED;
    x += m * layer->k;
    if (layer->order) {
        for (int64_t k = 0; k < layer->k; k++) gathered[k] = x[layer->order[k]];
        x = gathered;
    }
    float *threshold = rows.threshold + m * groups;
    int32_t *zero = rows.zero_point + m * groups;
    float lo = 0.0f, hi = 0.0f, least[LAYER_GROUPS];
    int finite = !shared || widen_range(x, layer->k, &lo, &hi);
    for (int64_t g = 0, start = 0; g < groups; start += layer->sizes[g++]) {
        if (!shared) {
            lo = hi = 0.0f;
            finite &= widen_range(x + start, layer->sizes[g], &lo, &hi);
        }
        const float clip = layer->clip[g];
        least[g] = lo * clip;
        threshold[g] = threshold_of(least[g], hi * clip, (float)layer->capacity[g]);
        finite &= threshold[g] <= FLT_MAX; /* hi - lo may overflow */
    }
    if (!finite) return NULL;
    if (layer->range == COMMENSURATE)
        rows.unit[m] = round_up(layer, threshold, rows.multiple + m * groups);
    for (int64_t g = 0; g < groups; g++) {
        if (!(threshold[g] <= FLT_MAX)) return NULL; /* nor may a multiple */
        zero[g] = bias_charge(least[g], threshold[g], (float)layer->capacity[g]);
    }
    return x;
}

/* Encodes row m of x by the closed form. Returns 0 for non-finite input. */
static int encode_row(const Layer *layer, const float *x, int64_t m, Rows rows, float *gathered) {
    const int64_t bytes = count_bytes(layer);
    const float *threshold = rows.threshold + m * layer->groups;
    const int32_t *zero = rows.zero_point + m * layer->groups;
    x = set_row(layer, x, m, rows, gathered);
    if (!x) return 0;
    uint8_t *count = rows.count + m * layer->k_padded * bytes;
    for (int64_t i = 0; i < layer->segments; i++) {
        const Segment *seg = layer->segment + i;
        const int64_t g = seg->act_group, length = seg->stop - seg->start;
        const float top = (float)layer->capacity[g];
        uint8_t *to = count + seg->padded_start * bytes;
        memset(to + length * bytes, 0, (size_t)((seg->octets * OCTET - length) * bytes));
        rows.sum[m * layer->segments + i] =
            bytes == 1 ? count_u8(x + seg->start, length, threshold[g], zero[g], top, to)
                       : count_i16(x + seg->start, length, threshold[g], zero[g], top, (int16_t *)to);
    }
    return 1;
}

/* Neurons of the unrolled view: membranes in thresholds, [m][k_padded], and how far they are. */
typedef struct {
    float *membrane;
    const int64_t *steps; /* of every group */
    int64_t levels, step;
} Neurons;

/* Charges the neurons of row m: v = x / s + (z + 1/2). Returns 0 for non-finite input. */
static int charge_row(const Layer *layer, const float *x, int64_t m, Rows rows, float *gathered,
                      const Neurons *neurons) {
    const float *threshold = rows.threshold + m * layer->groups;
    const int32_t *zero = rows.zero_point + m * layer->groups;
    x = set_row(layer, x, m, rows, gathered);
    if (!x) return 0;
    for (int64_t i = 0; i < layer->segments; i++) {
        const Segment *seg = layer->segment + i;
        const float s = threshold[seg->act_group];
        const float bias = (float)zero[seg->act_group] + 0.5f;
        float *v = neurons->membrane + m * layer->k_padded + seg->padded_start;
        for (int64_t k = 0; k < seg->octets * OCTET; k++)
            v[k] = k < seg->stop - seg->start ? x[seg->start + k] / s + bias : 0.0f;
    }
    return 1;
}

/* One step of the neurons of row m: fire clip(floor(v), 0, L-1), soft reset. The spikes take the
 * place of the counts; the bias charge is taken off with the first step. */
static void fire_row(const Layer *layer, int64_t m, Rows rows, const Neurons *neurons) {
    const int64_t bytes = count_bytes(layer);
    const float top = (float)(neurons->levels - 1);
    for (int64_t g = 0; g < layer->groups && neurons->step > 0; g++)
        rows.zero_point[m * layer->groups + g] = 0;
    for (int64_t i = 0; i < layer->segments; i++) {
        const Segment *seg = layer->segment + i;
        if (neurons->steps[seg->act_group] <= neurons->step) continue;
        float *restrict v = neurons->membrane + m * layer->k_padded + seg->padded_start;
        uint8_t *spike = rows.count + (m * layer->k_padded + seg->padded_start) * bytes;
        int32_t sum = 0;
        for (int64_t k = 0; k < seg->octets * OCTET; k++) {
            float s = v[k] > 0.0f ? v[k] : 0.0f;
            const int32_t q = (int32_t)(s < top ? s : top); /* not negative: truncation is floor */
            v[k] -= (float)q;
            if (bytes == 1) spike[k] = (uint8_t)q;
            else ((int16_t *)spike)[k] = (int16_t)q;
            sum += q;
        }
        rows.sum[m * layer->segments + i] = sum;
    }
}

/* Takes row m of given counts [m][k] (original order) and zero points [m][groups] instead. */
static void load_row(const Layer *layer, const void *given, const int32_t *zero, uint64_t active,
                     int64_t m, Rows rows) {
    const int64_t bytes = count_bytes(layer);
    uint8_t *count = rows.count + m * layer->k_padded * bytes;
    for (int64_t g = 0; g < layer->groups; g++) {
        rows.threshold[m * layer->groups + g] = 0.0f;
        rows.zero_point[m * layer->groups + g] = zero[m * layer->groups + g];
    }
    for (int64_t i = 0; i < layer->segments; i++) {
        const Segment *seg = layer->segment + i;
        const int64_t length = seg->stop - seg->start;
        uint8_t *to = count + seg->padded_start * bytes;
        int32_t sum = 0;
        if (!(active >> seg->act_group & 1)) continue;
        memset(to + length * bytes, 0, (size_t)((seg->octets * OCTET - length) * bytes));
        for (int64_t k = 0; k < length; k++) {
            const int64_t channel = layer->order ? layer->order[seg->start + k] : seg->start + k;
            const int64_t from = m * layer->k + channel;
            const int32_t q = bytes == 1 ? ((const uint8_t *)given)[from]
                                         : ((const int16_t *)given)[from];
            if (bytes == 1) to[k] = (uint8_t)q;
            else ((int16_t *)to)[k] = (int16_t)q;
            sum += q;
        }
        rows.sum[m * layer->segments + i] = sum;
    }
}

#endif
