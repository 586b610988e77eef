// _blocks: the kernels' building blocks for tests and fuzzers. Built on request (SIB_FAST_BLOCKS=1), not in the
// wheel.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "common/rank_window.h"
#include "cpu/capability.h"
#include "cpu/foreground_mask_kernels.h"
#include "cuda/foreground_mask_arithmetic.cuh"

namespace py = pybind11;

namespace sib_fast::cpu {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
std::unique_ptr<void, Free> scratch(int64_t bytes) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
}

template <class T>
const MaskKernels<T>& kernels(const std::string& capability) {
  if (capability == "baseline") return mask_kernels_baseline<T>();
#if defined(__x86_64__)
  if (capability == "avx2") return mask_kernels_avx2<T>();
  if (capability == "avx512") return mask_kernels_avx512<T>();
#endif
  throw py::value_error("capability must be baseline, avx2 or avx512, got " + capability);
}

// (first rank, entry of the nearest rank, weights) of one level's window.
std::tuple<int64_t, int64_t, std::vector<double>> rank_window(double level, double temperature, int64_t pixels,
                                                              bool is_double) {
  const RankWindows windows({level}, temperature, pixels, is_double);
  const RankWindow& w = windows.data()[0];
  return {w.first, w.nearest, std::vector<double>(windows.weights(), windows.weights() + w.length)};
}

template <class T>
py::array_t<int32_t> select_ranks(const Array<T>& values, const std::vector<double>& levels, double temperature,
                                  const std::string& capability) {
  if (levels.empty() || levels.size() > 3) throw py::value_error("levels must hold 1 to 3 levels");
  const int64_t pixels = values.size();
  const RankWindows windows(levels, temperature, pixels, sizeof(T) == 8);
  py::array_t<int32_t> out({static_cast<int64_t>(levels.size()), windows.length()});
  const int count = static_cast<int>(levels.size());
  const MaskKernels<T>& k = kernels<T>(capability);
  const auto memory = scratch(k.select_scratch_bytes(pixels, count));
  k.select_ranks(values.data(), pixels, windows.data(), count, out.mutable_data(), memory.get());
  return out;
}

template <class T>
Array<T> box_mean(const Array<T>& image, int64_t window_size, const std::string& capability) {
  if (image.ndim() != 2) throw py::value_error("image must have shape [H, W]");
  Array<T> out({image.shape(0), image.shape(1)});
  const MaskKernels<T>& k = kernels<T>(capability);
  const auto memory = scratch(k.box_scratch_bytes(image.shape(0), image.shape(1), window_size));
  k.box_mean(image.data(), out.mutable_data(), image.shape(0), image.shape(1), window_size, memory.get());
  return out;
}

template <class T>
Array<T> sigmoid(const Array<T>& values, const std::string& capability) {
  Array<T> out(values.size());
  kernels<T>(capability).sigmoid(values.data(), out.mutable_data(), values.size());
  return out;
}

template <class T>
py::array_t<uint64_t> magnitude_keys(const Array<T>& values) {
  py::array_t<uint64_t> out(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) out.mutable_data()[i] = cuda::magnitude_key(values.data()[i]);
  return out;
}

}  // namespace

PYBIND11_MODULE(_blocks, m) {
  m.doc() = "Building blocks of the kernels (those of the CPU by instruction set): for tests and fuzzers.";
  m.def("capability", &capability_name, "the instruction set that the ops run on here");
  m.def("rank_window", &rank_window, py::arg("level"), py::arg("temperature"), py::arg("pixels"), py::arg("is_double"));
  m.def("select_ranks_float32", &select_ranks<float>);
  m.def("select_ranks_float64", &select_ranks<double>);
  m.def("box_mean_float32", &box_mean<float>);
  m.def("box_mean_float64", &box_mean<double>);
  m.def("sigmoid_float32", &sigmoid<float>);
  m.def("sigmoid_float64", &sigmoid<double>);

  m.def("cuda_magnitude_keys_float32", &magnitude_keys<float>);
  m.def("cuda_magnitude_keys_float64", &magnitude_keys<double>);
  m.def("cuda_bin_shift", [](uint64_t span, int log2_bins) { return cuda::bin_shift(span, log2_bins); });
  m.def("cuda_log2_bins", &cuda::log2_bins_of);
  m.def("cuda_fraction_bits", &cuda::fraction_bits);
  m.def("cuda_window_pixels", &cuda::window_pixels);
  m.def("cuda_cut", [](int64_t pixels) {
    const cuda::Cut cut = cuda::cut_of(pixels);
    return std::pair(cut.pixels, cut.chunks);
  });
  // Whether (key, pixel) pairs order like tuples: first < second.
  m.def("cuda_compound_less", [](uint64_t key, uint32_t pixel, uint64_t other_key, uint32_t other_pixel) {
    return cuda::compound(key, pixel) < cuda::compound(other_key, other_pixel);
  });
}

}  // namespace sib_fast::cpu
