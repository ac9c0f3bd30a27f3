// Batch normalisation and silu, the channels being neighbours in memory.
#include "cpu/normalised_silu.h"

#include "cpu/rows.h"
#include "cpu/silu.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

void scaled_silu(const ScaledSilu& job, int64_t begin, int64_t end) {
  if (job.scale == nullptr) {  // all rows as one
    const float* x = job.x + begin * job.channels;
    float* out = job.out + begin * job.channels;
    each_vector((end - begin) * job.channels, [&](int64_t i, int n) __attribute__((always_inline)) {
      store_first(silu(load_first(x + i, n)), out + i, n);
    });
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    const float* x = job.x + row * job.channels;
    float* out = job.out + row * job.channels;
    each_vector(job.channels, [&](int64_t c, int n) __attribute__((always_inline)) {
      const VecF y = load_first(x + c, n) * load_first(job.scale + c, n) + load_first(job.shift + c, n);
      store_first(silu(y), out + c, n);
    });
  }
}

void batch_statistics(const BatchStatistics& job, int64_t begin, int64_t end) {
  for (int64_t number = begin; number < end; ++number) {
    const int64_t first = job.rows * number / job.part_count, last = job.rows * (number + 1) / job.part_count;
    const float count = static_cast<float>(last - first);
    float *mean = job.mean + number * job.channels, *square = job.square + number * job.channels;
    clear(mean, job.channels);
    clear(square, job.channels);
    for (int64_t row = first; row < last; ++row) {
      const float* x = job.x + row * job.channels;
      each_vector(job.channels, [&](int64_t c, int n)
                                    __attribute__((always_inline)) { add_first(load_first(x + c, n), mean + c, n); });
    }
    each_vector(job.channels, [&](int64_t c, int n) __attribute__((always_inline)) {
      store_first(load_first(mean + c, n) / count, mean + c, n);
    });
    for (int64_t row = first; row < last; ++row) {
      const float* x = job.x + row * job.channels;
      each_vector(job.channels, [&](int64_t c, int n) __attribute__((always_inline)) {
        const VecF left = load_first(x + c, n) - load_first(mean + c, n);
        add_first(left * left, square + c, n);
      });
    }
  }
}

void batch_statistics_combine(const BatchStatistics& job, int64_t begin, int64_t end) {
  typedef double Wide __attribute__((vector_size(2 * kBytes)));
  const auto rows_of = [&](int64_t k) {
    return static_cast<double>(job.rows * (k + 1) / job.part_count - job.rows * k / job.part_count);
  };
  each_vector(end - begin, [&](int64_t at, int n) {
    const int64_t c = begin + at;
    const auto wide = [&](const float* values, int64_t k) {
      return __builtin_convertvector(load_first(values + k * job.channels + c, n), Wide);
    };
    Wide mean{}, square{};
    for (int64_t k = 0; k < job.part_count; ++k) mean += wide(job.mean, k) * rows_of(k);
    mean /= static_cast<double>(job.rows);
    for (int64_t k = 0; k < job.part_count; ++k) {
      const Wide away = wide(job.mean, k) - mean;
      square += wide(job.square, k) + away * away * rows_of(k);
    }
    store_first(__builtin_convertvector(mean, VecF), job.out_mean + c, n);
    store_first(__builtin_convertvector(square / static_cast<double>(job.rows), VecF), job.out_variance + c, n);
  });
}

void scaled_silu_sums(const ScaledSiluSums& job, int64_t begin, int64_t end) {
  for (int64_t number = begin; number < end; ++number) {
    const int64_t last = job.rows * (number + 1) / job.part_count;
    float* sums = job.sums + number * 2 * job.channels;
    clear(sums, 2 * job.channels);
    for (int64_t row = job.rows * number / job.part_count; row < last; ++row) {
      const float *x = job.x + row * job.channels, *grad = job.grad + row * job.channels;
      each_vector(job.channels, [&](int64_t c, int n) __attribute__((always_inline)) {
        const VecF value = load_first(x + c, n);
        const VecF slope = silu_slope(value * load_first(job.scale + c, n) + load_first(job.shift + c, n));
        const VecF g = load_first(grad + c, n) * slope;
        add_first(g, sums + c, n);
        add_first(g * (value - load_first(job.mean + c, n)), sums + job.channels + c, n);
      });
    }
  }
}

void scaled_silu_gradient(const ScaledSiluGradient& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float *x = job.x + row * job.channels, *grad = job.grad + row * job.channels;
    float* out = job.out + row * job.channels;
    const auto through_silu = [&](int64_t c, int n) __attribute__((always_inline)) {
      const VecF scale = load_first(job.scale + c, n);
      return load_first(grad + c, n) * scale *
             silu_slope(load_first(x + c, n) * scale + load_first(job.shift + c, n));
    };
    if (job.mean == nullptr) {
      each_vector(job.channels, [&](int64_t c, int n)
                                    __attribute__((always_inline)) { store_first(through_silu(c, n), out + c, n); });
    } else {
      each_vector(job.channels, [&](int64_t c, int n) __attribute__((always_inline)) {
        const VecF away = load_first(x + c, n) - load_first(job.mean + c, n);
        const VecF of_statistics = load_first(job.offset + c, n) + load_first(job.slope + c, n) * away;
        store_first(through_silu(c, n) + of_statistics, out + c, n);
      });
    }
  }
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
