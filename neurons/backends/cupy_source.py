"""CUDA C of the CuPy kernels. Python's ints and floats arrive as ``long long`` and ``double``."""

__all__ = ["SOURCE"]

_TYPES = r"""
typedef long long i64;
typedef unsigned short u16;
// One struct a dtype, read and written as floats; 16-bit floats by hand, without CUDA's headers.
struct F32 { float raw; __device__ float get() const { return raw; }
             __device__ void set(float f) { raw = f; } };
struct BF16 { u16 raw;
  __device__ float get() const { return __uint_as_float((unsigned)raw << 16); }
  __device__ void set(float f) {  // round to nearest, ties to even
    unsigned u = __float_as_uint(f);
    raw = f != f ? 0x7fff : (u16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  } };
struct F16 { u16 raw;
  __device__ float get() const {
    float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(raw)); return f;
  }
  __device__ void set(float f) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(raw) : "f"(f)); } };
template <typename T> struct Integer { T raw;
  __device__ float get() const { return (float)raw; }
  __device__ void set(float f) { raw = (T)(int)f; } };
typedef Integer<signed char> I8;
typedef Integer<unsigned char> U8;
typedef Integer<short> I16;
typedef Integer<int> I32;
// WIDTH neighbours in one access.
template <typename T> struct __align__(sizeof(T) * WIDTH) Pack { T at[WIDTH]; };
template <typename T> __device__ Pack<T> load(const void* p, i64 offset) {
  return *(const Pack<T>*)((const T*)p + offset);
}
template <typename T> __device__ void store(void* p, i64 offset, const Pack<T>& pack) {
  *(Pack<T>*)((T*)p + offset) = pack;
}
"""

_FORWARD = r"""
#ifdef SIGNED
__device__ float clip(float raw, float top) {  // NaN stays NaN
  return raw < 0.0f ? 0.0f : raw > top ? top : raw;
}
__device__ float fire(float h, float top) {
#if SIGNED
  float spike = clip(ceilf(__fadd_rn(fabsf(h), -0.5f)), top);
  return h < 0.0f ? -spike : spike;
#else
  return clip(floorf(h), top);
#endif
}
extern "C" __global__ void gif_forward(
    const void* x_seq, const void* v_in, const int* steps, const int* step, void* spikes,
    void* v_out, void* v_seq, void* gates, i64 neurons, i64 time_steps, i64 channels,
    double v_init, double threshold_, double decay_, double top_, double lower_, double upper_) {
  const float threshold = threshold_, decay = decay_, top = top_, lower = lower_, upper = upper_;
  const i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
  if (at >= neurons) return;
  const i64 bytes = (time_steps + 7) / 8 * neurons;
  float v[WIDTH], total[WIDTH];
  int limit[WIDTH];
  unsigned gate[WIDTH], silent[WIDTH];
#pragma unroll
  for (int k = 0; k < WIDTH; k++) {
    total[k] = 0.0f; gate[k] = 0; silent[k] = 0; v[k] = (float)v_init; limit[k] = 0;
#if HAS_V
    v[k] = ((const float*)v_in)[at + k];
#endif
#if HAS_STEPS
    limit[k] = steps[(at + k) % channels];
#if HAS_STEP
    limit[k] -= *step;
#endif
#endif
  }
  Pack<X> next = load<X>(x_seq, at);
  for (i64 t = 0; t < time_steps; t++) {
    const Pack<X> now = next;
    if (t + 1 < time_steps) next = load<X>(x_seq, (t + 1) * neurons + at);
    Pack<S> out; Pack<F32> membrane;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
      float x = now.at[k].get();
#if DIVIDE
      x = __fdiv_rn(x, threshold);
#endif
#if LEAKY
      const float h = __fadd_rn(__fmul_rn(v[k], decay), x);
#else
      const float h = __fadd_rn(v[k], x);
#endif
      float spike = fire(h, top);
      bool open = h >= lower && h <= upper;
#if HAS_STEPS
      if (limit[k] <= t) { spike = 0.0f; open = false; }
#endif
#if HARD
      v[k] = spike == 0.0f ? h : 0.0f;
#else
      v[k] = __fadd_rn(h, -spike);
#endif
      gate[k] |= (unsigned)open << (t & 7);
      silent[k] |= (unsigned)(spike == 0.0f) << (t & 7);
      total[k] += spike;
      out.at[k].set(COUNT ? total[k] : spike);
      membrane.at[k].set(v[k]);
    }
    if (!COUNT) store<S>(spikes, t * neurons + at, out);
    else if (t + 1 == time_steps) store<S>(spikes, at, out);
    if (STORE_V_SEQ) store<F32>(v_seq, t * neurons + at, membrane);
    if (STORE_V && t + 1 == time_steps) store<F32>(v_out, at, membrane);
    if (GATES && ((t & 7) == 7 || t + 1 == time_steps)) {
      Pack<U8> g, q;
#pragma unroll
      for (int k = 0; k < WIDTH; k++) {
        g.at[k].raw = gate[k]; q.at[k].raw = silent[k]; gate[k] = 0; silent[k] = 0;
      }
      store<U8>(gates, t / 8 * neurons + at, g);
      if (GATES > 1) store<U8>(gates, bytes + t / 8 * neurons + at, q);
    }
  }
}
#endif
"""

