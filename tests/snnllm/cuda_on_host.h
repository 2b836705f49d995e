// CUDA C++ on the CPU: the primitives of snnllm.kernels.cuda.primitives, imitated.
//
// One cluster of blocks of threads at a time, one fiber a thread, so that a run is deterministic. What is asynchronous on
// the device happens as late as its waits allow: copies (cp.async) and products (wgmma) at the wait that needs
// them, from the memory of that moment. A wait for something that nobody brings ends the program.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __cluster_dims__(...)

struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
static int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static int min(int a, int b) { return a < b ? a : b; }
static unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static int __float_as_int(float f) { int i; memcpy(&i, &f, 4); return i; }
static float __int_as_float(int i) { float f; memcpy(&f, &i, 4); return f; }
static float __int2float_rn(int i) { return (float)i; }
static float __fmul_rn(float a, float b) { volatile float c = a * b; return c; }
static float __fadd_rn(float a, float b) { volatile float c = a + b; return c; }
static float __fdiv_rn(float a, float b) { volatile float c = a / b; return c; }
static float larger(float a, float b) { return a > b || a != a ? a : b; }
static float add_up(float a, float b) {  // the rounded sum, and what rounding left
  const float sum = __fadd_rn(a, b), of_b = __fadd_rn(sum, -a);
  const float left = __fadd_rn(__fadd_rn(a, -__fadd_rn(sum, -of_b)), __fadd_rn(b, -of_b));
  return left > 0.0f ? nextafterf(sum, INFINITY) : sum;
}
static unsigned smaller_halves(unsigned a, unsigned b) {
  const unsigned low = a << 16 < b << 16 ? a : b, high = a >> 16 < b >> 16 ? a : b;
  return (high & 0xffff0000u) | (low & 0xffffu);
}
static unsigned low_halves(float a, float b) {
  return ((unsigned)__float_as_int(a) & 0xffffu) | (unsigned)__float_as_int(b) << 16;
}
static float add_saturated(float a, float b) {
  const float c = __fadd_rn(a, b);
  return c > 0.0f ? c < 1.0f ? c : 1.0f : 0.0f;
}
static float add_down(float a, float b) {
  const double sum = (double)a + b;  // exact for numbers in 1/256 and 2^15
  const float near = (float)sum;
  return near > sum ? nextafterf(near, -INFINITY) : near;
}
static int sum_4(unsigned word, int add) {
  for (int i = 0; i < 4; i++) add += word >> 8 * i & 255;
  return add;
}
static float inverse_of(float a) { return a > 8.5e37f ? 0.0f : __fdiv_rn(1.0f, a); }  // the device has no subnormal ones
static float __fsqrt_rn(float a) { return sqrtf(a); }

struct Index { int x; };
static Index threadIdx, blockIdx, gridDim;
static int cluster = 1;  // blocks
alignas(1024) unsigned char shared_memories[8][256 * 1024];
#define SHARED_MEMORY (shared_memories[blockIdx.x % cluster])

struct Copy { unsigned to; const void* from; int bytes; };
struct Product { int* d; int columns; const unsigned* a; u64 counts; int add; };  // a: registers, read late
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  int phase = 0;  // of the barrier of the cluster
  std::vector<std::vector<Copy>> copies;  // groups; the last one is open
  std::vector<std::vector<Product>> products;
  std::vector<std::function<void()>> stores;  // of boxes
  bool shown = false;                         // what it wrote is, to a store
  unsigned exchange[8];
  unsigned address;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static Fiber& me() { return fibers[current]; }
static long idle;  // switches since something happened

static void yield() {
  swapcontext(&me().context, &scheduler);
}
template <typename Condition> static void wait_until(Condition condition) {
  while (!condition()) {
    if (++idle > 4000 + 4 * (long)fibers.size()) {
      fprintf(stderr, "deadlock at thread %d\n", threadIdx.x);
      exit(3);
    }
    yield();
  }
  idle = 0;
}
struct Meeting { int arrived = 0; long turn = 0; };
static std::map<int, Meeting> meetings;
static void meet(int name, int threads) {
  Meeting& m = meetings[name];
  const long turn = m.turn;
  if (++m.arrived == threads) m.arrived = 0, m.turn++, idle = 0;
  else wait_until([&] { return m.turn != turn; });
}
static void __syncthreads() { meet(-1 - blockIdx.x % cluster, fibers.size() / cluster); }
static void __syncwarp() { meet(current / 32, 32); }
static void cluster_meets() { meet(-100, fibers.size()); }
static void cluster_arrives() { me().phase++, idle = 0; }
static void cluster_waits() {  // who has ended has arrived at all that follow
  const int phase = me().phase;
  wait_until([&] {
    for (const Fiber& f : fibers)
      if (!f.done && f.phase < phase) return false;
    return true;
  });
}
static Fiber& lane_of_warp(int lane) { return fibers[current / 32 * 32 + lane]; }

