// The last pass backward: grad x, and grad W1, from the signs of the hidden map that the first pass left.
//
// For one vector of channels and one sample, A[h] = W1[h, channels] hidden_grad[h]. Both products with the hidden map
// are sums over active units only, and the units come in fours, of which there are 16 patterns:
//   W1^T (active * hidden_grad) at pixel p = sum over fours of table[four][pattern(p)], the table holding the 16 sums
//   of the four's rows of A: one addition instead of four multiplications;
//   sum_p active[h, p] x[p] = sum over patterns with h of bucket[four][pattern], where pixel p adds x[p] to the bucket
//   of its pattern: again one addition for four.
// Pixels go by as vectors of channels, so a contiguous map is transposed in registers on its way in and out.
#include "cpu/product.h"
#include "cpu/rows.h"
#include "cpu/task_interaction.h"
#include "cpu/transpose.h"
#include "cpu/with_dtype.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

constexpr int64_t kPixels = 128;                    // pixels in flight: their x and their sums stay in L1
constexpr int64_t kFour = 16 * kLanes;              // floats of one four's table or buckets
constexpr int64_t kChunk = 24 * 8 / kLanes;         // fours whose table and buckets share L1 with the pixels

struct Scratch {
  Buffer<float> table, buckets, x, out;
  explicit Scratch(int64_t fours)
      : table(fours * kFour), buckets(fours * kFour), x(kPixels * kLanes), out(kPixels * kLanes) {}
};

// One vector of channels of one sample: `channels` of its lanes exist.
template <typename T>
struct Column {
  const T *x, *grad_out;
  T* out;
  int channels;
  int64_t b, first_channel;
};

void build_table(const InteractionPass& pass, int64_t b, int64_t c, int channels, float* table) {
  const int64_t fours = groups_of_four(pass.hidden);
  for (int64_t four = 0; four < fours; ++four, table += kFour) {
    VecF row[4];
    for (int j = 0; j < 4; ++j) {
      const int64_t h = 4 * four + j;
      row[j] = h < pass.hidden ? load_first(pass.weight + h * pass.x.channels + c, channels) *
                                     pass.hidden_grad[b * pass.hidden + h]
                               : VecF{};
    }
    store_dense(VecF{}, table);
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 1 << j; ++i)
        store_dense(load_dense(table + i * kLanes) + row[j], table + ((1 << j) + i) * kLanes);
  }
}

// grad W1 += hidden_grad * (sum of the buckets that each hidden unit is in).
void empty_buckets(const InteractionPass& pass, int64_t b, int64_t c, int channels, const float* buckets,
                   float* grad_weight) {
  for (int64_t h = 0; h < pass.hidden; ++h) {
    const float* bucket = buckets + h / 4 * kFour;
    const int bit = 1 << (h % 4);
    VecF total{};
    for (int pattern = 0; pattern < 16; ++pattern)
      if (pattern & bit) total += load_dense(bucket + pattern * kLanes);
    float* out = grad_weight + h * pass.x.channels + c;
    store_first(load_first(out, channels) + total * pass.hidden_grad[b * pass.hidden + h], out, channels);
  }
}

BTI_FAST_INLINE const float* entry(const float* table, int64_t four, uint8_t sign) {
  return reinterpret_cast<const float*>(reinterpret_cast<const char*>(table + four * kFour) + int64_t{sign} * 8);
}

// For `count` pixels: out += table entries, buckets += x. `signs` is at the first pixel, a multiple of kSignBlock.
void walk(const uint8_t* signs, int64_t fours, int64_t count, const float* table, float* buckets, const float* x,
          float* out) {
  for (int64_t first = 0; first < fours; first += kChunk) {
    const int64_t n = fours - first < kChunk ? fours - first : kChunk;
    const float* part = table + first * kFour;
    float* bucket = buckets + first * kFour;
    for (int64_t p = 0; p < count; ++p) {
      const uint8_t* sign = signs + (p / kSignBlock * fours + first) * kSignBlock + p % kSignBlock;
      const VecF value = load_dense(x + p * kLanes);
      VecF acc[4] = {first == 0 ? VecF{} : load_dense(out + p * kLanes), VecF{}, VecF{}, VecF{}};
      const auto add = [&](int64_t four, VecF& sum) {
        const uint8_t s = sign[four * kSignBlock];
        sum += load_dense(entry(part, four, s));
        float* here = const_cast<float*>(entry(bucket, four, s));
        store_dense(load_dense(here) + value, here);
      };
      int64_t four = 0;
      for (; four + 4 <= n; four += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) add(four + i, acc[i]);
      for (; four < n; ++four) add(four, acc[0]);
      store_dense((acc[0] + acc[1]) + (acc[2] + acc[3]), out + p * kLanes);
    }
  }
}

