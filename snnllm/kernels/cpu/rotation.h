/* Hadamard blocks of rows of floats, in the order of additions of snnllm.hadamard. */
#ifndef SNN_ROTATION_H
#define SNN_ROTATION_H

#include <stdint.h>

enum { LONGEST_BLOCK = 256, RADIX = 16 };

/* y [p] times H_p, in place: for h = 1, 2, 4, .. the pairs h apart become their sum and difference. */
static void butterflies(float *restrict y, int64_t p) {
    for (int64_t h = 1; h < p; h *= 2)
        for (int64_t first = 0; first < p; first += 2 * h)
            for (int64_t i = first; i < first + h; i++) {
                const float a = y[i], b = y[i + h];
                y[i] = a + b;
                y[i + h] = a - b;
            }
}

/* A row of k channels, gathered in an order (or NULL), times its blocks; the last factor is root.
 * Turned: output i * RADIX + j of a longer block is at j * p / RADIX + i. */
static void rotate_row(const float *restrict x, const uint8_t *order, float *restrict out,
                       const int64_t *blocks, const float *roots, int64_t count, int turned) {
    float y[LONGEST_BLOCK];
    for (int64_t b = 0, first = 0; b < count; first += blocks[b++]) {
        const int64_t p = blocks[b], columns = p / RADIX;
        if (order)
            for (int64_t i = 0; i < p; i++) y[i] = x[order[first + i]];
        else
            for (int64_t i = 0; i < p; i++) y[i] = x[first + i];
        butterflies(y, p);
        const float root = roots[b];
        float *to = out + first;
        if (turned && p > RADIX) {
            for (int64_t j = 0; j < RADIX; j++)
                for (int64_t i = 0; i < columns; i++) to[j * columns + i] = y[i * RADIX + j] * root;
        } else {
            for (int64_t i = 0; i < p; i++) to[i] = y[i] * root;
        }
    }
}

#endif
