// Packs: neighbouring elements that one load or store moves, 16 bytes of them or less at a time.
#pragma once

#include <cstring>
#include <initializer_list>

#include "cuda/platform.cuh"

namespace sib_fast::cuda {

template <class E, int V>
struct alignas(sizeof(E) * V < 16 ? sizeof(E) * V : 16) Pack {
  static constexpr int kCount = V;
  E value[V];
};
template <class E>
using Pack16 = Pack<E, 16 / static_cast<int>(sizeof(E))>;

template <int V, class E>
__device__ __forceinline__ Pack<E, V> load_pack(const E* from) {
  using P = Pack<E, V>;
  expect_access(Access::read, from, sizeof(P));
  return *reinterpret_cast<const P*>(from);
}

// To global memory; each 16 bytes in one instruction (store_16).
template <class E, int V>
__device__ __forceinline__ void store_pack(E* to, const Pack<E, V>& pack) {
  if constexpr (sizeof(pack) % 16 == 0) {
#pragma unroll
    for (int part = 0; part < static_cast<int>(sizeof(pack)) / 16; ++part) {
      uint4 bits;
      memcpy(&bits, pack.value + part * Pack16<E>::kCount, sizeof(bits));
      store_16(to + part * Pack16<E>::kCount, bits);
    }
  } else {
    expect_access(Access::write, to, sizeof(pack));
    *reinterpret_cast<Pack<E, V>*>(to) = pack;
  }
}
// To shared memory, which store_16 does not reach.
template <class E, int V>
__device__ __forceinline__ void share_pack(E* to, const Pack<E, V>& pack) {
  expect_access(Access::write, to, sizeof(pack));
  *reinterpret_cast<Pack<E, V>*>(to) = pack;
}

// Whether packs may be read and written at every one of them; a view (x[1:]) may start between two. Null is no tensor.
inline bool start_at_packs(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  return true;
}

}  // namespace sib_fast::cuda
