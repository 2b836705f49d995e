/* Spiking attention on the CPU: encode rows per head, integer Q K^T with scales, decode V.
 *
 * An encoded row is a byte string, the payload of snnllm/cache.py, which describes it. Channel c of
 * head h belongs to group[h * d + c]. Every result equals the reference bit for bit:
 *   A_g = sum_{c in g} (q_c - z_g) (k_c - zk_g)
 *   score = (sum_g (float(A_g) * s_g) * sk_g) * scaling
 *   where Q has one group (s_g = s, z_g = z) or the groups of K
 */
#ifndef SNN_CPU_ATTENTION_H
#define SNN_CPU_ATTENTION_H

#include "encode.h"

enum { MAX_GROUPS = 8, KEY_BLOCK = 64, MAX_CHANNELS = 512, LOW = 15 };

/* snnllm.cache.RowLayout, counts of one byte; tables of every head, or one for all. */
typedef struct {
    int64_t d, groups, packed, planes, plane_bytes, threshold_at, zero_at, high_at, width;
    int64_t heads, members;    /* of the tables */
    const uint8_t *byte, *bit; /* [heads][d]: where the high bits of a channel lie; bit 0: none */
    const int64_t *member;     /* [heads][members]: salient channels, -1 at the end */
} Row;

static float load_threshold(const uint8_t *row, const Row *l, int64_t g) {
    float s;
    memcpy(&s, row + l->threshold_at + 4 * g, sizeof s);
    return s;
}

static int32_t load_zero(const uint8_t *row, const Row *l, int64_t g) {
    return row[l->zero_at + g];
}

static int64_t table_of(const Row *l, int64_t head) { return l->heads > 1 ? head : 0; }

/* ORs a plane of high bits into counts, where one stands for value, 16 or 32. */
static void add_plane(const uint8_t *row, const Row *l, int64_t plane, int64_t table,
                      uint8_t *restrict count) {
    const int64_t first = l->high_at + plane * l->plane_bytes;
    const uint8_t *byte = l->byte + table * l->d, *bit = l->bit + table * l->d;
    const uint8_t value = (uint8_t)(16 << plane);
    int64_t c = 0;
#ifdef SNN_AVX2
    if (first >= l->width - 16) { /* the plane lies in the last 16 bytes of the row */
        const __m256i tail = _mm256_broadcastsi128_si256(
            _mm_loadu_si128((const __m128i *)(row + l->width - 16)));
        const __m256i offset = _mm256_set1_epi8((char)(first - (l->width - 16)));
        const __m256i some = _mm256_set1_epi8((char)value), none = _mm256_setzero_si256();
        for (; c + 32 <= l->d; c += 32) {
            __m256i *at = (__m256i *)(count + c);
            const __m256i place = _mm256_loadu_si256((const __m256i *)(byte + c));
            const __m256i own = _mm256_shuffle_epi8(tail, _mm256_add_epi8(place, offset));
            const __m256i mask = _mm256_loadu_si256((const __m256i *)(bit + c));
            const __m256i clear = _mm256_cmpeq_epi8(_mm256_and_si256(own, mask), none);
            _mm256_storeu_si256(at, _mm256_or_si256(_mm256_loadu_si256(at),
                                                    _mm256_andnot_si256(clear, some)));
        }
    }
#endif
    for (; c < l->d; c++) count[c] |= row[first + byte[c]] & bit[c] ? value : 0;
}

/* Counts of a row. */
static void load_counts(const uint8_t *restrict row, const Row *l, int64_t head,
                        uint8_t *restrict count) {
    if (!l->packed) {
        memcpy(count, row, (size_t)l->d);
        return;
    }
    const int64_t half = l->d / 2;
    for (int64_t j = 0; j < half; j++) count[j] = row[j] & LOW;
    for (int64_t j = 0; j < half; j++) count[half + j] = row[j] >> 4;
    for (int64_t p = 0; p < l->planes && l->plane_bytes; p++)
        add_plane(row, l, p, table_of(l, head), count);
}

