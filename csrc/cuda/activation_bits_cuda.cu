// Activations of two slopes on the GPU: y and one bit an element in one pass, the gradient from the bits in another.
//
// Formulas  common/activation_bits.h, with the order of the bits.
// Shapes    x, y (which may be x), grad_y, grad_x: `count` elements in one run of memory; bits: whole units.
// Launch    128 threads a block, grid-stride. A thread has as many of a unit's 64 columns as a pack of 16 bytes has
//           elements: eight packs, under way at once, and a byte of bits for every column. A unit that is not whole,
//           and every unit where a tensor does not start at 16 bytes, goes element by element, neighbouring columns by
//           neighbouring threads.
// Traffic   forward reads x, writes y and the bits; backward reads grad_y and the bits, writes grad_x: 2 activations
//           and 1/32 (float32) or 1/16 (halves) of one; PyTorch's threshold_backward moves 3. [E] on an H200 at
//           4.3 TB/s: 64×256×56×56 (ResNet-50, stage 1) 0.097 ms in float32, 0.049 ms in bfloat16, either way.
// Order     every element by itself: equal inputs give equal bits.
// Twins     cpu/activation_bits_kernels.cpp; truth: PyTorch's own kernels.

#include <type_traits>

#include "common/activation_ops.h"
#include "cuda/on_cuda.cuh"
#include "cuda/pack.cuh"

namespace sib_fast::cuda {
namespace {

constexpr const char* kActivationBits = "activation";
constexpr int kBitsThreads = 128;
constexpr int kBitsBlocks = 16;  // a multiprocessor: twice what fits, so that an uneven end is short

struct DeviceRules {
  static constexpr bool bound_is_low = true, nan_passes = true;
  template <class E, class T>
  static __device__ __forceinline__ E narrow(T v) {
    return static_cast<E>(v);
  }
};

template <class E>
struct BitsShape {
  static constexpr int kColumns = Pack16<E>::kCount;
  static constexpr int kThreadsPerUnit = kBitsRow / kColumns;
  static constexpr int kUnitsPerBlock = kBitsThreads / kThreadsPerUnit;
};

// to[i] = element(from[i], its bit) for all elements. Byte is uint8_t where `element` makes the bits, const uint8_t
// where it reads them. No __restrict__: `to` may be `from`, and a thread has read its elements before it writes them.
template <class E, class Byte, class Element>
__device__ __forceinline__ void for_elements(const E* from, int64_t count, bool aligned, E* to, Byte* bits,
                                             Element element) {
  using Pack = Pack16<E>;
  using Shape = BitsShape<E>;
  using Word = typename WordOf<Shape::kColumns>::type;  // the bytes of a thread's columns
  constexpr bool makes = !std::is_const<Byte>::value;
  const int thread = static_cast<int>(threadIdx.x) % Shape::kThreadsPerUnit;
  const int64_t units = (count + kBitsUnit - 1) / kBitsUnit;
  const int64_t step = static_cast<int64_t>(gridDim.x) * Shape::kUnitsPerBlock;
  int64_t unit = static_cast<int64_t>(blockIdx.x) * Shape::kUnitsPerBlock + threadIdx.x / Shape::kThreadsPerUnit;
  for (; unit < units; unit += step) {
    const E* const in = from + unit * kBitsUnit;
    E* const out = to + unit * kBitsUnit;
    Byte* const row = bits + unit * kBitsRow;
    const int64_t left = count - unit * kBitsUnit;
    if (aligned && left >= kBitsUnit) {
      const int first = thread * Shape::kColumns;  // a thread's columns lie side by side
      Pack packs[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) packs[k] = *reinterpret_cast<const Pack*>(in + k * kBitsRow + first);
      Word word = 0;
      if constexpr (!makes) word = *reinterpret_cast<const Word*>(row + first);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int j = 0; j < Shape::kColumns; ++j) {
          bool passes = word >> (8 * j + k) & 1;
          packs[k].value[j] = element(packs[k].value[j], passes);
          if constexpr (makes) word = static_cast<Word>(word | static_cast<Word>(passes) << (8 * j + k));
        }
        store_pack(out + k * kBitsRow + first, packs[k]);
      }
      if constexpr (makes) *reinterpret_cast<Word*>(row + first) = word;
      continue;
    }
    // Neighbouring threads have neighbouring columns.
#pragma unroll 1
    for (int column = thread; column < kBitsRow; column += Shape::kThreadsPerUnit) {
      E values[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (k * kBitsRow + column < left) values[k] = in[k * kBitsRow + column];
      }
      unsigned byte = 0;
      if constexpr (!makes) byte = row[column];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (k * kBitsRow + column >= left) break;
        bool passes = byte >> k & 1u;
        out[k * kBitsRow + column] = element(values[k], passes);
        if constexpr (makes) byte |= static_cast<unsigned>(passes) << k;
      }
      if constexpr (makes) row[column] = static_cast<uint8_t>(byte);
    }
  }
}

