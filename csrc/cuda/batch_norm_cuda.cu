// batch_norm for CUDA tensors (SPEC 10): checks, cuts, memory, launches and registration. The kernels and their traffic
// are in batch_norm_passes.cuh, the equations in batch_norm_formulas.cuh.
//
// Launches  sums, merge, writes; one where a channel is one part. Nothing is read back by the host and nothing is
// copied
//           to the device: capturable in a CUDA graph.
// Memory    per-channel sums in double for each part, at most 512 of them, and coefficients.
// Twins     cpu/batch_norm_cpu.cpp; truth: ops/batch_norm/reference.py.

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/layout.h"
#include "cuda/batch_norm_passes.cuh"

namespace sib_fast::cuda::batch_norm {
namespace {

constexpr const char* kOp = "batch_norm";

struct Shape {
  bool channels_last;
  int64_t images, channels, spatial;
  int64_t count() const { return images * spatial; }
};

Shape shape_of(const Tensor& x) {
  SIB_CHECK(kOp, x.dim() >= 2 && x.numel() > 0, "x must have shape [N, C, *] and elements");
  SIB_CHECK(kOp, is_supported(x.scalar_type()), "x must be float64, float32, bfloat16 or float16");
  const int64_t channels = x.size(1), count = x.numel() / channels;
  const bool first = lies(x, false);
  SIB_CHECK(kOp, first || lies(x, true), "x must be contiguous or channels last");
  if (channels == 1) return {false, 1, 1, count};
  // A channel of one-element runs is read row by row.
  if (!first || count == x.size(0)) return {true, count, channels, 1};
  return {false, x.size(0), channels, count / x.size(0)};
}

void check_like(const char* name, const Tensor& t, const Tensor& x, const Shape& shape) {
  SIB_CHECK(kOp, t.dim() == x.dim() && t.numel() == x.numel(), name, " must have the shape of x");
  SIB_CHECK(kOp, t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  SIB_CHECK(kOp, lies(t, shape.channels_last), name, " must have the layout of x");
}

// One number a channel of `type`, or null where it is absent.
template <class T>
const T* per_channel(const char* name, const std::optional<Tensor>& t, ScalarType type, int64_t channels) {
  if (!t) return nullptr;
  check_plain(kOp, name, *t, type, channels);
  return static_cast<const T*>(t->const_data_ptr());
}
const double* statistic(const char* name, const Tensor& t, int64_t channels) {
  return per_channel<double>(name, t, ScalarType::Double, channels);
}

template <class E>
const E* in(const Tensor& t) {
  return static_cast<const E*>(t.const_data_ptr());
}
template <class E>
E* out(const Tensor& t) {
  return t.numel() == 0 ? nullptr : static_cast<E*>(t.mutable_data_ptr());
}

// ---- cuts -----------------------------------------------------------------------------------------------------------

// Cuts aim at this many blocks: 16 for each of the 132 multiprocessors of an H200, in parts of at least kPartElements
// elements of a channel, and at most kMostParts to merge. Constants, so that every cut, and with it every bit, depends
// on the shape alone. What the best are, no device has said yet.
constexpr int64_t kBlocksWanted = 16 * 132, kPartElements = 4096, kMostParts = 512;
// With this many channels, or with so few elements in each, a block takes a whole channel: one launch, no merge.
constexpr int64_t kManyChannels = 512, kFewElements = 8192;

int bits_of(int64_t wanted) {
  int bits = 0;
  while (bits < 5 && (int64_t{1} << bits) < wanted) ++bits;
  return bits;
}

template <class E>
Geometry cut_first(const Shape& shape, int64_t misaligned) {
  constexpr int64_t V = 16 / sizeof(E);
  Geometry at{};
  at.images = shape.images;
  at.channels = shape.channels;
  at.spatial = shape.spatial;
  at.misaligned = static_cast<int>(misaligned);
  const bool on_boundaries = misaligned == 0 && shape.spatial % V == 0;
  at.packs = on_boundaries ? shape.spatial / V : (shape.spatial + 2 * V - 2) / V;
  at.width_bits = bits_of(at.packs);
  at.image_step = shape.images;
  at.pack_step = at.packs;
  at.parts = at.spatial_parts = 1;
  if (shape.channels >= kManyChannels || shape.count() <= kFewElements) return at;
  const int64_t most = std::min(kMostParts, shape.count() / kPartElements);
  const int64_t wanted = std::clamp<int64_t>(divide_up(kBlocksWanted, shape.channels), 1, most);
  at.image_step = divide_up(shape.images, wanted);
  const int64_t image_parts = divide_up(shape.images, at.image_step);
  at.pack_step = divide_up(at.packs, std::max<int64_t>(1, wanted / image_parts));
  at.spatial_parts = static_cast<int>(divide_up(at.packs, at.pack_step));
  at.parts = static_cast<int>(image_parts) * at.spatial_parts;
  return at;
}

template <class Op>
Geometry cut_last(const Shape& shape) {
  Geometry at{};
  at.images = shape.images;
  at.channels = shape.channels;
  at.spatial = 1;
  at.width_bits = bits_of(divide_up(shape.channels, Columns<Op>::kColumns));
  at.image_step = shape.images;
  at.parts = at.spatial_parts = 1;
  const int64_t row_step = kThreads >> at.width_bits, least = 4 * Columns<Op>::kRows * row_step;
  if (shape.images <= 2 * least) return at;
  const int64_t tiles = divide_up(shape.channels, Columns<Op>::kColumns << at.width_bits);
  const int64_t most = std::min(kMostParts, shape.images / least);
  at.image_step = divide_up(shape.images, std::clamp<int64_t>(divide_up(kBlocksWanted, tiles), 1, most));
  at.parts = static_cast<int>(divide_up(shape.images, at.image_step));
  return at;
}

// ---- launches -------------------------------------------------------------------------------------------------------

// Fills in what the cut decides, and runs: sums, coefficients, writes.
template <class Op>
void run(const Shape& shape, const Tensor& x, Arguments<Op> a) {
  using E = typename Op::Element;
  constexpr int64_t kColumns = Columns<Op>::kColumns, kPack = 16 / sizeof(E);
  const int64_t pack = shape.channels_last ? kColumns : kPack;
  const int64_t misaligned = packs::misalignment(a.in[Op::kInputs - 1], pack);
  a.at = shape.channels_last ? cut_last<Op>(shape) : cut_first<E>(shape, misaligned);
  const bool rows_on_boundaries = !shape.channels_last || (misaligned == 0 && shape.channels % kColumns == 0);
  const auto note = [&](const E* data, int tensor) {
    if (rows_on_boundaries && packs::misalignment(data, pack) == misaligned) a.at.packed |= 1u << tensor;
  };
  for (int t = 0; t < Op::kInputs; ++t) note(a.in[t], t);
  for (int o = 0; o < Op::kOutputs; ++o) note(a.out[o], Op::kInputs + o);
  a.of.count = static_cast<double>(shape.count());

  const Stream stream = current_stream(x);
  const int64_t tiles = shape.channels_last ? divide_up(shape.channels, kColumns << a.at.width_bits) : shape.channels;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(a.at.parts)), block(kThreads);
  const auto pass = [&](bool sums, bool writes) {
    a.sums = sums;
    a.writes = writes;
    if (shape.channels_last) {
      launch(kOp, channels_last_kernel<Op>, grid, block, sums ? Columns<Op>::kShared : 0, stream, a);
    } else {
      constexpr int64_t kShared = Op::kSums * kWarps * static_cast<int64_t>(sizeof(double));
      launch(kOp, channels_first_kernel<Op>, grid, block, kShared, stream, a);
    }
  };
  if (a.at.parts == 1) {
    pass(true, true);
    return;
  }
  Tensor partial = torch::stable::new_empty(x, {shape.channels * Op::kSums * int64_t{a.at.parts}}, ScalarType::Double);
  Tensor coefficients =
      torch::stable::new_empty(x, {Op::kCoefficients * shape.channels}, accumulation_type(x.scalar_type()));
  a.partial = out<double>(partial);
  a.coefficients = out<typename Op::T>(coefficients);
  pass(true, false);
  launch(kOp, merge_kernel<Op>, dim3(static_cast<unsigned>(divide_up(shape.channels, kWarps))), block, 0, stream, a);
  bool any = false;
  for (const E* data : a.out) any = any || data != nullptr;
  if (any) pass(false, true);
}

Tensor like(const Tensor& x, bool need) {
  return need ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
}
Tensor new_channels(const Tensor& x, int64_t channels, ScalarType type) {
  return torch::stable::new_empty(x, {channels}, type);
}

// ---- the ops --------------------------------------------------------------------------------------------------------

template <class E>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, double eps) {
  using T = Compute<E>;
  const Shape shape = shape_of(x);
  const ScalarType type = accumulation_type(x.scalar_type());
  const DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = new_channels(x, shape.channels, ScalarType::Double);
  Tensor variance = new_channels(x, shape.channels, ScalarType::Double);
  Tensor invstd = new_channels(x, shape.channels, ScalarType::Double);
  Arguments<Forward<E>> a{};
  a.in[0] = in<E>(x);
  a.out[0] = out<E>(y);
  a.of.weight = per_channel<T>("weight", weight, type, shape.channels);
  a.of.bias = per_channel<T>("bias", bias, type, shape.channels);
  a.of.mean = out<double>(mean);
  a.of.variance = out<double>(variance);
  a.of.invstd = out<double>(invstd);
  a.of.eps = eps;
  run(shape, x, a);
  return {y, mean, variance, invstd};
}

template <class E, bool added>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const std::optional<Tensor>& weight,
                                            const Tensor& mean, const Tensor& invstd,
                                            const std::optional<Tensor>& addend, bool need_x) {
  using T = Compute<E>;
  const Shape shape = shape_of(x);
  const ScalarType type = accumulation_type(x.scalar_type());
  check_like("grad_y", grad_y, x, shape);
  if (added) check_like("addend", *addend, x, shape);
  const DeviceGuard guard(x.get_device_index());
  Tensor grad_x = like(x, need_x);
  Tensor grad_weight = new_channels(x, shape.channels, type), grad_bias = new_channels(x, shape.channels, type);
  Arguments<Backward<E, added>> a{};
  if (added) a.in[0] = in<E>(*addend);
  a.in[added] = in<E>(grad_y);
  a.in[added + 1] = in<E>(x);
  a.out[0] = out<E>(grad_x);
  a.of.weight = per_channel<T>("weight", weight, type, shape.channels);
  a.of.mean = statistic("mean", mean, shape.channels);
  a.of.invstd = statistic("invstd", invstd, shape.channels);
  a.of.grad_weight = out<T>(grad_weight);
  a.of.grad_bias = out<T>(grad_bias);
  run(shape, x, a);
  return {grad_x, grad_weight, grad_bias};
}

