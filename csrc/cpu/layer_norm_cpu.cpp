// layer_norm for CPU tensors: which thread does which rows, sums over rows, memory and registration.
//
// Rows are cut into as many chunks as the shape says; a chunk has channel sums of its own, merged in order. Neither
// depends on the number of threads.

#include <cstring>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "cpu/capability.h"
#include "cpu/layer_norm_kernels.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

constexpr const char* kOp = "layer_norm";
// At least so many elements a chunk, so that a chunk's sums are small beside what it sums; at most 64 chunks to merge.
constexpr int64_t kElementsOfChunk = 16384, kMaxChunks = 64;

template <class E>
const LayerNormKernels<E>& kernels() {
  static const LayerNormKernels<E>& table = SIB_FAST_PICK(layer_norm_kernels, E);
  return table;
}

struct Shape {
  int64_t length, spatial, groups, rows, channels, chunks;
  NormRows part(int64_t chunk) const {
    return {length, spatial, groups, rows * chunk / chunks, rows * (chunk + 1) / chunks};
  }
};

Shape shape_of(const Tensor& x, int64_t length, int64_t groups, int64_t spatial) {
  SIB_CHECK(kOp, is_supported(x.scalar_type()), "x must be float64, float32, bfloat16 or float16");
  SIB_CHECK(kOp, x.is_contiguous(), "x must be contiguous");
  SIB_CHECK(kOp, length > 0 && groups > 0 && spatial > 0 && length % spatial == 0 && x.numel() % (length * groups) == 0,
            "x must consist of rows of ", length, " elements");
  const int64_t rows = x.numel() / length;
  const int64_t rows_of_chunk = (kElementsOfChunk + length - 1) / length;
  const int64_t wanted = (rows + rows_of_chunk - 1) / rows_of_chunk;
  return {length, spatial, groups, rows, groups * (length / spatial), wanted < kMaxChunks ? wanted : kMaxChunks};
}

void check_like(const char* name, const Tensor& t, const Tensor& x) {
  SIB_CHECK(kOp, t.numel() == x.numel() && t.is_contiguous(), name, " must have the shape of x and be contiguous");
  SIB_CHECK(kOp, t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
}

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* out(const Tensor& t) {
  return t.numel() == 0 ? nullptr : static_cast<T*>(t.mutable_data_ptr());
}

// A per-channel argument, or as many times `absent`.
template <class T>
class PerChannel {
 public:
  PerChannel(const char* name, const std::optional<Tensor>& t, ScalarType type, int64_t channels, double absent)
      : filled_(t ? 0 : channels * static_cast<int64_t>(sizeof(T))) {
    if (t) {
      check_plain(kOp, name, *t, type, channels);
      data_ = in<T>(*t);
      return;
    }
    T* values = reinterpret_cast<T*>(filled_.get());
    for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<T>(absent);
    data_ = values;
  }
  const T* get() const { return data_; }

 private:
  Scratch filled_;
  const T* data_;
};

template <class Task>
void parallel(int64_t tasks, const Task& task) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// `count` sums over rows for every channel: zeroed here, one array a chunk, and merged in the order of chunks.
template <class T>
class ChannelSums {
 public:
  ChannelSums(const Shape& shape, int64_t count)
      : shape_(shape), count_(count), memory_(shape.chunks * count * shape.channels * kBytes) {
    std::memset(memory_.get(), 0, static_cast<size_t>(shape.chunks * count * shape.channels * kBytes));
  }
  double* of(int64_t chunk, int64_t sum) const {
    return reinterpret_cast<double*>(memory_.get()) + (chunk * count_ + sum) * shape_.channels;
  }
  void merge(int64_t sum, T* result) const {
    for (int64_t c = 0; c < shape_.channels; ++c) {
      double total = 0;
      for (int64_t chunk = 0; chunk < shape_.chunks; ++chunk) total += of(chunk, sum)[c];
      result[c] = static_cast<T>(total);
    }
  }

 private:
  static constexpr int64_t kBytes = static_cast<int64_t>(sizeof(double));
  const Shape& shape_;
  int64_t count_;
  Scratch memory_;
};

template <class E>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, int64_t length, int64_t groups,
                                           int64_t spatial, double eps) {
  using T = Compute<E>;
  const Shape shape = shape_of(x, length, groups, spatial);
  const ScalarType type = accumulation_type(x.scalar_type());
  const PerChannel<T> gamma("weight", weight, type, shape.channels, 1.0);
  const PerChannel<T> beta("bias", bias, type, shape.channels, 0.0);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_empty(x, {shape.rows}, ScalarType::Double);
  Tensor invstd = torch::stable::new_empty(x, {shape.rows}, ScalarType::Double);
  double *m = out<double>(mean), *s = out<double>(invstd);
  parallel(shape.chunks, [&](int64_t i) {
    kernels<E>().forward(shape.part(i), in<E>(x), gamma.get(), beta.get(), eps, out<E>(y), m, s);
  });
  return {y, mean, invstd};
}

