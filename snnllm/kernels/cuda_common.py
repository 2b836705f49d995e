"""CUDA C++ that the kernels of the collapsed linear share: barriers, copies, products, the epilogue."""

import torch

__all__ = ["COMMON", "OUTPUTS"]

OUTPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3}
"""The macro OUT; int32 are the accumulators."""

COMMON = r"""
typedef long long i64;
#define INTEGERS 3
#define NIBBLES 0x0F0F0F0Fu
#define INLINE __device__ __forceinline__

INLINE unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
// Programmatic dependent launch; both do nothing in a launch without it.
INLINE void wait_for_kernel_in_front() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
INLINE void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }

INLINE void barrier_init(unsigned at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals));
}
INLINE void barrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
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
INLINE unsigned word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

INLINE void multiply_16x8(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                          unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
               "{%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// (s A) sw, the operations of snnllm.kernels.epilogue.
INLINE float scaled(float threshold, int a, float scale) {
  return __fmul_rn(__fmul_rn(threshold, __int2float_rn(a)), scale);
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
INLINE void store(void* out, i64 at, float value) {
#if OUT == 0
  ((float*)out)[at] = value;
#else
  ((unsigned short*)out)[at] = (unsigned short)pair(value, 0.0f);
#endif
}
"""
