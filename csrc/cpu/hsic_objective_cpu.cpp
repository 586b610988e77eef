// hsic_objective for CPU tensors: memory, threads (rows of the Grams), ordered sums and registration. The arithmetic of
// a row is in hsic_objective_kernels.cpp, the objective in common/objective.h.

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/objective.h"
#include "cpu/capability.h"
#include "cpu/hsic_objective_kernels.h"

namespace sib_fast::cpu {
namespace {

constexpr const char* kOp = "hsic_objective";
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

const double* in(const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); }
double* out(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

double scalar(const char* name, const std::optional<Tensor>& t) {
  if (!t) return 0.0;
  const bool is_double = t->scalar_type() == ScalarType::Double;
  check_plain(kOp, name, *t, is_double ? ScalarType::Double : ScalarType::Float, 1);
  return is_double ? *static_cast<const double*>(t->const_data_ptr()) : *static_cast<const float*>(t->const_data_ptr());
}

Tensor scalar_like(const Tensor& base, double value) {
  Tensor t = torch::stable::new_empty(base, {});
  if (base.scalar_type() == ScalarType::Double)
    *static_cast<double*>(t.mutable_data_ptr()) = value;
  else
    *static_cast<float*>(t.mutable_data_ptr()) = static_cast<float>(value);
  return t;
}

int64_t check_grams(const Tensor& gram_vjp, const Tensor& gram_x) {
  SIB_CHECK(kOp, gram_vjp.dim() == 2, "gram_vjp must have shape [N, N]");
  const int64_t N = gram_vjp.size(0);
  check_plain(kOp, "gram_vjp", gram_vjp, ScalarType::Double, N * N);
  check_plain(kOp, "gram_x", gram_x, ScalarType::Double, N * N);
  return N;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hsic_objective(Tensor base, Tensor gram_vjp, Tensor gram_x,
                                                                  Tensor background_variance, double lambda_fg,
                                                                  double lambda_bg, int64_t objective) {
  const int64_t N = check_grams(gram_vjp, gram_x);
  check_plain(kOp, "background_variance", background_variance, ScalarType::Double, N);
  Tensor rows = torch::stable::new_empty(gram_vjp, {4, N}), totals = torch::stable::new_empty(gram_vjp, {4});
  double *inverse_vjp = out(rows), *inverse_x = inverse_vjp + N, *mean_vjp = inverse_x + N, *mean_x = mean_vjp + N;
  for (int64_t i = 0; i < N; ++i) {
    inverse_vjp[i] = inverse_norm(in(gram_vjp)[i * (N + 1)]);
    inverse_x[i] = inverse_norm(in(gram_x)[i * (N + 1)]);
  }
  const HsicColumns<double> columns{inverse_vjp, inverse_x, mean_vjp, mean_x};
  const BatchScale scale = batch_scale(N);
  std::vector<double> products(N);
  for_rows(N, [&](int64_t i) {
    const HsicRowSums<double> sums = kernels().row_sums(in(gram_vjp), in(gram_x), columns, i, N);
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
    variance += in(background_variance)[i];
  }
  double* total = out(totals);
  total[0] = scale.foreground(product, mean_product, grand_vjp, grand_x);
  total[1] = variance * scale.mean;
  total[2] = grand_vjp;
  total[3] = grand_x;
  const Objective of{lambda_fg, lambda_bg, static_cast<int>(objective)};
  return {scalar_like(base, of.value(scalar("base", base), total[0], total[1])), scalar_like(base, total[0]),
          scalar_like(base, total[1]), rows, totals};
}

std::tuple<Tensor, Tensor, Tensor> hsic_objective_backward(std::optional<Tensor> grad_loss,
                                                           std::optional<Tensor> grad_foreground,
                                                           std::optional<Tensor> grad_background, Tensor gram_vjp,
                                                           Tensor gram_x, Tensor rows, Tensor totals, double lambda_fg,
                                                           double lambda_bg, int64_t objective, bool need_vjp,
                                                           bool need_x, bool need_variance) {
  const int64_t N = check_grams(gram_vjp, gram_x);
  check_plain(kOp, "rows", rows, ScalarType::Double, 4 * N);
  check_plain(kOp, "totals", totals, ScalarType::Double, 4);
  const BatchScale batch = batch_scale(N);
  const double* total = in(totals);
  const Objective of{lambda_fg, lambda_bg, static_cast<int>(objective)};
  const double to_loss = scalar("grad_loss", grad_loss);
  const double scale =
      (to_loss * of.slope_foreground(total[0]) + scalar("grad_foreground", grad_foreground)) * batch.hsic;
  const double to_variance =
      (to_loss * of.slope_background(total[1]) + scalar("grad_background", grad_background)) * batch.mean;
  const auto matrix = [&](bool need) {
    return need ? torch::stable::new_empty(gram_vjp, {N, N}) : Tensor();
  };
  Tensor grad_vjp = matrix(need_vjp), grad_x = matrix(need_x);
  Tensor grad_variance = need_variance ? torch::stable::new_empty(gram_vjp, {N}) : Tensor();
  if (need_variance) std::fill_n(out(grad_variance), N, to_variance);
  if (need_vjp || need_x) {
    const double* row = in(rows);
    const HsicColumns<double> columns{row, row + N, row + 2 * N, row + 3 * N};
    double *to_vjp = need_vjp ? out(grad_vjp) : nullptr, *to_x = need_x ? out(grad_x) : nullptr;
    for_rows(N, [&](int64_t i) {
      const HsicAlong<double> along =
          kernels().row_gradient(in(gram_vjp), in(gram_x), columns, total + 2, scale, i, N, to_vjp, to_x);
      const int64_t own = i * (N + 1);
      if (to_vjp && has_norm(in(gram_vjp)[own])) {
        to_vjp[own] -= along.vjp * columns.inverse_vjp[i] * columns.inverse_vjp[i];
      }
      if (to_x && has_norm(in(gram_x)[own])) to_x[own] -= along.x * columns.inverse_x[i] * columns.inverse_x[i];
    });
  }
  return {grad_vjp, grad_x, grad_variance};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) {
  m.impl("_hsic_objective", TORCH_BOX(&hsic_objective));
  m.impl("_hsic_objective_backward", TORCH_BOX(&hsic_objective_backward));
}

}  // namespace sib_fast::cpu