static unsigned char* shared_at(unsigned at) { return SHARED_MEMORY + at; }
static unsigned shared_address(const void* p) { return (unsigned)((const unsigned char*)p - SHARED_MEMORY); }
// What the kernel in front writes: it comes when all threads of the first block (or cluster) wait for it.
struct Late { void* to; const void* from; size_t bytes; };
static std::vector<Late> late;
static bool comes_late = false;
extern "C" void arrives_late(void* to, const void* from, i64 bytes) {
  late.push_back({to, from, (size_t)bytes});
  comes_late = true;
}
static void wait_for_kernel_in_front() {
  if (!comes_late) return;
  meet(-200, fibers.size());
  for (const Late& l : late) memcpy(l.to, l.from, l.bytes);
  late.clear();
}
static void launch_dependents() {}
static void launch_dependents_behind(unsigned) {}
static unsigned of_rehearsal() { return 0; }
#ifdef REHEARSAL_ONLY
#define REHEARSED(first) for (unsigned real = 0, once = 1; once; once = 0)
#else
#define REHEARSED(first) for (unsigned real = (first) ? 0 : 1;; real = 1)
#endif
template <int N> static void give_registers() {}
template <int N> static void take_registers() {}

struct Barrier { int count, pending, bytes, phase; };
static std::map<unsigned, Barrier> barriers;
static void settle(Barrier& b) {
  idle = 0;
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.count;
}
static void barrier_init(unsigned at, int arrivals) { barriers[at] = {arrivals, arrivals, 0, 0}; }
static void barrier_fence() {}
static void barrier_arrive(unsigned at) {
  Barrier& b = barriers.at(at);
  if (--b.pending < 0) { fprintf(stderr, "too many arrivals\n"); exit(4); }
  settle(b);
}
static void barrier_expect(unsigned at, int bytes) {
  barriers.at(at).bytes += bytes;
  barrier_arrive(at);
}
static void barrier_wait(unsigned at, int parity) {
  wait_until([&] { return barriers.at(at).phase != parity; });
}

static void copy_16(unsigned to, const void* from) {
  if (to % 16 || (u64)from % 16) { fprintf(stderr, "misaligned copy\n"); exit(5); }
  me().copies.back().push_back({to, from, 16});
}
static void copy_4(unsigned to, const void* from) {
  me().copies.back().push_back({to, from, 4});
}
static void commit_copies() { me().copies.emplace_back(); }
template <int LEFT> static void finish_copies() {
  auto& groups = me().copies;
  if (LEFT == 0) groups.emplace_back();
  while (groups.size() > LEFT + 1) {
    for (const Copy& c : groups.front()) memcpy(shared_at(c.to), c.from, c.bytes);
    groups.erase(groups.begin());
  }
}
// A matrix of bytes in the place of a tensor map, and the boxes that the copy engine takes of it.
struct HostMap { const unsigned char* data; i64 rows, columns, box_rows, box_columns; };
static void box_copy(unsigned to, const Map* map, int column, int row, unsigned barrier) {
  const HostMap& m = *(const HostMap*)map;
  for (i64 r = 0; r < m.box_rows; r++)
    for (i64 c = 0; c < m.box_columns; c++) {
      unsigned at = to + r * m.box_columns + c;
      at ^= (at >> 7 & (m.box_columns / 16 - 1)) << 4;
      const bool inside = row + r < m.rows && column + c < m.columns;
      *shared_at(at) = inside ? m.data[(row + r) * m.columns + column + c] : 0;
    }
  Barrier& b = barriers.at(barrier);
  b.bytes -= m.box_rows * m.box_columns;
  settle(b);
}

