#include "cpu/task_interaction.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/operators.h"
#include "cpu/task_interaction_algebra_run.h"

namespace bti_fast {

namespace {

constexpr int64_t kTileFloats = 64 * 1024;       // a tile of all channels stays in L2 between its two readings
constexpr int64_t kGroupFloats = 1024 * 1024;    // samples whose second reading should hit a cache
constexpr int64_t kTileMultiple = 32, kTasks = 16, kGradientTasks = 32;
constexpr int64_t kLeastRows = 8;
constexpr int64_t kMaskMargin = 64;

// Axes of a map, and the memory of their masks.
class AxesOf {
 public:
  explicit AxesOf(const Tensor& x) {
    const int64_t pixels = pixel_count(x);
    int64_t stride = 1;
    axes.count = 0;
    for (int64_t d = x.dim() - 1; d >= 2 && pixels > 0; --d) {
      const int64_t size = x.size(d);
      if (size > 1) {
        std::vector<int32_t> mask(stride + pixels + kMaskMargin, 0);
        int32_t* exists = mask.data() + stride;
        std::fill(exists, exists + pixels, -1);
        for (int64_t end = stride * size; end <= pixels; end += stride * size)
          std::fill(exists + end - stride, exists + end, 0);
        axes.stride[axes.count] = stride;
        axes.exists[axes.count++] = exists;
        masks_.push_back(std::move(mask));
      }
      stride *= size;
    }
  }
  Axes axes;

 private:
  std::vector<std::vector<int32_t>> masks_;
};

bool has_complexity(const Tensor& x) {
  return x.size(x.dim() > 3 ? x.dim() - 2 : x.dim() - 1) >= kLeastRows;
}

Tiles tiles_of(const Tensor& x) {
  const int64_t fitting = kTileFloats / std::max<int64_t>(x.size(1), 1) / kTileMultiple * kTileMultiple;
  return split_pixels(x.size(0), pixel_count(x), std::max(fitting, kTileMultiple), kTileMultiple, kTasks);
}

template <typename Kernel>
void run(Kernel kernel, const InteractionPass& pass, int64_t begin, int64_t end) {
  if (begin < end)
    torch::stable::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) { kernel(pass, from, to); });
}

void check_x(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 3 && x.dim() <= 5, "x must be (B, C, *spatial) with 1 to 3 spatial axes");
  STD_TORCH_CHECK(dtype_of(x, "x") != Dtype::float64, "float64 is not computed here");
}

