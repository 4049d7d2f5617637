// The law of the context coalitions of a corner grid, one element at a time.
//
// A draw has m units. Unit k has an inclusion probability u_k and one coalition T_k; an antithetic draw adds the
// complement of every T_k, whose inclusion probability is 1 - u_k. A mode is made of three choices, and each is one
// function below:
//   unit_size       how u_k is spread over [0, 1], or over [0, 1/2] in an antithetic draw, where the complements cover
//                   the other half;
//   member_uniform  how U[p, k] is spread over [0, 1];
//   is_member       who is in T_k: the players with U[p, k] < u_k, or in mode `size` the floor(u_k (n + 1)) players with
//                   the smallest U[p, k]. With u uniform both give every size from 0 to n the same probability.
//
// Every random number is philox4x32_10(key = seed, counter = (k, p, stream, replicate)). Only +, *, / and comparisons of
// doubles follow, so that any implementation of IEEE arithmetic without contraction gives the same bits.
#pragma once

#include "coalition.h"
#include "philox.h"

namespace flmoe {

enum class Mode : int {
  lhs = 0,         // u stratified; per player, U is a Latin hypercube over the units
  stratified = 1,  // u stratified; U independent
  iid = 2,         // u and U independent
  size = 3,        // u and U as in lhs; exact sizes
};
constexpr int kModes = 4;

struct Draw {
  std::uint64_t seed;
  std::uint32_t replicate;  // another independent draw under the same seed
  Mode mode;
  bool antithetic;
  std::int64_t units;  // m
};

constexpr std::uint32_t kMemberStream = 0;  // word 0: rank key; words 2, 3: jitter
constexpr std::uint32_t kSizeStream = 1;    // words 2, 3: jitter

FLMOE_HD bool is_hypercube(Mode mode) { return mode == Mode::lhs || mode == Mode::size; }

FLMOE_HD Philox4 element(const Draw& draw, std::int64_t unit, std::int64_t player, std::uint32_t stream) {
  const Philox4 counter{
      {static_cast<std::uint32_t>(unit), static_cast<std::uint32_t>(player), stream, draw.replicate}};
  return philox4x32_10(counter, static_cast<std::uint32_t>(draw.seed), static_cast<std::uint32_t>(draw.seed >> 32));
}

FLMOE_HD double jitter(const Philox4& bits) { return unit_double(bits.x[2], bits.x[3]); }

// Units sort by key, equal keys by unit index: one number that says both, and whose order is total.
FLMOE_HD std::uint64_t rank_key(const Philox4& bits, std::int64_t unit) {
  return (std::uint64_t{bits.x[0]} << 32) | static_cast<std::uint32_t>(unit);
}

// The point `position` + `offset` of m cells, scaled to [0, 1].
FLMOE_HD double in_stratum(std::int64_t position, double offset, std::int64_t cells) {
  return (static_cast<double>(position) + offset) / static_cast<double>(cells);
}

// u_k.
FLMOE_HD double unit_size(const Draw& draw, std::int64_t unit) {
  const double offset = jitter(element(draw, unit, 0, kSizeStream));
  const double size = draw.mode == Mode::iid ? offset : in_stratum(unit, offset, draw.units);
  return draw.antithetic ? 0.5 * size : size;
}

// How many units precede `unit` in the player's order. Recomputes the m keys: what a lone element needs; a bulk draw
// sorts them instead (draw.h).
FLMOE_HD std::int64_t lhs_rank(const Draw& draw, std::int64_t unit, std::int64_t player) {
  const std::uint64_t own = rank_key(element(draw, unit, player, kMemberStream), unit);
  std::int64_t rank = 0;
  for (std::int64_t k = 0; k < draw.units; ++k) rank += rank_key(element(draw, k, player, kMemberStream), k) < own;
  return rank;
}

// U[p, k].
FLMOE_HD double member_uniform(const Draw& draw, std::int64_t unit, std::int64_t player) {
  const double offset = jitter(element(draw, unit, player, kMemberStream));
  if (!is_hypercube(draw.mode)) return offset;
  return in_stratum(lhs_rank(draw, unit, player), offset, draw.units);
}

// Members of a coalition of n players in mode `size`; u = 1 cannot occur, as a jitter is below 1.
FLMOE_HD std::int64_t member_count(double u, std::int64_t players) {
  return static_cast<std::int64_t>(u * static_cast<double>(players + 1));
}

// Whether player p with number a comes before player q with number b: equal numbers go by player.
FLMOE_HD bool precedes(double a, std::int64_t p, double b, std::int64_t q) { return a < b || (a == b && p < q); }

// Whether `player` is in the unit's coalition, by itself; a bulk draw sorts instead (draw.h).
FLMOE_HD bool is_member(const Draw& draw, std::int64_t unit, std::int64_t player, std::int64_t players) {
  const double u = unit_size(draw, unit);
  const double own = member_uniform(draw, unit, player);
  if (draw.mode != Mode::size) return own < u;
  std::int64_t before = 0;
  for (std::int64_t q = 0; q < players; ++q) before += precedes(member_uniform(draw, unit, q), q, own, player);
  return before < member_count(u, players);
}

// Rows of a draw: T_0, complement of T_0, T_1, ... when antithetic, else T_0, T_1, ...
FLMOE_HD std::int64_t rows_per_unit(const Draw& draw) { return draw.antithetic ? 2 : 1; }

}  // namespace flmoe
