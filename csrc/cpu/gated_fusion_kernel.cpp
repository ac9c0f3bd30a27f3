// Per pixel: u = entropy of the logits, r = sigmoid(alpha u + beta (1 - cls uncertainty) + gamma), w = 1 - u + 1e-3.
// Forward: x' = x (1 + tau r prior_c), pooled_c = sum_p w x / sum_p w. A tile's u, tau r and w lie in L1 while its
// channels stream by.
//
// Backward, with g = grad x', W = sum_p w, G_c = grad pooled_c:
//   grad x = g (1 + tau r prior_c) + G_c w / W              grad prior_c = sum_p g x tau r
//   t = sum_c prior_c g x,  q = sum_c G_c x                 (per pixel, while the channels stream by)
//   e = tau t r (1 - r), the gradient of sigmoid's argument: grad alpha = sum e u, grad gamma = sum e, ...
//   grad w = (q - sum_c G_c pooled_c) / W, from the forward's pooled; and W = P (1 - mean u + 1e-3)
//   grad u += grad mean / P + alpha e - grad w
#include "cpu/gated_fusion.h"

#include "cpu/entropy_block.h"
#include "cpu/fusion_head.h"
#include "cpu/rows.h"
#include "cpu/with_dtype.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

constexpr int kLanes = VecOf<float>::lanes;
constexpr int64_t kLargestTile = 1024 + 2 * kLanes;
constexpr float kLeastWeight = 1e-3f;

// What one tile of pixels has in common for all channels; zero beyond n.
struct TileBuffers {
  alignas(64) float gate[kLargestTile];    // tau r
  alignas(64) float weight[kLargestTile];  // w, or w / W
  alignas(64) float t[kLargestTile];
  alignas(64) float q[kLargestTile];
  alignas(64) float u[kLargestTile];
};

template <typename L>
void entropy_of_tile(const FeatureMap& logits, int64_t b, int64_t p0, int64_t n, float* u) {
  const L* a = static_cast<const L*>(logits.data) + b * logits.batch_stride + p0 * logits.pixel_stride;
  const float norm = entropy_norm<float>(logits.channels);
  int64_t p = 0;
  if (logits.pixel_stride == 1)
    for (; p + kLanes <= n; p += kLanes)
      store_dense(entropy_block<true>(a + p, logits.channels, logits.channel_stride, 1, norm, kLanes), u + p);
  for (; p < n; p += kLanes) {
    const int left = n - p < kLanes ? static_cast<int>(n - p) : kLanes;
    store<false>(entropy_block<false>(a + p * logits.pixel_stride, logits.channels, logits.channel_stride,
                                      logits.pixel_stride, norm, left),
                 u + p, 1, left);
  }
}

void entropy_of_tile(const FeatureMap& logits, int64_t b, int64_t p0, int64_t n, float* u) {
  with_dtype(logits.dtype, [&](auto x) { entropy_of_tile<decltype(x)>(logits, b, p0, n, u); });
}

struct Gate {
  float alpha, offset, tau;
};

template <typename Job>
Gate gate_of(const Job& job, int64_t b) {
  return {job.coeffs[0], job.coeffs[1] * (1 - job.cls_uncertainty[b]) + job.coeffs[2], job.tau};
}

// Fills tau r and w * scale; returns sum_p w * scale and sum_p u.
struct WeightSums {
  float weight, u;
};
WeightSums gates_of_tile(const Gate& gate, const float* u, int64_t n, float scale, float* gates, float* weights) {
  VecF sum_w{}, sum_u{};
  for (int64_t p = 0; p < n; p += kLanes) {
    const int left = n - p < kLanes ? static_cast<int>(n - p) : kLanes;
    const VecF v = load_first(u + p, left);
    const VecI valid = first_lanes(left);
    const VecF w = keep(valid, ((1 - v) + kLeastWeight) * scale);
    sum_w += w;
    sum_u += v;
    store_dense(keep(valid, gate.tau * sigmoid(gate.alpha * v + gate.offset)), gates + p);
    store_dense(w, weights + p);
  }
  return {lane_sum(sum_w), lane_sum(sum_u)};
}