template <class E>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const std::optional<Tensor>& weight,
                                            const Tensor& mean, const Tensor& invstd, int64_t length, int64_t groups,
                                            int64_t spatial, bool need_x, bool need_weight, bool need_bias) {
  using T = Compute<E>;
  const Shape shape = shape_of(x, length, groups, spatial);
  const ScalarType type = accumulation_type(x.scalar_type());
  check_like("grad_y", grad_y, x);
  const PerChannel<T> gamma("weight", weight, type, shape.channels, 1.0);
  check_plain(kOp, "mean", mean, ScalarType::Double, shape.rows);
  check_plain(kOp, "invstd", invstd, ScalarType::Double, shape.rows);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::new_empty(x, {need_weight ? shape.channels : 0}, type);
  Tensor grad_bias = torch::stable::new_empty(x, {need_bias ? shape.channels : 0}, type);
  const ChannelSums<T> sums(shape, need_weight + need_bias);
  parallel(shape.chunks, [&](int64_t i) {
    kernels<E>().backward(shape.part(i), in<E>(grad_y), in<E>(x), gamma.get(), in<double>(mean), in<double>(invstd),
                          out<E>(grad_x), need_weight ? sums.of(i, 0) : nullptr,
                          need_bias ? sums.of(i, need_weight) : nullptr);
  });
  if (need_weight) sums.merge(0, out<T>(grad_weight));
  if (need_bias) sums.merge(need_weight, out<T>(grad_bias));
  return {grad_x, grad_weight, grad_bias};
}

template <class E>
std::tuple<Tensor, Tensor, Tensor> double_backward(const Tensor& u, const std::optional<Tensor>& u_weight,
                                                   const std::optional<Tensor>& u_bias, const Tensor& grad_y,
                                                   const Tensor& x, const std::optional<Tensor>& weight,
                                                   const Tensor& mean, const Tensor& invstd, int64_t length,
                                                   int64_t groups, int64_t spatial, bool need_grad_y, bool need_x,
                                                   bool need_weight) {
  using T = Compute<E>;
  const Shape shape = shape_of(x, length, groups, spatial);
  const ScalarType type = accumulation_type(x.scalar_type());
  check_like("u", u, x);
  check_like("grad_y", grad_y, x);
  const PerChannel<T> gamma("weight", weight, type, shape.channels, 1.0);
  const PerChannel<T> u_gamma("u_weight", u_weight, type, shape.channels, 0.0);
  const PerChannel<T> u_beta("u_bias", u_bias, type, shape.channels, 0.0);
  const bool of_parameters = u_weight || u_bias;
  check_plain(kOp, "mean", mean, ScalarType::Double, shape.rows);
  check_plain(kOp, "invstd", invstd, ScalarType::Double, shape.rows);
  Tensor to_grad_y = need_grad_y ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor to_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor to_weight = torch::stable::new_empty(x, {need_weight ? shape.channels : 0}, type);
  const ChannelSums<T> sums(shape, need_weight);
  parallel(shape.chunks, [&](int64_t i) {
    kernels<E>().double_backward(shape.part(i), in<E>(u), of_parameters ? u_gamma.get() : nullptr, u_beta.get(),
                                 in<E>(grad_y), in<E>(x), gamma.get(), in<double>(mean), in<double>(invstd),
                                 out<E>(to_grad_y), out<E>(to_x), need_weight ? sums.of(i, 0) : nullptr);
  });
  if (need_weight) sums.merge(0, out<T>(to_weight));
  return {to_grad_y, to_x, to_weight};
}

// Calls `function<E>` for the element type of x.
#define SIB_FAST_BY_ELEMENT(function, x, ...)     \
  switch ((x).scalar_type()) {                    \
    case ScalarType::Double:                      \
      return function<double>(__VA_ARGS__);       \
    case ScalarType::BFloat16:                    \
      return function<BFloat16Bits>(__VA_ARGS__); \
    case ScalarType::Half:                        \
      return function<Float16Bits>(__VA_ARGS__);  \
    default:                                      \
      return function<float>(__VA_ARGS__);        \
  }

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                              int64_t length, int64_t groups, int64_t spatial, double eps){
    SIB_FAST_BY_ELEMENT(forward, x, x, weight, bias, length, groups, spatial, eps)}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad_y, Tensor x, std::optional<Tensor> weight,
                                                       Tensor mean, Tensor invstd, int64_t length, int64_t groups,
                                                       int64_t spatial, bool need_x, bool need_weight, bool need_bias){
    SIB_FAST_BY_ELEMENT(backward, x, grad_y, x, weight, mean, invstd, length, groups, spatial, need_x, need_weight,
                        need_bias)}

std::tuple<Tensor, Tensor, Tensor> layer_norm_double_backward(Tensor u, std::optional<Tensor> u_weight,
                                                              std::optional<Tensor> u_bias, Tensor grad_y, Tensor x,
                                                              std::optional<Tensor> weight, Tensor mean, Tensor invstd,
                                                              int64_t length, int64_t groups, int64_t spatial,
                                                              bool need_grad_y, bool need_x, bool need_weight) {
  SIB_FAST_BY_ELEMENT(double_backward, x, u, u_weight, u_bias, grad_y, x, weight, mean, invstd, length, groups, spatial,
                      need_grad_y, need_x, need_weight)
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) {
  m.impl("_layer_norm", TORCH_BOX(&layer_norm));
  m.impl("_layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("_layer_norm_double_backward", TORCH_BOX(&layer_norm_double_backward));
}

}  // namespace sib_fast::cpu
