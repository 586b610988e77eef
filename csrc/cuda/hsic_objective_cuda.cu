// hsic_objective on the GPU: estimator, background term and objective in one launch, or two for more than 128 images;
// their gradient in one (SPEC 5, 6).
//
//   K_ij = G_ij/(n_i n_j)      (ZKZ)_ij = K_ij - mean_i - mean_j + grand mean      (symmetric: row = column means)
//   fg·(N-1)² = Σ K_R·K_x - 2N Σ_i mean_i^R mean_i^x + N² · grand means           Z and ZKZ exist nowhere
//
// Shapes    Grams [N, N], variances [N] float64, contiguous; base and the cotangents 0-d, float32 or float64;
//           rows [4, N] = 1/norm of R and x, row means of K_R and K_x; totals [4] = fg, bg, grand means of K_R and K_x.
// Launch    rows: one warp a row, 8 rows a block, N/8 blocks, 16 KiB shared (1/norms of 1,024 columns at a time: the
//           diagonal is read once a block, not once a row). Combine: one block of 256. Up to 128 images one block of 32
//           warps does both, four rows a warp. Gradient: one warp a row.
// Traffic   forward reads both Grams once; backward reads them once and writes two. N = 128: 256 KiB, L2-resident.
// Order     a warp's lanes by butterfly, a block's rows and the combine in fixed order: equal inputs give equal bits.
// Twins     cpu/hsic_objective_kernels.cpp, ops/hsic_objective/triton.py; truth: ops/hsic_objective/reference.py.

#include "common/head_ops.h"
#include "cuda/block.cuh"
#include "cuda/on_cuda.cuh"

