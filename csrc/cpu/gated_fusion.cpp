#include "cpu/gated_fusion.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/feature_map_of.h"
#include "cpu/operators.h"

namespace bti_fast {

namespace {

constexpr int64_t kLargestTile = 1024, kTileMultiple = 64, kTasks = 8;
constexpr int64_t kCachedFloats = 1 << 16;

void check_fusion(const Tensor& x, const Tensor& seg_logits, const Tensor& prior, const Tensor& cls_uncertainty,
                  const Tensor& coeffs) {
  STD_TORCH_CHECK(x.dim() >= 3 && seg_logits.dim() == x.dim(), "x and seg_logits must be (B, channels, *spatial)");
  bool same = seg_logits.size(0) == x.size(0) && seg_logits.size(1) >= 1;
  for (int64_t d = 2; d < x.dim(); ++d) same = same && seg_logits.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "seg_logits must be (B, K, *spatial of x)");
  STD_TORCH_CHECK(prior.dim() == 2 && prior.size(0) == x.size(0) && prior.size(1) == x.size(1),
                  "prior must be (B, C)");
  STD_TORCH_CHECK(cls_uncertainty.dim() == 1 && cls_uncertainty.size(0) == x.size(0), "cls_uncertainty must be (B,)");
  STD_TORCH_CHECK(coeffs.dim() == 1 && coeffs.size(0) == 3, "coeffs must be (3,)");
  STD_TORCH_CHECK(dtype_of(x, "x") != Dtype::float64 && dtype_of(seg_logits, "seg_logits") != Dtype::float64,
                  "float64 is not computed here");
}

std::vector<int64_t> without_channels(const Tensor& x) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.erase(shape.begin() + 1);
  return shape;
}

Tiles tiles_of(const Tensor& x) {
  return split_pixels(x.size(0), pixel_count(x), kLargestTile, kTileMultiple, kTasks);
}

// Of maps that are walked twice: `maps` such tiles lie in the L2 cache.
Tiles small_tiles_of(const Tensor& x, int64_t maps) {
  const int64_t floats = kCachedFloats / (maps * std::max<int64_t>(x.size(1), 1));
  const int64_t largest = std::clamp(floats / kTileMultiple * kTileMultiple, kTileMultiple, kLargestTile);
  return split_pixels(x.size(0), pixel_count(x), largest, kTileMultiple, kTasks);
}

// Any memory that the kernels can walk: one stride for all pixels.
Tensor walkable(const Tensor& logits) { return pixel_stride(logits) > 0 ? logits : torch::stable::contiguous(logits); }

template <typename Kernel, typename Job>
void run(Kernel kernel, const Job& job) {
  torch::stable::parallel_for(0, job.x.batch * job.tiles.count, 1,
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

// Sums of the tiles' rows of `width` numbers, in their order: (B, width).
std::vector<double> add_tiles(const float* rows, int64_t batch, int64_t tiles, int64_t width) {
  std::vector<double> total(batch * width, 0.0);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < tiles; ++t, rows += width)
      for (int64_t i = 0; i < width; ++i) total[b * width + i] += rows[i];
  return total;
}

// A head's operands, kept for as long as a job reads them.
struct HeadTensors {
  Tensor weight, bias;
};

HeadTensors head_of(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) == x.size(1), "head must be (K, C)");
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), "head_bias must be (K,)");
  for (const Tensor& tensor : {x, weight, bias})
    STD_TORCH_CHECK(dtype_of(tensor, "x") == Dtype::float32, "with a head everything must be float32");
  return {torch::stable::contiguous(weight), torch::stable::contiguous(bias)};
}

// (B, K, *spatial of x), contiguous.
Tensor logits_like(const Tensor& x, int64_t classes) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape[1] = classes;
  return empty_float(x, shape);
}

// With a head, seg_logits is written: contiguous float32.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x_in, const Tensor& seg_logits, const FusionHead& head,
                                                   const Tensor& prior_in, const Tensor& cls_uncertainty_in,
                                                   const Tensor& coeffs_in, double tau) {
  check_fusion(x_in, seg_logits, prior_in, cls_uncertainty_in, coeffs_in);
  const Order order = order_of(x_in);
  const Tensor x = in_order(x_in, order), logits = walkable(seg_logits);
  const Tensor prior = as_float(prior_in), cls_uncertainty = as_float(cls_uncertainty_in);
  const Tensor coeffs = as_float(coeffs_in);
  const int64_t batch = x.size(0), channels = x.size(1), pixels = pixel_count(x);
  const Tiles tiles = head.weight == nullptr ? tiles_of(x) : small_tiles_of(x, 1);
  OutputMap out(x_in, order);
  Tensor u = empty_float(x, without_channels(x));
  Tensor pooled = empty_float(x, {batch, channels}), mean = empty_float(x, {batch});
  const Tensor sums = empty_float(x, {batch * tiles.count * (channels + 2)});
  const FusionForward job{read_map(x, "x"),
                          out.map("x"),
                          read_map(logits, "seg_logits"),
                          order,
                          tiles,
                          prior.const_data_ptr<float>(),
                          cls_uncertainty.const_data_ptr<float>(),
                          coeffs.const_data_ptr<float>(),
                          static_cast<float>(tau),
                          head,
                          u.mutable_data_ptr<float>(),
                          sums.mutable_data_ptr<float>()};
  run(BTI_FAST_SELECT(fusion_forward), job);
  const auto total = add_tiles(job.sums, batch, tiles.count, channels + 2);
  float* pooled_out = pooled.mutable_data_ptr<float>();
  float* mean_out = mean.mutable_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b) {
    const double* row = total.data() + b * (channels + 2);
    for (int64_t c = 0; c < channels; ++c) pooled_out[b * channels + c] = static_cast<float>(row[c] / row[channels]);
    mean_out[b] = static_cast<float>(row[channels + 1] / static_cast<double>(pixels));
  }
  return {out.finish(), pooled, mean, u};
}

