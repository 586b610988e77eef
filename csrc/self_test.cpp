// The baseline kernels on fixed inputs, every result printed: `<name> <precision> <values>`, a line each. A program
// without torch or Python, for machines that are emulated or have neither. tools/self_test.py compares two machines.

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "common/rank_window.h"
#include "cpu/activation_bits_kernels.h"
#include "cpu/activation_kernels.h"
#include "cpu/batch_norm_kernels.h"
#include "cpu/foreground_mask_kernels.h"
#include "cpu/hsic_objective_kernels.h"
#include "cpu/layer_norm_kernels.h"
#include "cpu/region_statistics_kernels.h"
#include "cpu/simd.h"  // get and put; this program is linked with one instruction set only
#include "cpu/softmax_kernels.h"

namespace sib_fast::cpu {
namespace {

// In [-2, 2), the same on every machine.
double next_value() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 11) * 0x1p-51 - 2;
}

template <class E>
std::vector<E> values(int64_t count) {
  std::vector<E> out(count);
  for (E& one : out) put(&one, static_cast<Compute<E>>(next_value()));
  return out;
}
template <class T>
std::vector<T> positive(int64_t count) {
  std::vector<T> out = values<T>(count);
  for (T& one : out) one = T(0.5) + one * one;
  return out;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
std::unique_ptr<void, Free> scratch(int64_t bytes) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
}

template <class E>
constexpr const char* kName = nullptr;
template <>
constexpr const char* kName<double> = "float64";
template <>
constexpr const char* kName<float> = "float32";
template <>
constexpr const char* kName<BFloat16Bits> = "bfloat16";
template <>
constexpr const char* kName<Float16Bits> = "float16";

// `of` names the element type that a kernel ran on, E the type of the result.
template <class E>
void print(const std::string& what, const char* of, const E* data, int64_t count) {
  std::printf("%s.%s %s", what.c_str(), of, kName<E>);
  for (int64_t i = 0; i < count; ++i) std::printf(" %.17g", static_cast<double>(get(data[i])));
  std::printf("\n");
}
template <class E>
void print(const std::string& what, const char* of, const std::vector<E>& data) {
  print(what, of, data.data(), static_cast<int64_t>(data.size()));
}
template <class I>
void print_exact(const std::string& what, const char* of, const std::vector<I>& data) {
  std::printf("%s.%s exact", what.c_str(), of);
  for (const I one : data) std::printf(" %" PRId64, static_cast<int64_t>(one));
  std::printf("\n");
}

template <class E>
void softmax() {
  constexpr int64_t kRows = 5, kLength = 37, kCount = kRows * kLength;
  const auto u = values<E>(kCount), gy = values<E>(kCount), y = values<E>(kCount);
  std::vector<E> to_grad_y(kCount), to_y(kCount);
  softmax_kernels_baseline<E>().double_backward(u.data(), gy.data(), y.data(), kRows, kLength, to_grad_y.data(),
                                                to_y.data());
  print("softmax.to_grad_y", kName<E>, to_grad_y);
  print("softmax.to_y", kName<E>, to_y);
}

template <class E>
void activation() {
  constexpr int64_t kCount = 101;
  for (int64_t kind = 0; kind < kActivations; ++kind) {
    const bool gelu = static_cast<Activation>(kind) == Activation::gelu;
    const auto u = values<E>(kCount), gy = values<E>(kCount), saved = values<E>(kCount);
    std::vector<E> to_grad_y(kCount), to_saved(kCount);
    activation_kernels_baseline<E>().double_backward(static_cast<Activation>(kind), 1.5, 0.75, u.data(), gy.data(),
                                                     saved.data(), kCount, gelu ? nullptr : to_grad_y.data(),
                                                     to_saved.data());
    if (!gelu) print("activation." + std::to_string(kind) + ".to_grad_y", kName<E>, to_grad_y);
    print("activation." + std::to_string(kind) + ".to_saved", kName<E>, to_saved);
  }
}

template <class E>
void activation_bits() {
  constexpr int64_t kCount = 1111;
  for (int64_t kind = 0; kind < kTwoSlopes; ++kind) {
    const auto which = static_cast<TwoSlopes>(kind);
    const double a = which == TwoSlopes::hardtanh ? -0.5 : which == TwoSlopes::leaky_relu ? 0.25 : 0;
    const double b = which == TwoSlopes::hardtanh ? 1.25 : 0;
    const auto x = values<E>(kCount), grad_y = values<E>(kCount);
    std::vector<E> y(kCount), grad_x(kCount);
    std::vector<uint8_t> bits(bits_bytes(kCount));
    activation_bits_kernels_baseline<E>().forward(which, a, b, x.data(), kCount, y.data(), bits.data());
    activation_bits_kernels_baseline<E>().backward(which, a, grad_y.data(), bits.data(), kCount, grad_x.data());
    const std::string name = "activation_bits." + std::to_string(kind);
    print_exact(name + ".bits", kName<E>, bits);
    print(name + ".y", kName<E>, y);
    print(name + ".grad_x", kName<E>, grad_x);
  }
}