namespace sib_fast::cuda {
namespace {

constexpr int kHsicWarps = 8, kHsicThreads = 32 * kHsicWarps, kHsicMostWarps = 32;
constexpr int64_t kHsicOneBlock = 128;  // images; [E] 256 KiB by one multiprocessor is what a launch takes
constexpr int kHsicColumns = 1024;
constexpr int kHsicSums = 5;

struct HsicRows {
  const double *gram_vjp, *gram_x;
  double *rows, *products;  // products_i = Σ_j K_R,ij·K_x,ij
  int64_t images;
  BatchScale scale;
};
struct HsicTotals {
  Scalar base;
  const double* variance;
  Objective objective;
  double* totals;
  void *loss, *foreground, *background;
};

// 1/norms and row means of both normalised Grams for rows first … end - 1, a warp a row.
template <int kWarps>
__device__ __forceinline__ void hsic_rows(const HsicRows& a, int64_t first_row, int64_t end) {
  double* inverse_vjp = dynamic_shared<double>();
  double* inverse_x = inverse_vjp + kHsicColumns;
  const int64_t N = a.images;
  for (int64_t group = first_row; group < end; group += kWarps) {
    const int64_t i = group + warp_of_thread();
    const bool has_row = i < end;
    double product = 0.0, sum_vjp = 0.0, sum_x = 0.0;
    for (int64_t first = 0; first < N; first += kHsicColumns) {
      const int count = static_cast<int>(min(N - first, static_cast<int64_t>(kHsicColumns)));
      if (group == first_row || N > kHsicColumns) {
        __syncthreads();  // the columns before these have been read
        for (int j = threadIdx.x; j < count; j += 32 * kWarps) {
          inverse_vjp[j] = inverse_norm(a.gram_vjp[(first + j) * (N + 1)]);
          inverse_x[j] = inverse_norm(a.gram_x[(first + j) * (N + 1)]);
        }
        __syncthreads();
      }
      if (!has_row) continue;
      const double *row_vjp = a.gram_vjp + i * N + first, *row_x = a.gram_x + i * N + first;
#pragma unroll 4
      for (int j = lane_of_thread(); j < count; j += 32) {
        const double k = row_vjp[j] * inverse_vjp[j], l = row_x[j] * inverse_x[j];  // the row's own norm at the end
        product += k * l;
        sum_vjp += k;
        sum_x += l;
      }
    }
    if (!has_row) continue;
    product = warp_sum(product);
    sum_vjp = warp_sum(sum_vjp);
    sum_x = warp_sum(sum_x);
    if (lane_of_thread() != 0) continue;
    const double own_vjp = inverse_norm(a.gram_vjp[i * (N + 1)]), own_x = inverse_norm(a.gram_x[i * (N + 1)]);
    a.rows[i] = own_vjp;
    a.rows[N + i] = own_x;
    a.rows[2 * N + i] = sum_vjp * own_vjp * a.scale.mean;
    a.rows[3 * N + i] = sum_x * own_x * a.scale.mean;
    a.products[i] = product * own_vjp * own_x;
  }
}

// The sums over rows, by the first kHsicThreads of one block, then foreground, background and loss.
__device__ __forceinline__ void hsic_combine(const HsicRows& a, const HsicTotals& to) {
  double* partial = dynamic_shared<double>();
  double sums[kHsicSums] = {0.0, 0.0, 0.0, 0.0, 0.0};
  if (threadIdx.x < kHsicThreads) {
    for (int64_t i = threadIdx.x; i < a.images; i += kHsicThreads) {
      const double mean_vjp = a.rows[2 * a.images + i], mean_x = a.rows[3 * a.images + i];
      sums[0] += a.products[i];
      sums[1] += mean_vjp * mean_x;
      sums[2] += mean_vjp;
      sums[3] += mean_x;
      sums[4] += to.variance[i];
    }
#pragma unroll
    for (int s = 0; s < kHsicSums; ++s) {
      sums[s] = warp_sum(sums[s]);
      if (lane_of_thread() == 0) partial[s * kHsicWarps + warp_of_thread()] = sums[s];
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int s = 0; s < kHsicSums; ++s) {
    sums[s] = 0.0;
    for (int w = 0; w < kHsicWarps; ++w) sums[s] += partial[s * kHsicWarps + w];
  }
  const double grand_vjp = sums[2] * a.scale.mean, grand_x = sums[3] * a.scale.mean;
  const double fg = a.scale.foreground(sums[0], sums[1], grand_vjp, grand_x), bg = sums[4] * a.scale.mean;
  to.totals[0] = fg;
  to.totals[1] = bg;
  to.totals[2] = grand_vjp;
  to.totals[3] = grand_x;
  to.base.write(to.loss, to.objective.value(to.base.read(), fg, bg));
  to.base.write(to.foreground, fg);
  to.base.write(to.background, bg);
}

__global__ void __launch_bounds__(kHsicThreads) hsic_rows_kernel(const __grid_constant__ HsicRows a) {
  const int64_t first = int64_t{blockIdx.x} * kHsicWarps;
  hsic_rows<kHsicWarps>(a, first, min(first + kHsicWarps, a.images));
}
__global__ void __launch_bounds__(kHsicThreads)
    hsic_combine_kernel(const __grid_constant__ HsicRows a, const __grid_constant__ HsicTotals to) {
  hsic_combine(a, to);
}
// Both, where one block is soon through with the rows.
__global__ void __launch_bounds__(32 * kHsicMostWarps)
    hsic_forward_kernel(const __grid_constant__ HsicRows a, const __grid_constant__ HsicTotals to) {
  hsic_rows<kHsicMostWarps>(a, 0, a.images);
  __syncthreads();  // the rows are written, and the shared memory is free
  hsic_combine(a, to);
}

// hsic_gradient_kernel: gradients of both Grams (null where not asked for) and of the variances.
//
//   grad_K_R = ḟ/(N-1)²·Z K_x Z      grad_G_R,ij = grad_K_R,ij/(n_i n_j) - [i = j]·Σ_j grad_K_R,ij K_R,ij/n_i²
//
// The second term only for a row whose norm is above the floor; x likewise.
__global__ void __launch_bounds__(kHsicThreads)
    hsic_gradient_kernel(const __grid_constant__ HsicGradients to, const double* __restrict__ gram_vjp,
                         const double* __restrict__ gram_x, const double* __restrict__ rows,
                         const double* __restrict__ totals, int64_t N, BatchScale batch, Objective objective) {
  const int lane = lane_of_thread();
  const int64_t i = int64_t{blockIdx.x} * kHsicWarps + warp_of_thread();
  if (i >= N) return;
  double* const __restrict__ grad_vjp = to.grad_vjp, * const __restrict__ grad_x = to.grad_x;
  const double to_loss = to.to_loss.read();
  if (to.grad_variance != nullptr && lane == 0) {
    to.grad_variance[i] = (to_loss * objective.slope_background(totals[1]) + to.to_background.read()) * batch.mean;
  }
  if (grad_vjp == nullptr && grad_x == nullptr) return;
  const double scale = (to_loss * objective.slope_foreground(totals[0]) + to.to_foreground.read()) * batch.hsic;
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

dim3 hsic_grid(int64_t N) { return dim3(static_cast<unsigned>(divide_up(N, kHsicWarps))); }

struct HsicKernels : OnCuda {
  static constexpr const char* kOp = HsicOps<HsicKernels>::kOp;

  static void forward(const HsicInputs& inputs, int64_t N, Scalar base, const double* variance,
                      const HsicOutputs& outputs) {
    const Tensor products = new_double(inputs.gram_vjp, {N});
    const HsicRows rows{in<double>(inputs.gram_vjp),
                        in<double>(inputs.gram_x),
                        out<double>(outputs.rows),
                        out<double>(products),
                        N,
                        batch_scale(N)};
    const HsicTotals totals{base,
                            variance,
                            inputs.objective,
                            out<double>(outputs.totals),
                            outputs.loss.mutable_data_ptr(),
                            outputs.foreground.mutable_data_ptr(),
                            outputs.background.mutable_data_ptr()};
    const Stream stream = current_stream(inputs.gram_vjp);
    constexpr int64_t kShared = 2 * kHsicColumns * sizeof(double);
    if (N <= kHsicOneBlock) {
      launch(kOp, hsic_forward_kernel, dim3(1), dim3(32 * kHsicMostWarps), kShared, stream, rows, totals);
      return;
    }
    launch(kOp, hsic_rows_kernel, hsic_grid(N), dim3(kHsicThreads), kShared, stream, rows);
    launch(kOp, hsic_combine_kernel, dim3(1), dim3(kHsicThreads), kHsicSums * kHsicWarps * sizeof(double), stream, rows,
           totals);
  }

  static void backward(const HsicInputs& inputs, int64_t N, const double* rows, const double* totals,
                       const HsicGradients& grads) {
    launch(kOp, hsic_gradient_kernel, hsic_grid(N), dim3(kHsicThreads), 0, current_stream(inputs.gram_vjp), grads,
           in<double>(inputs.gram_vjp), in<double>(inputs.gram_x), rows, totals, N, batch_scale(N), inputs.objective);
  }
};

}  // namespace

SIB_CUDA_LIBRARY(m) { HsicOps<HsicKernels>::implement(m); }

}  // namespace sib_fast::cuda