template <typename T, int N>
BTI_FAST_INLINE void fuse_rows(const T* x, int64_t x_stride, T* out, int64_t out_stride, const float* prior,
                               const TileBuffers& tile, int64_t n, float* sums) {
  VecF acc[N]{}, scale[N];
  for (int i = 0; i < N; ++i) scale[i] = splat<VecF>(prior[i]);
  int64_t p = 0;
  for (; p + kLanes <= n; p += kLanes) {
    const VecF gate = load_dense(tile.gate + p), weight = load_dense(tile.weight + p);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const VecF v = load_dense(x + i * x_stride + p);
      acc[i] += v * weight;
      store_dense(v * (1 + gate * scale[i]), out + i * out_stride + p);
    }
  }
  if (p < n) {
    const int left = static_cast<int>(n - p);
    const VecF gate = load_dense(tile.gate + p), weight = load_dense(tile.weight + p);
    for (int i = 0; i < N; ++i) {
      const VecF v = load_first(x + i * x_stride + p, left);
      acc[i] += v * weight;
      store_first(v * (1 + gate * scale[i]), out + i * out_stride + p, left);
    }
  }
  for (int i = 0; i < N; ++i) sums[i] = lane_sum(acc[i]);
}

// N pixels at once, so that the running sums over pixels are loaded and stored once for N.
template <typename T, int N>
BTI_FAST_INLINE void fuse_pixels(const T* x, int64_t x_stride, T* out, int64_t out_stride, const float* prior,
                                 const float* gate, const float* weight, int64_t channels, float* sums) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int left = channels - c < kLanes ? static_cast<int>(channels - c) : kLanes;
    const VecF scale = load_first(prior + c, left);
    VecF acc = load_first(sums + c, left);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const VecF v = load_first(x + i * x_stride + c, left);
      acc += v * weight[i];
      store_first(v * (1 + gate[i] * scale), out + i * out_stride + c, left);
    }
    store_first(acc, sums + c, left);
  }
}

template <typename T>
void forward_tiles(const FusionForward& job, int64_t begin, int64_t end) {
  TileBuffers tile;
  const int64_t channels = job.x.channels, pixels = job.x.pixels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / job.tiles.count, p0 = task % job.tiles.count * job.tiles.size;
    const int64_t n = pixels - p0 < job.tiles.size ? pixels - p0 : job.tiles.size;
    float* u = job.u + b * pixels + p0;
    float* sums = job.sums + task * (channels + 2);
    if (job.head.weight != nullptr)
      head_of_tile(job.head, job.order, tile_of(job.x, b, p0, n), tile_of(job.logits, b, p0, n));
    entropy_of_tile(job.logits, b, p0, n, u);
    const WeightSums total = gates_of_tile(gate_of(job, b), u, n, 1, tile.gate, tile.weight);
    sums[channels] = total.weight;
    sums[channels + 1] = total.u;
    const T* x = static_cast<const T*>(job.x.data) + b * job.x.batch_stride + p0 * job.x.pixel_stride;
    T* out = static_cast<T*>(job.out.data) + b * job.out.batch_stride + p0 * job.out.pixel_stride;
    const float* prior = job.prior + b * channels;
    if (job.order == Order::channel_major) {
      const int64_t xs = job.x.channel_stride, os = job.out.channel_stride;
      int64_t c = 0;
      for (; c + 4 <= channels; c += 4) fuse_rows<T, 4>(x + c * xs, xs, out + c * os, os, prior + c, tile, n, sums + c);
      for (; c < channels; ++c) fuse_rows<T, 1>(x + c * xs, xs, out + c * os, os, prior + c, tile, n, sums + c);
    } else {
      for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
      const int64_t xs = job.x.pixel_stride, os = job.out.pixel_stride;
      int64_t p = 0;
      for (; p + 4 <= n; p += 4)
        fuse_pixels<T, 4>(x + p * xs, xs, out + p * os, os, prior, tile.gate + p, tile.weight + p, channels, sums);
      for (; p < n; ++p)
        fuse_pixels<T, 1>(x + p * xs, xs, out + p * os, os, prior, tile.gate + p, tile.weight + p, channels, sums);
    }
  }
}

template <typename T>
struct Rows {  // one map at the first pixel of a tile, and the stride of its dense axis' partner
  const T* data;
  int64_t stride;
};

