// Activations of two slopes on the CPU: y and one bit an element in one pass, the gradient from the bits in another.
//
// Formulas  common/activation_bits.h, with the order of the bits.
// Traffic   forward reads x, writes y and 1/32 of it (float32); backward reads grad_y and the bits, writes grad_x: two
//           activations, where PyTorch's threshold_backward moves three.
// Order     every element by itself: equal inputs give equal bits at any thread count.
// Twins     cuda/activation_bits_cuda.cu; truth: PyTorch's own kernels.

#include "cpu/activation_bits_kernels.h"

#include "cpu/simd.h"

namespace sib_fast::cpu {
namespace {

// In the unnamed namespace, so that what is made with it belongs to this instruction set alone.
struct LaneRules {
  static constexpr bool bound_is_low = false, nan_passes = false;
  template <class E, class T>
  static E narrow(T v) {
    E element;
    put(&element, v);
    return element;
  }
};

template <TwoSlopes kind, class E>
void forward_of(const TwoSlopesParameters<E, Compute<E>> of, const E* x, int64_t count, E* y, uint8_t* bits) {
  for (; count > 0; count -= kBitsUnit, x += kBitsUnit, y += kBitsUnit, bits += kBitsRow) {
    std::memset(bits, 0, kBitsRow);
    for (int row = 0; row < 8 && row * kBitsRow < count; ++row) {
      const E* const from = x + row * kBitsRow;
      E* const to = y + row * kBitsRow;
      const unsigned bit = 1u << row;
      const auto element = [=](int64_t i) {
        const E given = from[i];
        bool passes;
        to[i] = two_slopes<kind, LaneRules>(given, get(given), of, passes);
        bits[i] = static_cast<uint8_t>(bits[i] | (passes ? bit : 0u));
      };
      if (count - row * kBitsRow >= kBitsRow) {
#pragma omp simd
        for (int i = 0; i < kBitsRow; ++i) element(i);
      } else {
        for (int64_t i = 0; i < count - row * kBitsRow; ++i) element(i);
      }
    }
  }
}

template <class E>
void forward(TwoSlopes kind, double a, double b, const E* x, int64_t count, E* y, uint8_t* bits) {
  using T = Compute<E>;
  const T from = static_cast<T>(a), to = static_cast<T>(b);
  // Bounds that have crossed give the upper one everywhere, as in PyTorch.
  const TwoSlopesParameters<E, T> of{from, to, LaneRules::narrow<E>(from < to ? from : to), LaneRules::narrow<E>(to)};
  with_two_slopes(kind, [&](auto k) { forward_of<decltype(k)::value>(of, x, count, y, bits); });
}

// In masks of integers: gcc 12 vectorises no choice between two structs, nor between floats without AVX.
template <bool leaky, class E>
void backward_of(Compute<E> slope, const E* grad_y, const uint8_t* bits, int64_t count, E* grad_x) {
  using Word = typename WordOf<sizeof(E)>::type;
  for (int64_t first = 0; first < count; first += kBitsRow) {
    const unsigned bit = 1u << first / kBitsRow % 8;
    const uint8_t* const row = bits + first / kBitsUnit * kBitsRow;
    const auto element = [=](int64_t i) {
      const E given = grad_y[first + i];
      const Word keep = row[i] & bit ? static_cast<Word>(-1) : Word(0);
      Word word = bits_to<Word>(given) & keep;
      if constexpr (leaky) word |= bits_to<Word>(LaneRules::narrow<E>(get(given) * slope)) & static_cast<Word>(~keep);
      grad_x[first + i] = bits_to<E>(word);
    };
    if (count - first >= kBitsRow) {
#pragma omp simd
      for (int i = 0; i < kBitsRow; ++i) element(i);
    } else {
      for (int64_t i = 0; i < count - first; ++i) element(i);
    }
  }
}

template <class E>
void backward(TwoSlopes kind, double slope, const E* grad_y, const uint8_t* bits, int64_t count, E* grad_x) {
  const auto by = static_cast<Compute<E>>(slope);
  if (kind == TwoSlopes::leaky_relu) {
    backward_of<true>(by, grad_y, bits, count, grad_x);
  } else {
    backward_of<false>(by, grad_y, bits, count, grad_x);
  }
}

template <class E>
constexpr ActivationBitsKernels<E> kTable = {forward<E>, backward<E>};

}  // namespace

SIB_FAST_DEFINE_TABLES(ActivationBitsKernels, activation_bits_kernels)

}  // namespace sib_fast::cpu
