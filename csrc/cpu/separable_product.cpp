#include "cpu/separable_product.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/in_parallel.h"
#include "cpu/operators.h"
#include "cpu/packed_matrix.h"

namespace bti_fast {

namespace {

constexpr int64_t kDepthAtATime = 384;  // a panel of that depth lies in the L1 cache, kRowsAtATime such rows in the L2
constexpr int64_t kRowsPerTask = 384;
constexpr int64_t kLeastColumns = 128;  // of a task: each convolves its positions anew
constexpr int64_t kLeastRows = 24;      // of a task: each reads its columns anew

int64_t rounded_up(int64_t value, int64_t step) { return parts(value, step) * step; }

// How many rows and columns a task has: as many tasks as keep all threads at work, all about as large.
void divide(SeparableProduct& job, int64_t threads) {
  const int64_t rows = job.batch * job.height * job.width, wanted = threads > 1 ? 4 * threads : 1;
  int64_t row_tasks = parts(rows, kRowsPerTask);
  if (row_tasks >= threads) row_tasks = rounded_up(row_tasks, threads);
  job.column_tasks = std::clamp<int64_t>(parts(wanted, row_tasks), 1, parts(job.columns, kLeastColumns));
  if (row_tasks * job.column_tasks < wanted)
    row_tasks = std::min(parts(wanted, job.column_tasks), parts(rows, kLeastRows));
  job.rows_per_task = rounded_up(parts(rows, row_tasks), 12);
  job.columns_per_task = rounded_up(parts(job.columns, job.column_tasks), 2 * kPackedColumns);
  job.column_tasks = parts(job.columns, job.columns_per_task);
}

}  // namespace

void add_source(SeparableProduct& job, SeparableSource source) {
  source.first = job.depth;
  job.depth += source.channels;
  job.sources.push_back(source);
}

void run(SeparableProduct& job) {
  const int64_t rows = job.batch * job.height * job.width;
  if (rows == 0) return;
  job.depth_block = rounded_up(parts(job.depth, parts(job.depth, kDepthAtATime)), kPackedColumns);
  divide(job, torch::stable::get_num_threads());
  in_parallel(BTI_FAST_SELECT(separable_product), job, parts(rows, job.rows_per_task) * job.column_tasks, 1);
}

namespace {

// The same with a matrix of its own for each sample, one after the other.
void run_by_sample(SeparableProduct job) {
  const int64_t batch = job.batch, positions = job.height * job.width;
  const int64_t matrix_step = rounded_up(job.columns, kPackedColumns) * job.depth;
  job.batch = 1;
  for (int64_t sample = 0; sample < batch; ++sample) {
    SeparableProduct one = job;
    for (SeparableSource& source : one.sources) source.x += sample * positions * source.channels;
    one.matrix += sample * matrix_step;
    if (one.factor != nullptr) one.factor += sample * one.depth;
    if (one.bias != nullptr) one.bias += sample * one.bias_step;
    if (one.skip != nullptr) one.skip += sample * positions * one.columns;
    one.out += sample * positions * one.columns;
    run(one);
  }
}

}  // namespace

Tensor separable_product(const std::vector<Tensor>& maps, const std::vector<Tensor>& taps,
                         const std::vector<int64_t>& dilations, const Tensor& matrix, int64_t columns,
                         const std::optional<Tensor>& factor, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& skip, const std::optional<Tensor>& lower,
                         const std::optional<Tensor>& upper, bool silu) {
  STD_TORCH_CHECK(!maps.empty() && taps.size() == maps.size() && dilations.size() == maps.size(),
                  "maps, taps and dilations must be as many, and at least one");
  SeparableProduct job{};
  const Tensor& like = maps[0];
  STD_TORCH_CHECK(like.dim() == 4, "maps must be (B, C, H, W)");
  job.batch = like.size(0), job.height = like.size(2), job.width = like.size(3);
  job.stride = 1, job.out_height = job.height, job.out_width = job.width;
  for (size_t i = 0; i < maps.size(); ++i) {
    const Tensor& x = maps[i];
    STD_TORCH_CHECK(x.dim() == 4 && lies(x, {0, 2, 3, 1}), "maps must be (B, C, H, W), dense and channels_last");
    STD_TORCH_CHECK(x.size(0) == job.batch && x.size(2) == job.height && x.size(3) == job.width,
                    "maps must be of one batch, height and width");
    SeparableSource source{floats(x, "maps"), nullptr, x.size(1), job.height, job.width, dilations[i], 0, 0, 0};
    if (taps[i].numel() > 0) {
      const bool fits = taps[i].dim() == 2 && taps[i].size(0) == 9 && taps[i].size(1) == x.size(1);
      STD_TORCH_CHECK(fits && lies(taps[i], {0, 1}), "taps must be (9, ", x.size(1), "), contiguous");
      STD_TORCH_CHECK(dilations[i] >= 1, "dilations must be at least 1, got ", dilations[i]);
      source.taps = floats(taps[i], "taps");
    }
    add_source(job, source);
  }
  STD_TORCH_CHECK(job.depth > 0, "maps must have a channel");
  job.columns = columns;
  const bool by_sample = matrix.dim() == 4;
  STD_TORCH_CHECK(!by_sample || (matrix.size(0) == job.batch && job.batch > 0 && lies(matrix, {0, 1, 2, 3})),
                  "matrix must be one, or ", job.batch, ", contiguous");
  const Tensor one = by_sample ? torch::stable::select(matrix, 0, 0) : matrix;
  job.matrix = packed_matrix(one, "matrix", columns, job.depth);
  if (factor) {
    STD_TORCH_CHECK(factor->dim() == 2 && factor->size(0) == job.batch && factor->size(1) == job.depth &&
                        lies(*factor, {0, 1}),
                    "factor must be (", job.batch, ", ", job.depth, "), contiguous");
    job.factor = floats(*factor, "factor");
  }
  if (bias) {
    const bool its_own = bias->dim() == 2;
    STD_TORCH_CHECK(bias->size(-1) == columns && (its_own ? bias->size(0) == job.batch && lies(*bias, {0, 1})
                                                            : bias->dim() == 1 && lies(*bias, {0})),
                    "bias must be (", columns, ",) or (", job.batch, ", ", columns, "), contiguous");
    job.bias = floats(*bias, "bias");
    job.bias_step = its_own ? columns : 0;
  }
  if (skip) {
    STD_TORCH_CHECK(skip->dim() == 4 && skip->size(0) == job.batch && skip->size(1) == columns &&
                        skip->size(2) == job.height && skip->size(3) == job.width && lies(*skip, {0, 2, 3, 1}),
                    "skip must be (", job.batch, ", ", columns, ", ", job.height, ", ", job.width,
                    "), dense and channels_last");
    job.skip = floats(*skip, "skip");
  }
  job.lower = channel_values(lower, "lower", columns);
  job.upper = channel_values(upper, "upper", columns);
  job.silu = silu;
  // (B, H, W, columns) in memory, seen as (B, columns, H, W).
  const Tensor rows = torch::stable::new_empty(like, {job.batch, job.height, job.width, columns});
  job.out = memory(rows);
  by_sample ? run_by_sample(job) : run(job);
  return torch::stable::transpose(torch::stable::transpose(rows, 2, 3), 1, 2);
}

}  // namespace bti_fast
