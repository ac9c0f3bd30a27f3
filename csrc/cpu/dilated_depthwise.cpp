#include "cpu/dilated_depthwise.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "cpu/dense_floats.h"
#include "cpu/in_parallel.h"
#include "cpu/operators.h"

namespace bti_fast {

namespace {

constexpr int64_t kElementsPerTask = 1 << 14;  // work below this many outputs is not worth handing out

}  // namespace

void run(const DilatedDepthwise& job, int64_t batch) {
  in_parallel(BTI_FAST_SELECT(dilated_depthwise), job, batch * job.out_height,
              std::max<int64_t>(1, kElementsPerTask / (job.out_width * job.channels)));
}

Tensor dilated_depthwise(const Tensor& x, const Tensor& taps, const std::optional<Tensor>& bias, int64_t dilation,
                         const std::optional<Tensor>& scale, bool silu) {
  STD_TORCH_CHECK(x.dim() == 4 && lies(x, {0, 2, 3, 1}), "x must be (B, C, H, W), dense and channels_last");
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(taps.dim() == 2 && taps.size(1) == channels && lies(taps, {0, 1}),
                  "taps must be (kernel * kernel, ", channels, "), contiguous");
  STD_TORCH_CHECK(taps.size(0) == 9 || taps.size(0) == 25, "taps must be of a 3x3 or 5x5 kernel, got ", taps.size(0));
  STD_TORCH_CHECK(dilation >= 1, "dilation must be at least 1, got ", dilation);
  const Tensor out = torch::stable::empty_like(x);
  DilatedDepthwise job{};
  job.x = floats(x, "x"), job.weight = floats(taps, "taps");
  job.scale = channel_values(scale, "scale", channels), job.bias = channel_values(bias, "bias", channels);
  job.out = memory(out);
  job.channels = channels, job.height = job.out_height = x.size(2), job.width = job.out_width = x.size(3);
  job.kernel = taps.size(0) == 9 ? 3 : 5, job.dilation = dilation, job.stride = 1;
  job.silu = silu;
  if (out.numel() > 0) run(job, x.size(0));
  return out;
}

}  // namespace bti_fast
