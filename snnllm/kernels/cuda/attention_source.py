"""CUDA C++ of attention of one query token over the encoded cache: limited by the memory of the payloads.

    P = softmax(scaling * sum_g s_qg s_kg A_g + mask),   out = P (s_v (q_v - z_v))

A cluster of CLUSTER blocks of threads has a KV head and all ROWS queries that share it; its warps take 32 keys at a
time in turn. For the scores a lane has a key: its payload is in registers, and A_g, an exact integer, is a sum of
dp4a with the centred counts of Q, which every block encodes for itself. Scores are combined in the order of
`snnllm.attention_products.spiking_scores`. For the product with V a lane has eight channels (a word of packed
counts), and P times the threshold comes from the lane of the key. High bits of salient channels and zero points are
taken in separately:

    sum_n P_n s_n (16 high_n + low_n - z_n) = 16 P' high + P' low - sum_n P'_n z_n

Warps are put together in shared memory, the blocks of a cluster through the shared memory of each other.

With STORED it takes projections: warps encode queries, key and value of the new token (`attention_token_source`), the
first block of a cluster writes the payloads to the cache, and each reads them from its own shared memory. With HELD
the first keys of a warp are in its registers before the projections are there: behind these, the weights of the next
linear would be in front of them in the queues of the memory. So the kernel behind starts when they are encoded.

Macros: D (32, 64 or 128), G, QUERY_GROUPS, ONE_RANGE (of all groups of Q), ROWS, KEY_BYTES and VALUE_BYTES (of a
payload), PLANES (high bits of a salient count), KEY_PLANE and VALUE_PLANE (bytes of one of them, at most 4; or
0), CLUSTER, QUERY, MASK, OUT (`primitives.OUTPUTS`; MASK -1: none, 4: bool), STORED, HELD; `attention_token_source`'s.
"""

from snnllm.kernels.cuda.attention_token_source import NEW_TOKEN
from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES, SHARED

__all__ = ["BODY", "SOURCE", "THREADS", "shared_bytes"]

THREADS = 256
"""Eight warps."""
_OWN = 32  # the most salient channels of a head