/* Writes a row but for thresholds and zero points. */
static void store_counts(const uint8_t *restrict count, const Row *l, int64_t head,
                         uint8_t *restrict row) {
    const int64_t half = l->d / 2, counts = l->packed ? half : l->d;
    const int64_t *member = l->member + table_of(l, head) * l->members;
    if (l->packed)
        for (int64_t j = 0; j < half; j++)
            row[j] = (uint8_t)((count[j] & LOW) | count[j + half] << 4);
    else
        memcpy(row, count, (size_t)l->d);
    memset(row + counts, 0, (size_t)(l->threshold_at - counts));
    memset(row + l->high_at, 0, (size_t)(l->width - l->high_at));
    for (int64_t p = 0; p < l->planes; p++) {
        uint8_t *bits = row + l->high_at + p * l->plane_bytes;
        for (int64_t i = 0; i < l->members && member[i] >= 0; i++)
            bits[i / 8] |= (uint8_t)((count[member[i]] >> (4 + p) & 1) << i % 8);
    }
}

/* Spikes that a neuron charged to v emits in `steps` steps of at most `top`, with soft reset. */
static int32_t run_neuron(float v, int64_t steps, float top) {
    int32_t count = 0;
    for (int64_t t = 0; t < steps; t++) {
        const float s = v > 0.0f ? v : 0.0f;
        const int32_t spike = (int32_t)(s < top ? s : top);
        v -= (float)spike;
        count += spike;
    }
    return count;
}

/* Encodes one row, by the closed form or (steps given) by running the neurons; returns 0 when a
 * value is NaN or infinite. */
static int encode_head(const float *x, const Row *l, int64_t head, const uint8_t *group,
                      const int64_t *capacity, const int64_t *steps, int64_t levels, int64_t shared,
                      const float *clip, uint8_t *out) {
    const int64_t d = l->d, groups = l->groups;
    uint8_t count[MAX_CHANNELS];
    float lo[MAX_GROUPS], hi[MAX_GROUPS], s[MAX_GROUPS];
    int32_t zero[MAX_GROUPS];
    float low = 0.0f, high = 0.0f;
    if (!widen_range(x, d, &low, &high)) return 0;
    for (int64_t g = 0; g < groups; g++) {
        lo[g] = groups == 1 || shared ? low : 0.0f;
        hi[g] = groups == 1 || shared ? high : 0.0f;
    }
    if (groups > 1 && !shared) {
        for (int64_t c = 0; c < d; c++) {
            const int g = group[c];
            lo[g] = x[c] < lo[g] ? x[c] : lo[g];
            hi[g] = x[c] > hi[g] ? x[c] : hi[g];
        }
    }
    for (int64_t g = 0; g < groups; g++) {
        s[g] = threshold_of(lo[g] * clip[g], hi[g] * clip[g], (float)capacity[g]);
        zero[g] = bias_charge(lo[g] * clip[g], s[g], (float)capacity[g]);
        out[l->zero_at + g] = (uint8_t)zero[g];
        memcpy(out + l->threshold_at + 4 * g, &s[g], sizeof s[g]);
        if (!(s[g] <= FLT_MAX)) return 0;
    }
    for (int64_t c = 0; c < d; c++) {
        const int g = groups == 1 ? 0 : group[c];
        const float top = (float)capacity[g];
        float q = x[c] / s[g] + ((float)zero[g] + 0.5f);
        if (steps) {
            count[c] = (uint8_t)run_neuron(q, steps[g], (float)(levels - 1));
            continue;
        }
        q = q < 0.0f ? 0.0f : q; /* clipped first, so truncation is floor */
        q = q > top ? top : q;
        count[c] = (uint8_t)q;
    }
    store_counts(count, l, head, out);
    return 1;
}

/* Encodes x [batch][heads][tokens][d] with the strides given in floats (innermost is 1). */
int snn_encode_heads(const float *x, const int64_t *shape, const int64_t *stride, const Row *layout,
                     const uint8_t *group, int64_t group_heads, const int64_t *capacity,
                     const int64_t *steps, int64_t levels,
                     int64_t shared, const float *clip, uint8_t *out, int threads) {
    const int64_t heads = shape[1], tokens = shape[2], d = shape[3];
    const int64_t rows = shape[0] * heads * tokens;
    int failed = 0;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : failed) \
    if (rows * d >= PARALLEL_VALUES && threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const int64_t t = r % tokens, h = r / tokens % heads, b = r / tokens / heads;
        const float *row = x + b * stride[0] + h * stride[1] + t * stride[2];
        const uint8_t *own = group + (group_heads > 1 ? h * d : 0);
        failed |= !encode_head(row, layout, h, own, capacity, steps, levels, shared, clip,
                               out + r * layout->width);
    }
    return failed ? NON_FINITE : OK;
}

