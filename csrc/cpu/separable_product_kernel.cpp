// Blocks of positions are convolved into a buffer that the L2 cache holds, channel blocks at a time, and multiplied
// there by panels of the matrix that lie in the L1 cache. The sums wait in the result between channel blocks.
#include "cpu/separable_product.h"

#include "cpu/depthwise_row.h"
#include "cpu/silu.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

constexpr int kLanes = VecOf<float>::lanes;
constexpr int kVectors = 2;                            // of columns that are computed together
constexpr int kRows = kBytes == 64 ? 12 : 6;           // 2 x 12 of 32 registers, or 2 x 6 of 16, accumulate
constexpr int kRowsOfOne = 12;                         // of a single vector of columns: so many sums hide each other
constexpr int kPanelVectors = kPackedColumns / kLanes;
static_assert(kPackedColumns % kLanes == 0, "a panel is whole vectors");

// A block of positions (rows) and of channels of the depth.
struct Block {
  int64_t first_row, rows, from, to;
};

// Where the rows of a block lie in the result, what their sums start from, and what becomes of them.
struct Ends {
  int64_t place[kRowsAtATime];
  const float* bias[kRowsAtATime];  // or nullptr
  bool add;                         // to what lies in the result, else to the bias
  bool changes;                     // whether there are a skip, silu or bounds, and they apply
};

void copy_positions(const float* x, int64_t x_step, const float* factor, float* out, int64_t out_step, int64_t count,
                    int64_t channels) {
  for (int64_t p = 0; p < count; ++p, x += x_step, out += out_step)
    each_vector(channels, [&](int64_t c, int n) __attribute__((always_inline)) {
      VecF v = load_first(x + c, n);
      if (factor != nullptr) v *= load_first(factor + c, n);
      store_first(v, out + c, n);
    });
}

// Of one source, positions at .. end of row y, `channels` channels from `begin` on.
void fill_row(const SeparableProduct& job, const SeparableSource& source, int64_t sample, int64_t y, int64_t at,
              int64_t end, int64_t begin, int64_t channels, float* out, int64_t out_step) {
  const int64_t length = source.width * source.channels;
  const float* x = source.x + sample * source.height * length + begin;
  const float* factor = job.factor == nullptr ? nullptr : job.factor + sample * job.depth + source.first + begin;
  if (source.taps == nullptr) {
    const bool within = y + source.down >= 0 && y + source.down < source.height;
    const auto bounded = [&](int64_t p) { return p < at ? at : p > end ? end : p; };
    const int64_t first = within ? bounded(-source.right) : end;
    const int64_t last = within ? bounded(source.width - source.right) : end;
    const auto clear_positions = [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) clear(out + (p - at) * out_step, channels);
    };
    clear_positions(at, first);
    copy_positions(x + (y + source.down) * length + (first + source.right) * source.channels, source.channels, factor,
                   out + (first - at) * out_step, out_step, last - first, channels);
    clear_positions(last, end);
    return;
  }
  const int64_t top = y - source.dilation;
  const Taps rows = taps_within(top, 3, source.dilation, source.height);
  const DepthwiseRow row{x + top * length,
                         source.channels,
                         source.dilation * length,
                         source.taps + begin,
                         source.channels,
                         out - at * out_step,
                         out_step,
                         channels,
                         source.width,
                         source.dilation,
                         rows.begin,
                         rows.end};
  depthwise_row<3>(row, at, end, [&](auto& sums, int64_t c, int lanes) __attribute__((always_inline)) {
    if (factor == nullptr) return;
    const VecF f = load_first(factor + c, lanes);
    for (VecF& sum : sums) sum *= f;
  });
}

