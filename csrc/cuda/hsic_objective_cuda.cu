// hsic_objective on the GPU: estimator, background term and objective in two launches, their gradient in one (SPEC 5,
// 6).
//
//   K_ij = G_ij/(n_i n_j)      (ZKZ)_ij = K_ij - mean_i - mean_j + grand mean      (symmetric: row = column means)
//   fg·(N-1)² = Σ K_R·K_x - 2N Σ_i mean_i^R mean_i^x + N² · grand means           Z and ZKZ exist nowhere
//
// Shapes    Grams [N, N], variances [N] float64, contiguous; base and the cotangents 0-d, float32 or float64;
//           rows [4, N] = 1/norm of R and x, row means of K_R and K_x; totals [4] = fg, bg, grand means of K_R and K_x.
// Launch    rows: one warp a row, 8 rows a block, N/8 blocks, 16 KiB shared (1/norms of 1,024 columns at a time: the
//           diagonal is read once a block, not once a row). Combine: one block of 256. Gradient: one warp a row.
// Traffic   forward reads both Grams once; backward reads them once and writes two. N = 128: 256 KiB, L2-resident.
// Order     a warp's lanes by butterfly, a block's rows and the combine in fixed order: equal inputs give equal bits.
// Twins     cpu/hsic_objective_kernels.cpp, ops/hsic_objective/triton.py; truth: ops/hsic_objective/reference.py.

#include <optional>
#include <tuple>

#include "common/objective.h"
#include "cuda/platform.cuh"

