// The head's ops on every device: arguments checked, results allocated, the device's passes called, registration.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/arguments.h"
#include "common/objective.h"
#include "common/rank_window.h"

namespace sib_fast {

// Calls function with a number of the type that maps of `type` are accumulated in.
template <class Function>
void by_accumulation(ScalarType type, Function function) {
  if (accumulation_type(type) == ScalarType::Double)
    function(double{});
  else
    function(float{});
}

// ---- foreground_mask ------------------------------------------------------------------------------------------------

struct MaskOptions {
  int64_t height, width, window_size;
  double temperature, slope, eps;
  const std::vector<double>& quantiles;
  int64_t length;  // entries of a rank window
  int64_t pixels() const { return height * width; }
};
struct MaskOutputs {
  Tensor mask, mean_map, levels, rank_pixels;
};

template <class Kernels>
struct MaskOps {
  static constexpr const char* kOp = "foreground_mask";

  static MaskOptions options(const Tensor& map, ScalarType type, int64_t window_size, double temperature, double slope,
                             const std::vector<double>& quantiles, double eps) {
    SIB_CHECK(kOp, window_size >= 1 && window_size % 2 == 1, "window_size must be odd, got ", window_size);
    SIB_CHECK(kOp, quantiles.size() == kLevels, "quantiles must hold 4 levels, got ", quantiles.size());
    for (double q : quantiles) SIB_CHECK(kOp, q >= 0 && q <= 1, "quantiles must lie in [0, 1], got ", q);
    const int64_t H = map.size(2), W = map.size(3);
    const int64_t length = 2 * rank_window_half(temperature, H * W, type == ScalarType::Double) + 1;
    const MaskOptions o{H, W, window_size, temperature, slope, eps, quantiles, length};
    Kernels::check(o);
    return o;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor vjp, std::optional<Tensor> rank_pixels,
                                                            int64_t window_size, double temperature, double slope,
                                                            std::vector<double> quantiles, double eps) {
    check_map(kOp, "vjp", vjp);
    const ScalarType acc = accumulation_type(vjp.scalar_type());
    const MaskOptions o = options(vjp, acc, window_size, temperature, slope, quantiles, eps);
    const int64_t N = vjp.size(0);
    if (rank_pixels) check_plain(kOp, "rank_pixels", *rank_pixels, ScalarType::Int, N * kLevels * o.length);
    const typename Kernels::Guard guard(vjp);
    const MaskOutputs outputs{torch::stable::new_empty(vjp, {N, 1, o.height, o.width}, acc),
                              torch::stable::new_empty(vjp, {N, o.height, o.width}, acc),
                              torch::stable::new_empty(vjp, {N, kLevels}, acc),
                              torch::stable::new_empty(vjp, {N, kLevels, o.length}, ScalarType::Int)};
    const int32_t* given = rank_pixels ? in<int32_t>(*rank_pixels) : nullptr;
    by_accumulation(acc, [&](auto t) { Kernels::template forward<decltype(t)>(o, vjp, given, outputs); });
    return {outputs.mask, outputs.mean_map, outputs.levels, outputs.rank_pixels};
  }

  static Tensor backward(Tensor grad_mask, Tensor mask, Tensor mean_map, Tensor levels, Tensor rank_pixels,
                         int64_t channels, int64_t window_size, double temperature, double slope,
                         std::vector<double> quantiles, double eps) {
    SIB_CHECK(kOp, mask.dim() == 4, "mask must have shape [N, 1, H, W]");
    const ScalarType acc = mask.scalar_type();
    SIB_CHECK(kOp, accumulation_type(acc) == acc, "mask must be float32 or float64");
    const MaskOptions o = options(mask, acc, window_size, temperature, slope, quantiles, eps);
    const int64_t N = mask.size(0);
    check_plain(kOp, "grad_mask", grad_mask, acc, N * o.pixels());
    check_plain(kOp, "mask", mask, acc, N * o.pixels());
    check_plain(kOp, "mean_map", mean_map, acc, N * o.pixels());
    check_plain(kOp, "levels", levels, acc, N * kLevels);
    check_plain(kOp, "rank_pixels", rank_pixels, ScalarType::Int, N * kLevels * o.length);
    const typename Kernels::Guard guard(mask);
    const Tensor grad_plane = torch::stable::new_empty(mask, {N, 1, o.height, o.width});
    const MaskOutputs of{mask, mean_map, levels, rank_pixels};
    by_accumulation(acc,
                    [&](auto t) { Kernels::template backward<decltype(t)>(o, channels, grad_mask, of, grad_plane); });
    return grad_plane;
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("_foreground_mask", TORCH_BOX(&MaskOps::forward));
    m.impl("_foreground_mask_backward", TORCH_BOX(&MaskOps::backward));
  }
};

// ---- region_statistics ----------------------------------------------------------------------------------------------

// Of products of float32 and half maps on a GPU; the CPU and float64 are IEEE always.
enum class Precision { ieee, tf32x3, tf32 };

struct StatisticsInputs {
  const Tensor &vjp, &x, &mask;
  Precision precision;
};
struct Statistics {
  std::array<Tensor, 4> grams;  // vjp, x, background vjp, background x; the last two absent without background_grams
  std::array<Tensor, 2> variance, mean;  // of v, of R
  bool background_grams;
};
struct StatisticsGradients {
  std::array<const Tensor*, 4> grad_gram;  // as Statistics has them; the last two null without cotangents
  std::array<const Tensor*, 2> grad_variance, mean;
  const Tensor *grad_vjp, *grad_x, *grad_mask;  // null where not needed
  bool background_grams() const { return grad_gram[2] != nullptr; }
};

template <class Kernels>
struct StatisticsOps {
  static constexpr const char* kOp = "region_statistics";

