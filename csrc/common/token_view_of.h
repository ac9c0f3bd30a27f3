// Builds TokenView and MaskView from torch tensors (host side only).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/token_view.h"

namespace bti_fast {

inline TokenView token_view_of(const torch::stable::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

inline MaskView mask_view_of(const std::optional<torch::stable::Tensor>& mask) {
  if (!mask.has_value()) return {nullptr, 0, 0};
  return {static_cast<const bool*>(mask->const_data_ptr()), mask->stride(0), mask->stride(1)};
}

}  // namespace bti_fast