// Row b of (batch, tiles, width), summed over the tiles in their order.
void add_tiles(const float* rows, int64_t tiles, int64_t width, double* total) {
  std::fill(total, total + width, 0.0);
  for (int64_t t = 0; t < tiles; ++t, rows += width)
    for (int64_t i = 0; i < width; ++i) total[i] += rows[i];
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> task_interaction(
    const Tensor& x_in, const Tensor& y_in, const std::vector<Tensor>& weights_in, double tau, bool training) {
  check_x(x_in);
  const Weights weights(weights_in, x_in, y_in);
  const Order order = order_of(x_in);
  const Tensor x = in_order(x_in, order), y = as_float(y_in);
  const int64_t batch = x.size(0), channels = x.size(1), features = y.size(1), hidden = weights.hidden;
  const int64_t pixels = pixel_count(x), width = channels + hidden + 1;
  const AxesOf axes(x);
  OutputMap out(x_in, order);
  Tensor y_out = empty_float(x, {batch, features}), gates = empty_float(x, {batch, 2});
  Tensor signals = empty_float(x, {batch, 3}), summary = empty_float(x, {batch, width});
  Tensor batch_mean = empty_float(x, {features}), batch_var = empty_float(x, {features});
  const Tensor scale = empty_float(x, {batch, channels});

  InteractionPass pass{};
  pass.x = read_map(x, "x");
  pass.out = out.map("x");
  pass.order = order;
  pass.axes = axes.axes;
  pass.tiles = tiles_of(x);
  pass.hidden = hidden;
  pass.weight = weights[conv_weight];
  pass.bias = weights[conv_bias];
  pass.complexity = has_complexity(x);
  const Tensor sums = empty_float(x, {batch * pass.tiles.count * width});
  pass.sums = sums.mutable_data_ptr<float>();
  pass.scale = scale.const_data_ptr<float>();

  const int64_t sample = std::max<int64_t>(channels * pixels, 1), tiles = pass.tiles.count;
  const int64_t group = training ? batch : std::max<int64_t>(1, std::min(batch, kGroupFloats / sample));
  AlgebraRun run_algebra(weights, group, static_cast<float>(tau), training, false);
  Algebra& algebra = run_algebra.algebra;
  algebra.batch_mean = batch_mean.mutable_data_ptr<float>();
  algebra.batch_var = batch_var.mutable_data_ptr<float>();
  std::vector<double> total(width);
  int64_t first = 0;
  do {  // once, too, for an empty batch: it has running statistics to return
    const int64_t count = std::min(group, batch - first);
    run(BTI_FAST_SELECT(interaction_statistics), pass, first * tiles, (first + count) * tiles);
    float* rows = summary.mutable_data_ptr<float>() + first * width;
    for (int64_t b = 0; b < count; ++b) {
      add_tiles(pass.sums + (first + b) * tiles * width, tiles, width, total.data());
      float* row = rows + b * width;
      for (int64_t i = 0; i < width - 1; ++i) row[i] = static_cast<float>(total[i] / static_cast<double>(pixels));
      row[width - 1] = pass.complexity ? static_cast<float>(total[width - 1] / static_cast<double>(sample)) : 0.0f;
    }
    algebra.scale = scale.mutable_data_ptr<float>() + first * channels;
    algebra.y_out = y_out.mutable_data_ptr<float>() + first * features;
    algebra.gates = gates.mutable_data_ptr<float>() + first * 2;
    algebra.signals = signals.mutable_data_ptr<float>() + first * 3;
    run_algebra.forward(rows, y.const_data_ptr<float>() + first * features, count);
    run(BTI_FAST_SELECT(interaction_apply), pass, first * tiles, (first + count) * tiles);
    first += count;
  } while (first < batch);
  return {out.finish(), torch::stable::to(y_out, y_in.scalar_type()), gates, signals, batch_mean, batch_var, summary};
}

std::vector<Tensor> task_interaction_backward(const Tensor& grad_x_in, const Tensor& grad_y_in,
                                              const Tensor& grad_gates_in, const Tensor& grad_signals_in,
                                              const Tensor& x_in, const Tensor& y_in, const Tensor& summary_in,
                                              const std::vector<Tensor>& weights_in, double tau, bool training) {
  check_x(x_in);
  const Weights weights(weights_in, x_in, y_in);
  const Order order = order_of(x_in);
  const Tensor x = in_order(x_in, order), y = as_float(y_in), summary = as_float(summary_in);
  const Tensor grad_out = in_order(grad_x_in, order), grad_y_out = as_float(grad_y_in);
  const Tensor grad_gates = as_float(grad_gates_in), grad_signals = as_float(grad_signals_in);
  const int64_t batch = x.size(0), channels = x.size(1), features = y.size(1), hidden = weights.hidden;
  const int64_t pixels = pixel_count(x), width = channels + hidden + 1, fours = groups_of_four(hidden);
  check_same_shape(grad_x_in, x_in, "grad_x");
  check_same_shape(grad_y_in, y_in, "grad_y");
  STD_TORCH_CHECK(grad_x_in.scalar_type() == x_in.scalar_type(), "grad_x must have the dtype of x");
  STD_TORCH_CHECK(grad_gates.numel() == 2 * batch && grad_signals.numel() == 3 * batch,
                  "grad_gates must be (B, 2), grad_signals (B, 3)");
  STD_TORCH_CHECK(summary.numel() == batch * width, "summary must be (B, C + C/2 + 1)");
  const AxesOf axes(x);
  OutputMap grad_x(x_in, order);

  std::vector<Tensor> results(weight_count, x);
  WeightGradients gradients(weight_count);
  for (int i = 0; i < weight_count; ++i) {
    using torch::headeronly::ScalarType;
    results[i] = torch::stable::empty_like(weights_in[i]);
    if (results[i].scalar_type() != ScalarType::Float || !results[i].is_contiguous())
      results[i] = empty_float(x, weights_in[i].sizes());
    gradients[i] = results[i].mutable_data_ptr<float>();
  }

  InteractionPass pass{};
  pass.x = read_map(x, "x");
  pass.grad_out = read_map(grad_out, "grad_x");
  pass.out = grad_x.map("x");
  pass.order = order;
  pass.axes = axes.axes;
  pass.tiles = tiles_of(x);
  pass.hidden = hidden;
  pass.weight = weights[conv_weight];
  pass.bias = weights[conv_bias];
  pass.complexity = has_complexity(x);
  const int64_t tiles = pass.tiles.count;
  const Tensor sums = empty_float(x, {batch * tiles * width});
  pass.sums = sums.mutable_data_ptr<float>();
  const int64_t sign_blocks = (pixels + kSignBlock - 1) / kSignBlock;
  const Tensor signs = torch::stable::empty({batch * sign_blocks * fours * kSignBlock},
                                            torch::headeronly::ScalarType::Byte, std::nullopt, x.device());
  pass.signs = signs.mutable_data_ptr<uint8_t>();
  run(BTI_FAST_SELECT(interaction_backward_statistics), pass, 0, batch * tiles);
  std::vector<float> grad_scale(batch * channels), active(batch * hidden);
  std::vector<double> total(width);
  for (int64_t b = 0; b < batch; ++b) {
    add_tiles(pass.sums + b * tiles * width, tiles, width, total.data());
    for (int64_t c = 0; c < channels; ++c) grad_scale[b * channels + c] = static_cast<float>(total[c]);
    for (int64_t h = 0; h < hidden; ++h) active[b * hidden + h] = static_cast<float>(total[channels + h]);
  }

  AlgebraRun run_algebra(weights, batch, static_cast<float>(tau), training, true);
  Algebra& algebra = run_algebra.algebra;
  std::vector<float> scale(batch * channels), gates(batch * 2), signals(batch * 3);
  Tensor grad_y = empty_float(x, {batch, features});
  algebra.scale = scale.data();
  algebra.gates = gates.data();
  algebra.signals = signals.data();
  algebra.grad_scale = grad_scale.data();
  algebra.grad_y_out = grad_y_out.const_data_ptr<float>();
  algebra.grad_gates = grad_gates.const_data_ptr<float>();
  algebra.grad_signals = grad_signals.const_data_ptr<float>();
  algebra.grad_y = grad_y.mutable_data_ptr<float>();
  run_algebra.forward(summary.const_data_ptr<float>(), y.const_data_ptr<float>(), batch);
  run_algebra.backward(gradients);

  const float per_pixel = 1 / static_cast<float>(pixels);
  std::vector<float> shift(batch * channels), hidden_grad(batch * hidden), difference_grad(batch);
  for (int64_t i = 0; i < batch * channels; ++i) shift[i] = algebra.grad_xbar[i] * per_pixel;
  for (int64_t i = 0; i < batch * hidden; ++i) hidden_grad[i] = run_algebra.grad_hidden[i] * per_pixel;
  for (int64_t b = 0; b < batch; ++b)
    difference_grad[b] = algebra.grad_complexity[b] / (static_cast<float>(channels) * static_cast<float>(pixels));
  for (int64_t h = 0; h < hidden; ++h) {
    float sum = 0;
    for (int64_t b = 0; b < batch; ++b) sum += hidden_grad[b * hidden + h] * active[b * hidden + h];
    gradients[conv_bias][h] = sum;
  }
  pass.scale = scale.data();
  pass.shift = shift.data();
  pass.hidden_grad = hidden_grad.data();
  pass.difference_grad = difference_grad.data();

  // Tasks own blocks of channels, so that one set of partial grad W1 does where there are blocks enough; more only
  // where they are small beside x.
  pass.channel_block = order == Order::channel_major ? 16 : 64;
  const int64_t blocks = (channels + pass.channel_block - 1) / pass.channel_block;
  const int64_t wanted = (kGradientTasks + blocks - 1) / std::max<int64_t>(blocks, 1);
  pass.runs = split_pixels(batch, pixels, order == Order::channel_major ? 8192 : 1024, 4 * kTileMultiple, wanted);
  const int64_t affordable = batch * pixels / (16 * std::max<int64_t>(channels, 1));
  pass.parts = std::max<int64_t>(1, std::min({wanted, affordable, batch * pass.runs.count}));
  std::vector<float> partial(pass.parts > 1 ? pass.parts * hidden * channels : 0, 0.0f);
  pass.grad_weight = pass.parts > 1 ? partial.data() : gradients[conv_weight];
  std::fill(gradients[conv_weight], gradients[conv_weight] + hidden * channels, 0.0f);
  run(BTI_FAST_SELECT(interaction_gradient), pass, 0, pass.parts * blocks);
  for (int64_t part = 0; part < pass.parts && pass.parts > 1; ++part)
    for (int64_t i = 0; i < hidden * channels; ++i)
      gradients[conv_weight][i] += partial[part * hidden * channels + i];

  std::vector<Tensor> out{grad_x.finish(), as_gradient(grad_y, y_in)};
  for (int i = 0; i < weight_count; ++i) {
    const bool done = results[i].scalar_type() == weights_in[i].scalar_type() && weights_in[i].is_contiguous();
    out.push_back(done ? results[i] : as_gradient(results[i], weights_in[i]));
  }
  return out;
}

}  // namespace bti_fast
