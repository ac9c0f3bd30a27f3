// task_interaction's passes over the feature map on the CPU: what passes between the binding and its kernels.
#pragma once

#include "cpu/feature_map.h"
#include "cpu/isa_dispatch.h"

namespace bti_fast {

// The spatial axes of more than one pixel. A pixel's next neighbour along axis a is `stride[a]` pixels on, and exists
// where exists[a][p] is -1 (else 0); readable from p = -stride[a] to `pixels` + 63, as zero outside of the map.
struct Axes {
  int count;
  int64_t stride[3];
  const int32_t* exists[3];
};

// Hidden units in fours: how many bytes hold the signs of one pixel.
inline int64_t groups_of_four(int64_t hidden) { return (hidden + 3) / 4; }

// Signs of the hidden map, [batch][block of kSignBlock pixels][group of four][kSignBlock]: bit j of a byte, times half
// the lanes of the instruction set, says that unit 4 group + j is active at that pixel.
constexpr int64_t kSignBlock = 32;

struct InteractionPass {
  FeatureMap x, out;   // forward: x'; backward: grad x
  FeatureMap grad_out; // backward only
  Order order;
  Axes axes;
  Tiles tiles;
  int64_t hidden;
  const float* weight;  // (H, C)
  const float* bias;    // (H,)
  bool complexity;      // whether differences between neighbours count

  // Statistics of tile t of sample b, row (b, t) of width C + H + 1:
  //   forward   sum_p x, sum_p relu(hidden), sum |differences|
  //   backward  sum_p x grad_out, number of active pixels of each hidden unit, 0
  float* sums;
  uint8_t* signs;  // backward only

  const float* scale;  // (B, C): x' = x (1 + scale)

  // The last pass backward: grad x = grad_out (1 + scale) + shift + W1^T (active * hidden_grad) + difference_grad *
  // the derivative of the summed differences.
  const float* shift;            // (B, C)
  const float* hidden_grad;      // (B, H)
  const float* difference_grad;  // (B,)
  Tiles runs;                    // pixels that share one table
  int64_t parts, channel_block;  // tasks: parts x blocks of channels
  float* grad_weight;            // (parts, H, C), zero at first
};

// Tiles [begin, end) of all samples, sample after sample.
BTI_FAST_KERNEL(void, interaction_statistics, (const InteractionPass& pass, int64_t begin, int64_t end))
BTI_FAST_KERNEL(void, interaction_apply, (const InteractionPass& pass, int64_t begin, int64_t end))
BTI_FAST_KERNEL(void, interaction_backward_statistics, (const InteractionPass& pass, int64_t begin, int64_t end))
// Tasks [begin, end): task = part * blocks of channels + block. Each owns its channels of its part.
BTI_FAST_KERNEL(void, interaction_gradient, (const InteractionPass& pass, int64_t begin, int64_t end))

}  // namespace bti_fast