template <class E>
void layer_norm(const std::string& name, int64_t rows, int64_t length, int64_t spatial, int64_t groups) {
  using T = Compute<E>;
  const NormRows part{length, spatial, groups, 0, rows};
  const int64_t count = rows * length, channels = groups * part.channels();
  const auto x = values<E>(count), gy = values<E>(count), u = values<E>(count);
  const auto gamma = values<T>(channels), beta = values<T>(channels), u_gamma = values<T>(channels),
             u_beta = values<T>(channels);
  std::vector<E> y(count), grad_x(count), to_grad_y(count), to_x(count);
  std::vector<double> mean(rows), invstd(rows), sum_gamma(channels), sum_beta(channels), sum_second(channels);
  const LayerNormKernels<E>& k = layer_norm_kernels_baseline<E>();
  k.forward(part, x.data(), gamma.data(), beta.data(), 1e-5, y.data(), mean.data(), invstd.data());
  k.backward(part, gy.data(), x.data(), gamma.data(), mean.data(), invstd.data(), grad_x.data(), sum_gamma.data(),
             sum_beta.data());
  k.double_backward(part, u.data(), u_gamma.data(), u_beta.data(), gy.data(), x.data(), gamma.data(), mean.data(),
                    invstd.data(), to_grad_y.data(), to_x.data(), sum_second.data());
  for (const auto& [what, result] : {std::pair<const char*, const std::vector<E>&>{"y", y},
                                     {"grad_x", grad_x},
                                     {"to_grad_y", to_grad_y},
                                     {"to_x", to_x}}) {
    print(name + "." + what, kName<E>, result);
  }
  // Sums over rows are kept in double, of terms that are calculated in T.
  for (const auto& [what, result] : {std::pair<const char*, const std::vector<double>&>{"mean", mean},
                                     {"invstd", invstd},
                                     {"sum_gamma", sum_gamma},
                                     {"sum_beta", sum_beta},
                                     {"sum_second", sum_second}}) {
    print(name + "." + what, kName<E>, std::vector<T>(result.begin(), result.end()));
  }
}

template <class E>
void batch_norm(bool channels_last) {
  using T = Compute<E>;
  constexpr int64_t kImages = 3, kChannels = 5, kSpatial = 14, kCount = kImages * kChannels * kSpatial;
  const BatchNormPart part{
      channels_last, kImages, kChannels, kSpatial, channels_last ? 0 : 2, channels_last ? kImages * kSpatial : 3};
  const int64_t stride = channels_last ? kChannels : 1;
  const auto x = values<E>(kCount), gy = values<E>(kCount), u = values<E>(kCount), addend = values<E>(kCount);
  const auto pivot = values<double>(stride);
  const auto k = values<T>(kSecondCoefficients * stride);
  std::vector<double> sums_x(2 * stride), sums_gy(2 * stride), sums_u(5 * stride);
  std::vector<E> y(kCount), grad_x(kCount), to_grad_y(kCount), to_x(kCount);
  const BatchNormKernels<E>& kernels = batch_norm_kernels_baseline<E>();
  kernels.sums_x(part, x.data(), pivot.data(), sums_x.data());
  kernels.sums_gy(part, gy.data(), x.data(), pivot.data(), sums_gy.data());
  kernels.sums_u(part, u.data(), gy.data(), x.data(), pivot.data(), sums_u.data());
  kernels.write_y(part, x.data(), k.data(), y.data());
  kernels.write_grad_x(part, gy.data(), x.data(), addend.data(), k.data(), grad_x.data());
  kernels.write_second(part, u.data(), gy.data(), x.data(), k.data(), to_grad_y.data(), to_x.data());
  const std::string name = channels_last ? "batch_norm.channels_last" : "batch_norm.channels_first";
  for (const auto& [what, result] : {std::pair<const char*, const std::vector<double>&>{"sums_x", sums_x},
                                     {"sums_gy", sums_gy},
                                     {"sums_u", sums_u}}) {
    print(name + "." + what, kName<E>, std::vector<T>(result.begin(), result.end()));
  }
  for (const auto& [what, result] : {std::pair<const char*, const std::vector<E>&>{"y", y},
                                     {"grad_x", grad_x},
                                     {"to_grad_y", to_grad_y},
                                     {"to_x", to_x}}) {
    print(name + "." + what, kName<E>, result);
  }
}

