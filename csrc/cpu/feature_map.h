// A feature map as the kernels see it: batch, channels, and all spatial axes as one axis of pixels.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace bti_fast {

struct FeatureMap {
  void* data;
  Dtype dtype;
  int64_t batch, channels, pixels;
  int64_t batch_stride, channel_stride, pixel_stride;  // in elements
};

// Which axis of a map lies densely in memory: pixels (contiguous, stride 1) or channels (channels_last).
enum class Order : int { channel_major, pixel_major };

// Pixels in pieces of equal size, a multiple of `multiple` (the last one shorter).
struct Tiles {
  int64_t size, count;
};

}  // namespace bti_fast
