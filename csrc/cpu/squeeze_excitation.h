// The gate of a squeeze-and-excitation on the CPU: what passes between the binding and its kernels.
#pragma once

#include <cstdint>

#include "cpu/isa_dispatch.h"

namespace bti_fast {

struct SqueezeExcitation {
  const float* sums;           // [batch, rows, channels], whose sum is over all positions
  int64_t rows, channels, hidden_channels, positions;
  const float* reduce;         // [hidden_channels, channels]
  const float* reduce_bias;    // [hidden_channels]
  const float* expand;         // [hidden_channels, channels]
  const float* expand_bias;    // [channels]
  float* mean;                 // [batch, channels]
  float* hidden;               // [batch, hidden_channels]: silu(reduce mean + reduce_bias)
  float* gate;                 // [batch, channels]: sigmoid(expand hidden + expand_bias)
  int64_t channels_per_task, hidden_per_task;
};

// One after the other, each over tasks [begin, end) of all samples; a sample's are in parts of so many channels. Every
// value is computed alone, so any division among threads gives the same bits.
BTI_FAST_KERNEL(void, squeeze_mean, (const SqueezeExcitation& job, int64_t begin, int64_t end))
BTI_FAST_KERNEL(void, squeeze_hidden, (const SqueezeExcitation& job, int64_t begin, int64_t end))
BTI_FAST_KERNEL(void, squeeze_gate, (const SqueezeExcitation& job, int64_t begin, int64_t end))

}  // namespace bti_fast