template <class E>
constexpr Element kElement = Element::float64;
template <>
constexpr Element kElement<float> = Element::float32;
template <>
constexpr Element kElement<BFloat16Bits> = Element::bfloat16;
template <>
constexpr Element kElement<Float16Bits> = Element::float16;

// Channels first or last.
MapView view_of(const void* data, Element element, int64_t channels, int64_t height, int64_t width, bool last) {
  const int64_t pixels = height * width;
  if (last) return {data, element, channels * pixels, 1, width * channels, channels};
  return {data, element, channels * pixels, pixels, width, 1};
}

template <class E>
void region_statistics(bool channels_last) {
  using T = Compute<E>;
  constexpr int64_t kImages = 5, kChannels = 3, kHeight = 7, kWidth = 19, kPixels = kHeight * kWidth,
                    kCount = kImages * kChannels * kPixels;
  const StatisticsGeometry geo{kImages, kChannels, kHeight, kWidth, true};
  const StatisticsKernels<T>& k = statistics_kernels_baseline<T>();
  const int64_t rows = k.blocks(geo).padded_images;
  const auto vjp = values<E>(kCount), x = values<E>(kCount);
  std::vector<T> mask = values<T>(kImages * kPixels);
  for (T& one : mask) one = (one + 2) / 4;
  const auto view = [&](const auto& data) {
    return view_of(data.data(), kElement<std::decay_t<decltype(data[0])>>, kChannels, kHeight, kWidth, channels_last);
  };
  const StatisticsInputs<T> in{view(vjp), view(x), mask.data()};
  std::vector<double> grams(4 * rows * rows);
  std::vector<Moments> moments(2 * kImages, Moments{0, 0, 0});
  k.forward(geo, in, 0, kPixels, grams.data(), moments.data(), scratch(k.forward_scratch_bytes(geo)).get());
  const std::string name = channels_last ? "region_statistics.channels_last" : "region_statistics.channels_first";
  for (int which = 0; which < 4; ++which) {
    std::vector<T> gram;  // the upper triangle: what lies below is not specified
    for (int64_t i = 0; i < kImages; ++i) {
      for (int64_t j = i; j < kImages; ++j) gram.push_back(static_cast<T>(grams[(which * rows + i) * rows + j]));
    }
    print(name + ".gram" + std::to_string(which), kName<E>, gram);
  }
  std::vector<T> mean, m2;
  for (const Moments& one : moments) mean.push_back(static_cast<T>(one.mean)), m2.push_back(static_cast<T>(one.m2));
  print(name + ".mean", kName<E>, mean);
  print(name + ".m2", kName<E>, m2);

  std::vector<std::vector<T>> sym;
  for (int which = 0; which < 4; ++which) {
    std::vector<T> one = values<T>(kImages * kImages);
    for (int64_t i = 0; i < kImages; ++i) {
      for (int64_t j = 0; j < i; ++j) one[i * kImages + j] = one[j * kImages + i];
    }
    one.resize(rows * kImages);
    sym.push_back(one);
  }
  std::vector<VarianceGrad> variance;
  for (int64_t n = 0; n < kImages; ++n)
    variance.push_back({next_value(), moments[2 * n].mean, next_value(), moments[2 * n + 1].mean});
  std::vector<T> grad_vjp(kCount), grad_x(kCount), grad_mask(kImages * kPixels);
  const StatisticsGrads<T> grads{sym[0].data(),   sym[1].data(),  sym[2].data(), sym[3].data(),
                                 variance.data(), view(grad_vjp), view(grad_x),  grad_mask.data()};
  k.backward(geo, in, grads, 0, kPixels, scratch(k.backward_scratch_bytes(geo)).get());
  print(name + ".grad_vjp", kName<E>, grad_vjp);
  print(name + ".grad_x", kName<E>, grad_x);
  print(name + ".grad_mask", kName<E>, grad_mask);
}

