// Packs: neighbouring elements that one load or store moves, 16 bytes of them or less at a time; and packs that may be
// cut at their ends.
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

// ---- packs cut at their ends ----------------------------------------------------------------------------------------

namespace packs {

// Elements first + lo … first + hi - 1 at their places. Not packed, other places hold one of them; packed, neighbours.
template <class E, int V>
__device__ __forceinline__ Pack<E, V> load(const E* from, int64_t first, int lo, int hi, bool packed) {
  if (packed) return load_pack<V>(from + first);
  Pack<E, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.value[i] = from[first + (i < lo ? lo : i < hi ? i : hi - 1)];
  return pack;
}
template <class E, int V>
__device__ __forceinline__ void store(E* to, int64_t first, int lo, int hi, bool packed, const Pack<E, V>& pack) {
  if (packed && lo == 0 && hi == V) return store_pack(to + first, pack);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i >= lo && i < hi) to[first + i] = pack.value[i];
  }
}

// Places outside lo … hi - 1 made to count for nothing: x that of the first place inside, the others 0.
template <int kInputs, int M, class T>
__device__ __forceinline__ void blank(T (&v)[kInputs][M], int lo, int hi) {
  if (lo == 0 && hi == M) return;
  T inside = v[kInputs - 1][0];
#pragma unroll
  for (int i = 1; i < M; ++i) inside = i == lo ? v[kInputs - 1][i] : inside;
#pragma unroll
  for (int i = 0; i < M; ++i) {
    if (i >= lo && i < hi) continue;
#pragma unroll
    for (int t = 0; t + 1 < kInputs; ++t) v[t][i] = T(0);
    v[kInputs - 1][i] = inside;
  }
}

// Elements between where data starts and the boundary of a pack of `pack` elements before it.
template <class E>
int64_t misalignment(const E* data, int64_t pack) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) / sizeof(E)) % pack;
}

}  // namespace packs
}  // namespace sib_fast::cuda