template <class E, class T, TwoSlopes kind>
__global__ void __launch_bounds__(kBitsThreads)
    activation_bits_kernel(const E* x, int64_t count, bool aligned, TwoSlopesParameters<E, T> of, E* y, uint8_t* bits) {
  for_elements(x, count, aligned, y, bits, [of](E value, bool& passes) {
    return two_slopes<kind, DeviceRules>(value, static_cast<T>(value), of, passes);
  });
}

template <class E, class T, bool leaky>
__global__ void __launch_bounds__(kBitsThreads)
    activation_bits_backward_kernel(const E* grad_y, const uint8_t* bits, int64_t count, bool aligned, T slope,
                                    E* grad_x) {
  for_elements(grad_y, count, aligned, grad_x, bits, [slope](E value, bool passes) {
    const E other = leaky ? static_cast<E>(static_cast<T>(value) * slope) : static_cast<E>(0);
    return passes ? value : other;
  });
}

template <class E>
dim3 bits_grid(const Tensor& t) {
  const int64_t blocks = divide_up(divide_up(t.numel(), kBitsUnit), BitsShape<E>::kUnitsPerBlock);
  const int64_t most = blocks_for(t, kBitsBlocks);
  return dim3(static_cast<unsigned>(blocks < most ? blocks : most));
}

struct ActivationBitsKernels : OnCuda {
  template <class E>
  static void forward(const Tensor& x, Tensor& y, Tensor& bits, TwoSlopes kind, double a, double b) {
    using T = Compute<E>;
    const auto* from = in<E>(x);
    auto* to = static_cast<E*>(y.mutable_data_ptr());
    auto* made = static_cast<uint8_t*>(bits.mutable_data_ptr());
    const T low = static_cast<T>(a), high = static_cast<T>(b);
    // Bounds that have crossed give the upper one everywhere, as in PyTorch.
    const TwoSlopesParameters<E, T> of{low, high, static_cast<E>(low < high ? low : high), static_cast<E>(high)};
    with_two_slopes(kind, [&](auto k) {
      launch(kActivationBits, activation_bits_kernel<E, T, decltype(k)::value>, bits_grid<E>(x), dim3(kBitsThreads), 0,
             current_stream(x), from, x.numel(), start_at_packs({from, to, made}), of, to, made);
    });
  }

  template <class E>
  static void backward(const Tensor& grad_y, const Tensor& bits, Tensor& grad_x, TwoSlopes kind, double slope) {
    using T = Compute<E>;
    const auto* from = in<E>(grad_y);
    const auto* given = in<uint8_t>(bits);
    auto* to = out<E>(grad_x);
    launch(kActivationBits,
           kind == TwoSlopes::leaky_relu ? activation_bits_backward_kernel<E, T, true>
                                         : activation_bits_backward_kernel<E, T, false>,
           bits_grid<E>(grad_y), dim3(kBitsThreads), 0, current_stream(grad_y), from, given, grad_y.numel(),
           start_at_packs({from, given, to}), static_cast<T>(slope), to);
  }
};

}  // namespace

SIB_CUDA_LIBRARY(m) { ActivationBitsOps<ActivationBitsKernels>::implement(m); }

}  // namespace sib_fast::cuda
