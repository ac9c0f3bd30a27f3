#include "cpu/normalised_silu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/dense_floats.h"
#include "cpu/in_parallel.h"
#include "cpu/operators.h"
#include "cpu/part_sums.h"

namespace bti_fast {

namespace {

constexpr int64_t kElementsPerTask = 1 << 15;  // work below this many elements is not worth handing out
constexpr int64_t kRowsPerPart = 128;          // so few that their sums lose nothing to rounding

// x (..., C), contiguous, as rows; the division into parts depends on the shape alone, so that the number of threads
// changes no bit.
struct Rows {
  const float* x;
  int64_t rows, channels;
  int64_t part_count() const { return (rows + kRowsPerPart - 1) / kRowsPerPart; }
  int64_t per_task() const { return std::max<int64_t>(1, kElementsPerTask / channels); }
  int64_t parts_per_task() const { return std::max<int64_t>(1, per_task() / kRowsPerPart); }
};

Rows rows_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_contiguous(), name, " must be (..., C), contiguous");
  const int64_t channels = x.size(x.dim() - 1);
  return {floats(x, name), channels == 0 ? 0 : x.numel() / channels, channels};
}

const float* rows_like(const Tensor& other, const Tensor& x, const char* name) {
  bool alike = other.dim() == x.dim() && other.is_contiguous();
  for (int64_t axis = 0; alike && axis < x.dim(); ++axis) alike = other.size(axis) == x.size(axis);
  STD_TORCH_CHECK(alike, name, " must have the shape of x, contiguous");
  return floats(other, name);
}

void compute(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
             const Tensor& out) {
  const Rows rows = rows_of(x, "x");
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "needs scale and shift, or neither");
  const ScaledSilu job{rows.x, channel_values(scale, "scale", rows.channels),
                       channel_values(shift, "shift", rows.channels), memory(out), rows.channels};
  if (x.numel() == 0) return;
  in_parallel(BTI_FAST_SELECT(scaled_silu), job, rows.rows, rows.per_task());
}

}  // namespace

void scaled_silu_(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift) {
  compute(x, scale, shift, x);
}

Tensor scaled_silu(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift) {
  const Tensor out = torch::stable::empty_like(x);
  compute(x, scale, shift, out);
  return out;
}

std::tuple<Tensor, Tensor> batch_statistics(const Tensor& x) {
  const Rows rows = rows_of(x, "x");
  STD_TORCH_CHECK(rows.rows > 0, "x must have rows");
  const Tensor mean = torch::stable::new_empty(x, {rows.channels});
  const Tensor variance = torch::stable::new_empty(x, {rows.channels});
  const Tensor parts = torch::stable::new_empty(x, {2, rows.part_count(), rows.channels});
  const BatchStatistics job{rows.x,
                            memory(parts),
                            memory(parts) + rows.part_count() * rows.channels,
                            memory(mean),
                            memory(variance),
                            rows.rows,
                            rows.channels,
                            rows.part_count()};
  in_parallel(BTI_FAST_SELECT(batch_statistics), job, job.part_count, rows.parts_per_task());
  in_parallel(BTI_FAST_SELECT(batch_statistics_combine), job, job.channels,
              std::max<int64_t>(16, kElementsPerTask / job.part_count));
  return {mean, variance};
}

Tensor scaled_silu_sums(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                        const Tensor& mean) {
  const Rows rows = rows_of(x, "x");
  STD_TORCH_CHECK(rows.rows > 0, "x must have rows");
  const Tensor parts = torch::stable::new_empty(x, {rows.part_count(), 2, rows.channels});
  const Tensor out = torch::stable::new_empty(x, {2, rows.channels});
  const ScaledSiluSums job{rows_like(grad, x, "grad"),
                           rows.x,
                           channel_values(scale, "scale", rows.channels),
                           channel_values(shift, "shift", rows.channels),
                           channel_values(mean, "mean", rows.channels),
                           memory(parts),
                           rows.rows,
                           rows.channels,
                           rows.part_count()};
  in_parallel(BTI_FAST_SELECT(scaled_silu_sums), job, job.part_count, rows.parts_per_task());
  sum_parts({memory(parts), memory(out), job.part_count, 2 * job.channels, 1}, 1);
  return out;
}

Tensor scaled_silu_gradient(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                            const std::optional<Tensor>& mean, const std::optional<Tensor>& slope,
                            const std::optional<Tensor>& offset) {
  const Rows rows = rows_of(x, "x");
  STD_TORCH_CHECK(mean.has_value() == slope.has_value() && mean.has_value() == offset.has_value(),
                  "needs mean, slope and offset, or none of them");
  const Tensor out = torch::stable::empty_like(x);
  const ScaledSiluGradient job{rows_like(grad, x, "grad"),
                               rows.x,
                               channel_values(scale, "scale", rows.channels),
                               channel_values(shift, "shift", rows.channels),
                               channel_values(mean, "mean", rows.channels),
                               channel_values(slope, "slope", rows.channels),
                               channel_values(offset, "offset", rows.channels),
                               memory(out),
                               rows.channels};
  if (x.numel() == 0) return out;
  in_parallel(BTI_FAST_SELECT(scaled_silu_gradient), job, rows.rows, rows.per_task());
  return out;
}

}  // namespace bti_fast
