// Tensors of dense float32 memory, for operators that take no other.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <optional>

namespace bti_fast {

inline const float* floats(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Float, name, " must be float32, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  return static_cast<const float*>(tensor.const_data_ptr());
}

// Of a tensor that was made here, or that is overwritten.
inline float* memory(const torch::stable::Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Strides of dense memory, for the axes in this order from the slowest on; axes of one element may have any, and empty
// tensors too.
inline bool lies(const torch::stable::Tensor& tensor, std::initializer_list<int64_t> axes) {
  if (tensor.numel() == 0) return true;
  int64_t expected = 1;
  for (auto axis = std::rbegin(axes); axis != std::rend(axes); ++axis) {
    if (tensor.size(*axis) != 1 && tensor.stride(*axis) != expected) return false;
    expected *= tensor.size(*axis);
  }
  return true;
}

// One value per channel, or none.
inline const float* channel_values(const std::optional<torch::stable::Tensor>& values, const char* name,
                                   int64_t channels) {
  if (!values) return nullptr;
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == channels && lies(*values, {0}), name, " must be (", channels,
                  ",), contiguous");
  return floats(*values, name);
}

}  // namespace bti_fast
