// region_statistics for CPU tensors: memory, threads, ordered merges and registration. The arithmetic is in
// region_statistics_kernels.cpp.

#include "cpu/region_statistics_kernels.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "cpu/capability.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

constexpr const char* kOp = "region_statistics";

template <class T>
const StatisticsKernels<T>& kernels() {
  static const StatisticsKernels<T>& table = SIB_FAST_PICK(statistics_kernels, T);
  return table;
}

void check_inputs(const Tensor& vjp, const Tensor& x, const Tensor& mask) {
  check_map(kOp, "vjp", vjp);
  check_map(kOp, "x", x);
  for (int64_t d = 0; d < 4; ++d) {
    SIB_CHECK(kOp, vjp.size(d) == x.size(d), "x must have the shape of vjp");
  }
  SIB_CHECK(kOp, accumulation_type(vjp.scalar_type()) == accumulation_type(x.scalar_type()),
            "vjp and x must both be float64 or neither");
  check_plain(kOp, "mask", mask, accumulation_type(vjp.scalar_type()), vjp.size(0) * vjp.size(2) * vjp.size(3));
}

StatisticsGeometry geometry_of(const Tensor& vjp, bool background_grams) {
  return {vjp.size(0), vjp.size(1), vjp.size(2), vjp.size(3), background_grams};
}

// Pixels per task, a whole number of blocks. By shape only. Every task of the forward owns Grams of its own, so a large
// batch gets fewer tasks: at most 64 MiB of partial Grams, but never fewer than 8 tasks where there are 8 blocks.
int64_t pixels_per_task(const StatisticsGeometry& geo, const StatisticsBlocks& b, int64_t grams) {
  const int64_t pixels = geo.height * geo.width;
  const int64_t block_count = (pixels + b.block_pixels - 1) / b.block_pixels;
  const int64_t gram_bytes = std::max<int64_t>(1, grams * b.padded_images * b.padded_images * 8);
  const int64_t tasks = std::min(block_count, std::clamp<int64_t>((int64_t{64} << 20) / gram_bytes, 8, 64));
  return (block_count + tasks - 1) / tasks * b.block_pixels;
}

// Upper tiles of `grams` [rows, rows] -> the full symmetric [N, N].
Tensor full_gram(const double* gram, int64_t rows, const Tensor& like, int64_t N) {
  Tensor out = torch::stable::new_empty(like, {N, N}, ScalarType::Double);
  double* to = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < N; ++i) {
    for (int64_t j = i; j < N; ++j) to[i * N + j] = to[j * N + i] = gram[i * rows + j];
  }
  return out;
}

struct Sums {
  std::vector<double> grams;
  std::vector<Moments> moments;
  int64_t rows;
};

template <class T>
Sums sums_of(const StatisticsGeometry& geo, const Tensor& vjp, const Tensor& x, const Tensor& mask) {
  const StatisticsKernels<T>& k = kernels<T>();
  const StatisticsBlocks b = k.blocks(geo);
  const int64_t N = geo.images, pixels = geo.height * geo.width, count = geo.background_grams ? 4 : 2;
  const int64_t gram_size = count * b.padded_images * b.padded_images;
  const int64_t step = pixels_per_task(geo, b, count), tasks = (pixels + step - 1) / step;
  const StatisticsInputs<T> in{view_of(vjp), view_of(x), static_cast<const T*>(mask.const_data_ptr())};
  std::vector<double> grams(tasks * gram_size, 0.0);
  std::vector<Moments> moments(tasks * 2 * N, Moments{0, 0, 0});
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(k.forward_scratch_bytes(geo));
    for (int64_t t = begin; t < end; ++t) {
      k.forward(geo, in, t * step, std::min(pixels, (t + 1) * step), grams.data() + t * gram_size,
                moments.data() + t * 2 * N, scratch.get());
    }
  });
  for (int64_t t = 1; t < tasks; ++t) {
    for (int64_t i = 0; i < gram_size; ++i) grams[i] += grams[t * gram_size + i];
    for (int64_t i = 0; i < 2 * N; ++i) merge(moments[i], moments[t * 2 * N + i]);
  }
  grams.resize(gram_size);
  moments.resize(2 * N);
  return {std::move(grams), std::move(moments), b.padded_images};
}

// The last argument is the precision of matrix units, which the CPU does not use: its products are IEEE always.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> region_statistics(
    Tensor vjp, Tensor x, Tensor mask, bool background_grams, std::string /*precision*/) {
  check_inputs(vjp, x, mask);
  const StatisticsGeometry geo = geometry_of(vjp, background_grams);
  const Sums sums = accumulation_type(vjp.scalar_type()) == ScalarType::Double ? sums_of<double>(geo, vjp, x, mask)
                                                                               : sums_of<float>(geo, vjp, x, mask);
  const int64_t N = geo.images, gram_size = sums.rows * sums.rows;
  const auto vector = [&](int64_t which, bool variance) {
    Tensor out = torch::stable::new_empty(vjp, {N}, ScalarType::Double);
    double* to = static_cast<double*>(out.mutable_data_ptr());
    for (int64_t n = 0; n < N; ++n) {
      const Moments& m = sums.moments[2 * n + which];
      to[n] = variance ? m.m2 / (m.count - 1) : m.mean;
    }
    return out;
  };
  const auto gram = [&](int64_t which) { return full_gram(sums.grams.data() + which * gram_size, sums.rows, vjp, N); };
  return {gram(0),
          gram(1),
          vector(0, true),
          vector(1, true),
          vector(0, false),
          vector(1, false),
          background_grams ? gram(2) : Tensor(),
          background_grams ? gram(3) : Tensor()};
}

