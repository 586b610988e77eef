// Batch norm in training mode on the CPU, up to its second derivative (SPEC 10): the passes over activations.
//
// Formulas  common/batch_norm.h.
// Passes    one that sums, one that writes: 8 traversals of an activation for the second derivative.
// Layouts   channels first: a channel is `images` runs of `spatial`; channels last: a row holds every channel.
// Precision halves are widened to float where they are read and rounded once where they are written; sums in double.
// Order     a part is done by one thread in memory order: equal inputs give equal bits at any thread count.
// Twins     ops/batch_norm/reference.py is the truth.

#include "cpu/batch_norm_kernels.h"

#include "cpu/simd.h"

namespace sib_fast::cpu {
namespace {

// Values of the channel that an element is in: k[j] is the j-th. Channels first they are a few numbers, held in
// registers; channels last they are read beside the elements.
template <class T, int count>
struct OfChannel {
  T value[count];
  T operator[](int j) const { return value[j]; }
};
template <class T>
struct OfColumn {
  const T* first;
  int64_t stride, column;
  T operator[](int j) const { return first[j * stride + column]; }
};

// Calls visit(i, values of its channel) for every element i of the part.
template <int count, class T, class Visit>
inline void for_elements(const BatchNormPart& part, const T* k, Visit visit) {
  if (part.channels_last) {
    const int64_t channels = part.channels;
    for (int64_t row = part.begin; row < part.end; ++row) {
      const int64_t at = row * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) visit(at + c, OfColumn<T>{k, channels, c});
    }
    return;
  }
  OfChannel<T, count> of;
  for (int j = 0; j < count; ++j) of.value[j] = k[j];
  const int64_t spatial = part.spatial;
  for (int64_t n = 0; n < part.images; ++n) {
    const int64_t at = (n * part.channels + part.begin) * spatial;
#pragma omp simd
    for (int64_t i = at; i < at + spatial; ++i) visit(i, of);
  }
}

struct Two {
  double a, b;
};

// sums[k·stride + c] = Σ of the k-th of terms(i, centre of its channel). Channels first, a run has sums of its own
// before it joins the channel's.
template <class Terms>
inline void sum_two(const BatchNormPart& part, const double* centre, double* sums, Terms terms) {
  if (part.channels_last) {
    const int64_t channels = part.channels;
    double *a = sums, *b = sums + channels;
    for (int64_t c = 0; c < 2 * channels; ++c) sums[c] = 0;
    for (int64_t row = part.begin; row < part.end; ++row) {
      const int64_t at = row * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const Two t = terms(at + c, centre[c]);
        a[c] += t.a;
        b[c] += t.b;
      }
    }
    return;
  }
  const int64_t spatial = part.spatial;
  const double middle = centre[0];
  double a = 0, b = 0;
  for (int64_t n = 0; n < part.images; ++n) {
    const int64_t at = (n * part.channels + part.begin) * spatial;
    double run_a = 0, run_b = 0;
#pragma omp simd reduction(+ : run_a, run_b)
    for (int64_t i = at; i < at + spatial; ++i) {
      const Two t = terms(i, middle);
      run_a += t.a;
      run_b += t.b;
    }
    a += run_a;
    b += run_b;
  }
  sums[0] = a;
  sums[1] = b;
}
template <class Terms>
inline void sum_second(const BatchNormPart& part, const double* centre, double* sums, Terms terms) {
  if (part.channels_last) {
    const int64_t channels = part.channels;
    double *a = sums, *b = a + channels, *d = b + channels, *e = d + channels, *f = e + channels;
    for (int64_t c = 0; c < kSecondSums * channels; ++c) sums[c] = 0;
    for (int64_t row = part.begin; row < part.end; ++row) {
      const int64_t at = row * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const auto t = terms(at + c, centre[c]);
        a[c] += t.u;
        b[c] += t.ud;
        d[c] += t.ug;
        e[c] += t.g;
        f[c] += t.gd;
      }
    }
    return;
  }
  const int64_t spatial = part.spatial;
  const double middle = centre[0];
  for (int s = 0; s < kSecondSums; ++s) sums[s] = 0;
  for (int64_t n = 0; n < part.images; ++n) {
    const int64_t at = (n * part.channels + part.begin) * spatial;
    double run_a = 0, run_b = 0, run_d = 0, run_e = 0, run_f = 0;
#pragma omp simd reduction(+ : run_a, run_b, run_d, run_e, run_f)
    for (int64_t i = at; i < at + spatial; ++i) {
      const auto t = terms(i, middle);
      run_a += t.u;
      run_b += t.ud;
      run_d += t.ug;
      run_e += t.g;
      run_f += t.gd;
    }
    sums[0] += run_a;
    sums[1] += run_b;
    sums[2] += run_d;
    sums[3] += run_e;
    sums[4] += run_f;
  }
}

