// CUDA on the CPU for tests: the part of the language and runtime that our kernels use (see platform.cuh), never
// shipped.
//
// A block's threads are fibres on one OS thread. A fibre runs until a collective (barrier, warp operation), and the
// next one is drawn at random: the order differs from launch to launch, so that a missing barrier or a race between
// blocks shows as a result that changes with SIB_FAST_EMULATION_SEED. Blocks run one after another in random order.
// Shared memory is filled with NaN bits before every block, and so are the red zones on both sides of it: what is read
// there is NaN, what is written there is an error. Asynchronous copies land only in copy_async_wait; a collective that
// not all its threads reach is an error, not a hang. What it cannot show: rounding of the tensor cores, faults of
// global memory, speed. The compiler contracts a·b + c here as nvcc does there (CMakeLists.txt).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/check.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) double2 {
  double x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

namespace sib_fast::emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 96 * 1024;
constexpr size_t kRedZone = 4096, kAlignment = 128;

enum class State { ready, block_barrier, warp_barrier, done };

struct PendingCopy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

struct Fibre {
  jmp_buf where;  // where it goes on: inside its body, or at the start of the next one
  bool started = false;
  State state = State::ready;
  unsigned warp_mask = 0;
  uint3 thread{};
  std::vector<std::vector<PendingCopy>> groups{1};  // the last one is open
};

struct Block {
  Fibre* fibres;
  size_t count;
  std::vector<unsigned char> memory;  // red zone, shared memory on its alignment, red zone
  size_t shared_bytes = 0;
  std::vector<uint64_t> slots;  // one 16-word slot per thread for warp exchanges
  std::function<void()> body;
  jmp_buf scheduler;
  size_t running = 0;
  std::string failure;

  unsigned char* shared() {
    const auto begin = reinterpret_cast<uintptr_t>(memory.data()) + kRedZone;
    return reinterpret_cast<unsigned char*>((begin + kAlignment - 1) / kAlignment * kAlignment);
  }
  void poison() { std::memset(memory.data(), 0xff, memory.size()); }
  void check_red_zones() {
    const auto untouched = [](const unsigned char* begin, const unsigned char* end) {
      return *begin == 0xff && std::memcmp(begin, begin + 1, end - begin - 1) == 0;
    };
    if (!untouched(memory.data(), shared()) || !untouched(shared() + shared_bytes, memory.data() + memory.size()))
      throw std::runtime_error("emulation: a write outside the block's shared memory");
  }
};

// Plain globals under a mutex: thread-local ones cost a tenth of the time of every test.
inline std::mutex one_launch;
inline Block* block = nullptr;
inline uint3 thread_index{}, block_index{};
inline dim3 block_dim, grid_dim;

// Starts afresh whenever SIB_FAST_EMULATION_SEED changes, so that a test can try several schedules.
inline std::mt19937& generator() {
  static std::mt19937 g;
  static std::string known = "none yet";
  const char* seed = std::getenv("SIB_FAST_EMULATION_SEED");
  const std::string wanted = seed ? seed : "0";
  if (wanted != known) g.seed(static_cast<unsigned>(std::atoi(wanted.c_str())));
  known = wanted;
  return g;
}

inline Fibre& self() { return block->fibres[block->running]; }
inline int lane() { return static_cast<int>(block->running % kWarp); }
inline size_t warp_start() { return block->running / kWarp * kWarp; }

[[noreturn]] inline void back_to_scheduler() { _longjmp(block->scheduler, 1); }

inline void yield(State state, unsigned mask = 0) {
  Fibre& me = self();
  me.state = state;
  me.warp_mask = mask;
  if (_setjmp(me.where) == 0) back_to_scheduler();
}

// One body a block, for as long as the process lives: making a context costs two system calls, a body may cost less.
inline void fibre_main() {
  for (;;) {
    try {
      block->body();
    } catch (const std::exception& error) {
      block->failure = error.what();
    }
    yield(State::done);
  }
}

