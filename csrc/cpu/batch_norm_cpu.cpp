// batch_norm for CPU tensors (SPEC 10): which thread does what, the channels' coefficients, memory and registration.
//
// Channels first, one channel is a task, summed and written while it is in cache. Channels last, rows are cut into as
// many chunks as the shape says, summed apart, merged in order, and written. Neither depends on the number of threads.

#include <optional>
#include <tuple>

#include "common/check.h"
#include "cpu/batch_norm_kernels.h"
#include "cpu/capability.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

constexpr const char* kOp = "batch_norm";

template <class E>
const BatchNormKernels<E>& kernels() {
  static const BatchNormKernels<E>& table = SIB_FAST_PICK(batch_norm_kernels, E);
  return table;
}

struct Shape {
  bool channels_last;
  int64_t images, channels, spatial;
  int64_t count() const { return images * spatial; }
  BatchNormPart part(int64_t begin, int64_t end) const {
    return {channels_last, images, channels, spatial, begin, end};
  }
};

Shape shape_of(const Tensor& x) {
  SIB_CHECK(kOp, x.dim() >= 2 && x.numel() > 0, "x must have shape [N, C, *] and elements");
  SIB_CHECK(kOp, is_supported(x.scalar_type()), "x must be float64, float32, bfloat16 or float16");
  Shape s{false, x.size(0), x.size(1), x.numel() / (x.size(0) * x.size(1))};
  const bool first = lies(x, false);
  SIB_CHECK(kOp, first || lies(x, true), "x must be contiguous or channels last");
  // A channel of one-element runs is read row by row.
  s.channels_last = !first || s.spatial == 1;
  return s;
}

void check_like(const char* name, const Tensor& t, const Tensor& x, const Shape& shape) {
  SIB_CHECK(kOp, t.dim() == x.dim() && t.numel() == x.numel(), name, " must have the shape of x");
  SIB_CHECK(kOp, t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  SIB_CHECK(kOp, lies(t, shape.channels_last), name, " must have the layout of x");
}

// A per-channel argument: value(c) in double, or the default where it is absent.
class PerChannel {
 public:
  PerChannel(const char* name, const std::optional<Tensor>& t, ScalarType type, int64_t channels, double absent)
      : absent_(absent), is_double_(type == ScalarType::Double) {
    if (!t) return;
    check_plain(kOp, name, *t, type, channels);
    data_ = t->const_data_ptr();
  }
  double operator()(int64_t c) const {
    if (!data_) return absent_;
    return is_double_ ? static_cast<const double*>(data_)[c] : static_cast<double>(static_cast<const float*>(data_)[c]);
  }

 private:
  const void* data_ = nullptr;
  double absent_;
  bool is_double_;
};

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* out(const Tensor& t) {
  return t.numel() == 0 ? nullptr : static_cast<T*>(t.mutable_data_ptr());
}

template <class Task>
void parallel(int64_t tasks, const Task& task) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// At least 64 rows a chunk, so that a chunk's sums are small beside what it sums; at most 32 chunks to merge.
constexpr int64_t kRowsOfChunk = 64, kMaxChunks = 32;

// sum(part, sums) for every channel, then coefficients(channel, its sums, its coefficients), then write(part,
// coefficients). Arrays of a part are [k][channels of the part].
template <class T, int kSums, int kCoefficients, class Sum, class Of, class Write>
void run(const Shape& shape, const Sum& sum, const Of& coefficients, const Write& write) {
  if (!shape.channels_last) {
    parallel(shape.channels, [&](int64_t c) {
      double sums[kSums];
      T k[kCoefficients];
      sum(shape.part(c, c + 1), sums);
      coefficients(c, sums, k);
      write(shape.part(c, c + 1), k);
    });
    return;
  }
  const int64_t rows = shape.count(), channels = shape.channels;
  const int64_t wanted = (rows + kRowsOfChunk - 1) / kRowsOfChunk;
  const int64_t chunks = wanted < kMaxChunks ? wanted : kMaxChunks;
  const auto from = [&](int64_t chunk) { return rows * chunk / chunks; };
  const Scratch partial_memory(chunks * kSums * channels * static_cast<int64_t>(sizeof(double)));
  const Scratch coefficient_memory(kCoefficients * channels * static_cast<int64_t>(sizeof(T)));
  double* partial = reinterpret_cast<double*>(partial_memory.get());
  T* k = reinterpret_cast<T*>(coefficient_memory.get());
  parallel(chunks, [&](int64_t i) { sum(shape.part(from(i), from(i + 1)), partial + i * kSums * channels); });
  for (int64_t c = 0; c < channels; ++c) {
    double sums[kSums] = {};
    for (int64_t i = 0; i < chunks; ++i) {
      for (int s = 0; s < kSums; ++s) sums[s] += partial[(i * kSums + s) * channels + c];
    }
    T of_channel[kCoefficients];
    coefficients(c, sums, of_channel);
    for (int j = 0; j < kCoefficients; ++j) k[j * channels + c] = of_channel[j];
  }
  parallel(chunks, [&](int64_t i) { write(shape.part(from(i), from(i + 1)), k); });
}

// The first channel of a part, for per-channel inputs: they start there.
int64_t first_channel(const BatchNormPart& part) { return part.channels_last ? 0 : part.begin; }

double widened(const Tensor& x, int64_t at) {
  const void* data = x.const_data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return static_cast<const double*>(data)[at];
    case ScalarType::BFloat16:
      return static_cast<double>(static_cast<const torch::headeronly::BFloat16*>(data)[at]);
    case ScalarType::Half:
      return static_cast<double>(static_cast<const torch::headeronly::Half*>(data)[at]);
    default:
      return static_cast<double>(static_cast<const float*>(data)[at]);
  }
}

