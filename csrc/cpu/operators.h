// The operators that registration.cpp registers; one pair of functions per operator.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace bti_fast {

using torch::stable::Tensor;

Tensor entropy_uncertainty(const Tensor& logits);
Tensor entropy_uncertainty_backward(const Tensor& grad_u, const Tensor& logits);

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_fusion(const Tensor& x, const Tensor& seg_logits, const Tensor& prior,
                                                        const Tensor& cls_uncertainty, const Tensor& coeffs,
                                                        double tau);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_fusion_backward(
    const Tensor& grad_x, const Tensor& grad_pooled, const Tensor& grad_mean, const Tensor& grad_u, const Tensor& x,
    const Tensor& seg_logits, const Tensor& prior, const Tensor& cls_uncertainty, const Tensor& coeffs,
    const Tensor& pooled, const Tensor& mean_uncertainty, double tau);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> task_interaction(
    const Tensor& x, const Tensor& y, const std::vector<Tensor>& weights, double tau, bool training);
std::vector<Tensor> task_interaction_backward(const Tensor& grad_x, const Tensor& grad_y, const Tensor& grad_gates,
                                              const Tensor& grad_signals, const Tensor& x, const Tensor& y,
                                              const Tensor& summary, const std::vector<Tensor>& weights, double tau,
                                              bool training);

std::tuple<Tensor, Tensor, Tensor> cross_attention(const Tensor& q, const Tensor& k, const Tensor& v_q,
                                                   const Tensor& v_k, const std::optional<Tensor>& q_mask,
                                                   const std::optional<Tensor>& k_mask, double scale);
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_attention_backward(
    const Tensor& grad_out_q, const Tensor& grad_out_k, const Tensor& q, const Tensor& k, const Tensor& v_q,
    const Tensor& v_k, const Tensor& out_q, const Tensor& out_k, const Tensor& statistics,
    const std::optional<Tensor>& q_mask, const std::optional<Tensor>& k_mask, double scale);

// For bti_fast.nn alone: no public operator.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> headed_gated_fusion(const Tensor& x, const Tensor& head,
                                                                       const Tensor& head_bias, const Tensor& prior,
                                                                       const Tensor& cls_uncertainty,
                                                                       const Tensor& coeffs, double tau);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> headed_gated_fusion_backward(
    const Tensor& grad_x, const Tensor& grad_pooled, const Tensor& grad_mean, const Tensor& grad_u,
    const Tensor& grad_logits, const Tensor& x, const Tensor& head, const Tensor& head_bias, const Tensor& logits,
    const Tensor& prior, const Tensor& cls_uncertainty, const Tensor& coeffs, const Tensor& pooled,
    const Tensor& mean_uncertainty, double tau);
Tensor dilated_depthwise(const Tensor& x, const Tensor& taps, const std::optional<Tensor>& bias, int64_t dilation,
                         const std::optional<Tensor>& scale, bool silu);
Tensor separable_product(const std::vector<Tensor>& maps, const std::vector<Tensor>& taps,
                         const std::vector<int64_t>& dilations, const Tensor& matrix, int64_t columns,
                         const std::optional<Tensor>& factor, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& skip, const std::optional<Tensor>& lower,
                         const std::optional<Tensor>& upper, bool silu);
// The result, and the expanded map where there is an expansion.
std::vector<Tensor> mobile_block(const Tensor& x, const std::vector<Tensor>& expand, const Tensor& taps,
                                 const Tensor& taps_bias, int64_t stride, const std::vector<Tensor>& squeeze,
                                 const Tensor& project_matrix, const Tensor& project_bias, bool skip);
Tensor up_conv(const Tensor& x, const std::vector<Tensor>& matrices, const Tensor& bias, int64_t height, int64_t width);
Tensor scaled_silu(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift);
void scaled_silu_(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift);
Tensor scaled_silu_sums(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                        const Tensor& mean);
Tensor scaled_silu_gradient(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                            const std::optional<Tensor>& mean, const std::optional<Tensor>& slope,
                            const std::optional<Tensor>& offset);
std::tuple<Tensor, Tensor> batch_statistics(const Tensor& x);
Tensor dilated_depthwise_weight(const Tensor& grad, const Tensor& x, int64_t kernel, int64_t dilation);
std::tuple<Tensor, Tensor> dual_path_summary(const Tensor& x);
void dual_path_summary_gradient_(const Tensor& grad, const Tensor& x, const Tensor& summary, const Tensor& grad_pooled,
                                 const Tensor& grad_summary);
Tensor dual_path_gate(const Tensor& x, const Tensor& channel, const Tensor& spatial, const std::optional<Tensor>& skip);
std::tuple<Tensor, Tensor, Tensor, Tensor> dual_path_gate_gradient(const Tensor& grad, const Tensor& x,
                                                                   const Tensor& channel, const Tensor& spatial,
                                                                   const std::optional<Tensor>& out);

}  // namespace bti_fast