// Releases every barrier that all its threads have reached. Returns whether any was.
inline bool release() {
  Fibre* const fibres = block->fibres;
  bool released = false;
  for (size_t warp = 0; warp < block->count; warp += kWarp) {
    const size_t end = std::min(block->count, warp + kWarp);
    for (size_t i = warp; i < end; ++i) {
      if (fibres[i].state != State::warp_barrier) continue;
      const unsigned mask = fibres[i].warp_mask;
      bool all = true;
      for (size_t j = warp; j < end; ++j) {
        if (!(mask >> (j - warp) & 1)) continue;
        if (fibres[j].state != State::warp_barrier || fibres[j].warp_mask != mask) all = false;
      }
      if (!all) continue;
      for (size_t j = warp; j < end; ++j)
        if (mask >> (j - warp) & 1) fibres[j].state = State::ready;
      released = true;
    }
  }
  if (released) return true;
  for (size_t i = 0; i < block->count; ++i)
    if (fibres[i].state != State::block_barrier && fibres[i].state != State::done) return false;
  for (size_t i = 0; i < block->count; ++i) {
    if (fibres[i].state == State::block_barrier) {
      fibres[i].state = State::ready;
      released = true;
    }
  }
  return released;
}

// Fibres and their stacks, kept from launch to launch: touching fresh pages would take longer than the kernels.
struct Pool {
  std::vector<Fibre> fibres{1024};
  std::unique_ptr<char[]> stacks{new char[1024 * kStack]};
};
inline Pool& pool() {
  static Pool p;
  return p;
}

inline void start(size_t i) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = pool().stacks.get() + i * kStack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fibre_main, 0);
  setcontext(&context);
}

inline void run_block() {
  Fibre* const fibres = block->fibres;
  std::vector<size_t> ready;
  std::mt19937& random = generator();
  for (;;) {
    ready.clear();
    bool all_done = true;
    for (size_t i = 0; i < block->count; ++i) {
      if (fibres[i].state == State::ready) ready.push_back(i);
      if (fibres[i].state != State::done) all_done = false;
    }
    if (ready.empty()) {
      if (all_done) return;
      if (release()) continue;
      throw std::runtime_error("emulation: a barrier or warp operation that not all of its threads reach");
    }
    std::shuffle(ready.begin(), ready.end(), random);
    for (size_t i : ready) {
      block->running = i;
      Fibre& f = fibres[i];
      thread_index = f.thread;
      if (_setjmp(block->scheduler) == 0) {
        if (f.started) _longjmp(f.where, 1);
        f.started = true;
        start(i);
      }
      if (!block->failure.empty()) throw std::runtime_error(block->failure);
    }
  }
}

inline void run_grid(dim3 grid, dim3 threads, int64_t shared_bytes, const std::function<void()>& body) {
  const size_t count = size_t{threads.x} * threads.y * threads.z;
  if (count > 1024) throw std::runtime_error("emulation: more than 1024 threads a block");
  const std::lock_guard<std::mutex> lock(one_launch);
  Block here;
  here.fibres = pool().fibres.data();
  here.count = count;
  here.body = body;
  here.shared_bytes = static_cast<size_t>(shared_bytes);
  here.memory.resize(here.shared_bytes + kAlignment + 2 * kRedZone);
  here.slots.resize(count * 16);
  block = &here;
  block_dim = threads;
  grid_dim = grid;
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), generator());
  try {
    for (uint64_t b : order) {
      block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                     static_cast<unsigned>(b / grid.x / grid.y)};
      here.poison();
      for (size_t i = 0; i < count; ++i) {
        Fibre& f = here.fibres[i];
        f.state = State::ready;
        f.thread = {static_cast<unsigned>(i % threads.x), static_cast<unsigned>(i / threads.x % threads.y),
                    static_cast<unsigned>(i / threads.x / threads.y)};
        if (f.groups.size() != 1 || !f.groups[0].empty()) f.groups.assign(1, {});
      }
      run_block();
      here.check_red_zones();
    }
  } catch (...) {
    for (size_t i = 0; i < count; ++i) here.fibres[i].started = false;  // some stand in the middle of their bodies
    block = nullptr;
    throw;
  }
  block = nullptr;
}

// What launches ask for, instead of running them: for shapes too large to be run.
struct Recorder {
  static constexpr int64_t kFields = 5;  // grid x, y, z, threads, bytes of shared memory
  bool on = false;
  std::vector<int64_t> launches;
};
inline Recorder recorder;

