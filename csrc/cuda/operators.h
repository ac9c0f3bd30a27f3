// The operators that registration.cpp registers; one pair of functions per operator.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace bti_fast {

using torch::stable::Tensor;

Tensor entropy_uncertainty_cuda(const Tensor& logits);
Tensor entropy_uncertainty_backward_cuda(const Tensor& grad_u, const Tensor& logits);

}  // namespace bti_fast