void hsic_objective() {
  constexpr int64_t kN = 7;
  const auto gram_vjp = values<double>(kN * kN), gram_x = values<double>(kN * kN);
  const auto inverse_vjp = positive<double>(kN), inverse_x = positive<double>(kN), mean_vjp = values<double>(kN),
             mean_x = values<double>(kN), grand = values<double>(2);
  const HsicColumns<double> columns{inverse_vjp.data(), inverse_x.data(), mean_vjp.data(), mean_x.data()};
  std::vector<double> sums, along, grad_vjp(kN * kN), grad_x(kN * kN);
  const HsicKernels<double>& k = hsic_kernels_baseline<double>();
  for (int64_t i = 0; i < kN; ++i) {
    const auto row = k.row_sums(gram_vjp.data(), gram_x.data(), columns, i, kN);
    sums.insert(sums.end(), {row.product, row.vjp, row.x});
    const auto of = k.row_gradient(gram_vjp.data(), gram_x.data(), columns, grand.data(), 0.75, i, kN, grad_vjp.data(),
                                   grad_x.data());
    along.insert(along.end(), {of.vjp, of.x});
  }
  print("hsic_objective.sums", "float64", sums);
  print("hsic_objective.along", "float64", along);
  print("hsic_objective.grad_vjp", "float64", grad_vjp);
  print("hsic_objective.grad_x", "float64", grad_x);
}

template <class E>
void foreground_mask() {
  using T = Compute<E>;
  constexpr int64_t kChannels = 3, kHeight = 13, kWidth = 21, kPixels = kHeight * kWidth;
  const RankWindows windows({0.05, 0.95, 0.5, 0.7}, 1.0, kPixels, sizeof(T) == 8);
  const MaskGeometry geo{kChannels, kHeight, kWidth, 5, 10.0, 1e-6, windows.data(), windows.weights()};
  const MaskKernels<T>& k = mask_kernels_baseline<T>();
  const auto vjp = values<E>(kChannels * kPixels);
  const auto grad_mask = values<T>(kPixels);
  std::vector<T> mean_map(kPixels), mask(kPixels), levels(kLevels), grad_plane(kPixels);
  std::vector<int32_t> ranks(kLevels * windows.length());
  const auto memory = scratch(k.scratch_bytes(geo));
  const MapView view = view_of(vjp.data(), kElement<E>, kChannels, kHeight, kWidth, false);
  k.mean_map(geo, view, 0, mean_map.data());
  k.forward(geo, mean_map.data(), nullptr, mask.data(), levels.data(), ranks.data(), memory.get());
  k.backward(geo, grad_mask.data(), mask.data(), mean_map.data(), levels.data(), ranks.data(), grad_plane.data(),
             memory.get());
  print("foreground_mask.mean_map", kName<E>, mean_map);
  print_exact("foreground_mask.ranks", kName<E>, ranks);
  print("foreground_mask.levels", kName<E>, levels);
  print("foreground_mask.mask", kName<E>, mask);
  print("foreground_mask.grad_plane", kName<E>, grad_plane);
}

// What _blocks shows to tests on the machine that builds it.
template <class T>
void building_blocks() {
  constexpr int64_t kHeight = 17, kWidth = 29, kPixels = kHeight * kWidth;
  const MaskKernels<T>& k = mask_kernels_baseline<T>();
  auto plane = values<T>(kPixels);
  for (int64_t i = 0; i < kPixels; i += 3) plane[i] = plane[kPixels - 1 - i];  // ties
  const RankWindows windows({0.0, 0.33, 1.0}, 2.0, kPixels, sizeof(T) == 8);
  std::vector<int32_t> ranks(3 * windows.length());
  k.select_ranks(plane.data(), kPixels, windows.data(), 3, ranks.data(),
                 scratch(k.select_scratch_bytes(kPixels, 3)).get());
  print_exact("select_ranks", kName<T>, ranks);
  std::vector<T> out(kPixels);
  k.box_mean(plane.data(), out.data(), kHeight, kWidth, 7, scratch(k.box_scratch_bytes(kHeight, kWidth, 7)).get());
  print("box_mean", kName<T>, out);
  for (T& one : plane) one *= T(8);
  k.sigmoid(plane.data(), out.data(), kPixels);
  print("sigmoid", kName<T>, out);
}

template <class E>
void every_op() {
  softmax<E>();
  activation<E>();
  activation_bits<E>();
  layer_norm<E>("layer_norm", 6, 37, 1, 1);
  layer_norm<E>("group_norm", 6, 36, 12, 2);
  for (const bool channels_last : {false, true}) {
    batch_norm<E>(channels_last);
    region_statistics<E>(channels_last);
  }
  foreground_mask<E>();
}

}  // namespace
}  // namespace sib_fast::cpu

int main() {
  using namespace sib_fast::cpu;
  every_op<double>();
  every_op<float>();
  every_op<BFloat16Bits>();
  every_op<Float16Bits>();
  hsic_objective();
  building_blocks<double>();
  building_blocks<float>();
}
