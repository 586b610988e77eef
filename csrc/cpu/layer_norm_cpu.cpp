// layer_norm for CPU tensors: which thread does which rows, sums over rows, and memory.
//
// Rows are cut into as many chunks as the shape says; a chunk has channel sums of its own, merged in order. Neither
// depends on the number of threads.

#include <cstring>

#include "common/layer_norm_ops.h"
#include "cpu/capability.h"
#include "cpu/layer_norm_kernels.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

// At least so many elements a chunk, so that a chunk's sums are small beside what it sums; at most 64 chunks to merge.
constexpr int64_t kElementsOfChunk = 16384, kMaxChunks = 64;

int64_t chunks_of(const LayerNormShape& shape) {
  const int64_t rows_of_chunk = (kElementsOfChunk + shape.length - 1) / shape.length;
  const int64_t wanted = (shape.rows + rows_of_chunk - 1) / rows_of_chunk;
  return wanted < kMaxChunks ? wanted : kMaxChunks;
}

// task(rows of the chunk, number of the chunk)
template <class Task>
void for_chunks(const LayerNormShape& shape, const Task& task) {
  const int64_t chunks = chunks_of(shape);
  parallel(chunks, [&](int64_t i) {
    task(NormRows{shape.length, shape.spatial, shape.groups, shape.rows * i / chunks, shape.rows * (i + 1) / chunks},
         i);
  });
}

// A per-channel argument, or as many times `absent`.
template <class T>
class PerChannel {
 public:
  PerChannel(const MaybeTensor& t, int64_t channels, double absent)
      : filled_(t ? 0 : channels * static_cast<int64_t>(sizeof(T))), data_(in<T>(t)) {
    if (data_) return;
    T* values = reinterpret_cast<T*>(filled_.get());
    for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<T>(absent);
    data_ = values;
  }
  const T* get() const { return data_; }

 private:
  Scratch filled_;
  const T* data_;
};

// `count` sums over rows for every channel: zeroed here, one array a chunk, and merged in the order of chunks.
template <class T>
class ChannelSums {
 public:
  ChannelSums(const LayerNormShape& shape, int64_t count)
      : chunks_(chunks_of(shape)), channels_(shape.channels), count_(count), memory_(bytes()) {
    std::memset(memory_.get(), 0, static_cast<size_t>(bytes()));
  }
  double* of(int64_t chunk, int64_t sum) const {
    return reinterpret_cast<double*>(memory_.get()) + (chunk * count_ + sum) * channels_;
  }
  void merge(int64_t sum, T* result) const {
    for (int64_t c = 0; c < channels_; ++c) {
      double total = 0;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) total += of(chunk, sum)[c];
      result[c] = static_cast<T>(total);
    }
  }

 private:
  int64_t bytes() const { return chunks_ * count_ * channels_ * static_cast<int64_t>(sizeof(double)); }
  int64_t chunks_, channels_, count_;
  Scratch memory_;
};

struct Kernels : OnCpu {
  template <class E>
  static void forward(const LayerNormShape& shape, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                      double eps, Tensor& y, Tensor& mean, Tensor& invstd) {
    const auto& kernels = SIB_FAST_PICK(layer_norm_kernels, E);
    const PerChannel<Compute<E>> gamma(weight, shape.channels, 1.0), beta(bias, shape.channels, 0.0);
    for_chunks(shape, [&](const NormRows& rows, int64_t) {
      kernels.forward(rows, in<E>(x), gamma.get(), beta.get(), eps, out<E>(y), out<double>(mean), out<double>(invstd));
    });
  }

  template <class E>
  static void backward(const LayerNormShape& shape, const NormBackward& of) {
    using T = Compute<E>;
    const auto& kernels = SIB_FAST_PICK(layer_norm_kernels, E);
    const PerChannel<T> gamma(of.weight, shape.channels, 1.0);
    T *gw = out<T>(of.grad_weight), *gb = out<T>(of.grad_bias);
    const ChannelSums<T> sums(shape, (gw != nullptr) + (gb != nullptr));
    for_chunks(shape, [&](const NormRows& rows, int64_t i) {
      kernels.backward(rows, in<E>(of.grad_y), in<E>(of.x), gamma.get(), in<double>(of.mean), in<double>(of.invstd),
                       out<E>(of.grad_x), gw ? sums.of(i, 0) : nullptr, gb ? sums.of(i, gw != nullptr) : nullptr);
    });
    if (gw) sums.merge(0, gw);
    if (gb) sums.merge(gw != nullptr, gb);
  }

  template <class E>
  static void double_backward(const LayerNormShape& shape, const NormSecond& of) {
    using T = Compute<E>;
    const auto& kernels = SIB_FAST_PICK(layer_norm_kernels, E);
    const PerChannel<T> gamma(of.weight, shape.channels, 1.0);
    const PerChannel<T> u_gamma(of.u_weight, shape.channels, 0.0), u_beta(of.u_bias, shape.channels, 0.0);
    const bool of_parameters = of.u_weight || of.u_bias;
    T* tw = out<T>(of.to_weight);
    const ChannelSums<T> sums(shape, tw != nullptr);
    for_chunks(shape, [&](const NormRows& rows, int64_t i) {
      kernels.double_backward(rows, in<E>(of.u), of_parameters ? u_gamma.get() : nullptr, u_beta.get(),
                              in<E>(of.grad_y), in<E>(of.x), gamma.get(), in<double>(of.mean), in<double>(of.invstd),
                              out<E>(of.to_grad_y), out<E>(of.to_x), tw ? sums.of(i, 0) : nullptr);
    });
    if (tw) sums.merge(0, tw);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) { LayerNormOps<Kernels>::implement(m); }

}  // namespace sib_fast::cpu
