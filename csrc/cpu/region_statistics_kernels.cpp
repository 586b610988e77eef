// region_statistics on the CPU: Grams and variances of both regions in one pass over vjp and x (SPEC 4 and 6).
//
//   a = R·M   b = x·M   v = R·(1-M)   (c = x·(1-M))      G_R = a aᵀ   G_x = b bᵀ   mean, M2 of v and of R per image
//
// Blocks    all images × some pixels × some channels, packed as [N, row] so that a block lives in L2; the masked maps
//           exist nowhere else. A block's element order is the map's own: pixels fastest, or channels fastest.
// Sums      products in T over at most 1,024 elements, then double (SPEC 7: what loses digits is a longer float sum).
// Traffic   forward reads vjp, x, mask once; backward reads them once more and writes grad_vjp and grad_mask.
// Order     the caller cuts pixels by shape only and merges in order: equal inputs give equal bits at any thread count.
// Twins     ops/region_statistics/reference.py is the truth.

#include "cpu/region_statistics_kernels.h"

#include "cpu/simd.h"

namespace sib_fast::cpu {
namespace {

constexpr int64_t kMaxRow = 1024;                   // products per T-precision partial sum
constexpr int64_t kMinRow = 128;                    // below this a tile's horizontal sums cost more than its products
constexpr int64_t kPackedBytes = 512 * 1024;        // packed blocks together: a quarter of a 2 MiB L2
constexpr int kTileI = 4;                           // register tile of the Grams, rows i
constexpr int kTileJ = kVectorBytes == 64 ? 4 : 2;  // rows j: 16 accumulators of 32 registers, or 8 of 16
constexpr int kTileE = kVectorBytes == 64 ? 4 : 2;  // vectors along a row in the backward product

inline int64_t at_least(int64_t v, int64_t low) { return v < low ? low : v; }
inline int64_t at_most(int64_t v, int64_t high) { return v > high ? high : v; }
inline int64_t round_up(int64_t v, int64_t unit) { return (v + unit - 1) / unit * unit; }

template <class T>
T* take(char*& scratch, int64_t count) {
  T* p = reinterpret_cast<T*>(scratch);
  scratch += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  return p;
}

template <class T>
StatisticsBlocks blocks(const StatisticsGeometry& geo) {
  const int packed = geo.background_grams ? 4 : 2;  // blocks of all images in use at once, forward and backward alike
  StatisticsBlocks b;
  b.padded_images = round_up(geo.images, kTileI);
  const int64_t budget = kPackedBytes / (packed * b.padded_images * static_cast<int64_t>(sizeof(T)));
  const int64_t row = at_most(at_least(budget, kMinRow), kMaxRow) / 16 * 16;
  const int64_t pixels = geo.height * geo.width;
  // Whole pixels with all their channels where they fit; otherwise runs of 16 to 64 pixels, long enough for vectors and
  // short enough that a small map still has a few blocks to share out.
  const int64_t run = at_least(at_most(round_up((pixels + 7) / 8, 16), 64), 16);
  b.block_pixels = at_most(at_least(row / geo.channels / 16 * 16, run), pixels);
  b.block_channels = at_most(at_least(row / b.block_pixels, 1), geo.channels);
  b.row = round_up(b.block_pixels * b.block_channels, kTileE * kLanes<T>);
  return b;
}

// ---- one image's part of a block ------------------------------------------------------------------------------------

// Channels fastest where they are neighbours in memory; otherwise pixels fastest.
inline bool channels_fastest(const MapView& map, const StatisticsGeometry& geo) {
  return geo.channels > 1 && map.stride_c == 1 && (map.stride_w != 1 || geo.height * geo.width == 1);
}

// A block of one map: `runs` runs of `length` elements, which the mask of a run follows element by element.
struct Shape {
  int64_t runs, length;
};
inline Shape shape_of(bool fastest, int64_t pixels, int64_t channels) {
  return fastest ? Shape{1, pixels * channels} : Shape{channels, pixels};
}

struct Block {
  int64_t pixel, pixels, channel, channels;
};

// Calls visit(offset of a row segment in the map, index of its first pixel in the block, pixels) without a division a
// pixel.
template <class Visit>
inline void for_segments(const MapView& map, const StatisticsGeometry& geo, int64_t pixel, int64_t pixels,
                         Visit visit) {
  if (map.stride_h == geo.width * map.stride_w) {
    visit(pixel * map.stride_w, int64_t{0}, pixels);
    return;
  }
  int64_t y = pixel / geo.width, x = pixel % geo.width;
  for (int64_t done = 0; done < pixels;) {
    const int64_t count = at_most(geo.width - x, pixels - done);
    visit(y * map.stride_h + x * map.stride_w, done, count);
    done += count;
    x = 0;
    ++y;
  }
}

template <class S, class T>
void load_block(const MapView& map, const StatisticsGeometry& geo, int64_t image, const Block& block, bool fastest,
                T* out) {
  const S* base = static_cast<const S*>(map.data) + image * map.stride_n + block.channel * map.stride_c;
  for_segments(map, geo, block.pixel, block.pixels, [&](int64_t offset, int64_t first, int64_t count) {
    if (fastest) {
      if (map.stride_w == block.channels) {  // all channels: the segment is one run
        const S* from = base + offset;
        T* to = out + first * block.channels;
#pragma omp simd
        for (int64_t i = 0; i < count * block.channels; ++i) to[i] = static_cast<T>(widen(from[i]));
        return;
      }
      for (int64_t p = 0; p < count; ++p) {
        const S* from = base + offset + p * map.stride_w;
        T* to = out + (first + p) * block.channels;
        for (int64_t c = 0; c < block.channels; ++c) to[c] = static_cast<T>(widen(from[c]));
      }
      return;
    }
    for (int64_t c = 0; c < block.channels; ++c) {
      const S* from = base + c * map.stride_c + offset;
      T* to = out + c * block.pixels + first;
      if (map.stride_w == 1) {
#pragma omp simd
        for (int64_t p = 0; p < count; ++p) to[p] = static_cast<T>(widen(from[p]));
      } else {
        for (int64_t p = 0; p < count; ++p) to[p] = static_cast<T>(widen(from[p * map.stride_w]));
      }
    }
  });
}

template <class T>
void load_block(const MapView& map, const StatisticsGeometry& geo, int64_t image, const Block& block, bool fastest,
                T* out) {
  switch (map.element) {
    case Element::float64:
      return load_block<double, T>(map, geo, image, block, fastest, out);
    case Element::float32:
      return load_block<float, T>(map, geo, image, block, fastest, out);
    case Element::bfloat16:
      return load_block<BFloat16, T>(map, geo, image, block, fastest, out);
    case Element::float16:
      return load_block<Float16, T>(map, geo, image, block, fastest, out);
  }
}

template <class T>
void store_block(const MapView& map, const StatisticsGeometry& geo, int64_t image, const Block& block, bool fastest,
                 const T* in) {
  T* base = static_cast<T*>(const_cast<void*>(map.data)) + image * map.stride_n + block.channel * map.stride_c;
  for_segments(map, geo, block.pixel, block.pixels, [&](int64_t offset, int64_t first, int64_t count) {
    for (int64_t c = 0; c < block.channels; ++c) {
      T* to = base + c * map.stride_c + offset;
      const T* from = fastest ? in + first * block.channels + c : in + c * block.pixels + first;
      const int64_t step = fastest ? block.channels : 1;
      if (step == 1 && map.stride_w == 1) {
        std::memcpy(to, from, count * sizeof(T));
      } else {
        for (int64_t p = 0; p < count; ++p) to[p * map.stride_w] = from[p * step];
      }
    }
  });
}

// Whether a block's runs lie in memory as the kernels want them, so that no copy is needed: T, pixels adjacent.
template <class T>
bool in_place(const MapView& map, const StatisticsGeometry& geo, bool fastest) {
  const Element own = sizeof(T) == 8 ? Element::float64 : Element::float32;
  return !fastest && map.element == own && map.stride_w == 1 && map.stride_h == geo.width;
}

// The runs of one image's part of a block: in place where possible, otherwise loaded into `buffer`.
template <class T>
class Runs {
 public:
  Runs(const MapView& map, const StatisticsGeometry& geo, int64_t image, const Block& block, bool fastest, T* buffer) {
    if (in_place<T>(map, geo, fastest)) {
      first_ = static_cast<const T*>(map.data) + image * map.stride_n + block.channel * map.stride_c + block.pixel;
      step_ = map.stride_c;
    } else {
      load_block(map, geo, image, block, fastest, buffer);
      first_ = buffer;
      step_ = shape_of(fastest, block.pixels, block.channels).length;
    }
  }
  const T* operator[](int64_t run) const { return first_ + run * step_; }