_BACKWARD = r"""
#ifdef DETACH
extern "C" __global__ void gif_backward(
    const void* grad_spikes, const void* grad_v_out, const void* grad_v_seq, const void* gates,
    void* grad_x, void* grad_v_init, i64 neurons, i64 time_steps, double threshold_,
    double decay_) {
  const float threshold = threshold_, decay = decay_;
  const i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
  if (at >= neurons) return;
  const i64 bytes = (time_steps + 7) / 8 * neurons;
  Pack<F32> grad_v;
#pragma unroll
  for (int k = 0; k < WIDTH; k++) grad_v.at[k].raw = 0.0f;
#if HAS_V
  grad_v = load<F32>(grad_v_out, at);
#endif
  Pack<U8> gate, silent;
  Pack<S> grad;
#if HAS_SPIKES && COUNT
  grad = load<S>(grad_spikes, at);
#endif
  for (i64 t = time_steps - 1; t >= 0; t--) {
    if (t == time_steps - 1 || (t & 7) == 7) {
      gate = load<U8>(gates, t / 8 * neurons + at);
#if HARD
      silent = load<U8>(gates, bytes + t / 8 * neurons + at);
#endif
    }
#if HAS_SPIKES && !COUNT
    grad = load<S>(grad_spikes, t * neurons + at);
#endif
    Pack<F32> extra;
#if HAS_V_SEQ
    extra = load<F32>(grad_v_seq, t * neurons + at);
#endif
    Pack<X> out;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
      const bool open = (gate.at[k].raw >> (t & 7)) & 1;
      float below = grad_v.at[k].raw, above = 0.0f;
#if HAS_V_SEQ
      below = __fadd_rn(below, extra.at[k].raw);
#endif
#if HAS_SPIKES
      above = open ? grad.at[k].get() : 0.0f;
#endif
#if HARD
      if (!((silent.at[k].raw >> (t & 7)) & 1)) below = 0.0f;
#elif !DETACH
      if (open) below = 0.0f;
#endif
      const float grad_h = __fadd_rn(below, above);
      out.at[k].set(DIVIDE ? __fdiv_rn(grad_h, threshold) : grad_h);
      grad_v.at[k].raw = LEAKY ? __fmul_rn(grad_h, decay) : grad_h;
    }
    store<X>(grad_x, t * neurons + at, out);
  }
#if STORE_V
  store<F32>(grad_v_init, at, grad_v);
#endif
}
#endif
"""

SOURCE = _TYPES + _FORWARD + _BACKWARD