static void box_store(const Map* map, int column, int row, unsigned from) {  // read as late as its wait allows
  const HostMap m = *(const HostMap*)map;
  if (from % (m.box_columns * 8)) { fprintf(stderr, "a box is not where its swizzle begins\n"); exit(6); }
  for (int lane = 0; lane < 32; lane++) {
    if (!lane_of_warp(lane).shown) { fprintf(stderr, "stored before it is shown\n"); exit(6); }
    lane_of_warp(lane).shown = false;
  }
  me().stores.push_back([=] {
    for (i64 r = 0; r < m.box_rows; r++)
      for (i64 c = 0; c < m.box_columns; c++) {
        unsigned at = from + r * m.box_columns + c;
        at ^= (at >> 7 & (m.box_columns / 16 - 1)) << 4;
        const bool inside = row + r < m.rows && column + c < m.columns;
        if (inside) ((unsigned char*)m.data)[(row + r) * m.columns + column + c] = *shared_at(at);
      }
  });
}
static void finish_stores() {
  for (auto& store : me().stores) store();
  me().stores.clear();
}
static void stores_have_read() { finish_stores(); }
static void show_to_stores() { me().shown = true; }

static std::map<const void*, int> fetched;
static void fetch(const void* from, int bytes) {
  if (bytes <= 0 || bytes % 16 || (u64)from % 16) { fprintf(stderr, "bad fetch\n"); exit(6); }
  if (!fetched.emplace(from, bytes).second) { fprintf(stderr, "fetched twice\n"); exit(6); }
}

