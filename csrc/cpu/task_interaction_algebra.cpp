#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/task_interaction_algebra_run.h"

namespace bti_fast {

namespace {

constexpr int64_t kMultipliesPerTask = 1 << 17;  // less is not worth another thread

// Runs all units of some products, or of some outer products, over the threads.
template <bool Columns, typename Kernel, typename Product>
void run(Kernel kernel, const std::vector<Product>& products, int64_t batch) {
  int64_t units = 0, multiplies = 0;
  for (const auto& product : products) {
    units += dense_units(Columns ? product.cols : product.rows);
    multiplies += product.rows * product.cols * batch;
  }
  if (units == 0) return;
  const int64_t grain = std::max<int64_t>(1, units * kMultipliesPerTask / std::max<int64_t>(multiplies, 1));
  torch::stable::parallel_for(0, units, grain,
                              [&](int64_t begin, int64_t end) { kernel(products.data(), batch, begin, end); });
}

}  // namespace

AlgebraRun::AlgebraRun(const Weights& weights, int64_t batch, float tau, bool training, bool backward)
    : weights_(weights) {
  Algebra& a = algebra;
  a.channels = weights.channels;
  a.features = weights.features;
  a.hidden = weights.hidden;
  a.aligned = weights.aligned;
  a.network = weights.network;
  a.summary_stride = a.channels + a.hidden + 1;
  a.tau = tau;
  a.training = training;
  a.bn_weight = weights[bn_weight];
  a.bn_bias = weights[bn_bias];
  a.bn_mean = weights[bn_mean];
  a.bn_var = weights[bn_var];
  a.gate1_weight = weights[gate1_weight];
  a.gate1_bias = weights[gate1_bias];
  a.gate2_weight = weights[gate2_weight];
  a.gate2_bias = weights[gate2_bias];
  float** of_features[] = {&a.active, &a.normal, &a.ctx, &a.cls_gate, &a.delta};
  float** of_channels[] = {&a.seg_gate, &a.prior, &a.message, &a.residual};
  float** of_features_backward[] = {&a.grad_delta,    &a.grad_cls_gate, &a.grad_ctx,     &a.grad_fc,
                                    &a.from_cls_proj, &a.from_prior,    &a.from_cls_gate};
  float** of_channels_backward[] = {&a.grad_message, &a.grad_seg_gate, &a.grad_prior,
                                    &a.grad_xbar,    &a.from_seg_proj, &a.from_seg_gate};
  // Twice: how much memory, then which.
  for (const bool place : {false, true}) {
    int64_t used = 0;
    const auto take = [&](float** where, int64_t count) {
      if (place) *where = memory_.get() + used;
      used += (count + 15) / 16 * 16;
    };
    take(&a.used_inverse, a.features);
    for (float** where : of_features) take(where, batch * a.features);
    for (float** where : of_channels) take(where, batch * a.channels);
    take(&a.seg_aligned, batch * a.aligned);
    take(&a.cls_aligned, batch * a.aligned);
    take(&a.network_hidden, batch * a.network);
    if (backward) {
      for (float** where : of_features_backward) take(where, batch * a.features);
      for (float** where : of_channels_backward) take(where, batch * a.channels);
      take(&a.grad_seg_aligned, batch * a.aligned);
      take(&a.grad_cls_aligned, batch * a.aligned);
      take(&a.grad_network, batch * a.network);
      take(&a.grad_gate_logits, batch * 2);
      take(&a.grad_complexity, batch);
      take(&grad_hidden_, batch * a.hidden);
    }
    if (!place) memory_.reset(new float[std::max<int64_t>(used, 1)]);
  }
  grad_hidden = grad_hidden_;
}

void AlgebraRun::forward(const float* summary, const float* y, int64_t count) {
  Algebra& a = algebra;
  const Weights& w = weights_;
  a.batch = count;
  a.xbar = summary;
  a.complexity = summary + a.channels + a.hidden;
  a.y = y;
  const int64_t c = a.channels, f = a.features, row = a.summary_stride;
  const auto rows = BTI_FAST_SELECT(dense_rows);
  run<false>(rows, std::vector<DenseProduct>{
                       {w[fc_weight], f, a.hidden, summary + c, row, w[fc_bias], a.active},
                       {w[seg_gate_weight], c, c, summary, row, w[seg_gate_bias], a.seg_gate},
                       {w[prior_weight], c, f, y, f, w[prior_bias], a.prior}}, count);
  BTI_FAST_SELECT(algebra_context)(a);
  run<false>(rows, std::vector<DenseProduct>{
                       {w[cls_gate_weight], f, f, a.ctx, f, w[cls_gate_bias], a.cls_gate},
                       {w[seg_proj], a.aligned, c, a.residual, c, nullptr, a.seg_aligned}}, count);
  BTI_FAST_SELECT(algebra_update)(a);
  run<false>(rows, std::vector<DenseProduct>{
                       {w[cls_proj], a.aligned, f, a.delta, f, nullptr, a.cls_aligned}}, count);
  BTI_FAST_SELECT(algebra_gates)(a);
}

void AlgebraRun::backward(const WeightGradients& g) {
  Algebra& a = algebra;
  const Weights& w = weights_;
  const int64_t c = a.channels, f = a.features, row = a.summary_stride, batch = a.batch;
  a.grad_bn_weight = g[bn_weight];
  a.grad_bn_bias = g[bn_bias];
  a.grad_bn_mean = g[bn_mean];
  a.grad_bn_var = g[bn_var];
  const auto columns = BTI_FAST_SELECT(dense_columns);
  BTI_FAST_SELECT(algebra_gates_backward)(a);
  run<true>(columns, std::vector<DenseProduct>{
                         {w[seg_proj], a.aligned, c, a.grad_seg_aligned, a.aligned, nullptr, a.from_seg_proj},
                         {w[cls_proj], a.aligned, f, a.grad_cls_aligned, a.aligned, nullptr, a.from_cls_proj}}, batch);
  BTI_FAST_SELECT(algebra_messages_backward)(a);
  run<true>(columns, std::vector<DenseProduct>{
                         {w[seg_gate_weight], c, c, a.grad_seg_gate, c, nullptr, a.from_seg_gate},
                         {w[prior_weight], c, f, a.grad_prior, c, nullptr, a.from_prior},
                         {w[cls_gate_weight], f, f, a.grad_cls_gate, f, nullptr, a.from_cls_gate}}, batch);
  BTI_FAST_SELECT(algebra_context_backward)(a);
  run<true>(columns, std::vector<DenseProduct>{
                         {w[fc_weight], f, a.hidden, a.grad_fc, f, nullptr, grad_hidden_}}, batch);
  run<false>(BTI_FAST_SELECT(dense_outer), std::vector<DenseOuter>{
      {a.grad_fc, f, a.hidden, a.xbar + c, row, g[fc_weight], g[fc_bias]},
      {a.grad_cls_gate, f, f, a.ctx, f, g[cls_gate_weight], g[cls_gate_bias]},
      {a.grad_prior, c, f, a.y, f, g[prior_weight], g[prior_bias]},
      {a.grad_seg_gate, c, c, a.xbar, row, g[seg_gate_weight], g[seg_gate_bias]},
      {a.grad_seg_aligned, a.aligned, c, a.residual, c, g[seg_proj], nullptr},
      {a.grad_cls_aligned, a.aligned, f, a.delta, f, g[cls_proj], nullptr},
      {a.grad_network, a.network, 3, a.signals, 3, g[gate1_weight], g[gate1_bias]},
      {a.grad_gate_logits, 2, a.network, a.network_hidden, a.network, g[gate2_weight], g[gate2_bias]}}, batch);
}

}  // namespace bti_fast
