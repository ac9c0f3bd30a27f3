// Gradient of the weight of a depthwise convolution of channels_last maps on the CPU: what passes between the binding
// and its kernels.
#pragma once

#include <cstdint>

#include "cpu/isa_dispatch.h"

namespace bti_fast {

struct DilatedDepthwiseWeight {
  const float *grad, *x;  // [batch, height, width, channels]
  float* parts;           // [part_count, kernel * kernel, channels]: sums over a share of the maps' rows each
  int64_t batch, channels, height, width;
  int64_t kernel, dilation;         // kernel is 3 or 5; zeros around the map keep its size
  int64_t part_count, block_count;  // blocks of channels; from two on, each is longer than any vector
};

// Tasks [begin, end) of part_count * block_count; each writes its channels of its part.
BTI_FAST_KERNEL(void, dilated_depthwise_weight, (const DilatedDepthwiseWeight& job, int64_t begin, int64_t end))

}  // namespace bti_fast
