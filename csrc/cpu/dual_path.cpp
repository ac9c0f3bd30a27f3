#include "cpu/dual_path.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/dense_floats.h"
#include "cpu/in_parallel.h"
#include "cpu/operators.h"
#include "cpu/part_sums.h"

namespace bti_fast {

namespace {

constexpr int64_t kElementsPerTask = 1 << 14;  // work below this many elements is not worth handing out
constexpr int64_t kPositionsPerPart = 64;      // so few that their sums lose nothing to rounding

struct Shape {
  int64_t batch, channels, height, width;
  int64_t positions() const { return height * width; }
  // The division depends on the shape alone, so that the number of threads changes no bit.
  int64_t part_count() const { return (positions() + kPositionsPerPart - 1) / kPositionsPerPart; }
  int64_t parts_per_task() const { return std::max<int64_t>(1, kElementsPerTask / kPositionsPerPart / channels); }
  int64_t rows_per_task() const { return std::max<int64_t>(1, kElementsPerTask / channels); }
};

Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && lies(x, {0, 2, 3, 1}),
                  "x must be (B, C, H, W), none of them 0, dense and channels_last");
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

const float* map_like(const Tensor& map, const Shape& shape, const char* name) {
  STD_TORCH_CHECK(map.dim() == 4 && map.size(0) == shape.batch && map.size(1) == shape.channels &&
                      map.size(2) == shape.height && map.size(3) == shape.width && lies(map, {0, 2, 3, 1}),
                  name, " must have the shape of x, dense and channels_last");
  return floats(map, name);
}

const float* rows_of(const Tensor& rows, int64_t first, int64_t second, int64_t third, const char* name) {
  STD_TORCH_CHECK(rows.dim() >= 2 && rows.size(0) == first && rows.numel() == first * second * third &&
                      rows.is_contiguous(),
                  name, " must be contiguous, of ", first * second * third, " elements");
  return floats(rows, name);
}

// [B, C]: factor times the sums of the parts.
Tensor summed(const Tensor& sums, const Shape& shape, double factor) {
  const Tensor out = torch::stable::new_empty(sums, {shape.batch, shape.channels});
  sum_parts({static_cast<const float*>(sums.const_data_ptr()), memory(out), shape.part_count(), shape.channels, factor},
            shape.batch);
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> dual_path_summary(const Tensor& x) {
  const Shape shape = shape_of(x);
  const Tensor summary = torch::stable::new_empty(x, {shape.batch, shape.height, shape.width, 2});
  const Tensor sums = torch::stable::new_empty(x, {shape.batch, shape.part_count(), shape.channels});
  const DualPathSummary job{floats(x, "x"), memory(summary), shape.positions(), shape.channels,
                            {memory(sums), shape.part_count()}};
  in_parallel(BTI_FAST_SELECT(dual_path_summary), job, shape.batch * shape.part_count(), shape.parts_per_task());
  return {summed(sums, shape, 1.0 / static_cast<double>(shape.positions())), summary};
}

void dual_path_summary_gradient_(const Tensor& grad, const Tensor& x, const Tensor& summary, const Tensor& grad_pooled,
                                 const Tensor& grad_summary) {
  const Shape shape = shape_of(x);
  map_like(grad, shape, "grad");
  const DualPathSummaryGradient job{memory(grad),
                                    floats(x, "x"),
                                    rows_of(summary, shape.batch, shape.positions(), 2, "summary"),
                                    rows_of(grad_pooled, shape.batch, shape.channels, 1, "grad_pooled"),
                                    rows_of(grad_summary, shape.batch, shape.positions(), 2, "grad_summary"),
                                    shape.positions(),
                                    shape.channels};
  in_parallel(BTI_FAST_SELECT(dual_path_summary_gradient), job, shape.batch * shape.positions(), shape.rows_per_task());
}

Tensor dual_path_gate(const Tensor& x, const Tensor& channel, const Tensor& spatial,
                      const std::optional<Tensor>& skip) {
  const Shape shape = shape_of(x);
  const Tensor out = torch::stable::empty_like(x);
  const DualPathGate job{floats(x, "x"),
                         rows_of(channel, shape.batch, shape.channels, 1, "channel"),
                         rows_of(spatial, shape.batch, shape.positions(), 1, "spatial"),
                         skip ? map_like(*skip, shape, "skip") : nullptr,
                         memory(out),
                         shape.positions(),
                         shape.channels};
  in_parallel(BTI_FAST_SELECT(dual_path_gate), job, shape.batch * shape.positions(), shape.rows_per_task());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dual_path_gate_gradient(const Tensor& grad, const Tensor& x,
                                                                   const Tensor& channel, const Tensor& spatial,
                                                                   const std::optional<Tensor>& out) {
  const Shape shape = shape_of(x);
  const Tensor grad_x = torch::stable::empty_like(x), grad_spatial = torch::stable::empty_like(spatial);
  const Tensor grad_skip = out ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const Tensor sums = torch::stable::new_empty(x, {shape.batch, shape.part_count(), shape.channels});
  const DualPathGateGradient job{map_like(grad, shape, "grad"),
                                 floats(x, "x"),
                                 rows_of(channel, shape.batch, shape.channels, 1, "channel"),
                                 rows_of(spatial, shape.batch, shape.positions(), 1, "spatial"),
                                 out ? map_like(*out, shape, "out") : nullptr,
                                 memory(grad_x),
                                 memory(grad_spatial),
                                 memory(grad_skip),
                                 shape.positions(),
                                 shape.channels,
                                 {memory(sums), shape.part_count()}};
  in_parallel(BTI_FAST_SELECT(dual_path_gate_gradient), job, shape.batch * shape.part_count(), shape.parts_per_task());
  return {grad_x, summed(sums, shape, 1), grad_spatial, grad_skip};
}

}  // namespace bti_fast
