// Torch tensors as feature maps (host side only): which need no copy, and copies for those that do.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/checks.h"
#include "cpu/feature_map.h"

namespace bti_fast {

using torch::stable::Tensor;

// Depends on the shapes alone, never on the number of threads, so that results do not either.
inline Tiles split_pixels(int64_t batch, int64_t pixels, int64_t largest, int64_t multiple, int64_t tasks) {
  if (batch == 0 || pixels == 0) return {multiple, 0};
  int64_t pieces = (pixels + largest - 1) / largest;
  if (batch * pieces < tasks) pieces = (tasks + batch - 1) / batch;
  int64_t size = (pixels + pieces - 1) / pieces;
  size = (size + multiple - 1) / multiple * multiple;
  return {size, (pixels + size - 1) / size};
}

// The one stride of all spatial axes of (B, C, *spatial), or of (B, *spatial) where first_axis is 1; -1 if there is none.
inline int64_t pixel_stride(const Tensor& tensor, int64_t first_axis = 2) {
  int64_t stride = -1, expected = -1;
  for (int64_t d = tensor.dim() - 1; d >= first_axis; --d) {
    if (tensor.size(d) == 1) continue;
    if (stride < 0) {
      stride = tensor.stride(d);
    } else if (tensor.stride(d) != expected) {
      return -1;
    }
    expected = tensor.stride(d) * tensor.size(d);
  }
  return stride < 0 ? 1 : stride;
}

inline bool has_order(const Tensor& tensor, Order order) {
  const int64_t stride = pixel_stride(tensor);
  if (order == Order::channel_major) return stride == 1;
  return stride >= 0 && (tensor.stride(1) == 1 || tensor.size(1) == 1);
}

// (B, C, *spatial) that has the order already, or a copy that has.
inline Tensor in_order(const Tensor& tensor, Order order) {
  if (has_order(tensor, order)) return tensor;
  using torch::headeronly::MemoryFormat;
  if (order == Order::channel_major || tensor.dim() < 4) return torch::stable::contiguous(tensor);
  return torch::stable::contiguous(tensor,
                                   tensor.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
}

inline Order order_of(const Tensor& tensor) {
  const bool pixel_major = tensor.dim() >= 4 && !has_order(tensor, Order::channel_major);
  return pixel_major && has_order(tensor, Order::pixel_major) ? Order::pixel_major : Order::channel_major;
}

inline int64_t pixel_count(const Tensor& tensor) {
  int64_t pixels = 1;
  for (int64_t d = 2; d < tensor.dim(); ++d) pixels *= tensor.size(d);
  return pixels;
}

// The map of a tensor for which pixel_stride is not -1.
inline FeatureMap map_of(const Tensor& tensor, void* data, const char* name) {
  return {data,
          dtype_of(tensor, name),
          tensor.size(0),
          tensor.size(1),
          pixel_count(tensor),
          tensor.stride(0),
          tensor.size(1) == 1 ? 1 : tensor.stride(1),
          pixel_stride(tensor)};
}

inline FeatureMap read_map(const Tensor& tensor, const char* name) {
  return map_of(tensor, const_cast<void*>(tensor.const_data_ptr()), name);
}

// An output of x's dtype and memory format, written in `order` and, where that is not x's, copied at the end.
class OutputMap {
 public:
  OutputMap(const Tensor& like, Order order)
      : result_(torch::stable::empty_like(like)), written_(result_) {
    if (!has_order(result_, order)) {
      written_ = torch::stable::new_empty(result_, result_.sizes());
      written_ = in_order(written_, order);
    }
  }
  FeatureMap map(const char* name) const { return map_of(written_, written_.mutable_data_ptr(), name); }
  Tensor finish() {
    if (written_.get() != result_.get()) torch::stable::copy_(result_, written_);
    return result_;
  }

 private:
  Tensor result_, written_;
};

// A float32 contiguous version of a small tensor: itself where it is one.
inline Tensor as_float(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  Tensor wide = tensor.scalar_type() == ScalarType::Float ? tensor : torch::stable::to(tensor, ScalarType::Float);
  return torch::stable::contiguous(wide);
}

inline Tensor empty_float(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  return torch::stable::empty(shape, torch::headeronly::ScalarType::Float, std::nullopt, like.device());
}

// A float32 result as the gradient of `like`: its dtype and strides.
inline Tensor as_gradient(const Tensor& result, const Tensor& like) {
  Tensor gradient = torch::stable::empty_like(like);
  torch::stable::copy_(gradient, result);
  return gradient;
}

inline void check_same_shape(const Tensor& tensor, const Tensor& like, const char* name) {
  bool same = tensor.dim() == like.dim();
  for (int64_t d = 0; same && d < like.dim(); ++d) same = tensor.size(d) == like.size(d);
  STD_TORCH_CHECK(same, name, " has the wrong shape");
}

}  // namespace bti_fast