struct FusionGradients {
  Tensor x, logits, prior, cls_uncertainty, coeffs;
  std::vector<double> head;  // (K, C) and (K,) one after the other, where there is a head
};

FusionGradients backward(const Tensor& grad_x_in, const Tensor& grad_pooled_in, const Tensor& grad_mean_in,
                         const Tensor& grad_u_in, const Tensor& x_in, const Tensor& seg_logits, const FusionHead& head,
                         const Tensor& prior_in, const Tensor& cls_uncertainty_in, const Tensor& coeffs_in,
                         const Tensor& pooled_in, const Tensor& mean_uncertainty_in, double tau) {
  check_fusion(x_in, seg_logits, prior_in, cls_uncertainty_in, coeffs_in);
  check_same_shape(pooled_in, prior_in, "pooled");
  check_same_shape(mean_uncertainty_in, cls_uncertainty_in, "mean_uncertainty");
  check_same_shape(grad_x_in, x_in, "grad_x");
  check_same_shape(grad_pooled_in, prior_in, "grad_pooled");
  check_same_shape(grad_mean_in, cls_uncertainty_in, "grad_mean");
  STD_TORCH_CHECK(grad_x_in.scalar_type() == x_in.scalar_type(), "grad_x must have the dtype of x");
  const Order order = order_of(x_in);
  const Tensor x = in_order(x_in, order), grad_out = in_order(grad_x_in, order), logits = walkable(seg_logits);
  const Tensor prior = as_float(prior_in), cls_uncertainty = as_float(cls_uncertainty_in);
  const Tensor coeffs = as_float(coeffs_in), grad_pooled = as_float(grad_pooled_in);
  const Tensor grad_mean = as_float(grad_mean_in), grad_u = as_float(grad_u_in);
  const Tensor pooled = as_float(pooled_in), mean_u = as_float(mean_uncertainty_in);
  const int64_t batch = x.size(0), channels = x.size(1), pixels = pixel_count(x);
  const int64_t of_head = head.weight == nullptr ? 0 : seg_logits.size(1) * (channels + 1);
  const int64_t width = channels + 2 + of_head;
  STD_TORCH_CHECK(grad_u.numel() == batch * pixels, "grad_u has the wrong shape");
  const Tiles tiles = head.weight == nullptr ? tiles_of(x) : small_tiles_of(x, 3);
  OutputMap grad_x(x_in, order);
  Tensor grad_logits = torch::stable::empty_like(seg_logits);
  const bool direct = pixel_stride(grad_logits) > 0;
  Tensor written = direct ? grad_logits : torch::stable::new_empty(seg_logits, seg_logits.sizes());
  const Tensor sums = empty_float(x, {batch * tiles.count * width});
  std::vector<float> inverse(batch), constant(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const double weight = static_cast<double>(pixels) * ((1 - mean_u.const_data_ptr<float>()[b]) + 1e-3f);
    double product = 0;
    for (int64_t i = b * channels; i < (b + 1) * channels; ++i)
      product += static_cast<double>(grad_pooled.const_data_ptr<float>()[i]) * pooled.const_data_ptr<float>()[i];
    inverse[b] = static_cast<float>(1 / weight);
    constant[b] = static_cast<float>(product / weight);
  }
  const FusionBackward job{read_map(x, "x"),
                           read_map(grad_out, "grad_x"),
                           grad_x.map("x"),
                           read_map(logits, "seg_logits"),
                           map_of(written, written.mutable_data_ptr(), "seg_logits"),
                           order,
                           tiles,
                           prior.const_data_ptr<float>(),
                           cls_uncertainty.const_data_ptr<float>(),
                           coeffs.const_data_ptr<float>(),
                           static_cast<float>(tau),
                           head,
                           grad_pooled.const_data_ptr<float>(),
                           grad_mean.const_data_ptr<float>(),
                           grad_u.const_data_ptr<float>(),
                           inverse.data(),
                           constant.data(),
                           width,
                           sums.mutable_data_ptr<float>()};
  run(BTI_FAST_SELECT(fusion_backward), job);
  const auto sum = add_tiles(job.sums, batch, tiles.count, width);

  Tensor grad_prior = empty_float(x, {batch, channels}), grad_cls = empty_float(x, {batch});
  Tensor grad_coeffs = empty_float(x, {3});
  double alpha = 0, beta = 0, gamma = 0;
  std::vector<double> head_sums(of_head, 0.0);
  for (int64_t b = 0; b < batch; ++b) {
    const double* row = sum.data() + b * width;
    for (int64_t c = 0; c < channels; ++c)
      grad_prior.mutable_data_ptr<float>()[b * channels + c] = static_cast<float>(row[c]);
    const double e = row[channels];
    alpha += row[channels + 1];
    beta += (1.0 - job.cls_uncertainty[b]) * e;
    gamma += e;
    for (int64_t i = 0; i < of_head; ++i) head_sums[i] += row[channels + 2 + i];
    grad_cls.mutable_data_ptr<float>()[b] = static_cast<float>(-job.coeffs[1] * e);
  }
  grad_coeffs.mutable_data_ptr<float>()[0] = static_cast<float>(alpha);
  grad_coeffs.mutable_data_ptr<float>()[1] = static_cast<float>(beta);
  grad_coeffs.mutable_data_ptr<float>()[2] = static_cast<float>(gamma);
  if (!direct) torch::stable::copy_(grad_logits, written);
  return {grad_x.finish(), grad_logits, as_gradient(grad_prior, prior_in), as_gradient(grad_cls, cls_uncertainty_in),
          as_gradient(grad_coeffs, coeffs_in), std::move(head_sums)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_fusion(const Tensor& x, const Tensor& seg_logits, const Tensor& prior,
                                                        const Tensor& cls_uncertainty, const Tensor& coeffs,
                                                        double tau) {
  return forward(x, seg_logits, {}, prior, cls_uncertainty, coeffs, tau);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_fusion_backward(
    const Tensor& grad_x, const Tensor& grad_pooled, const Tensor& grad_mean, const Tensor& grad_u, const Tensor& x,
    const Tensor& seg_logits, const Tensor& prior, const Tensor& cls_uncertainty, const Tensor& coeffs,
    const Tensor& pooled, const Tensor& mean_uncertainty, double tau) {
  const FusionGradients grads = backward(grad_x, grad_pooled, grad_mean, grad_u, x, seg_logits, {}, prior,
                                         cls_uncertainty, coeffs, pooled, mean_uncertainty, tau);
  return {grads.x, grads.logits, grads.prior, grads.cls_uncertainty, grads.coeffs};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> headed_gated_fusion(const Tensor& x, const Tensor& head,
                                                                       const Tensor& head_bias, const Tensor& prior,
                                                                       const Tensor& cls_uncertainty,
                                                                       const Tensor& coeffs, double tau) {
  const HeadTensors kept = head_of(x, head, head_bias);
  const Tensor logits = logits_like(x, head.size(0));
  const auto [out, pooled, mean, u] =
      forward(x, logits, {kept.weight.const_data_ptr<float>(), kept.bias.const_data_ptr<float>(), nullptr}, prior,
              cls_uncertainty, coeffs, tau);
  return {out, pooled, mean, u, logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> headed_gated_fusion_backward(
    const Tensor& grad_x, const Tensor& grad_pooled, const Tensor& grad_mean, const Tensor& grad_u,
    const Tensor& grad_logits, const Tensor& x, const Tensor& head, const Tensor& head_bias, const Tensor& logits,
    const Tensor& prior, const Tensor& cls_uncertainty, const Tensor& coeffs, const Tensor& pooled,
    const Tensor& mean_uncertainty, double tau) {
  const HeadTensors kept = head_of(x, head, head_bias);
  check_same_shape(grad_logits, logits, "grad_logits");
  const Tensor given = as_float(grad_logits), contiguous_logits = as_float(logits);
  const FusionGradients grads = backward(
      grad_x, grad_pooled, grad_mean, grad_u, x, contiguous_logits,
      {kept.weight.const_data_ptr<float>(), kept.bias.const_data_ptr<float>(), given.const_data_ptr<float>()}, prior,
      cls_uncertainty, coeffs, pooled, mean_uncertainty, tau);
  Tensor to_head = empty_float(x, head.sizes()), to_bias = empty_float(x, head_bias.sizes());
  std::copy_n(grads.head.begin(), to_head.numel(), to_head.mutable_data_ptr<float>());
  std::copy_n(grads.head.begin() + to_head.numel(), to_bias.numel(), to_bias.mutable_data_ptr<float>());
  return {grads.x, to_head, to_bias, grads.prior, grads.cls_uncertainty, grads.coeffs};
}

}  // namespace bti_fast
