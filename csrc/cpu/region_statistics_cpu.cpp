// region_statistics for CPU tensors: memory, threads and ordered merges. The arithmetic is in
// region_statistics_kernels.cpp.

#include "cpu/region_statistics_kernels.h"

#include <algorithm>
#include <array>
#include <vector>

#include "common/head_ops.h"
#include "cpu/capability.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

template <class T>
const StatisticsKernels<T>& kernels() {
  static const StatisticsKernels<T>& table = SIB_FAST_PICK(statistics_kernels, T);
  return table;
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

// Upper tiles of `gram` [rows, rows] -> the full symmetric [N, N].
void write_gram(const double* gram, int64_t rows, int64_t N, double* to) {
  for (int64_t i = 0; i < N; ++i) {
    for (int64_t j = i; j < N; ++j) to[i * N + j] = to[j * N + i] = gram[i * rows + j];
  }
}

struct Sums {
  std::vector<double> grams;
  std::vector<Moments> moments;
  int64_t rows;
};

template <class T>
StatisticsInputs<T> views_of(const sib_fast::StatisticsInputs& inputs) {
  return {view_of(inputs.vjp), view_of(inputs.x), in<T>(inputs.mask)};
}

template <class T>
Sums sums_of(const StatisticsGeometry& geo, const StatisticsInputs<T>& inputs) {
  const StatisticsKernels<T>& k = kernels<T>();
  const StatisticsBlocks b = k.blocks(geo);
  const int64_t N = geo.images, pixels = geo.height * geo.width, count = geo.background_grams ? 4 : 2;
  const int64_t gram_size = count * b.padded_images * b.padded_images;
  const int64_t step = pixels_per_task(geo, b, count), tasks = (pixels + step - 1) / step;
  std::vector<double> grams(tasks * gram_size, 0.0);
  std::vector<Moments> moments(tasks * 2 * N, Moments{0, 0, 0});
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(k.forward_scratch_bytes(geo));
    for (int64_t t = begin; t < end; ++t) {
      k.forward(geo, inputs, t * step, std::min(pixels, (t + 1) * step), grams.data() + t * gram_size,
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

struct Kernels : OnCpu {
  template <class T>
  static void forward(const sib_fast::StatisticsInputs& inputs, const Statistics& outputs) {
    const StatisticsGeometry geo = geometry_of(inputs.vjp, outputs.background_grams);
    const Sums sums = sums_of(geo, views_of<T>(inputs));
    const int64_t N = geo.images, grams = outputs.background_grams ? 4 : 2;
    for (int64_t which = 0; which < grams; ++which) {
      write_gram(sums.grams.data() + which * sums.rows * sums.rows, sums.rows, N, out<double>(outputs.grams[which]));
    }
    for (int64_t which = 0; which < 2; ++which) {
      double *variance = out<double>(outputs.variance[which]), *mean = out<double>(outputs.mean[which]);
      for (int64_t n = 0; n < N; ++n) {
        const Moments& m = sums.moments[2 * n + which];
        variance[n] = m.m2 / (m.count - 1);
        mean[n] = m.mean;
      }
    }
  }

  template <class T>
  static void backward(const sib_fast::StatisticsInputs& inputs, const StatisticsGradients& of) {
    const StatisticsKernels<T>& k = kernels<T>();
    const StatisticsGeometry geo = geometry_of(inputs.vjp, of.background_grams());
    const StatisticsBlocks b = k.blocks(geo);
    const int64_t N = geo.images;
    // Var = M2/(D-1), so its gradient with respect to an element is 2/(D-1)·(element - mean).
    const double scale = 2.0 / (static_cast<double>(geo.channels * geo.height * geo.width) - 1);
    const auto at = [](const Tensor* t, int64_t n) { return in<double>(*t)[n]; };
    std::vector<VarianceGrad> variance(N);
    for (int64_t n = 0; n < N; ++n) {
      variance[n] = {at(of.grad_variance[0], n) * scale, at(of.mean[0], n), at(of.grad_variance[1], n) * scale,
                     at(of.mean[1], n)};
    }
    std::array<std::vector<T>, 4> sym;
    for (int which = 0; which < (geo.background_grams ? 4 : 2); ++which) {
      sym[which] = symmetrised<T>(*of.grad_gram[which], N, b.padded_images);
    }
    const auto sym_of = [&](int which) { return sym[which].empty() ? nullptr : sym[which].data(); };
    const auto view = [](const Tensor* t) { return t ? view_of(*t) : MapView{nullptr, Element::float32, 0, 0, 0, 0}; };
    StatisticsGrads<T> grads;
    grads.sym_vjp = sym_of(0);
    grads.sym_x = sym_of(1);
    grads.sym_background_vjp = sym_of(2);
    grads.sym_background_x = sym_of(3);
    grads.variance = variance.data();
    grads.grad_vjp = view(of.grad_vjp);
    grads.grad_x = view(of.grad_x);
    grads.grad_mask = of.grad_mask ? out<T>(*of.grad_mask) : nullptr;
    const StatisticsInputs<T> views = views_of<T>(inputs);
    const int64_t pixels = geo.height * geo.width;
    const int64_t step = pixels_per_task(geo, b, 0), tasks = (pixels + step - 1) / step;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(k.backward_scratch_bytes(geo));
      for (int64_t t = begin; t < end; ++t) {
        k.backward(geo, views, grads, t * step, std::min(pixels, (t + 1) * step), scratch.get());
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) { StatisticsOps<Kernels>::implement(m); }

}  // namespace sib_fast::cpu
