// Forward sweep of cross_attention over one split of the dense tokens, tile by tile of S (tokens x class tokens).
//
// Ordinary logits ("plain" tiles): E = e^s, as 2^(s log2 e), serves both softmaxes, relative to a peak of 0. A tile is
// plain when the sum of each of its rows and columns lies in 2^-58..2^58: then no term that matters was lost to the ends
// of the exponent.
// Other tiles ("wide"): each row has its own peak, each column a running one. Once a split has met a wide tile it
// expects more, so the plain attempt is dropped. The choice depends on the numbers alone, never on threads.
#include "cpu/cross_attention_few.h"
#include "cpu/with_dtype.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

constexpr float kPlainSumLow = 0x1p-58f, kPlainSumHigh = 0x1p58f;
constexpr float kVanishing = -1e30f;
constexpr float kWithin = 120.0f;  // of a score to base 2, so that rounding leaves it within exp2_within

// Of every column: sum of weights and weighted values [e, columns], or [columns, e] where columns are few; wide ones
// also the running peak.
struct ColumnSums {
  float* peak;
  float* sum;
  float* values;
  int64_t channel, column;  // distances in values
  bool used;
};

struct Sweep {
  int64_t e, width, vectors;
  Columns columns;
  float k_square;  // squared length of the longest class token
  VecF inside;  // of the last vector of columns: 1 where there is one, 0 beyond
  float *scores, *other, *q, *v, *out, *k_rows, *v_rows, *k_panels, *v_panels;
  float *tile_sum, *column_low, *row_parts;  // row_parts: sums of every row, a vector each
  float row_low[kTileTokens], row_sum[kTileTokens], row_shift[kTileTokens], row_inverse[kTileTokens];
  ColumnSums plain, wide;
};

BTI_FAST_INLINE ColumnSums column_sums(Arena& arena, int64_t e, int64_t width, bool few) {
  return {arena.take(width), arena.take(width), arena.take(e * width), few ? 1 : width, few ? e : 1, false};
}

BTI_FAST_INLINE void begin(ColumnSums& sums, int64_t e, int64_t width) {
  if (sums.used) return;
  sums.used = true;
  if (sums.channel == 1) width = kFewColumns;
  for (int64_t j = 0; j < width; ++j) sums.peak[j] = kNothing;
  for (int64_t j = 0; j < width; ++j) sums.sum[j] = 0.0f;
  for (int64_t j = 0; j < e * width; ++j) sums.values[j] = 0.0f;
}

// Exponentials of a block of scores straight from the registers that hold them. What lies beyond the tile's tokens or
// the class tokens starts from a score so low that its exponential, 2^-126, vanishes in every sum. Within: nothing does,
// and every score is known to lie within the exponent's range.
template <bool Within>
struct PlainScores {
  const Sweep& s;
  const float* q;
  int64_t q_row, d;
  float factor;

