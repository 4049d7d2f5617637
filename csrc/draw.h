// A whole draw of context coalitions on the host: the elements of contexts.h, many at a time. Where U is a Latin hypercube
// a player's ranks come from one sort (m log m) rather than from m counts (m^2); where U is independent, words are
// compared with u in blocks, and only those that are not decided yet go on to the next slices.
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <vector>

#include "contexts.h"

namespace flmoe {

constexpr int kLanes = 64;  // counters that are hashed together

inline void draw_sizes(const Draw& draw, double* sizes) {
  for (std::int64_t first = 0; first < draw.units; first += kLanes) {
    std::uint32_t counters[4][kLanes];
    for (int l = 0; l < kLanes; ++l) {
      counters[0][l] = static_cast<std::uint32_t>(first + l);
      counters[1][l] = 0;
      counters[2][l] = kSizeStream;
      counters[3][l] = draw.replicate;
    }
    philox4x32_10(counters, static_cast<std::uint32_t>(draw.seed), static_cast<std::uint32_t>(draw.seed >> 32));
    const std::int64_t count = std::min<std::int64_t>(kLanes, draw.units - first);
    for (std::int64_t l = 0; l < count; ++l) {
      sizes[first + l] = size_of(draw, first + l, unit_double(counters[2][l], counters[3][l]));
    }
  }
}

// Words on their way through the slices, as arrays so that a step is the same instruction for many of them.
struct SlicedWords {
  static constexpr int kMost = 8 * kLanes;  // few enough for the first cache
  std::uint32_t unit[kMost], word[kMost];
  std::uint64_t threshold[kMost];
  std::uint64_t members[kMost], undecided[kMost];
  std::uint64_t* out[kMost];
};

// Two more slices of the first `count` words; the lanes behind them, up to a multiple of kLanes, are touched too.
inline void compare_pair(const Draw& draw, SlicedWords& words, int count, int pair) {
  const auto key0 = static_cast<std::uint32_t>(draw.seed), key1 = static_cast<std::uint32_t>(draw.seed >> 32);
  for (int first = 0; first < count; first += kLanes) {
    std::uint32_t bits[4][kLanes];
    for (int l = 0; l < kLanes; ++l) {
      bits[0][l] = words.unit[first + l];
      bits[1][l] = words.word[first + l];
      bits[2][l] = kSliceStream + static_cast<std::uint32_t>(pair);
      bits[3][l] = draw.replicate;
    }
    philox4x32_10(bits, key0, key1);
    for (int l = 0; l < kLanes; ++l) {
      Compared word{words.members[first + l], words.undecided[first + l]};
      const std::uint64_t threshold = words.threshold[first + l];
      compare(word, std::uint64_t{bits[0][l]} << 32 | bits[1][l], digit(threshold, 2 * pair));
      // The 53rd digit has no successor: what follows must not count.
      if (2 * pair + 1 < kDigits) {
        compare(word, std::uint64_t{bits[2][l]} << 32 | bits[3][l], digit(threshold, 2 * pair + 1));
      }
      words.members[first + l] = word.members;
      words.undecided[first + l] = word.undecided;
    }
  }
}

// Stores every word's members so far and keeps the words with undecided players, in order. Returns how many those are.
inline int keep_undecided(SlicedWords& words, int count) {
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    *words.out[i] = words.members[i];
    const bool open = words.undecided[i] != 0;
    words.unit[kept] = words.unit[i];
    words.word[kept] = words.word[i];
    words.threshold[kept] = words.threshold[i];
    words.members[kept] = words.members[i];
    words.undecided[kept] = words.undecided[i];
    words.out[kept] = words.out[i];
    kept += open;
  }
  return kept;
}