// +k, -k or 0 by the sign of d.
BTI_FAST_INLINE VecF signed_by(VecF d, VecF k) { return keep(d > 0, k) - keep(d < 0, k); }
// 1, -1 or 0 by the sign of d.
BTI_FAST_INLINE VecI sign_of(VecF d) { return (d < 0) - (d > 0); }

// Lanes p .. of a row of `pixels`, zero outside of it.
template <bool Inside, typename T>
BTI_FAST_INLINE VecF load_window(const T* row, int64_t p, int64_t pixels) {
  if (Inside || (p >= 0 && p + kLanes <= pixels)) return load_dense(row + p);
  VecF v{};
  for (int i = 0; i < kLanes; ++i)
    if (p + i >= 0 && p + i < pixels) v[i] = widen(row[p + i]);
  return v;
}

// d(sum of differences) / dx at pixels p .. of one contiguous channel. Inside: every neighbour lies in the row.
template <bool Inside, int Count, typename T>
BTI_FAST_INLINE VecF difference_gradient_of_row(const InteractionPass& pass, const T* row, int64_t p) {
  const int64_t pixels = pass.x.pixels;
  const VecF here = load_window<Inside>(row, p, pixels);
  VecI total{};
#pragma GCC unroll 3
  for (int a = 0; a < Count; ++a) {
    const int64_t stride = pass.axes.stride[a];
    const int32_t* exists = pass.axes.exists[a] + p;
    total += load_mask(exists - stride) & sign_of(here - load_window<Inside>(row, p - stride, pixels));
    total -= load_mask(exists) & sign_of(load_window<Inside>(row, p + stride, pixels) - here);
  }
  return __builtin_convertvector(total, VecF);
}

// grad x of one channel at n pixels from p0: `product` is its share of W1^T (active * hidden_grad), kept as
// [channel lane][kPixels].
template <int Count, typename T>
void finish_row(const InteractionPass& pass, const T* x, const T* grad_out, T* out, int64_t p0, int64_t n,
                const float* product, float scale, float shift, float k) {
  const int64_t pixels = pass.x.pixels, reach = Count > 0 ? pass.axes.stride[Count > 0 ? Count - 1 : 0] : 0;
  const float factor = 1 + scale;
  int64_t p = 0;
  const auto edge = [&](int left) {
    VecF grad = load_dense(product + p) + shift + load_first(grad_out + p0 + p, left) * factor;
    if constexpr (Count > 0) grad += k * difference_gradient_of_row<false, Count>(pass, x, p0 + p);
    store_first(grad, out + p0 + p, left);
  };
  for (; p + kLanes <= n && p0 + p < reach; p += kLanes) edge(kLanes);
  for (; p + kLanes <= n && p0 + p + kLanes + reach <= pixels; p += kLanes) {
    VecF grad = load_dense(product + p) + shift + load_dense(grad_out + p0 + p) * factor;
    if constexpr (Count > 0) grad += k * difference_gradient_of_row<true, Count>(pass, x, p0 + p);
    store_dense(grad, out + p0 + p);
  }
  for (; p < n; p += kLanes) edge(lanes_left(n - p));
}

template <bool Full, typename T>
void pack_columns(const Column<T>& column, int64_t stride, int64_t p0, int64_t n, float* packed) {
  int64_t p = 0;
  for (; Full && p + kLanes <= n; p += kLanes) {
    VecF block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = load_dense(column.x + i * stride + p0 + p);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_dense(block[i], packed + (p + i) * kLanes);
  }
  for (; p < n; p += kLanes) {
    const int left = lanes_left(n - p);
    VecF block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      block[i] = i < column.channels ? load_first(column.x + i * stride + p0 + p, left) : VecF{};
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_dense(block[i], packed + (p + i) * kLanes);
  }
}

// [pixel][channel lane] to [channel lane][kPixels].
BTI_FAST_INLINE void unpack_columns(const float* packed, int64_t n, float* rows) {
  for (int64_t p = 0; p < n; p += kLanes) {
    VecF block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = load_dense(packed + (p + i) * kLanes);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_dense(block[i], rows + i * kPixels + p);
  }
}

template <typename T>
void pixels_channel_major(const InteractionPass& pass, const Column<T>& column, int64_t p0, int64_t n,
                          const uint8_t* signs, Scratch& scratch) {
  const int64_t xs = pass.x.channel_stride, gs = pass.grad_out.channel_stride, os = pass.out.channel_stride;
  if (column.channels == kLanes) {
    pack_columns<true>(column, xs, p0, n, scratch.x.data());
  } else {
    pack_columns<false>(column, xs, p0, n, scratch.x.data());
  }
  walk(signs, groups_of_four(pass.hidden), n, scratch.table.data(), scratch.buckets.data(), scratch.x.data(),
       scratch.out.data());
  unpack_columns(scratch.out.data(), n, scratch.x.data());
  const int64_t at = column.b * pass.x.channels + column.first_channel;
  const float k = pass.difference_grad[column.b];
  const auto finish = [&](auto count) {
    for (int i = 0; i < column.channels; ++i)
      finish_row<decltype(count)::value>(pass, column.x + i * xs, column.grad_out + i * gs, column.out + i * os, p0, n,
                                         scratch.x.data() + i * kPixels, pass.scale[at + i], pass.shift[at + i], k);
  };
  switch (pass.complexity ? pass.axes.count : 0) {
    case 0: return finish(std::integral_constant<int, 0>{});
    case 1: return finish(std::integral_constant<int, 1>{});
    case 2: return finish(std::integral_constant<int, 2>{});
    default: return finish(std::integral_constant<int, 3>{});
  }
}

