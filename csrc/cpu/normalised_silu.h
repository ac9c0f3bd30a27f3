// Batch normalisation and silu of channels_last maps on the CPU, in passes over the map: what passes between the
// bindings and their kernels. The normalisation is x * scale + shift, by channel.
#pragma once

#include <cstdint>

#include "cpu/isa_dispatch.h"

namespace bti_fast {

struct ScaledSilu {
  const float* x;      // [rows, channels]
  const float* scale;  // [channels]; with it shift: both or none
  const float* shift;  // [channels]
  float* out;          // like x, or x itself
  int64_t channels;
};

// Rows [k * rows / part_count, ..) are part k.
struct BatchStatistics {
  const float* x;                  // [rows, channels]
  float* mean;                     // [part_count, channels], of each part
  float* square;                   // [part_count, channels]: squares of what is left of it after its mean, summed
  float *out_mean, *out_variance;  // [channels], of all rows; without Bessel's correction
  int64_t rows, channels, part_count;
};

struct ScaledSiluSums {
  const float *grad, *x;              // [rows, channels]
  const float *scale, *shift, *mean;  // [channels]
  float* sums;  // [part_count, 2, channels]: of the gradient before silu, and of its product with x - mean
  int64_t rows, channels, part_count;
};

struct ScaledSiluGradient {
  const float *grad, *x;                // [rows, channels]
  const float *scale, *shift;           // [channels]
  const float *mean, *slope, *offset;   // [channels] or none: the batch's statistics add offset + slope * (x - mean)
  float* out;
  int64_t channels;
};

// Rows [begin, end); each element is computed alone.
BTI_FAST_KERNEL(void, scaled_silu, (const ScaledSilu& job, int64_t begin, int64_t end))
BTI_FAST_KERNEL(void, scaled_silu_gradient, (const ScaledSiluGradient& job, int64_t begin, int64_t end))
// Parts [begin, end).
BTI_FAST_KERNEL(void, batch_statistics, (const BatchStatistics& job, int64_t begin, int64_t end))
BTI_FAST_KERNEL(void, scaled_silu_sums, (const ScaledSiluSums& job, int64_t begin, int64_t end))
// Channels [begin, end) of all parts together.
BTI_FAST_KERNEL(void, batch_statistics_combine, (const BatchStatistics& job, int64_t begin, int64_t end))

}  // namespace bti_fast
