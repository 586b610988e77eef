// Vector types, element loads and the elementary functions of the CPU kernels.
//
// Included only by *_kernels.cpp, each of which is compiled once per instruction set. Everything here has internal
// linkage: two object files must never share an inline function, or the linker could hand the AVX-512 copy to an old
// CPU. For the same reason the kernels use no standard containers, and standard algorithms only with a local
// comparator.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/element_bits.h"

#ifndef SIB_FAST_CAPABILITY
#error "compiled by CMakeLists.txt, once per instruction set"
#endif
#define SIB_FAST_JOIN_(a, b) a##b
#define SIB_FAST_JOIN(a, b) SIB_FAST_JOIN_(a, b)
#define SIB_FAST_TABLE(stem) SIB_FAST_JOIN(stem, SIB_FAST_CAPABILITY)

namespace sib_fast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
inline void store(T* p, Vector<T> v) {
  std::memcpy(p, &v, sizeof(v));
}
// Sums over the lanes of as many vectors as there are lanes, in one vector: out[i] = Σ_l v[i][l], pairwise. A tree of
// shuffles, 3·(lanes - 1) instructions for all of them, where one at a time takes more than the products that they end.
#if defined(__clang__) || __GNUC__ >= 12
// Every vector holds segments of `segment` partial sums, one segment a summand; folding u and v halves the segments.
template <int segment, int half, int lanes>
constexpr int fold_index(int i) {
  const int kept = segment / 2;
  return i / kept * segment + half * kept + i % kept;  // lanes of u first, then those of v
}
template <class T, int segment, int... i>
inline Vector<T> fold(Vector<T> u, Vector<T> v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(u, v, fold_index<segment, 0, kLanes<T>>(i)...) +
         __builtin_shufflevector(u, v, fold_index<segment, 1, kLanes<T>>(i)...);
}
template <class T, int segment = kLanes<T>>
inline Vector<T> lane_sums(const Vector<T>* v) {
  if constexpr (segment == 1) {
    return v[0];
  } else {
    Vector<T> folded[segment / 2];
    for (int k = 0; k < segment / 2; ++k) {
      folded[k] = fold<T, segment>(v[2 * k], v[2 * k + 1], std::make_integer_sequence<int, kLanes<T>>());
    }
    return lane_sums<T, segment / 2>(folded);
  }
}
#else
template <class T>
inline Vector<T> lane_sums(const Vector<T>* v) {
  Vector<T> out;
  for (int k = 0; k < kLanes<T>; ++k) {
    T lane[kLanes<T>];
    store(lane, v[k]);
    for (int width = kLanes<T> / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    }
    out[k] = lane[0];
  }
  return out;
}
#endif

template <class To, class From>
inline To bits_to(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
inline double widen(double v) { return v; }
inline float widen(float v) { return v; }
inline float widen(BFloat16 v) { return bits_to<float>(static_cast<uint32_t>(v.bits) << 16); }
// Rebias by a multiplication: exact for normal and subnormal halves; Inf and NaN get the top exponent back. In
// integers, since gcc 12 vectorises no loop that holds a _Float16 (batch norm of float16 took 3.5 times as long).
inline float widen_in_integers(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t body = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  const float scaled = bits_to<float>(body) * bits_to<float>(0x77800000u);  // 2^112
  const uint32_t special = (v.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bits_to<float>(bits_to<uint32_t>(scaled) | special | sign);
}
inline float widen(Float16 v) {
#if defined(__FLT16_MANT_DIG__)
  return static_cast<float>(bits_to<_Float16>(v.bits));
#else
  return widen_in_integers(v);
#endif
}

// Rounding to nearest even, branch-free; NaN stays NaN.
inline uint16_t narrow_bfloat16(float v) {
  const uint32_t bits = bits_to<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(v != v ? 0x7fc0u : rounded);
}
inline uint16_t narrow_float16(float v) {
  const uint32_t bits = bits_to<uint32_t>(v), sign = (bits >> 16) & 0x8000u, body = bits & 0x7fffffffu;
  // Subnormal halves: adding 1/2 makes float's own rounding that of the half's last place.
  const uint32_t small = bits_to<uint32_t>(bits_to<float>(body) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (body - 0x38000000u + 0x0fffu + ((body >> 13) & 1u)) >> 13;
  const uint32_t finite = body < 0x38800000u ? small : normal;
  const uint32_t any = body > 0x7f800000u ? 0x7e00u : body >= 0x477ff000u ? 0x7c00u : finite;
  return static_cast<uint16_t>(sign | any);
}

// An element as what a pass calculates in, and back.
inline float get(float v) { return v; }
inline double get(double v) { return v; }
inline float get(BFloat16Bits v) { return widen(BFloat16{v.bits}); }
inline float get(Float16Bits v) { return widen_in_integers(Float16{v.bits}); }
inline void put(float* at, float v) { *at = v; }
inline void put(double* at, double v) { *at = v; }
inline void put(BFloat16Bits* at, float v) { at->bits = narrow_bfloat16(v); }
inline void put(Float16Bits* at, float v) { at->bits = narrow_float16(v); }

// exp(x) by Cody and Waite's reduction and a Taylor polynomial on |r| <= ln(2)/2: truncation error 5e-9 relative for
// float (degree 7), 2e-18 for double (degree 13), both below half an ulp. Branch-free, so that loops vectorise; the
// argument is clamped where the result would leave the normal range. NaN passes through.
inline float exp_lane(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.3f ? 88.3f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5·2^23: the integer lands in the low bits
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440054690583e-4f;
  float p = 1.98412698412698e-4f;
  p = p * r + 1.38888888888889e-3f;
  p = p * r + 8.33333333333333e-3f;
  p = p * r + 4.16666666666667e-2f;
  p = p * r + 1.66666666666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bits_to<float>((bits_to<uint32_t>(shifted) << 23) + 0x3f800000u);
}
inline double exp_lane(double x) {
  x = x < -708.0 ? -708.0 : x;
  x = x > 709.0 ? 709.0 : x;
  const double shifted = x * 1.4426950408889634074 + 6755399441055744.0;  // 1.5·2^52
  const double n = shifted - 6755399441055744.0;
  double r = x - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p * bits_to<double>((bits_to<uint64_t>(shifted) << 52) + 0x3ff0000000000000ull);
}
template <class T>
inline T sigmoid_lane(T x) {
  return T(1) / (T(1) + exp_lane(-x));
}

}  // namespace
}  // namespace sib_fast::cpu
