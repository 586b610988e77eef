// What one warp multiplies: tiles of Grams and of N×D products, on tensor cores or in plain arithmetic.
//
// Operands in shared memory: panels of 8 along the contraction, [K/8][rows][8], the two quads of a row exchanged in
// rows 4 … 7 of 8, so that a warp's 8- and 16-byte reads touch every bank once. Tensor cores: products of two tf32 are
// exact, but every mma truncates its sum (measured by others on V100 … H100): the error grows with the number of mma in
// a chain, not with its root. So a chain starts at 0, has at most kChain products (each rule below), and is added in
// float32 outside. tf32x3: a = big + small, both tf32; small·big + big·small + big·big leaves 2^-22 of each product.
#pragma once

#include "cuda/platform.cuh"

namespace sib_fast::cuda {

constexpr int kChain = 32;      // products that one accumulator sees before it is added to its sum
constexpr int kPartial = 1024;  // products of a float32 sum before it is added in float64
constexpr int kPanel = 8;       // contraction length of a panel

// ---- what platform.cuh has no word for, and its twins ---------------------------------------------------------------

#if defined(__CUDACC__)

__device__ __forceinline__ void copy_async_8(void* shared, const void* global, bool valid) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
// As copy_async_16, but kept in L1: the mask's quads are read once a channel.
__device__ __forceinline__ void copy_async_16_cached(void* shared, const void* global, bool valid) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

// a to tf32's 11 bits, to nearest, in two instructions where cvt.rna.tf32 takes five (it sets NaN and Inf apart; here
// NaN stays NaN, and beyond 4e34, where no Gram is finite, Inf may become NaN). 8193·a rounded is a multiple of 2^13
// units of a, and so is 8192·a: their difference is a, rounded.
__device__ __forceinline__ float nearest_tf32(float a) { return __fmaf_rn(a, -8192.0f, __fmul_rn(a, 8193.0f)); }

// acc (MT×NT fragments of 4) += a·b over 8 products, for one warp; fragments as mma_m16n8k8_tf32 has them. The tensor
// cores read the upper 19 bits of an operand: small parts are cut there, which is 2^-22 of a, of either sign.
template <int MT, int NT>
__device__ __forceinline__ void warp_mma(float (&acc)[4 * MT * NT], const float (&a)[4 * MT], const float (&b)[2 * NT],
                                         bool split) {
  float a_big[4 * MT], b_big[2 * NT];
#pragma unroll
  for (int i = 0; i < 4 * MT; ++i) a_big[i] = nearest_tf32(a[i]);
#pragma unroll
  for (int i = 0; i < 2 * NT; ++i) b_big[i] = nearest_tf32(b[i]);
  const auto product = [&](const float (&left)[4 * MT], const float (&right)[2 * NT]) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const uint32_t rows[4] = {__float_as_uint(left[4 * m]), __float_as_uint(left[4 * m + 1]),
                                __float_as_uint(left[4 * m + 2]), __float_as_uint(left[4 * m + 3])};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint32_t columns[2] = {__float_as_uint(right[2 * n]), __float_as_uint(right[2 * n + 1])};
        float* d = acc + 4 * (m * NT + n);
        float sum[4] = {d[0], d[1], d[2], d[3]};
        mma_m16n8k8_tf32(sum, rows, columns);
        d[0] = sum[0], d[1] = sum[1], d[2] = sum[2], d[3] = sum[3];
      }
    }
  };
  if (split) {
    float a_small[4 * MT], b_small[2 * NT];
#pragma unroll
    for (int i = 0; i < 4 * MT; ++i) a_small[i] = a[i] - a_big[i];
#pragma unroll
    for (int i = 0; i < 2 * NT; ++i) b_small[i] = b[i] - b_big[i];
    product(a_small, b_big);
    product(a_big, b_small);
  }
  product(a_big, b_big);
}

#else

inline void copy_async_8(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 8 || (valid && reinterpret_cast<uintptr_t>(global) % 8))
    throw std::runtime_error("emulation: copy_async_8 needs 8-byte alignment");
  copy_async(shared, global, 8, valid);
}
inline void copy_async_16_cached(void* shared, const void* global, bool valid) { copy_async_16(shared, global, valid); }

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

#endif

template <class T>
struct alignas(16) Quad {
  T v[4];
};

template <class T>
__device__ __forceinline__ void load_quad(const T* from, T (&to)[4]) {
  const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = quad.v[i];
}
template <class T>
__device__ __forceinline__ void store_quad(T* to, const T (&from)[4]) {
  Quad<T> quad;
#pragma unroll
  for (int i = 0; i < 4; ++i) quad.v[i] = from[i];
  *reinterpret_cast<Quad<T>*>(to) = quad;
}

// Where element k (0 … 7) of a row lies in its panel; k even, and what is read from there may be 2 or (k % 4 = 0) 4
// long.
__device__ __forceinline__ int in_panel(int row, int k) { return row * kPanel + (k ^ (row & 4)); }

// The factor that makes a foreground or background operand of a map.
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
      const float2 pair = *reinterpret_cast<const float2*>(panel + in_panel(8 * i + g, 2 * t));
      a[i / 2 * 4 + i % 2] = pair.x;
      a[i / 2 * 4 + i % 2 + 2] = pair.y;
    }
  }

  static __device__ __forceinline__ void gram_step(float (&acc)[kAcc], const float* a, const float* b, int lane,
                                                   bool split) {
    const int g = lane / 4, t = lane % 4;
    float left[4 * MT], right[2 * NT];
    load_rows(a, lane, left);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float2 pair = *reinterpret_cast<const float2*>(b + in_panel(8 * n + g, 2 * t));
      right[2 * n] = pair.x;
      right[2 * n + 1] = pair.y;
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
      T right[RJ][4];
#pragma unroll
      for (int j = 0; j < RJ; ++j) load_quad(b + in_panel(8 * j + lane % 8, k), right[j]);
#pragma unroll
      for (int i = 0; i < RI; ++i) {
        T left[4];
        load_quad(a + in_panel(4 * i + lane / 8, k), left);
#pragma unroll
        for (int j = 0; j < RJ; ++j) {
#pragma unroll
          for (int q = 0; q < 4; ++q) acc[i * RJ + j] += left[q] * right[j][q];
        }
      }
    }
  }

  static __device__ __forceinline__ void product_step(T (&acc)[kAcc], const T* s, const T* map, const T* mask,
                                                      int pitch, int lane, bool foreground, bool) {
#pragma unroll
    for (int k = 0; k < kPanel; k += 4) {
      T left[RI][4];
#pragma unroll
      for (int i = 0; i < RI; ++i) load_quad(s + in_panel(4 * i + lane / 8, k), left[i]);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int j = 0; j < RJ; ++j) {
          const int at = (k + q) * pitch + 8 * j + lane % 8;
          const T right = map[at] * weight_of(mask[at], foreground);
#pragma unroll
          for (int i = 0; i < RI; ++i) acc[i * RJ + j] += left[i][q] * right;
        }
      }
    }
  }
};

}  // namespace sib_fast::cuda