template <typename T, int N>
BTI_FAST_INLINE void gradient_rows(Rows<T> x, Rows<T> g, T* out, int64_t out_stride, const float* prior,
                                   const float* grad_pooled, TileBuffers& tile, int64_t n, float* sums) {
  VecF acc[N]{}, scale[N], pooled[N];
  for (int i = 0; i < N; ++i) scale[i] = splat<VecF>(prior[i]), pooled[i] = splat<VecF>(grad_pooled[i]);
  const auto block = [&](int64_t p, auto dense) {
    const int left = decltype(dense)::value ? kLanes : static_cast<int>(n - p);
    const VecF gate = load_dense(tile.gate + p), weight = load_dense(tile.weight + p);
    VecF t = load_dense(tile.t + p), q = load_dense(tile.q + p);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const VecF v = load<decltype(dense)::value>(x.data + i * x.stride + p, 1, left);
      const VecF d = load<decltype(dense)::value>(g.data + i * g.stride + p, 1, left);
      const VecF product = v * d;
      acc[i] += product * gate;
      t += product * scale[i];
      q += v * pooled[i];
      store<decltype(dense)::value>(d * (1 + gate * scale[i]) + pooled[i] * weight, out + i * out_stride + p, 1, left);
    }
    store_dense(t, tile.t + p);
    store_dense(q, tile.q + p);
  };
  int64_t p = 0;
  for (; p + kLanes <= n; p += kLanes) block(p, Yes{});
  if (p < n) block(p, No{});
  for (int i = 0; i < N; ++i) sums[i] = lane_sum(acc[i]);
}

template <typename T, int N>
BTI_FAST_INLINE void gradient_pixels(Rows<T> x, Rows<T> g, T* out, int64_t out_stride, const float* prior,
                                     const float* grad_pooled, TileBuffers& tile, int64_t p, int64_t channels,
                                     float* sums) {
  VecF t[N]{}, q[N]{};
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int left = channels - c < kLanes ? static_cast<int>(channels - c) : kLanes;
    const VecF scale = load_first(prior + c, left), pooled = load_first(grad_pooled + c, left);
    VecF acc = load_first(sums + c, left);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const float gate = tile.gate[p + i], weight = tile.weight[p + i];
      const VecF v = load_first(x.data + i * x.stride + c, left), d = load_first(g.data + i * g.stride + c, left);
      const VecF product = v * d;
      acc += product * gate;
      t[i] += product * scale;
      q[i] += v * pooled;
      store_first(d * (1 + gate * scale) + pooled * weight, out + i * out_stride + c, left);
    }
    store_first(acc, sums + c, left);
  }
  for (int i = 0; i < N; ++i) tile.t[p + i] = lane_sum(t[i]), tile.q[p + i] = lane_sum(q[i]);
}

// grad logits of one tile, from the gradient of u.
template <typename L>
void logits_of_tile(const FusionBackward& job, int64_t b, int64_t p0, int64_t n, const float* du) {
  const FeatureMap &in = job.logits, &out = job.grad_logits;
  const float norm = entropy_norm<float>(in.channels);
  const L* a = static_cast<const L*>(in.data) + b * in.batch_stride + p0 * in.pixel_stride;
  L* grad = static_cast<L*>(out.data) + b * out.batch_stride + p0 * out.pixel_stride;
  int64_t p = 0;
  if (in.pixel_stride == 1 && out.pixel_stride == 1)
    for (; p + kLanes <= n; p += kLanes)
      entropy_gradient_block<true>(load_dense(du + p), a + p, in.channels, in.channel_stride, 1, grad + p,
                                   out.channel_stride, 1, norm, kLanes);
  for (; p < n; p += kLanes) {
    const int left = n - p < kLanes ? static_cast<int>(n - p) : kLanes;
    entropy_gradient_block<false>(load_dense(du + p), a + p * in.pixel_stride, in.channels, in.channel_stride,
                                  in.pixel_stride, grad + p * out.pixel_stride, out.channel_stride, out.pixel_stride,
                                  norm, left);
  }
}

void logits_of_tile(const FusionBackward& job, int64_t b, int64_t p0, int64_t n, const float* du) {
  with_dtype(job.logits.dtype, [&](auto x) { logits_of_tile<decltype(x)>(job, b, p0, n, du); });
}