 private:
  const T* first_;
  int64_t step_;
};

// The mask of a run: the pixels' own values, or each repeated for its channels.
template <class T>
const T* run_mask(const T* mask, const Block& block, bool fastest, T* repeated) {
  if (!fastest) return mask + block.pixel;
  for (int64_t p = 0; p < block.pixels; ++p) {
    for (int64_t c = 0; c < block.channels; ++c) repeated[p * block.channels + c] = mask[block.pixel + p];
  }
  return repeated;
}

// ---- products -------------------------------------------------------------------------------------------------------

// gram[i][j] += rows i … i+3 of p times rows j … of p, over `row` elements.
template <class T>
void gram_tile(const T* p_i, const T* p_j, int64_t pitch, int64_t row, double* gram, int64_t gram_pitch) {
  Vector<T> sum[kTileI][kTileJ] = {};
  for (int64_t e = 0; e < row; e += kLanes<T>) {
    Vector<T> right[kTileJ];
    for (int j = 0; j < kTileJ; ++j) right[j] = load(p_j + j * pitch + e);
    for (int i = 0; i < kTileI; ++i) {
      const Vector<T> left = load(p_i + i * pitch + e);
      for (int j = 0; j < kTileJ; ++j) sum[i][j] += left * right[j];
    }
  }
  constexpr int kSums = kTileI * kTileJ;
  static_assert(kSums % kLanes<T> == 0, "a tile's sums fill whole vectors");
  T total[kSums];
  for (int k = 0; k < kSums; k += kLanes<T>) store(total + k, lane_sums<T>(&sum[0][0] + k));
  for (int i = 0; i < kTileI; ++i) {
    for (int j = 0; j < kTileJ; ++j) gram[i * gram_pitch + j] += static_cast<double>(total[i * kTileJ + j]);
  }
}

template <class T>
void add_gram(const T* packed, int64_t rows, int64_t pitch, int64_t row, double* gram) {
  for (int64_t i = 0; i < rows; i += kTileI) {
    for (int64_t j = i / kTileJ * kTileJ; j < rows; j += kTileJ) {
      gram_tile(packed + i * pitch, packed + j * pitch, pitch, row, gram + i * rows + j, rows);
    }
  }
}

// out [rows, row] = sym [rows, images] · packed [images, row].
template <class T>
void multiply(const T* sym, const T* packed, int64_t images, int64_t rows, int64_t pitch, int64_t row, T* out) {
  constexpr int64_t kStep = kTileE * kLanes<T>;
  for (int64_t e = 0; e < row; e += kStep) {
    for (int64_t i = 0; i < rows; i += kTileI) {
      Vector<T> sum[kTileI][kTileE] = {};
      for (int64_t j = 0; j < images; ++j) {
        Vector<T> right[kTileE];
        for (int k = 0; k < kTileE; ++k) right[k] = load(packed + j * pitch + e + k * kLanes<T>);
        for (int r = 0; r < kTileI; ++r) {
          const T left = sym[(i + r) * images + j];
          for (int k = 0; k < kTileE; ++k) sum[r][k] += left * right[k];
        }
      }
      for (int r = 0; r < kTileI; ++r) {
        for (int k = 0; k < kTileE; ++k) store(out + (i + r) * pitch + e + k * kLanes<T>, sum[r][k]);
      }
    }
  }
}

template <class Visit>
void for_blocks(const StatisticsGeometry& geo, const StatisticsBlocks& b, int64_t from, int64_t to, Visit visit) {
  for (int64_t pixel = from; pixel < to; pixel += b.block_pixels) {
    const int64_t pixels = at_most(b.block_pixels, to - pixel);
    for (int64_t channel = 0; channel < geo.channels; channel += b.block_channels) {
      visit(Block{pixel, pixels, channel, at_most(b.block_channels, geo.channels - channel)});
    }
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
int64_t forward_scratch_bytes(const StatisticsGeometry& geo) {
  const StatisticsBlocks b = blocks<T>(geo);
  const int64_t packed = round_up(b.padded_images * b.row * sizeof(T), 64);
  return (geo.background_grams ? 4 : 2) * packed + 2 * round_up(b.row * sizeof(T), 64);
}

template <class T>
void forward(const StatisticsGeometry& geo, const StatisticsInputs<T>& in, int64_t from, int64_t to, double* grams,
             Moments* moments, void* scratch_bytes) {
  const StatisticsBlocks b = blocks<T>(geo);
  const int64_t rows = b.padded_images, pixels_all = geo.height * geo.width, gram_size = rows * rows;
  char* scratch = static_cast<char*>(scratch_bytes);
  T* loaded = take<T>(scratch, b.row);
  T* repeated = take<T>(scratch, b.row);
  const int count = geo.background_grams ? 4 : 2;
  T* packed[4];
  for (int k = 0; k < count; ++k) {
    packed[k] = take<T>(scratch, rows * b.row);
    std::memset(packed[k], 0, rows * b.row * sizeof(T));  // rows and elements of padding stay zero
  }
  const bool fastest_vjp = channels_fastest(in.vjp, geo), fastest_x = channels_fastest(in.x, geo);

  for_blocks(geo, b, from, to, [&](const Block& block) {
    const int64_t elements = block.pixels * block.channels;
    const int64_t row = round_up(elements, kLanes<T>);
    for (int64_t n = 0; n < geo.images; ++n) {
      const T* mask = in.mask + n * pixels_all;
      T* a = packed[0] + n * b.row;
      T* v_row = geo.background_grams ? packed[2] + n * b.row : nullptr;
      const Runs<T> vjp(in.vjp, geo, n, block, fastest_vjp, loaded);
      Shape shape = shape_of(fastest_vjp, block.pixels, block.channels);
      const T* m = run_mask(mask, block, fastest_vjp, repeated);
      double sum_v = 0, sum_r = 0;
      for (int64_t run = 0; run < shape.runs; ++run) {
        const T* r = vjp[run];
        T* to_a = a + run * shape.length;
#pragma omp simd reduction(+ : sum_v, sum_r)
        for (int64_t i = 0; i < shape.length; ++i) {
          to_a[i] = r[i] * m[i];
          sum_v += static_cast<double>(r[i] * (T(1) - m[i]));
          sum_r += static_cast<double>(r[i]);
        }
      }
      // Second pass over a block in L1: R² is 1e-9 … 1e-20, so mean² - mean of squares would cancel.
      const double mean_v = sum_v / static_cast<double>(elements), mean_r = sum_r / static_cast<double>(elements);
      double m2_v = 0, m2_r = 0;
      for (int64_t run = 0; run < shape.runs; ++run) {
        const T* r = vjp[run];
#pragma omp simd reduction(+ : m2_v, m2_r)
        for (int64_t i = 0; i < shape.length; ++i) {
          const double v = static_cast<double>(r[i] * (T(1) - m[i])) - mean_v;
          const double w = static_cast<double>(r[i]) - mean_r;
          m2_v += v * v;
          m2_r += w * w;
        }
        if (v_row) {
          for (int64_t i = 0; i < shape.length; ++i) v_row[run * shape.length + i] = r[i] * (T(1) - m[i]);
        }
      }
      merge(moments[2 * n], {static_cast<double>(elements), mean_v, m2_v});
      merge(moments[2 * n + 1], {static_cast<double>(elements), mean_r, m2_r});

      T* x_row = packed[1] + n * b.row;
      const Runs<T> input(in.x, geo, n, block, fastest_x, loaded);
      shape = shape_of(fastest_x, block.pixels, block.channels);
      if (fastest_x != fastest_vjp) m = run_mask(mask, block, fastest_x, repeated);
      for (int64_t run = 0; run < shape.runs; ++run) {
        const T* x = input[run];
        T* to_b = x_row + run * shape.length;
#pragma omp simd
        for (int64_t i = 0; i < shape.length; ++i) to_b[i] = x[i] * m[i];
        if (geo.background_grams) {
          T* to_c = packed[3] + n * b.row + run * shape.length;
#pragma omp simd
          for (int64_t i = 0; i < shape.length; ++i) to_c[i] = x[i] * (T(1) - m[i]);
        }
      }
      for (int k = 0; k < count; ++k) {
        for (int64_t i = elements; i < row; ++i) packed[k][n * b.row + i] = 0;  // a longer block was here before
      }
    }
    for (int k = 0; k < count; ++k) add_gram(packed[k], rows, b.row, row, grams + k * gram_size);
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
int64_t backward_scratch_bytes(const StatisticsGeometry& geo) {
  const StatisticsBlocks b = blocks<T>(geo);
  const int64_t packed = round_up(b.padded_images * b.row * sizeof(T), 64);
  return (geo.background_grams ? 4 : 2) * packed + 5 * round_up(b.row * sizeof(T), 64);
}

// Adds a channels-fastest block's gradient of the mask, summed over the channels of each pixel.
template <class T>
void add_to_mask(const T* terms, const Block& block, T* to) {
  for (int64_t p = 0; p < block.pixels; ++p) {
    T sum = 0;
    for (int64_t c = 0; c < block.channels; ++c) sum += terms[p * block.channels + c];
    to[p] += sum;
  }
}

// One map's share (vjp or x): packs its masked rows, multiplies, and turns the products into gradients.
//   grad_map = M·(S a) + (1-M)·grad_v + whole-map term        grad_mask += Σ_c map·(S a - grad_v)
// grad_v is the background Gram's S v plus, for vjp, the variance's scale·(v - mean).
template <class T>
void backward_map(const StatisticsGeometry& geo, const StatisticsBlocks& b, const MapView& map, const T* mask_all,
                  const T* sym, const T* sym_background, const VarianceGrad* variance, const MapView& grad,
                  T* grad_mask, const Block& block, char* scratch) {
  const int64_t rows = b.padded_images, pixels_all = geo.height * geo.width;
  const bool fastest = channels_fastest(map, geo);
  const Shape shape = shape_of(fastest, block.pixels, block.channels);
  const int64_t elements = block.pixels * block.channels;
  const int64_t row = round_up(elements, kTileE * kLanes<T>);
  T* packed = take<T>(scratch, rows * b.row);
  T* product = take<T>(scratch, rows * b.row);
  T* packed_background = sym_background ? take<T>(scratch, rows * b.row) : nullptr;
  T* product_background = sym_background ? take<T>(scratch, rows * b.row) : nullptr;
  T* loaded = take<T>(scratch, b.row);
  T* repeated = take<T>(scratch, b.row);
  T* out = take<T>(scratch, b.row);
  T* terms = take<T>(scratch, b.row);
  T* zeros = take<T>(scratch, b.row);
  if (!sym_background) std::memset(zeros, 0, elements * sizeof(T));
  const bool write_in_place = grad.data && in_place<T>(grad, geo, fastest);

  for (int64_t n = 0; n < geo.images; ++n) {
    const Runs<T> values(map, geo, n, block, fastest, loaded);
    const T* m = run_mask(mask_all + n * pixels_all, block, fastest, repeated);
    for (int64_t run = 0; run < shape.runs; ++run) {
      const T* value = values[run];
      T* to = packed + n * b.row + run * shape.length;
#pragma omp simd
      for (int64_t i = 0; i < shape.length; ++i) to[i] = value[i] * m[i];
      if (sym_background) {
        T* to_background = packed_background + n * b.row + run * shape.length;
#pragma omp simd
        for (int64_t i = 0; i < shape.length; ++i) to_background[i] = value[i] * (T(1) - m[i]);
      }
    }
    for (int64_t i = elements; i < row; ++i) {
      packed[n * b.row + i] = 0;
      if (sym_background) packed_background[n * b.row + i] = 0;
    }
  }
  multiply(sym, packed, geo.images, rows, b.row, row, product);
  if (sym_background) multiply(sym_background, packed_background, geo.images, rows, b.row, row, product_background);

  for (int64_t n = 0; n < geo.images; ++n) {
    const Runs<T> values(map, geo, n, block, fastest, loaded);
    T* written = write_in_place ? static_cast<T*>(const_cast<void*>(grad.data)) + n * grad.stride_n +
                                      block.channel * grad.stride_c + block.pixel
                                : out;
    const int64_t written_step = write_in_place ? grad.stride_c : shape.length;
    T* mask_sum = grad_mask && !fastest ? grad_mask + n * pixels_all + block.pixel : nullptr;
    const T* m = run_mask(mask_all + n * pixels_all, block, fastest, repeated);
    const T scale_v = variance ? static_cast<T>(variance[n].background_scale) : T(0);
    const T mean_v = variance ? static_cast<T>(variance[n].background_mean) : T(0);
    const T scale_r = variance ? static_cast<T>(variance[n].vjp_scale) : T(0);
    const T mean_r = variance ? static_cast<T>(variance[n].vjp_mean) : T(0);
    for (int64_t run = 0; run < shape.runs; ++run) {
      const int64_t first = run * shape.length;
      const T* value = values[run];
      const T* inside = product + n * b.row + first;
      const T* outside = sym_background ? product_background + n * b.row + first : zeros + first;
      T* to = written + run * written_step;
      T* term = terms + first;
#pragma omp simd
      for (int64_t i = 0; i < shape.length; ++i) {
        const T rest = T(1) - m[i];
        const T grad_v = outside[i] + scale_v * (value[i] * rest - mean_v);
        to[i] = m[i] * inside[i] + rest * grad_v + scale_r * (value[i] - mean_r);
        term[i] = value[i] * (inside[i] - grad_v);
      }
      if (mask_sum) {
#pragma omp simd
        for (int64_t i = 0; i < shape.length; ++i) mask_sum[i] += term[i];
      }
    }
    if (grad.data && !write_in_place) store_block(grad, geo, n, block, fastest, out);
    if (grad_mask && fastest) add_to_mask(terms, block, grad_mask + n * pixels_all + block.pixel);
  }
}

template <class T>
void backward(const StatisticsGeometry& geo, const StatisticsInputs<T>& in, const StatisticsGrads<T>& grads,
              int64_t from, int64_t to, void* scratch_bytes) {
  const StatisticsBlocks b = blocks<T>(geo);
  const int64_t pixels_all = geo.height * geo.width;
  char* scratch = static_cast<char*>(scratch_bytes);
  if (grads.grad_mask) {
    for (int64_t n = 0; n < geo.images; ++n) {
      std::memset(grads.grad_mask + n * pixels_all + from, 0, (to - from) * sizeof(T));
    }
  }
  for_blocks(geo, b, from, to, [&](const Block& block) {
    if (grads.grad_vjp.data || grads.grad_mask) {
      backward_map(geo, b, in.vjp, in.mask, grads.sym_vjp, grads.sym_background_vjp, grads.variance, grads.grad_vjp,
                   grads.grad_mask, block, scratch);
    }
    if (grads.grad_x.data || grads.grad_mask) {
      backward_map<T>(geo, b, in.x, in.mask, grads.sym_x, grads.sym_background_x, nullptr, grads.grad_x,
                      grads.grad_mask, block, scratch);
    }
  });
}

template <class T>
constexpr StatisticsKernels<T> kTable = {
    blocks<T>, forward_scratch_bytes<T>, backward_scratch_bytes<T>, forward<T>, backward<T>,
};

}  // namespace

SIB_FAST_DEFINE_TABLE(StatisticsKernels, statistics_kernels, float)
SIB_FAST_DEFINE_TABLE(StatisticsKernels, statistics_kernels, double)

}  // namespace sib_fast::cpu
