#include "cpu/scaled_silu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/dense_floats.h"
#include "cpu/operators.h"

namespace bti_fast {

namespace {

constexpr int64_t kElementsPerTask = 1 << 15;  // work below this many elements is not worth handing out

}  // namespace

void scaled_silu_(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float && x.dim() >= 1 && x.is_contiguous(),
                  "x must be (..., C), contiguous float32");
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "needs scale and shift, or neither");
  const int64_t channels = x.size(x.dim() - 1);
  const ScaledSilu job{static_cast<float*>(x.mutable_data_ptr()), channel_values(scale, "scale", channels),
                       channel_values(shift, "shift", channels), channels};
  if (x.numel() == 0) return;
  const auto kernel = BTI_FAST_SELECT(scaled_silu);
  torch::stable::parallel_for(0, x.numel() / channels, std::max<int64_t>(1, kElementsPerTask / channels),
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

}  // namespace bti_fast
