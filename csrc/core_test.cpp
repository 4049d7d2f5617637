// Brute-force checks of the corner grid, its reduction, routing, gates and tiles on the host, as host_test.cpp does for
// coalitions and their draws.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "corners.h"
#include "gates.h"
#include "philox.h"
#include "reduce.h"
#include "route.h"
#include "testing.h"
#include "tiles.h"

namespace {

using namespace flmoe;
using Numbers = std::vector<std::int64_t>;
using Doubles = std::vector<double>;

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

std::uint32_t state = 0;

std::uint32_t random_bits() { return philox4x32_10({{state++, 0, 0, 0}}, 3, 4).x[0]; }
std::int64_t random_below(std::int64_t n) { return random_bits() % n; }
double random_number() { return static_cast<double>(random_bits()) * 0x1p-31 - 1; }

Doubles random_numbers(std::int64_t count) {
  Doubles numbers(at(count));
  for (double& x : numbers) x = random_number();
  return numbers;
}

// Every corner's players against a set of players, and every pair's corners against a search among all corners.
void test_corners(std::int64_t n, std::int64_t pair_count) {
  Numbers pairs(at(2 * pair_count));
  for (std::int64_t p = 0; p < pair_count; ++p) {
    pairs[at(2 * p)] = random_below(n);
    do pairs[at(2 * p + 1)] = random_below(n);
    while (pairs[at(2 * p + 1)] == pairs[at(2 * p)]);
  }
  Numbers players(at(2 * pair_count)), single(at(2 * pair_count));
  const std::int64_t count = number_corners(pairs.data(), pair_count, players.data(), single.data());
  players.resize(at(count));
  const std::set<std::int64_t> expected(pairs.begin(), pairs.end());
  CHECK(players == Numbers(expected.begin(), expected.end()), "players of %ld pairs", static_cast<long>(pair_count));
  const CornerGrid grid{pairs.data(), players.data(), single.data(), pair_count, count};

  std::vector<std::set<std::int64_t>> toggled;
  for (std::int64_t g = 0; g < corner_count(grid); ++g) {
    toggled.emplace_back();
    for (std::int64_t w = 0; w < words_for(n); ++w) {
      const std::uint64_t mask = corner_mask(grid, g, w);
      for (std::int64_t b = 0; b < 64; ++b) {
        if (mask >> b & 1) toggled.back().insert(64 * w + b);
      }
    }
    CHECK(toggled.back().size() == (g == 0 ? 0u : g <= count ? 1u : 2u), "size of corner %ld", static_cast<long>(g));
  }
  std::vector<std::uint64_t> context(at(words_for(n)));
  for (auto& word : context) word = std::uint64_t{random_bits()} << 32 | random_bits();
  context.back() &= valid_bits(n, words_for(n) - 1);
  for (std::int64_t p = 0; p < pair_count; ++p) {
    const Corners found = corners_of(grid, p, context.data());
    const std::pair<std::int64_t, std::pair<bool, bool>> wanted[] = {{found.both, {true, true}},
                                                                     {found.first, {true, false}},
                                                                     {found.second, {false, true}},
                                                                     {found.neither, {false, false}}};
    for (const auto& [corner, present] : wanted) {
      std::set<std::int64_t> changes;
      const std::int64_t i = pairs[at(2 * p)], j = pairs[at(2 * p + 1)];
      if (test_player(context.data(), i) != present.first) changes.insert(i);
      if (test_player(context.data(), j) != present.second) changes.insert(j);
      CHECK(toggled[at(corner)] == changes, "corner of pair %ld", static_cast<long>(p));
    }
  }
}

void test_product() {
  const std::int64_t rows[] = {4, 7}, columns[] = {1, 2, 9};
  const Numbers expected{4, 1, 4, 2, 4, 9, 7, 1, 7, 2, 7, 9};
  for (std::int64_t p = 0; p < 6; ++p) {
    std::int64_t pair[2];
    product_pair(rows, columns, 3, p, pair);
    CHECK(pair[0] == expected[at(2 * p)] && pair[1] == expected[at(2 * p + 1)], "pair %ld", static_cast<long>(p));
  }
}

void test_gaps() {
  const auto gaps = [](double v11, double v10, double v01, double v00) {
    return redundancy_gaps({v11, v10, v01, v00}, 1e-6);
  };
  const Gaps both = gaps(1, 0, 0, 0), any = gaps(1, 1, 1, 0), sum = gaps(1, 0.5, 0.5, 0), odd = gaps(0, 1, 1, 0);
  CHECK(both.max == 0 && both.sum == -1 && both.strict == 0 && both.ratio == -1 && both.defined, "and");
  CHECK(any.max == 1 && any.sum == 1 && any.strict == 1 && any.ratio == 1 && any.defined, "or");
  CHECK(sum.max == 0.5 && sum.sum == 0 && sum.strict == 0 && sum.ratio == 0 && sum.defined, "additive");
  CHECK(odd.max == 0 && odd.sum == 2 && odd.strict == 0 && odd.ratio == 0 && !odd.defined, "exclusive or");
  CHECK(second_difference({1, 0, 0, 0}) == 1 && second_difference({0, 1, 1, 0}) == -2, "second differences");
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (int i = 0; i < 4; ++i) {
    const Gaps found = gaps(i == 0 ? nan : 1, i == 1 ? nan : 1, i == 2 ? nan : 1, i == 3 ? nan : 0);
    CHECK(std::isnan(found.max) && std::isnan(found.sum) && std::isnan(found.strict), "NaN at corner %d", i);
  }
}

// Moments of 1e6 + noise: what a plain sum of squares would lose.
void test_moments() {
  for (const std::int64_t count : {0, 1, 2, 31, 32, 33, 200}) {
    Doubles x = random_numbers(count);
    Moments whole{};
    Moments merged{};
    double mean = 0;
    for (double& value : x) {
      value += 1e6;
      mean += (value - 1e6) / static_cast<double>(count);
    }
    double squares = 0;
    for (const double value : x) {
      squares += (value - 1e6 - mean) * (value - 1e6 - mean);
      add(whole, value);
    }
    for (std::int64_t run = 0; run < moment_runs(count); ++run) {
      Moments part{};
      for (std::int64_t i = run * kMomentRun; i < std::min(count, (run + 1) * kMomentRun); ++i) add(part, x[at(i)]);
      merged = merge(merged, part);
    }
    // Each of up to `count` steps rounds the mean by half of an ulp of 1e6, 2^-34, and a deviation of 1 by as much.
    const double error = static_cast<double>(count + 1) * 0x1p-33;
    for (const Moments& found : {whole, merged}) {
      CHECK(found.count == static_cast<double>(count), "count");
      CHECK(count == 0 || std::abs(found.mean - 1e6 - mean) <= error, "mean of %ld", static_cast<long>(count));
      CHECK(std::abs(found.squares - squares) <= 2 * error, "squares of %ld", static_cast<long>(count));
    }
  }
}

// The sweep over contexts, pairs and outputs against one sample at a time.
void test_reduction(std::int64_t contexts, std::int64_t outputs) {
  const std::int64_t n = 70, count = 5;
  const Numbers pairs{0, 69, 69, 3, 64, 63, 3, 0, 12, 13};
  Numbers players(at(2 * count)), single(at(2 * count));
  const std::int64_t player_count = number_corners(pairs.data(), count, players.data(), single.data());
  const CornerGrid grid{pairs.data(), players.data(), single.data(), count, player_count};
  std::vector<std::uint64_t> words(at(contexts * words_for(n)));
  for (std::size_t i = 0; i < words.size(); ++i) {
    words[i] = (std::uint64_t{random_bits()} << 32 | random_bits()) & valid_bits(n, static_cast<std::int64_t>(i % 2));
  }
  const Doubles values = random_numbers(contexts * corner_count(grid) * outputs);
  const std::int64_t samples = count * outputs, all = contexts * samples;
  Doubles second(at(all)), gaps(at(kGaps * all)), moments(at(2 * samples), 7.0), scratch(at(2 * samples));
  std::vector<std::uint8_t> defined(at(all));
  reduce_corners(grid, {words.data(), values.data(), second.data(), gaps.data(), defined.data(), moments.data(),
                        scratch.data(), contexts, outputs, n, 1e-6});
  for (std::int64_t s = 0; s < samples; ++s) {
    Moments whole{};
    for (std::int64_t first = 0; first < contexts; first += kMomentRun) {
      Moments part{};
      for (std::int64_t k = first; k < std::min(contexts, first + kMomentRun); ++k) {
        const Corners corners = corners_of(grid, s / outputs, words.data() + k * words_for(n));
        const auto value = [&](std::int64_t g) { return values[at((k * corner_count(grid) + g) * outputs + s % outputs)]; };
        const CornerValues v{value(corners.both), value(corners.first), value(corners.second), value(corners.neither)};
        const Gaps expected = redundancy_gaps(v, 1e-6);
        const std::size_t i = at(k * samples + s);
        CHECK(second[i] == second_difference(v) && (defined[i] != 0) == expected.defined, "second difference");
        CHECK(gaps[i] == expected.max && gaps[i + at(all)] == expected.sum && gaps[i + at(2 * all)] == expected.strict &&
                  gaps[i + at(3 * all)] == expected.ratio, "gaps");
        add(part, second[i]);
      }
      whole = merge(whole, part);
    }
    CHECK(moments[at(s)] == whole.mean && moments[at(samples + s)] == whole.squares, "moments");
  }
}

void test_route(int modalities, int hidden, bool normalised, int layers) {
  const std::int64_t n = 70;
  const int experts = 5, wide = 9;
  Numbers players{0};
  for (int m = 1; m <= modalities; ++m) players.push_back(m == modalities ? n : 3 * m);
  const Doubles absent = random_numbers(modalities * hidden), step = random_numbers(n * hidden);
  std::vector<Doubles> numbers;
  Router<double> router{absent.data(), step.data(), players.data(), modalities, hidden, normalised, 0.7, layers, {}};
  for (int l = 0, in = modalities * hidden; l < layers; ++l) {
    const int out = l + 1 == layers ? experts : wide;
    numbers.push_back(random_numbers(in * out));
    numbers.push_back(random_numbers(out));
    router.network[l] = {numbers[at(2 * l)].data(), numbers[at(2 * l + 1)].data(), out};
    in = out;
  }
  std::vector<std::uint64_t> coalition{std::uint64_t{random_bits()} << 32 | random_bits(), random_bits() & 63u};
  Doubles rows(at(2 * router.widest())), weights(experts);
  route(router, coalition.data(), Alone{}, rows.data(), weights.data());

  Doubles x = absent;
  for (int m = 0; m < modalities; ++m) {
    double squares = 0;
    for (int h = 0; h < hidden; ++h) {
      for (std::int64_t p = players[at(m)]; p < players[at(m + 1)]; ++p) {
        if (test_player(coalition.data(), p)) x[at(m * hidden + h)] += step[at(p * hidden + h)];
      }
      squares += x[at(m * hidden + h)] * x[at(m * hidden + h)];
    }
    for (int h = 0; normalised && h < hidden; ++h) x[at(m * hidden + h)] /= std::sqrt(squares);
  }
  for (int l = 0; l < layers; ++l) {
    Doubles y = numbers[at(2 * l + 1)];
    for (std::size_t j = 0; j < y.size(); ++j) {
      for (std::size_t i = 0; i < x.size(); ++i) y[j] += x[i] * numbers[at(2 * l)][i * y.size() + j];
      if (l + 1 < layers) y[j] = std::max(y[j], 0.0);
    }
    x = y;
  }
  double total = 0, sum = 0;
  for (const double score : x) total += std::exp(score / 0.7);
  for (int e = 0; e < experts; ++e) {
    sum += weights[at(e)];
    CHECK(std::abs(weights[at(e)] - std::exp(x[at(e)] / 0.7) / total) < 1e-12, "weight %d", e);
  }
  CHECK(std::abs(sum - 1) < 1e-14, "sum of weights");
  const Doubles logits = random_numbers(experts * 3);
  for (int k = 0; k < 3; ++k) {
    double expected = 0;
    for (int e = 0; e < experts; ++e) expected += weights[at(e)] * logits[at(e * 3 + k)];
    CHECK(mixture(logits.data(), weights.data(), experts, 3, k) == expected, "mixture");
  }
}

// Among few values, so that ties are common.
void test_choose(int networks, int slots) {
  for (int trial = 0; trial < 50; ++trial) {
    Doubles logits(at(networks));
    for (double& logit : logits) logit = static_cast<double>(random_below(3));
    Numbers order(at(networks));
    for (int x = 0; x < networks; ++x) order[at(x)] = x;
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return logits[at(a)] > logits[at(b)]; });
    for (const Gate gate : {Gate::naive, Gate::gshard, Gate::switch_gate, Gate::noisy}) {
      Numbers chosen(at(slots));
      Doubles scores(at(slots));
      choose(gate, logits.data(), networks, slots, chosen.data(), scores.data());
      double total = 0;
      for (int x = 0; x < networks; ++x) {
        if (gate == Gate::switch_gate || x < slots) total += std::exp(logits[at(order[at(x)])]);
      }
      for (int j = 0; j < slots; ++j) {
        CHECK(chosen[at(j)] == order[at(j)], "order of %d of %d", slots, networks);
        CHECK(std::abs(scores[at(j)] - std::exp(logits[at(order[at(j)])]) / total) < 1e-14, "score");
      }
    }
  }
}

