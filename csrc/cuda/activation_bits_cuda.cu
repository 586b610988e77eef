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

#include "common/activation_bits_checks.h"
#include "cuda/pack.cuh"
#include "cuda/platform.cuh"

namespace sib_fast::cuda {
namespace {

constexpr const char* kActivationBits = "activation";
constexpr int kBitsThreads = 128;
constexpr int kBitsBlocks = 32;  // a multiprocessor: twice what fits, so that an uneven end is short

struct DeviceRules {
  static constexpr bool bound_is_low = true, nan_passes = true;
  template <class E, class T>
  static __device__ __forceinline__ E narrow(T v) {
    return static_cast<E>(v);
  }
};

template <int bytes>
struct BitsWordOf;
template <>
struct BitsWordOf<2> {
  using type = uint16_t;
};
template <>
struct BitsWordOf<4> {
  using type = uint32_t;
};
template <>
struct BitsWordOf<8> {
  using type = uint64_t;
};

// A thread's columns of one unit: a pack for each of the eight rows, and the columns' bytes in one word.
template <class E>
struct BitsColumns {
  using Pack = Pack16<E>;
  static constexpr int kColumns = Pack::kCount;
  static constexpr int kThreadsPerUnit = kBitsRow / kColumns;
  static constexpr int kUnitsPerBlock = kBitsThreads / kThreadsPerUnit;
  using Word = typename BitsWordOf<kColumns>::type;

  int64_t unit;
  int left;  // elements of the unit
  bool packed;

  __device__ __forceinline__ BitsColumns(int64_t which, int64_t count, bool aligned) : unit(which) {
    const int64_t rest = count - unit * kBitsUnit;
    left = rest < kBitsUnit ? static_cast<int>(rest) : kBitsUnit;
    packed = aligned && left == kBitsUnit;
  }
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x) % kThreadsPerUnit; }
  // Not packed: neighbouring threads have neighbouring columns.
  static __device__ __forceinline__ int column(int j) { return thread() + j * kThreadsPerUnit; }

  __device__ __forceinline__ void read(const E* from, Pack (&rows)[8]) const {
    from += unit * kBitsUnit;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (packed) {
        rows[k] = *reinterpret_cast<const Pack*>(from + k * kBitsRow + thread() * kColumns);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int i = k * kBitsRow + column(j);
        rows[k].value[j] = i < left ? from[i] : static_cast<E>(0);
      }
    }
  }
  __device__ __forceinline__ void write(E* to, const Pack (&rows)[8]) const {
    to += unit * kBitsUnit;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (packed) {
        store_pack(to + k * kBitsRow + thread() * kColumns, rows[k]);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int i = k * kBitsRow + column(j);
        if (i < left) to[i] = rows[k].value[j];
      }
    }
  }
  __device__ __forceinline__ Word read_bits(const uint8_t* bits) const {
    bits += unit * kBitsRow;
    if (packed) return *reinterpret_cast<const Word*>(bits + thread() * kColumns);
    Word word = 0;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) word |= static_cast<Word>(static_cast<Word>(bits[column(j)]) << 8 * j);
    return word;
  }
  __device__ __forceinline__ void write_bits(uint8_t* bits, Word word) const {
    bits += unit * kBitsRow;
    if (packed) {
      *reinterpret_cast<Word*>(bits + thread() * kColumns) = word;
      return;
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int rows = (left - column(j) + kBitsRow - 1) / kBitsRow;  // that exist in this column
      bits[column(j)] = static_cast<uint8_t>(rows <= 0 ? 0 : (word >> 8 * j) & ((1u << rows) - 1u));
    }
  }
};

// Calls function for the units of a thread.
template <class E, class Function>
__device__ __forceinline__ void for_units(int64_t count, bool aligned, Function function) {
  using Columns = BitsColumns<E>;
  const int64_t units = (count + kBitsUnit - 1) / kBitsUnit;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Columns::kUnitsPerBlock;
  const int64_t step = static_cast<int64_t>(gridDim.x) * Columns::kUnitsPerBlock;
  for (int64_t unit = first + threadIdx.x / Columns::kThreadsPerUnit; unit < units; unit += step) {
    function(Columns(unit, count, aligned));
  }
}

// No __restrict__: y may be x. Each thread reads its elements before it writes them.
template <class E, class T, TwoSlopes kind>
__global__ void __launch_bounds__(kBitsThreads)
    activation_bits_kernel(const E* x, int64_t count, bool aligned, TwoSlopesParameters<E, T> of, E* y, uint8_t* bits) {
  for_units<E>(count, aligned, [&](const BitsColumns<E>& mine) {
    typename BitsColumns<E>::Pack rows[8];
    typename BitsColumns<E>::Word word = 0;
    mine.read(x, rows);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int j = 0; j < BitsColumns<E>::kColumns; ++j) {
        E& value = rows[k].value[j];
        bool passes;
        value = two_slopes<kind, DeviceRules>(value, static_cast<T>(value), of, passes);
        word |= static_cast<decltype(word)>(static_cast<decltype(word)>(passes) << (8 * j + k));
      }
    }
    mine.write(y, rows);
    mine.write_bits(bits, word);
  });
}