template <class E>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, double eps) {
  using T = Compute<E>;
  const Shape shape = shape_of(x);
  const ScalarType type = accumulation_type(x.scalar_type());
  const PerChannel gamma("weight", weight, type, shape.channels, 1.0);
  const PerChannel beta("bias", bias, type, shape.channels, 0.0);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_empty(x, {shape.channels}, ScalarType::Double);
  Tensor variance = torch::stable::new_empty(x, {shape.channels}, ScalarType::Double);
  Tensor invstd = torch::stable::new_empty(x, {shape.channels}, ScalarType::Double);
  double *m = out<double>(mean), *v = out<double>(variance), *s = out<double>(invstd);
  const double count = static_cast<double>(shape.count());
  // One pass, about a pivot. The pivot is one of the channel's own elements, so (pivot - mean)² <= count·variance, and
  // what cancels below is at most count roundings of a double.
  for (int64_t c = 0; c < shape.channels; ++c) m[c] = widened(x, shape.channels_last ? c : c * shape.spatial);
  run<T, 2, kForwardCoefficients>(
      shape,
      [&](const BatchNormPart& part, double* sums) {
        kernels<E>().sums_x(part, in<E>(x), m + first_channel(part), sums);
      },
      [&](int64_t c, const double* sums, T* k) {
        const double shift = sums[0] / count, square = sums[1] / count - shift * shift;
        m[c] += shift;
        v[c] = square > 0 || square != square ? square : 0.0;
        s[c] = 1.0 / __builtin_sqrt(v[c] + eps);
        k[0] = static_cast<T>(m[c]);
        k[1] = static_cast<T>(gamma(c) * s[c]);
        k[2] = static_cast<T>(beta(c));
      },
      [&](const BatchNormPart& part, const T* k) { kernels<E>().write_y(part, in<E>(x), k, out<E>(y)); });
  return {y, mean, variance, invstd};
}

