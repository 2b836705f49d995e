"""CUDA C++ of the new token in attention: from a projected head to what attention takes, a warp for a head.

Rotary embedding, rotation and encoding of a row with the operations of `snnllm.kernels.attention.store`, in their
order: the same bits. A lane has PER_LANE neighbouring channels (behind the order of a rotation).

Macros: those of `attention_source`; ROTATED; MIXED, whose byte s says how many channels, from the first on, are in
Hadamard blocks longer than 2^s (`rotation.mixing_of`).
"""

__all__ = ["NEW_TOKEN", "packed_mixing"]


def packed_mixing(mixed: tuple[int, ...]) -> int:
    """The macro MIXED of what `rotation.mixing_of` says first."""
    return sum(many << 8 * stage for stage, many in enumerate(mixed))


NEW_TOKEN = r"""
#define PER_LANE (D / 32)

INLINE float number(const void* x, i64 at, int dtype) {
  if (dtype == 0) return ((const float*)x)[at];
  const unsigned short bits = ((const unsigned short*)x)[at];
  return dtype == 1 ? __int_as_float((int)bits << 16) : half_to_float(bits);
}
INLINE float to_dtype(float x) {
#if OUT == 0
  return x;
#else
  return low_of(pair(x, 0.0f));
#endif
}

// The channels of this lane in the basis of the heads: where they come from, and the tables of their position.
struct Basis { int channel[PER_LANE]; float cos[PER_LANE], sin[PER_LANE]; };
INLINE void load_order(Basis& b, const unsigned char* order) {
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    const int c = PER_LANE * (threadIdx.x % 32) + i;
    b.channel[i] = ROTATED ? order[c] : c;
  }
}
INLINE void load_tables(Basis& b, const void* cos, const void* sin, i64 table) {
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    b.cos[i] = number(cos, table + b.channel[i], QUERY);
    b.sin[i] = number(sin, table + b.channel[i], QUERY);
  }
}
// Whether channel c is in a block longer than 2^stage.
INLINE bool is_mixed(int c, int stage) { return c < (int)((u64)MIXED >> 8 * stage & 255u); }

// A row of projections behind the rotary embedding and the rotation.
INLINE void embed(float (&x)[PER_LANE], const void* rows, i64 at, const Basis& b) {
  float partner[PER_LANE];
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    x[i] = number(rows, at + b.channel[i], QUERY);
    partner[i] = number(rows, at + (b.channel[i] ^ (D / 2)), QUERY);
  }
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    const float other = b.channel[i] < D / 2 ? -partner[i] : partner[i];
    x[i] = to_dtype(__fadd_rn(to_dtype(__fmul_rn(x[i], b.cos[i])), to_dtype(__fmul_rn(other, b.sin[i]))));
  }
  if (!ROTATED) return;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int stage = 0; 1 << stage < D; stage++) {
    const int h = 1 << stage;
    float y[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const bool second = h < PER_LANE ? i & h : lane & (h / PER_LANE);
      const float other = h < PER_LANE ? x[(i ^ h) % PER_LANE] : of_partner(x[i], h / PER_LANE);
      y[i] = second ? __fadd_rn(other, -x[i]) : __fadd_rn(x[i], other);
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if (is_mixed(PER_LANE * lane + i, stage)) x[i] = y[i];
  }
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int k = 0;  // of a block of 2^k
#pragma unroll
    for (int stage = 0; 1 << stage < D; stage++) k += is_mixed(PER_LANE * lane + i, stage);
    // 2^(-k/2); products with powers of two are exact.
    x[i] = __fmul_rn(x[i], (k % 2 ? 0.70710678118654752f : 1.0f) * __int_as_float((127 - k / 2) << 23));
  }
}

// Thresholds and zero points of a row: of the channels without a slot, and of those with one.
INLINE void find_spikes(Spikes (&spikes)[2], const float (&x)[PER_LANE], const int (&slot)[PER_LANE],
                        const float (&tops)[G], const float (&clips)[G]) {
#pragma unroll
  for (int g = 0; g < G; g++) {
    unsigned below = 0, above = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if (G == 1 || ONE_RANGE || (slot[i] >= 0) == (g == 1)) {
        below = max(below, bits_above(-x[i]));
        above = max(above, bits_above(x[i]));
      }
    const float low = __fmul_rn(__int_as_float(maximum_of_warp(below)), clips[g]);
    const float high = __fmul_rn(__int_as_float(maximum_of_warp(above)), clips[g]);
    spikes[g] = spikes_of(low, threshold_of(low, high, tops[g], inverse_of(tops[g])), tops[g]);
  }
  if (G == 1) spikes[1] = spikes[0];
}

// The payload of a row (`snnllm.cache`) in shared memory; `plane` bytes for a high bit.
INLINE void make_payload(unsigned char* to, int bytes, int plane, const int (&count)[PER_LANE],
                         const int (&slot)[PER_LANE], const Spikes (&spikes)[2]) {
  constexpr int ZERO = D / 2 + 4 * G, HIGH = ZERO + G;
  const int lane = threadIdx.x % 32, used = HIGH + PLANES * plane;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    const int upper = of_partner(count[i], 16);
    if (lane < 16) to[PER_LANE * lane + i] = count[i] & 15 | (upper & 15) << 4;
  }
  if (lane < G) {
    *(float*)(to + D / 2 + 4 * lane) = lane ? spikes[1].threshold : spikes[0].threshold;
    to[ZERO + lane] = (unsigned char)(lane ? spikes[1].zero : spikes[0].zero);
  }
#pragma unroll
  for (int p = 0; p < PLANES; p++) {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if (slot[i] >= 0) bits |= (unsigned)(count[i] >> (4 + p) & 1) << slot[i];
    bits = (unsigned)sum_of_warp((int)bits);  // of different slots
    if (lane < plane) to[HIGH + p * plane + lane] = (unsigned char)(bits >> 8 * lane);
  }
  if (used + lane < bytes) to[used + lane] = 0;
  __syncwarp();
}
"""