template <class E>
void sums_x(const BatchNormPart& part, const E* x, const double* pivot, double* sums) {
  sum_two(part, pivot, sums, [=](int64_t i, double centre) {
    const double d = static_cast<double>(get(x[i])) - centre;
    return Two{d, d * d};
  });
}

template <class E>
void sums_gy(const BatchNormPart& part, const E* gy, const E* x, const double* mean, double* sums) {
  sum_two(part, mean, sums, [=](int64_t i, double centre) {
    const double g = static_cast<double>(get(gy[i]));
    return Two{g, g * (static_cast<double>(get(x[i])) - centre)};
  });
}

template <class E>
void sums_u(const BatchNormPart& part, const E* u, const E* gy, const E* x, const double* mean, double* sums) {
  sum_second(part, mean, sums, [=](int64_t i, double centre) {
    return batch_norm_second_terms(static_cast<double>(get(u[i])), static_cast<double>(get(gy[i])),
                                   static_cast<double>(get(x[i])) - centre);
  });
}

template <class E>
void write_y(const BatchNormPart& part, const E* x, const Compute<E>* k, E* y) {
  for_elements<kForwardCoefficients>(part, k,
                                     [=](int64_t i, const auto& of) { put(y + i, batch_norm_y(get(x[i]), of)); });
}

template <class E>
void write_grad_x(const BatchNormPart& part, const E* gy, const E* x, const E* addend, const Compute<E>* k, E* grad_x) {
  const auto at = [=](int64_t i, const auto& of) { return batch_norm_grad_x(get(gy[i]), get(x[i]), of); };
  if (addend) {
    for_elements<kBackwardCoefficients>(
        part, k, [=](int64_t i, const auto& of) { put(grad_x + i, at(i, of) + get(addend[i])); });
  } else {
    for_elements<kBackwardCoefficients>(part, k, [=](int64_t i, const auto& of) { put(grad_x + i, at(i, of)); });
  }
}

template <class E>
void write_second(const BatchNormPart& part, const E* u, const E* gy, const E* x, const Compute<E>* k, E* to_grad_y,
                  E* to_x) {
  const auto y_at = [=](int64_t i, const auto& of) { return batch_norm_to_grad_y(get(u[i]), get(x[i]), of); };
  const auto x_at = [=](int64_t i, const auto& of) { return batch_norm_to_x(get(u[i]), get(gy[i]), get(x[i]), of); };
  if (to_grad_y && to_x) {
    for_elements<kSecondCoefficients>(part, k, [=](int64_t i, const auto& of) {
      put(to_grad_y + i, y_at(i, of));
      put(to_x + i, x_at(i, of));
    });
  } else if (to_grad_y) {
    for_elements<kSecondCoefficients>(part, k, [=](int64_t i, const auto& of) { put(to_grad_y + i, y_at(i, of)); });
  } else if (to_x) {
    for_elements<kSecondCoefficients>(part, k, [=](int64_t i, const auto& of) { put(to_x + i, x_at(i, of)); });
  }
}

template <class E>
constexpr BatchNormKernels<E> kTable = {sums_x<E>, sums_gy<E>, sums_u<E>, write_y<E>, write_grad_x<E>, write_second<E>};

}  // namespace

SIB_FAST_DEFINE_TABLES(BatchNormKernels, batch_norm_kernels)

}  // namespace sib_fast::cpu