/* Decodes payloads [rows] to floats [rows][d]; row r has head r / tokens % heads. */
void snn_decode_heads(const uint8_t *payload, int64_t rows, int64_t tokens, int64_t heads,
                      const Row *layout, const uint8_t *group, float *out, int threads) {
    const int64_t d = layout->d, groups = layout->groups;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) \
    if (rows * d >= PARALLEL_VALUES && threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *row = payload + r * layout->width;
        const int64_t head = r / tokens % heads;
        const uint8_t *own = group + head * d;
        uint8_t count[MAX_CHANNELS];
        float s[MAX_GROUPS];
        int32_t zero[MAX_GROUPS];
        load_counts(row, layout, head, count);
        for (int64_t g = 0; g < groups; g++) {
            s[g] = load_threshold(row, layout, g);
            zero[g] = load_zero(row, layout, g);
        }
        for (int64_t c = 0; c < d; c++) {
            const int g = groups == 1 ? 0 : own[c];
            out[r * d + c] = s[g] * (float)((int32_t)count[c] - zero[g]);
        }
    }
}

/* A block of keys, transposed: quad [d / 4][lanes of 4 counts], zero and threshold per group. */
typedef struct {
    uint8_t *quad; /* [d4][KEY_BLOCK][4] */
    int32_t zero[MAX_GROUPS][KEY_BLOCK];
    float threshold[MAX_GROUPS][KEY_BLOCK];
} Keys;

static void load_keys(const uint8_t *payload, int64_t count, const Row *l, int64_t head,
                      Keys *keys) {
    const int64_t d = l->d, d4 = (d + 3) / 4;
    uint8_t row[MAX_CHANNELS + 4];
    memset(keys->quad, 0, (size_t)(d4 * KEY_BLOCK * 4));
    for (int64_t n = 0; n < count; n++) {
        load_counts(payload + n * l->width, l, head, row);
        memset(row + d, 0, 4); /* the last quad may reach beyond the channels */
        for (int64_t i = 0; i < d4; i++)
            memcpy(keys->quad + (i * KEY_BLOCK + n) * 4, row + 4 * i, 4);
        for (int64_t g = 0; g < l->groups; g++) {
            keys->zero[g][n] = load_zero(payload + n * l->width, l, g);
            keys->threshold[g][n] = load_threshold(payload + n * l->width, l, g);
        }
    }
    for (int64_t n = count; n < KEY_BLOCK; n++)
        for (int64_t g = 0; g < l->groups; g++)
            keys->zero[g][n] = 0, keys->threshold[g][n] = 0.0f;
}

/* raw[n] = sum_c query[c] * key[n][c] over a block; chunk: quads whose products fit int16. */
static void query_keys(const int8_t *query, const uint8_t *quad, int64_t d4, int64_t count,
                       int64_t chunk, int32_t *raw) {
#ifdef SNN_AVX2
    for (int64_t n = count / LANES * LANES; n < KEY_BLOCK; n++) raw[n] = 0;
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t n = 0; n < count; n += LANES) { /* lanes beyond count hold zeros */
        __m256i total = _mm256_setzero_si256();
        for (int64_t i = 0; i < d4; i += chunk) {
            const int64_t end = i + chunk < d4 ? i + chunk : d4;
            __m256i part = _mm256_setzero_si256();
            for (int64_t j = i; j < end; j++) {
                int32_t four;
                memcpy(&four, query + 4 * j, sizeof four);
                __m256i k = _mm256_loadu_si256((const __m256i *)(quad + (j * KEY_BLOCK + n) * 4));
                part = _mm256_add_epi16(part, _mm256_maddubs_epi16(k, _mm256_set1_epi32(four)));
            }
            total = _mm256_add_epi32(total, _mm256_madd_epi16(part, ones));
        }
        _mm256_storeu_si256((__m256i *)(raw + n), total);
    }
#else
    (void)chunk;
    for (int64_t n = 0; n < KEY_BLOCK; n++) raw[n] = 0;
    for (int64_t i = 0; i < d4; i++)
        for (int64_t n = 0; n < count; n++)
            for (int64_t c = 0; c < 4; c++)
                raw[n] += query[4 * i + c] * quad[(i * KEY_BLOCK + n) * 4 + c];
#endif
}

typedef struct {
    int64_t pairs, rows, keys, tokens; /* batch * heads; query rows and keys of a pair */
    int64_t d, groups, heads, query_heads;
    const Row *query_row, *key_row; /* Q has one group, or those of K */
    const uint8_t *query, *key, *group;
    int64_t chunk;
    float scaling;
    float *score;
    int8_t *part; /* [pairs * rows][groups][4 * d4], q - z where the channel is in the group */
    int32_t *sum; /* [pairs * rows][groups], its sums */
} Product;