  static Precision check(const Tensor& vjp, const Tensor& x, const Tensor& mask, const std::string& precision) {
    check_map(kOp, "vjp", vjp);
    check_map(kOp, "x", x);
    for (int64_t d = 0; d < 4; ++d) SIB_CHECK(kOp, vjp.size(d) == x.size(d), "x must have the shape of vjp");
    const ScalarType acc = accumulation_type(vjp.scalar_type());
    SIB_CHECK(kOp, acc == accumulation_type(x.scalar_type()), "vjp and x must both be float64 or neither");
    check_plain(kOp, "mask", mask, acc, vjp.size(0) * vjp.size(2) * vjp.size(3));
    SIB_CHECK(kOp, precision == "ieee" || precision == "tf32x3" || precision == "tf32",
              "precision must be ieee, tf32x3 or tf32, got ", precision);
    return precision == "ieee" ? Precision::ieee : precision == "tf32" ? Precision::tf32 : Precision::tf32x3;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor vjp, Tensor x,
                                                                                            Tensor mask,
                                                                                            bool background_grams,
                                                                                            std::string precision) {
    const StatisticsInputs inputs{vjp, x, mask, check(vjp, x, mask, precision)};
    const typename Kernels::Guard guard(vjp);
    const int64_t N = vjp.size(0);
    const auto gram = [&](bool wanted) { return wanted ? new_double(vjp, {N, N}) : Tensor(); };
    const Statistics outputs{{gram(true), gram(true), gram(background_grams), gram(background_grams)},
                             {new_double(vjp, {N}), new_double(vjp, {N})},
                             {new_double(vjp, {N}), new_double(vjp, {N})},
                             background_grams};
    by_accumulation(vjp.scalar_type(), [&](auto t) { Kernels::template forward<decltype(t)>(inputs, outputs); });
    return {outputs.grams[0], outputs.grams[1], outputs.variance[0], outputs.variance[1],
            outputs.mean[0],  outputs.mean[1],  outputs.grams[2],    outputs.grams[3]};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_gram_vjp, Tensor grad_gram_x,
                                                     Tensor grad_background_variance, Tensor grad_vjp_variance,
                                                     std::optional<Tensor> grad_background_gram_vjp,
                                                     std::optional<Tensor> grad_background_gram_x, Tensor vjp, Tensor x,
                                                     Tensor mask, Tensor background_mean, Tensor vjp_mean,
                                                     bool need_vjp, bool need_x, bool need_mask,
                                                     std::string precision) {
    const StatisticsInputs inputs{vjp, x, mask, check(vjp, x, mask, precision)};
    SIB_CHECK(kOp, grad_background_gram_vjp.has_value() == grad_background_gram_x.has_value(),
              "the gradients of both background Grams must be given, or neither");
    const int64_t N = vjp.size(0);
    StatisticsGradients grads{{&grad_gram_vjp, &grad_gram_x, nullptr, nullptr},
                              {&grad_background_variance, &grad_vjp_variance},
                              {&background_mean, &vjp_mean},
                              nullptr,
                              nullptr,
                              nullptr};
    if (grad_background_gram_vjp) {
      grads.grad_gram[2] = &*grad_background_gram_vjp;
      grads.grad_gram[3] = &*grad_background_gram_x;
    }
    for (const Tensor* g : grads.grad_gram) {
      if (g != nullptr) check_plain(kOp, "grad_gram", *g, ScalarType::Double, N * N);
    }
    for (const Tensor* v : {&grad_background_variance, &grad_vjp_variance, &background_mean, &vjp_mean}) {
      check_plain(kOp, "grad_variance or mean", *v, ScalarType::Double, N);
    }
    const typename Kernels::Guard guard(vjp);
    const ScalarType acc = accumulation_type(vjp.scalar_type());
    const auto grad_like = [&](const Tensor& map, bool need) { return need ? empty_like(map, acc) : Tensor(); };
    const Tensor grad_vjp = grad_like(vjp, need_vjp), grad_x = grad_like(x, need_x);
    const Tensor grad_mask = need_mask ? torch::stable::new_empty(mask, {N, 1, vjp.size(2), vjp.size(3)}) : Tensor();
    grads.grad_vjp = need_vjp ? &grad_vjp : nullptr;
    grads.grad_x = need_x ? &grad_x : nullptr;
    grads.grad_mask = need_mask ? &grad_mask : nullptr;
    by_accumulation(acc, [&](auto t) { Kernels::template backward<decltype(t)>(inputs, grads); });
    return {grad_vjp, grad_x, grad_mask};
  }

