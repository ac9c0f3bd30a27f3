// 3x3 transposed convolution of stride 2: a result at an even row sums two rows of the map, at an odd row one, and so
// for columns. That makes four products of the map with itself, shifted, each for a quarter of the result.
#include <torch/csrc/stable/ops.h>

#include "cpu/operators.h"
#include "cpu/packed_matrix.h"

namespace bti_fast {

// matrices: packed, of the results at even rows and columns, at even rows and odd columns, at odd rows and even
// columns, at odd rows and columns; in each the taps of the position itself come first, then those of the one to the
// left, the one above, and the one above to the left, as far as it has them.
Tensor up_conv(const Tensor& x, const std::vector<Tensor>& matrices, const Tensor& bias, int64_t height,
               int64_t width) {
  STD_TORCH_CHECK(x.dim() == 4 && lies(x, {0, 2, 3, 1}), "x must be (B, C, H, W), dense and channels_last");
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) > 0 && lies(bias, {0}), "bias must be (K,), contiguous");
  STD_TORCH_CHECK(matrices.size() == 4, "matrices must be 4, got ", matrices.size());
  const int64_t batch = x.size(0), channels = x.size(1), columns = bias.size(0);
  STD_TORCH_CHECK(channels > 0, "x must have a channel");
  const auto check = [](const char* name, int64_t size, int64_t given) {
    STD_TORCH_CHECK(2 * given - 1 <= size && size <= 2 * given + 1, name, " must be ", 2 * given - 1, " to ",
                    2 * given + 1, ", got ", size);
  };
  check("height", height, x.size(2));
  check("width", width, x.size(3));
  const Tensor out = torch::stable::new_empty(x, {batch, height, width, columns});
  for (int64_t quarter = 0; quarter < 4; ++quarter) {
    const int64_t top = quarter / 2, left = quarter % 2;
    SeparableProduct job{};
    job.batch = batch, job.height = (height + 1 - top) / 2, job.width = (width + 1 - left) / 2;
    for (int64_t down = 0; down <= 1 - top; ++down)
      for (int64_t right = 0; right <= 1 - left; ++right)
        add_source(job, {floats(x, "x"), nullptr, channels, x.size(2), x.size(3), 1, -down, -right, 0});
    job.matrix = packed_matrix(matrices[static_cast<size_t>(quarter)], "matrices", columns, job.depth);
    job.bias = floats(bias, "bias");
    job.out = memory(out);
    job.stride = 2, job.top = top, job.left = left;
    job.out_height = height, job.out_width = width;
    job.columns = columns;
    run(job);
  }
  return torch::stable::transpose(torch::stable::transpose(out, 2, 3), 1, 2);
}

}  // namespace bti_fast
