// Sums, scans and the "last block" of one-dimensional blocks whose threads are whole warps. Every sum has a fixed
// order.
#pragma once

#include "cuda/platform.cuh"

namespace sib_fast::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x / 32); }

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(kWholeWarp, value, bit);
  return value;
}
template <class T>
__device__ __forceinline__ T warp_inclusive_scan(T value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T before = __shfl_up_sync(kWholeWarp, value, step);
    if (lane_of_thread() >= step) value += before;
  }
  return value;
}

// The sum over the block, in every thread. shared [warps], free again on return.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
  value = warp_sum(value);
  if (lane_of_thread() == 0) shared[warp_of_thread()] = value;
  __syncthreads();
  T total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += shared[w];
  __syncthreads();
  return total;
}

// Sum of the values of this thread and those before it, and of all. shared [warps], free again on return.
template <class T>
__device__ __forceinline__ T block_inclusive_scan(T value, T* shared, T& total) {
  const T inside = warp_inclusive_scan(value);
  if (lane_of_thread() == 31) shared[warp_of_thread()] = inside;
  __syncthreads();
  T before = 0;
  total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) {
    if (w < warp_of_thread()) before += shared[w];
    total += shared[w];
  }
  __syncthreads();
  return before + inside;
}

// The least and the greatest value of the block, in every thread. shared [2·threads], free again on return.
template <class T>
__device__ __forceinline__ void block_extremes(T& low, T& high, T* shared) {
  T* lows = shared;
  T* highs = shared + blockDim.x;
  lows[threadIdx.x] = low;
  highs[threadIdx.x] = high;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      if (lows[threadIdx.x + half] < lows[threadIdx.x]) lows[threadIdx.x] = lows[threadIdx.x + half];
      if (highs[threadIdx.x + half] > highs[threadIdx.x]) highs[threadIdx.x] = highs[threadIdx.x + half];
    }
  }
  __syncthreads();
  low = lows[0];
  high = highs[0];
  __syncthreads();
}

// True in the block that arrives last of `blocks` at `counter` (zero before): it sees what all of them wrote. One word
// of shared memory, free again on return.
__device__ __forceinline__ bool is_last_block(uint32_t* counter, uint32_t blocks, uint32_t* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *shared = atomicAdd(counter, 1u) + 1 == blocks;
    __threadfence();
  }
  __syncthreads();
  const bool last = *shared != 0;
  __syncthreads();
  return last;
}

}  // namespace sib_fast::cuda
