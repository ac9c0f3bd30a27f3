// The first pass over x in either direction, and the last one forward.
//
// A tile of pixels is first read channel by channel (sums, differences), which brings it into L2; then strips of two
// vectors of pixels are packed into L1 and multiplied by W1 in register blocks. The hidden map lives in registers only:
// forward it is rectified and summed there, backward only its signs leave.
#include "cpu/product.h"
#include "cpu/rows.h"
#include "cpu/task_interaction.h"
#include "cpu/transpose.h"
#include "cpu/with_dtype.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

struct Tile {
  int64_t b, first, count, end;  // pixels [first, end)
};

Tile tile_of(const InteractionPass& pass, int64_t task) {
  const int64_t first = task % pass.tiles.count * pass.tiles.size;
  const int64_t left = pass.x.pixels - first;
  const int64_t count = left < pass.tiles.size ? left : pass.tiles.size;
  return {task / pass.tiles.count, first, count, first + count};
}

template <typename T>
T* sample_of(const FeatureMap& map, int64_t b) {
  return static_cast<T*>(map.data) + b * map.batch_stride;
}

// Sum over the tile of one contiguous channel, and of its differences along every axis.
template <typename T>
void sums_of_row(const InteractionPass& pass, const T* row, const Tile& tile, VecF& differences, float* out) {
  VecF total[2]{};
  int64_t p = tile.first;
  for (; p + 2 * kLanes <= tile.end; p += 2 * kLanes) {
    total[0] += load_dense(row + p);
    total[1] += load_dense(row + p + kLanes);
  }
  for (; p < tile.end; p += kLanes) total[0] += load_first(row + p, lanes_left(tile.end - p));
  *out = lane_sum(total[0] + total[1]);
  if (!pass.complexity) return;
  VecF acc{};
  for (int a = 0; a < pass.axes.count; ++a) {
    const int64_t stride = pass.axes.stride[a];
    const int32_t* exists = pass.axes.exists[a];
    const int64_t last = pass.x.pixels - stride, end = tile.end < last ? tile.end : last;
    for (p = tile.first; p + kLanes <= end; p += kLanes)
      acc += keep(load_mask(exists + p), abs(load_dense(row + p + stride) - load_dense(row + p)));
    if (p < end) {
      const int left = static_cast<int>(end - p);
      acc += keep(load_mask(exists + p) & first_lanes(left),
                  abs(load_first(row + p + stride, left) - load_first(row + p, left)));
    }
  }
  differences += acc;
}

// The same for one vector of channels that lie side by side.
template <typename T>
void sums_of_channels(const InteractionPass& pass, const T* x, const Tile& tile, int left, VecF& differences,
                      float* out) {
  const int64_t step = pass.x.pixel_stride;
  VecF total{};
  for (int64_t p = tile.first; p < tile.end; ++p) total += load_first(x + p * step, left);
  store_first(total, out, left);
  if (!pass.complexity) return;
  for (int a = 0; a < pass.axes.count; ++a) {
    const int64_t stride = pass.axes.stride[a];
    for (int64_t p = tile.first; p < tile.end; ++p)
      if (pass.axes.exists[a][p])
        differences += abs(load_first(x + (p + stride) * step, left) - load_first(x + p * step, left));
  }
}

template <typename T>
float dot_of_row(const T* x, const T* g, int64_t n) {
  VecF total{};
  int64_t p = 0;
  for (; p + kLanes <= n; p += kLanes) total += load_dense(x + p) * load_dense(g + p);
  if (p < n) total += load_first(x + p, lanes_left(n - p)) * load_first(g + p, lanes_left(n - p));
  return lane_sum(total);
}

// Packs pixels [first, first + n) of all channels as strip[c][kPanel], zero beyond n.
template <typename T>
void pack_strip(const InteractionPass& pass, const T* x, int64_t first, int64_t n, float* strip) {
  const FeatureMap& map = pass.x;
  if (pass.order == Order::channel_major) {
    const T* row = x + first;
    if (n == kPanel) {
      for (int64_t c = 0; c < map.channels; ++c, row += map.channel_stride) {
        store_dense(load_dense(row), strip + c * kPanel);
        store_dense(load_dense(row + kLanes), strip + c * kPanel + kLanes);
      }
      return;
    }
    for (int64_t c = 0; c < map.channels; ++c, row += map.channel_stride) {
      store_dense(load_first(row, lanes_left(n)), strip + c * kPanel);
      store_dense(n > kLanes ? load_first(row + kLanes, lanes_left(n - kLanes)) : VecF{}, strip + c * kPanel + kLanes);
    }
    return;
  }
  for (int64_t c = 0; c < map.channels; c += kLanes) {
    const int left = lanes_left(map.channels - c);
    for (int v = 0; v < 2; ++v) {
      VecF block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t p = v * kLanes + i;
        block[i] = p < n ? load_first(x + (first + p) * map.pixel_stride + c, left) : VecF{};
      }
      transpose(block);
      for (int i = 0; i < left; ++i) store_dense(block[i], strip + (c + i) * kPanel + v * kLanes);
    }
  }
}

