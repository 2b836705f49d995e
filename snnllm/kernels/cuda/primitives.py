"""The assembly of the CUDA C++ kernels, one function an instruction, and the arithmetic they share.

Kernels are `PREAMBLE + PRIMITIVES + SHARED + body`; the tests run the bodies on the CPU, with primitives that
imitate the instructions (`tests/snnllm/cuda_on_host.h`).
"""

import torch

__all__ = ["OUTPUTS", "PREAMBLE", "PRIMITIVES", "SHARED"]

OUTPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3}
"""The macro OUT; int32 are the accumulators."""

PREAMBLE = r"""
typedef long long i64;
typedef unsigned long long u64;
#define INTEGERS 3
#define NIBBLES 0x0F0F0F0Fu
#define INFINITE __int_as_float(0x7f800000)
#define INLINE __device__ __forceinline__
struct __align__(64) Map { char raw[128]; };
"""


def _product(columns: int) -> str:
    """`multiply(d, a, counts, add)`: d [64 x columns] (+)= a [64 x 32] counts [columns x 32]^T, unsigned bytes."""
    size = columns // 2
    outputs = ", ".join(f"%{i}" for i in range(size))
    bound = ", ".join(f'"+r"(d[{i}])' for i in range(size))
    return f"""
INLINE void multiply(int (&d)[{size}], const unsigned* a, u64 counts, int add) {{
  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{size + 5}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.u8.u8 {{{outputs}}}, "
    "{{%{size}, %{size + 1}, %{size + 2}, %{size + 3}}}, %{size + 4}, p; }}"
    : {bound} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(counts), "r"(add));
}}
"""


