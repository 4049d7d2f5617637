// A whole draw of context coalitions on the host: the elements of contexts.h, with each player's ranks from one sort
// (m log m) rather than from m counts (m^2).
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <vector>

#include "contexts.h"

namespace flmoe {

// Fill words[units * rows_per_unit][words_for(players)] and sizes[units].
inline void draw_contexts(const Draw& draw, std::int64_t players, std::uint64_t* words, double* sizes) {
  const std::int64_t width = words_for(players);
  const std::int64_t stride = width * rows_per_unit(draw);
  const auto units = static_cast<std::size_t>(draw.units);
  const auto count = static_cast<std::size_t>(players);
  std::fill(words, words + draw.units * stride, std::uint64_t{0});
  for (std::int64_t k = 0; k < draw.units; ++k) sizes[k] = unit_size(draw, k);

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
    if (is_hypercube(draw.mode)) std::sort(keys.begin(), keys.end());
    for (std::int64_t r = 0; r < draw.units; ++r) {
      const auto k = static_cast<std::uint32_t>(keys[static_cast<std::size_t>(r)]);
      const double offset = offsets[k];
      const double uniform = is_hypercube(draw.mode) ? in_stratum(r, offset, draw.units) : offset;
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
  if (draw.antithetic) {
    for (std::int64_t k = 0; k < draw.units; ++k) complement(words + k * stride, words + k * stride + width, players);
  }
}

}  // namespace flmoe