// block[r][v] = W1[h + r] x without the bias. Alone in its function, so that every accumulator gets a register.
template <int R, int V>
__attribute__((noinline)) void hidden_block(const float* weight, int64_t channels, const float* strip, float* block) {
  VecF acc[R][V]{};
  accumulate<false>(acc, weight, channels, strip, kPanel, channels);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_dense(acc[r][v], block + r * kPanel + v * kLanes);
}

// Calls done(h, hidden map of unit h at the strip's pixels, without the bias) for every hidden unit h.
template <int V, typename Done>
BTI_FAST_INLINE void hidden_rows(const InteractionPass& pass, const float* strip, const Done& done) {
  alignas(64) float block[kBlockRows * kPanel];
  const int64_t channels = pass.x.channels;
  for (int64_t h = 0; h < pass.hidden;) {
    const float* weight = pass.weight + h * channels;
    const int64_t left = pass.hidden - h;
    const int rows = left >= kBlockRows ? kBlockRows : left >= 4 ? 4 : 1;
    if (rows == kBlockRows) {
      hidden_block<kBlockRows, V>(weight, channels, strip, block);
    } else if (rows == 4) {
      hidden_block<4, V>(weight, channels, strip, block);
    } else {
      hidden_block<1, V>(weight, channels, strip, block);
    }
    for (int r = 0; r < rows; ++r) done(h + r, block + r * kPanel);
    h += rows;
  }
}

struct Scratch {
  Buffer<float> strip, hidden;
  explicit Scratch(const InteractionPass& pass)
      : strip(pass.x.channels * kPanel), hidden(pass.hidden * kLanes) {}
};

template <typename T>
void forward_tile(const InteractionPass& pass, int64_t task, Scratch& scratch) {
  const Tile tile = tile_of(pass, task);
  const int64_t channels = pass.x.channels, width = channels + pass.hidden + 1;
  const T* x = sample_of<T>(pass.x, tile.b);
  float* sums = pass.sums + task * width;
  VecF differences{};
  if (pass.order == Order::channel_major) {
    for (int64_t c = 0; c < channels; ++c)
      sums_of_row(pass, x + c * pass.x.channel_stride, tile, differences, sums + c);
  } else {
    for (int64_t c = 0; c < channels; c += kLanes)
      sums_of_channels(pass, x + c, tile, lanes_left(channels - c), differences, sums + c);
  }
  sums[width - 1] = lane_sum(differences);

  float* totals = scratch.hidden.data();
  scratch.hidden.clear();
  for (int64_t p = tile.first; p < tile.end; p += kPanel) {
    const int64_t n = tile.end - p < kPanel ? tile.end - p : kPanel;
    pack_strip(pass, x, p, n, scratch.strip.data());
    const VecI valid[2] = {first_lanes(static_cast<int>(n)), first_lanes(static_cast<int>(n - kLanes))};
    const auto rectify = [&](int64_t h, const float* hidden, int v) {
      const VecF z = load_dense(hidden + v * kLanes) + pass.bias[h];
      return keep(valid[v], z <= 0 ? VecF{} : z);
    };
    if (n > kLanes) {
      hidden_rows<2>(pass, scratch.strip.data(), [&](int64_t h, const float* hidden) {
        float* total = totals + h * kLanes;
        store_dense(load_dense(total) + (rectify(h, hidden, 0) + rectify(h, hidden, 1)), total);
      });
    } else {
      hidden_rows<1>(pass, scratch.strip.data(), [&](int64_t h, const float* hidden) {
        float* total = totals + h * kLanes;
        store_dense(load_dense(total) + rectify(h, hidden, 0), total);
      });
    }
  }
  for (int64_t h = 0; h < pass.hidden; ++h) sums[channels + h] = lane_sum(load_dense(totals + h * kLanes));
}

