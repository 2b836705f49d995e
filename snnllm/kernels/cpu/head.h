/* Products of float rows and int8 codes, for an output head: memory-bound, the codes are read once. */
#ifndef SNN_HEAD_H
#define SNN_HEAD_H

#include <stdint.h>

enum { HEAD_LANES = 64 };

/* Sum of x [k] * codes [k]: lane j takes every 64th channel, lanes are summed in halves. */
static float head_sum(const float *restrict x, const int8_t *restrict codes, int64_t k) {
    float sums[HEAD_LANES] = {0};
    int64_t c = 0;
    for (; c + HEAD_LANES <= k; c += HEAD_LANES)
        for (int j = 0; j < HEAD_LANES; j++) sums[j] += x[c + j] * (float)codes[c + j];
    for (int j = 0; c + j < k; j++) sums[j] += x[c + j] * (float)codes[c + j];
    for (int half = HEAD_LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) sums[j] += sums[j + half];
    return sums[0];
}

/* y [m][n] = (x [m] . codes [n]) * scale [n] */
void snn_head(const float *x, const int8_t *codes, const float *scale, float *y, int64_t m,
              int64_t n, int64_t k, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t token = 0; token < n; token++)
        for (int64_t row = 0; row < m; row++)
            y[row * n + token] = head_sum(x + row * k, codes + token * k, k) * scale[token];
}

#endif
