// choose_splits for tests/csrc/test_splits.py.
#include "common/splits.h"

extern "C" void choose_splits(int64_t groups, int64_t n, int64_t tile, int64_t slots, int64_t overhead, int64_t most,
                              int64_t* count, int64_t* tokens) {
  const bti_fast::Splits splits = bti_fast::choose_splits(groups, n, tile, slots, overhead, most);
  *count = splits.count;
  *tokens = splits.tokens;
}
