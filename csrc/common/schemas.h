// Every op schema of the package. No kernels: those register themselves in cpu/ and cuda/.
//
// The ops are private: their gradients live in sib_fast/ops/<op>/__init__.py, which is the way in.
// N images, C channels, H×W pixels, L = entries of a rank window (common/rank_window.h). `acc` is float64 for float64
// maps and float32 for all others.
#pragma once

#include <torch/csrc/stable/library.h>

namespace sib_fast {

template <class Library>
void define_schemas(Library& m) {
  // vjp [N,C,H,W], rank_pixels int32 [N,4,L] or None -> mask acc [N,1,H,W], mean_map acc [N,H,W], levels acc [N,4],
  // rank_pixels
  m.def(
      "_foreground_mask(Tensor vjp, Tensor? rank_pixels, int window_size, float temperature, float slope, float[] "
      "quantiles, float eps) -> (Tensor mask, Tensor mean_map, Tensor levels, Tensor rank_pixels)");
  // grad_mask acc [N,1,H,W] -> the gradient of every channel of vjp, acc [N,1,H,W]
  m.def(
      "_foreground_mask_backward(Tensor grad_mask, Tensor mask, Tensor mean_map, Tensor levels, Tensor rank_pixels, "
      "int channels, int window_size, float temperature, float slope, float[] quantiles, float eps) -> Tensor");
  // vjp, x [N,C,H,W], mask acc [N,1,H,W] -> float64: Grams [N,N] (the background's undefined unless asked for),
  // variances and means [N]. precision: "ieee", "tf32x3" or "tf32"; float64 and the CPU are always "ieee".
  m.def(
      "_region_statistics(Tensor vjp, Tensor x, Tensor mask, bool background_grams, str precision) -> (Tensor "
      "gram_vjp, Tensor gram_x, Tensor background_variance, Tensor vjp_variance, Tensor background_mean, Tensor "
      "vjp_mean, Tensor background_gram_vjp, Tensor background_gram_x)");
  // -> acc grad_vjp, grad_x [N,C,H,W] in the layouts of vjp and x, grad_mask [N,1,H,W]; undefined where need_* is false
  m.def(
      "_region_statistics_backward(Tensor grad_gram_vjp, Tensor grad_gram_x, Tensor grad_background_variance, Tensor "
      "grad_vjp_variance, Tensor? grad_background_gram_vjp, Tensor? grad_background_gram_x, Tensor vjp, Tensor x, "
      "Tensor mask, Tensor background_mean, Tensor vjp_mean, bool need_vjp, bool need_x, bool need_mask, str "
      "precision) -> (Tensor grad_vjp, Tensor grad_x, Tensor grad_mask)");
  // base [] float32 or float64, Grams [N,N] and variances [N] float64 -> loss, foreground, background [] like base;
  // rows [4,N] (1/norm of R and of x, row means of K_R and of K_x), totals [4] (foreground, background, grand means)
  m.def(
      "_hsic_objective(Tensor base, Tensor gram_vjp, Tensor gram_x, Tensor background_variance, float lambda_fg, float "
      "lambda_bg, int objective) -> (Tensor loss, Tensor foreground, Tensor background, Tensor rows, Tensor totals)");
  // -> float64 gradients of the Grams [N,N] and of the variances [N]; undefined where need_* is false. An absent
  // cotangent is 0
  m.def(
      "_hsic_objective_backward(Tensor? grad_loss, Tensor? grad_foreground, Tensor? grad_background, Tensor gram_vjp, "
      "Tensor gram_x, Tensor rows, Tensor totals, float lambda_fg, float lambda_bg, int objective, bool need_vjp, bool "
      "need_x, bool need_variance) -> (Tensor grad_gram_vjp, Tensor grad_gram_x, Tensor grad_background_variance)");
  // x [N,C,*], contiguous or channels last; weight, bias acc [C] -> y as x; float64 [C] mean, biased variance,
  // 1/sqrt(variance + eps)
  m.def(
      "_batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor variance, "
      "Tensor invstd)");
  // grad_y, addend as x, in its layout too -> grad_x + addend as x ([0] unless need_x), acc grad_weight [C],
  // grad_bias [C]
  m.def(
      "_batch_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, Tensor? addend, bool "
      "need_x) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  // u, u_weight, u_bias: cotangents of those three -> gradients of grad_y and x, as x ([0] unless needed), and of
  // weight, acc [C]
  m.def(
      "_batch_norm_double_backward(Tensor u, Tensor? u_weight, Tensor? u_bias, Tensor grad_y, Tensor x, Tensor? "
      "weight, Tensor mean, Tensor invstd, bool need_grad_y, bool need_x) -> (Tensor to_grad_y, Tensor to_x, Tensor "
      "to_weight)");
  // The same with statistics that do not depend on x, acc [C]; an absent mean is 0. CPU only
  m.def(
      "_running_batch_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? mean, Tensor variance, float eps, "
      "bool need_x) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  // u, grad_y, saved of one shape and layout; kind: common/activation.h -> u·f', u·grad_y·∂f'/∂saved ([0] unless
  // needed)
  m.def(
      "_activation_double_backward(Tensor u, Tensor grad_y, Tensor saved, int kind, float a, float b, bool "
      "need_grad_y, bool need_saved) -> (Tensor to_grad_y, Tensor to_saved)");
  // x dense, in any order of its dimensions; y lies as x, or is x; kind, a, b: common/activation_bits.h -> y = f(x),
  // and uint8 [64·ceil(numel/512)]: a bit an element, in memory order
  m.def("_activation_bits(Tensor x, Tensor(a!) y, int kind, float a, float b) -> Tensor bits");
  // grad_y dense, in x's order -> grad_x, which lies as grad_y
  m.def("_activation_bits_backward(Tensor grad_y, Tensor bits, int kind, float slope) -> Tensor");
  // x contiguous, rows of `length` elements; row r has group r % groups' channels, `spatial` elements each; weight,
  // bias acc [groups·length/spatial] -> y as x; float64 [rows] mean, 1/sqrt(variance + eps)
  m.def(
      "_layer_norm(Tensor x, Tensor? weight, Tensor? bias, int length, int groups, int spatial, float eps) -> (Tensor "
      "y, Tensor mean, Tensor invstd)");
  // grad_y as x -> grad_x as x, acc grad_weight, grad_bias; [0] where need_* is false
  m.def(
      "_layer_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, int length, int "
      "groups, int spatial, bool need_x, bool need_weight, bool need_bias) -> (Tensor grad_x, Tensor grad_weight, "
      "Tensor grad_bias)");
  // u, u_weight, u_bias: cotangents of those three -> gradients of grad_y and x, as x, and of weight, acc
  m.def(
      "_layer_norm_double_backward(Tensor u, Tensor? u_weight, Tensor? u_bias, Tensor grad_y, Tensor x, Tensor? "
      "weight, Tensor mean, Tensor invstd, int length, int groups, int spatial, bool need_grad_y, bool need_x, bool "
      "need_weight) -> (Tensor to_grad_y, Tensor to_x, Tensor to_weight)");
  // u, grad_y, y of one shape, contiguous -> gradients of grad_y and y ([0] unless needed); rows along the last
  // dimension
  m.def(
      "_softmax_double_backward(Tensor u, Tensor grad_y, Tensor y, bool need_grad_y, bool need_y) -> (Tensor "
      "to_grad_y, Tensor to_y)");
  // x float32, any shape -> 2·x + 1: proves that the CUDA library loads, launches on the current stream and returns.
  m.def("_device_check(Tensor x) -> Tensor");
}

}  // namespace sib_fast