// [rows, step] of what is multiplied.
void fill(const SeparableProduct& job, const Block& block, float* buffer, int64_t step) {
  for (int64_t done = 0; done < block.rows;) {
    const int64_t line = (block.first_row + done) / job.width, at = (block.first_row + done) % job.width;
    const int64_t end = job.width - at < block.rows - done ? job.width : at + block.rows - done;
    for (const SeparableSource& source : job.sources) {
      const int64_t begin = block.from > source.first ? block.from : source.first;
      const int64_t stop = block.to < source.first + source.channels ? block.to : source.first + source.channels;
      if (begin < stop)
        fill_row(job, source, line / job.height, line % job.height, at, end, begin - source.first, stop - begin,
                 buffer + done * step + begin - block.from, step);
    }
    done += end - at;
  }
}

struct Operand {
  const float* data;
  int64_t step;  // from row to row
};

// What is multiplied: a map itself where nothing happens to it first, else the buffer, filled.
Operand operand(const SeparableProduct& job, const Block& block, float* buffer, int64_t step) {
  if (job.factor == nullptr)
    for (const SeparableSource& source : job.sources)
      if (source.taps == nullptr && source.down == 0 && source.right == 0 && source.height == job.height &&
          source.width == job.width && block.from >= source.first && block.to <= source.first + source.channels)
        return {source.x + block.first_row * source.channels + block.from - source.first, source.channels};
  fill(job, block, buffer, step);
  return {buffer, step};
}

constexpr int64_t kHeldWithoutHelp = 1 << 16;  // floats of the matrix that the L2 cache holds beside the rest

// What the next columns will read of the matrix: brought near a few lines with every few rows, as at once it would have
// to come faster than memory is.
struct Ahead {
  const float *from, *end;
  int64_t lines;  // with every kRows rows

  BTI_FAST_INLINE void step() {
    for (int64_t i = 0; i < lines && from < end; ++i, from += kLine) __builtin_prefetch(from, 0, 2);
  }
};

// V vectors of columns from `column` on of R rows of a block, from `at` on: a [R, depth] b; a vector of b is
// kPackedColumns floats from the next. Full: the columns fill the vectors.
template <int R, int V, bool Full>
BTI_FAST_INLINE void multiply(const SeparableProduct& job, const Ends& ends, const float* a, int64_t a_step,
                              const float* const (&b)[kVectors], int64_t depth, int64_t at, int64_t column,
                              int columns) {
  const auto load_vector = [&](const float* p, int v) __attribute__((always_inline)) {
    return Full ? load_dense(p + v * kLanes) : load_first(p + v * kLanes, columns - v * kLanes);
  };
  const auto store_vector = [&](VecF y, float* p, int v) __attribute__((always_inline)) {
    Full ? store_dense(y, p + v * kLanes) : store_first(y, p + v * kLanes, columns - v * kLanes);
  };
  float* const out = job.out + column;
  const int64_t* place = ends.place + at;
  VecF acc[R][V];
  const auto each = [&](auto f) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) f(r, v);
  };
  const float* row[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) row[r] = a + r * a_step;
  if (ends.add) {
    each([&](int r, int v) __attribute__((always_inline)) { acc[r][v] = load_vector(out + place[r], v); });
  } else if (job.bias == nullptr) {
    each([&](int r, int v) __attribute__((always_inline)) { acc[r][v] = VecF{}; });
  } else {
    each([&](int r, int v) __attribute__((always_inline)) {
      acc[r][v] = load_vector(ends.bias[at + r] + column, v);
    });
  }
#pragma GCC unroll 2
  for (int64_t l = 0; l < depth; ++l) {
    VecF bv[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) bv[v] = load_dense(b[v] + l * kPackedColumns);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const VecF x = splat<VecF>(row[r][l]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += x * bv[v];
    }
  }
  if (!ends.changes) {
    each([&](int r, int v) __attribute__((always_inline)) { store_vector(acc[r][v], out + place[r], v); });
    return;
  }
  const float *skip = job.skip, *lower = job.lower, *upper = job.upper;
  const bool with_silu = job.silu;
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const VecF least = lower != nullptr ? load_vector(lower + column, v) : VecF{};
    const VecF most = upper != nullptr ? load_vector(upper + column, v) : VecF{};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      VecF y = acc[r][v];
      if (skip != nullptr) y += load_vector(skip + place[r] + column, v);
      if (with_silu) y = silu(y);
      if (lower != nullptr) y = y < least ? least : y;  // a NaN stays
      if (upper != nullptr) y = y > most ? most : y;
      store_vector(y, out + place[r], v);
    }
  }
}

