// How the statistics kernels read a map of any strides and element type: quads of 4 elements, copied to shared memory
// by the thread that will use them first, so that only finished operands need a barrier.
#pragma once

#include "cuda/region_statistics_math.cuh"

namespace sib_fast::cuda {

// planes: chunks of K pixels of one channel; the channels of a chunk of pixels follow each other, so that its mask
// stays in L1. flat: an image is one run of memory, in its own order. scattered: every element by its strides.
enum class Order : int { planes, flat, scattered };

struct Map {
  const void* data;
  int64_t stride_n, stride_c, stride_h, stride_w;  // in elements
  Element element;
  Order order;            // of the forward's elements
  bool vector;            // quads of `order` may be copied whole
  bool channels_fastest;  // flat and scattered: which of channel and pixel runs fastest
  bool pixel_quads;       // four neighbouring pixels, from a multiple of 4 on, may be copied whole (backward)
  bool planar;            // pixel p of a channel lies at p·stride_w
};

struct Shape {
  int64_t images, channels, width, pixels, elements;  // elements = channels·pixels
};

template <class T>
struct Pixels {
  Shape shape;
  const T* mask;  // [N, P]
};

__device__ __forceinline__ int64_t pixel_offset(const Map& map, int64_t width, int64_t p) {
  if (map.planar) return p * map.stride_w;
  const int64_t y = static_cast<uint32_t>(p) / static_cast<uint32_t>(width);
  return y * map.stride_h + (p - y * width) * map.stride_w;
}

template <class T>
__device__ __forceinline__ T value_at(const Map& map, int64_t offset) {
  switch (map.element) {
    case Element::float64:
      return static_cast<T>(static_cast<const double*>(map.data)[offset]);
    case Element::bfloat16:
      return static_cast<T>(static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(map.data)[offset]));
    case Element::float16:
      return static_cast<T>(static_cast<float>(static_cast<const torch::headeronly::Half*>(map.data)[offset]));
    default:
      return static_cast<T>(static_cast<const float*>(map.data)[offset]);
  }
}

// Four elements from `offset` on, or zeros, to the start of a quad's slot, in the map's own type.
template <class T>
__device__ __forceinline__ void copy_quad(const Map& map, int64_t offset, bool valid, T* slot) {
  if (sizeof(T) == 8) {
    const double* from = static_cast<const double*>(map.data) + offset;
    copy_async<16>(slot, from, valid);
    copy_async<16>(slot + 2, from + 2, valid);
  } else if (map.element == Element::float32) {
    copy_async<16>(slot, static_cast<const float*>(map.data) + offset, valid);
  } else {
    copy_async<8>(slot, static_cast<const uint16_t*>(map.data) + offset, valid);
  }
}
// Element i of a quad.
template <class T>
__device__ __forceinline__ void copy_one(const Map& map, int64_t offset, bool valid, T* slot, int i) {
  if (sizeof(T) == 8) {
    copy_async<8>(slot + i, static_cast<const double*>(map.data) + offset, valid);
  } else if (map.element == Element::float32) {
    copy_async<4>(slot + i, static_cast<const float*>(map.data) + offset, valid);
  } else {  // no asynchronous copy of two bytes exists; the reader is this thread
    reinterpret_cast<uint16_t*>(slot)[i] = valid ? static_cast<const uint16_t*>(map.data)[offset] : uint16_t(0);
  }
}
// The mask's, through L1: it is read once a channel.
template <class T>
__device__ __forceinline__ void copy_mask_quad(const T* from, bool valid, T* slot) {
  copy_async<16, true>(slot, from, valid);
  if (sizeof(T) == 8) copy_async<16, true>(slot + 2, from + 2, valid);
}
template <class T>
__device__ __forceinline__ void copy_mask_one(const T* from, bool valid, T* slot) {
  copy_async<sizeof(T)>(slot, from, valid);
}

// A copied quad, widened.
template <class T>
__device__ __forceinline__ Pack<T, 4> widen_quad(const T* slot, Element element) {
  if (sizeof(T) == 8 || element == Element::float32) return load_pack<4>(slot);
  const auto halves = load_pack<4>(reinterpret_cast<const uint16_t*>(slot));
  Pack<T, 4> wide;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    using torch::headeronly::Half;
    const uint16_t bits = halves.value[i];
    wide.value[i] = element == Element::bfloat16 ? static_cast<T>(__uint_as_float(static_cast<uint32_t>(bits) << 16))
                                                 : static_cast<T>(static_cast<float>(Half(bits, Half::from_bits())));
  }
  return wide;
}

}  // namespace sib_fast::cuda