template <typename T>
void backward_tile(const InteractionPass& pass, int64_t task, Scratch& scratch, Buffer<int32_t>& fours) {
  const Tile tile = tile_of(pass, task);
  const int64_t channels = pass.x.channels, width = channels + pass.hidden + 1;
  const int64_t groups = groups_of_four(pass.hidden);
  const T *x = sample_of<T>(pass.x, tile.b), *g = sample_of<T>(pass.grad_out, tile.b);
  float* sums = pass.sums + task * width;
  if (pass.order == Order::channel_major) {
    for (int64_t c = 0; c < channels; ++c)
      sums[c] = dot_of_row(x + c * pass.x.channel_stride + tile.first,
                           g + c * pass.grad_out.channel_stride + tile.first, tile.count);
  } else {
    const int64_t xs = pass.x.pixel_stride, gs = pass.grad_out.pixel_stride;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int left = lanes_left(channels - c);
      VecF total{};
      for (int64_t p = tile.first; p < tile.end; ++p)
        total += load_first(x + p * xs + c, left) * load_first(g + p * gs + c, left);
      store_first(total, sums + c, left);
    }
  }
  sums[width - 1] = 0;

  float* active = scratch.hidden.data();
  scratch.hidden.clear();
  const int64_t blocks = (pass.x.pixels + kSignBlock - 1) / kSignBlock;
  uint8_t* signs = pass.signs + tile.b * blocks * groups * kSignBlock;
  for (int64_t p = tile.first; p < tile.end; p += kPanel) {
    const int64_t n = tile.end - p < kPanel ? tile.end - p : kPanel;
    pack_strip(pass, x, p, n, scratch.strip.data());
    fours.clear();
    const VecI valid[2] = {first_lanes(static_cast<int>(n)), first_lanes(static_cast<int>(n - kLanes))};
    const auto mark = [&](int64_t h, const float* hidden, int v) {
      const VecF z = load_dense(hidden + v * kLanes) + pass.bias[h];
      const VecI off = z <= 0;
      const VecI on = ~off & valid[v];
      int32_t* four = fours.data() + (h / 4) * kPanel + v * kLanes;
      const VecI marked = load_mask(four) | (on & ((kLanes / 2) << (h % 4)));
      std::memcpy(four, &marked, sizeof(marked));
      return keep(on, splat<VecF>(1.0f));
    };
    if (n > kLanes) {
      hidden_rows<2>(pass, scratch.strip.data(), [&](int64_t h, const float* hidden) {
        float* count = active + h * kLanes;
        store_dense(load_dense(count) + (mark(h, hidden, 0) + mark(h, hidden, 1)), count);
      });
    } else {
      hidden_rows<1>(pass, scratch.strip.data(), [&](int64_t h, const float* hidden) {
        float* count = active + h * kLanes;
        store_dense(load_dense(count) + mark(h, hidden, 0), count);
      });
    }
    uint8_t* out = signs + p / kSignBlock * groups * kSignBlock + p % kSignBlock;
    for (int64_t group = 0; group < groups; ++group)
      for (int i = 0; i < kPanel; ++i)
        out[group * kSignBlock + i] = static_cast<uint8_t>(fours.data()[group * kPanel + i]);
  }
  for (int64_t h = 0; h < pass.hidden; ++h) sums[channels + h] = lane_sum(load_dense(active + h * kLanes));
}

template <typename T>
void apply_tile(const InteractionPass& pass, int64_t task) {
  const Tile tile = tile_of(pass, task);
  const int64_t channels = pass.x.channels;
  const T* x = sample_of<T>(pass.x, tile.b);
  T* out = sample_of<T>(pass.out, tile.b);
  const float* scale = pass.scale + tile.b * channels;
  if (pass.order == Order::channel_major) {
    for (int64_t c = 0; c < channels; ++c) {
      const VecF factor = splat<VecF>(1 + scale[c]);
      const T* from = x + c * pass.x.channel_stride;
      T* to = out + c * pass.out.channel_stride;
      int64_t p = tile.first;
      for (; p + kLanes <= tile.end; p += kLanes) store_dense(load_dense(from + p) * factor, to + p);
      if (p < tile.end) {
        const int left = static_cast<int>(tile.end - p);
        store_first(load_first(from + p, left) * factor, to + p, left);
      }
    }
    return;
  }
  for (int64_t p = tile.first; p < tile.end; ++p)
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int left = lanes_left(channels - c);
      store_first(load_first(x + p * pass.x.pixel_stride + c, left) * (1 + load_first(scale + c, left)),
                  out + p * pass.out.pixel_stride + c, left);
    }
}

}  // namespace

void interaction_statistics(const InteractionPass& pass, int64_t begin, int64_t end) {
  Scratch scratch(pass);
  with_dtype(pass.x.dtype, [&](auto x) {
    for (int64_t task = begin; task < end; ++task) forward_tile<decltype(x)>(pass, task, scratch);
  });
}

void interaction_apply(const InteractionPass& pass, int64_t begin, int64_t end) {
  with_dtype(pass.x.dtype, [&](auto x) {
    // Backwards: what the statistics read last is still in the cache.
    for (int64_t task = end - 1; task >= begin; --task) apply_tile<decltype(x)>(pass, task);
  });
}

void interaction_backward_statistics(const InteractionPass& pass, int64_t begin, int64_t end) {
  Scratch scratch(pass);
  Buffer<int32_t> fours(groups_of_four(pass.hidden) * kPanel);
  with_dtype(pass.x.dtype, [&](auto x) {
    for (int64_t task = begin; task < end; ++task) backward_tile<decltype(x)>(pass, task, scratch, fours);
  });
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
