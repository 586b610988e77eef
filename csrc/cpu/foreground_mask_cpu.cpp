// foreground_mask for CPU tensors: memory, threads and registration. The arithmetic is in foreground_mask_kernels.cpp.

#include "cpu/foreground_mask_kernels.h"

#include <vector>

#include "common/check.h"
#include "cpu/capability.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

constexpr const char* kOp = "foreground_mask";

template <class T>
const MaskKernels<T>& kernels() {
  static const MaskKernels<T>& table = SIB_FAST_PICK(mask_kernels, T);
  return table;
}

void check_options(int64_t window_size, const std::vector<double>& quantiles) {
  SIB_CHECK(kOp, window_size >= 1 && window_size % 2 == 1, "window_size must be odd, got ", window_size);
  SIB_CHECK(kOp, quantiles.size() == kLevels, "quantiles must hold 4 levels, got ", quantiles.size());
  for (double q : quantiles) SIB_CHECK(kOp, q >= 0 && q <= 1, "quantiles must lie in [0, 1], got ", q);
}

// Runs task(image, scratch) for every image on torch's threads: each thread owns one scratch for all its images.
template <class Task>
void for_images(int64_t images, int64_t scratch_bytes, const Task& task) {
  torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_bytes);
    for (int64_t n = begin; n < end; ++n) task(n, scratch.get());
  });
}

template <class T>
void run_forward(const MaskGeometry& geo, const Tensor& vjp, const int32_t* given, Tensor& mask, Tensor& mean_map,
                 Tensor& levels, Tensor& ranks) {
  const MaskKernels<T>& k = kernels<T>();
  const MapView view = view_of(vjp);
  const int64_t pixels = geo.height * geo.width, per_image = kLevels * geo.windows[0].length;
  T* mask_data = static_cast<T*>(mask.mutable_data_ptr());
  T* mean_data = static_cast<T*>(mean_map.mutable_data_ptr());
  T* level_data = static_cast<T*>(levels.mutable_data_ptr());
  int32_t* rank_data = static_cast<int32_t*>(ranks.mutable_data_ptr());
  for_images(vjp.size(0), k.scratch_bytes(geo), [&](int64_t n, void* scratch) {
    k.mean_map(geo, view, n, mean_data + n * pixels);
    k.forward(geo, mean_data + n * pixels, given ? given + n * per_image : nullptr, mask_data + n * pixels,
              level_data + n * kLevels, rank_data + n * per_image, scratch);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> foreground_mask(Tensor vjp, std::optional<Tensor> rank_pixels,
                                                           int64_t window_size, double temperature, double slope,
                                                           std::vector<double> quantiles, double eps) {
  check_map(kOp, "vjp", vjp);
  check_options(window_size, quantiles);
  const int64_t N = vjp.size(0), C = vjp.size(1), H = vjp.size(2), W = vjp.size(3);
  const ScalarType acc = accumulation_type(vjp.scalar_type());
  const bool is_double = acc == ScalarType::Double;
  const RankWindows windows(quantiles, temperature, H * W, is_double);
  const MaskGeometry geo{C, H, W, window_size, slope, eps, windows.data()};
  if (rank_pixels) check_plain(kOp, "rank_pixels", *rank_pixels, ScalarType::Int, N * kLevels * windows.length());

  Tensor mask = torch::stable::new_empty(vjp, {N, 1, H, W}, acc);
  Tensor mean_map = torch::stable::new_empty(vjp, {N, H, W}, acc);
  Tensor levels = torch::stable::new_empty(vjp, {N, kLevels}, acc);
  Tensor ranks = torch::stable::new_empty(vjp, {N, kLevels, windows.length()}, ScalarType::Int);
  const int32_t* given = rank_pixels ? static_cast<const int32_t*>(rank_pixels->const_data_ptr()) : nullptr;
  if (is_double) {
    run_forward<double>(geo, vjp, given, mask, mean_map, levels, ranks);
  } else {
    run_forward<float>(geo, vjp, given, mask, mean_map, levels, ranks);
  }
  return {mask, mean_map, levels, ranks};
}

template <class T>
void run_backward(const MaskGeometry& geo, const Tensor& grad_mask, const Tensor& mask, const Tensor& mean_map,
                  const Tensor& levels, const Tensor& ranks, Tensor& grad_plane) {
  const MaskKernels<T>& k = kernels<T>();
  const int64_t pixels = geo.height * geo.width, per_image = kLevels * geo.windows[0].length;
  const T* grad_data = static_cast<const T*>(grad_mask.const_data_ptr());
  const T* mask_data = static_cast<const T*>(mask.const_data_ptr());
  const T* mean_data = static_cast<const T*>(mean_map.const_data_ptr());
  const T* level_data = static_cast<const T*>(levels.const_data_ptr());
  const int32_t* rank_data = static_cast<const int32_t*>(ranks.const_data_ptr());
  T* out = static_cast<T*>(grad_plane.mutable_data_ptr());
  for_images(mask.size(0), k.scratch_bytes(geo), [&](int64_t n, void* scratch) {
    k.backward(geo, grad_data + n * pixels, mask_data + n * pixels, mean_data + n * pixels, level_data + n * kLevels,
               rank_data + n * per_image, out + n * pixels, scratch);
  });
}

Tensor foreground_mask_backward(Tensor grad_mask, Tensor mask, Tensor mean_map, Tensor levels, Tensor rank_pixels,
                                int64_t channels, int64_t window_size, double temperature, double slope,
                                std::vector<double> quantiles, double eps) {
  check_options(window_size, quantiles);
  SIB_CHECK(kOp, mask.dim() == 4, "mask must have shape [N, 1, H, W]");
  const int64_t N = mask.size(0), H = mask.size(2), W = mask.size(3);
  const ScalarType acc = mask.scalar_type();
  SIB_CHECK(kOp, accumulation_type(acc) == acc, "mask must be float32 or float64");
  const RankWindows windows(quantiles, temperature, H * W, acc == ScalarType::Double);
  const MaskGeometry geo{channels, H, W, window_size, slope, eps, windows.data()};
  check_plain(kOp, "grad_mask", grad_mask, acc, N * H * W);
  check_plain(kOp, "mask", mask, acc, N * H * W);
  check_plain(kOp, "mean_map", mean_map, acc, N * H * W);
  check_plain(kOp, "levels", levels, acc, N * kLevels);
  check_plain(kOp, "rank_pixels", rank_pixels, ScalarType::Int, N * kLevels * windows.length());

  Tensor grad_plane = torch::stable::new_empty(mask, {N, 1, H, W});
  if (acc == ScalarType::Double) {
    run_backward<double>(geo, grad_mask, mask, mean_map, levels, rank_pixels, grad_plane);
  } else {
    run_backward<float>(geo, grad_mask, mask, mean_map, levels, rank_pixels, grad_plane);
  }
  return grad_plane;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) {
  m.impl("_foreground_mask", TORCH_BOX(&foreground_mask));
  m.impl("_foreground_mask_backward", TORCH_BOX(&foreground_mask_backward));
}

}  // namespace sib_fast::cpu