// Where R rows from `at` on will lie: rows are stored faster than lines come that they overwrite.
template <int R>
BTI_FAST_INLINE void bring_near(const SeparableProduct& job, const Ends& ends, int64_t at, int64_t column) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) __builtin_prefetch(job.out + ends.place[at + r] + column, 1, 3);
  if (!ends.changes || job.skip == nullptr) return;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) __builtin_prefetch(job.skip + ends.place[at + r] + column, 0, 3);
}

template <int V, bool Full>
__attribute__((noinline)) void multiply_rows(const SeparableProduct& job, const Ends& ends, const Operand a,
                                             const float* const (&b)[kVectors], Ahead ahead, int64_t depth,
                                             int64_t column, int columns, int64_t rows) {
  constexpr int most = V == 1 ? kRowsOfOne : kRows;
  int64_t r = 0;
  const auto next = [&](auto count) __attribute__((always_inline)) {
    constexpr int R = decltype(count)::value;
    ahead.step();
    if (r + 2 * R <= rows) bring_near<R>(job, ends, r + R, column);
    multiply<R, V, Full>(job, ends, a.data + r * a.step, a.step, b, depth, r, column, columns);
    r += R;
  };
  while (rows - r >= most) next(std::integral_constant<int, most>{});
  if (most > 6 && rows - r >= 6) next(std::integral_constant<int, 6>{});
  if (rows - r >= 4) next(std::integral_constant<int, 4>{});
  if (rows - r >= 2) next(std::integral_constant<int, 2>{});
  if (rows - r >= 1) next(std::integral_constant<int, 1>{});
}

void set_ends(const SeparableProduct& job, const Block& block, Ends* ends) {
  ends->add = block.from > 0;
  ends->changes = block.to == job.depth &&
                  (job.skip != nullptr || job.silu || job.lower != nullptr || job.upper != nullptr);
  int64_t x = block.first_row % job.width, y = block.first_row / job.width % job.height;
  int64_t sample = block.first_row / job.width / job.height;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t line = sample * job.out_height + job.stride * y + job.top;
    ends->place[r] = (line * job.out_width + job.stride * x + job.left) * job.columns;
    ends->bias[r] = job.bias == nullptr ? nullptr : job.bias + sample * job.bias_step;
    if (++x < job.width) continue;
    x = 0;
    if (++y < job.height) continue;
    y = 0;
    ++sample;
  }
}

// Brings rows from .. to of a block near that will be convolved next: of convolved maps what the lowest taps read, as
// the rest was read for the positions above.
void prefetch(const SeparableProduct& job, const Block& block, int64_t from, int64_t to) {
  for (const SeparableSource& source : job.sources) {
    const int64_t begin = block.from > source.first ? block.from : source.first;
    const int64_t stop = block.to < source.first + source.channels ? block.to : source.first + source.channels;
    const int64_t down = source.taps == nullptr ? source.down : source.dilation;
    for (int64_t row = block.first_row + from; row < block.first_row + to; ++row) {
      const int64_t position = row + down * source.width;
      if (position < 0 || position >= job.batch * source.height * source.width) continue;
      const float* x = source.x + position * source.channels - source.first;
      for (int64_t c = begin; c < stop; c += kLine) __builtin_prefetch(x + c, 0, 2);
    }
  }
}

