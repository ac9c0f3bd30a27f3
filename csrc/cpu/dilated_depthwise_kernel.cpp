// Depthwise convolution of channels_last maps. Where a kernel reaches over no edge, some neighbouring positions are
// computed together, so that each weight is loaded once for all of them.
#include "cpu/dilated_depthwise.h"

#include "cpu/rows.h"
#include "cpu/silu.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

constexpr int kLanes = VecOf<float>::lanes;
constexpr int64_t kLine = 64 / sizeof(float);

// One row of the output; `in` is where the first tap of its first position would lie.
struct Row {
  const float* in;
  float* out;
  int64_t first, last;  // rows of the kernel within the map
  int64_t distance;     // of rows of the input
};

// What is made of a sum of taps.
template <typename Load>
BTI_FAST_INLINE VecF finished(VecF y, const DilatedDepthwise& job, int64_t c, Load load) {
  if (job.scale != nullptr) y *= load(job.scale + c);
  if (job.bias != nullptr) y += load(job.bias + c);
  return job.silu ? silu(y) : y;
}

// T positions from `at` on, all taps of which lie within the map's width.
template <int K, int T>
BTI_FAST_INLINE void inside(const DilatedDepthwise& job, const Row& row, int64_t at) {
  const int64_t channels = job.channels, step = job.dilation * channels;
  const float* in = row.in + at * channels;
  float* out = row.out + at * channels;
  // What the next positions will load of the newest row, and where they will store: too many short streams for the
  // processor to foresee.
  const float* next = in + (row.last - 1) * row.distance + (K - 1) * step + T * channels;
  const auto vector = [&](int64_t c, auto load, auto store) {
    VecF acc[T]{};
    for (int64_t i = row.first; i < row.last; ++i) {
      const float* from = in + i * row.distance + c;
      const float* weight = job.weight + i * K * channels + c;
      VecF w[K];
#pragma GCC unroll 5
      for (int j = 0; j < K; ++j) w[j] = load(weight + j * channels);
      if (job.dilation == 1) {
#pragma GCC unroll 8
        for (int k = 0; k < T + K - 1; ++k) {
          const VecF x = load(from + k * channels);
#pragma GCC unroll 5
          for (int j = 0; j < K; ++j)
            if (k - j >= 0 && k - j < T) acc[k - j] += w[j] * x;
        }
      } else {
#pragma GCC unroll 5
        for (int j = 0; j < K; ++j)
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) acc[t] += w[j] * load(from + j * step + t * channels);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) store(finished(acc[t], job, c, load), out + t * channels + c);
  };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    if (c % kLine == 0) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        __builtin_prefetch(next + t * channels + c);
        __builtin_prefetch(out + (T + t) * channels + c, 1);
      }
    }
    vector(c, [](const float* p) { return load_dense(p); }, [](VecF v, float* p) { store_dense(v, p); });
  }
  const int left = static_cast<int>(channels - c);
  if (left > 0)
    vector(c, [&](const float* p) { return load_first(p, left); }, [&](VecF v, float* p) { store_first(v, p, left); });
}

// One position, of which the taps [begin, end) of every row lie within the map's width.
BTI_FAST_INLINE void at_edge(const DilatedDepthwise& job, const Row& row, int64_t at, int64_t begin, int64_t end) {
  constexpr int kVectors = 4;  // or every addition would wait for the one before
  const int64_t channels = job.channels, step = job.dilation * channels;
  const float* in = row.in + at * channels;
  float* out = row.out + at * channels;
  const auto vectors = [&](int64_t c, auto count, auto load, auto store) {
    constexpr int V = decltype(count)::value;
    VecF acc[V]{};
    for (int64_t i = row.first; i < row.last; ++i) {
      const float* from = in + i * row.distance + c;
      const float* weight = job.weight + i * job.kernel * channels + c;
      for (int64_t j = begin; j < end; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          acc[v] += load(weight + j * channels + v * kLanes) * load(from + j * step + v * kLanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(finished(acc[v], job, c + v * kLanes, load), out + c + v * kLanes);
  };
  const auto load = [](const float* p) { return load_dense(p); };
  const auto store = [](VecF v, float* p) { store_dense(v, p); };
  int64_t c = 0;
  for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes)
    vectors(c, std::integral_constant<int, kVectors>{}, load, store);
  for (; c + kLanes <= channels; c += kLanes) vectors(c, std::integral_constant<int, 1>{}, load, store);
  const int left = static_cast<int>(channels - c);
  if (left > 0)
    vectors(c, std::integral_constant<int, 1>{}, [&](const float* p) { return load_first(p, left); },
            [&](VecF v, float* p) { store_first(v, p, left); });
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
  const int64_t reach = K / 2 * job.dilation, length = job.width * job.channels;
  for (int64_t number = begin; number < end; ++number) {
    const int64_t sample = number / job.height, y = number % job.height;
    const Taps rows = taps_within(y - reach, K, job.dilation, job.height);
    const float* origin = job.x + sample * job.height * length + (y - reach) * length - reach * job.channels;
    const Row row{origin, job.out + number * length, rows.begin, rows.end, job.dilation * length};
    for (int64_t at = 0; at < job.width;) {
      const int64_t free = at >= reach ? job.width - reach - at : 0;  // positions from here on that touch no edge
      if (free >= 4) {
        inside<K, 4>(job, row, at);
        at += 4;
      } else if (free >= 2) {
        inside<K, 2>(job, row, at);
        at += 2;
      } else {
        const Taps taps = taps_within(at - reach, K, job.dilation, job.width);
        at_edge(job, row, at, taps.begin, taps.end);
        at += 1;
      }
    }
  }
}

}  // namespace

void dilated_depthwise(const DilatedDepthwise& job, int64_t begin, int64_t end) {
  job.kernel == 3 ? convolve_rows<3>(job, begin, end) : convolve_rows<5>(job, begin, end);
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