  // A tensor of the map's layout in another type: a half map's gradients may exceed a half's range.
  static Tensor empty_like(const Tensor& map, ScalarType type) {
    using torch::stable::detail::from;
    std::array<StableIValue, 6> stack{from(map),          from(std::optional(type)), from(std::nullopt),
                                      from(std::nullopt), from(std::nullopt),        from(std::nullopt)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("_region_statistics", TORCH_BOX(&StatisticsOps::forward));
    m.impl("_region_statistics_backward", TORCH_BOX(&StatisticsOps::backward));
  }
};

// ---- hsic_objective -------------------------------------------------------------------------------------------------

struct HsicInputs {
  const Tensor &gram_vjp, &gram_x;
  Objective objective;
};
struct HsicOutputs {
  Tensor loss, foreground, background, rows, totals;
};
struct HsicGradients {
  Scalar to_loss, to_foreground, to_background;
  double *grad_vjp, *grad_x, *grad_variance;  // null where not needed
};

template <class Kernels>
struct HsicOps {
  static constexpr const char* kOp = "hsic_objective";

  static int64_t check_grams(const Tensor& gram_vjp, const Tensor& gram_x) {
    SIB_CHECK(kOp, gram_vjp.dim() == 2, "gram_vjp must have shape [N, N]");
    const int64_t N = gram_vjp.size(0);
    check_plain(kOp, "gram_vjp", gram_vjp, ScalarType::Double, N * N);
    check_plain(kOp, "gram_x", gram_x, ScalarType::Double, N * N);
    return N;
  }
  static Scalar scalar(const char* name, const std::optional<Tensor>& t) {
    if (!t) return {nullptr, true};
    const bool is_double = t->scalar_type() == ScalarType::Double;
    check_plain(kOp, name, *t, is_double ? ScalarType::Double : ScalarType::Float, 1);
    return {t->const_data_ptr(), is_double};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor base, Tensor gram_vjp, Tensor gram_x,
                                                                    Tensor background_variance, double lambda_fg,
                                                                    double lambda_bg, int64_t kind) {
    const int64_t N = check_grams(gram_vjp, gram_x);
    check_plain(kOp, "background_variance", background_variance, ScalarType::Double, N);
    const Scalar from = scalar("base", base);
    const typename Kernels::Guard guard(gram_vjp);
    const auto like_base = [&] { return torch::stable::new_empty(base, {}); };
    const HsicOutputs outputs{like_base(), like_base(), like_base(), torch::stable::new_empty(gram_vjp, {4, N}),
                              torch::stable::new_empty(gram_vjp, {4})};
    const HsicInputs inputs{gram_vjp, gram_x, {lambda_fg, lambda_bg, static_cast<int>(kind)}};
    Kernels::forward(inputs, N, from, in<double>(background_variance), outputs);
    return {outputs.loss, outputs.foreground, outputs.background, outputs.rows, outputs.totals};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(std::optional<Tensor> grad_loss,
                                                     std::optional<Tensor> grad_foreground,
                                                     std::optional<Tensor> grad_background, Tensor gram_vjp,
                                                     Tensor gram_x, Tensor rows, Tensor totals, double lambda_fg,
                                                     double lambda_bg, int64_t kind, bool need_vjp, bool need_x,
                                                     bool need_variance) {
    const int64_t N = check_grams(gram_vjp, gram_x);
    check_plain(kOp, "rows", rows, ScalarType::Double, 4 * N);
    check_plain(kOp, "totals", totals, ScalarType::Double, 4);
    const typename Kernels::Guard guard(gram_vjp);
    const auto matrix = [&](bool need) { return need ? new_double(gram_vjp, {N, N}) : Tensor(); };
    const Tensor grad_vjp = matrix(need_vjp), grad_x = matrix(need_x);
    const Tensor grad_variance = need_variance ? new_double(gram_vjp, {N}) : Tensor();
    const HsicGradients grads{scalar("grad_loss", grad_loss),
                              scalar("grad_foreground", grad_foreground),
                              scalar("grad_background", grad_background),
                              out<double>(grad_vjp),
                              out<double>(grad_x),
                              out<double>(grad_variance)};
    const HsicInputs inputs{gram_vjp, gram_x, {lambda_fg, lambda_bg, static_cast<int>(kind)}};
    Kernels::backward(inputs, N, in<double>(rows), in<double>(totals), grads);
    return {grad_vjp, grad_x, grad_variance};
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("_hsic_objective", TORCH_BOX(&HsicOps::forward));
    m.impl("_hsic_objective_backward", TORCH_BOX(&HsicOps::backward));
  }
};

}  // namespace sib_fast
