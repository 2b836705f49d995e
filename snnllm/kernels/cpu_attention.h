/* Spiking attention on the CPU: encode rows per head, integer Q K^T with scales, decode V.
 *
 * An encoded row is a byte string, the payload of snnllm/cache.py:
 *   [d] counts uint8 | [g] zero points int16 | [g] thresholds float32            (native endian)
 * Channel c of head h belongs to group[h * d + c]. Every result equals the reference bit for bit:
 *   A_g = sum_{c in g} (q_c - z_g) (k_c - zk_g),   score = (sum_g (float(A_g) * s_g) * sk_g) * scaling
 *   where Q has one group (s_g = s, z_g = z) or the groups of K
 */
#ifndef SNN_CPU_ATTENTION_H
#define SNN_CPU_ATTENTION_H

#include "cpu_encode.h"

enum { MAX_GROUPS = 8, KEY_BLOCK = 64 };

static int64_t payload_bytes(int64_t d, int64_t groups) { return d + 6 * groups; }

static float load_threshold(const uint8_t *row, int64_t d, int64_t groups, int64_t g) {
    float s;
    memcpy(&s, row + d + 2 * groups + 4 * g, sizeof s);
    return s;
}

static int32_t load_zero(const uint8_t *row, int64_t d, int64_t g) {
    int16_t z;
    memcpy(&z, row + d + 2 * g, sizeof z);
    return z;
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
static int encode_head(const float *x, int64_t d, const uint8_t *group, int64_t groups,
                      const int64_t *capacity, const int64_t *steps, int64_t levels, int64_t shared,
                      const float *clip, uint8_t *out) {
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
        set_parameters(lo[g], hi[g], clip[g], (float)capacity[g], &s[g], &zero[g]);
        const int16_t z = (int16_t)zero[g];
        memcpy(out + d + 2 * g, &z, sizeof z);
        memcpy(out + d + 2 * groups + 4 * g, &s[g], sizeof s[g]);
        if (!(s[g] <= FLT_MAX)) return 0;
    }
    for (int64_t c = 0; c < d; c++) {
        const int g = groups == 1 ? 0 : group[c];
        const float top = (float)capacity[g];
        float q = x[c] / s[g] + ((float)zero[g] + 0.5f);
        if (steps) {
            out[c] = (uint8_t)run_neuron(q, steps[g], (float)(levels - 1));
            continue;
        }
        q = q < 0.0f ? 0.0f : q; /* clipped first, so truncation is floor */
        q = q > top ? top : q;
        out[c] = (uint8_t)q;
    }
    return 1;
}

/* Encodes x [batch][heads][tokens][d] with the strides given in floats (innermost is 1). */
int snn_encode_heads(const float *x, const int64_t *shape, const int64_t *stride,
                     const uint8_t *group, int64_t group_heads, int64_t groups,
                     const int64_t *capacity, const int64_t *steps, int64_t levels,
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
        failed |= !encode_head(row, d, own, groups, capacity, steps, levels, shared, clip,
                              out + r * payload_bytes(d, groups));
    }
    return failed ? NON_FINITE : OK;
}

/* Decodes payloads [rows] to floats [rows][d]; row r has head r / tokens % heads. */
void snn_decode_heads(const uint8_t *payload, int64_t rows, int64_t tokens, int64_t heads,
                      int64_t d, const uint8_t *group, int64_t groups, float *out, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) \
    if (rows * d >= PARALLEL_VALUES && threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *row = payload + r * payload_bytes(d, groups);
        const uint8_t *own = group + r / tokens % heads * d;
        float s[MAX_GROUPS];
        int32_t zero[MAX_GROUPS];
        for (int64_t g = 0; g < groups; g++) {
            s[g] = load_threshold(row, d, groups, g);
            zero[g] = load_zero(row, d, g);
        }
        for (int64_t c = 0; c < d; c++) {
            const int g = groups == 1 ? 0 : own[c];
            out[r * d + c] = s[g] * (float)((int32_t)row[c] - zero[g]);
        }
    }
}

/* A block of keys, transposed: quad [d / 4][lanes of 4 counts], zero and threshold per group. */
typedef struct {
    uint8_t *quad; /* [d4][KEY_BLOCK][4] */
    int32_t zero[MAX_GROUPS][KEY_BLOCK];
    float threshold[MAX_GROUPS][KEY_BLOCK];
} Keys;

static void load_keys(const uint8_t *payload, int64_t count, int64_t d, int64_t groups,
                      Keys *keys) {
    const int64_t bytes = payload_bytes(d, groups), d4 = (d + 3) / 4;
    memset(keys->quad, 0, (size_t)(d4 * KEY_BLOCK * 4));
    for (int64_t n = 0; n < count; n++) {
        const uint8_t *row = payload + n * bytes;
        for (int64_t i = 0; i < d / 4; i++)
            memcpy(keys->quad + (i * KEY_BLOCK + n) * 4, row + 4 * i, 4);
        for (int64_t c = d / 4 * 4; c < d; c++)
            keys->quad[(c / 4 * KEY_BLOCK + n) * 4 + c % 4] = row[c];
        for (int64_t g = 0; g < groups; g++) {
            keys->zero[g][n] = load_zero(row, d, g);
            keys->threshold[g][n] = load_threshold(row, d, groups, g);
        }
    }
    for (int64_t n = count; n < KEY_BLOCK; n++)
        for (int64_t g = 0; g < groups; g++) keys->zero[g][n] = 0, keys->threshold[g][n] = 0.0f;
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
    int64_t pairs, rows, keys, d, groups, heads; /* pairs = batch * heads, heads of K */
    int64_t query_groups;                        /* 1, or groups: Q has the groups of K */
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
    const uint8_t *row = p->query + m * payload_bytes(p->d, p->query_groups);
    const uint8_t *group = p->group + m / p->rows % p->heads * p->d;
    int8_t *part = p->part + m * p->groups * width;
    memset(part, 0, (size_t)(p->groups * width));
    for (int64_t g = 0; g < p->groups; g++) p->sum[m * p->groups + g] = 0;
    for (int64_t c = 0; c < p->d; c++) {
        const int g = p->groups == 1 ? 0 : group[c];
        const int32_t q = (int32_t)row[c] - load_zero(row, p->d, p->query_groups == 1 ? 0 : g);
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
    load_keys(p->key + (pair * p->keys + first) * payload_bytes(p->d, p->groups), count, p->d,
              p->groups, keys);
    for (int64_t m = pair * p->rows; m < (pair + 1) * p->rows; m++) {
        const uint8_t *row = p->query + m * payload_bytes(p->d, p->query_groups);
        for (int64_t g = 0; g < p->groups; g++) {
            const int64_t own = p->query_groups == 1 ? 0 : g;
            const float s = load_threshold(row, p->d, p->query_groups, own);
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
int snn_attention_scores(const int64_t *shape, const uint8_t *query, const uint8_t *key,
                         const uint8_t *group, int64_t chunk, float scaling, float *score,
                         int threads) {
    Product p = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6],
                 query,    key,      group,    chunk,    scaling,  score,    NULL,     NULL};
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
