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
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <set>
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
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
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

// Reads, writes and asynchronous copies of packs in shared memory while it is on, and how often they meet in a bank: a
// warp's k-th access of a kind is one instruction, and the hardware serves 128 bytes of it at a time, each of the 32
// banks one word. For launches whose lanes all do the same; a lane that skips an access would be paired wrongly.
struct Banks {
  static constexpr int kKinds = 3;                // as Access
  static constexpr int64_t kFields = 2 * kKinds;  // of each kind: transfers of 128 bytes, times they take
  struct Access {
    int64_t word;  // of shared memory
    int words;
  };
  bool on = false;
  std::vector<std::array<std::vector<Access>, kKinds>> of_thread;  // of the block that runs
  std::vector<int64_t> launches;

  void begin_launch(size_t threads) {
    of_thread.assign(threads, {});
    launches.resize(launches.size() + kFields, 0);
  }
  void end_block() {
    int64_t* const counts = launches.data() + launches.size() - kFields;
    for (size_t warp = 0; warp < of_thread.size(); warp += kWarp) {
      const size_t lanes = std::min<size_t>(kWarp, of_thread.size() - warp);
      for (int kind = 0; kind < kKinds; ++kind) {
        size_t most = 0;
        for (size_t i = 0; i < lanes; ++i) most = std::max(most, of_thread[warp + i][kind].size());
        for (size_t k = 0; k < most; ++k) count(warp, lanes, kind, k, counts + 2 * kind);
      }
    }
    for (auto& kinds : of_thread)
      for (auto& accesses : kinds) accesses.clear();
  }

 private:
  void count(size_t warp, size_t lanes, int kind, size_t k, int64_t* counts) const {
    std::array<std::set<int64_t>, 32> words_of_bank;
    int gathered = 0;
    const auto transfer = [&] {
      if (gathered == 0) return;
      size_t times = 0;
      for (auto& words : words_of_bank) times = std::max(times, words.size()), words.clear();
      counts[0] += 1;
      counts[1] += static_cast<int64_t>(times);
      gathered = 0;
    };
    for (size_t i = 0; i < lanes; ++i) {
      const auto& mine = of_thread[warp + i][kind];
      if (k >= mine.size()) continue;
      for (int w = 0; w < mine[k].words; ++w) words_of_bank[(mine[k].word + w) % 32].insert(mine[k].word + w);
      gathered += mine[k].words;
      if (gathered == 32) transfer();
    }
    transfer();
  }
};
inline Banks banks;

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
  if (banks.on) banks.begin_launch(count);
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
      if (banks.on) banks.end_block();
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
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  int all[32];
  sib_fast::emulation::exchange(mask, predicate, all);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && all[i]) bits |= 1u << i;
  return bits;
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
T atomicOr(T* to, V value) {
  const T before = *to;
  *to = static_cast<T>(before | static_cast<T>(value));
  return before;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __float_as_uint(float v) {
  unsigned u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}
inline unsigned __float2uint_rn(float v) { return static_cast<unsigned>(std::nearbyint(v)); }
inline unsigned long long __float2ull_rn(float v) { return static_cast<unsigned long long>(std::nearbyint(v)); }
inline unsigned long long __double2ull_rn(double v) { return static_cast<unsigned long long>(std::nearbyint(v)); }
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
// An H200, unless SIB_FAST_EMULATION_SHARED says how many KiB a block may have, or
// SIB_FAST_EMULATION_MULTIPROCESSORS how many multiprocessors there are.
inline int64_t block_shared() {
  const char* kib = std::getenv("SIB_FAST_EMULATION_SHARED");
  return (kib ? std::atoll(kib) : 227) * 1024;
}
inline const Device& device_of(const Tensor&) {
  static thread_local Device device;
  const char* multiprocessors = std::getenv("SIB_FAST_EMULATION_MULTIPROCESSORS");
  device = Device{multiprocessors ? std::atoi(multiprocessors) : 132, 90, block_shared()};
  return device;
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::block->shared());
}

enum class Access { copy, read, write };
inline void expect_access(Access access, const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % std::min(bytes, 16))
    throw std::runtime_error("emulation: a pack off its boundary");
  emulation::Banks& banks = emulation::banks;
  const int64_t at = static_cast<const unsigned char*>(address) - emulation::block->shared();
  if (!banks.on || at < 0 || at >= static_cast<int64_t>(emulation::block->shared_bytes)) return;
  for (int64_t part = 0; part < bytes; part += 16)
    banks.of_thread[emulation::block->running][static_cast<int>(access)].push_back(
        {(at + part) / 4, std::min(bytes, 16) / 4});
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

template <int Bytes, bool InL1 = Bytes != 16>
void copy_async(void* shared, const void* global, bool valid = true) {
  expect_access(Access::copy, shared, Bytes);
  if (valid && reinterpret_cast<uintptr_t>(global) % Bytes)
    throw std::runtime_error("emulation: an asynchronous copy off its boundary");
  emulation::self().groups.back().push_back({shared, global, Bytes, valid});
}
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
  expect_access(Access::write, global, 16);
  std::memcpy(global, &v, sizeof(v));
}

// An ulp off in a third of the cases, so that code which relies on more shows.
inline float approximate_reciprocal(float y) {
  const float r = 1.0f / y;
  const uint32_t bits = __float_as_uint(r);
  return bits % 3 == 0 && std::isnormal(r) ? __uint_as_float(bits + 1) : r;
}

inline float nearest_tf32(float a) {
  const float scaled = a * 8193.0f;
  return static_cast<float>(static_cast<double>(scaled) - 8192.0 * static_cast<double>(a));
}
inline float toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
}

// One exchange for the whole step, and the truncation of the hardware's sums.
template <int MT, int NT>
void warp_mma(float (&acc)[4 * MT * NT], const float (&a)[4 * MT], const float (&b)[2 * NT], bool split) {
  struct Fragments {
    float a[4 * MT], b[2 * NT];
  } mine, all[32];
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  emulation::exchange(0xffffffffu, mine, all);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  double left[2][2 * MT][8], right[2][2 * NT][8];  // [big, small][row or column of this lane][k]
  const auto put = [](double (&big)[8], double (&small)[8], int k, float value) {
    const float head = nearest_tf32(value);
    big[k] = head;
    small[k] = __uint_as_float(__float_as_uint(value - head) & ~0x1fffu);
  };
  for (int k = 0; k < 8; ++k) {
    for (int r = 0; r < 2 * MT; ++r)
      put(left[0][r], left[1][r], k, all[4 * g + k % 4].a[4 * (r / 2) + 2 * (k / 4) + r % 2]);
    for (int c = 0; c < 2 * NT; ++c)
      put(right[0][c], right[1][c], k, all[4 * (2 * t + c % 2) + k % 4].b[2 * (c / 2) + k / 4]);
  }
  const auto product = [&](int x, int y) {
    for (int e = 0; e < 4 * MT * NT; ++e) {
      const int r = e / 4 / NT * 2 + e % 4 / 2, c = e / 4 % NT * 2 + e % 2;
      double sum = acc[e];
      for (int k = 0; k < 8; ++k) sum += left[x][r][k] * right[y][c][k];
      acc[e] = toward_zero(sum);
    }
  };
  if (split) {
    product(1, 0);
    product(0, 1);
  }
  product(0, 0);
}

}  // namespace sib_fast::cuda
