// Attention by channel and by position of channels_last maps on the CPU, in passes over the map: what passes between
// the bindings and their kernels.
#pragma once

#include <cstdint>

#include "cpu/isa_dispatch.h"

namespace bti_fast {

// Positions [k * positions / part_count, ..) of a sample are its part k; its sums over channels are its own.
struct DualPathParts {
  float* sums;  // [batch, part_count, channels]
  int64_t part_count;
};

struct DualPathSummary {
  const float* x;  // [batch, positions, channels]
  float* summary;  // [batch, positions, 2]: the largest of the channels, and their mean
  int64_t positions, channels;
  DualPathParts parts;  // of x
};

struct DualPathSummaryGradient {
  float* grad;  // [batch, positions, channels], added to
  const float *x, *summary;
  const float* grad_pooled;   // [batch, channels], of the mean over the positions
  const float* grad_summary;  // [batch, positions, 2]
  int64_t positions, channels;
};

struct DualPathGate {
  const float *x, *channel, *spatial;  // [batch, positions, channels], [batch, channels], [batch, positions]
  const float* skip;                   // like x, or none: relu(gated + skip) instead of the gated map
  float* out;
  int64_t positions, channels;
};

struct DualPathGateGradient {
  const float *grad, *x, *channel, *spatial;
  const float* out;                            // what came of it, where a skip was added
  float *grad_x, *grad_spatial, *grad_skip;    // grad_skip where there is `out`
  int64_t positions, channels;
  DualPathParts parts;  // of the gradient of `channel`
};

// Parts [begin, end) of batch * part_count.
BTI_FAST_KERNEL(void, dual_path_summary, (const DualPathSummary& job, int64_t begin, int64_t end))
BTI_FAST_KERNEL(void, dual_path_gate_gradient, (const DualPathGateGradient& job, int64_t begin, int64_t end))
// Rows [begin, end) of batch * positions.
BTI_FAST_KERNEL(void, dual_path_summary_gradient, (const DualPathSummaryGradient& job, int64_t begin, int64_t end))
BTI_FAST_KERNEL(void, dual_path_gate, (const DualPathGate& job, int64_t begin, int64_t end))

}  // namespace bti_fast
