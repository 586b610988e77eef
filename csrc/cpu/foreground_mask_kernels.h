// Per-image kernels of foreground_mask, one table per instruction set. T is float or double: the type of the planes.
#pragma once

#include <cstdint>

#include "common/rank_window.h"
#include "cpu/kernel_tables.h"
#include "cpu/map_view.h"

namespace sib_fast::cpu {

struct MaskGeometry {
  int64_t channels, height, width;
  int64_t window_size;
  double slope, eps;
  const RankWindow* windows;  // [kLevels], all of one length
  const double* weights;      // [kLevels, length]
};

template <class T>
struct MaskKernels {
  // Bytes of scratch that one image needs, aligned to 64.
  int64_t (*scratch_bytes)(const MaskGeometry&);
  // mean_map [P] = mean over channels of image `n`.
  void (*mean_map)(const MaskGeometry&, const MapView& vjp, int64_t n, T* mean_map);
  // mask [P], levels [kLevels], rank_pixels [kLevels, length]. given_ranks: same shape as rank_pixels, or null.
  void (*forward)(const MaskGeometry&, const T* mean_map, const int32_t* given_ranks, T* mask, T* levels,
                  int32_t* rank_pixels, void* scratch);
  // grad_plane [P]: the gradient of every channel of vjp.
  void (*backward)(const MaskGeometry&, const T* grad_mask, const T* mask, const T* mean_map, const T* levels,
                   const int32_t* rank_pixels, T* grad_plane, void* scratch);

  // Building blocks, exposed to tests through _blocks.
  int64_t (*select_scratch_bytes)(int64_t pixels, int windows);
  void (*select_ranks)(const T* values, int64_t pixels, const RankWindow* windows, int count, int32_t* rank_pixels,
                       void* scratch);
  int64_t (*box_scratch_bytes)(int64_t height, int64_t width, int64_t window_size);
  void (*box_mean)(const T* in, T* out, int64_t height, int64_t width, int64_t window_size, void* scratch);
  void (*sigmoid)(const T* in, T* out, int64_t count);
};

SIB_FAST_DECLARE_TABLES(MaskKernels, mask_kernels)

}  // namespace sib_fast::cpu
