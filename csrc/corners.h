// The corner grid: which coalitions a set of pairs needs in one context, and where each pair finds its four corners.
//
// With P pairs on Q players, corner 0 is the context itself, corners 1 .. Q toggle one player each, in ascending order,
// and the last P toggle a pair each.
#pragma once

#include <algorithm>

#include "coalition.h"

namespace flmoe {

struct CornerGrid {
  const std::int64_t* pairs;    // (P, 2) players
  const std::int64_t* players;  // (Q,) ascending
  const std::int64_t* single;   // (P, 2) corners in which only the first (second) player of the pair is toggled
  std::int64_t pair_count;      // P
  std::int64_t player_count;    // Q
};

FLMOE_HD std::int64_t corner_count(const CornerGrid& grid) { return 1 + grid.player_count + grid.pair_count; }

// Pair p of rows x columns, a row's pairs one after the other.
FLMOE_HD void product_pair(const std::int64_t* rows, const std::int64_t* columns, std::int64_t column_count,
                           std::int64_t p, std::int64_t* pair) {
  pair[0] = rows[p / column_count];
  pair[1] = columns[p % column_count];
}

// What a corner does to word `w` of its context: a mask to XOR in.
FLMOE_HD std::uint64_t corner_mask(const CornerGrid& grid, std::int64_t corner, std::int64_t w) {
  if (corner == 0) return 0;
  if (corner <= grid.player_count) return toggle_mask(grid.players[corner - 1], w);
  const std::int64_t* pair = grid.pairs + 2 * (corner - 1 - grid.player_count);
  return toggle_mask(pair[0], w) ^ toggle_mask(pair[1], w);
}

// Numbers of a pair's corners in one context.
struct Corners {
  std::int64_t both, first, second, neither;  // by who of the pair is present in them
};

// The corner in which exactly those are toggled whose presence differs from the context's.
FLMOE_HD std::int64_t corner_where(const CornerGrid& grid, std::int64_t pair, bool toggle_first, bool toggle_second) {
  if (toggle_first && toggle_second) return 1 + grid.player_count + pair;
  if (toggle_first) return grid.single[2 * pair];
  return toggle_second ? grid.single[2 * pair + 1] : 0;
}

FLMOE_HD Corners corners_of(const CornerGrid& grid, std::int64_t pair, const std::uint64_t* context) {
  const bool has_first = test_player(context, grid.pairs[2 * pair]);
  const bool has_second = test_player(context, grid.pairs[2 * pair + 1]);
  return {corner_where(grid, pair, !has_first, !has_second), corner_where(grid, pair, !has_first, has_second),
          corner_where(grid, pair, has_first, !has_second), corner_where(grid, pair, has_first, has_second)};
}

// The players of `pairs` into `players` (room for 2 P) and the pairs' single corners into `single` (P, 2). Returns Q.
inline std::int64_t number_corners(const std::int64_t* pairs, std::int64_t pair_count, std::int64_t* players,
                                   std::int64_t* single) {
  std::copy(pairs, pairs + 2 * pair_count, players);
  std::sort(players, players + 2 * pair_count);
  const std::int64_t* end = std::unique(players, players + 2 * pair_count);
  for (std::int64_t i = 0; i < 2 * pair_count; ++i) {
    single[i] = 1 + (std::lower_bound(static_cast<const std::int64_t*>(players), end, pairs[i]) - players);
  }
  return end - players;
}

}  // namespace flmoe
