// A sum of products of maps with matrices, each map first convolved depthwise or taken as it is: what passes between
// the binding and its kernel. One pass: what the depthwise convolutions give never leaves the cache.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa_dispatch.h"

namespace bti_fast {

constexpr int64_t kPackedColumns = 16;  // of a panel of a packed matrix, whatever the instruction set

struct SeparableSource {
  const float* x;           // [batch, height, width, channels]
  const float* taps;        // [9, channels] of a 3x3 kernel, or nullptr: x itself
  int64_t channels, height, width;
  int64_t dilation;         // of the kernel
  int64_t down, right;      // without a kernel: from a position to where it reads, zero beyond the map
  int64_t first;            // of the product's depth: where its channels begin
};

struct SeparableProduct {
  std::vector<SeparableSource> sources;  // their channels, one after the other, are the depth
  const float* matrix;                   // packed: [columns / 16 rounded up, depth, 16], zeros beyond the columns
  const float* factor;                   // [batch, depth] of what is multiplied, or nullptr
  const float* bias;                     // [columns] or, bias_step apart, one such for each sample, or nullptr
  int64_t bias_step;
  const float* skip;                     // like out, added, or nullptr
  const float *lower, *upper;            // [columns] bounds of the result, or nullptr
  bool silu;                             // of the sum, before the bounds
  float* out;                            // [batch, out_height, out_width, columns]
  int64_t batch, height, width;          // positions that are computed
  int64_t stride, top, left;             // and where in the result: at stride * y + top, stride * x + left
  int64_t out_height, out_width;
  int64_t depth, columns;
  int64_t depth_block;                   // channels that are multiplied at a time: the order of the sums
  // A task is a block of positions of all samples and a block of columns.
  int64_t rows_per_task, columns_per_task, column_tasks;
};

// Appends a source, its channels next in the depth.
void add_source(SeparableProduct& job, SeparableSource source);

// Divides the job into tasks and runs it; everything before depth_block is set. The result may be empty.
void run(SeparableProduct& job);

// Positions of all samples that are convolved at a time.
constexpr int64_t kRowsAtATime = 96;

// Tasks [begin, end). Every result is summed in an order of its own, so any division into tasks gives the same bits.
BTI_FAST_KERNEL(void, separable_product, (const SeparableProduct& job, int64_t begin, int64_t end))

}  // namespace bti_fast
