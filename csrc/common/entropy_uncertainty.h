// Argument checks of entropy_uncertainty, shared by its CPU and CUDA bindings.
#pragma once

#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/checks.h"

namespace bti_fast {

inline Dtype check_entropy(const torch::stable::Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() >= 2, "logits must have at least 2 axes (batch, class), got ", logits.dim());
  STD_TORCH_CHECK(logits.size(1) >= 1, "logits must have at least 1 class, got 0");
  return dtype_of(logits, "logits");
}

inline Dtype check_entropy_backward(const torch::stable::Tensor& grad_u, const torch::stable::Tensor& logits) {
  const Dtype dtype = check_entropy(logits);
  STD_TORCH_CHECK(grad_u.scalar_type() == accumulation_type(dtype), "grad_u must be ",
                  torch::headeronly::toString(accumulation_type(dtype)), ", got ",
                  torch::headeronly::toString(grad_u.scalar_type()));
  bool same = grad_u.dim() == logits.dim() - 1;
  for (int64_t d = 0; same && d < grad_u.dim(); ++d) same = grad_u.size(d) == logits.size(d == 0 ? 0 : d + 1);
  STD_TORCH_CHECK(same, "grad_u must have the shape of logits without its class axis");
  STD_TORCH_CHECK(grad_u.device() == logits.device(), "grad_u and logits must be on one device");
  return dtype;
}

// An uninitialised u for these logits: their shape without the class axis, in the accumulation dtype.
inline torch::stable::Tensor empty_uncertainty(const torch::stable::Tensor& logits, Dtype dtype) {
  std::vector<int64_t> shape(logits.sizes().begin(), logits.sizes().end());
  shape.erase(shape.begin() + 1);
  return torch::stable::empty(shape, accumulation_type(dtype), std::nullopt, logits.device());
}

}  // namespace bti_fast
