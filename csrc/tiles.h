// The slots of sparse feed-forward blocks in the order in which their networks take them, and the tiles of a grouped
// product over them.
//
// Slot (e, r, j) is row r's j-th choice in expert e. Rows come in B consecutive blocks (one modality of one coalition), in
// each of which a network has its own room and takes slots in the order row, then choice. Sorted by group (expert and
// network), block, row and choice, the slots that find room are the rows of one product per group. A run is what one group
// takes from one block.
#pragma once

#include "hd.h"

namespace flmoe {

struct Slots {
  const std::int64_t* chosen;  // (E, R, k) network of each slot; negative for none
  const std::int64_t* blocks;  // (B + 1,) rows blocks[b] .. blocks[b + 1] - 1 are block b's
  const std::int64_t* room;    // (B,) most slots of a run, or null for no limit
  std::int64_t experts, rows, slots, networks, block_count;
};

FLMOE_HD std::int64_t group_count(const Slots& slots) { return slots.experts * slots.networks; }
FLMOE_HD std::int64_t run_count(const Slots& slots) { return group_count(slots) * slots.block_count; }
FLMOE_HD std::int64_t slot_count(const Slots& slots) { return slots.experts * slots.rows * slots.slots; }

FLMOE_HD std::int64_t run_limit(const Slots& slots, std::int64_t run, std::int64_t wanted) {
  if (slots.room == nullptr) return wanted;
  const std::int64_t room = slots.room[run % slots.block_count];
  return wanted < room ? wanted : room;
}

// First and last + 1 of the slots among which a run's are.
FLMOE_HD std::int64_t run_begin(const Slots& slots, std::int64_t run) {
  const std::int64_t expert = run / slots.block_count / slots.networks;
  return (expert * slots.rows + slots.blocks[run % slots.block_count]) * slots.slots;
}
FLMOE_HD std::int64_t run_end(const Slots& slots, std::int64_t run) {
  const std::int64_t expert = run / slots.block_count / slots.networks;
  return (expert * slots.rows + slots.blocks[run % slots.block_count + 1]) * slots.slots;
}

// How many slots one run takes.
FLMOE_HD std::int64_t run_length(const Slots& slots, std::int64_t run) {
  const std::int64_t network = run / slots.block_count % slots.networks;
  std::int64_t wanted = 0;
  for (std::int64_t s = run_begin(slots, run); s < run_end(slots, run); ++s) wanted += slots.chosen[s] == network;
  return run_limit(slots, run, wanted);
}

// Lists one run's slots from `first` on, and tells each of its slots its place there, or -1 where there was no room.
FLMOE_HD void place_run(const Slots& slots, std::int64_t run, std::int64_t first, std::int64_t last,
                        std::int64_t* sorted, std::int64_t* place) {
  const std::int64_t network = run / slots.block_count % slots.networks;
  for (std::int64_t s = run_begin(slots, run); s < run_end(slots, run); ++s) {
    if (slots.chosen[s] != network) continue;
    place[s] = first < last ? first : -1;
    if (first < last) sorted[first++] = s;
  }
}

// Rows of one tile of a grouped product: all of one group. Tiles behind the last have none.
struct Tile {
  std::int64_t group, first, rows;
};

FLMOE_HD std::int64_t tiles_for(std::int64_t rows, std::int64_t height) { return (rows + height - 1) / height; }

// Most tiles that `rows` rows of G groups can take, whatever the groups' shares.
FLMOE_HD std::int64_t most_tiles(std::int64_t rows, std::int64_t groups, std::int64_t height) {
  return rows / height + (groups < rows ? groups : rows);
}

// Tile t, given each group's first row and first tile, both (G + 1,), the last entries being the totals.
FLMOE_HD Tile locate_tile(const std::int64_t* first_row, const std::int64_t* first_tile, std::int64_t groups,
                          std::int64_t height, std::int64_t t) {
  if (t >= first_tile[groups]) return {-1, first_row[groups], 0};
  std::int64_t low = 0, high = groups;  // first_tile[low] <= t < first_tile[high]
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    if (first_tile[middle] <= t) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const std::int64_t first = first_row[low] + (t - first_tile[low]) * height;
  const std::int64_t left = first_row[low + 1] - first;
  return {low, first, left < height ? left : height};
}

// ---- all of it at once, on the host

// run_first (G B + 1,), sorted (room for every slot), place (E, R, k): one pass that counts and one that places.
inline void sort_slots(const Slots& slots, std::int64_t* run_first, std::int64_t* sorted, std::int64_t* place) {
  const std::int64_t runs = run_count(slots), width = slots.block_count;
  for (std::int64_t run = 0; run <= runs; ++run) run_first[run] = 0;
  const auto each = [&](auto&& function) {
    for (std::int64_t e = 0; e < slots.experts; ++e) {
      for (std::int64_t b = 0; b < width; ++b) {
        const std::int64_t begin = (e * slots.rows + slots.blocks[b]) * slots.slots;
        const std::int64_t end = (e * slots.rows + slots.blocks[b + 1]) * slots.slots;
        for (std::int64_t s = begin; s < end; ++s) {
          if (slots.chosen[s] >= 0) function(s, (e * slots.networks + slots.chosen[s]) * width + b);
        }
      }
    }
  };
  for (std::int64_t s = 0; s < slot_count(slots); ++s) place[s] = -1;
  each([&](std::int64_t s, std::int64_t run) {
    // The place in the run, for now.
    if (run_limit(slots, run, run_first[run] + 1) > run_first[run]) place[s] = run_first[run]++;
  });
  std::int64_t total = 0;
  for (std::int64_t run = 0; run <= runs; ++run) {
    const std::int64_t length = run_first[run];
    run_first[run] = total;
    total += length;
  }
  each([&](std::int64_t s, std::int64_t run) {
    if (place[s] < 0) return;
    place[s] += run_first[run];
    sorted[place[s]] = s;
  });
}

// first_row and first_tile (G + 1,) from the runs' first places (G B + 1,).
inline void number_tiles(const std::int64_t* run_first, std::int64_t groups, std::int64_t block_count,
                         std::int64_t height, std::int64_t* first_row, std::int64_t* first_tile) {
  std::int64_t tiles = 0;
  for (std::int64_t g = 0; g <= groups; ++g) {
    first_row[g] = run_first[g * block_count];
    first_tile[g] = tiles;
    if (g < groups) tiles += tiles_for(run_first[(g + 1) * block_count] - first_row[g], height);
  }
}

}  // namespace flmoe