namespace sib_fast::cuda {
namespace {

constexpr const char* kHsic = "hsic_objective";
constexpr int kHsicWarps = 8, kHsicThreads = 32 * kHsicWarps;
constexpr int kHsicColumns = 1024;
constexpr int kHsicSums = 5;

// A 0-d tensor of either type; null counts as 0.
struct Scalar {
  const void* data;
  bool is_double;
  __device__ double read() const {
    if (data == nullptr) return 0.0;
    return is_double ? *static_cast<const double*>(data) : static_cast<double>(*static_cast<const float*>(data));
  }
};

__device__ __forceinline__ void write_scalar(void* to, bool is_double, double value) {
  if (is_double)
    *static_cast<double*>(to) = value;
  else
    *static_cast<float*>(to) = static_cast<float>(value);
}

// Every lane gets the same bits.
__device__ __forceinline__ double warp_sum(double value) {
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(0xffffffffu, value, bits);
  return value;
}

// hsic_rows_kernel: 1/norms and row means of both normalised Grams, and products_i = Σ_j K_R,ij·K_x,ij.
__global__ void __launch_bounds__(kHsicThreads)
    hsic_rows_kernel(const double* __restrict__ gram_vjp, const double* __restrict__ gram_x, double* __restrict__ rows,
                     double* __restrict__ products, int64_t N, BatchScale scale) {
  double* inverse_vjp = dynamic_shared<double>();
  double* inverse_x = inverse_vjp + kHsicColumns;
  const int lane = threadIdx.x % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kHsicWarps + threadIdx.x / 32;
  const bool has_row = i < N;
  double product = 0.0, sum_vjp = 0.0, sum_x = 0.0;
  for (int64_t first = 0; first < N; first += kHsicColumns) {
    const int count = static_cast<int>(min(N - first, static_cast<int64_t>(kHsicColumns)));
    __syncthreads();  // the columns before these have been read
    for (int j = threadIdx.x; j < count; j += kHsicThreads) {
      inverse_vjp[j] = inverse_norm(gram_vjp[(first + j) * (N + 1)]);
      inverse_x[j] = inverse_norm(gram_x[(first + j) * (N + 1)]);
    }
    __syncthreads();
    if (!has_row) continue;
    const double *row_vjp = gram_vjp + i * N + first, *row_x = gram_x + i * N + first;
#pragma unroll 4
    for (int j = lane; j < count; j += 32) {
      const double k = row_vjp[j] * inverse_vjp[j], l = row_x[j] * inverse_x[j];  // the row's own norm at the end
      product += k * l;
      sum_vjp += k;
      sum_x += l;
    }
  }
  if (!has_row) return;
  product = warp_sum(product);
  sum_vjp = warp_sum(sum_vjp);
  sum_x = warp_sum(sum_x);
  if (lane != 0) return;
  const double own_vjp = inverse_norm(gram_vjp[i * (N + 1)]), own_x = inverse_norm(gram_x[i * (N + 1)]);
  rows[i] = own_vjp;
  rows[N + i] = own_x;
  rows[2 * N + i] = sum_vjp * own_vjp * scale.mean;
  rows[3 * N + i] = sum_x * own_x * scale.mean;
  products[i] = product * own_vjp * own_x;
}

// hsic_combine_kernel: the sums over rows, then foreground, background and loss. One block.
__global__ void __launch_bounds__(kHsicThreads)
    hsic_combine_kernel(Scalar base, const double* __restrict__ rows, const double* __restrict__ products,
                        const double* __restrict__ variance, int64_t N, BatchScale scale, Objective objective,
                        double* __restrict__ totals, void* loss, void* foreground, void* background) {
  double* partial = dynamic_shared<double>();
  double sums[kHsicSums] = {0.0, 0.0, 0.0, 0.0, 0.0};
  for (int64_t i = threadIdx.x; i < N; i += kHsicThreads) {
    const double mean_vjp = rows[2 * N + i], mean_x = rows[3 * N + i];
    sums[0] += products[i];
    sums[1] += mean_vjp * mean_x;
    sums[2] += mean_vjp;
    sums[3] += mean_x;
    sums[4] += variance[i];
  }
#pragma unroll
  for (int s = 0; s < kHsicSums; ++s) {
    sums[s] = warp_sum(sums[s]);
    if (threadIdx.x % 32 == 0) partial[s * kHsicWarps + threadIdx.x / 32] = sums[s];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int s = 0; s < kHsicSums; ++s) {
    sums[s] = 0.0;
    for (int w = 0; w < kHsicWarps; ++w) sums[s] += partial[s * kHsicWarps + w];
  }
  const double grand_vjp = sums[2] * scale.mean, grand_x = sums[3] * scale.mean;
  const double fg = scale.foreground(sums[0], sums[1], grand_vjp, grand_x), bg = sums[4] * scale.mean;
  totals[0] = fg;
  totals[1] = bg;
  totals[2] = grand_vjp;
  totals[3] = grand_x;
  write_scalar(loss, base.is_double, objective.value(base.read(), fg, bg));
  write_scalar(foreground, base.is_double, fg);
  write_scalar(background, base.is_double, bg);
}

// hsic_gradient_kernel: gradients of both Grams (null where not asked for) and of the variances.
//
//   grad_K_R = ḟ/(N-1)²·Z K_x Z      grad_G_R,ij = grad_K_R,ij/(n_i n_j) - [i = j]·Σ_j grad_K_R,ij K_R,ij/n_i²
//
// The second term only for a row whose norm is above the floor; x likewise.
__global__ void __launch_bounds__(kHsicThreads)
    hsic_gradient_kernel(Scalar to_loss, Scalar to_foreground, Scalar to_background,
                         const double* __restrict__ gram_vjp, const double* __restrict__ gram_x,
                         const double* __restrict__ rows, const double* __restrict__ totals, int64_t N,
                         BatchScale batch, Objective objective, double* __restrict__ grad_vjp,
                         double* __restrict__ grad_x, double* __restrict__ grad_variance) {
  const int lane = threadIdx.x % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kHsicWarps + threadIdx.x / 32;
  if (i >= N) return;
  const double to = to_loss.read();
  if (grad_variance != nullptr && lane == 0) {
    grad_variance[i] = (to * objective.slope_background(totals[1]) + to_background.read()) * batch.mean;
  }
  if (grad_vjp == nullptr && grad_x == nullptr) return;
  const double scale = (to * objective.slope_foreground(totals[0]) + to_foreground.read()) * batch.hsic;
  const double *inverse_vjp = rows, *inverse_x = rows + N, *mean_vjp = rows + 2 * N, *mean_x = rows + 3 * N;
  const double own_vjp = inverse_vjp[i], own_x = inverse_x[i];
  const double shift_vjp = totals[2] - mean_vjp[i], shift_x = totals[3] - mean_x[i];
  const double *row_vjp = gram_vjp + i * N, *row_x = gram_x + i * N;
  double along_vjp = 0.0, along_x = 0.0, diagonal_vjp = 0.0, diagonal_x = 0.0;
#pragma unroll 2
  for (int64_t j = lane; j < N; j += 32) {
    const double pair_vjp = own_vjp * inverse_vjp[j], pair_x = own_x * inverse_x[j];
    const double k = row_vjp[j] * own_vjp * inverse_vjp[j], l = row_x[j] * own_x * inverse_x[j];
    const double grad_k = scale * (l + (shift_x - mean_x[j])), grad_l = scale * (k + (shift_vjp - mean_vjp[j]));
    along_vjp += grad_k * k;
    along_x += grad_l * l;
    if (j == i) {
      diagonal_vjp = grad_k * pair_vjp;
      diagonal_x = grad_l * pair_x;
      continue;
    }
    if (grad_vjp != nullptr) grad_vjp[i * N + j] = grad_k * pair_vjp;
    if (grad_x != nullptr) grad_x[i * N + j] = grad_l * pair_x;
  }
  along_vjp = warp_sum(along_vjp);
  along_x = warp_sum(along_x);
  if (lane != i % 32) return;
  if (grad_vjp != nullptr) {
    grad_vjp[i * (N + 1)] = diagonal_vjp - (has_norm(row_vjp[i]) ? along_vjp * own_vjp * own_vjp : 0.0);
  }
  if (grad_x != nullptr) grad_x[i * (N + 1)] = diagonal_x - (has_norm(row_x[i]) ? along_x * own_x * own_x : 0.0);
}

Scalar hsic_scalar(const char* name, const std::optional<Tensor>& t) {
  if (!t) return {nullptr, true};
  const bool is_double = t->scalar_type() == ScalarType::Double;
  check_plain(kHsic, name, *t, is_double ? ScalarType::Double : ScalarType::Float, 1);
  return {t->const_data_ptr(), is_double};
}

int64_t check_hsic_grams(const Tensor& gram_vjp, const Tensor& gram_x) {
  SIB_CHECK(kHsic, gram_vjp.dim() == 2, "gram_vjp must have shape [N, N]");
  const int64_t N = gram_vjp.size(0);
  check_plain(kHsic, "gram_vjp", gram_vjp, ScalarType::Double, N * N);
  check_plain(kHsic, "gram_x", gram_x, ScalarType::Double, N * N);
  return N;
}

const double* hsic_in(const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); }
double* hsic_out(const Tensor& t) { return !t.defined() ? nullptr : static_cast<double*>(t.mutable_data_ptr()); }
dim3 hsic_grid(int64_t N) { return dim3(static_cast<unsigned>((N + kHsicWarps - 1) / kHsicWarps)); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hsic_objective(Tensor base, Tensor gram_vjp, Tensor gram_x,
                                                                  Tensor background_variance, double lambda_fg,
                                                                  double lambda_bg, int64_t kind) {
  const int64_t N = check_hsic_grams(gram_vjp, gram_x);
  check_plain(kHsic, "background_variance", background_variance, ScalarType::Double, N);
  const DeviceGuard guard(gram_vjp.get_device_index());
  const Scalar from = hsic_scalar("base", base);
  Tensor rows = torch::stable::new_empty(gram_vjp, {4, N}), totals = torch::stable::new_empty(gram_vjp, {4});
  Tensor products = torch::stable::new_empty(gram_vjp, {N});
  Tensor loss = torch::stable::new_empty(base, {}), foreground = torch::stable::new_empty(base, {});
  Tensor background = torch::stable::new_empty(base, {});
  const Objective objective{lambda_fg, lambda_bg, static_cast<int>(kind)};
  const Stream stream = current_stream(gram_vjp);
  launch(kHsic, hsic_rows_kernel, hsic_grid(N), dim3(kHsicThreads), 2 * kHsicColumns * sizeof(double), stream,
         hsic_in(gram_vjp), hsic_in(gram_x), hsic_out(rows), hsic_out(products), N, batch_scale(N));
  launch(kHsic, hsic_combine_kernel, dim3(1), dim3(kHsicThreads), kHsicSums * kHsicWarps * sizeof(double), stream, from,
         hsic_in(rows), hsic_in(products), hsic_in(background_variance), N, batch_scale(N), objective, hsic_out(totals),
         loss.mutable_data_ptr(), foreground.mutable_data_ptr(), background.mutable_data_ptr());
  return {loss, foreground, background, rows, totals};
}

std::tuple<Tensor, Tensor, Tensor> hsic_objective_backward(std::optional<Tensor> grad_loss,
                                                           std::optional<Tensor> grad_foreground,
                                                           std::optional<Tensor> grad_background, Tensor gram_vjp,
                                                           Tensor gram_x, Tensor rows, Tensor totals, double lambda_fg,
                                                           double lambda_bg, int64_t kind, bool need_vjp, bool need_x,
                                                           bool need_variance) {
  const int64_t N = check_hsic_grams(gram_vjp, gram_x);
  check_plain(kHsic, "rows", rows, ScalarType::Double, 4 * N);
  check_plain(kHsic, "totals", totals, ScalarType::Double, 4);
  const DeviceGuard guard(gram_vjp.get_device_index());
  const auto matrix = [&](bool need) {
    return need ? torch::stable::new_empty(gram_vjp, {N, N}) : Tensor();
  };
  Tensor grad_vjp = matrix(need_vjp), grad_x = matrix(need_x);
  Tensor grad_variance = need_variance ? torch::stable::new_empty(gram_vjp, {N}) : Tensor();
  const Objective objective{lambda_fg, lambda_bg, static_cast<int>(kind)};
  launch(kHsic, hsic_gradient_kernel, hsic_grid(N), dim3(kHsicThreads), 0, current_stream(gram_vjp),
         hsic_scalar("grad_loss", grad_loss), hsic_scalar("grad_foreground", grad_foreground),
         hsic_scalar("grad_background", grad_background), hsic_in(gram_vjp), hsic_in(gram_x), hsic_in(rows),
         hsic_in(totals), N, batch_scale(N), objective, hsic_out(grad_vjp), hsic_out(grad_x), hsic_out(grad_variance));
  return {grad_vjp, grad_x, grad_variance};
}

}  // namespace

SIB_CUDA_LIBRARY(m) {
  m.impl("_hsic_objective", TORCH_BOX(&hsic_objective));
  m.impl("_hsic_objective_backward", TORCH_BOX(&hsic_objective_backward));
}

}  // namespace sib_fast::cuda
