// A coalition of n players as W = ceil(n / 64) words: player p is bit p & 63 of word p >> 6, and the bits of the last
// word beyond n are zero. That makes equality and hashing plain word operations; every function here keeps the
// spare bits zero when its inputs do.
#pragma once

#include <cstdint>
#include <cstring>

namespace flmoe {

inline std::int64_t words_for(std::int64_t players) { return (players + 63) / 64; }

// The bits of word `word` that stand for players below n.
inline std::uint64_t valid_bits(std::int64_t players, std::int64_t word) {
  const std::int64_t left = players - 64 * word;
  if (left >= 64) return ~std::uint64_t{0};
  return left <= 0 ? 0 : (std::uint64_t{1} << left) - 1;
}

inline bool test_player(const std::uint64_t* words, std::int64_t player) {
  return (words[player >> 6] >> (player & 63)) & 1;
}

inline void toggle_player(std::uint64_t* words, std::int64_t player) {
  words[player >> 6] ^= std::uint64_t{1} << (player & 63);
}

// The players of 0..n-1 that are not in `words`; `out` may be `words`.
inline void complement(const std::uint64_t* words, std::uint64_t* out, std::int64_t players) {
  for (std::int64_t w = 0; w < words_for(players); ++w) out[w] = ~words[w] & valid_bits(players, w);
}

// Eight players at a time, as eight bytes in one little-endian integer. 0 or 1 a byte out; any non-zero byte in.
inline std::uint64_t spread_bits(std::uint8_t bits) {
  // Byte b of the product holds all eight bits; keep bit b there, then turn "not zero" into one. The sum cannot carry.
  const std::uint64_t kept = (bits * 0x0101010101010101u) & 0x8040201008040201u;
  return ((kept + 0x7F7F7F7F7F7F7F7Fu) >> 7) & 0x0101010101010101u;
}

inline std::uint8_t gather_bits(std::uint64_t bytes) {
  // The top bit of each byte: set if any lower bit is (the sum cannot carry), or if it was.
  const std::uint64_t low = 0x7F7F7F7F7F7F7F7Fu;
  const std::uint64_t ones = ((((bytes & low) + low) | bytes) >> 7) & 0x0101010101010101u;
  // The product moves byte b's one to bit 56 + b; no two of its terms meet.
  return static_cast<std::uint8_t>((ones * 0x0102040810204080u) >> 56);
}

// One byte a player, 0 or 1.
inline void unpack(const std::uint64_t* words, std::uint8_t* bytes, std::int64_t players) {
  for (std::int64_t w = 0; w < words_for(players); ++w) {
    const std::uint64_t word = words[w];
    std::uint8_t* group = bytes + 64 * w;
    const int bits = static_cast<int>(players - 64 * w < 64 ? players - 64 * w : 64);
    int b = 0;
    for (; b + 8 <= bits; b += 8) {
      const std::uint64_t eight = spread_bits(static_cast<std::uint8_t>(word >> b));
      std::memcpy(group + b, &eight, sizeof eight);
    }
    for (; b < bits; ++b) group[b] = (word >> b) & 1;
  }
}

// Any non-zero byte is a member.
inline void pack(const std::uint8_t* bytes, std::uint64_t* words, std::int64_t players) {
  for (std::int64_t w = 0; w < words_for(players); ++w) {
    const std::uint8_t* group = bytes + 64 * w;
    const int bits = static_cast<int>(players - 64 * w < 64 ? players - 64 * w : 64);
    std::uint64_t word = 0;
    int b = 0;
    for (; b + 8 <= bits; b += 8) {
      std::uint64_t eight;
      std::memcpy(&eight, group + b, sizeof eight);
      word |= std::uint64_t{gather_bits(eight)} << b;
    }
    for (; b < bits; ++b) word |= std::uint64_t{group[b] != 0} << b;
    words[w] = word;
  }
}

}  // namespace flmoe
