// 16 bytes of elements, read and written at once.
#pragma once

#include <cstring>
#include <initializer_list>

#include "cuda/platform.cuh"

namespace sib_fast::cuda {
namespace {

template <class E>
struct alignas(16) Pack16 {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(E));
  E value[kCount];
};

template <class E>
__device__ __forceinline__ void store_pack(E* to, const Pack16<E>& pack) {
  uint4 bits;
  memcpy(&bits, &pack, sizeof(bits));
  store_16(to, bits);
}

// Whether packs may be read and written at every one of them; a view (x[1:]) may start between two. Null is no tensor.
inline bool start_at_packs(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  return true;
}

}  // namespace
}  // namespace sib_fast::cuda
