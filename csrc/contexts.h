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
//
// Independent U (modes stratified and iid) are drawn by slices: slice s of 64 players is one random word, whose bit b is
// the s-th binary digit of player 64 w + b's U, and p in the counter is w. A comparison with u then goes digit by digit,
// 64 players at a time, and is over for all of them after eight slices or so of the 53.
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
constexpr std::uint32_t kSliceStream = 2;   // + i: slices 2 i (words 0, 1) and 2 i + 1 (words 2, 3), high half first

constexpr int kDigits = 53;  // of a U drawn by slices, a multiple of 2^-53 like every jitter
constexpr int kSlicePairs = (kDigits + 1) / 2;

inline bool is_hypercube(Mode mode) { return mode == Mode::lhs || mode == Mode::size; }

inline Philox4 element(const Draw& draw, std::int64_t unit, std::int64_t player, std::uint32_t stream) {
  const Philox4 counter{
      {static_cast<std::uint32_t>(unit), static_cast<std::uint32_t>(player), stream, draw.replicate}};
  return philox4x32_10(counter, static_cast<std::uint32_t>(draw.seed), static_cast<std::uint32_t>(draw.seed >> 32));
}

inline double jitter(const Philox4& bits) { return unit_double(bits.x[2], bits.x[3]); }

// Units sort by key, equal keys by unit index: one number that says both, and whose order is total.
inline std::uint64_t rank_key(const Philox4& bits, std::int64_t unit) {
  return (std::uint64_t{bits.x[0]} << 32) | static_cast<std::uint32_t>(unit);
}

// The point `position` + `offset` of m cells, scaled to [0, 1].
inline double in_stratum(std::int64_t position, double offset, std::int64_t cells) {
  return (static_cast<double>(position) + offset) / static_cast<double>(cells);
}

// u_k, given its jitter.
inline double size_of(const Draw& draw, std::int64_t unit, double offset) {
  const double size = draw.mode == Mode::iid ? offset : in_stratum(unit, offset, draw.units);
  return draw.antithetic ? 0.5 * size : size;
}

// u_k.
inline double unit_size(const Draw& draw, std::int64_t unit) {
  return size_of(draw, unit, jitter(element(draw, unit, 0, kSizeStream)));
}

// How many units precede `unit` in the player's order. Recomputes the m keys: what a lone element needs; a bulk draw
// sorts them instead (draw.h).
inline std::int64_t lhs_rank(const Draw& draw, std::int64_t unit, std::int64_t player) {
  const std::uint64_t own = rank_key(element(draw, unit, player, kMemberStream), unit);
  std::int64_t rank = 0;
  for (std::int64_t k = 0; k < draw.units; ++k) rank += rank_key(element(draw, k, player, kMemberStream), k) < own;
  return rank;
}

inline std::uint64_t slice(const Philox4& bits, bool odd) {
  return odd ? std::uint64_t{bits.x[2]} << 32 | bits.x[3] : std::uint64_t{bits.x[0]} << 32 | bits.x[1];
}

// How 64 players stand in the comparison of their U with u.
struct Compared {
  std::uint64_t members;    // U < u for sure
  std::uint64_t undecided;  // all digits so far are those of u
};

// One more digit: `digits` of the players, `of_u` all ones or zero. Who is undecided at the end has U = u, and is out.
inline void compare(Compared& word, std::uint64_t digits, std::uint64_t of_u) {
  word.members |= word.undecided & ~digits & of_u;
  word.undecided &= ~(digits ^ of_u);
}

// ceil(u 2^53): for a U that is a multiple of 2^-53, U < u says U 2^53 < this, exactly.
inline std::uint64_t threshold(double u) {
  const double scaled = u * 9007199254740992.0;
  const auto whole = static_cast<std::uint64_t>(scaled);
  return whole + (static_cast<double>(whole) < scaled);
}

// All ones if digit `s` (0 is the most significant of 53) of a threshold below 2^53 is one, else zero.
inline std::uint64_t digit(std::uint64_t threshold, int s) { return -((threshold >> (kDigits - 1 - s)) & 1); }

// Players 64 w .. 64 w + 63 before the first digit. At u = 1, to which (m - 1 + jitter) / m can round, all are members.
inline Compared compare_from(std::uint64_t threshold, std::int64_t players, std::int64_t w) {
  const std::uint64_t everybody = valid_bits(players, w);
  return threshold >> kDigits ? Compared{everybody, 0} : Compared{0, everybody};
}

// U[p, k] from its 53 slices: the definition, which a comparison by words never computes.
inline double sliced_uniform(const Draw& draw, std::int64_t unit, std::int64_t player) {
  std::uint64_t digits = 0;
  for (int s = 0; s < kDigits; ++s) {
    const Philox4 bits = element(draw, unit, player >> 6, kSliceStream + static_cast<std::uint32_t>(s / 2));
    digits = digits << 1 | ((slice(bits, s % 2 != 0) >> (player & 63)) & 1);
  }
  return static_cast<double>(digits) * (1.0 / 9007199254740992.0);
}

// U[p, k].
inline double member_uniform(const Draw& draw, std::int64_t unit, std::int64_t player) {
  if (!is_hypercube(draw.mode)) return sliced_uniform(draw, unit, player);
  const double offset = jitter(element(draw, unit, player, kMemberStream));
  return in_stratum(lhs_rank(draw, unit, player), offset, draw.units);
}

// Members of a coalition of n players in mode `size`: all of them also at u = 1.
inline std::int64_t member_count(double u, std::int64_t players) {
  const auto members = static_cast<std::int64_t>(u * static_cast<double>(players + 1));
  return members < players ? members : players;
}

// Whether player p with number a comes before player q with number b: equal numbers go by player.
inline bool precedes(double a, std::int64_t p, double b, std::int64_t q) { return a < b || (a == b && p < q); }

// Whether `player` is in the unit's coalition, by itself; a bulk draw sorts or compares words instead (draw.h).
inline bool is_member(const Draw& draw, std::int64_t unit, std::int64_t player, std::int64_t players) {
  const double u = unit_size(draw, unit);
  const double own = member_uniform(draw, unit, player);
  if (draw.mode != Mode::size) return own < u;
  std::int64_t before = 0;
  for (std::int64_t q = 0; q < players; ++q) before += precedes(member_uniform(draw, unit, q), q, own, player);
  return before < member_count(u, players);
}

// Rows of a draw: T_0, complement of T_0, T_1, ... when antithetic, else T_0, T_1, ...
inline std::int64_t rows_per_unit(const Draw& draw) { return draw.antithetic ? 2 : 1; }

}  // namespace flmoe