template <typename T>
void pixels_pixel_major(const InteractionPass& pass, const Column<T>& column, int64_t p0, int64_t n,
                        const uint8_t* signs, Scratch& scratch) {
  const int64_t xs = pass.x.pixel_stride, gs = pass.grad_out.pixel_stride, os = pass.out.pixel_stride;
  const auto load_x = [&](int64_t p) { return load_first(column.x + p * xs, column.channels); };
  for (int64_t p = 0; p < n; ++p) store_dense(load_x(p0 + p), scratch.x.data() + p * kLanes);
  walk(signs, groups_of_four(pass.hidden), n, scratch.table.data(), scratch.buckets.data(), scratch.x.data(),
       scratch.out.data());
  const int64_t c = column.b * pass.x.channels + column.first_channel;
  const VecF factor = 1 + load_first(pass.scale + c, column.channels);
  const VecF shift = load_first(pass.shift + c, column.channels);
  const VecF k = splat<VecF>(pass.difference_grad[column.b]);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t p = p0 + i;
    VecF grad = load_dense(scratch.out.data() + i * kLanes) + shift +
                load_first(column.grad_out + p * gs, column.channels) * factor;
    if (pass.complexity) {
      const VecF here = load_dense(scratch.x.data() + i * kLanes);
      for (int a = 0; a < pass.axes.count; ++a) {
        const int64_t stride = pass.axes.stride[a];
        if (pass.axes.exists[a][p - stride]) grad += signed_by(here - load_x(p - stride), k);
        if (pass.axes.exists[a][p]) grad -= signed_by(load_x(p + stride) - here, k);
      }
    }
    store_first(grad, column.out + p * os, column.channels);
  }
}

template <typename T>
void gradient_tasks(const InteractionPass& pass, int64_t begin, int64_t end) {
  const int64_t channels = pass.x.channels, pixels = pass.x.pixels, fours = groups_of_four(pass.hidden);
  const int64_t channel_blocks = (channels + pass.channel_block - 1) / pass.channel_block;
  const int64_t sign_blocks = (pixels + kSignBlock - 1) / kSignBlock;
  const int64_t runs = pass.x.batch * pass.runs.count;
  const bool rows = pass.order == Order::channel_major;
  Scratch scratch(fours);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / channel_blocks, block = task % channel_blocks;
    const int64_t last_run = runs * (part + 1) / pass.parts;
    float* grad_weight = pass.grad_weight + part * pass.hidden * channels;
    for (int64_t run = runs * part / pass.parts; run < last_run; ++run) {
      const int64_t b = run / pass.runs.count, first = run % pass.runs.count * pass.runs.size;
      const int64_t stop = first + pass.runs.size < pixels ? first + pass.runs.size : pixels;
      const uint8_t* signs = pass.signs + b * sign_blocks * fours * kSignBlock;
      const int64_t last_channel =
          (block + 1) * pass.channel_block < channels ? (block + 1) * pass.channel_block : channels;
      for (int64_t c = block * pass.channel_block; c < last_channel; c += kLanes) {
        const auto at = [&](const FeatureMap& map) {
          return static_cast<T*>(map.data) + b * map.batch_stride + c * (rows ? map.channel_stride : 1);
        };
        const Column<T> column{at(pass.x), at(pass.grad_out), at(pass.out), lanes_left(last_channel - c), b, c};
        build_table(pass, b, c, column.channels, scratch.table.data());
        scratch.buckets.clear();
        for (int64_t p = first; p < stop; p += kPixels) {
          const int64_t n = stop - p < kPixels ? stop - p : kPixels;
          const uint8_t* here = signs + p / kSignBlock * fours * kSignBlock;
          if (rows) {
            pixels_channel_major(pass, column, p, n, here, scratch);
          } else {
            pixels_pixel_major(pass, column, p, n, here, scratch);
          }
        }
        empty_buckets(pass, b, c, column.channels, scratch.buckets.data(), grad_weight);
      }
    }
  }
}

}  // namespace

void interaction_gradient(const InteractionPass& pass, int64_t begin, int64_t end) {
  with_dtype(pass.x.dtype, [&](auto x) { gradient_tasks<decltype(x)>(pass, begin, end); });
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
