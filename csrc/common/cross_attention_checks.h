// Argument checks of cross_attention, shared by its CPU and CUDA bindings.
#pragma once

#include <optional>

#include "common/checks.h"

namespace bti_fast {

inline void check_tokens(const torch::stable::Tensor& x, const char* name, const torch::stable::Tensor& like,
                         int64_t tokens, int64_t channels) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == like.size(0) && x.size(1) == like.size(1) && x.size(2) == tokens &&
                      x.size(3) == channels,
                  name, " must have shape (", like.size(0), ", ", like.size(1), ", ", tokens, ", ", channels, ")");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " must have q's dtype");
  STD_TORCH_CHECK(x.device() == like.device(), name, " must be on q's device");
}

// The dtype of the call.
inline Dtype check_cross_attention(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                                   const torch::stable::Tensor& v_q, const torch::stable::Tensor& v_k) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v_k.dim() == 4, "q, k and v_k must be (B, heads, tokens, dim)");
  const Dtype dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(dtype != Dtype::float64, "q must be float32, float16 or bfloat16");
  for (const int64_t channels : {q.size(3), v_k.size(3)})
    STD_TORCH_CHECK(channels == 16 || channels == 32 || channels == 64 || channels == 128,
                    "channels of q and v_k must be 16, 32, 64 or 128, got ", channels);
  STD_TORCH_CHECK(k.size(2) <= 256, "at most 256 class tokens, got ", k.size(2));
  check_tokens(k, "k", q, k.size(2), q.size(3));
  check_tokens(v_q, "v_q", q, q.size(2), v_k.size(3));
  check_tokens(v_k, "v_k", q, k.size(2), v_k.size(3));
  return dtype;
}

inline void check_mask(const std::optional<torch::stable::Tensor>& mask, const char* name,
                       const torch::stable::Tensor& tokens) {
  if (!mask.has_value()) return;
  STD_TORCH_CHECK(mask->scalar_type() == torch::headeronly::ScalarType::Bool && mask->dim() == 2 &&
                      mask->size(0) == tokens.size(0) && mask->size(1) == tokens.size(2) &&
                      mask->device() == tokens.device(),
                  name, " must be bool, (", tokens.size(0), ", ", tokens.size(2), "), on the tokens' device");
}

// What the backward gets beside the forward's inputs.
inline void check_cross_attention_backward(const torch::stable::Tensor& grad_out_q,
                                           const torch::stable::Tensor& grad_out_k, const torch::stable::Tensor& out_q,
                                           const torch::stable::Tensor& out_k, const torch::stable::Tensor& statistics,
                                           const torch::stable::Tensor& v_q, const torch::stable::Tensor& v_k) {
  for (const auto& [x, name] : {std::pair{&grad_out_q, "grad_out_q"}, std::pair{&out_q, "out_q"}})
    check_tokens(*x, name, v_q, v_q.size(2), v_q.size(3));
  for (const auto& [x, name] : {std::pair{&grad_out_k, "grad_out_k"}, std::pair{&out_k, "out_k"}})
    check_tokens(*x, name, v_k, v_k.size(2), v_k.size(3));
  STD_TORCH_CHECK(statistics.scalar_type() == torch::headeronly::ScalarType::Float && statistics.is_contiguous() &&
                      statistics.numel() == 2 * v_q.size(0) * v_q.size(1) * (v_q.size(2) + v_k.size(2)) &&
                      statistics.device() == v_q.device(),
                  "statistics must be the forward's");
}

}  // namespace bti_fast
