// Activations of two slopes, whose backward needs one bit an element: one text for the CPU's kernels and CUDA's.
//
//   y = f(x);   bit: grad_y passes as it is;   grad_x = bit ? grad_y : 0, for leaky_relu bit ? grad_y : slope·grad_y
//
// Elements lie in memory order, 512 to a unit: bit k of byte i of its 64 bytes belongs to element 64·k + i.
// Neighbouring elements so make neighbouring bytes, with no shuffle or ballot, at any width of a vector or a pack. The
// last unit is whole; what lies past the end is 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/host_device.h"

namespace sib_fast {

// Numbers as in sib_fast/ops/activation/__init__.py, KINDS.
enum class TwoSlopes : int64_t { relu, hardtanh, leaky_relu };
constexpr int64_t kTwoSlopes = 3;

constexpr int kBitsRow = 64;
constexpr int kBitsUnit = 8 * kBitsRow;

inline int64_t bits_bytes(int64_t count) { return (count + kBitsUnit - 1) / kBitsUnit * kBitsRow; }

// As many bytes as one integer.
template <size_t bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint64_t;
};

// a, b: relu 0; hardtanh its bounds; leaky_relu the slope. low, high: the bounds as elements.
template <class E, class T>
struct TwoSlopesParameters {
  T a, b;
  E low, high;
};

// y, and whether the gradient passes, of `given`, whose value is x; to the bit what PyTorch's kernels of the device do.
// Rules: bound_is_low, whether x at the lower bound becomes the bound (of two zeros the CPU keeps x); nan_passes,
// whether hardtanh's gradient does at NaN (not in PyTorch's vector code on the CPU); narrow<E>(T). A parameter, so that
// each instruction set of the CPU has copies of its own (common/activation.h).
template <TwoSlopes kind, class Rules, class E, class T>
SIB_HOST_DEVICE E two_slopes(E given, T x, const TwoSlopesParameters<E, T>& of, bool& passes) {
  if constexpr (kind == TwoSlopes::leaky_relu) {
    passes = x > T(0);
    return passes ? given : Rules::template narrow<E>(x * of.a);
  } else {
    const bool below = Rules::bound_is_low ? x <= of.a : x < of.a;
    if constexpr (kind == TwoSlopes::relu) {
      passes = !(x <= T(0));
      return below ? of.low : given;
    } else {
      passes = Rules::nan_passes ? !((x <= of.a) | (x >= of.b)) : (x > of.a) & (x < of.b);
      return below ? of.low : x > of.b ? of.high : given;
    }
  }
}

// Calls function with `kind` as a std::integral_constant, so that it can be a template argument.
template <class Function>
void with_two_slopes(TwoSlopes kind, Function function) {
  if (kind == TwoSlopes::relu) function(std::integral_constant<TwoSlopes, TwoSlopes::relu>{});
  if (kind == TwoSlopes::hardtanh) function(std::integral_constant<TwoSlopes, TwoSlopes::hardtanh>{});
  if (kind == TwoSlopes::leaky_relu) function(std::integral_constant<TwoSlopes, TwoSlopes::leaky_relu>{});
}

}  // namespace sib_fast
