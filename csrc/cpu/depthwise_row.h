// Depthwise convolution of positions of one row of a channels_last map (kernels only). Positions a dilation apart are
// neighbours of one phase: some of them are computed together, so that each weight and each input is loaded once for
// all of them.
#pragma once

#include "cpu/rows.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

constexpr int kTogether = kBytes == 64 ? 8 : 4;  // positions, as far as the registers go
constexpr int64_t kLine = 64 / sizeof(float);

struct DepthwiseRow {
  const float* in;       // position 0 of the row of the map where the first row of taps would lie
  int64_t in_step;       // from position to position
  int64_t distance;      // between the rows that taps read
  const float* taps;     // [kernel * kernel, taps_step], from the first channel on
  int64_t taps_step;
  float* out;            // of position 0
  int64_t out_step;
  int64_t channels;      // of them, from the first one on
  int64_t width, dilation;
  int64_t first, last;   // rows of taps within the map
};

// Taps begin .. end of a kernel whose first one lies at `first`, `dilation` apart, within 0 .. size.
struct Taps {
  int64_t begin, end;
};
inline Taps taps_within(int64_t first, int64_t kernel, int64_t dilation, int64_t size) {
  Taps taps{0, kernel};
  while (first + taps.begin * dilation < 0) ++taps.begin;
  while (first + (taps.end - 1) * dilation >= size) --taps.end;
  return taps;
}

// T positions from `at` on, a dilation apart, of every channel; finish(sums, channel, lanes) before they are stored.
// Edge: some taps may lie beyond the map's width.
template <int K, int T, bool Edge, typename Finish>
void depthwise_together(const DepthwiseRow row, int64_t at, const Finish finish) {
  const int64_t in_step = row.dilation * row.in_step, out_step = row.dilation * row.out_step;
  const int64_t left = at - K / 2 * row.dilation;  // of the first tap
  const float* in = row.in + row.first * row.distance + left * row.in_step;
  const float* taps = row.taps + row.first * K * row.taps_step;
  float* out = row.out + at * row.out_step;
  // What the next positions will load of the newest row, and where they will store: too many short streams for the
  // processor to foresee.
  const float* next = in + (row.last - 1 - row.first) * row.distance + (T + K - 1) * in_step;
  bool within[T + K - 1];
  for (int k = 0; k < T + K - 1; ++k) within[k] = left + k * row.dilation >= 0 && left + k * row.dilation < row.width;

  const auto vector = [&](int64_t c, int lanes, auto load, auto store) __attribute__((always_inline)) {
    if (c % kLine == 0) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        __builtin_prefetch(next + c + t * in_step, 0, 2);
        __builtin_prefetch(out + c + (T + t) * out_step, 1, 2);
      }
    }
    VecF acc[T]{};
    const float *from = in + c, *weight = taps + c;
    for (int64_t i = row.first; i < row.last; ++i, from += row.distance, weight += K * row.taps_step) {
      VecF x[T + K - 1];
#pragma GCC unroll 16
      for (int k = 0; k < T + K - 1; ++k) x[k] = !Edge || within[k] ? load(from + k * in_step) : VecF{};
      // Tap by tap, so that no sum waits for its own last addition.
#pragma GCC unroll 5
      for (int j = 0; j < K; ++j) {
        const VecF w = load(weight + j * row.taps_step);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) acc[t] += w * x[t + j];
      }
    }
    finish(acc, c, lanes);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) store(acc[t], out + c + t * out_step);
  };
  constexpr int lanes = VecOf<float>::lanes;
  int64_t c = 0;
  for (; c + lanes <= row.channels; c += lanes)
    vector(c, lanes, [](const float* p) { return load_dense(p); }, [](VecF v, float* p) { store_dense(v, p); });
  const int rest = static_cast<int>(row.channels - c);
  if (rest > 0)
    vector(
        c, rest, [&](const float* p) { return load_first(p, rest); },
        [&](VecF v, float* p) { store_first(v, p, rest); });
}

// Of the positions first, first + dilation, ... before `end`; where the last ones are not T, some are computed twice.
template <int K, int T, typename Finish>
void depthwise_phase(const DepthwiseRow& row, int64_t first, int64_t end, const Finish& finish) {
  const int64_t count = (end - first + row.dilation - 1) / row.dilation;
  if constexpr (T > 1) {
    if (count < T) return depthwise_phase<K, T / 2>(row, first, end, finish);
  }
  const int64_t reach = K / 2 * row.dilation;
  for (int64_t k = 0; k < count; k += T) {
    const int64_t at = first + (k + T <= count ? k : count - T) * row.dilation;
    const bool edge = at < reach || at + (T - 1) * row.dilation + reach >= row.width;
    edge ? depthwise_together<K, T, true>(row, at, finish) : depthwise_together<K, T, false>(row, at, finish);
  }
}

// Positions begin .. end of the row.
template <int K, typename Finish>
void depthwise_row(const DepthwiseRow& row, int64_t begin, int64_t end, const Finish& finish) {
  for (int64_t at = begin; at < begin + row.dilation && at < end; ++at)
    depthwise_phase<K, kTogether>(row, at, end, finish);
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
