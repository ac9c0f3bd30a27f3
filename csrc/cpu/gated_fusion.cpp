#include "cpu/gated_fusion.h"

#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "cpu/feature_map_of.h"
#include "cpu/operators.h"

namespace bti_fast {

namespace {

constexpr int64_t kLargestTile = 1024, kTileMultiple = 64, kTasks = 8;

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

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_fusion(const Tensor& x_in, const Tensor& seg_logits,
                                                        const Tensor& prior_in, const Tensor& cls_uncertainty_in,
                                                        const Tensor& coeffs_in, double tau) {
  check_fusion(x_in, seg_logits, prior_in, cls_uncertainty_in, coeffs_in);
  const Order order = order_of(x_in);
  const Tensor x = in_order(x_in, order), logits = walkable(seg_logits);
  const Tensor prior = as_float(prior_in), cls_uncertainty = as_float(cls_uncertainty_in);
  const Tensor coeffs = as_float(coeffs_in);
  const int64_t batch = x.size(0), channels = x.size(1), pixels = pixel_count(x);
  const Tiles tiles = tiles_of(x);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_fusion_backward(
    const Tensor& grad_x_in, const Tensor& grad_pooled_in, const Tensor& grad_mean_in, const Tensor& grad_u_in,
    const Tensor& x_in, const Tensor& seg_logits, const Tensor& prior_in, const Tensor& cls_uncertainty_in,
    const Tensor& coeffs_in, const Tensor& pooled_in, const Tensor& mean_uncertainty_in, double tau) {
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
  const int64_t batch = x.size(0), channels = x.size(1), pixels = pixel_count(x), width = channels + 2;
  STD_TORCH_CHECK(grad_u.numel() == batch * pixels, "grad_u has the wrong shape");
  const Tiles tiles = tiles_of(x);
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
                           grad_pooled.const_data_ptr<float>(),
                           grad_mean.const_data_ptr<float>(),
                           grad_u.const_data_ptr<float>(),
                           inverse.data(),
                           constant.data(),
                           sums.mutable_data_ptr<float>()};
  run(BTI_FAST_SELECT(fusion_backward), job);
  const auto sum = add_tiles(job.sums, batch, tiles.count, width);

  Tensor grad_prior = empty_float(x, {batch, channels}), grad_cls = empty_float(x, {batch});
  Tensor grad_coeffs = empty_float(x, {3});
  double alpha = 0, beta = 0, gamma = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const double* row = sum.data() + b * width;
    for (int64_t c = 0; c < channels; ++c)
      grad_prior.mutable_data_ptr<float>()[b * channels + c] = static_cast<float>(row[c]);
    const double e = row[channels];
    alpha += row[channels + 1];
    beta += (1.0 - job.cls_uncertainty[b]) * e;
    gamma += e;
    grad_cls.mutable_data_ptr<float>()[b] = static_cast<float>(-job.coeffs[1] * e);
  }
  grad_coeffs.mutable_data_ptr<float>()[0] = static_cast<float>(alpha);
  grad_coeffs.mutable_data_ptr<float>()[1] = static_cast<float>(beta);
  grad_coeffs.mutable_data_ptr<float>()[2] = static_cast<float>(gamma);
  if (!direct) torch::stable::copy_(grad_logits, written);
  return {grad_x.finish(), grad_logits, as_gradient(grad_prior, prior_in), as_gradient(grad_cls, cls_uncertainty_in),
          as_gradient(grad_coeffs, coeffs_in)};
}

}  // namespace bti_fast
