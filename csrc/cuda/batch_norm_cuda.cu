// batch_norm for CUDA tensors (SPEC 10): cuts, memory, launches and registration. The kernels and their traffic
// are in batch_norm_passes.cuh, the equations in batch_norm_formulas.cuh.
//
// Launches  sums, merge, writes; one where a channel is one part. Nothing is read back by the host and nothing is
//           copied to the device: capturable in a CUDA graph.
// Memory    per-channel sums in double for each part, at most 512 of them, and coefficients.
// Twins     cpu/batch_norm_cpu.cpp; truth: ops/batch_norm/reference.py.

#include "common/batch_norm_ops.h"
#include "cuda/batch_norm_passes.cuh"
#include "cuda/on_cuda.cuh"

namespace sib_fast::cuda::batch_norm {
namespace {

constexpr const char* kOp = "batch_norm";

using Shape = BatchNormShape;

// As the kernels read it: one channel is one run, and channels last a matrix.
Shape as_read(const Shape& s) {
  if (s.channels == 1) return {false, 1, 1, s.count()};
  return s.channels_last ? Shape{true, s.count(), s.channels, 1} : s;
}

// ---- cuts -----------------------------------------------------------------------------------------------------------

// Elements of a channel that a part has at least (cuda/norm.cuh).
constexpr int64_t kPartElements = 4096;
// With this many channels, or with so few elements in each, a block takes a whole channel: one launch, no merge.
constexpr int64_t kManyChannels = 512, kFewElements = 8192;

template <class E>
Geometry cut_first(const Tensor& x, const Shape& shape, int64_t misaligned) {
  constexpr int64_t V = 16 / sizeof(E);
  Geometry at{};
  at.images = shape.images;
  at.channels = shape.channels;
  at.spatial = shape.spatial;
  at.misaligned = static_cast<int>(misaligned);
  const bool on_boundaries = misaligned == 0 && shape.spatial % V == 0;
  at.packs = on_boundaries ? shape.spatial / V : (shape.spatial + 2 * V - 2) / V;
  at.width_bits = width_bits_of(at.packs);
  at.image_step = shape.images;
  at.pack_step = at.packs;
  at.parts = at.spatial_parts = 1;
  if (shape.channels >= kManyChannels || shape.count() <= kFewElements) return at;
  const int64_t most = std::min(kMostParts, shape.count() / kPartElements);
  const int64_t wanted = std::clamp<int64_t>(divide_up(blocks_for(x, kNormRounds), shape.channels), 1, most);
  at.image_step = divide_up(shape.images, wanted);
  const int64_t image_parts = divide_up(shape.images, at.image_step);
  at.pack_step = divide_up(at.packs, std::max<int64_t>(1, wanted / image_parts));
  at.spatial_parts = static_cast<int>(divide_up(at.packs, at.pack_step));
  at.parts = static_cast<int>(image_parts) * at.spatial_parts;
  return at;
}

template <class Op>
Geometry cut_last(const Tensor& x, const Shape& shape) {
  Geometry at{};
  at.images = shape.images;
  at.channels = shape.channels;
  at.spatial = 1;
  at.width_bits = width_bits_of(divide_up(shape.channels, Columns<Op>::kColumns));
  at.spatial_parts = 1;
  const int64_t tiles = divide_up(shape.channels, Columns<Op>::kColumns << at.width_bits);
  const RowParts cut = cut_rows(x, shape.images, tiles, 4 * Columns<Op>::kRows * (kThreads >> at.width_bits));
  at.image_step = cut.step;
  at.parts = cut.parts;
  return at;
}

// ---- launches -------------------------------------------------------------------------------------------------------

// Fills in what the cut decides, and runs: sums, coefficients, writes.
template <class Op>
void run(const Shape& logical, const Tensor& x, Arguments<Op> a) {
  const Shape shape = as_read(logical);
  using E = typename Op::Element;
  constexpr int64_t kColumns = Columns<Op>::kColumns, kPack = 16 / sizeof(E);
  const int64_t pack = shape.channels_last ? kColumns : kPack;
  const int64_t misaligned = packs::misalignment(a.in[Op::kInputs - 1], pack);
  a.at = shape.channels_last ? cut_last<Op>(x, shape) : cut_first<E>(x, shape, misaligned);
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
  Tensor partial = new_double(x, {shape.channels * Op::kSums * int64_t{a.at.parts}});
  Tensor coefficients = new_accumulated(x, Op::kCoefficients * shape.channels);
  a.partial = out<double>(partial);
  a.coefficients = out<typename Op::T>(coefficients);
  pass(true, false);
  launch(kOp, merge_kernel<Op>, dim3(static_cast<unsigned>(divide_up(shape.channels, kWarps))), block, 0, stream, a);
  if (a.any_output()) pass(false, true);
}

// ---- the ops --------------------------------------------------------------------------------------------------------

struct Kernels : OnCuda {
  template <class E>
  static void forward(const Shape& shape, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                      double eps, Tensor& y, Tensor& mean, Tensor& variance, Tensor& invstd) {
    using T = Compute<E>;
    Arguments<Forward<E>> a{};
    a.in[0] = in<E>(x);
    a.out[0] = out<E>(y);
    a.of = {in<T>(weight), in<T>(bias), out<double>(mean), out<double>(variance), out<double>(invstd), eps, 0.0};
    run(shape, x, a);
  }

  template <bool added, class E>
  static void backward_of(const Shape& shape, const NormBackward& of, const MaybeTensor& addend) {
    using T = Compute<E>;
    Arguments<Backward<E, added>> a{};
    if (added) a.in[0] = in<E>(addend);
    a.in[added] = in<E>(of.grad_y);
    a.in[added + 1] = in<E>(of.x);
    a.out[0] = out<E>(of.grad_x);
    a.of = {in<T>(of.weight),       in<double>(of.mean),  in<double>(of.invstd),
            out<T>(of.grad_weight), out<T>(of.grad_bias), 0.0};
    run(shape, of.x, a);
  }
  template <class E>
  static void backward(const Shape& shape, const NormBackward& of, const MaybeTensor& addend) {
    (addend ? backward_of<true, E> : backward_of<false, E>)(shape, of, addend);
  }

  template <class E>
  static void double_backward(const Shape& shape, const NormSecond& of) {
    using T = Compute<E>;
    Arguments<Second<E>> a{{in<E>(of.u), in<E>(of.grad_y), in<E>(of.x)}, {out<E>(of.to_grad_y), out<E>(of.to_x)}};
    a.of = {in<T>(of.weight),
            in<T>(of.u_weight),
            in<T>(of.u_bias),
            in<double>(of.mean),
            in<double>(of.invstd),
            out<T>(of.to_weight),
            0.0};
    run(shape, of.x, a);
  }
};

}  // namespace
}  // namespace sib_fast::cuda::batch_norm

namespace sib_fast::cuda {

SIB_CUDA_LIBRARY(m) { BatchNormOps<batch_norm::Kernels>::implement(m); }

}  // namespace sib_fast::cuda
