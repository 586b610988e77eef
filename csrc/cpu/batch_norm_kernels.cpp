// Batch norm in training mode on the CPU, up to its second derivative (SPEC 10), one channel per task.
//
//   x̂ = (x - mean)·invstd      y = gamma·x̂ + beta      grad_x = gamma·invstd·(gy - A - x̂·B),  A = ⟨gy⟩, B = ⟨gy·x̂⟩
//   given u, u_gamma, u_beta:   U = ⟨u⟩, T = ⟨u·x̂⟩, V = ⟨u·gy⟩, kappa = V - A·U - B·T
//   to gy     gamma·invstd·(u - U - x̂·T) + u_gamma·x̂ + u_beta
//   to gamma  invstd·n·kappa
//   to x      invstd·(omega - ⟨omega⟩ - x̂·⟨omega·x̂⟩) - gamma·invstd²·kappa·x̂
//             omega = -gamma·invstd·(gy·T + B·u) + u_gamma·gy
//
// Passes    one that sums, one that writes: 8 traversals of an activation for the second derivative.
// Order     a channel is done by one thread, image by image: equal inputs give equal bits at any thread count.
// Twins     ops/batch_norm/reference.py is the truth.

#include "cpu/batch_norm_kernels.h"

#include "cpu/simd.h"

