// Depthwise convolution of channels_last maps, with what may follow it: scale and bias by channel, silu, sums of rows.
#include "cpu/dilated_depthwise.h"

#include "cpu/depthwise_row.h"
#include "cpu/silu.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

// A row of the result at a stride: T positions from `at` on. Edge: some taps may lie beyond the map's width.
template <int K, int T, bool Edge, typename Finish>
void strided_together(const DilatedDepthwise& job, const float* in, const Taps rows, float* out, int64_t at,
                      const Finish& finish) {
  const int64_t channels = job.channels, first = job.stride * at - job.left, step = job.stride * channels;
  each_vector(channels, [&](int64_t c, int lanes) __attribute__((always_inline)) {
    VecF acc[T]{};
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const float* from = in + (i * job.width + first) * channels + c;
#pragma GCC unroll 5
      for (int j = 0; j < K; ++j, from += channels) {
        const VecF w = load_first(job.weight + (i * K + j) * channels + c, lanes);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const int64_t column = first + t * job.stride + j;
          if (!Edge || (column >= 0 && column < job.width)) acc[t] += w * load_first(from + t * step, lanes);
        }
      }
    }
    finish(acc, c, lanes);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) store_first(acc[t], out + (at + t) * channels + c, lanes);
  });
}

template <int K, typename Finish>
void strided_row(const DilatedDepthwise& job, const float* in, const Taps rows, float* out, const Finish& finish) {
  for (int64_t at = 0; at < job.out_width;) {
    const int64_t first = job.stride * at - job.left, last = first + job.stride * (kTogether - 1) + K - 1;
    const bool within = first >= 0 && last < job.width && at + kTogether <= job.out_width;
    within ? strided_together<K, kTogether, false>(job, in, rows, out, at, finish)
           : strided_together<K, 1, true>(job, in, rows, out, at, finish);
    at += within ? kTogether : 1;
  }
}

// Of `count` positions.
void sum_row(const float* row, int64_t count, int64_t channels, float* sums) {
  constexpr int64_t block = 4 * VecOf<float>::lanes;
  int64_t c = 0;
  for (; c + block <= channels; c += block) {
    VecF acc[4]{};
    for (int64_t p = 0; p < count; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[v] += load_dense(row + p * channels + c + v * VecOf<float>::lanes);
    for (int v = 0; v < 4; ++v) store_dense(acc[v], sums + c + v * VecOf<float>::lanes);
  }
  each_vector(channels - c, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    VecF acc{};
    for (int64_t p = 0; p < count; ++p) acc += load_first(row + p * channels + c + i, lanes);
    store_first(acc, sums + c + i, lanes);
  });
}

template <int K>
void convolve_rows(const DilatedDepthwise& job, int64_t begin, int64_t end) {
  const int64_t length = job.width * job.channels, out_length = job.out_width * job.channels;
  const auto finish = [&](auto& sums, int64_t c, int lanes) __attribute__((always_inline)) {
    if (job.scale != nullptr) {
      const VecF scale = load_first(job.scale + c, lanes);
      for (VecF& sum : sums) sum *= scale;
    }
    if (job.bias != nullptr) {
      const VecF bias = load_first(job.bias + c, lanes);
      for (VecF& sum : sums) sum += bias;
    }
    if (job.silu)
      for (VecF& sum : sums) sum = silu(sum);
  };
  for (int64_t number = begin; number < end; ++number) {
    const int64_t sample = number / job.out_height, y = number % job.out_height;
    const int64_t top = job.stride == 1 ? y - K / 2 * job.dilation : job.stride * y - job.top;
    const Taps rows = taps_within(top, K, job.dilation, job.height);
    const float* in = job.x + (sample * job.height + top) * length;
    float* out = job.out + number * out_length;
    if (job.stride == 1) {
      const DepthwiseRow row{in,           job.channels, job.dilation * length, job.weight, job.channels, out,
                             job.channels, job.channels, job.width,             job.dilation, rows.begin, rows.end};
      depthwise_row<K>(row, 0, job.width, finish);
    } else {
      strided_row<K>(job, in, rows, out, finish);
    }
    if (job.sums != nullptr) sum_row(out, job.out_width, job.channels, job.sums + number * job.channels);
  }
}

}  // namespace

void dilated_depthwise(const DilatedDepthwise& job, int64_t begin, int64_t end) {
  job.kernel == 3 ? convolve_rows<3>(job, begin, end) : convolve_rows<5>(job, begin, end);
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
