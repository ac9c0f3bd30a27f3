// gated_fusion on the CPU: what passes between the binding and its kernels.
#pragma once

#include "cpu/feature_map.h"
#include "cpu/isa_dispatch.h"

namespace bti_fast {

// A linear head whose product with x, in float32, the logits are.
struct FusionHead {
  const float* weight;       // (K, C), or nullptr: the logits are given
  const float* bias;         // (K,)
  const float* grad_logits;  // backward: (B, K, P), what reaches the logits beside the entropy
};

struct FusionForward {
  FeatureMap x, out, logits;  // x and out in one order; with a head the logits are written
  Order order;
  Tiles tiles;
  const float* prior;            // (B, C)
  const float* cls_uncertainty;  // (B,)
  const float* coeffs;           // (3,)
  float tau;
  FusionHead head;
  float* u;     // (B, P)
  float* sums;  // (B, tiles, C + 2): per channel sum_p w x, then sum_p w, sum_p u
};

struct FusionBackward {
  FeatureMap x, grad_out, grad_x, logits, grad_logits;  // the first three in one order
  Order order;
  Tiles tiles;
  const float* prior;
  const float* cls_uncertainty;
  const float* coeffs;
  float tau;
  FusionHead head;
  const float* grad_pooled;  // (B, C)
  const float* grad_mean;    // (B,)
  const float* grad_u;       // (B, P)
  const float* inverse;      // (B,): 1 / sum_p w
  const float* constant;     // (B,): sum_c grad_pooled pooled / sum_p w, which every pixel's grad u contains
  int64_t width;
  float* sums;  // (B, tiles, width): grad prior per channel, sum e, sum e u (see the kernel), then the head's gradients
};

// Tiles [begin, end) of all samples, sample after sample; every tile writes its own row of sums.
BTI_FAST_KERNEL(void, fusion_forward, (const FusionForward& job, int64_t begin, int64_t end))
BTI_FAST_KERNEL(void, fusion_backward, (const FusionBackward& job, int64_t begin, int64_t end))

}  // namespace bti_fast
