// hsic_objective for CPU tensors: threads (rows of the Grams) and ordered sums. The arithmetic of a row is in
// hsic_objective_kernels.cpp, the objective in common/objective.h.

#include <algorithm>
#include <vector>

#include "common/head_ops.h"
#include "cpu/capability.h"
#include "cpu/hsic_objective_kernels.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // of a Gram: below this a thread costs more than the work

const HsicKernels<double>& kernels() {
  static const HsicKernels<double>& table = SIB_FAST_PICK(hsic_kernels, double);
  return table;
}

template <class Task>
void for_rows(int64_t N, const Task& task) {
  torch::stable::parallel_for(0, N, std::max<int64_t>(1, kElementsPerTask / N), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

struct Kernels : OnCpu {
  static void forward(const HsicInputs& of, int64_t N, Scalar base, const double* variances,
                      const HsicOutputs& outputs) {
    const double *gram_vjp = in<double>(of.gram_vjp), *gram_x = in<double>(of.gram_x);
    double* const inverse_vjp = out<double>(outputs.rows);
    double *inverse_x = inverse_vjp + N, *mean_vjp = inverse_x + N, *mean_x = mean_vjp + N;
    for (int64_t i = 0; i < N; ++i) {
      inverse_vjp[i] = inverse_norm(gram_vjp[i * (N + 1)]);
      inverse_x[i] = inverse_norm(gram_x[i * (N + 1)]);
    }
    const HsicColumns<double> columns{inverse_vjp, inverse_x, mean_vjp, mean_x};
    const BatchScale scale = batch_scale(N);
    std::vector<double> products(N);
    for_rows(N, [&](int64_t i) {
      const HsicRowSums<double> sums = kernels().row_sums(gram_vjp, gram_x, columns, i, N);
      products[i] = sums.product;
      mean_vjp[i] = sums.vjp * scale.mean;
      mean_x[i] = sums.x * scale.mean;
    });
    double product = 0, mean_product = 0, grand_vjp = 0, grand_x = 0, variance = 0;
    for (int64_t i = 0; i < N; ++i) {
      product += products[i];
      mean_product += mean_vjp[i] * mean_x[i];
      grand_vjp += mean_vjp[i] * scale.mean;
      grand_x += mean_x[i] * scale.mean;
      variance += variances[i];
    }
    double* total = out<double>(outputs.totals);
    total[0] = scale.foreground(product, mean_product, grand_vjp, grand_x);
    total[1] = variance * scale.mean;
    total[2] = grand_vjp;
    total[3] = grand_x;
    base.write(outputs.loss.mutable_data_ptr(), of.objective.value(base.read(), total[0], total[1]));
    base.write(outputs.foreground.mutable_data_ptr(), total[0]);
    base.write(outputs.background.mutable_data_ptr(), total[1]);
  }

  static void backward(const HsicInputs& of, int64_t N, const double* row, const double* total,
                       const HsicGradients& to) {
    const double *gram_vjp = in<double>(of.gram_vjp), *gram_x = in<double>(of.gram_x);
    const BatchScale batch = batch_scale(N);
    const double to_loss = to.to_loss.read();
    if (to.grad_variance) {
      const double slope = of.objective.slope_background(total[1]);
      std::fill_n(to.grad_variance, N, (to_loss * slope + to.to_background.read()) * batch.mean);
    }
    if (!to.grad_vjp && !to.grad_x) return;
    const double scale = (to_loss * of.objective.slope_foreground(total[0]) + to.to_foreground.read()) * batch.hsic;
    const HsicColumns<double> columns{row, row + N, row + 2 * N, row + 3 * N};
    for_rows(N, [&](int64_t i) {
      const HsicAlong<double> along =
          kernels().row_gradient(gram_vjp, gram_x, columns, total + 2, scale, i, N, to.grad_vjp, to.grad_x);
      const int64_t own = i * (N + 1);
      if (to.grad_vjp && has_norm(gram_vjp[own])) {
        to.grad_vjp[own] -= along.vjp * columns.inverse_vjp[i] * columns.inverse_vjp[i];
      }
      if (to.grad_x && has_norm(gram_x[own])) {
        to.grad_x[own] -= along.x * columns.inverse_x[i] * columns.inverse_x[i];
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) { HsicOps<Kernels>::implement(m); }

}  // namespace sib_fast::cpu
