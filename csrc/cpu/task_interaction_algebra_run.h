// Runs task_interaction's dense algebra: memory, products and the steps between them (host side only).
#pragma once

#include <memory>
#include <vector>

#include "cpu/task_interaction_algebra.h"
#include "cpu/task_interaction_weights.h"

namespace bti_fast {

// Where the backward algebra's results go; float32, contiguous, by Weight (conv_weight and conv_bias are left out).
using WeightGradients = std::vector<float*>;

class AlgebraRun {
 public:
  // Memory for at most `batch` samples.
  AlgebraRun(const Weights& weights, int64_t batch, float tau, bool training, bool backward);

  // From summary rows (count, C + H + 1) and y (count, F). The caller has set, in `algebra`, where scale, gates,
  // signals and, in a forward pass, y_out, batch_mean and batch_var go.
  void forward(const float* summary, const float* y, int64_t count);
  // After forward on all samples; the caller has set grad_scale, grad_y_out, grad_gates, grad_signals and grad_y.
  // Leaves grad_xbar, grad_complexity and grad_hidden (batch, H).
  void backward(const WeightGradients& gradients);

  Algebra algebra{};
  const float* grad_hidden = nullptr;

 private:
  const Weights& weights_;
  std::unique_ptr<float[]> memory_;
  float* grad_hidden_ = nullptr;
};

}  // namespace bti_fast