static void load_matrices(unsigned (&a)[4], unsigned at) {
  const int lane = threadIdx.x % 32;
  me().address = at;
  __syncwarp();
  for (int i = 0; i < 4; i++)
    memcpy(&a[i], shared_at(lane_of_warp(8 * i + lane / 4).address + lane % 4 * 4), 4);
  __syncwarp();
}
static void store_transposed(unsigned at, const unsigned (&a)[4]) {
  const int lane = threadIdx.x % 32;
  me().address = at;
  __syncwarp();
  for (int i = 0; i < 4; i++)
    for (int e = 0; e < 2; e++) {
      const unsigned short half = (unsigned short)(a[i] >> 16 * e);
      memcpy(shared_at(lane_of_warp(8 * i + lane % 4 * 2 + e).address + lane / 4 * 2), &half, 2);
    }
  __syncwarp();
}
template <typename T> static T of_lane(T x, int lane) {
  memcpy(me().exchange, &x, sizeof x);
  __syncwarp();
  memcpy(&x, lane_of_warp(lane).exchange, sizeof x);
  __syncwarp();
  return x;
}
template <typename T> static T of_partner(T x, int step) { return of_lane(x, threadIdx.x % 32 ^ step); }
template <typename T, typename Join> static T of_warp(T x, Join join) {
  for (int step = 16; step > 0; step /= 2) x = join(x, of_partner(x, step));
  return x;
}
static bool any_of_warp(bool x) { return of_warp((int)x, [](int a, int b) { return a | b; }); }
static void raise(unsigned* shared, unsigned x) { *shared = max(*shared, x); }
static void add_to(int* shared, int x) { *shared += x; }
static unsigned maximum_of_warp(unsigned x) { return of_warp(x, max); }
static int multiply_add(int a, int b, int c) { return a * b + c; }
static unsigned minimum_of_warp(unsigned x) { return of_warp(x, [](unsigned a, unsigned b) { return a < b ? a : b; }); }
static int sum_of_warp(int x) { return of_warp(x, [](int a, int b) { return a + b; }); }
static float of_block(const float* mine, int rank) {
  const unsigned at = shared_address(mine);
  float v;
  memcpy(&v, shared_memories[rank] + at, 4);
  return v;
}
static void to_block(int* mine, int rank, int value) {
  memcpy(shared_memories[rank] + shared_address(mine), &value, 4);
}
static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
static float half_to_float(unsigned short bits) { return (float)*(_Float16*)&bits; }
static int byte_of(unsigned word, int i) { return (signed char)(word >> 8 * i); }
static int dot_4(unsigned a, unsigned b, int add) {
  for (int i = 0; i < 4; i++) add += byte_of(a, i) * byte_of(b, i);
  return add;
}
// Element [row][k] of a 16 x 32 operand that lies in the registers of a warp.
static int left(int row, int k) {
  return (unsigned char)byte_of(lane_of_warp(row % 8 * 4 + k % 16 / 4).exchange[k / 16 * 2 + row / 8], k % 4);
}
static void multiply_16x8(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                          unsigned b1) {
  const int lane = threadIdx.x % 32;
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(me().exchange, mine, sizeof mine);
  __syncwarp();
  for (int e = 0; e < 4; e++)
    for (int k = 0; k < 32; k++) {
      const unsigned right = lane_of_warp((lane % 4 * 2 + e % 2) * 4 + k % 16 / 4).exchange[4 + k / 16];
      c[e] += left(lane / 4 + e / 2 * 8, k) * (unsigned char)byte_of(right, k % 4);
    }
  __syncwarp();
}
static void fence() {}
static void commit() { me().products.emplace_back(); }
template <int SIZE> static void multiply(int (&d)[SIZE], const unsigned* a, u64 counts, int add) {
  me().products.back().push_back(
      {d, 2 * SIZE, a, counts, add});
}
static void run_product(int index) {
  const int lane = threadIdx.x % 32;
  const Product& mine = me().products.front()[index];
  for (int v = 0; v < mine.columns / 2; v++) {
    const int row = lane / 4 + v % 4 / 2 * 8, n = v / 4 * 8 + lane % 4 * 2 + v % 2;
    int sum = mine.add ? mine.d[v] : 0;
    for (int k = 0; k < 32; k++) {
      unsigned at = ((unsigned)(mine.counts & 0x3FFF) << 4) + n / 8 * 1024 + n % 8 * 128 + k;
      at ^= (at >> 7 & 7) << 4;
      const Product& other = lane_of_warp(row % 8 * 4 + k % 16 / 4).products.front()[index];
      sum += (unsigned char)byte_of(other.a[k / 16 * 2 + row / 8], k % 4) * (unsigned char)*shared_at(at);
    }
    mine.d[v] = sum;
  }
}
template <int LEFT> static void finish() {
  auto& groups = me().products;
  while (groups.size() > LEFT + 1) {
    __syncwarp();
    for (size_t i = 0; i < groups.front().size(); i++) run_product(i);
    __syncwarp();
    groups.erase(groups.begin());
  }
}
static int finished(int sum) { return sum; }
static void not_before(unsigned&) {}
#if defined(OUT) && OUT == 2  // float16, else bfloat16; to nearest even
static unsigned half_of(float f) {
  const _Float16 rounded = (_Float16)f;
  unsigned short bits;
  memcpy(&bits, &rounded, sizeof bits);
  return bits;
}
static float low_of(unsigned pair) {
  const unsigned short bits = (unsigned short)pair;
  _Float16 half;
  memcpy(&half, &bits, sizeof half);
  return (float)half;
}
#else
static unsigned half_of(float f) {
  const unsigned u = __float_as_int(f);
  return (u + 0x7FFF + (u >> 16 & 1)) >> 16;
}
static float low_of(unsigned pair) { return __int_as_float(pair << 16); }
#endif
static unsigned pair(float low, float high) { return half_of(low) | half_of(high) << 16; }
static float high_of(unsigned pair) { return low_of(pair >> 16); }
template <typename T, int BITS> static unsigned highest(unsigned a, unsigned b, unsigned c) {
  unsigned out = 0;
  for (int at = 0; at < 32; at += BITS) {
    const T x = (T)(a >> at), y = (T)(b >> at), z = (T)(c >> at), most = x > y ? x > z ? x : z : y > z ? y : z;
    out |= ((unsigned)most & (unsigned)((1ull << BITS) - 1)) << at;
  }
  return out;
}
template <bool HALVES> static unsigned largest(unsigned a, unsigned b, unsigned c) {
  return HALVES ? highest<short, 16>(a, b, c) : highest<int, 32>(a, b, c);
}
template <bool HALVES> static unsigned farthest(unsigned a, unsigned b, unsigned c) {
  return HALVES ? highest<unsigned short, 16>(a, b, c) : highest<unsigned, 32>(a, b, c);
}

static std::function<void()> body;
static void enter() {
  body();
  me().done = true;
  idle = 0;
}
static void run(int blocks, int threads, std::function<void()> kernel, int together = 1) {
  body = kernel;
  gridDim.x = blocks;
  cluster = together;
  for (int block = 0; block < blocks; block += cluster) {
    memset(shared_memories, 0xA5, cluster * sizeof *shared_memories);
    meetings.clear();
    barriers.clear();
    idle = 0;
    fibers = std::vector<Fiber>(cluster * threads);
    for (Fiber& f : fibers) {
      f.stack.resize(64 * 1024);
      f.copies.resize(1);
      f.products.resize(1);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = &scheduler;
      makecontext(&f.context, enter, 0);
    }
    for (int left_over = 1; left_over > 0;) {
      left_over = 0;
      for (current = 0; current < cluster * threads; current++) {
        if (me().done) continue;
        left_over++;
        threadIdx.x = current % threads;
        blockIdx.x = block + current / threads;
        swapcontext(&scheduler, &fibers[current].context);
      }
    }
  }
}