def shared_bytes(rows: int, channels: int, groups: int, payloads: int) -> int:
    """Shared memory of a block: new payloads, encoded queries; sums of the warps, and of the block."""
    query = rows * (groups * channels + _OWN + 16)
    return payloads + query + 4 * rows * ((THREADS // 32) * (channels + _OWN + 2) + channels + 2)


BODY = (
    NEW_TOKEN
    + r"""
#define WARPS 8
#define LOG2E 1.4426950408889634f
#define NOTHING __int_as_float(0xff800000)  // minus infinity

template <int WORDS> INLINE unsigned byte_at(const unsigned (&row)[WORDS], int i) {
  return row[i / 4] >> 8 * (i % 4) & 255u;
}
// Some 16 bytes of a payload.
template <int WORDS> INLINE void load_row(unsigned (&row)[WORDS], const unsigned char* at) {
#pragma unroll
  for (int i = 0; i < WORDS / 4; i++) {
    const uint4 v = ((const uint4*)at)[i];
    row[4 * i] = v.x, row[4 * i + 1] = v.y, row[4 * i + 2] = v.z, row[4 * i + 3] = v.w;
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(256) attend_one(
    const void* query, unsigned char* key, unsigned char* value, const int* key_slot, const int* value_slot,
    const float* capacity, const float* clip, const void* mask, void* out, const void* cos, const void* sin,
    const unsigned char* order, const float* shift, const float* kv_capacity, const float* key_clip,
    const float* value_clip, const i64* position, i64* length,
    int query_batch_stride, int query_head_stride, int key_batch_stride, int key_head_stride,
    int key_token_stride, int value_batch_stride, int value_head_stride, int value_token_stride,
    int mask_batch_stride, int mask_key_stride, int table_stride, int kv_heads, int keys, float scaling,
    float lowest) {
  constexpr int W = D / 8, TOGETHER = 32 / W;
  constexpr int OWN = 32, SLAB = D + OWN + 2, TAIL = (VALUE_BYTES - D / 2) / 4;
  constexpr int ZERO = D / 2 + 4 * G, HIGH = ZERO + G;  // bytes of a payload
  constexpr int OWN_PER_LANE = VALUE_PLANE ? (8 * VALUE_PLANE + W - 1) / W : 1;
  extern __shared__ __align__(128) unsigned char memory[];
  unsigned char* new_key = memory;  // payloads of the new token
  unsigned char* new_value = new_key + (STORED ? KEY_BYTES : 0);
  unsigned char* codes = new_value + (STORED ? VALUE_BYTES : 0);  // [ROWS][G][D], then [ROWS][OWN] of salient channels
  unsigned char* own_codes = codes + ROWS * G * D;
  float* scales = (float*)(own_codes + ROWS * OWN);  // [ROWS][2]
  int* code_sums = (int*)(scales + 2 * ROWS);        // [ROWS][2]
  float* slabs = (float*)(code_sums + 2 * ROWS);     // [WARPS][ROWS][SLAB]: sums, those of high bits, max, sum of P
  float* mine = slabs + WARPS * ROWS * SLAB;         // [ROWS][D + 2], of the block
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = blockIdx.x % CLUSTER, head_pair = blockIdx.x / CLUSTER;
  const int batch = head_pair / kv_heads, head = head_pair % kv_heads;
  key += (i64)batch * key_batch_stride + (i64)head * key_head_stride;
  value += (i64)batch * value_batch_stride + (i64)head * value_head_stride;

  unsigned salient_value = 0;  // of the eight channels of this lane
  const int word = lane % W;
  if (G == 2)
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (value_slot[head * D + i / 4 * (D / 2) + 4 * word + i % 4] >= 0) salient_value |= 1u << i;
  // What the mask adds to the score of a key; minus infinity where it hides or there is none.
  auto bias_of = [&](int n) {
    if (n >= keys) return NOTHING;
    if (MASK < 0) return 0.0f;
    const i64 at = (i64)batch * mask_batch_stride + (i64)n * mask_key_stride;
    if (MASK == 4) return ((const unsigned char*)mask)[at] ? 0.0f : NOTHING;
    const float bias = number(mask, at, MASK);
    return bias > lowest ? bias : NOTHING;
  };
  const int blocks = (keys + 31) / 32, mine_first = rank + CLUSTER * warp;
  constexpr int NEXT = CLUSTER * WARPS;
  float biases[4];  // at once: each would cost the latency of the memory
  auto load_biases = [&](int first) {
#pragma unroll
    for (int i = 0; i < 4; i++) biases[i] = bias_of(32 * (first + i * NEXT) + lane);
  };
  // Only what was written before the last kernel that did not start early may be read before the wait: what is written
  // later is sure to be seen behind it alone, and the kernel in front may be waiting itself: masks, old keys, layouts.
  load_biases(mine_first);
#pragma unroll
  for (int i = HELD; i < 4; i++) {
    const i64 n = 32 * (mine_first + i * NEXT) + lane;
    if (!(biases[i] > NOTHING)) continue;
    fetch(key + n * key_token_stride, KEY_BYTES), fetch(value + n * value_token_stride, VALUE_BYTES);
  }
  unsigned row[KEY_BYTES / 4], tail[TAIL], words[W];  // of 32 keys
  auto load_keys = [&](int n0) {
    const int n = min(n0 + lane, keys - 1);
    load_row(row, key + (i64)n * key_token_stride);
    load_row(tail, value + (i64)n * value_token_stride + D / 2);
#pragma unroll
    for (int e = 0; e < W; e++) {
      const int of = min(n0 + TOGETHER * e + lane / W, keys - 1);
      words[e] = *(const unsigned*)(value + (i64)of * value_token_stride + 4 * word);
    }
  };
  const bool held = HELD && any_of_warp(biases[0] > NOTHING);
  if (held) load_keys(32 * mine_first);
  const int own_slot = VALUE_PLANE ? value_slot[head * D + threadIdx.x % D] : -1;  // of what this thread writes
  int slot[PER_LANE];  // of the channels of a query
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) slot[i] = G == 2 ? key_slot[head * D + PER_LANE * lane + i] : -1;
  float tops[QUERY_GROUPS], clips[QUERY_GROUPS];
#pragma unroll
  for (int g = 0; g < QUERY_GROUPS; g++) tops[g] = capacity[g], clips[g] = clip[g];
  Basis basis;
  float kv_tops[G], key_clips[G], value_clips[G], key_shift[PER_LANE];  // for the new token
  int new_slot[PER_LANE];
  if (STORED) {
    load_order(basis, order + head * D);
#pragma unroll
    for (int g = 0; g < G; g++) kv_tops[g] = kv_capacity[g], key_clips[g] = key_clip[g], value_clips[g] = value_clip[g];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int c = head * D + PER_LANE * lane + i;
      new_slot[i] = G == 2 ? value_slot[c] : -1;
      key_shift[i] = OFFSET ? shift[c] : 0.0f;
    }
  }
  wait_for_kernel_in_front();
  const int place = STORED ? min((int)*position, keys) : -1;  // of the new key
  if (STORED) load_tables(basis, cos, sin, (i64)batch * table_stride);

  // Queries: a warp encodes one, a lane has neighbouring channels. With STORED two more have key and value.
  for (int r = warp; r < ROWS + 2 * STORED; r += WARPS) {
    const bool is_query = r < ROWS, is_key = r == ROWS;
    const i64 row_head = is_query ? head * ROWS + r : kv_heads * r + head;
    const i64 at = (i64)batch * query_batch_stride + row_head * query_head_stride;
    float x[PER_LANE];
    if (STORED && r <= ROWS) {
      embed(x, query, at, basis);
      if (OFFSET && is_key)
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) x[i] = __fadd_rn(x[i], -key_shift[i]);
    } else {
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) x[i] = number(query, at + PER_LANE * lane + i, QUERY);
    }
    const bool one_group = QUERY_GROUPS == 1 && is_query;
    int own_slot_of[PER_LANE], range_of[PER_LANE];  // channels of a slot have a range of their own
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      own_slot_of[i] = STORED && r > ROWS ? new_slot[i] : slot[i];
      range_of[i] = one_group ? -1 : own_slot_of[i];
    }
    float own_tops[G], own_clips[G];
#pragma unroll
    for (int g = 0; g < G; g++) {
      own_tops[g] = is_query ? tops[QUERY_GROUPS == 1 ? 0 : g] : kv_tops[g];
      own_clips[g] = is_query ? clips[QUERY_GROUPS == 1 ? 0 : g] : is_key ? key_clips[g] : value_clips[g];
    }
    Spikes spikes[2];
    find_spikes(spikes, x, range_of, own_tops, own_clips);
    if (one_group) spikes[1] = spikes[0];
    int count[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const Spikes own = own_slot_of[i] >= 0 ? spikes[1] : spikes[0];
      count[i] = count_of(in_thresholds(x[i], own), own);
    }
    if (STORED && !is_query) {
      unsigned char* payload = is_key ? new_key : new_value;
      const int bytes = is_key ? KEY_BYTES : VALUE_BYTES;
      make_payload(payload, bytes, is_key ? KEY_PLANE : VALUE_PLANE, count, own_slot_of, spikes);
      unsigned char* to = is_key ? key + (i64)place * key_token_stride : value + (i64)place * value_token_stride;
      if (rank == 0 && place < keys && lane < bytes / 16) ((uint4*)to)[lane] = ((const uint4*)payload)[lane];
      continue;
    }
    own_codes[r * OWN + lane] = 0;
    __syncwarp();
    int sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int group = slot[i] >= 0, c = PER_LANE * lane + i;
      const int code = count[i] - (int)(group ? spikes[1] : spikes[0]).zero;
      codes[(r * G) * D + c] = group ? 0 : code;
      if (G == 2) codes[(r * G + G - 1) * D + c] = group ? code : 0;
      if (KEY_PLANE && group) own_codes[r * OWN + slot[i]] = code;
      sum[group] += code;
    }
    sum[0] = sum_of_warp(sum[0]), sum[1] = sum_of_warp(sum[1]);
    if (lane < 2) {
      scales[2 * r + lane] = lane ? spikes[1].threshold : spikes[0].threshold;
      code_sums[2 * r + lane] = lane ? sum[1] : sum[0];
    }
  }
  if (STORED && blockIdx.x == 0 && threadIdx.x == 0) *length = *position + 1;
  __syncthreads();
  launch_dependents();

  float most[ROWS], total[ROWS] = {}, offset[ROWS][G] = {}, sums[ROWS][8] = {}, own[ROWS][OWN_PER_LANE] = {};
#pragma unroll
  for (int r = 0; r < ROWS; r++) most[r] = NOTHING;
  for (int first = mine_first; first < blocks; first += 4 * NEXT) {
    if (first != mine_first) load_biases(first);
#pragma unroll 1
    for (int i = 0; i < 4; i++) {
      const float bias = i == 0 ? biases[0] : i == 1 ? biases[1] : i == 2 ? biases[2] : biases[3];
      if (!any_of_warp(bias > NOTHING)) continue;
      const int n0 = 32 * (first + i * NEXT);
      if (!held || first != mine_first || i > 0) load_keys(n0);
      if (STORED && place >= n0 && place < n0 + 32) {  // the new one is not there yet
        if (lane == place - n0) load_row(row, new_key), load_row(tail, new_value + D / 2);
#pragma unroll
        for (int e = 0; e < W; e++)
          if (n0 + TOGETHER * e + lane / W == place) words[e] = *(const unsigned*)(new_value + 4 * word);
      }
      unsigned bits = 0, upper = 0;  // high bits of the salient channels of V of this lane's key
#pragma unroll
      for (int e = 0; e < VALUE_PLANE; e++) {
        bits |= byte_at(tail, HIGH - D / 2 + e) << 8 * e;
        if (PLANES == 2) upper |= byte_at(tail, HIGH - D / 2 + VALUE_PLANE + e) << 8 * e;
      }
      float weight[ROWS][G];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        int dot[G];
#pragma unroll
        for (int g = 0; g < G; g++) {
          const uint4* code = (const uint4*)(codes + (r * G + g) * D);
          dot[g] = 0;
#pragma unroll
          for (int e = 0; e < W / 4; e++) {
            const uint4 v = code[e], w = code[W / 4 + e];
            const unsigned low[4] = {v.x, v.y, v.z, v.w}, high[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int i = 0; i < 4; i++) dot[g] = dot_4(low[i], row[4 * e + i] & NIBBLES, dot[g]);
#pragma unroll
            for (int i = 0; i < 4; i++) dot[g] = dot_4(high[i], row[4 * e + i] >> 4 & NIBBLES, dot[g]);
          }
        }
        if (KEY_PLANE) {
          const unsigned* code = (const unsigned*)(own_codes + r * OWN);
#pragma unroll
          for (int p = 0; p < PLANES; p++) {
            int of_plane = 0;
#pragma unroll
            for (int e = 0; e < KEY_PLANE; e++) {  // four bits to four bytes
              const unsigned eight = byte_at(row, HIGH + p * KEY_PLANE + e);
              of_plane = dot_4(code[2 * e], (eight & 15u) * 0x00204081u & 0x01010101u, of_plane);
              of_plane = dot_4(code[2 * e + 1], (eight >> 4) * 0x00204081u & 0x01010101u, of_plane);
            }
            dot[G - 1] += of_plane << (4 + p);
          }
        }
        float score = 0.0f;
#pragma unroll
        for (int g = 0; g < G; g++) {
          const int a = dot[g] - code_sums[2 * r + g] * (int)byte_at(row, ZERO + g);
          const float part = scaled(scales[2 * r + g], a, __int_as_float(row[D / 8 + g]));
          score = g == 0 ? part : __fadd_rn(score, part);
        }
        // A hidden key may hold anything, also NaN.
        score = bias > NOTHING ? __fmul_rn(score, scaling) + bias : NOTHING;
        const float higher = fmaxf(most[r], maximum(score == score ? score : 0.0f));
        const float decay = exp2f((most[r] - higher) * LOG2E);  // 0 at first: the maximum is finite now
        const float p = exp2f((score - higher) * LOG2E);
        most[r] = higher;
        total[r] = total[r] * decay + p;
#pragma unroll
        for (int g = 0; g < G; g++) {
          weight[r][g] = bias > NOTHING ? p * __int_as_float(tail[g]) : 0.0f;
          offset[r][g] = offset[r][g] * decay + weight[r][g] * (float)byte_at(tail, 4 * G + g);
        }
#pragma unroll
        for (int e = 0; e < 8; e++) sums[r][e] *= decay;
#pragma unroll
        for (int e = 0; e < OWN_PER_LANE; e++) own[r][e] *= decay;
      }
#pragma unroll
      for (int e = 0; e < W; e++) {
        const int from = TOGETHER * e + lane / W;
        const unsigned low = words[e] & NIBBLES, high = words[e] >> 4 & NIBBLES;
        unsigned high_bits[OWN_PER_LANE];
        if (VALUE_PLANE) {
          const unsigned first_plane = of_lane(bits, from);
          const unsigned second_plane = PLANES == 2 ? of_lane(upper, from) : 0u;
#pragma unroll
          for (int k = 0; k < OWN_PER_LANE; k++)
            high_bits[k] = (first_plane >> (word + W * k) & 1u) + 2 * (second_plane >> (word + W * k) & 1u);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          const float ordinary = of_lane(weight[r][0], from);
          const float salient = G == 2 ? of_lane(weight[r][G - 1], from) : ordinary;
#pragma unroll
          for (int k = 0; k < 8; k++) {
            const unsigned count = (k < 4 ? low : high) >> 8 * (k % 4) & 255u;
            const float w = G == 2 && salient_value >> k & 1u ? salient : ordinary;
            sums[r][k] = fmaf(w, (float)count, sums[r][k]);
          }
          if (VALUE_PLANE)
#pragma unroll
            for (int k = 0; k < OWN_PER_LANE; k++)
              own[r][k] = fmaf(salient, (float)high_bits[k], own[r][k]);
        }
      }
    }
  }

  // Lanes of the same channels, then warps, then the blocks of the cluster.
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float* slab = slabs + (warp * ROWS + r) * SLAB;
    total[r] = sum(total[r]);
#pragma unroll
    for (int g = 0; g < G; g++) offset[r][g] = sum(offset[r][g]);
#pragma unroll
    for (int k = 0; k < 8; k++) {
#pragma unroll
      for (int step = W; step < 32; step *= 2) sums[r][k] += of_partner(sums[r][k], step);
      const float off = G == 2 && salient_value >> k & 1u ? offset[r][G - 1] : offset[r][0];
      if (lane < W) slab[k / 4 * (D / 2) + 4 * word + k % 4] = sums[r][k] - off;
    }
#pragma unroll
    for (int k = 0; k < OWN_PER_LANE; k++) {
#pragma unroll
      for (int step = W; step < 32; step *= 2) own[r][k] += of_partner(own[r][k], step);
      if (lane < W && word + W * k < OWN) slab[D + word + W * k] = own[r][k];
    }
    if (lane == 0) slab[D + OWN] = most[r], slab[D + OWN + 1] = total[r];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * D; i += 256) {
    const int r = i / D, c = i % D;
    const float* slab = slabs + r * SLAB;
    float top = NOTHING, x = 0.0f, all = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, slab[w * ROWS * SLAB + D + OWN]);
#pragma unroll
    for (int w = 0; w < WARPS; w++, slab += ROWS * SLAB) {
      if (slab[D + OWN] == NOTHING) continue;
      const float share = exp2f((slab[D + OWN] - top) * LOG2E);
      all += share * slab[D + OWN + 1];
      x += share * (slab[c] + (own_slot >= 0 ? 16.0f * slab[D + own_slot] : 0.0f));
    }
    if (CLUSTER == 1) {  // A query that sees no key: zeros.
      store(out, ((i64)head_pair * ROWS + r) * D + c, __fdiv_rn(x, all == 0.0f ? 1.0f : all));
      continue;
    }
    mine[r * (D + 2) + c] = x;
    if (c == 0) mine[r * (D + 2) + D] = top, mine[r * (D + 2) + D + 1] = all;
  }
  if (CLUSTER == 1) return;
  cluster_meets();
  for (int i = rank * 256 + threadIdx.x; i < ROWS * D; i += CLUSTER * 256) {
    const int r = i / D, c = i % D;
    const float* row = mine + r * (D + 2);
    float top = NOTHING, x = 0.0f, all = 0.0f;
#pragma unroll
    for (int of = 0; of < CLUSTER; of++) top = fmaxf(top, of_block(row + D, of));
#pragma unroll
    for (int of = 0; of < CLUSTER; of++) {
      const float highest = of_block(row + D, of);
      const float share = highest == NOTHING ? 0.0f : exp2f((highest - top) * LOG2E);
      all += share * of_block(row + D + 1, of);
      x += share * of_block(row + c, of);
    }
    store(out, ((i64)head_pair * ROWS + r) * D + c, __fdiv_rn(x, all == 0.0f ? 1.0f : all));
  }
  cluster_meets();  // the others read this block's sums
}
"""
)

SOURCE = PREAMBLE + PRIMITIVES + SHARED + BODY
