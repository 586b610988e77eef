// How the statistics kernels read a map of any strides and element type: quads of 4 elements, copied to shared memory
// by the thread that will use them first, so that only finished operands need a barrier.
#pragma once

#include "cuda/region_statistics_math.cuh"

namespace sib_fast::cuda {

enum class Element : int { float32, float64, bfloat16, float16 };

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
    copy_async_16(slot, from, valid);
    copy_async_16(slot + 2, from + 2, valid);
  } else if (map.element == Element::float32) {
    copy_async_16(slot, static_cast<const float*>(map.data) + offset, valid);
  } else {
    copy_async_8(slot, static_cast<const uint16_t*>(map.data) + offset, valid);
  }
}
// Element i of a quad.
template <class T>
__device__ __forceinline__ void copy_one(const Map& map, int64_t offset, bool valid, T* slot, int i) {
  if (sizeof(T) == 8) {
    copy_async_8(slot + i, static_cast<const double*>(map.data) + offset, valid);
  } else if (map.element == Element::float32) {
    copy_async_4(slot + i, static_cast<const float*>(map.data) + offset, valid);
  } else {  // no asynchronous copy of two bytes exists; the reader is this thread
    reinterpret_cast<uint16_t*>(slot)[i] = valid ? static_cast<const uint16_t*>(map.data)[offset] : uint16_t(0);
  }
}
template <class T>
__device__ __forceinline__ void copy_mask_quad(const T* from, bool valid, T* slot) {
  copy_async_16_cached(slot, from, valid);
  if (sizeof(T) == 8) copy_async_16_cached(slot + 2, from + 2, valid);
}
template <class T>
__device__ __forceinline__ void copy_mask_one(const T* from, bool valid, T* slot) {
  if (sizeof(T) == 8)
    copy_async_8(slot, from, valid);
  else
    copy_async_4(slot, from, valid);
}

// A copied quad, widened.
template <class T>
__device__ __forceinline__ void widen_quad(const T* slot, Element element, T (&to)[4]) {
  if (sizeof(T) == 8 || element == Element::float32) {
    load_quad(slot, to);
    return;
  }
  const uint2 bits = *reinterpret_cast<const uint2*>(slot);
  const uint32_t word[2] = {bits.x, bits.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint16_t half = static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16));
    to[i] =
        element == Element::bfloat16
            ? static_cast<T>(__uint_as_float(static_cast<uint32_t>(half) << 16))
            : static_cast<T>(static_cast<float>(torch::headeronly::Half(half, torch::headeronly::Half::from_bits())));
  }
}

// Waits until at most `pending` of this thread's committed groups are under way.
__device__ __forceinline__ void wait_for_copies(int pending) {
  switch (pending) {
    case 1:
      return copy_async_wait<1>();
    case 2:
      return copy_async_wait<2>();
    case 3:
      return copy_async_wait<3>();
    default:
      return copy_async_wait<0>();
  }
}
constexpr int kMaxStages = 5;

}  // namespace sib_fast::cuda
