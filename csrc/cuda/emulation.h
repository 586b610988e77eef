// CUDA on the CPU for tests: the part of the language and runtime that our kernels use (see platform.cuh), never
// shipped.
//
// emulation_threads.h runs a grid's threads, emulation_banks.h counts how their accesses meet in banks; here are the
// built-in names of CUDA, and the twins of what platform.cuh has for nvcc. What the emulation cannot show: rounding of
// the tensor cores, faults of global memory, speed. The compiler contracts a·b + c here as nvcc does there
// (CMakeLists.txt).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "cuda/emulation_threads.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }

namespace sib_fast::emulation {

// What launches ask for, instead of running them: for shapes too large to be run.
struct Recorder {
  static constexpr int64_t kFields = 5;  // grid x, y, z, threads, bytes of shared memory
  bool on = false;
  std::vector<int64_t> launches;
};
inline Recorder recorder;

}  // namespace sib_fast::emulation

#define threadIdx (sib_fast::emulation::thread_index)
#define blockIdx (sib_fast::emulation::block_index)
#define blockDim (sib_fast::emulation::block_dim)
#define gridDim (sib_fast::emulation::grid_dim)

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
