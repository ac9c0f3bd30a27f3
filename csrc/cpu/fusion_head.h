// A linear head over the channels of a map, and its gradients, a tile of pixels at a time while the tile lies in the
// cache (kernels only).
#pragma once

#include "cpu/gated_fusion.h"
#include "cpu/rows.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

// One tile of a float32 map: element (c, p) at data[c * channel_stride + p * pixel_stride].
struct MapTile {
  float* data;
  int64_t channels, pixels, channel_stride, pixel_stride;
};

inline MapTile tile_of(const FeatureMap& map, int64_t b, int64_t p0, int64_t n) {
  return {static_cast<float*>(map.data) + b * map.batch_stride + p0 * map.pixel_stride, map.channels, n,
          map.channel_stride, map.pixel_stride};
}

// logits (k, p) = bias[k] + sum_c weight[k, c] x(c, p); pixels of the logits are neighbours.
inline void head_of_tile(const FusionHead& head, Order order, const MapTile& x, const MapTile& logits) {
  for (int64_t k = 0; k < logits.channels; ++k) {
    const float* weight = head.weight + k * x.channels;
    float* out = logits.data + k * logits.channel_stride;
    if (order == Order::pixel_major) {
      for (int64_t p = 0; p < x.pixels; ++p) {
        const float* from = x.data + p * x.pixel_stride;
        VecF sum{};
        each_vector(x.channels, [&](int64_t c, int n) __attribute__((always_inline)) {
          sum += load_first(from + c, n) * load_first(weight + c, n);
        });
        out[p] = head.bias[k] + lane_sum(sum);
      }
      continue;
    }
    each_vector(x.pixels, [&](int64_t p, int n) { store_first(splat<VecF>(head.bias[k]), out + p, n); });
    int64_t c = 0;
    for (; c + 4 <= x.channels; c += 4) {
      const float* from = x.data + c * x.channel_stride;
      each_vector(x.pixels, [&](int64_t p, int n) __attribute__((always_inline)) {
        VecF sum = load_first(out + p, n);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum += weight[c + i] * load_first(from + i * x.channel_stride + p, n);
        store_first(sum, out + p, n);
      });
    }
    for (; c < x.channels; ++c)
      each_vector(x.pixels, [&](int64_t p, int n) __attribute__((always_inline)) {
        add_first(weight[c] * load_first(x.data + c * x.channel_stride + p, n), out + p, n);
      });
  }
}

// With d the gradient of the logits: grad_x += weight' d, and into `sums` d x' (K, C) and the sums of d (K,).
inline void head_gradient_of_tile(const FusionHead& head, Order order, const MapTile& x, const MapTile& d,
                                  const MapTile& grad_x, float* sums) {
  float* bias = sums + d.channels * x.channels;
  clear(sums, d.channels * x.channels);
  for (int64_t k = 0; k < d.channels; ++k) {
    const float* weight = head.weight + k * x.channels;
    const float* given = d.data + k * d.channel_stride;
    float* products = sums + k * x.channels;
    typedef double Wide __attribute__((vector_size(2 * kBytes)));  // so many terms cancel in one number
    Wide total{};
    each_vector(x.pixels, [&](int64_t p, int n) {
      total += __builtin_convertvector(load_first(given + p, n), Wide);
    });
    double sum = 0;
    for (int i = 0; i < VecOf<float>::lanes; ++i) sum += total[i];
    bias[k] = static_cast<float>(sum);
    if (order == Order::pixel_major) {
      for (int64_t p = 0; p < x.pixels; ++p) {
        const float* from = x.data + p * x.pixel_stride;
        float* to = grad_x.data + p * grad_x.pixel_stride;
        each_vector(x.channels, [&](int64_t c, int n) __attribute__((always_inline)) {
          add_first(given[p] * load_first(weight + c, n), to + c, n);
          add_first(given[p] * load_first(from + c, n), products + c, n);
        });
      }
      continue;
    }
    for (int64_t c = 0; c < x.channels; ++c) {
      const float* from = x.data + c * x.channel_stride;
      float* to = grad_x.data + c * grad_x.channel_stride;
      VecF sum{};
      each_vector(x.pixels, [&](int64_t p, int n) __attribute__((always_inline)) {
        const VecF v = load_first(given + p, n);
        sum += v * load_first(from + p, n);
        add_first(weight[c] * v, to + p, n);
      });
      products[c] = lane_sum(sum);
    }
  }
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