template <typename T>
void backward_tiles(const FusionBackward& job, int64_t begin, int64_t end) {
  TileBuffers tile;
  const int64_t channels = job.x.channels, pixels = job.x.pixels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / job.tiles.count, p0 = task % job.tiles.count * job.tiles.size;
    const int64_t n = pixels - p0 < job.tiles.size ? pixels - p0 : job.tiles.size;
    float* sums = job.sums + task * job.width;
    const Gate gate = gate_of(job, b);
    const float inverse = job.inverse[b], constant = job.constant[b];
    entropy_of_tile(job.logits, b, p0, n, tile.u);
    gates_of_tile(gate, tile.u, n, inverse, tile.gate, tile.weight);
    const auto at = [&](const FeatureMap& map) {
      return static_cast<T*>(map.data) + b * map.batch_stride + p0 * map.pixel_stride;
    };
    T* out = at(job.grad_x);
    const float* prior = job.prior + b * channels;
    const float* pooled = job.grad_pooled + b * channels;
    if (job.order == Order::channel_major) {
      for (int64_t p = 0; p < n + kLanes; ++p) tile.t[p] = tile.q[p] = 0;
      const int64_t xs = job.x.channel_stride, gs = job.grad_out.channel_stride, os = job.grad_x.channel_stride;
      const T *x = at(job.x), *g = at(job.grad_out);
      int64_t c = 0;
      for (; c + 4 <= channels; c += 4)
        gradient_rows<T, 4>({x + c * xs, xs}, {g + c * gs, gs}, out + c * os, os, prior + c, pooled + c, tile, n,
                            sums + c);
      for (; c < channels; ++c)
        gradient_rows<T, 1>({x + c * xs, xs}, {g + c * gs, gs}, out + c * os, os, prior + c, pooled + c, tile, n,
                            sums + c);
    } else {
      for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
      const int64_t xs = job.x.pixel_stride, gs = job.grad_out.pixel_stride, os = job.grad_x.pixel_stride;
      const T *x = at(job.x), *g = at(job.grad_out);
      int64_t p = 0;
      for (; p + 4 <= n; p += 4)
        gradient_pixels<T, 4>({x + p * xs, xs}, {g + p * gs, gs}, out + p * os, os, prior, pooled, tile, p, channels,
                              sums);
      for (; p < n; ++p)
        gradient_pixels<T, 1>({x + p * xs, xs}, {g + p * gs, gs}, out + p * os, os, prior, pooled, tile, p, channels,
                              sums);
    }
    VecF sum_e{}, sum_eu{};
    const float mean = job.grad_mean[b] / static_cast<float>(pixels) + constant;
    const float* grad_u = job.grad_u + b * pixels + p0;
    for (int64_t p = 0; p < n; p += kLanes) {
      const int left = n - p < kLanes ? static_cast<int>(n - p) : kLanes;
      const VecF v = load_first(tile.u + p, left);
      const VecF r = sigmoid(gate.alpha * v + gate.offset);
      const VecF e = keep(first_lanes(left), gate.tau * load_dense(tile.t + p) * r * (1 - r));
      sum_e += e;
      sum_eu += e * v;
      store_dense(load_first(grad_u + p, left) + mean + gate.alpha * e - load_dense(tile.q + p) * inverse, tile.u + p);
    }
    sums[channels] = lane_sum(sum_e);
    sums[channels + 1] = lane_sum(sum_eu);
    logits_of_tile(job, b, p0, n, tile.u);
    if (job.head.weight == nullptr) continue;
    const MapTile grad = tile_of(job.grad_logits, b, p0, n);
    for (int64_t k = 0; k < grad.channels; ++k) {
      const float* more = job.head.grad_logits + (b * grad.channels + k) * pixels + p0;
      each_vector(n, [&](int64_t p, int lanes) {
        add_first(load_first(more + p, lanes), grad.data + k * grad.channel_stride + p, lanes);
      });
    }
    head_gradient_of_tile(job.head, job.order, tile_of(job.x, b, p0, n), grad, tile_of(job.grad_x, b, p0, n),
                          sums + channels + 2);
  }
}

}  // namespace

void fusion_forward(const FusionForward& job, int64_t begin, int64_t end) {
  with_dtype(job.x.dtype, [&](auto x) { forward_tiles<decltype(x)>(job, begin, end); });
}

void fusion_backward(const FusionBackward& job, int64_t begin, int64_t end) {
  with_dtype(job.x.dtype, [&](auto x) { backward_tiles<decltype(x)>(job, begin, end); });
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
