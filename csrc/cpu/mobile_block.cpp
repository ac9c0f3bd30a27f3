// EfficientNet's inverted bottleneck for inference: 1x1 expansion, depthwise convolution, squeeze-and-excitation and
// 1x1 projection, with normalisations in the convolutions. Three passes over the maps, and one call for a dozen.
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "cpu/dilated_depthwise.h"
#include "cpu/in_parallel.h"
#include "cpu/operators.h"
#include "cpu/packed_matrix.h"
#include "cpu/squeeze_excitation.h"

namespace bti_fast {

namespace {

constexpr int64_t kChannelsPerTask = 256, kHiddenPerTask = 8;  // of a squeeze-and-excitation

// [batch, height, width, channels] in memory, seen as (B, C, H, W).
Tensor as_maps(const Tensor& rows) { return torch::stable::transpose(torch::stable::transpose(rows, 2, 3), 1, 2); }

// The sum of a 1x1 convolution of a map [batch, height, width, channels], but for its matrix and result.
SeparableProduct product_of(const float* x, int64_t batch, int64_t height, int64_t width, int64_t channels) {
  SeparableProduct job{};
  job.batch = batch, job.height = job.out_height = height, job.width = job.out_width = width;
  job.stride = 1;
  add_source(job, {x, nullptr, channels, height, width, 1, 0, 0, 0});
  return job;
}

// silu(expand x) in memory as [batch, height, width, channels].
Tensor expanded_map(const Tensor& x, const std::vector<Tensor>& expand, int64_t channels) {
  STD_TORCH_CHECK(expand.size() == 2, "expand must be 2 tensors or none, got ", expand.size());
  const int64_t batch = x.size(0), height = x.size(2), width = x.size(3);
  const Tensor out = torch::stable::new_empty(x, {batch, height, width, channels});
  SeparableProduct job = product_of(floats(x, "x"), batch, height, width, x.size(1));
  job.columns = channels;
  job.matrix = packed_matrix(expand[0], "expand[0]", channels, job.depth);
  job.bias = channel_values(expand[1], "expand[1]", channels);
  job.silu = true;
  job.out = memory(out);
  run(job);
  return out;
}

// [batch, channels] from the sums of rows [batch, rows, channels] of so many positions.
Tensor gate_of(const Tensor& sums, int64_t positions, const std::vector<Tensor>& squeeze) {
  STD_TORCH_CHECK(squeeze.size() == 4, "squeeze must be 4 tensors or none, got ", squeeze.size());
  const Tensor &reduce = squeeze[0], &expand = squeeze[2];
  SqueezeExcitation job{};
  job.rows = sums.size(1), job.channels = sums.size(2), job.positions = positions;
  STD_TORCH_CHECK(reduce.dim() == 2 && reduce.size(1) == job.channels && lies(reduce, {0, 1}),
                  "squeeze[0] must be (R, ", job.channels, "), contiguous");
  job.hidden_channels = reduce.size(0);
  STD_TORCH_CHECK(expand.dim() == 2 && expand.size(0) == job.hidden_channels && expand.size(1) == job.channels &&
                      lies(expand, {0, 1}),
                  "squeeze[2] must be (", job.hidden_channels, ", ", job.channels, "), contiguous");
  const int64_t batch = sums.size(0);
  const Tensor scratch = torch::stable::new_empty(sums, {batch, job.channels + job.hidden_channels});
  const Tensor gate = torch::stable::new_empty(sums, {batch, job.channels});
  job.sums = floats(sums, "sums");
  job.reduce = floats(reduce, "squeeze[0]");
  job.reduce_bias = channel_values(squeeze[1], "squeeze[1]", job.hidden_channels);
  job.expand = floats(expand, "squeeze[2]");
  job.expand_bias = channel_values(squeeze[3], "squeeze[3]", job.channels);
  job.mean = memory(scratch), job.hidden = job.mean + batch * job.channels;
  job.gate = memory(gate);
  job.channels_per_task = kChannelsPerTask, job.hidden_per_task = kHiddenPerTask;
  const int64_t by_channels = batch * parts(job.channels, kChannelsPerTask);
  in_parallel(BTI_FAST_SELECT(squeeze_mean), job, by_channels, 1);
  in_parallel(BTI_FAST_SELECT(squeeze_hidden), job, batch * parts(job.hidden_channels, kHiddenPerTask), 1);
  in_parallel(BTI_FAST_SELECT(squeeze_gate), job, by_channels, 1);
  return gate;
}

}  // namespace

std::vector<Tensor> mobile_block(const Tensor& x, const std::vector<Tensor>& expand, const Tensor& taps,
                                 const Tensor& taps_bias, int64_t stride, const std::vector<Tensor>& squeeze,
                                 const Tensor& project_matrix, const Tensor& project_bias, bool skip) {
  STD_TORCH_CHECK(x.dim() == 4 && lies(x, {0, 2, 3, 1}), "x must be (B, C, H, W), dense and channels_last");
  STD_TORCH_CHECK(taps.dim() == 2 && (taps.size(0) == 9 || taps.size(0) == 25) && lies(taps, {0, 1}),
                  "taps must be (9, C) or (25, C), contiguous");
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  const int64_t batch = x.size(0), channels = taps.size(1), columns = project_bias.numel();
  STD_TORCH_CHECK(channels > 0 && (!expand.empty() || x.size(1) == channels), "x must have ", channels,
                  " channels, got ", x.size(1));
  STD_TORCH_CHECK(!skip || (stride == 1 && x.size(1) == columns), "with a skip stride must be 1 and project_bias (",
                  x.size(1), ",)");
  std::vector<Tensor> results;
  if (!expand.empty()) results.push_back(expanded_map(x, expand, channels));
  DilatedDepthwise depthwise{};
  depthwise.x = expand.empty() ? floats(x, "x") : memory(results[0]);
  depthwise.weight = floats(taps, "taps");
  depthwise.bias = channel_values(taps_bias, "taps_bias", channels);
  depthwise.channels = channels, depthwise.height = x.size(2), depthwise.width = x.size(3);
  depthwise.kernel = taps.size(0) == 9 ? 3 : 5, depthwise.dilation = 1, depthwise.stride = stride;
  const int64_t height = parts(depthwise.height, stride), width = parts(depthwise.width, stride);
  depthwise.out_height = height, depthwise.out_width = width;
  // As the published encoder pads at stride 2: one less before a map of even size than behind it.
  depthwise.top = depthwise.kernel / 2 - 1 + depthwise.height % 2;
  depthwise.left = depthwise.kernel / 2 - 1 + depthwise.width % 2;
  depthwise.silu = true;
  const Tensor convolved = torch::stable::new_empty(x, {batch, height, width, channels});
  depthwise.out = memory(convolved);
  std::optional<Tensor> sums, gate;
  if (!squeeze.empty()) {
    sums = torch::stable::new_empty(x, {batch, height, channels});
    depthwise.sums = memory(*sums);
  }
  if (convolved.numel() > 0) {
    run(depthwise, batch);
    if (sums) gate = gate_of(*sums, height * width, squeeze);
  }
  SeparableProduct project = product_of(depthwise.out, batch, height, width, channels);
  project.columns = columns;
  project.matrix = packed_matrix(project_matrix, "project_matrix", columns, channels);
  project.bias = channel_values(project_bias, "project_bias", columns);
  project.factor = gate ? memory(*gate) : nullptr;
  project.skip = skip ? floats(x, "x") : nullptr;
  const Tensor out = torch::stable::new_empty(x, {batch, height, width, columns});
  project.out = memory(out);
  run(project);
  for (Tensor& rows : results) rows = as_maps(rows);
  results.insert(results.begin(), as_maps(out));
  return results;
}

}  // namespace bti_fast