/* Splits query row m of all pairs into its groups. */
static void split_query(const Product *p, int64_t m) {
    const int64_t width = (p->d + 3) / 4 * 4;
    const Row *l = p->query_row;
    const uint8_t *row = p->query + m * l->width;
    const uint8_t *group = p->group + m / p->rows % p->heads * p->d;
    uint8_t count[MAX_CHANNELS];
    int8_t *part = p->part + m * p->groups * width;
    load_counts(row, l, m / p->tokens % p->query_heads, count);
    memset(part, 0, (size_t)(p->groups * width));
    for (int64_t g = 0; g < p->groups; g++) p->sum[m * p->groups + g] = 0;
    for (int64_t c = 0; c < p->d; c++) {
        const int g = p->groups == 1 ? 0 : group[c];
        const int32_t q = (int32_t)count[c] - load_zero(row, l, l->groups == 1 ? 0 : g);
        part[g * width + c] = (int8_t)q;
        p->sum[m * p->groups + g] += q;
    }
}

/* Scores of all query rows of one (batch, KV head) against one block of keys. */
static void score_block(const Product *p, int64_t pair, int64_t first, Keys *keys) {
    const int64_t d4 = (p->d + 3) / 4, width = 4 * d4;
    const int64_t left = p->keys - first, count = left < KEY_BLOCK ? left : KEY_BLOCK;
    int32_t raw[KEY_BLOCK];
    float total[KEY_BLOCK];
    load_keys(p->key + (pair * p->keys + first) * p->key_row->width, count, p->key_row,
              pair % p->heads, keys);
    for (int64_t m = pair * p->rows; m < (pair + 1) * p->rows; m++) {
        const Row *l = p->query_row;
        const uint8_t *row = p->query + m * l->width;
        for (int64_t g = 0; g < p->groups; g++) {
            const float s = load_threshold(row, l, l->groups == 1 ? 0 : g);
            const int32_t sum = p->sum[m * p->groups + g];
            const int32_t *zero = keys->zero[g];
            const float *threshold = keys->threshold[g];
            query_keys(p->part + (m * p->groups + g) * width, keys->quad, d4, count, p->chunk, raw);
            if (g == 0)
                for (int n = 0; n < KEY_BLOCK; n++)
                    total[n] = ((float)(raw[n] - sum * zero[n]) * s) * threshold[n];
            else
                for (int n = 0; n < KEY_BLOCK; n++)
                    total[n] += ((float)(raw[n] - sum * zero[n]) * s) * threshold[n];
        }
        for (int n = 0; n < KEY_BLOCK; n++) total[n] *= p->scaling;
        memcpy(p->score + m * p->keys + first, total, sizeof(float) * (size_t)count);
    }
}

/* score [pairs][rows][keys] of query payloads [pairs][rows] (one group, or those of K) and key
 * payloads [pairs][keys]. groups <= MAX_GROUPS and |q - z| <= 127: the caller checks. */
int snn_attention_scores(const int64_t *shape, const Row *query_row, const Row *key_row,
                         const uint8_t *query, const uint8_t *key, const uint8_t *group,
                         int64_t chunk, float scaling, float *score, int threads) {
    const int64_t batch = shape[0], heads = shape[1], query_heads = shape[2], tokens = shape[3];
    Product p = {batch * heads, query_heads / heads * tokens, shape[4], tokens, key_row->d,
                 key_row->groups, heads, query_heads, query_row, key_row, query, key, group, chunk,
                 scaling, score, NULL, NULL};
    const int64_t blocks = (p.keys + KEY_BLOCK - 1) / KEY_BLOCK, d4 = (p.d + 3) / 4;
    const int64_t rows = p.pairs * p.rows;
    int failed = 0;
    if (rows * p.keys * p.d < PARALLEL_WORK) threads = 1;
    p.sum = malloc((size_t)(rows * p.groups * 4 * (1 + d4)) + 64);
    if (!p.sum) return NO_MEMORY;
    p.part = (int8_t *)(p.sum + rows * p.groups);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Keys keys;
        keys.quad = malloc((size_t)(d4 * KEY_BLOCK * 4));
        if (!keys.quad) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m++) split_query(&p, m);
        if (!failed) {
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < p.pairs * blocks; i++)
                score_block(&p, i / blocks, i % blocks * KEY_BLOCK, &keys);
        }
        free(keys.quad);
    }
    free(p.sum);
    return failed ? NO_MEMORY : OK;
}

#endif
