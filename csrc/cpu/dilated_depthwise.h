// Depthwise convolution of channels_last maps on the CPU: what passes between the binding and its kernel.
#pragma once

#include <cstdint>

#include "cpu/isa_dispatch.h"

namespace bti_fast {

struct DilatedDepthwise {
  const float* x;       // [batch, height, width, channels]
  const float* weight;  // [kernel * kernel, channels]
  const float* scale;   // [channels] of the convolution, or nullptr
  const float* bias;    // [channels], added to it, or nullptr
  float* out;           // [batch, out_height, out_width, channels]
  float* sums;          // [batch, out_height, channels] over each row of out, or nullptr
  int64_t channels, height, width;
  int64_t kernel, dilation;       // kernel is 3 or 5; zeros around the map
  int64_t stride;                 // where it is not 1, the dilation is
  int64_t out_height, out_width;  // at stride 1 those of x
  int64_t top, left;              // of the map, at a larger stride: how many zeros lie before it
  bool silu;                      // whether out is silu of the sum
};

// Divides the rows of all samples among the threads.
void run(const DilatedDepthwise& job, int64_t batch);

// Rows [begin, end) of all samples' rows of the result; each is computed alone, so any division among threads gives
// the same bits.
BTI_FAST_KERNEL(void, dilated_depthwise, (const DilatedDepthwise& job, int64_t begin, int64_t end))

}  // namespace bti_fast