template <class E>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const std::optional<Tensor>& weight,
                                            const Tensor& mean, const Tensor& invstd,
                                            const std::optional<Tensor>& addend, bool need_x) {
  using T = Compute<E>;
  const Shape shape = shape_of(x);
  const ScalarType type = accumulation_type(x.scalar_type());
  check_like("grad_y", grad_y, x, shape);
  if (addend) check_like("addend", *addend, x, shape);
  const PerChannel gamma("weight", weight, type, shape.channels, 1.0);
  check_plain(kOp, "mean", mean, ScalarType::Double, shape.channels);
  check_plain(kOp, "invstd", invstd, ScalarType::Double, shape.channels);
  const double *m = in<double>(mean), *s = in<double>(invstd);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::new_empty(x, {shape.channels}, type);
  Tensor grad_bias = torch::stable::new_empty(x, {shape.channels}, type);
  T *gw = out<T>(grad_weight), *gb = out<T>(grad_bias);
  const E* added = addend ? in<E>(*addend) : nullptr;
  const double count = static_cast<double>(shape.count());
  run<T, 2, kBackwardCoefficients>(
      shape,
      [&](const BatchNormPart& part, double* sums) {
        kernels<E>().sums_gy(part, in<E>(grad_y), in<E>(x), m + first_channel(part), sums);
      },
      [&](int64_t c, const double* sums, T* k) {
        gb[c] = static_cast<T>(sums[0]);
        gw[c] = static_cast<T>(sums[1] * s[c]);
        k[0] = static_cast<T>(m[c]);
        k[1] = static_cast<T>(gamma(c) * s[c]);
        k[2] = static_cast<T>(sums[0] / count);
        k[3] = static_cast<T>(sums[1] / count * s[c] * s[c]);  // B·invstd, so that x̂ need not be formed
      },
      [&](const BatchNormPart& part, const T* k) {
        if (need_x) kernels<E>().write_grad_x(part, in<E>(grad_y), in<E>(x), added, k, out<E>(grad_x));
      });
  return {grad_x, grad_weight, grad_bias};
}

// Eval mode: grad_x = gamma·invstd·gy, which is the pass of y over gy.
template <class E>
std::tuple<Tensor, Tensor, Tensor> running_backward(const Tensor& grad_y, const Tensor& x,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& mean, const Tensor& variance,
                                                    double eps, bool need_x) {
  using T = Compute<E>;
  const Shape shape = shape_of(x);
  const ScalarType type = accumulation_type(x.scalar_type());
  check_like("grad_y", grad_y, x, shape);
  const PerChannel gamma("weight", weight, type, shape.channels, 1.0);
  const PerChannel centre("mean", mean, type, shape.channels, 0.0);
  const PerChannel spread("variance", variance, type, shape.channels, 0.0);
  const Scratch centre_memory(shape.channels * static_cast<int64_t>(sizeof(double)));
  double* m = reinterpret_cast<double*>(centre_memory.get());
  for (int64_t c = 0; c < shape.channels; ++c) m[c] = centre(c);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::new_empty(x, {shape.channels}, type);
  Tensor grad_bias = torch::stable::new_empty(x, {shape.channels}, type);
  T *gw = out<T>(grad_weight), *gb = out<T>(grad_bias);
  run<T, 2, kForwardCoefficients>(
      shape,
      [&](const BatchNormPart& part, double* sums) {
        kernels<E>().sums_gy(part, in<E>(grad_y), in<E>(x), m + first_channel(part), sums);
      },
      [&](int64_t c, const double* sums, T* k) {
        const double invstd = 1.0 / __builtin_sqrt(spread(c) + eps);
        gb[c] = static_cast<T>(sums[0]);
        gw[c] = static_cast<T>(sums[1] * invstd);
        k[0] = T(0);
        k[1] = static_cast<T>(gamma(c) * invstd);
        k[2] = T(0);
      },
      [&](const BatchNormPart& part, const T* k) {
        if (need_x) kernels<E>().write_y(part, in<E>(grad_y), k, out<E>(grad_x));
      });
  return {grad_x, grad_weight, grad_bias};
}

