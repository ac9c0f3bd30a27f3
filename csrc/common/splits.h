// How many splits of N tokens make a GPU's work end soonest.
#pragma once

#include <cstdint>

namespace bti_fast {

struct Splits {
  int64_t count, tokens;  // tokens of each, a multiple of the tile
};

// `groups` independent problems of n tokens in tiles of `tile`, `slots` blocks of threads at a time; a block's start and
// end cost as much as `overhead` tiles. Depends on its arguments alone.
inline Splits choose_splits(int64_t groups, int64_t n, int64_t tile, int64_t slots, int64_t overhead, int64_t most) {
  const int64_t tiles = n > 0 ? (n + tile - 1) / tile : 1;
  Splits best{1, tiles * tile};
  int64_t least = -1;
  for (int64_t wanted = 1; wanted <= tiles && wanted <= most; ++wanted) {
    const int64_t per_split = (tiles + wanted - 1) / wanted, count = (tiles + per_split - 1) / per_split;
    const int64_t cost = (groups * count + slots - 1) / slots * (per_split + overhead);
    if (least < 0 || cost < least) {
      least = cost;
      best = {count, per_split * tile};
    }
  }
  return best;
}

}  // namespace bti_fast