// Every lane of `mask` brings `value`; each gets the values of all lanes (garbage for lanes outside the mask).
template <class T>
void exchange(unsigned mask, const T& value, T (&all)[kWarp]) {
  static_assert(sizeof(T) <= 128 && std::is_trivially_copyable<T>::value, "a slot holds 128 bytes");
  if (!(mask >> lane() & 1)) throw std::runtime_error("emulation: a lane outside the mask of its warp operation");
  std::memcpy(&block->slots[block->running * 16], &value, sizeof(T));
  yield(State::warp_barrier, mask);
  for (int i = 0; i < kWarp; ++i) {
    const size_t thread = warp_start() + i;
    if ((mask >> i & 1) && thread < block->count) std::memcpy(&all[i], &block->slots[thread * 16], sizeof(T));
  }
  yield(State::warp_barrier, mask);
}

}  // namespace sib_fast::emulation

#define threadIdx (sib_fast::emulation::thread_index)
#define blockIdx (sib_fast::emulation::block_index)
#define blockDim (sib_fast::emulation::block_dim)
#define gridDim (sib_fast::emulation::grid_dim)
constexpr int warpSize = 32;

inline void __syncthreads() { sib_fast::emulation::yield(sib_fast::emulation::State::block_barrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  sib_fast::emulation::yield(sib_fast::emulation::State::warp_barrier, mask);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  T all[32];
  sib_fast::emulation::exchange(mask, value, all);
  const int lane = sib_fast::emulation::lane();
  return all[lane / width * width + source % width];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  T all[32];
  sib_fast::emulation::exchange(mask, value, all);
  const int lane = sib_fast::emulation::lane(), other = lane ^ bits;
  return other / width == lane / width ? all[other] : value;
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  T all[32];
  sib_fast::emulation::exchange(mask, value, all);
  const int lane = sib_fast::emulation::lane();
  return lane % width >= static_cast<int>(delta) ? all[lane - delta] : value;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  T all[32];
  sib_fast::emulation::exchange(mask, value, all);
  const int lane = sib_fast::emulation::lane();
  return lane % width + static_cast<int>(delta) < width ? all[lane + delta] : value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  int all[32];
  sib_fast::emulation::exchange(mask, predicate, all);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && all[i]) bits |= 1u << i;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  T all[32];
  sib_fast::emulation::exchange(mask, value, all);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && std::memcmp(&all[i], &value, sizeof(T)) == 0) bits |= 1u << i;
  return bits;
}
template <class T>
T sib_fast_reduce(unsigned mask, T value, T (*combine)(T, T)) {
  T all[32];
  sib_fast::emulation::exchange(mask, value, all);
  bool first = true;
  T out{};
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    out = first ? all[i] : combine(out, all[i]);
    first = false;
  }
  return out;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return sib_fast_reduce<T>(mask, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return sib_fast_reduce<T>(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return sib_fast_reduce<T>(mask, value, [](T a, T b) { return std::max(a, b); });
}
template <class T>
T __reduce_or_sync(unsigned mask, T value) {
  return sib_fast_reduce<T>(mask, value, [](T a, T b) { return static_cast<T>(a | b); });
}

// Fibres change hands only at collectives, so plain operations are atomic here.
template <class T, class V>
T atomicAdd(T* to, V value) {
  static_assert(std::is_integral<T>::value, "float atomics are not deterministic: use an ordered sum");
  const T before = *to;
  *to = static_cast<T>(before + static_cast<T>(value));
  return before;
}
template <class T, class V>
T atomicMin(T* to, V value) {
  const T before = *to;
  *to = std::min(before, static_cast<T>(value));
  return before;
}
template <class T, class V>
T atomicMax(T* to, V value) {
  const T before = *to;
  *to = std::max(before, static_cast<T>(value));
  return before;
}
template <class T, class V>
T atomicOr(T* to, V value) {
  const T before = *to;
  *to = static_cast<T>(before | static_cast<T>(value));
  return before;
}
template <class T, class V>
T atomicExch(T* to, V value) {
  const T before = *to;
  *to = static_cast<T>(value);
  return before;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v)); }