template <class E>
std::tuple<Tensor, Tensor, Tensor> double_backward(const Tensor& u, const std::optional<Tensor>& u_weight,
                                                   const std::optional<Tensor>& u_bias, const Tensor& grad_y,
                                                   const Tensor& x, const std::optional<Tensor>& weight,
                                                   const Tensor& mean, const Tensor& invstd, bool need_grad_y,
                                                   bool need_x) {
  using T = Compute<E>;
  const Shape shape = shape_of(x);
  const ScalarType type = accumulation_type(x.scalar_type());
  check_like("u", u, x, shape);
  check_like("grad_y", grad_y, x, shape);
  const PerChannel gamma("weight", weight, type, shape.channels, 1.0);
  const PerChannel u_gamma("u_weight", u_weight, type, shape.channels, 0.0);
  const PerChannel u_beta("u_bias", u_bias, type, shape.channels, 0.0);
  check_plain(kOp, "mean", mean, ScalarType::Double, shape.channels);
  check_plain(kOp, "invstd", invstd, ScalarType::Double, shape.channels);
  const double *m = in<double>(mean), *s = in<double>(invstd);
  Tensor to_grad_y = need_grad_y ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor to_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor to_weight = torch::stable::new_empty(x, {shape.channels}, type);
  T* tw = out<T>(to_weight);
  const double count = static_cast<double>(shape.count());
  run<T, 5, kSecondCoefficients>(
      shape,
      [&](const BatchNormPart& part, double* sums) {
        kernels<E>().sums_u(part, in<E>(u), in<E>(grad_y), in<E>(x), m + first_channel(part), sums);
      },
      [&](int64_t c, const double* sums, T* k) {
        const double invstd_c = s[c], scale = gamma(c) * invstd_c;
        const double U = sums[0] / count, Tx = sums[1] * invstd_c / count, V = sums[2] / count;
        const double A = sums[3] / count, B = sums[4] * invstd_c / count;
        const double kappa = V - A * U - B * Tx;
        tw[c] = static_cast<T>(invstd_c * count * kappa);
        const double omega_u = -scale * B, omega_g = u_gamma(c) - scale * Tx;
        const double omega_mean = omega_u * U + omega_g * A, omega_dot = omega_u * Tx + omega_g * B;
        k[0] = static_cast<T>(m[c]);
        k[1] = static_cast<T>(scale);
        k[2] = static_cast<T>((u_gamma(c) - scale * Tx) * invstd_c);
        k[3] = static_cast<T>(u_beta(c) - scale * U);
        k[4] = static_cast<T>(invstd_c * omega_u);
        k[5] = static_cast<T>(invstd_c * omega_g);
        k[6] = static_cast<T>(-(invstd_c * omega_dot + scale * invstd_c * kappa) * invstd_c);
        k[7] = static_cast<T>(-invstd_c * omega_mean);
      },
      [&](const BatchNormPart& part, const T* k) {
        kernels<E>().write_second(part, in<E>(u), in<E>(grad_y), in<E>(x), k, out<E>(to_grad_y), out<E>(to_x));
      });
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

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm(Tensor x, std::optional<Tensor> weight,
                                                      std::optional<Tensor> bias,
                                                      double eps){SIB_FAST_BY_ELEMENT(forward, x, x, weight, bias, eps)}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(Tensor grad_y, Tensor x, std::optional<Tensor> weight,
                                                       Tensor mean, Tensor invstd, std::optional<Tensor> addend,
                                                       bool need_x){
    SIB_FAST_BY_ELEMENT(backward, x, grad_y, x, weight, mean, invstd, addend, need_x)}

std::tuple<Tensor, Tensor, Tensor> running_batch_norm_backward(Tensor grad_y, Tensor x, std::optional<Tensor> weight,
                                                               std::optional<Tensor> mean, Tensor variance, double eps,
                                                               bool need_x){
    SIB_FAST_BY_ELEMENT(running_backward, x, grad_y, x, weight, mean, variance, eps, need_x)}

std::tuple<Tensor, Tensor, Tensor> batch_norm_double_backward(Tensor u, std::optional<Tensor> u_weight,
                                                              std::optional<Tensor> u_bias, Tensor grad_y, Tensor x,
                                                              std::optional<Tensor> weight, Tensor mean, Tensor invstd,
                                                              bool need_grad_y, bool need_x) {
  SIB_FAST_BY_ELEMENT(double_backward, x, u, u_weight, u_bias, grad_y, x, weight, mean, invstd, need_grad_y, need_x)
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) {
  m.impl("_batch_norm", TORCH_BOX(&batch_norm));
  m.impl("_batch_norm_backward", TORCH_BOX(&batch_norm_backward));
  m.impl("_running_batch_norm_backward", TORCH_BOX(&running_batch_norm_backward));
  m.impl("_batch_norm_double_backward", TORCH_BOX(&batch_norm_double_backward));
}

}  // namespace sib_fast::cpu