namespace sib_fast::cpu {
namespace {

// Calls visit(first element of a run) for every image's run of the channel.
template <class Visit>
inline void for_runs(const BatchNormShape& shape, int64_t channel, Visit visit) {
  for (int64_t n = 0; n < shape.images; ++n) visit((n * shape.channels + channel) * shape.spatial);
}

template <class T>
ChannelStatistics statistics(const BatchNormShape& shape, const T* x, int64_t channel, double eps) {
  const double count = static_cast<double>(shape.images * shape.spatial);
  double sum = 0;
  for_runs(shape, channel, [&](int64_t at) {
    double run = 0;
#pragma omp simd reduction(+ : run)
    for (int64_t i = 0; i < shape.spatial; ++i) run += static_cast<double>(x[at + i]);
    sum += run;
  });
  const double mean = sum / count;
  double squares = 0;
  for_runs(shape, channel, [&](int64_t at) {
    double run = 0;
#pragma omp simd reduction(+ : run)
    for (int64_t i = 0; i < shape.spatial; ++i) {
      const double d = static_cast<double>(x[at + i]) - mean;
      run += d * d;
    }
    squares += run;
  });
  const double variance = squares / count;
  return {mean, variance, 1.0 / __builtin_sqrt(variance + eps)};
}

template <class T>
void normalise(const BatchNormShape& shape, const T* x, int64_t channel, double mean, double invstd, double gamma,
               double beta, T* y) {
  const T m = static_cast<T>(mean), scale = static_cast<T>(gamma * invstd), shift = static_cast<T>(beta);
  for_runs(shape, channel, [&](int64_t at) {
#pragma omp simd
    for (int64_t i = 0; i < shape.spatial; ++i) y[at + i] = (x[at + i] - m) * scale + shift;
  });
}

template <class T>
void backward(const BatchNormShape& shape, const T* grad_y, const T* x, int64_t channel, double mean, double invstd,
              double gamma, T* grad_x, double* sums) {
  const double count = static_cast<double>(shape.images * shape.spatial);
  double sum = 0, dot = 0;
  for_runs(shape, channel, [&](int64_t at) {
    double run = 0, run_dot = 0;
#pragma omp simd reduction(+ : run, run_dot)
    for (int64_t i = 0; i < shape.spatial; ++i) {
      const double g = static_cast<double>(grad_y[at + i]);
      run += g;
      run_dot += g * (static_cast<double>(x[at + i]) - mean);
    }
    sum += run;
    dot += run_dot;
  });
  sums[0] = sum;
  sums[1] = dot * invstd;
  if (!grad_x) return;
  const T scale = static_cast<T>(gamma * invstd), mean_g = static_cast<T>(sum / count), m = static_cast<T>(mean);
  const T slope = static_cast<T>(dot / count * invstd * invstd);  // B·invstd, so that x̂ need not be formed
  for_runs(shape, channel, [&](int64_t at) {
#pragma omp simd
    for (int64_t i = 0; i < shape.spatial; ++i) {
      grad_x[at + i] = scale * ((grad_y[at + i] - mean_g) - (x[at + i] - m) * slope);
    }
  });
}

template <class T>
void double_backward(const BatchNormShape& shape, const T* u, double u_gamma, double u_beta, const T* grad_y,
                     const T* x, int64_t channel, double mean, double invstd, double gamma, T* to_grad_y, T* to_x,
                     double* to_gamma) {
  const double count = static_cast<double>(shape.images * shape.spatial);
  double sum_u = 0, sum_ux = 0, sum_ug = 0, sum_g = 0, sum_gx = 0;
  for_runs(shape, channel, [&](int64_t at) {
    double run_u = 0, run_ux = 0, run_ug = 0, run_g = 0, run_gx = 0;
#pragma omp simd reduction(+ : run_u, run_ux, run_ug, run_g, run_gx)
    for (int64_t i = 0; i < shape.spatial; ++i) {
      const double v = static_cast<double>(u[at + i]), g = static_cast<double>(grad_y[at + i]);
      const double d = static_cast<double>(x[at + i]) - mean;
      run_u += v;
      run_ux += v * d;
      run_ug += v * g;
      run_g += g;
      run_gx += g * d;
    }
    sum_u += run_u;
    sum_ux += run_ux;
    sum_ug += run_ug;
    sum_g += run_g;
    sum_gx += run_gx;
  });
  const double A = sum_g / count, B = sum_gx * invstd / count;
  const double U = sum_u / count, Tx = sum_ux * invstd / count, V = sum_ug / count;
  const double kappa = V - A * U - B * Tx;
  *to_gamma = invstd * count * kappa;
  // Both outputs are affine in (u, gy, x - mean) with coefficients of the channel.
  const T m = static_cast<T>(mean);
  const T y_u = static_cast<T>(gamma * invstd), y_one = static_cast<T>(u_beta - gamma * invstd * U);
  const T y_x = static_cast<T>((u_gamma - gamma * invstd * Tx) * invstd);
  const double omega_u = -gamma * invstd * B, omega_g = u_gamma - gamma * invstd * Tx;
  const double omega_mean = omega_u * U + omega_g * A, omega_dot = omega_u * Tx + omega_g * B;
  const T x_u = static_cast<T>(invstd * omega_u), x_g = static_cast<T>(invstd * omega_g);
  const T x_one = static_cast<T>(-invstd * omega_mean);
  const T x_x = static_cast<T>(-(invstd * omega_dot + gamma * invstd * invstd * kappa) * invstd);
  for_runs(shape, channel, [&](int64_t at) {
    if (to_grad_y) {
#pragma omp simd
      for (int64_t i = 0; i < shape.spatial; ++i) to_grad_y[at + i] = y_u * u[at + i] + y_x * (x[at + i] - m) + y_one;
    }
    if (to_x) {
#pragma omp simd
      for (int64_t i = 0; i < shape.spatial; ++i) {
        to_x[at + i] = x_u * u[at + i] + x_g * grad_y[at + i] + x_x * (x[at + i] - m) + x_one;
      }
    }
  });
}

template <class T>
constexpr BatchNormKernels<T> kTable = {statistics<T>, normalise<T>, backward<T>, double_backward<T>};

}  // namespace

template <>
const BatchNormKernels<float>& SIB_FAST_TABLE(batch_norm_kernels_)<float>() {
  return kTable<float>;
}
template <>
const BatchNormKernels<double>& SIB_FAST_TABLE(batch_norm_kernels_)<double>() {
  return kTable<double>;
}

}  // namespace sib_fast::cpu
