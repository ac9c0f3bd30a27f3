// Gradient of the weight of a depthwise convolution of channels_last maps. What a tile of neighbouring positions adds
// to one row of the kernel is summed in registers, and then added to the part that its task has in the result.
#include "cpu/dilated_depthwise_weight.h"

#include "cpu/rows.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

constexpr int kLanes = VecOf<float>::lanes;
constexpr int kVectors = 2;    // or most additions of a 3x3 kernel would wait for the one before
constexpr int64_t kUnit = 32;  // channels: blocks begin at whole vectors
constexpr int64_t kTile = 64;  // positions: near to the processor while every row of the kernel passes over them
constexpr int64_t kLine = 64 / sizeof(float);

BTI_FAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
BTI_FAST_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Positions [left, right) of each of the rows [top, bottom) of one sample.
struct Tile {
  const float *grad, *x;  // of the sample
  int64_t top, bottom, left, right;
};

// What one row of a tile adds to one row of the kernel. `x` is where the first tap of its first position would lie.
// Near: dilation 1 and a map no narrower than the kernel, so neighbours share loads and edges are known beforehand.
template <int K, int V, bool Near, typename Load>
BTI_FAST_INLINE void add_row(const DilatedDepthwiseWeight& job, const Tile& tile, const float* grad, const float* x,
                             Load load, VecF (&acc)[K][V]) {
  const int64_t channels = job.channels, width = job.width, reach = K / 2 * job.dilation;
  const int64_t step = Near ? channels : job.dilation * channels;
  const auto at_position = [&](int64_t at, auto lies_within) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const VecF g = load(grad + at * channels + v * kLanes);
#pragma GCC unroll 5
      for (int j = 0; j < K; ++j)
        if (lies_within(j)) acc[j][v] += g * load(x + at * channels + j * step + v * kLanes);
    }
  };
  const auto at_any = [&](int64_t at) {
    at_position(at, [&](int j) {
      const int64_t column = at - reach + j * job.dilation;
      return column >= 0 && column < width;
    });
  };
  // No tap of the positions [inner, outer) lies beside the map.
  const int64_t inner = smaller(larger(tile.left, reach), tile.right);
  const int64_t outer = larger(smaller(tile.right, width - reach), inner);
  int64_t at = tile.left;
  if constexpr (Near) {
    if (at == 0) {
#pragma GCC unroll 2
      for (int e = 0; e < K / 2; ++e) at_position(e, [&](int j) { return j >= K / 2 - e; });
      at = K / 2;
    }
    for (; at + 2 <= outer; at += 2) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const VecF g0 = load(grad + at * channels + v * kLanes);
        const VecF g1 = load(grad + (at + 1) * channels + v * kLanes);
#pragma GCC unroll 6
        for (int k = 0; k < K + 1; ++k) {
          const VecF value = load(x + (at + k) * channels + v * kLanes);
          if (k < K) acc[k][v] += g0 * value;
          if (k > 0) acc[k - 1][v] += g1 * value;
        }
      }
    }
  } else {
    for (; at < inner; ++at) at_any(at);
  }
  for (; at < outer; ++at) at_position(at, [](int) { return true; });
  if constexpr (Near) {
    if (tile.right == width) {
#pragma GCC unroll 2
      for (int e = 0; e < K / 2; ++e) at_position(outer + e, [&](int j) { return j < K - 1 - e; });
    }
  } else {
    for (; at < tile.right; ++at) at_any(at);
  }
}

