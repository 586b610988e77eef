// Runs the threads of a grid on one thread of the CPU, for the emulation of CUDA (emulation.h).
//
// A block's threads are fibres on one OS thread. A fibre runs until a collective (barrier, warp operation), and the
// next one is drawn at random: the order differs from launch to launch, so that a missing barrier or a race between
// blocks shows as a result that changes with SIB_FAST_EMULATION_SEED. Blocks run one after another in random order.
// Shared memory is filled with NaN bits before every block, and so are the red zones on both sides of it: what is read
// there is NaN, what is written there is an error. Asynchronous copies land only in copy_async_wait; a collective that
// not all its threads reach is an error, not a hang.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
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

#include "cuda/emulation_banks.h"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace sib_fast::emulation {

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