void test_room() {
  CHECK(slots_per_network(Gate::switch_gate, 10, 16, false) == 2, "ceil(24 / 16)");
  CHECK(slots_per_network(Gate::switch_gate, 10, 16, true) == 1, "ceil(12 / 16)");
  CHECK(slots_per_network(Gate::gshard, 7, 4, false) == 8, "ceil(16.8) * 2 // 4");
  CHECK(slots_per_network(Gate::gshard, 7, 4, true) == 4, "ceil(8.4) * 2 // 4");
  CHECK(slots_per_network(Gate::switch_gate, 0, 16, false) == 0, "nobody");
  CHECK(slots_per_network(Gate::naive, 7, 4, false) == kNoLimit, "no limit");
  CHECK(slots_per_network(Gate::noisy, 7, 4, true) == kNoLimit, "no limit");
  CHECK(ceiling(2.0) == 2 && ceiling(2.0000001) == 3 && ceiling(0.0) == 0, "ceiling");
}

// Queues kept by hand, one slot after the other.
void test_slots(std::int64_t experts, const Numbers& blocks, std::int64_t slots, std::int64_t networks, bool limited) {
  const std::int64_t rows = blocks.back(), count = static_cast<std::int64_t>(blocks.size()) - 1;
  Numbers chosen(at(experts * rows * slots)), room(at(count));
  for (auto& network : chosen) network = random_below(networks + 1) - 1;
  for (auto& most : room) most = random_below(4);
  const Slots made{chosen.data(), blocks.data(), limited ? room.data() : nullptr, experts, rows, slots, networks, count};
  std::map<std::pair<std::int64_t, std::int64_t>, Numbers> queues;  // by group and block
  for (std::int64_t s = 0; s < slot_count(made); ++s) {
    if (chosen[at(s)] < 0) continue;
    const std::int64_t row = s / slots % rows, e = s / slots / rows;
    const std::int64_t block = std::upper_bound(blocks.begin(), blocks.end(), row) - blocks.begin() - 1;
    Numbers& queue = queues[{e * networks + chosen[at(s)], block}];
    if (!limited || static_cast<std::int64_t>(queue.size()) < room[at(block)]) queue.push_back(s);
  }
  Numbers expected_sorted, expected_place(chosen.size(), -1), expected_first{0};
  for (std::int64_t run = 0; run < run_count(made); ++run) {
    for (const std::int64_t s : queues[{run / count, run % count}]) {
      expected_place[at(s)] = static_cast<std::int64_t>(expected_sorted.size());
      expected_sorted.push_back(s);
    }
    expected_first.push_back(static_cast<std::int64_t>(expected_sorted.size()));
  }

  Numbers first(at(run_count(made) + 1)), sorted(chosen.size()), place(chosen.size(), 7);
  sort_slots(made, first.data(), sorted.data(), place.data());
  sorted.resize(expected_sorted.size());
  CHECK(first == expected_first, "first places of runs");
  CHECK(sorted == expected_sorted, "sorted slots");
  CHECK(place == expected_place, "places of slots");

  Numbers lone_sorted(sorted.size()), lone_place(chosen.size(), -1);
  for (std::int64_t run = 0; run < run_count(made); ++run) {
    CHECK(run_length(made, run) == first[at(run + 1)] - first[at(run)], "length of run %ld", static_cast<long>(run));
    place_run(made, run, first[at(run)], first[at(run + 1)], lone_sorted.data(), lone_place.data());
  }
  CHECK(lone_sorted == sorted && lone_place == place, "run by run");

  const std::int64_t groups = group_count(made), total = static_cast<std::int64_t>(sorted.size());
  for (const std::int64_t height : {1, 2, 3, 64}) {
    Numbers first_row(at(groups + 1)), first_tile(at(groups + 1));
    number_tiles(first.data(), groups, count, height, first_row.data(), first_tile.data());
    Numbers covered(at(total), 0);
    const std::int64_t most = most_tiles(total, groups, height);
    CHECK(first_tile.back() <= most, "%ld tiles", static_cast<long>(first_tile.back()));
    for (std::int64_t t = 0; t < most; ++t) {
      const Tile tile = locate_tile(first_row.data(), first_tile.data(), groups, height, t);
      CHECK((tile.rows > 0) == (t < first_tile.back()) && tile.rows <= height, "tile map: rows of a tile");
      for (std::int64_t row = tile.first; row < tile.first + tile.rows; ++row) {
        CHECK(row >= 0 && row < total, "tile map: row %ld of %ld", static_cast<long>(row), static_cast<long>(total));
        ++covered[at(row)];
        CHECK(row >= first_row[at(tile.group)] && row < first_row[at(tile.group + 1)], "tile map: a row's group");
      }
    }
    CHECK(std::count(covered.begin(), covered.end(), 1) == total, "tile map: every row in one tile");
  }
}

}  // namespace

int main() {
  for (const std::int64_t n : {2, 64, 65, 516}) {
    for (const std::int64_t pairs : {0, 1, 7, 40}) test_corners(n, pairs);
  }
  test_product();
  test_gaps();
  test_moments();
  for (const std::int64_t contexts : {0, 1, 33, 70}) test_reduction(contexts, 3);
  for (const bool normalised : {false, true}) {
    test_route(1, 8, normalised, 1);
    test_route(2, 3, normalised, 2);
    test_route(4, 2, normalised, 3);
  }
  test_choose(1, 1);
  test_choose(4, 2);
  test_choose(33, 1);
  test_choose(5, 5);
  test_room();
  for (const bool limited : {false, true}) {
    test_slots(1, {0, 1}, 1, 1, limited);
    test_slots(2, {0, 5, 5, 9}, 2, 3, limited);
    test_slots(3, {0, 40}, 1, 12, limited);
    test_slots(2, {0, 13, 14, 40, 77}, 2, 4, limited);
    test_slots(1, {0, 0}, 2, 4, limited);
  }
  std::printf("core_test: %ld checks passed\n", flmoe::testing::checks);
  return 0;
}