template <class E, class T, bool leaky>
__global__ void __launch_bounds__(kBitsThreads)
    activation_bits_backward_kernel(const E* __restrict__ grad_y, const uint8_t* __restrict__ bits, int64_t count,
                                    bool aligned, T slope, E* __restrict__ grad_x) {
  for_units<E>(count, aligned, [&](const BitsColumns<E>& mine) {
    typename BitsColumns<E>::Pack rows[8];
    mine.read(grad_y, rows);
    const auto word = mine.read_bits(bits);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int j = 0; j < BitsColumns<E>::kColumns; ++j) {
        E& value = rows[k].value[j];
        const E other = leaky ? static_cast<E>(static_cast<T>(value) * slope) : static_cast<E>(0);
        value = word >> (8 * j + k) & 1 ? value : other;
      }
    }
    mine.write(grad_x, rows);
  });
}

template <class E>
dim3 bits_grid(const Tensor& t) {
  const int64_t blocks = divide_up(divide_up(t.numel(), kBitsUnit), BitsColumns<E>::kUnitsPerBlock);
  const int64_t most = int64_t{kBitsBlocks} * device_of(t).multiprocessors;
  return dim3(static_cast<unsigned>(blocks < most ? blocks : most));
}

template <class E, class T>
void run_bits(const Tensor& x, Tensor& y, Tensor& bits, TwoSlopes kind, T a, T b) {
  const auto* in = static_cast<const E*>(x.const_data_ptr());
  auto* out = static_cast<E*>(y.mutable_data_ptr());
  auto* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  // Bounds that have crossed give the upper one everywhere, as in PyTorch.
  const TwoSlopesParameters<E, T> of{a, b, static_cast<E>(a < b ? a : b), static_cast<E>(b)};
  with_two_slopes(kind, [&](auto k) {
    launch(kActivationBits, activation_bits_kernel<E, T, decltype(k)::value>, bits_grid<E>(x), dim3(kBitsThreads), 0,
           current_stream(x), in, x.numel(), start_at_packs({in, out, to}), of, out, to);
  });
}

template <class E, class T>
void run_bits_backward(const Tensor& grad_y, const Tensor& bits, Tensor& grad_x, TwoSlopes kind, T slope) {
  const auto* in = static_cast<const E*>(grad_y.const_data_ptr());
  const auto* from = static_cast<const uint8_t*>(bits.const_data_ptr());
  auto* out = static_cast<E*>(grad_x.mutable_data_ptr());
  launch(kActivationBits,
         kind == TwoSlopes::leaky_relu ? activation_bits_backward_kernel<E, T, true>
                                       : activation_bits_backward_kernel<E, T, false>,
         bits_grid<E>(grad_y), dim3(kBitsThreads), 0, current_stream(grad_y), in, from, grad_y.numel(),
         start_at_packs({in, from, out}), slope, out);
}

Tensor cuda_activation_bits(Tensor x, Tensor y, int64_t kind, double a, double b) {
  check_bits_forward(kActivationBits, x, y, kind);
  const DeviceGuard guard(x.get_device_index());
  Tensor bits = torch::stable::new_empty(x, {bits_bytes(x.numel())}, ScalarType::Byte);
  const auto which = static_cast<TwoSlopes>(kind);
  const auto single_a = static_cast<float>(a), single_b = static_cast<float>(b);
  switch (x.scalar_type()) {
    case ScalarType::Double:
      run_bits<double, double>(x, y, bits, which, a, b);
      break;
    case ScalarType::BFloat16:
      run_bits<torch::headeronly::BFloat16, float>(x, y, bits, which, single_a, single_b);
      break;
    case ScalarType::Half:
      run_bits<torch::headeronly::Half, float>(x, y, bits, which, single_a, single_b);
      break;
    default:
      run_bits<float, float>(x, y, bits, which, single_a, single_b);
  }
  return bits;
}

Tensor cuda_activation_bits_backward(Tensor grad_y, Tensor bits, int64_t kind, double slope) {
  check_bits_backward(kActivationBits, grad_y, bits, kind);
  const DeviceGuard guard(grad_y.get_device_index());
  Tensor grad_x = torch::stable::empty_like(grad_y);
  const auto which = static_cast<TwoSlopes>(kind);
  const auto single = static_cast<float>(slope);
  switch (grad_y.scalar_type()) {
    case ScalarType::Double:
      run_bits_backward<double, double>(grad_y, bits, grad_x, which, slope);
      break;
    case ScalarType::BFloat16:
      run_bits_backward<torch::headeronly::BFloat16, float>(grad_y, bits, grad_x, which, single);
      break;
    case ScalarType::Half:
      run_bits_backward<torch::headeronly::Half, float>(grad_y, bits, grad_x, which, single);
      break;
    default:
      run_bits_backward<float, float>(grad_y, bits, grad_x, which, single);
  }
  return grad_x;
}

}  // namespace

SIB_CUDA_LIBRARY(m) {
  m.impl("_activation_bits", TORCH_BOX(&cuda_activation_bits));
  m.impl("_activation_bits_backward", TORCH_BOX(&cuda_activation_bits_backward));
}

}  // namespace sib_fast::cuda
