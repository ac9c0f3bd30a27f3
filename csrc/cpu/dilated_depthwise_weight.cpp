#include "cpu/dilated_depthwise_weight.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/dense_floats.h"
#include "cpu/in_parallel.h"
#include "cpu/operators.h"
#include "cpu/part_sums.h"

namespace bti_fast {

namespace {

constexpr int64_t kChannelsPerBlock = 256;  // so many sums of a 5x5 kernel fit into L1
constexpr int64_t kTasks = 32;              // enough to keep threads equally busy
constexpr int64_t kPositionsPerPart = 256;  // fewer would cost as much to put together as to add up

}  // namespace

Tensor dilated_depthwise_weight(const Tensor& grad, const Tensor& x, int64_t kernel, int64_t dilation) {
  STD_TORCH_CHECK(x.dim() == 4 && lies(x, {0, 2, 3, 1}), "x must be (B, C, H, W), dense and channels_last");
  STD_TORCH_CHECK(grad.dim() == 4 && lies(grad, {0, 2, 3, 1}), "grad must be (B, C, H, W), dense and channels_last");
  for (int64_t axis = 0; axis < 4; ++axis)
    STD_TORCH_CHECK(grad.size(axis) == x.size(axis), "grad must have the shape of x, got ", grad.size(axis), " for ",
                    x.size(axis), " along axis ", axis);
  STD_TORCH_CHECK(kernel == 3 || kernel == 5, "kernel must be 3 or 5, got ", kernel);
  STD_TORCH_CHECK(dilation >= 1, "dilation must be at least 1, got ", dilation);
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  // The division depends on the shape alone, so that the number of threads changes no bit.
  const int64_t blocks = (channels + kChannelsPerBlock - 1) / kChannelsPerBlock;
  const int64_t parts =
      std::max<int64_t>(1, std::min({(kTasks + blocks - 1) / std::max<int64_t>(1, blocks), batch * height,
                                     batch * height * width / kPositionsPerPart}));
  const Tensor sums = torch::stable::new_empty(x, {parts, kernel * kernel, channels});
  const Tensor out = torch::stable::new_empty(x, {kernel * kernel, channels});
  const DilatedDepthwiseWeight job{floats(grad, "grad"),
                                   floats(x, "x"),
                                   memory(sums),
                                   batch,
                                   channels,
                                   height,
                                   width,
                                   kernel,
                                   dilation,
                                   parts,
                                   blocks};
  in_parallel(BTI_FAST_SELECT(dilated_depthwise_weight), job, parts * blocks, 1);
  sum_parts({job.parts, memory(out), parts, out.numel(), 1}, 1);
  return out;
}

}  // namespace bti_fast