// Channels [begin, end) of a tile.
template <int K, bool Near>
void add_tile(const DilatedDepthwiseWeight& job, const Tile& tile, int64_t begin, int64_t end, float* part) {
  const int64_t channels = job.channels, reach = K / 2 * job.dilation, length = job.width * channels;
  // What the next tile will be the first to read: too many short streams for the processor to foresee.
  const int64_t count = (tile.bottom - tile.top) * (tile.right - tile.left);
  const int64_t next = (tile.top * job.width + tile.left + count) * channels;
  const auto vectors = [&](int64_t c, auto vector_count, auto load, auto store, auto chosen) {
    constexpr int V = decltype(vector_count)::value;
    for (int64_t p = 0; p < count; ++p)
      for (int64_t v = 0; v < V * kLanes; v += kLine) {
        __builtin_prefetch(tile.grad + next + p * channels + c + v, 0, 2);
        __builtin_prefetch(tile.x + next + reach * length + p * channels + c + v, 0, 2);
      }
    for (int64_t i = 0; i < K; ++i) {
      const int64_t down = i * job.dilation - reach;
      const int64_t top = larger(tile.top, -down), bottom = smaller(tile.bottom, job.height - down);
      if (top >= bottom) continue;
      VecF acc[K][V] = {};
      for (int64_t y = top; y < bottom; ++y)
        add_row<K, V, Near>(job, tile, tile.grad + y * length + c,
                            tile.x + (y + down) * length - reach * channels + c, load, acc);
#pragma GCC unroll 5
      for (int j = 0; j < K; ++j)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          float* to = part + (i * K + j) * channels + c + v * kLanes;
          store(load(to) + chosen(acc[j][v]), to);
        }
    }
  };
  const auto load = [](const float* p) { return load_dense(p); };
  const auto store = [](VecF v, float* p) { store_dense(v, p); };
  const auto all = [](VecF v) { return v; };
  const std::integral_constant<int, 1> one;
  int64_t c = begin;
  for (; c + kVectors * kLanes <= end; c += kVectors * kLanes)
    vectors(c, std::integral_constant<int, kVectors>{}, load, store, all);
  for (; c + kLanes <= end; c += kLanes) vectors(c, one, load, store, all);
  const int left = static_cast<int>(end - c);
  if (left > 0 && end - begin >= kLanes) {  // a whole vector, of which the first lanes are done already
    const VecI done = first_lanes(kLanes - left);
    vectors(end - kLanes, one, load, store, [&](VecF v) { return keep(~done, v); });
  } else if (left > 0) {
    vectors(c, one, [&](const float* p) { return load_first(p, left); },
            [&](VecF v, float* p) { store_first(v, p, left); }, all);
  }
}

template <int K>
void add_parts(const DilatedDepthwiseWeight& job, int64_t begin, int64_t end) {
  const int64_t rows = job.batch * job.height, sample_size = job.height * job.width * job.channels;
  const int64_t height = larger(1, kTile / larger(1, job.width));  // of a tile
  const int64_t tiles = (job.width + kTile - 1) / kTile;           // of a row
  const int64_t units = (job.channels + kUnit - 1) / kUnit;
  const auto add = job.dilation == 1 && job.width >= K ? &add_tile<K, true> : &add_tile<K, false>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t number = task / job.block_count, block = task % job.block_count;
    const int64_t first = units * block / job.block_count * kUnit;
    const int64_t last = smaller(units * (block + 1) / job.block_count * kUnit, job.channels);
    float* part = job.parts + number * K * K * job.channels;
    for (int64_t tap = 0; tap < K * K; ++tap)
      clear(part + tap * job.channels + first, last - first);
    const int64_t last_row = rows * (number + 1) / job.part_count;
    for (int64_t row = rows * number / job.part_count; row < last_row;) {
      const int64_t sample = row / job.height, top = row % job.height;
      const int64_t bottom = smaller(smaller(top + height, job.height), top + last_row - row);
      for (int64_t t = 0; t < tiles; ++t)
        add(job,
            Tile{job.grad + sample * sample_size, job.x + sample * sample_size, top, bottom, job.width * t / tiles,
                 job.width * (t + 1) / tiles},
            first, last, part);
      row += bottom - top;
    }
  }
}

}  // namespace

void dilated_depthwise_weight(const DilatedDepthwiseWeight& job, int64_t begin, int64_t end) {
  job.kernel == 3 ? add_parts<3>(job, begin, end) : add_parts<5>(job, begin, end);
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