// grad + gradᵀ in T, padded with zero rows to the register tile.
template <class T>
std::vector<T> symmetrised(const Tensor& grad, int64_t N, int64_t rows) {
  const double* g = static_cast<const double*>(grad.const_data_ptr());
  std::vector<T> out(rows * N, T(0));
  for (int64_t i = 0; i < N; ++i) {
    for (int64_t j = 0; j < N; ++j) out[i * N + j] = static_cast<T>(g[i * N + j] + g[j * N + i]);
  }
  return out;
}

// A tensor of the map's layout in another type: a half map's gradients may exceed a half's range.
Tensor empty_like(const Tensor& map, ScalarType type) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(map),          from(std::optional(type)), from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt),        from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
void run_backward(const StatisticsGeometry& geo, const std::vector<const Tensor*>& grad_grams,
                  const std::vector<VarianceGrad>& variance, const Tensor& vjp, const Tensor& x, const Tensor& mask,
                  const Tensor* grad_vjp, const Tensor* grad_x, const Tensor* grad_mask) {
  const StatisticsKernels<T>& k = kernels<T>();
  const StatisticsBlocks b = k.blocks(geo);
  std::vector<std::vector<T>> sym;
  for (const Tensor* grad : grad_grams) sym.push_back(symmetrised<T>(*grad, geo.images, b.padded_images));
  const MapView none{nullptr, Element::float32, 0, 0, 0, 0};
  const StatisticsInputs<T> in{view_of(vjp), view_of(x), static_cast<const T*>(mask.const_data_ptr())};
  StatisticsGrads<T> grads;
  grads.sym_vjp = sym[0].data();
  grads.sym_x = sym[1].data();
  grads.sym_background_vjp = geo.background_grams ? sym[2].data() : nullptr;
  grads.sym_background_x = geo.background_grams ? sym[3].data() : nullptr;
  grads.variance = variance.data();
  grads.grad_vjp = grad_vjp ? view_of(*grad_vjp) : none;
  grads.grad_x = grad_x ? view_of(*grad_x) : none;
  grads.grad_mask = grad_mask ? static_cast<T*>(grad_mask->mutable_data_ptr()) : nullptr;
  const int64_t pixels = geo.height * geo.width;
  const int64_t step = pixels_per_task(geo, b, 0), tasks = (pixels + step - 1) / step;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(k.backward_scratch_bytes(geo));
    for (int64_t t = begin; t < end; ++t) {
      k.backward(geo, in, grads, t * step, std::min(pixels, (t + 1) * step), scratch.get());
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> region_statistics_backward(Tensor grad_gram_vjp, Tensor grad_gram_x,
                                                              Tensor grad_background_variance, Tensor grad_vjp_variance,
                                                              std::optional<Tensor> grad_background_gram_vjp,
                                                              std::optional<Tensor> grad_background_gram_x, Tensor vjp,
                                                              Tensor x, Tensor mask, Tensor background_mean,
                                                              Tensor vjp_mean, bool need_vjp, bool need_x,
                                                              bool need_mask, std::string /*precision*/) {
  check_inputs(vjp, x, mask);
  SIB_CHECK(kOp, grad_background_gram_vjp.has_value() == grad_background_gram_x.has_value(),
            "the gradients of both background Grams must be given, or neither");
  const StatisticsGeometry geo = geometry_of(vjp, grad_background_gram_vjp.has_value());
  const int64_t N = geo.images;
  std::vector<const Tensor*> grams{&grad_gram_vjp, &grad_gram_x};
  if (geo.background_grams) grams.insert(grams.end(), {&*grad_background_gram_vjp, &*grad_background_gram_x});
  for (const Tensor* g : grams) check_plain(kOp, "grad_gram", *g, ScalarType::Double, N * N);
  for (const Tensor* v : {&grad_background_variance, &grad_vjp_variance, &background_mean, &vjp_mean}) {
    check_plain(kOp, "grad_variance or mean", *v, ScalarType::Double, N);
  }

  // Var = M2/(D-1), so its gradient with respect to an element is 2/(D-1)·(element - mean).
  const double scale = 2.0 / (static_cast<double>(geo.channels * geo.height * geo.width) - 1);
  const auto at = [](const Tensor& t, int64_t n) { return static_cast<const double*>(t.const_data_ptr())[n]; };
  std::vector<VarianceGrad> variance(N);
  for (int64_t n = 0; n < N; ++n) {
    variance[n] = {at(grad_background_variance, n) * scale, at(background_mean, n), at(grad_vjp_variance, n) * scale,
                   at(vjp_mean, n)};
  }

  const bool is_double = accumulation_type(vjp.scalar_type()) == ScalarType::Double;
  const ScalarType acc = is_double ? ScalarType::Double : ScalarType::Float;
  const auto grad_like = [&](const Tensor& map, bool need) {
    return need ? empty_like(map, acc) : Tensor();
  };
  Tensor grad_vjp = grad_like(vjp, need_vjp), grad_x = grad_like(x, need_x);
  Tensor grad_mask = need_mask ? torch::stable::new_empty(mask, {N, 1, geo.height, geo.width}) : Tensor();
  const auto run = is_double ? run_backward<double> : run_backward<float>;
  run(geo, grams, variance, vjp, x, mask, need_vjp ? &grad_vjp : nullptr, need_x ? &grad_x : nullptr,
      need_mask ? &grad_mask : nullptr);
  return {grad_vjp, grad_x, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) {
  m.impl("_region_statistics", TORCH_BOX(&region_statistics));
  m.impl("_region_statistics_backward", TORCH_BOX(&region_statistics_backward));
}

}  // namespace sib_fast::cpu