// The coalitions of a mode with independent U, without complements.
inline void draw_sliced(const Draw& draw, std::int64_t players, const double* sizes, std::int64_t stride,
                        std::uint64_t* words) {
  constexpr int kFirst = 4;  // pairs that nearly every word needs: after eight slices 78 % are decided
  const std::int64_t width = words_for(players);
  SlicedWords open{};
  std::int64_t unit = 0, w = 0;
  std::uint64_t limit = 0;
  while (unit < draw.units) {
    int count = 0;
    for (; count < SlicedWords::kMost && unit < draw.units; ++count) {
      if (w == 0) limit = threshold(sizes[unit]);
      const Compared start = compare_from(limit, players, w);
      open.unit[count] = static_cast<std::uint32_t>(unit);
      open.word[count] = static_cast<std::uint32_t>(w);
      open.threshold[count] = limit;
      open.members[count] = start.members;
      open.undecided[count] = start.undecided;
      open.out[count] = words + unit * stride + w;
      if (++w == width) {
        w = 0;
        ++unit;
      }
    }
    for (int pair = 0; pair < kFirst; ++pair) compare_pair(draw, open, count, pair);
    count = keep_undecided(open, count);
    for (int pair = kFirst; pair < kSlicePairs && count != 0; ++pair) {
      compare_pair(draw, open, count, pair);
      count = keep_undecided(open, count);
    }
  }
}

// The coalitions of a mode with a Latin hypercube, without complements.
inline void draw_hypercube(const Draw& draw, std::int64_t players, const double* sizes, std::int64_t stride,
                           std::uint64_t* words) {
  const auto units = static_cast<std::size_t>(draw.units);
  const auto count = static_cast<std::size_t>(players);
  const bool exact = draw.mode == Mode::size;
  std::vector<double> uniforms(exact ? units * count : 0);  // [unit][player]
  std::vector<std::uint64_t> keys(units);
  std::vector<double> offsets(units);
  for (std::int64_t p = 0; p < players; ++p) {
    for (std::int64_t k = 0; k < draw.units; ++k) {
      const Philox4 bits = element(draw, k, p, kMemberStream);
      keys[static_cast<std::size_t>(k)] = rank_key(bits, k);
      offsets[static_cast<std::size_t>(k)] = jitter(bits);
    }
    std::sort(keys.begin(), keys.end());
    for (std::int64_t r = 0; r < draw.units; ++r) {
      const auto k = static_cast<std::uint32_t>(keys[static_cast<std::size_t>(r)]);
      const double uniform = in_stratum(r, offsets[k], draw.units);
      if (exact) {
        uniforms[k * count + static_cast<std::size_t>(p)] = uniform;
      } else if (uniform < sizes[k]) {
        toggle_player(words + k * stride, p);
      }
    }
  }
  std::vector<std::int64_t> order(exact ? count : 0);
  for (std::int64_t k = 0; exact && k < draw.units; ++k) {
    const double* row = uniforms.data() + static_cast<std::size_t>(k) * count;
    std::iota(order.begin(), order.end(), std::int64_t{0});
    const std::int64_t members = member_count(sizes[k], players);
    std::nth_element(order.begin(), order.begin() + members, order.end(),
                     [row](std::int64_t p, std::int64_t q) { return precedes(row[p], p, row[q], q); });
    for (std::int64_t i = 0; i < members; ++i) toggle_player(words + k * stride, order[static_cast<std::size_t>(i)]);
  }
}

// Fill words[units * rows_per_unit][words_for(players)] and sizes[units].
inline void draw_contexts(const Draw& draw, std::int64_t players, std::uint64_t* words, double* sizes) {
  const std::int64_t width = words_for(players);
  const std::int64_t stride = width * rows_per_unit(draw);
  draw_sizes(draw, sizes);
  if (players == 0) return;
  if (is_hypercube(draw.mode)) {
    std::fill(words, words + draw.units * stride, std::uint64_t{0});
    draw_hypercube(draw, players, sizes, stride, words);
  } else {
    draw_sliced(draw, players, sizes, stride, words);
  }
  if (draw.antithetic) {
    for (std::int64_t k = 0; k < draw.units; ++k) complement(words + k * stride, words + k * stride + width, players);
  }
}

}  // namespace flmoe