  template <int R, int V>
  BTI_FAST_INLINE void run(int64_t r0, int64_t v0) const {
    VecF acc[R][V]{};
    accumulate<false>(acc, q + r0 * q_row, q_row, s.k_panels + v0 / kPanelVectors * d * kPanel, kPanel, d);
    VecF column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = load_dense(s.tile_sum + (v0 + v) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      VecF row = load_dense(s.row_parts + (r0 + r) * kLanes);
      float* out = s.scores + (r0 + r) * s.width + v0 * kLanes;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        VecF y;
        if constexpr (Within) {
          y = exp2_within(acc[r][v] * factor);
        } else {
          const VecF low = load_dense(s.column_low + (v0 + v) * kLanes) + s.row_low[r0 + r];
          y = exp2_bounded(acc[r][v] * factor + low);
        }
        store_dense(y, out + v * kLanes);
        row += y;
        column[v] += y;
      }
      store_dense(row, s.row_parts + (r0 + r) * kLanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_dense(column[v], s.tile_sum + (v0 + v) * kLanes);
  }
};

// Squared length of the longest row; NaN where there is one.
BTI_FAST_INLINE float longest_square(const float* x, int64_t row, int64_t rows, int64_t channels) {
  float longest = 0.0f;
  for (int64_t i = 0; i < rows; ++i, x += row) {
    VecF sum{};
    for (int64_t c = 0; c < channels; c += kLanes) sum += load_dense(x + c) * load_dense(x + c);
    const float square = lane_sum(sum);
    longest = square <= longest ? longest : square;
    if (square != square) break;
  }
  return longest;
}

// Exponentials of all scores; false where the tile is wide.
__attribute__((noinline)) bool plain_tile(Sweep& s, const Tile& q, int64_t d, float scale, int count, int rows) {
  for (int64_t v = 0; v < s.vectors * kLanes; v += kLanes) store_dense(VecF{}, s.tile_sum + v);
  for (int i = 0; i < rows; ++i) {
    store_dense(VecF{}, s.row_parts + i * kLanes);
    s.row_low[i] = i < count ? 0.0f : kVanishing;
  }
  const float factor = scale * kLog2E;
  const bool full = count == rows && s.columns.count == s.vectors * kLanes;
  if (full && longest_square(q.data, q.row, rows, d) * s.k_square * factor * factor <= kWithin * kWithin) {
    for_blocks(rows, s.vectors, PlainScores<true>{s, q.data, q.row, d, factor});
  } else {
    for_blocks(rows, s.vectors, PlainScores<false>{s, q.data, q.row, d, factor});
  }
  bool fits = true;
  for (int i = 0; i < count; ++i) {
    s.row_sum[i] = lane_sum(load_dense(s.row_parts + i * kLanes));
    fits &= s.row_sum[i] >= kPlainSumLow && s.row_sum[i] <= kPlainSumHigh;
  }
  for (int64_t j = 0; j < s.columns.count; ++j) fits &= s.tile_sum[j] >= kPlainSumLow && s.tile_sum[j] <= kPlainSumHigh;
  if (!fits) return false;
  begin(s.plain, s.e, s.width);
  for (int64_t v = 0; v < s.vectors * kLanes; v += kLanes)
    store_dense(load_dense(s.plain.sum + v) + load_dense(s.tile_sum + v), s.plain.sum + v);
  for (int i = 0; i < kTileTokens; ++i) s.row_shift[i] = 0.0f;
  return true;
}

// Of few columns: their exponentials [columns, kTileTokens], the lanes being tokens.
__attribute__((noinline)) bool few_tile(Sweep& s, const Tile& q, int64_t d, float scale, int count, int rows) {
  const float factor = scale * kLog2E;
  VecF columns[kFewColumns]{};
  VecI fits = VecF{} == VecF{};
  for (int64_t j = 0; j < s.columns.count; ++j) dots(q, {s.k_rows + j * d, 0}, d, rows, s.scores + j * kTileTokens);
  for (int i = 0; i < count; i += kLanes) {
    const VecI inside = lanes_before(count, i) > 0;
    VecF row{};
    for (int64_t j = 0; j < s.columns.count; ++j) {
      float* p = s.scores + j * kTileTokens + i;
      const VecF y = inside ? exp2_bounded(load_dense(p) * factor) : VecF{};
      store_dense(y, p);
      row += y;
      columns[j] += y;
    }
    store_dense(row, s.row_sum + i);
    fits &= ((row >= kPlainSumLow) & (row <= kPlainSumHigh)) | ~inside;
  }
  bool all = true;
  for (int lane = 0; lane < kLanes; ++lane) all &= fits[lane] != 0;
  for (int64_t j = 0; j < s.columns.count; ++j) {
    s.tile_sum[j] = lane_sum(columns[j]);
    all &= s.tile_sum[j] >= kPlainSumLow && s.tile_sum[j] <= kPlainSumHigh;
  }
  if (!all) return false;
  begin(s.plain, s.e, s.width);
  for (int64_t j = 0; j < s.columns.count; ++j) s.plain.sum[j] += s.tile_sum[j];
  for (int i = 0; i < kTileTokens; ++i) s.row_shift[i] = 0.0f;
  return true;
}

BTI_FAST_INLINE VecF peak_of(VecF one, VecF two) { return one > two ? one : two; }
BTI_FAST_INLINE VecF shift_of(VecF peak) { return peak == kNothing ? VecF{} : peak; }

// Row weights into `other`, column weights in place of the scores.
void wide_tile(Sweep& s, int count) {
  const int64_t last = (s.vectors - 1) * kLanes;
  for (int i = 0; i < count; ++i) {
    float* x = s.scores + i * s.width;
    store_dense(s.inside > 0 ? load_dense(x + last) : splat<VecF>(kNothing), x + last);
    float peak = kNothing;
    for (int64_t j = 0; j < s.columns.count; ++j) peak = softmax_peak(x[j], peak);
    const float shift = softmax_shift(peak);
    VecF sum{};
    for (int64_t v = 0; v <= last; v += kLanes) {
      const VecF y = exp_exact(load_dense(x + v) - shift);
      store_dense(y, s.other + i * s.width + v);
      sum += y;
    }
    s.row_sum[i] = lane_sum(sum);
    s.row_shift[i] = shift;
  }
  for (int64_t v = 0; v <= last; v += kLanes) {
    const VecF old = load_dense(s.wide.peak + v);
    VecF peak = old;
    for (int i = 0; i < count; ++i) peak = peak_of(load_dense(s.scores + i * s.width + v), peak);
    const VecF shift = shift_of(peak);
    const VecF weight = old == kNothing ? VecF{} : exp_exact(old - shift);
    store_dense(peak, s.wide.peak + v);
    for (int64_t c = 0; c < s.e; ++c) {
      float* p = s.wide.values + c * s.width + v;
      store_dense(load_dense(p) * weight, p);
    }
    VecF sum = load_dense(s.wide.sum + v) * weight;
    for (int i = 0; i < count; ++i) {
      float* p = s.scores + i * s.width + v;
      const VecF y = exp_exact(load_dense(p) - shift);
      store_dense(y, p);
      sum += y;
    }
    store_dense(sum, s.wide.sum + v);
  }
}

void finish_rows(Sweep& s, const TileTokens& tokens, SoftmaxStatistics* statistics) {
  for (int i = 0; i < tokens.count; i += kLanes) {
    float line[kLanes];
    const VecF sum = load_dense(s.row_sum + i);
    store_dense(log_positive(sum), line);
    store_dense(sum == 0 ? VecF{} : 1 / sum, s.row_inverse + i);
    for (int k = 0; k < kLanes && i + k < tokens.count; ++k)
      statistics[tokens.first + tokens.index[i + k]] = {s.row_shift[i + k], line[k]};
  }
}

// The two kinds of sums of this split, as one part (peak, sum, values [e, m]) of every column.
void store_part(const Sweep& s, int64_t m, float* part) {
  const int64_t count = s.columns.count;
  float* peak = part;
  for (int64_t j = 0; j < count; ++j)
    peak[j] = softmax_peak(s.plain.used ? 0.0f : kNothing, s.wide.used ? s.wide.peak[j] : kNothing);
  for (int64_t j = 0; j < (1 + s.e) * m; ++j) part[m + j] = 0.0f;
  for (const ColumnSums* sums : {&s.plain, &s.wide}) {
    if (!sums->used) continue;
    float weight[256];
    for (int64_t j = 0; j < count; ++j) {
      const float own = sums == &s.plain ? 0.0f : sums->peak[j];
      weight[j] = softmax_weight(own, peak[j], [](float x) { return exp_exact(x); });
      part[m + j] += weight[j] * sums->sum[j];
    }
    for (int64_t c = 0; c < s.e; ++c) {
      const float* from = sums->values + c * sums->channel;
      float* to = part + (2 + c) * m;
      for (int64_t j = 0; j < count; ++j) to[j] += weight[j] * from[j * sums->column];
    }
  }
}

template <typename T>
void forward_split(const CrossForward& job, int64_t task, float* scratch) {
  const CrossShape& shape = job.shape;
  const int64_t d = shape.d, e = shape.e;
  const int64_t split = task % shape.splits, head = task / shape.splits % shape.heads;
  const int64_t batch = task / shape.splits / shape.heads;
  const int64_t first = split * shape.split_tokens;
  const int64_t end = first + shape.split_tokens < shape.n ? first + shape.split_tokens : shape.n;
  const T* q = at<const T>(job.q, batch, head);
  const T* v_q = at<const T>(job.v_q, batch, head);
  T* out_q = at<T>(job.out_q, batch, head);
  SoftmaxStatistics* statistics = job.statistics + (batch * shape.heads + head) * (shape.n + shape.m);

  Sweep s;
  s.e = e;
  s.columns = columns_of(shape, batch);
  const int64_t count = s.columns.count;
  s.vectors = (count + kLanes - 1) / kLanes;
  s.width = padded(shape.m) + kPadding;
  s.inside = lanes_before(count, (s.vectors - 1) * kLanes);
  Arena arena{scratch};
  const int64_t q_row = d + kPadding, v_row = e + kPadding;
  s.scores = arena.take(kTileTokens * s.width);
  s.other = arena.take(kTileTokens * s.width);
  s.tile_sum = arena.take(s.width);
  s.column_low = arena.take(s.width);
  s.row_parts = arena.take(kTileTokens * kLanes);
  for (int64_t j = 0; j < s.vectors * kLanes; ++j) s.column_low[j] = j < count ? 0.0f : kVanishing;
  s.q = arena.take(kTileTokens * q_row);
  s.v = arena.take(kTileTokens * v_row);
  s.out = arena.take(kTileTokens * v_row);
  s.k_panels = arena.take(padded(shape.m) * d);
  s.v_panels = arena.take(padded(shape.m) * padded(e));
  const bool few = count <= kFewColumns;
  s.plain = column_sums(arena, e, s.width, few);
  s.wide = column_sums(arena, e, s.width, false);
  s.k_rows = arena.take(count * d);
  s.v_rows = arena.take(count * e);
  gather(at<const T>(job.k, batch, head), job.k, s.columns, d, s.k_rows);
  gather(at<const T>(job.v_k, batch, head), job.v_k, s.columns, e, s.v_rows);
  const auto pack_panels = [&] {
    s.k_square = longest_square(s.k_rows, d, count, d);
    pack_transposed(s.k_rows, count, d, s.k_panels);
    pack(s.v_rows, count, e, s.v_panels);
  };
  if (!few) pack_panels();

  for (int64_t first_token = first; first_token < end; first_token += kTileTokens) {
    const TileTokens tokens = tile_tokens(shape.q_mask, batch, first_token, end);
    if (tokens.count == 0) continue;
    const Tile q_tile = tile_of(q, job.q, tokens, d, s.q);
    prefetch_tile(v_q, job.v_q, first_token, end, e);
    prefetch_tile(out_q, job.out_q, first_token, end, e);
    if (few && !s.wide.used && few_tile(s, q_tile, d, shape.scale, tokens.count, tokens.rows())) {
      const Tile v_tile = tile_of(v_q, job.v_q, tokens, e, s.v);
      prefetch_tile(q, job.q, first_token + kTileTokens, end, d);
      for (int64_t j = 0; j < count; ++j)
        add_weighted(s.scores + j * kTileTokens, v_tile, e, tokens.rows(), s.plain.values + j * e);
      finish_rows(s, tokens, statistics);
      for (int64_t j = 0; j < count; ++j)
        for (int i = 0; i < tokens.count; i += kLanes) {
          float* p = s.scores + j * kTileTokens + i;
          store_dense(load_dense(p) * load_dense(s.row_inverse + i), p);
        }
      mix_into(s.scores, s.v_rows, count, e, tokens, out_q, job.out_q, s.out);
      continue;
    }
    if (few && !s.wide.used) pack_panels();
    if (few || s.wide.used || !plain_tile(s, q_tile, d, shape.scale, tokens.count, tokens.rows())) {
      begin(s.wide, e, s.width);
      product(q_tile.data, q_tile.row, packed(s.k_panels, d), d, {&shape.scale, 0}, s.scores, s.width, tokens.rows(),
              s.vectors);
      wide_tile(s, tokens.count);
    }
    const bool wide = s.wide.used;
    const Tile v_tile = tile_of(v_q, job.v_q, tokens, e, s.v);
    prefetch_tile(q, job.q, first_token + kTileTokens, end, d);
    add_transposed_product(v_tile.data, v_tile.row, plain(s.scores, s.width), tokens.count,
                           (wide ? s.wide : s.plain).values, s.width, e, s.vectors);
    finish_rows(s, tokens, statistics);
    product_into(wide ? s.other : s.scores, s.width, packed(s.v_panels, count), count, {s.row_inverse, 1}, e, tokens,
                 out_q, job.out_q, s.out);
  }
  store_part(s, shape.m, job.partial + task * forward_partial(shape));
}

// A task with no class token to attend to, and the tokens that take no part.
template <typename T>
void forward_zeros(const CrossForward& job, int64_t task) {
  const CrossShape& shape = job.shape;
  const int64_t head = task / shape.splits % shape.heads, batch = task / shape.splits / shape.heads;
  const int64_t first = task % shape.splits * shape.split_tokens;
  const int64_t end = first + shape.split_tokens < shape.n ? first + shape.split_tokens : shape.n;
  const bool none = columns_of(shape, batch).count == 0;
  if (!none && shape.q_mask.data == nullptr) return;
  T* out = at<T>(job.out_q, batch, head);
  SoftmaxStatistics* statistics = job.statistics + (batch * shape.heads + head) * (shape.n + shape.m);
  for (int64_t i = first; i < end; ++i) {
    if (!none && shape.q_mask.data[batch * shape.q_mask.batch + i * shape.q_mask.token]) continue;
    statistics[i] = {0.0f, kNothing};
    for (int64_t c = 0; c < shape.e; ++c) narrow(0.0f, out + i * job.out_q.token + c * job.out_q.channel);
  }
}

template <typename T>
void forward_tasks(const CrossForward& job, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) {
    forward_zeros<T>(job, task);
    if (columns_of(job.shape, task / job.shape.splits / job.shape.heads).count > 0)
      forward_split<T>(job, task, scratch);
  }
}

}  // namespace

void cross_forward(const CrossForward& job, int64_t begin, int64_t end, float* scratch) {
  with_dtype(job.shape.dtype, [&](auto x) { forward_tasks<decltype(x)>(job, begin, end, scratch); });
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