void multiply_block(const SeparableProduct& job, const Block& block, const Operand a, const Block& following,
                    int64_t first_column, int64_t last_column) {
  Ends ends;
  set_ends(job, block, &ends);
  const int64_t all = last_column - first_column, depth = block.to - block.from;
  for (int64_t column = first_column; column < last_column; column += kVectors * kLanes) {
    const int64_t left = last_column - column, done = column - first_column;
    const int64_t next = left < kVectors * kLanes ? all : done + kVectors * kLanes;
    prefetch(job, following, following.rows * done / all, following.rows * next / all);
    const float* b[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t vector = column / kLanes + (v * kLanes < left ? v : 0);
      b[v] = job.matrix + (vector / kPanelVectors * job.depth + block.from) * kPackedColumns +
             vector % kPanelVectors * kLanes;
    }
    const int columns = left < kVectors * kLanes ? static_cast<int>(left) : kVectors * kLanes;
    Ahead ahead{};
    if (all * depth > kHeldWithoutHelp && left > kVectors * kLanes) {
      const int64_t panel = (column / kLanes + kVectors) / kPanelVectors;
      ahead.from = job.matrix + (panel * job.depth + block.from) * kPackedColumns;
      ahead.end = ahead.from + depth * kPackedColumns;
      ahead.lines = (depth * kRows + block.rows - 1) / block.rows;  // a row of a panel is one line
    }
    const auto multiply_columns = columns == 2 * kLanes ? multiply_rows<2, true>
                                  : columns > kLanes    ? multiply_rows<2, false>
                                  : columns == kLanes   ? multiply_rows<1, true>
                                                        : multiply_rows<1, false>;
    multiply_columns(job, ends, a, b, ahead, depth, column, columns, block.rows);
  }
}

// Positions and columns of one task.
struct Task {
  int64_t first_row, last_row, first_column, last_column;
  int64_t rows;  // at a time
};

Task task_at(const SeparableProduct& job, int64_t number) {
  const int64_t all_rows = job.batch * job.height * job.width;
  const int64_t first_row = number / job.column_tasks * job.rows_per_task;
  const int64_t first_column = number % job.column_tasks * job.columns_per_task;
  const int64_t count = all_rows - first_row < job.rows_per_task ? all_rows - first_row : job.rows_per_task;
  const int64_t columns = job.columns - first_column < job.columns_per_task ? job.columns - first_column
                                                                            : job.columns_per_task;
  const int64_t blocks = (count + kRowsAtATime - 1) / kRowsAtATime;
  return {first_row, first_row + count, first_column, first_column + columns,
          ((count + blocks - 1) / blocks + kRows - 1) / kRows * kRows};
}

Block block_at(const SeparableProduct& job, const Task& task, int64_t row, int64_t from) {
  return {row, task.last_row - row < task.rows ? task.last_row - row : task.rows, from,
          job.depth - from < job.depth_block ? job.depth : from + job.depth_block};
}

}  // namespace

void separable_product(const SeparableProduct& job, int64_t begin, int64_t end) {
  const int64_t step = job.depth_block + kLanes;
  Buffer<float> buffer(kRowsAtATime * step);
  for (int64_t number = begin; number < end; ++number) {
    const Task task = task_at(job, number);
    for (int64_t from = 0; from < job.depth; from += job.depth_block) {
      for (int64_t row = task.first_row; row < task.last_row; row += task.rows) {
        const Block block = block_at(job, task, row, from);
        Block following{};
        if (row + task.rows < task.last_row) {
          following = block_at(job, task, row + task.rows, from);
        } else if (from + job.depth_block < job.depth) {
          following = block_at(job, task, task.first_row, from + job.depth_block);
        } else if (number + 1 < end) {
          const Task next = task_at(job, number + 1);
          following = block_at(job, next, next.first_row, 0);
        }
        multiply_block(job, block, operand(job, block, buffer.data(), step), following, task.first_column,
                       task.last_column);
      }
    }
  }
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
