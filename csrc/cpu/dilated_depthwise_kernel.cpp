// Depthwise convolution of channels_last maps. Positions a dilation apart are neighbours of one phase: some of them are
// computed together, so that each weight and each input is loaded once for all of them.
#include "cpu/dilated_depthwise.h"

#include "cpu/rows.h"
#include "cpu/silu.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

constexpr int kLanes = VecOf<float>::lanes;
constexpr int64_t kLine = 64 / sizeof(float);
constexpr int kTogether = kBytes == 64 ? 8 : 4;  // positions, as far as the registers go

// One row of the output.
struct Row {
  const float* in;      // where the first row of taps would lie
  float* out;
  int64_t first, last;  // rows of the kernel within the map
  int64_t distance;     // of rows of the input
};

// T positions from `at` on, a dilation apart, of every channel. Edge: some taps may lie beyond the map's width.
template <int K, int T, bool Edge>
void together(const DilatedDepthwise job, const Row row, int64_t at) {
  const int64_t channels = job.channels, step = job.dilation * channels;
  const int64_t left = at - K / 2 * job.dilation;  // of the first tap
  const float* in = row.in + row.first * row.distance + left * channels;
  const float* taps = job.weight + row.first * K * channels;
  float* out = row.out + at * channels;
  // What the next positions will load of the newest row, and where they will store: too many short streams for the
  // processor to foresee.
  const float* next = in + (row.last - 1 - row.first) * row.distance + (T + K - 1) * step;
  bool within[T + K - 1];
  for (int k = 0; k < T + K - 1; ++k) within[k] = left + k * job.dilation >= 0 && left + k * job.dilation < job.width;

  const auto vector = [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
    if (c % kLine == 0) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        __builtin_prefetch(next + c + t * step, 0, 2);
        __builtin_prefetch(out + c + (T + t) * step, 1, 2);
      }
    }
    VecF acc[T]{};
    const float *from = in + c, *weight = taps + c;
    for (int64_t i = row.first; i < row.last; ++i, from += row.distance, weight += K * channels) {
      VecF x[T + K - 1];
#pragma GCC unroll 16
      for (int k = 0; k < T + K - 1; ++k) x[k] = !Edge || within[k] ? load(from + k * step) : VecF{};
      // Tap by tap, so that no sum waits for its own last addition.
#pragma GCC unroll 5
      for (int j = 0; j < K; ++j) {
        const VecF w = load(weight + j * channels);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) acc[t] += w * x[t + j];
      }
    }
    if (job.scale != nullptr) {
      const VecF scale = load(job.scale + c);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) acc[t] *= scale;
    }
    if (job.bias != nullptr) {
      const VecF bias = load(job.bias + c);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) acc[t] += bias;
    }
    if (job.silu) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) acc[t] = silu(acc[t]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) store(acc[t], out + c + t * step);
  };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes)
    vector(c, [](const float* p) { return load_dense(p); }, [](VecF v, float* p) { store_dense(v, p); });
  const int rest = static_cast<int>(channels - c);
  if (rest > 0)
    vector(c, [&](const float* p) { return load_first(p, rest); }, [&](VecF v, float* p) { store_first(v, p, rest); });
}

// Of the positions first + k dilation within the map; where the last ones are not T, some are computed twice.
template <int K, int T>
void phase(const DilatedDepthwise& job, const Row& row, int64_t first) {
  const int64_t count = (job.width - first + job.dilation - 1) / job.dilation;
  if constexpr (T > 1) {
    if (count < T) return phase<K, T / 2>(job, row, first);
  }
  const int64_t reach = K / 2 * job.dilation;
  for (int64_t k = 0; k < count; k += T) {
    const int64_t at = first + (k + T <= count ? k : count - T) * job.dilation;
    const bool edge = at < reach || at + (T - 1) * job.dilation + reach >= job.width;
    edge ? together<K, T, true>(job, row, at) : together<K, T, false>(job, row, at);
  }
}

// Taps begin .. end of a kernel whose first one lies at `first`, `dilation` apart, within 0 .. size.
struct Taps {
  int64_t begin, end;
};
Taps taps_within(int64_t first, int64_t kernel, int64_t dilation, int64_t size) {
  Taps taps{0, kernel};
  while (first + taps.begin * dilation < 0) ++taps.begin;
  while (first + (taps.end - 1) * dilation >= size) --taps.end;
  return taps;
}

template <int K>
void convolve_rows(const DilatedDepthwise& job, int64_t begin, int64_t end) {
  const int64_t length = job.width * job.channels;
  for (int64_t number = begin; number < end; ++number) {
    const int64_t sample = number / job.height, top = number % job.height - K / 2 * job.dilation;
    const Taps rows = taps_within(top, K, job.dilation, job.height);
    const Row row{job.x + (sample * job.height + top) * length, job.out + number * length, rows.begin, rows.end,
                  job.dilation * length};
    for (int64_t at = 0; at < job.dilation && at < job.width; ++at) phase<K, kTogether>(job, row, at);
  }
}

}  // namespace

void dilated_depthwise(const DilatedDepthwise& job, int64_t begin, int64_t end) {
  job.kernel == 3 ? convolve_rows<3>(job, begin, end) : convolve_rows<5>(job, begin, end);
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
