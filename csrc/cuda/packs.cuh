// Packs that may be cut at their ends, and the type that elements are calculated in: what the passes of batch norm and
// those along rows share.
#pragma once

#include "cuda/pack.cuh"

namespace sib_fast::cuda::packs {

using cuda::Pack;

template <class E>
struct ComputeOf {
  using T = float;
};
template <>
struct ComputeOf<double> {
  using T = double;
};
template <class E>
using Compute = typename ComputeOf<E>::T;

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

}  // namespace sib_fast::cuda::packs