template <class E>
std::tuple<Tensor, Tensor, Tensor> double_backward(const Tensor& u, const std::optional<Tensor>& u_weight,
                                                   const std::optional<Tensor>& u_bias, const Tensor& grad_y,
                                                   const Tensor& x, const std::optional<Tensor>& weight,
                                                   const Tensor& mean, const Tensor& invstd, bool need_grad_y,
                                                   bool need_x) {
  using T = Compute<E>;
  const Shape shape = shape_of(x);
  const ScalarType type = accumulation_type(x.scalar_type());
  check_like("u", u, x, shape);
  check_like("grad_y", grad_y, x, shape);
  const DeviceGuard guard(x.get_device_index());
  Tensor to_grad_y = like(x, need_grad_y), to_x = like(x, need_x);
  Tensor to_weight = new_channels(x, shape.channels, type);
  Arguments<Second<E>> a{};
  a.in[0] = in<E>(u);
  a.in[1] = in<E>(grad_y);
  a.in[2] = in<E>(x);
  a.out[0] = out<E>(to_grad_y);
  a.out[1] = out<E>(to_x);
  a.of.weight = per_channel<T>("weight", weight, type, shape.channels);
  a.of.u_weight = per_channel<T>("u_weight", u_weight, type, shape.channels);
  a.of.u_bias = per_channel<T>("u_bias", u_bias, type, shape.channels);
  a.of.mean = statistic("mean", mean, shape.channels);
  a.of.invstd = statistic("invstd", invstd, shape.channels);
  a.of.to_weight = out<T>(to_weight);
  run(shape, x, a);
  return {to_grad_y, to_x, to_weight};
}

