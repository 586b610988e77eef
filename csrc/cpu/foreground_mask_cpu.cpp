// foreground_mask for CPU tensors: memory and threads. The arithmetic is in foreground_mask_kernels.cpp.

#include "cpu/foreground_mask_kernels.h"

#include "common/head_ops.h"
#include "cpu/capability.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

template <class T>
const MaskKernels<T>& kernels() {
  static const MaskKernels<T>& table = SIB_FAST_PICK(mask_kernels, T);
  return table;
}

// Runs task(image, scratch) for every image on torch's threads: each thread owns one scratch for all its images.
template <class Task>
void for_images(int64_t images, int64_t scratch_bytes, const Task& task) {
  torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_bytes);
    for (int64_t n = begin; n < end; ++n) task(n, scratch.get());
  });
}

RankWindows windows_of(const MaskOptions& o, bool is_double) {
  return {o.quantiles, o.temperature, o.pixels(), is_double};
}
MaskGeometry geometry_of(const MaskOptions& o, int64_t channels, const RankWindows& windows) {
  return {channels, o.height, o.width, o.window_size, o.slope, o.eps, windows.data(), windows.weights()};
}

struct Kernels : OnCpu {
  static void check(const MaskOptions&) {}

  template <class T>
  static void forward(const MaskOptions& o, const Tensor& vjp, const int32_t* given, const MaskOutputs& outputs) {
    const MaskKernels<T>& k = kernels<T>();
    const RankWindows windows = windows_of(o, sizeof(T) == 8);
    const MaskGeometry geo = geometry_of(o, vjp.size(1), windows);
    const MapView view = view_of(vjp);
    const int64_t pixels = o.pixels(), per_image = kLevels * o.length;
    T *mask = out<T>(outputs.mask), *mean_map = out<T>(outputs.mean_map), *levels = out<T>(outputs.levels);
    int32_t* ranks = out<int32_t>(outputs.rank_pixels);
    for_images(vjp.size(0), k.scratch_bytes(geo), [&](int64_t n, void* scratch) {
      k.mean_map(geo, view, n, mean_map + n * pixels);
      k.forward(geo, mean_map + n * pixels, given ? given + n * per_image : nullptr, mask + n * pixels,
                levels + n * kLevels, ranks + n * per_image, scratch);
    });
  }

  template <class T>
  static void backward(const MaskOptions& o, int64_t channels, const Tensor& grad_mask, const MaskOutputs& of,
                       const Tensor& grad_plane) {
    const MaskKernels<T>& k = kernels<T>();
    const RankWindows windows = windows_of(o, sizeof(T) == 8);
    const MaskGeometry geo = geometry_of(o, channels, windows);
    const int64_t pixels = o.pixels(), per_image = kLevels * o.length;
    const T *grad = in<T>(grad_mask), *mask = in<T>(of.mask);
    const T *mean_map = in<T>(of.mean_map), *levels = in<T>(of.levels);
    const int32_t* ranks = in<int32_t>(of.rank_pixels);
    T* to = out<T>(grad_plane);
    for_images(grad_plane.size(0), k.scratch_bytes(geo), [&](int64_t n, void* scratch) {
      k.backward(geo, grad + n * pixels, mask + n * pixels, mean_map + n * pixels, levels + n * kLevels,
                 ranks + n * per_image, to + n * pixels, scratch);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) { MaskOps<Kernels>::implement(m); }

}  // namespace sib_fast::cpu
