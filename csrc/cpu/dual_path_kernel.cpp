// Attention by channel and by position of channels_last maps: every pass reads a position's channels in their order.
#include "cpu/dual_path.h"

#include <limits>

#include "cpu/rows.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

constexpr int kLanes = VecOf<float>::lanes;

// The positions of one part, as rows of the whole batch, and its sums, zeroed.
struct Part {
  int64_t sample, begin, end;
  float* sums;
};

BTI_FAST_INLINE Part part_at(const DualPathParts& parts, int64_t number, int64_t positions, int64_t channels) {
  const int64_t sample = number / parts.part_count, k = number % parts.part_count, first = sample * positions;
  float* sums = parts.sums + number * channels;
  clear(sums, channels);
  return {sample, first + positions * k / parts.part_count, first + positions * (k + 1) / parts.part_count, sums};
}

// The larger of two, NaN if either is.
template <typename V>
BTI_FAST_INLINE V larger(V a, V b) {
  return (b > a) | (b != b) ? b : a;
}

// T positions from `at` on together, so that none waits for its own last comparison.
template <int T>
BTI_FAST_INLINE void summarise(const DualPathSummary& job, int64_t at, float* sums) {
  const VecF least = splat<VecF>(-std::numeric_limits<float>::infinity());
  const float* x = job.x + at * job.channels;
  VecF largest[T], total[T]{};
  for (int t = 0; t < T; ++t) largest[t] = least;
  each_vector(job.channels, [&](int64_t c, int n) __attribute__((always_inline)) {
    VecF here{};
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      // T short streams at once are too many for the processor to foresee.
      __builtin_prefetch(x + (T + t) * job.channels + c);
      const VecF v = load_first(x + t * job.channels + c, n);
      here += v;
      total[t] += v;
      largest[t] = larger(largest[t], n == kLanes ? v : first_lanes(n) ? v : least);
    }
    add_first(here, sums + c, n);
  });
  for (int t = 0; t < T; ++t) {
    job.summary[2 * (at + t)] = across(largest[t], [](auto a, auto b) { return larger(a, b); });
    job.summary[2 * (at + t) + 1] = lane_sum(total[t]) / static_cast<float>(job.channels);
  }
}

}  // namespace

void dual_path_summary(const DualPathSummary& job, int64_t begin, int64_t end) {
  for (int64_t number = begin; number < end; ++number) {
    const Part part = part_at(job.parts, number, job.positions, job.channels);
    int64_t at = part.begin;
    for (; at + 4 <= part.end; at += 4) summarise<4>(job, at, part.sums);
    for (; at < part.end; ++at) summarise<1>(job, at, part.sums);
  }
}

void dual_path_summary_gradient(const DualPathSummaryGradient& job, int64_t begin, int64_t end) {
  const float per_position = 1 / static_cast<float>(job.positions), per_channel = 1 / static_cast<float>(job.channels);
  for (int64_t at = begin; at < end; ++at) {
    const float *x = job.x + at * job.channels, *pooled = job.grad_pooled + at / job.positions * job.channels;
    float* grad = job.grad + at * job.channels;
    const float largest = job.summary[2 * at];
    VecI ties{};
    each_vector(job.channels, [&](int64_t c, int n) __attribute__((always_inline)) {
      const VecI tie = load_first(x + c, n) == largest;
      ties -= n == kLanes ? tie : tie & first_lanes(n);
    });
    const float count = lane_sum(__builtin_convertvector(ties, VecF));
    const VecF to_largest = splat<VecF>(job.grad_summary[2 * at] / count);
    const float to_each = job.grad_summary[2 * at + 1] * per_channel;
    each_vector(job.channels, [&](int64_t c, int n) __attribute__((always_inline)) {
      const VecF shared = load_first(pooled + c, n) * per_position + to_each;
      const VecF own = keep(load_first(x + c, n) == largest, to_largest);
      add_first(shared + own, grad + c, n);
    });
  }
}

void dual_path_gate(const DualPathGate& job, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const float *x = job.x + at * job.channels, *channel = job.channel + at / job.positions * job.channels;
    float* out = job.out + at * job.channels;
    const float spatial = job.spatial[at];
    const auto gated = [&](int64_t c, int n) __attribute__((always_inline)) {
      return load_first(x + c, n) * load_first(channel + c, n) * spatial;
    };
    if (job.skip == nullptr) {
      each_vector(job.channels, [&](int64_t c, int n)
                                    __attribute__((always_inline)) { store_first(gated(c, n), out + c, n); });
    } else {
      const float* skip = job.skip + at * job.channels;
      each_vector(job.channels, [&](int64_t c, int n) __attribute__((always_inline)) {
        const VecF y = gated(c, n) + load_first(skip + c, n);
        store_first(y < 0 ? VecF{} : y, out + c, n);
      });
    }
  }
}

void dual_path_gate_gradient(const DualPathGateGradient& job, int64_t begin, int64_t end) {
  for (int64_t number = begin; number < end; ++number) {
    const Part part = part_at(job.parts, number, job.positions, job.channels);
    const float* channel = job.channel + part.sample * job.channels;
    for (int64_t at = part.begin; at < part.end; ++at) {
      const int64_t row = at * job.channels;
      const float *x = job.x + row, *grad = job.grad + row;
      const float spatial = job.spatial[at];
      VecF to_spatial{};
      each_vector(job.channels, [&](int64_t c, int n) __attribute__((always_inline)) {
        VecF g = load_first(grad + c, n);
        if (job.out != nullptr) {
          g = keep(~(load_first(job.out + row + c, n) <= 0), g);
          store_first(g, job.grad_skip + row + c, n);
        }
        const VecF factor = load_first(channel + c, n), product = g * load_first(x + c, n);
        to_spatial += product * factor;
        add_first(product * spatial, part.sums + c, n);
        store_first(g * factor * spatial, job.grad_x + row + c, n);
      });
      job.grad_spatial[at] = lane_sum(to_spatial);
    }
  }
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