template <class E>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const std::optional<Tensor>& weight,
                                            const Tensor& mean, const Tensor& invstd,
                                            const std::optional<Tensor>& addend, bool need_x) {
  return (addend ? backward<E, true> : backward<E, false>)(grad_y, x, weight, mean, invstd, addend, need_x);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm(Tensor x, std::optional<Tensor> weight,
                                                      std::optional<Tensor> bias,
                                                      double eps){SIB_FAST_BY_ELEMENT(forward, x, x, weight, bias, eps)}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(Tensor grad_y, Tensor x, std::optional<Tensor> weight,
                                                       Tensor mean, Tensor invstd, std::optional<Tensor> addend,
                                                       bool need_x){
    SIB_FAST_BY_ELEMENT(backward, x, grad_y, x, weight, mean, invstd, addend, need_x)}

std::tuple<Tensor, Tensor, Tensor> batch_norm_double_backward(Tensor u, std::optional<Tensor> u_weight,
                                                              std::optional<Tensor> u_bias, Tensor grad_y, Tensor x,
                                                              std::optional<Tensor> weight, Tensor mean, Tensor invstd,
                                                              bool need_grad_y, bool need_x) {
  SIB_FAST_BY_ELEMENT(double_backward, x, u, u_weight, u_bias, grad_y, x, weight, mean, invstd, need_grad_y, need_x)
}
#undef SIB_FAST_BY_ELEMENT

}  // namespace
}  // namespace sib_fast::cuda::batch_norm

namespace sib_fast::cuda {

SIB_CUDA_LIBRARY(m) {
  m.impl("_batch_norm", TORCH_BOX(&batch_norm::batch_norm));
  m.impl("_batch_norm_backward", TORCH_BOX(&batch_norm::batch_norm_backward));
  m.impl("_batch_norm_double_backward", TORCH_BOX(&batch_norm::batch_norm_double_backward));
}

}  // namespace sib_fast::cuda
