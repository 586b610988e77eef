// What one warp multiplies: tiles of Grams and of N×D products, on tensor cores or in plain arithmetic.
//
// Operands in shared memory: panels of 8 along the contraction, [K/8][rows][8], the two quads of a row exchanged in
// rows 4 … 7 of 8, so that a warp's 8- and 16-byte reads touch every bank once. Tensor cores: products of two tf32 are
// exact, but every mma truncates its sum (measured by others on V100 … H100): the error grows with the number of mma in
// a chain, not with its root. So a chain starts at 0, has at most kChain products (each rule below), and is added in
// float32 outside. tf32x3: a = big + small, both tf32; small·big + big·small + big·big leaves 2^-22 of each product.
#pragma once

#include "cuda/pack.cuh"

namespace sib_fast::cuda {

constexpr int kChain = 32;      // products that one accumulator sees before it is added to its sum
constexpr int kPartial = 1024;  // products of a float32 sum before it is added in float64
constexpr int kPanel = 8;       // contraction length of a panel

// Where element k (0 … 7) of a row lies in its panel; k even, and what is read from there may be 2 or (k % 4 = 0) 4
// long.
__device__ __forceinline__ int in_panel(int row, int k) { return row * kPanel + (k ^ (row & 4)); }

template <class T>
__device__ __forceinline__ T weight_of(T mask, bool foreground) {
  return foreground ? mask : T(1) - mask;
}

// ---- a warp's tile --------------------------------------------------------------------------------------------------
// A lane's accumulators are kLaneRows × kLaneCols elements of the tile: index(r, c) at row(r, lane), col(c, lane).
// gram_step: acc += A·Bᵀ over one panel; a, b point at the panel rows of the tile.
// product_step: acc += S·(map ⊙ weight) over one panel; s at the panel rows of S, map and mask at [8][pitch] of the
// tile.

template <int MT, int NT>
struct TensorCores {
  using T = float;
  static constexpr int kUnroll = 2;  // panels whose reads may overlap: 128 registers hold no more
  static constexpr int kRun = 2;     // neighbouring columns of a lane: c and c+1 for even c
  static constexpr int kRows = 16 * MT, kCols = 8 * NT, kAcc = 4 * MT * NT;

  static constexpr int kLaneRows = 2 * MT, kLaneCols = 2 * NT;
  static __device__ __forceinline__ constexpr int index(int r, int c) {
    return (r / 2 * NT + c / 2) * 4 + r % 2 * 2 + c % 2;
  }
  static __device__ __forceinline__ int row(int r, int lane) { return r * 8 + lane / 4; }
  static __device__ __forceinline__ int col(int c, int lane) { return c / 2 * 8 + lane % 4 * 2 + c % 2; }

  // k = 2t, 2t+1 of memory are the instruction's k = t, t+4: the contraction has no order, and both come in one read.
  static __device__ __forceinline__ void load_rows(const float* panel, int lane, float (&a)[4 * MT]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
      const auto pair = load_pack<2>(panel + in_panel(8 * i + g, 2 * t));
      a[i / 2 * 4 + i % 2] = pair.value[0];
      a[i / 2 * 4 + i % 2 + 2] = pair.value[1];
    }
  }

  static __device__ __forceinline__ void gram_step(float (&acc)[kAcc], const float* a, const float* b, int lane,
                                                   bool split) {
    const int g = lane / 4, t = lane % 4;
    float left[4 * MT], right[2 * NT];
    load_rows(a, lane, left);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const auto pair = load_pack<2>(b + in_panel(8 * n + g, 2 * t));
      right[2 * n] = pair.value[0];
      right[2 * n + 1] = pair.value[1];
    }
    warp_mma<MT, NT>(acc, left, right, split);
  }

  static __device__ __forceinline__ void product_step(float (&acc)[kAcc], const float* s, const float* map,
                                                      const float* mask, int pitch, int lane, bool foreground,
                                                      bool split) {
    const int g = lane / 4, t = lane % 4;
    float left[4 * MT], right[2 * NT];
    load_rows(s, lane, left);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = (2 * t + j) * pitch + 8 * n + g;
        right[2 * n + j] = map[at] * weight_of(mask[at], foreground);
      }
    }
    warp_mma<MT, NT>(acc, left, right, split);
  }
};

template <class T_, int RI, int RJ>
struct Arithmetic {
  using T = T_;
  static constexpr int kUnroll = 1, kRun = 1;
  static constexpr int kRows = 4 * RI, kCols = 8 * RJ, kAcc = RI * RJ;

  static constexpr int kLaneRows = RI, kLaneCols = RJ;
  static __device__ __forceinline__ constexpr int index(int r, int c) { return r * RJ + c; }
  static __device__ __forceinline__ int row(int r, int lane) { return r * 4 + lane / 8; }
  static __device__ __forceinline__ int col(int c, int lane) { return c * 8 + lane % 8; }

  static __device__ __forceinline__ void gram_step(T (&acc)[kAcc], const T* a, const T* b, int lane, bool) {
#pragma unroll
    for (int k = 0; k < kPanel; k += 4) {
      Pack<T, 4> right[RJ];
#pragma unroll
      for (int j = 0; j < RJ; ++j) right[j] = load_pack<4>(b + in_panel(8 * j + lane % 8, k));
#pragma unroll
      for (int i = 0; i < RI; ++i) {
        const auto left = load_pack<4>(a + in_panel(4 * i + lane / 8, k));
#pragma unroll
        for (int j = 0; j < RJ; ++j) {
#pragma unroll
          for (int q = 0; q < 4; ++q) acc[i * RJ + j] += left.value[q] * right[j].value[q];
        }
      }
    }
  }

  static __device__ __forceinline__ void product_step(T (&acc)[kAcc], const T* s, const T* map, const T* mask,
                                                      int pitch, int lane, bool foreground, bool) {
#pragma unroll
    for (int k = 0; k < kPanel; k += 4) {
      Pack<T, 4> left[RI];
#pragma unroll
      for (int i = 0; i < RI; ++i) left[i] = load_pack<4>(s + in_panel(4 * i + lane / 8, k));
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int j = 0; j < RJ; ++j) {
          const int at = (k + q) * pitch + 8 * j + lane % 8;
          const T right = map[at] * weight_of(mask[at], foreground);
#pragma unroll
          for (int i = 0; i < RI; ++i) acc[i * RJ + j] += left[i].value[q] * right;
        }
      }
    }
  }
};

}  // namespace sib_fast::cuda
