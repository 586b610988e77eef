// What the passes of batch norm and of layer norm share: sums about a pivot, and sums down the rows of a matrix by
// blocks whose threads lie in rows themselves.
#pragma once

#include <algorithm>

#include "common/norm.h"
#include "cuda/block.cuh"
#include "cuda/pack.cuh"

namespace sib_fast::cuda {

// Σ (x - pivot), Σ (x - pivot)² of `count` elements, the first of M; others are the first once more. They are about one
// of the elements, so that their roundings in T are parts of what they spread, wherever the pivot lies.
template <class T, int M>
__device__ __forceinline__ void add_about_pivot(const T (&x)[M], int count, T pivot, double (&sums)[2]) {
  const T local = x[0];
  T sum = T(0), square = T(0);
#pragma unroll
  for (int i = 1; i < M; ++i) {
    const T d = x[i] - local;
    sum += d;
    square += d * d;
  }
  const double step = static_cast<double>(local) - static_cast<double>(pivot), shift = count * step, s = sum;
  sums[0] += s + shift;
  sums[1] += static_cast<double>(square) + (2.0 * s + shift) * step;
}

// Cuts aim at so many rounds of blocks (blocks_for), in at most kMostParts parts to merge. What the best are, no device
// has said yet.
constexpr int64_t kNormRounds = 16, kMostParts = 512;

// 2^bits threads side by side, at most 32, for `wanted` places.
inline int width_bits_of(int64_t wanted) {
  int bits = 0;
  while (bits < 5 && (int64_t{1} << bits) < wanted) ++bits;
  return bits;
}

struct RowParts {
  int64_t step;  // rows of a part
  int parts;
};
// Of so many rows of x for so many tiles of columns; a part has at least `least` rows.
inline RowParts cut_rows(const Tensor& x, int64_t rows, int64_t tiles, int64_t least) {
  if (rows <= 2 * least) return {rows, 1};
  const int64_t most = std::min(kMostParts, rows / least);
  const int64_t step = divide_up(rows, std::min(divide_up(blocks_for(x, kNormRounds), tiles), most));
  return {step, static_cast<int>(divide_up(rows, step))};
}

// Rows of `width` threads are halved onto each other, until the first row has the sums of all. shared
// [V·K·kThreads]; free again after a barrier.
template <int kThreads, int V, int K>
__device__ __forceinline__ void sum_rows_of_threads(double (&sums)[V][K], int width, double* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto slot = [&](int i, int s, int of) -> double& { return shared[(i * K + s) * kThreads + of]; };
#pragma unroll
  for (int i = 0; i < V; ++i) {
#pragma unroll
    for (int s = 0; s < K; ++s) slot(i, s, thread) = sums[i][s];
  }
  for (int half = kThreads / 2; half >= width; half /= 2) {
    __syncthreads();
    if (thread >= half) continue;
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (int s = 0; s < K; ++s) slot(i, s, thread) += slot(i, s, thread + half);
    }
  }
  if (thread >= width) return;
  // The first row reads what it has added itself.
#pragma unroll
  for (int i = 0; i < V; ++i) {
#pragma unroll
    for (int s = 0; s < K; ++s) sums[i][s] = slot(i, s, thread);
  }
}

}  // namespace sib_fast::cuda
