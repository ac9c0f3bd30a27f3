// task_interaction's dense algebra between the passes over x, on vectors: what passes between the host and its kernels.
#pragma once

#include <cstdint>

#include "cpu/isa_dispatch.h"

namespace bti_fast {

// A matrix (rows, cols) and vectors of every sample (batch, rows) or (batch, cols); v may be a part of longer rows.
struct DenseProduct {
  const float* matrix;
  int64_t rows, cols;
  const float* v;
  int64_t v_stride;
  const float* bias;  // (rows,) or null
  float* out;         // contiguous
};

// grad_matrix = sum_b grad_b v_b^T, grad_bias = sum_b grad_b.
struct DenseOuter {
  const float* grad;  // (batch, rows)
  int64_t rows, cols;
  const float* v;
  int64_t v_stride;
  float* grad_matrix;
  float* grad_bias;  // or null
};

// Rows or columns of one product in a unit of work.
constexpr int64_t kDenseUnit = 16;
inline int64_t dense_units(int64_t lines) { return (lines + kDenseUnit - 1) / kDenseUnit; }

// Everything about the vectors of one call, float32 and contiguous. B samples, C channels, F features, H = C/2 hidden,
// A aligned (64), N hidden units of the gate network (32).
struct Algebra {
  int64_t batch, channels, features, hidden, aligned, network;
  float tau;
  bool training;
  const float *xbar, *complexity;  // (B, C), (B,): parts of the summary
  int64_t summary_stride;
  const float* y;  // (B, F)
  const float *bn_weight, *bn_bias, *bn_mean, *bn_var;
  const float *gate1_weight, *gate1_bias, *gate2_weight, *gate2_bias;

  float *active, *normal, *ctx, *cls_gate, *delta;    // (B, F); active first holds W2 q + b2, cls_gate Wcg ctx + b
  float* used_inverse;                                // (F,): 1 / sqrt(var + eps) of the normalisation
  float *seg_gate, *prior, *message, *residual;       // (B, C); seg_gate, prior first hold sigmoid's argument
  float *seg_aligned, *cls_aligned;                   // (B, A)
  float *signals, *network_hidden, *gates;            // (B, 3), (B, N), (B, 2)
  float *scale, *y_out, *batch_mean, *batch_var;      // results; null backward, but scale

  // Backward.
  const float *grad_scale, *grad_y_out, *grad_gates, *grad_signals;  // (B, C), (B, F), (B, 2), (B, 3)
  float *grad_message, *grad_seg_gate, *grad_prior, *grad_xbar;      // (B, C)
  float *grad_delta, *grad_cls_gate, *grad_ctx, *grad_fc, *grad_y;   // (B, F)
  float *grad_seg_aligned, *grad_cls_aligned;                        // (B, A)
  float *grad_network, *grad_gate_logits, *grad_complexity;          // (B, N), (B, 2), (B,)
  float *from_seg_proj, *from_seg_gate;                              // (B, C): products with transposed weights
  float *from_cls_proj, *from_prior, *from_cls_gate;                 // (B, F)
  float *grad_bn_weight, *grad_bn_bias, *grad_bn_mean, *grad_bn_var; // (F,)
};

// Units [begin, end) of all products, one product after the other: out = v matrix^T + bias; out = v matrix; outer.
BTI_FAST_KERNEL(void, dense_rows, (const DenseProduct* products, int64_t batch, int64_t begin, int64_t end))
BTI_FAST_KERNEL(void, dense_columns, (const DenseProduct* products, int64_t batch, int64_t begin, int64_t end))
BTI_FAST_KERNEL(void, dense_outer, (const DenseOuter* outers, int64_t batch, int64_t begin, int64_t end))

// The steps between the products, in this order.
BTI_FAST_KERNEL(void, algebra_context, (const Algebra& algebra))  // batch norm; message
BTI_FAST_KERNEL(void, algebra_update, (const Algebra& algebra))   // delta
BTI_FAST_KERNEL(void, algebra_gates, (const Algebra& algebra))    // signals, gates, results
BTI_FAST_KERNEL(void, algebra_gates_backward, (const Algebra& algebra))
BTI_FAST_KERNEL(void, algebra_messages_backward, (const Algebra& algebra))
BTI_FAST_KERNEL(void, algebra_context_backward, (const Algebra& algebra))

}  // namespace bti_fast
