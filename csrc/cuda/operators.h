// The operators that registration.cpp registers; one pair of functions per operator.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace bti_fast {

using torch::stable::Tensor;

Tensor entropy_uncertainty_cuda(const Tensor& logits);
Tensor entropy_uncertainty_backward_cuda(const Tensor& grad_u, const Tensor& logits);

std::tuple<Tensor, Tensor, Tensor> cross_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v_q,
                                                        const Tensor& v_k, const std::optional<Tensor>& q_mask,
                                                        const std::optional<Tensor>& k_mask, double scale);
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_attention_backward_cuda(
    const Tensor& grad_out_q, const Tensor& grad_out_k, const Tensor& q, const Tensor& k, const Tensor& v_q,
    const Tensor& v_k, const Tensor& out_q, const Tensor& out_k, const Tensor& statistics,
    const std::optional<Tensor>& q_mask, const std::optional<Tensor>& k_mask, double scale);

}  // namespace bti_fast
