// Brute-force checks of the shared core on the host, meant to run under AddressSanitizer and UBSan: every array is an
// exact-size heap block, so a word too far is an error and not luck.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "coalition.h"
#include "contexts.h"
#include "draw.h"
#include "philox.h"
#include "testing.h"

namespace {

using namespace flmoe;
using Words = std::vector<std::uint64_t>;
using Bytes = std::vector<std::uint8_t>;

const std::int64_t kPlayers[] = {1, 2, 63, 64, 65, 128, 129, 516};

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

Words empty(std::int64_t n) { return Words(size(words_for(n)), 0); }

// Bytes of a random coalition; `salt` picks which.
Bytes random_bytes(std::int64_t n, std::uint32_t salt) {
  Bytes bytes(size(n));
  for (std::int64_t p = 0; p < n; ++p) {
    bytes[size(p)] = philox4x32_10({{static_cast<std::uint32_t>(p), salt, 7, 9}}, 1, 2).x[0] & 1;
  }
  return bytes;
}

Words packed(const Bytes& bytes) {
  Words words = empty(static_cast<std::int64_t>(bytes.size()));
  pack(bytes.data(), words.data(), static_cast<std::int64_t>(bytes.size()));
  return words;
}

// In how many players two coalitions differ.
std::int64_t distance(const std::uint64_t* a, const std::uint64_t* b, std::int64_t n) {
  std::int64_t different = 0;
  for (std::int64_t p = 0; p < n; ++p) different += test_player(a, p) != test_player(b, p);
  return different;
}

std::int64_t members_of(const std::uint64_t* words, std::int64_t n) {
  std::int64_t members = 0;
  for (std::int64_t p = 0; p < n; ++p) members += test_player(words, p);
  return members;
}

// The known answers published with the generator (Random123, kat_vectors).
void test_philox() {
  struct Known {
    Philox4 counter;
    std::uint32_t key0, key1;
    Philox4 answer;
  };
  const Known known[] = {
      {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
      {{{0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}},
       0xffffffffu,
       0xffffffffu,
       {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
      {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
       0xa4093822u,
       0x299f31d0u,
       {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}},
  };
  for (const Known& k : known) {
    const Philox4 got = philox4x32_10(k.counter, k.key0, k.key1);
    for (int i = 0; i < 4; ++i) CHECK(got.x[i] == k.answer.x[i], "word %d is %08x", i, got.x[i]);
  }
  CHECK(unit_double(0, 0) == 0.0, "lowest");
  CHECK(unit_double(0xffffffffu, 0xffffffffu) == 1.0 - 0x1p-53, "highest");
  CHECK(unit_double(0x80000000u, 0) == 0.5, "middle");
}

void test_lanes() {
  std::uint32_t counters[4][kLanes];
  for (int i = 0; i < 4; ++i) {
    for (int l = 0; l < kLanes; ++l) counters[i][l] = 0x9E3779B9u * static_cast<std::uint32_t>(4 * l + i + 1);
  }
  std::uint32_t hashed[4][kLanes];
  std::copy(&counters[0][0], &counters[0][0] + 4 * kLanes, &hashed[0][0]);
  philox4x32_10(hashed, 0xa4093822u, 0x299f31d0u);
  for (int l = 0; l < kLanes; ++l) {
    const Philox4 alone =
        philox4x32_10({{counters[0][l], counters[1][l], counters[2][l], counters[3][l]}}, 0xa4093822u, 0x299f31d0u);
    for (int i = 0; i < 4; ++i) CHECK(hashed[i][l] == alone.x[i], "lane %d, word %d", l, i);
  }
}

// A comparison digit by digit is the comparison of the numbers, where digits end among others.
void test_comparison() {
  const double unit = 0x1p-53;
  for (const double u : {0.0, unit * 0.25, unit, 0.3, 0.5, 0.5 + unit, 1 - unit, 1.0}) {
    const std::uint64_t limit = threshold(u);
    for (const double near : {u - 2 * unit, u - unit, u, u + unit, u + 2 * unit, 0.0, 0.25, 1 - unit}) {
      if (near < 0 || near >= 1) continue;
      const auto digits = static_cast<std::uint64_t>(near / unit);
      const double uniform = static_cast<double>(digits) * unit;
      Compared word = compare_from(limit, 1, 0);
      for (int s = 0; s < kDigits; ++s) compare(word, digit(digits, s), digit(limit, s));
      CHECK(word.members == (uniform < u ? 1u : 0u), "%a below %a", uniform, u);
    }
  }
  CHECK(member_count(1.0, 7) == 7 && member_count(1 - unit, 7) == 7 && member_count(0.0, 7) == 0, "counts");
}

void test_words(std::int64_t n) {
  const std::int64_t width = words_for(n);
  CHECK(64 * width >= n && 64 * (width - 1) < n, "n = %ld", static_cast<long>(n));
  for (std::uint32_t salt = 0; salt < 5; ++salt) {
    const Bytes bytes = random_bytes(n, salt);
    const Words words = packed(bytes);

    for (std::int64_t p = 0; p < n; ++p) {
      CHECK(test_player(words.data(), p) == (bytes[size(p)] != 0), "player %ld", static_cast<long>(p));
    }
    CHECK((words.back() & ~valid_bits(n, width - 1)) == 0, "spare bits");

    Bytes again(size(n), 0xAA);
    unpack(words.data(), again.data(), n);
    CHECK(again == bytes, "pack, unpack");
    for (std::uint8_t& b : again) b = b ? 0x80 : 0;  // any non-zero byte is a member
    CHECK(packed(again) == words, "bytes other than 1");

    Words other(words);
    complement(words.data(), other.data(), n);
    CHECK(distance(words.data(), other.data(), n) == n, "distance to a complement");
    CHECK((other.back() & ~valid_bits(n, width - 1)) == 0, "spare bits of a complement");
    complement(other.data(), other.data(), n);
    CHECK(other == words, "complement twice, in place");

    for (std::int64_t p = 0; p < n; ++p) {
      Bytes flipped(bytes);
      flipped[size(p)] ^= 1;
      Words toggled(words);
      toggle_player(toggled.data(), p);
      CHECK(toggled == packed(flipped), "toggle %ld", static_cast<long>(p));
    }
  }
}

void test_draw(std::int64_t n, std::int64_t units, Mode mode, bool antithetic) {
  const Draw draw{0x0123456789abcdefu, 3, mode, antithetic, units};
  const std::int64_t width = words_for(n);
  const std::int64_t rows = rows_per_unit(draw);
  Words words(size(units * rows * width), 0xAAAAAAAAAAAAAAAAu);
  std::vector<double> sizes(size(units), -1.0);
  draw_contexts(draw, n, words.data(), sizes.data());

  const double top = antithetic ? 0.5 : 1.0;
  for (std::int64_t k = 0; k < units; ++k) {
    CHECK(sizes[size(k)] == unit_size(draw, k), "size %ld", static_cast<long>(k));
    if (mode != Mode::iid) {
      const double cell = top / static_cast<double>(units);
      const double low = static_cast<double>(k) * cell;
      CHECK(sizes[size(k)] >= low * (1 - 1e-12) && sizes[size(k)] <= (low + cell) * (1 + 1e-12), "stratum");
    }
    CHECK(sizes[size(k)] >= 0 && sizes[size(k)] <= top, "range");
    const std::uint64_t* row = words.data() + k * rows * width;
    for (std::int64_t p = 0; p < n; ++p) {
      const double uniform = member_uniform(draw, k, p);
      CHECK(uniform >= 0 && uniform <= 1, "uniform");
      CHECK(test_player(row, p) == is_member(draw, k, p, n), "unit %ld, player %ld: the bulk and the lone element",
            static_cast<long>(k), static_cast<long>(p));
    }
    CHECK((row[width - 1] & ~valid_bits(n, width - 1)) == 0, "spare bits");
    if (antithetic) {
      CHECK(distance(row, row + width, n) == n, "a complement");
    }
  }
  for (std::int64_t k = 0; k < units && mode == Mode::size; ++k) {
    const std::int64_t members = members_of(words.data() + k * rows * width, n);
    CHECK(members == member_count(sizes[size(k)], n) && members <= n, "exact size of unit %ld", static_cast<long>(k));
  }
  for (std::int64_t p = 0; p < n && is_hypercube(mode); ++p) {
    std::vector<int> seen(size(units), 0);
    for (std::int64_t k = 0; k < units; ++k) ++seen[size(lhs_rank(draw, k, p))];
    CHECK(std::count(seen.begin(), seen.end(), 1) == units, "ranks of player %ld are no permutation",
          static_cast<long>(p));
  }
}

// Every byte value in every position, beside neighbours that could carry into it.
void test_eights() {
  for (int bits = 0; bits < 256; ++bits) {
    const std::uint64_t bytes = spread_bits(static_cast<std::uint8_t>(bits));
    for (int b = 0; b < 8; ++b) CHECK(((bytes >> (8 * b)) & 0xFF) == ((bits >> b) & 1u), "spread %d", bits);
    CHECK(gather_bits(bytes) == bits, "gather %d", bits);
    for (std::uint64_t value = 1; value < 256; ++value) CHECK(gather_bits(bytes * value) == bits, "gather bytes");
  }
}

// Ties of keys go to the lower unit, which 32-bit keys of a small draw would never show.
void test_ties() {
  const Philox4 same{{42, 0, 0, 0}};
  const Philox4 less{{41, 0, 0, 0}};
  CHECK(rank_key(same, 3) < rank_key(same, 4), "ties");
  CHECK(rank_key(less, 0xffffffff) < rank_key(same, 0), "keys before units");
}

}  // namespace

int main() {
  test_philox();
  test_lanes();
  test_comparison();
  test_ties();
  test_eights();
  CHECK(words_for(0) == 0, "nobody");
  for (const std::int64_t n : kPlayers) {
    test_words(n);
    for (const std::int64_t units : {0, 1, 2, 7, 32}) {
      for (const Mode mode : {Mode::lhs, Mode::stratified, Mode::iid, Mode::size}) {
        for (const bool antithetic : {false, true}) {
          if (n < 200 || units < 32) test_draw(n, units, mode, antithetic);
        }
      }
    }
  }
  std::printf("host_test: %ld checks passed\n", flmoe::testing::checks);
  return 0;
}
