// batch_norm for CPU tensors (SPEC 10): which thread does what, and memory.
//
// Channels first, one channel is a task, summed and written while it is in cache. Channels last, rows are cut into as
// many chunks as the shape says, summed apart, merged in order, and written. Neither depends on the number of threads.

#include "common/batch_norm_ops.h"
#include "cpu/batch_norm_kernels.h"
#include "cpu/capability.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

// At least 64 rows a chunk, so that a chunk's sums are small beside what it sums; at most 32 chunks to merge.
constexpr int64_t kRowsOfChunk = 64, kMaxChunks = 32;

// sum(part, sums) for every channel, then coefficients(channel, its sums, its coefficients), then write(part,
// coefficients). Arrays of a part are [k][channels of the part]; coefficients are made in double.
template <class T, int kSums, int kCoefficients, class Sum, class Of, class Write>
void run(const BatchNormShape& shape, const Sum& sum, const Of& coefficients, const Write& write) {
  const auto part = [&](int64_t begin, int64_t end) {
    return BatchNormPart{shape.channels_last, shape.images, shape.channels, shape.spatial, begin, end};
  };
  if (!shape.channels_last) {
    parallel(shape.channels, [&](int64_t c) {
      double sums[kSums], exact[kCoefficients];
      T k[kCoefficients];
      sum(part(c, c + 1), sums);
      coefficients(c, sums, exact);
      for (int j = 0; j < kCoefficients; ++j) k[j] = static_cast<T>(exact[j]);
      write(part(c, c + 1), k);
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
  parallel(chunks, [&](int64_t i) { sum(part(from(i), from(i + 1)), partial + i * kSums * channels); });
  for (int64_t c = 0; c < channels; ++c) {
    double sums[kSums] = {};
    for (int64_t i = 0; i < chunks; ++i) {
      for (int s = 0; s < kSums; ++s) sums[s] += partial[(i * kSums + s) * channels + c];
    }
    double exact[kCoefficients];
    coefficients(c, sums, exact);
    for (int j = 0; j < kCoefficients; ++j) k[j * channels + c] = static_cast<T>(exact[j]);
  }
  parallel(chunks, [&](int64_t i) { write(part(from(i), from(i + 1)), k); });
}

// The first channel of a part, for per-channel inputs: they start there.
int64_t first_channel(const BatchNormPart& part) { return part.channels_last ? 0 : part.begin; }

// torch's element types, which the host can widen.
struct HostElements {
  using BFloat16 = torch::headeronly::BFloat16;
  using Half = torch::headeronly::Half;
};
double widened(const Tensor& x, int64_t at) {
  double value = 0;
  by_element<HostElements>(x.scalar_type(), [&](auto e) { value = static_cast<double>(in<decltype(e)>(x)[at]); });
  return value;
}

struct Kernels : OnCpu {
  template <class E>
  static void forward(const BatchNormShape& shape, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                      double eps, Tensor& y, Tensor& mean, Tensor& variance, Tensor& invstd) {
    using T = Compute<E>;
    const auto& kernels = SIB_FAST_PICK(batch_norm_kernels, E);
    const T *gamma = in<T>(weight), *beta = in<T>(bias);
    double *m = out<double>(mean), *v = out<double>(variance), *s = out<double>(invstd);
    const Quotient mean_of{static_cast<double>(shape.count())};
    // One pass, about a pivot. The pivot is one of the channel's own elements, so (pivot - mean)² <= count·variance,
    // and what cancels in the variance is at most count roundings of a double.
    for (int64_t c = 0; c < shape.channels; ++c) m[c] = widened(x, shape.channels_last ? c : c * shape.spatial);
    run<T, kForwardSums, kForwardCoefficients>(
        shape,
        [&](const BatchNormPart& part, double* sums) { kernels.sums_x(part, in<E>(x), m + first_channel(part), sums); },
        [&](int64_t c, const auto& sums, auto& k) {
          const NormStatistics of = norm_statistics(m[c], mean_of(sums[0]), mean_of(sums[1]), eps);
          m[c] = of.mean;
          v[c] = of.variance;
          s[c] = of.invstd;
          batch_norm_coefficients(of, value_of(gamma, c, 1.0), value_of(beta, c, 0.0), k);
        },
        [&](const BatchNormPart& part, const T* k) { kernels.write_y(part, in<E>(x), k, out<E>(y)); });
  }

  template <class E>
  static void backward(const BatchNormShape& shape, const NormBackward& of, const MaybeTensor& addend) {
    using T = Compute<E>;
    const auto& kernels = SIB_FAST_PICK(batch_norm_kernels, E);
    const double *m = in<double>(of.mean), *s = in<double>(of.invstd);
    const T* gamma = in<T>(of.weight);
    T *gw = out<T>(of.grad_weight), *gb = out<T>(of.grad_bias);
    const Quotient mean_of{static_cast<double>(shape.count())};
    run<T, kBackwardSums, kBackwardCoefficients>(
        shape,
        [&](const BatchNormPart& part, double* sums) {
          kernels.sums_gy(part, in<E>(of.grad_y), in<E>(of.x), m + first_channel(part), sums);
        },
        [&](int64_t c, const auto& sums, auto& k) {
          double to_gamma, to_beta;
          batch_norm_backward_coefficients(sums, mean_of, m[c], s[c], value_of(gamma, c, 1.0), to_gamma, to_beta, k);
          gw[c] = static_cast<T>(to_gamma);
          gb[c] = static_cast<T>(to_beta);
        },
        [&](const BatchNormPart& part, const T* k) {
          if (E* to = out<E>(of.grad_x))
            kernels.write_grad_x(part, in<E>(of.grad_y), in<E>(of.x), in<E>(addend), k, to);
        });
  }

  // Eval mode: grad_x = gamma·invstd·gy, which is the pass of y over gy.
  template <class E>
  static void running_backward(const BatchNormShape& shape, const Tensor& grad_y, const Tensor& x,
                               const MaybeTensor& weight, const MaybeTensor& mean, const Tensor& variance, double eps,
                               Tensor& grad_x, Tensor& grad_weight, Tensor& grad_bias) {
    using T = Compute<E>;
    const auto& kernels = SIB_FAST_PICK(batch_norm_kernels, E);
    const Scratch centre_memory(shape.channels * static_cast<int64_t>(sizeof(double)));
    double* m = reinterpret_cast<double*>(centre_memory.get());
    const T *gamma = in<T>(weight), *centre = in<T>(mean), *spread = in<T>(variance);
    T *gw = out<T>(grad_weight), *gb = out<T>(grad_bias);
    for (int64_t c = 0; c < shape.channels; ++c) m[c] = value_of(centre, c, 0.0);
    run<T, kBackwardSums, kForwardCoefficients>(
        shape,
        [&](const BatchNormPart& part, double* sums) {
          kernels.sums_gy(part, in<E>(grad_y), in<E>(x), m + first_channel(part), sums);
        },
        [&](int64_t c, const auto& sums, auto& k) {
          const double square = static_cast<double>(spread[c]), invstd = 1.0 / std::sqrt(square + eps);
          gw[c] = static_cast<T>(sums[1] * invstd);
          gb[c] = static_cast<T>(sums[0]);
          batch_norm_coefficients({0.0, square, invstd}, value_of(gamma, c, 1.0), 0.0, k);
        },
        [&](const BatchNormPart& part, const T* k) {
          if (E* to = out<E>(grad_x)) kernels.write_y(part, in<E>(grad_y), k, to);
        });
  }

  template <class E>
  static void double_backward(const BatchNormShape& shape, const NormSecond& of) {
    using T = Compute<E>;
    const auto& kernels = SIB_FAST_PICK(batch_norm_kernels, E);
    const double *m = in<double>(of.mean), *s = in<double>(of.invstd), count = static_cast<double>(shape.count());
    const T *gamma = in<T>(of.weight), *u_gamma = in<T>(of.u_weight), *u_beta = in<T>(of.u_bias);
    T* tw = out<T>(of.to_weight);
    run<T, kSecondSums, kSecondCoefficients>(
        shape,
        [&](const BatchNormPart& part, double* sums) {
          kernels.sums_u(part, in<E>(of.u), in<E>(of.grad_y), in<E>(of.x), m + first_channel(part), sums);
        },
        [&](int64_t c, const auto& sums, auto& k) {
          double to_gamma;
          batch_norm_second_coefficients(sums, Quotient{count}, count, m[c], s[c], value_of(gamma, c, 1.0),
                                         value_of(u_gamma, c, 0.0), value_of(u_beta, c, 0.0), to_gamma, k);
          tw[c] = static_cast<T>(to_gamma);
        },
        [&](const BatchNormPart& part, const T* k) {
          kernels.write_second(part, in<E>(of.u), in<E>(of.grad_y), in<E>(of.x), k, out<E>(of.to_grad_y),
                               out<E>(of.to_x));
        });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) {
  BatchNormOps<Kernels>::implement(m);
  m.impl("_running_batch_norm_backward", TORCH_BOX(&BatchNormOps<Kernels>::running_backward));
}

}  // namespace sib_fast::cpu