inline unsigned __float_as_uint(float v) {
  unsigned u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline int __float_as_int(float v) { return static_cast<int>(__float_as_uint(v)); }
inline float __uint_as_float(unsigned u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}
inline float __int_as_float(int i) { return __uint_as_float(static_cast<unsigned>(i)); }
inline long long __double_as_longlong(double v) {
  long long i;
  std::memcpy(&i, &v, 8);
  return i;
}
inline double __longlong_as_double(long long i) {
  double v;
  std::memcpy(&v, &i, 8);
  return v;
}
inline unsigned __float2uint_rn(float v) { return static_cast<unsigned>(std::nearbyint(v)); }
inline unsigned long long __float2ull_rn(float v) { return static_cast<unsigned long long>(std::nearbyint(v)); }
inline unsigned long long __double2ull_rn(double v) { return static_cast<unsigned long long>(std::nearbyint(v)); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
using std::isfinite;
using std::isnan;
using std::max;
using std::min;

namespace sib_fast::cuda {

struct Stream {};
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
inline Stream current_stream(const Tensor&) { return {}; }

struct Device {
  int multiprocessors;
  int capability;
  int64_t block_shared;
};
// An H200, unless SIB_FAST_EMULATION_SHARED says how many KiB a block may have.
inline int64_t block_shared() {
  const char* kib = std::getenv("SIB_FAST_EMULATION_SHARED");
  return (kib ? std::atoll(kib) : 227) * 1024;
}
inline const Device& device_of(const Tensor&) {
  static thread_local Device device;
  device = Device{132, 90, block_shared()};
  return device;
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::block->shared());
}

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, Stream,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  SIB_CHECK(op, shared_bytes <= block_shared(), "a block may not have ", shared_bytes, " bytes of shared memory here");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("emulation: grid.y and grid.z go up to 65535");
  if (grid.x > 0x7fffffffu) throw std::runtime_error("emulation: grid.x goes up to 2^31 - 1");
  if (emulation::recorder.on) {
    for (int64_t field :
         {int64_t{grid.x}, int64_t{grid.y}, int64_t{grid.z}, int64_t{block.x} * block.y * block.z, shared_bytes})
      emulation::recorder.launches.push_back(field);
    return;
  }
  emulation::run_grid(grid, block, shared_bytes, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

inline void copy_async(void* shared, const void* global, int bytes, bool valid) {
  emulation::self().groups.back().push_back({shared, global, bytes, valid});
}
inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16))
    throw std::runtime_error("emulation: copy_async_16 needs 16-byte alignment");
  copy_async(shared, global, 16, valid);
}
inline void copy_async_4(void* shared, const void* global, bool valid = true) { copy_async(shared, global, 4, valid); }
inline void copy_async_commit() { emulation::self().groups.emplace_back(); }
template <int Pending>
void copy_async_wait() {
  auto& groups = emulation::self().groups;
  while (static_cast<int>(groups.size()) - 1 > Pending) {
    for (const auto& copy : groups.front()) {
      if (copy.valid)
        std::memcpy(copy.to, copy.from, copy.bytes);
      else
        std::memset(copy.to, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

inline void store_16(void* global, uint4 v) {
  if (reinterpret_cast<uintptr_t>(global) % 16) throw std::runtime_error("emulation: store_16 needs 16-byte alignment");
  std::memcpy(global, &v, sizeof(v));
}

// An ulp off in a third of the cases, so that code which relies on more shows.
inline float approximate_reciprocal(float y) {
  const float r = 1.0f / y;
  const uint32_t bits = __float_as_uint(r);
  return bits % 3 == 0 && std::isnormal(r) ? __uint_as_float(bits + 1) : r;
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine, all[32];
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  emulation::exchange(0xffffffffu, mine, all);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  // Tensor cores read 19 bits of each operand.
  const auto value = [](uint32_t bits) { return __uint_as_float(bits & ~0x1fffu); };
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    float sum = d[i];
    for (int k = 0; k < 8; ++k)
      sum += value(all[4 * g + k % 4].a[(k / 4) * 2 + i / 2]) * value(all[4 * column + k % 4].b[k / 4]);
    d[i] = sum;
  }
}

}  // namespace sib_fast::cuda
