// layer_norm and group_norm for CUDA tensors: checks, memory, which passes run, registration. The passes along rows and
// their traffic are in row_passes.cuh, sums over rows in layer_norm_columns.cuh, equations in layer_norm_formulas.cuh.
//
// Launches  layer norm: one, and two more for gradients of parameters; rows of more than 768 packs of 16 bytes three
//           in the place of one. Group norm: sums of every channel's pixels, merged to rows, writes; one more for
//           gradients of parameters, which needs no activation. Nothing is read back by the host and nothing is copied
//           to the device: capturable in a CUDA graph.
// Memory    columns: at most 512 sums in double a channel; group norm: those of every channel of every image.
// Twins     cpu/layer_norm_cpu.cpp; truth: ops/layer_norm/reference.py.

#include <optional>
#include <tuple>

#include "cuda/layer_norm_columns.cuh"

namespace sib_fast::cuda::layer_norm {
namespace {

constexpr const char* kOp = "layer_norm";

struct Shape {
  int64_t length, groups, spatial, rows, channels;
};

Shape shape_of(const Tensor& x, int64_t length, int64_t groups, int64_t spatial) {
  SIB_CHECK(kOp, is_supported(x.scalar_type()), "x must be float64, float32, bfloat16 or float16");
  SIB_CHECK(kOp, x.is_contiguous(), "x must be contiguous");
  SIB_CHECK(kOp, length > 0 && groups > 0 && spatial > 0 && length % spatial == 0 && x.numel() % (length * groups) == 0,
            "x must consist of rows of ", length, " elements");
  return {length, groups, spatial, x.numel() / length, groups * (length / spatial)};
}

template <class E>
const E* like_x(const char* name, const Tensor& t, const Tensor& x) {
  SIB_CHECK(kOp, t.numel() == x.numel() && t.is_contiguous(), name, " must have the shape of x and be contiguous");
  SIB_CHECK(kOp, t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  return static_cast<const E*>(t.const_data_ptr());
}

// One number a channel, or null where it is absent.
template <class E>
const Compute<E>* per_channel(const char* name, const std::optional<Tensor>& t, const Tensor& x, const Shape& shape) {
  if (!t) return nullptr;
  check_plain(kOp, name, *t, accumulation_type(x.scalar_type()), shape.channels);
  return static_cast<const Compute<E>*>(t->const_data_ptr());
}
const double* statistic(const char* name, const Tensor& t, const Shape& shape) {
  check_plain(kOp, name, t, ScalarType::Double, shape.rows);
  return static_cast<const double*>(t.const_data_ptr());
}

template <class T>
T* out(const Tensor& t) {
  return t.numel() == 0 ? nullptr : static_cast<T*>(t.mutable_data_ptr());
}
Tensor like(const Tensor& x, bool need) {
  return need ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
}
Tensor of_channels(const Tensor& x, const Shape& shape, bool need) {
  return torch::stable::new_empty(x, {need ? shape.channels : 0}, accumulation_type(x.scalar_type()));
}
Tensor new_rows(const Tensor& x, int64_t count) { return torch::stable::new_empty(x, {count}, ScalarType::Double); }

// Of an Op whose sums over columns someone wants: the arguments that the rows' pass has already.
template <class Op>
ColumnArguments<Op> columns_of(const rows::Arguments<Op>& a, const Shape& shape) {
  ColumnArguments<Op> c{};
  for (int t = 0; t < Op::kInputs; ++t) c.in[t] = a.in[t];
  c.of = a.of;
  c.at.images = shape.rows / shape.groups;
  c.at.groups = shape.groups;
  c.at.columns = shape.channels / shape.groups;
  c.at.channels = shape.channels;
  c.at.pieces = a.at.pieces;
  c.partial = a.partial;
  c.unit_sums = a.at.unit_sums;
  return c;
}

// Cuts, and runs: along rows if `results`; group norm's runs are summed in any case. Then `columns`, unless null, gets
// what is left to say of the sums over columns.
template <class Op>
void run(const Tensor& x, const Shape& shape, rows::Arguments<Op>& a, int sums_of_run, int sums, bool results,
         typename Op::T* const* columns) {
  const Stream stream = current_stream(x);
  const bool runs = shape.spatial > 1;
  rows::cut(a, shape.rows, shape.length, shape.groups, runs ? shape.spatial : shape.length, runs ? sums_of_run : sums,
            sums);
  Tensor partial = new_rows(x, 0);
  if (runs) {
    rows::run_units<Op, true>(kOp, stream, x, a, partial, results);
  } else if (results && rows::held(a.at)) {
    rows::run_held(kOp, stream, a);
  } else if (results) {
    rows::run_units<Op, false>(kOp, stream, x, a, partial, true);
  }
  if constexpr (!std::is_same<Op, Forward<typename Op::Element>>::value) {
    if (columns == nullptr) return;
    ColumnArguments<Op> c = columns_of(a, shape);
    for (int s = 0; s < Op::kColumnSums; ++s) c.out[s] = columns[s];
    if (runs) {
      run_channels(kOp, stream, c);
    } else {
      run_columns(kOp, stream, x, c);
    }
  }
}

// ---- the ops --------------------------------------------------------------------------------------------------------

template <class E>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, int64_t length, int64_t groups,
                                           int64_t spatial, double eps) {
  const Shape shape = shape_of(x, length, groups, spatial);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = new_rows(x, shape.rows), invstd = new_rows(x, shape.rows);
  rows::Arguments<Forward<E>> a{};
  a.in[0] = static_cast<const E*>(x.const_data_ptr());
  a.out[0] = out<E>(y);
  a.parameters[0] = per_channel<E>("weight", weight, x, shape);
  a.parameters[1] = per_channel<E>("bias", bias, x, shape);
  a.of = {out<double>(mean), out<double>(invstd), eps, 1.0 / static_cast<double>(length)};
  run(x, shape, a, 2, 2, true, nullptr);
  return {y, mean, invstd};
}

template <class E>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const std::optional<Tensor>& weight,
                                            const Tensor& mean, const Tensor& invstd, int64_t length, int64_t groups,
                                            int64_t spatial, bool need_x, bool need_weight, bool need_bias) {
  using T = Compute<E>;
  const Shape shape = shape_of(x, length, groups, spatial);
  rows::Arguments<Backward<E>> a{};
  a.in[0] = like_x<E>("grad_y", grad_y, x);
  a.in[1] = static_cast<const E*>(x.const_data_ptr());
  a.parameters[0] = per_channel<E>("weight", weight, x, shape);
  a.of = {statistic("mean", mean, shape), statistic("invstd", invstd, shape), 1.0 / static_cast<double>(length)};
  const DeviceGuard guard(x.get_device_index());
  Tensor grad_x = like(x, need_x);
  Tensor grad_weight = of_channels(x, shape, need_weight), grad_bias = of_channels(x, shape, need_bias);
  a.out[0] = out<E>(grad_x);
  T* const columns[2] = {out<T>(grad_weight), out<T>(grad_bias)};
  if (need_x || need_weight || need_bias) run(x, shape, a, 2, 2, need_x, need_weight || need_bias ? columns : nullptr);
  return {grad_x, grad_weight, grad_bias};
}

template <class E>
std::tuple<Tensor, Tensor, Tensor> double_backward(const Tensor& u, const std::optional<Tensor>& u_weight,
                                                   const std::optional<Tensor>& u_bias, const Tensor& grad_y,
                                                   const Tensor& x, const std::optional<Tensor>& weight,
                                                   const Tensor& mean, const Tensor& invstd, int64_t length,
                                                   int64_t groups, int64_t spatial, bool need_grad_y, bool need_x,
                                                   bool need_weight) {
  using Op = Second<E>;
  using T = Compute<E>;
  const Shape shape = shape_of(x, length, groups, spatial);
  rows::Arguments<Op> a{};
  a.in[0] = like_x<E>("u", u, x);
  a.in[1] = like_x<E>("grad_y", grad_y, x);
  a.in[2] = static_cast<const E*>(x.const_data_ptr());
  a.parameters[0] = per_channel<E>("weight", weight, x, shape);
  a.parameters[1] = per_channel<E>("u_weight", u_weight, x, shape);
  a.parameters[2] = per_channel<E>("u_bias", u_bias, x, shape);
  const DeviceGuard guard(x.get_device_index());
  Tensor to_grad_y = like(x, need_grad_y), to_x = like(x, need_x), to_weight = of_channels(x, shape, need_weight);
  Tensor means = new_rows(x, need_weight ? 2 * shape.rows : 0);
  a.out[0] = out<E>(to_grad_y);
  a.out[1] = out<E>(to_x);
  a.of = {statistic("mean", mean, shape), statistic("invstd", invstd, shape), out<double>(means), shape.rows,
          1.0 / static_cast<double>(length)};
  T* const columns[1] = {out<T>(to_weight)};
  if (need_grad_y || need_x || need_weight) {
    run(x, shape, a, Op::kPlainSums, u_weight ? Op::kSums : Op::kPlainSums, true, need_weight ? columns : nullptr);
  }
  return {to_grad_y, to_x, to_weight};
}

// Calls `function<E>` for the element type of x.
#define SIB_FAST_BY_ELEMENT(function, x, ...)                    \
  switch ((x).scalar_type()) {                                   \
    case ScalarType::Double:                                     \
      return function<double>(__VA_ARGS__);                      \
    case ScalarType::BFloat16:                                   \
      return function<torch::headeronly::BFloat16>(__VA_ARGS__); \
    case ScalarType::Half:                                       \
      return function<torch::headeronly::Half>(__VA_ARGS__);     \
    default:                                                     \
      return function<float>(__VA_ARGS__);                       \
  }

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                              int64_t length, int64_t groups, int64_t spatial, double eps){
    SIB_FAST_BY_ELEMENT(forward, x, x, weight, bias, length, groups, spatial, eps)}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad_y, Tensor x, std::optional<Tensor> weight,
                                                       Tensor mean, Tensor invstd, int64_t length, int64_t groups,
                                                       int64_t spatial, bool need_x, bool need_weight, bool need_bias){
    SIB_FAST_BY_ELEMENT(backward, x, grad_y, x, weight, mean, invstd, length, groups, spatial, need_x, need_weight,
                        need_bias)}

std::tuple<Tensor, Tensor, Tensor> layer_norm_double_backward(Tensor u, std::optional<Tensor> u_weight,
                                                              std::optional<Tensor> u_bias, Tensor grad_y, Tensor x,
                                                              std::optional<Tensor> weight, Tensor mean, Tensor invstd,
                                                              int64_t length, int64_t groups, int64_t spatial,
                                                              bool need_grad_y, bool need_x, bool need_weight) {
  SIB_FAST_BY_ELEMENT(double_backward, x, u, u_weight, u_bias, grad_y, x, weight, mean, invstd, length, groups, spatial,
                      need_grad_y, need_x, need_weight)
}
#undef SIB_FAST_BY_ELEMENT

}  // namespace
}  // namespace sib_fast::cuda::layer_norm

namespace sib_fast::cuda {

SIB_CUDA_LIBRARY(m) {
  m.impl("_layer_norm", TORCH_BOX(&layer_norm::layer_norm));
  m.impl("_layer_norm_backward", TORCH_BOX(&layer_norm::layer_norm_backward));
  m.impl("_layer_norm_double_backward", TORCH_BOX(&layer_norm::layer_norm_double_backward));
}

}  // namespace sib_fast::cuda
