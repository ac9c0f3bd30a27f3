// Every operator of the CPU library, namespace bti_fast_cpu. The public schemas, autograd and fakes are in Python
// (bti_fast.ops); these are the implementations that it calls.
#include <torch/csrc/stable/library.h>

#include "cpu/operators.h"

STABLE_TORCH_LIBRARY(bti_fast_cpu, m) {
  m.def("entropy_uncertainty(Tensor logits) -> Tensor");
  m.def("entropy_uncertainty_backward(Tensor grad_u, Tensor logits) -> Tensor");
  m.def(
      "gated_fusion(Tensor x, Tensor seg_logits, Tensor prior, Tensor cls_uncertainty, Tensor coeffs, float tau)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_fusion_backward(Tensor grad_x, Tensor grad_pooled, Tensor grad_mean, Tensor grad_u, Tensor x,"
      " Tensor seg_logits, Tensor prior, Tensor cls_uncertainty, Tensor coeffs, Tensor pooled,"
      " Tensor mean_uncertainty, float tau) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "headed_gated_fusion(Tensor x, Tensor head, Tensor head_bias, Tensor prior, Tensor cls_uncertainty, Tensor coeffs,"
      " float tau) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "headed_gated_fusion_backward(Tensor grad_x, Tensor grad_pooled, Tensor grad_mean, Tensor grad_u,"
      " Tensor grad_logits, Tensor x, Tensor head, Tensor head_bias, Tensor logits, Tensor prior,"
      " Tensor cls_uncertainty, Tensor coeffs, Tensor pooled, Tensor mean_uncertainty, float tau)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "task_interaction(Tensor x, Tensor y, Tensor[] weights, float tau, bool training)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "task_interaction_backward(Tensor grad_x, Tensor grad_y, Tensor grad_gates, Tensor grad_signals, Tensor x,"
      " Tensor y, Tensor summary, Tensor[] weights, float tau, bool training) -> Tensor[]");
  m.def(
      "cross_attention(Tensor q, Tensor k, Tensor v_q, Tensor v_k, Tensor? q_mask, Tensor? k_mask, float scale)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_attention_backward(Tensor grad_out_q, Tensor grad_out_k, Tensor q, Tensor k, Tensor v_q, Tensor v_k,"
      " Tensor out_q, Tensor out_k, Tensor statistics, Tensor? q_mask, Tensor? k_mask, float scale)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "dilated_depthwise(Tensor x, Tensor taps, Tensor? bias, int dilation, Tensor? scale=None, bool silu=False)"
      " -> Tensor");
  m.def("batch_statistics(Tensor x) -> (Tensor, Tensor)");
  m.def("scaled_silu(Tensor x, Tensor? scale, Tensor? shift) -> Tensor");
  m.def("scaled_silu_sums(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor mean) -> Tensor");
  m.def(
      "scaled_silu_gradient(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor? mean, Tensor? slope,"
      " Tensor? offset) -> Tensor");
  m.def("scaled_silu_(Tensor(a!) x, Tensor? scale, Tensor? shift) -> ()");
  m.def(
      "separable_product(Tensor[] maps, Tensor[] taps, int[] dilations, Tensor matrix, int columns, Tensor? factor,"
      " Tensor? bias, Tensor? skip, Tensor? lower, Tensor? upper, bool silu) -> Tensor");
  m.def(
      "mobile_block(Tensor x, Tensor[] expand, Tensor taps, Tensor taps_bias, int stride, Tensor[] squeeze,"
      " Tensor project_matrix, Tensor project_bias, bool skip) -> Tensor[]");
  m.def("up_conv(Tensor x, Tensor[] matrices, Tensor bias, int height, int width) -> Tensor");
  m.def("dilated_depthwise_weight(Tensor grad, Tensor x, int kernel, int dilation) -> Tensor");
  m.def("dual_path_summary(Tensor x) -> (Tensor, Tensor)");
  m.def(
      "dual_path_summary_gradient_(Tensor(a!) grad, Tensor x, Tensor summary, Tensor grad_pooled, Tensor grad_summary)"
      " -> ()");
  m.def("dual_path_gate(Tensor x, Tensor channel, Tensor spatial, Tensor? skip) -> Tensor");
  m.def(
      "dual_path_gate_gradient(Tensor grad, Tensor x, Tensor channel, Tensor spatial, Tensor? out)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bti_fast_cpu, CPU, m) {
  m.impl("entropy_uncertainty", TORCH_BOX(&bti_fast::entropy_uncertainty));
  m.impl("entropy_uncertainty_backward", TORCH_BOX(&bti_fast::entropy_uncertainty_backward));
  m.impl("gated_fusion", TORCH_BOX(&bti_fast::gated_fusion));
  m.impl("gated_fusion_backward", TORCH_BOX(&bti_fast::gated_fusion_backward));
  m.impl("headed_gated_fusion", TORCH_BOX(&bti_fast::headed_gated_fusion));
  m.impl("headed_gated_fusion_backward", TORCH_BOX(&bti_fast::headed_gated_fusion_backward));
  m.impl("task_interaction", TORCH_BOX(&bti_fast::task_interaction));
  m.impl("task_interaction_backward", TORCH_BOX(&bti_fast::task_interaction_backward));
  m.impl("cross_attention", TORCH_BOX(&bti_fast::cross_attention));
  m.impl("cross_attention_backward", TORCH_BOX(&bti_fast::cross_attention_backward));
  m.impl("dilated_depthwise", TORCH_BOX(&bti_fast::dilated_depthwise));
  m.impl("batch_statistics", TORCH_BOX(&bti_fast::batch_statistics));
  m.impl("scaled_silu", TORCH_BOX(&bti_fast::scaled_silu));
  m.impl("scaled_silu_sums", TORCH_BOX(&bti_fast::scaled_silu_sums));
  m.impl("scaled_silu_gradient", TORCH_BOX(&bti_fast::scaled_silu_gradient));
  m.impl("scaled_silu_", TORCH_BOX(&bti_fast::scaled_silu_));
  m.impl("separable_product", TORCH_BOX(&bti_fast::separable_product));
  m.impl("mobile_block", TORCH_BOX(&bti_fast::mobile_block));
  m.impl("up_conv", TORCH_BOX(&bti_fast::up_conv));
  m.impl("dilated_depthwise_weight", TORCH_BOX(&bti_fast::dilated_depthwise_weight));
  m.impl("dual_path_summary", TORCH_BOX(&bti_fast::dual_path_summary));
  m.impl("dual_path_summary_gradient_", TORCH_BOX(&bti_fast::dual_path_summary_gradient_));
  m.impl("dual_path_gate", TORCH_BOX(&bti_fast::dual_path_gate));
  m.impl("dual_path_gate_gradient", TORCH_BOX(&bti_fast::dual_path_gate_gradient));
}