PRIMITIVES = (
    r"""
INLINE unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
// Programmatic dependent launch; both do nothing in a launch without it.
INLINE void wait_for_kernel_in_front() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
INLINE void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
// When a value is there, in the first warp for which it is (one that nothing makes leaves it to the end of the block):
// what is asked for before the kernels behind start does not wait for all that they ask the memory for.
INLINE void launch_dependents_behind(unsigned value) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0x7ffffff1;\n"
               "@p griddepcontrol.launch_dependents; }" ::"r"(value) : "memory");
}
template <int REGISTERS> INLINE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> INLINE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

INLINE void barrier_init(unsigned at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals));
}
INLINE void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
INLINE void barrier_expect(unsigned at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
INLINE void barrier_arrive(unsigned at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
// Not `.acquire.cluster`: it would empty the L1 cache, and what barriers order here is in shared memory.
INLINE void barrier_wait(unsigned at, int parity) {
  asm volatile("{ .reg .pred done;\n"
               "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra again; }" ::"r"(at), "r"(parity) : "memory");
}

INLINE void copy_16(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
INLINE void copy_4(unsigned to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
INLINE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> INLINE void finish_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
INLINE void box_copy(unsigned to, const Map* map, int column, int row, unsigned barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// From shared memory, later; what a thread stores is in a group that it waits for.
INLINE void box_store(const Map* map, int column, int row, unsigned from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
               "cp.async.bulk.commit_group;" ::"l"(map), "r"(column), "r"(row), "r"(from) : "memory");
}
INLINE void stores_have_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
INLINE void finish_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
INLINE void show_to_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Brings memory to the L2 cache; a multiple of 16 bytes.
INLINE void fetch(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

INLINE void load_matrices(unsigned (&a)[4], unsigned at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at));
}
INLINE void store_transposed(unsigned at, const unsigned (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(at), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]) : "memory");
}
// Unsigned bytes.
INLINE void multiply_16x8(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                          unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
               "{%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
INLINE void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> INLINE void finish() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// A sum, which the compiler may not read before the wait above; as a copy, so that only products write sums.
INLINE int finished(int sum) {
  int copy;
  asm volatile("mov.b32 %0, %1;" : "=r"(copy) : "r"(sum));
  return copy;
}

// A kernel that starts early may go through its work twice: instructions come from memory, too, one after the other,
// and would be waited for where time counts. The first time nothing that others make is read, and nothing is written.
#define REHEARSED(first) _Pragma("unroll 1") for (unsigned real = (first) ? of_rehearsal() : 1u;; real = 1)
INLINE unsigned of_rehearsal() {  // 0, which the compiler must not know
  unsigned zero;
  asm volatile("mov.u32 %0, 0;" : "=r"(zero));
  return zero;
}

// What is made of x is made behind the wait above: else the compiler may write an operand that a product still reads.
INLINE void not_before(unsigned& x) { asm volatile("" : "+r"(x)); }

#define EVERY_LANE 0xffffffffu
template <typename T> INLINE T of_lane(T x, int lane) { return __shfl_sync(EVERY_LANE, x, lane); }
template <typename T> INLINE T of_partner(T x, int step) { return __shfl_xor_sync(EVERY_LANE, x, step); }
INLINE bool any_of_warp(bool x) { return __any_sync(EVERY_LANE, x); }
INLINE unsigned maximum_of_warp(unsigned x) { return __reduce_max_sync(EVERY_LANE, x); }
INLINE int sum_of_warp(int x) { return __reduce_add_sync(EVERY_LANE, x); }
INLINE unsigned minimum_of_warp(unsigned x) { return __reduce_min_sync(EVERY_LANE, x); }
INLINE void raise(unsigned* shared, unsigned x) { atomicMax(shared, x); }
INLINE void add_to(int* shared, int x) { atomicAdd(shared, x); }
INLINE int multiply_add(int a, int b, int c) {  // one instruction: the compiler would make two sums of a chain of them
  int v;
  asm("mad.lo.s32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
  return v;
}
INLINE int dot_4(unsigned a, unsigned b, int add) { return __dp4a((int)a, (int)b, add); }  // signed bytes
INLINE float half_to_float(unsigned short bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}
INLINE void cluster_meets() {  // what they wrote before is there for all of them
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
INLINE float of_block(const float* mine, int rank) {  // from the shared memory of a block of the cluster
  unsigned at;
  float v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(mine)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}

INLINE void cluster_arrives() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
INLINE void cluster_waits() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
INLINE void to_block(int* mine, int rank, int value) {  // into the same place of a block of the cluster
  unsigned at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(mine)), "r"(rank));
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
}
INLINE float larger(float a, float b) {  // NaN stays
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}
INLINE float add_up(float a, float b) { return __fadd_ru(a, b); }
INLINE float add_down(float a, float b) { return __fadd_rd(a, b); }
INLINE float add_saturated(float a, float b) {  // in 0 .. 1, NaN is 0
  float v;
  asm("add.rn.sat.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}
INLINE unsigned smaller_halves(unsigned a, unsigned b) { return __vminu2(a, b); }
INLINE unsigned low_halves(float a, float b) {
  return __byte_perm((unsigned)__float_as_int(a), (unsigned)__float_as_int(b), 0x5410);
}
INLINE int sum_4(unsigned word, int add) { return (int)__dp4a(word, 0x01010101u, (unsigned)add); }
INLINE float inverse_of(float x) {  // correctly rounded, of 1e-30 .. 1e30
  float v;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(x));
  return fmaf(fmaf(-x, v, 1.0f), v, v);
}
INLINE float sigmoid(float x) {  // as `gated` of neurons.backends.triton_encode_row
  float v;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(__fmul_rn(x, -1.4426950408889634f)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(__fadd_rn(1.0f, v)));
  return v;
}

INLINE unsigned pair(float low, float high) {  // two 16-bit floats
  unsigned v;
#if OUT == 2
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#endif
  return v;
}
// Of three words, or of their halves, each: signed, and unsigned.
template <bool HALVES> INLINE unsigned largest(unsigned a, unsigned b, unsigned c) {
  return HALVES ? __vimax3_s16x2(a, b, c) : (unsigned)__vimax3_s32((int)a, (int)b, (int)c);
}
template <bool HALVES> INLINE unsigned farthest(unsigned a, unsigned b, unsigned c) {
  return HALVES ? __vimax3_u16x2(a, b, c) : __vimax3_u32(a, b, c);
}
INLINE float high_of(unsigned pair) {
#if OUT == 2
  float v;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(v) : "r"(pair));
  return v;
#else
  return __int_as_float(pair & 0xffff0000u);
#endif
}
INLINE float low_of(unsigned pair) {
#if OUT == 2
  float v;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(v) : "r"(pair));
  return v;
#else
  return __int_as_float(pair << 16);
#endif
}
"""
    + _product(64)
    + _product(128)
)

SHARED = r"""
INLINE unsigned bits_above(float x) {  // of x where it is positive or NaN, as `range_bits`
  return x > 0.0f || x != x ? (unsigned)__float_as_int(x) & 0x7fffffffu : 0u;
}
// Correctly rounded by the correctly rounded inverse, as neurons.backends.triton_encode_row.quotient, of normal numbers
// and quotients, divisors up to 2^100. A quotient below counts as 0 where it is rounded (and as 1 where that is up).
INLINE float quotient(float x, float divisor, float inverse) {
  float q = __fmul_rn(x, inverse);
  q = fmaf(fmaf(q, -divisor, x), inverse, q);
  return fmaf(fmaf(q, -divisor, x), inverse, q);
}
// Likewise by divisors of at most 19 bits: no quotient is as near to the middle of two floats as a step leaves it.
INLINE float short_quotient(float x, float divisor, float inverse) {
  const float q = __fmul_rn(x, inverse);
  return fmaf(fmaf(q, -divisor, x), inverse, q);
}
// Threshold and zero point of a range, and what a count needs, as neurons.thresholds.encode_parameters.
// `unit` and `multiple` of it: the threshold, where those of all groups lie on one grid. `inverse` of the threshold
// times `scale`, as `in_thresholds` needs it.
struct Spikes { float threshold, zero, most, multiple, unit, inverse, scale; };
// A power of two, by which `quotient` takes divisors of any size, and what is divided by them.
INLINE float scale_of(float divisor) { return divisor < 1e30f ? 1.0f : 5.421010862427522e-20f; }  // 2^-64
INLINE float in_thresholds(float x, const Spikes& s) {
  return quotient(__fmul_rn(x, s.scale), __fmul_rn(s.threshold, s.scale), s.inverse);
}
INLINE float threshold_of(float below, float above, float most, float inverse_of_most) {
  const float range = __fadd_rn(above, below);
  const float step = range < INFINITE ? short_quotient(range, most, inverse_of_most) : range;
  return step < 1e-5f ? 1e-5f : step;  // NaN stays
}
INLINE float half_to_even(float x) { return __fadd_rn(__fadd_rn(x, 12582912.0f), -12582912.0f); }  // 3 * 2^22
INLINE Spikes spikes_of(float below, float threshold, float most) {
  const float scale = scale_of(threshold);
  Spikes s = {threshold, 0.0f, most, 1.0f, threshold, inverse_of(__fmul_rn(threshold, scale)), scale};
  s.zero = fminf(fmaxf(half_to_even(in_thresholds(below, s)), 0.0f), most);
  return s;
}
INLINE Spikes near_spikes_of(float below, float threshold, float most) {  // of thresholds up to 1e30
  Spikes s = {threshold, 0.0f, most, 1.0f, threshold, inverse_of(threshold), 1.0f};
  s.zero = fminf(half_to_even(quotient(below, threshold, s.inverse)), most);
  return s;
}
INLINE int count_of(float charge, const Spikes& s) {  // of x / threshold
  return (int)fminf(fmaxf(__fadd_rn(charge, __fadd_rn(s.zero, 0.5f)), 0.0f), s.most);
}
INLINE float maximum(float x) {  // of a warp
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, of_partner(x, step));
  return x;
}
INLINE float sum(float x) {  // of a warp
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += of_partner(x, step);
  return x;
}
// (s A) sw, the operations of snnllm.kernels.epilogue.
INLINE float scaled(float threshold, int a, float scale) {
  return __fmul_rn(__fmul_rn(threshold, __int2float_rn(a)), scale);
}
// Outputs and a residual of their type, as torch adds them: each output is rounded first.
INLINE unsigned sums(unsigned a, unsigned b) {
  return pair(__fadd_rn(low_of(a), low_of(b)), __fadd_rn(low_of(a >> 16), low_of(b >> 16)));
}
INLINE float plus(float value, const void* residual, i64 at) {
#if OUT == 0
  return __fadd_rn(value, ((const float*)residual)[at]);
#else
  return __fadd_rn(low_of(pair(value, 0.0f)), low_of(((const unsigned short*)residual)[at]));
#endif
}
INLINE void store(void* out, i64 at, float value) {
#if OUT == 0
  ((float*)out)[at] = value;
#else
  ((unsigned short*)out)[at] = (unsigned short)pair(value, 0.0f);
#endif
}
"""
