// The fused kernels' bodies under the emulator and the sanitizers: every array is an exact-size heap block, so that a byte
// too far is an error. That the numbers are right is checked from Python, against the model's reference; here that all of
// them are written, that neither the size of a block nor the order of its threads changes a bit, and the building blocks
// by brute force.
#include <cmath>
#include <cstdio>
#include <set>
#include <vector>

#include "../philox.h"
#include "../testing.h"
#include "emulator.h"
#include "pack.h"

namespace {

using namespace flmoe;
using namespace flmoe::fused;
using Floats = std::vector<float>;
using Halves = std::vector<std::uint16_t>;
using Bytes = std::vector<char>;

std::uint32_t state = 0;

float random_number() {
  return static_cast<float>(philox4x32_10({{state++, 0, 0, 0}}, 5, 6).x[0]) * 0x1p-31f - 1.0f;
}

Floats random_floats(std::size_t count) {
  Floats out(count);
  for (float& x : out) x = 0.3f * random_number();
  return out;
}

Halves random_halves(std::size_t count) {
  Halves out(count);
  for (std::uint16_t& x : out) x = half_bits(0.3f * random_number());
  return out;
}

// Every half there and back; every gap between two of them, in the middle and beside it.
void test_halves() {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float x = half_value(half);
    if ((bits & 0x7FFF) > 0x7C00) {
      CHECK(std::isnan(x) && std::isnan(half_value(half_bits(x))), "not a number %x", bits);
      continue;
    }
    CHECK(half_bits(x) == half, "%x there and back", bits);
    if ((bits & 0x7FFF) >= 0x7BFF) continue;  // the next one is no number
    const float next = half_value(static_cast<std::uint16_t>(bits + 1));
    const float middle = static_cast<float>((static_cast<double>(x) + next) / 2);
    const std::uint16_t even = static_cast<std::uint16_t>(bits & 1 ? bits + 1 : bits);
    CHECK(half_bits(middle) == even, "tie above %x", bits);
    CHECK(half_bits(std::nextafter(middle, x)) == half, "below the tie above %x", bits);
    CHECK(half_bits(std::nextafter(middle, next)) == bits + 1, "past the tie above %x", bits);
  }
  CHECK(half_bits(65519.99f) == 0x7BFF && half_bits(65520.0f) == 0x7C00, "largest");
}

// A permutation of the bytes that keeps chunks of sixteen together, and eight rows of a column in different banks.
template <int N, int K>
void test_operand() {
  using B = Operand<N, K>;
  std::set<int> seen;
  for (int n = 0; n < N; ++n) {
    for (int k = 0; k < K; ++k) {
      const int at = B::offset(n, k);
      CHECK(at >= 0 && at < B::kBytes && at % 2 == 0, "%d, %d lies at %d", n, k, at);
      CHECK(seen.insert(at).second, "%d, %d lies where another does", n, k);
      CHECK(at - 2 * (k % 8) == B::offset(n, k - k % 8), "%d, %d leaves its chunk", n, k);
    }
  }
  for (int n = 0; n < N; n += 8) {
    for (int k = 0; k < K; k += 8) {
      std::set<int> banks;
      for (int row = 0; row < 8; ++row) banks.insert(B::offset(n + row, k) / 16 % 8);
      CHECK(banks.size() == 8, "%d, %d: two rows share banks", n, k);
    }
  }
}

struct Model {
  static constexpr int kH = 64, kDepth = 32, kF = 128, kE = 2, kM = 3;
};

struct Found {
  Floats stream, pooled_stream, pooled_wide;
  Halves query, attended;
  Bytes images;

  bool operator==(const Found& other) const {
    return stream == other.stream && pooled_stream == other.pooled_stream && pooled_wide == other.pooled_wide &&
           query == other.query && attended == other.attended && images == other.images;
  }
};

// A first layer, a middle layer's attention and a last layer, of `coalitions` coalitions of `length` tokens.
template <int Terms, int Groups>
Found run(int coalitions, int length, bool backwards) {
  using T = Tile<Model::kH, Terms, Groups>;
  using A = Heads<T, Model::kDepth>;
  using Machine = Emulated<T>;
  constexpr int kH = Model::kH, kF = Model::kF, kE = Model::kE, kM = Model::kM;
  state = 0;
  const Rows sizes{kE, coalitions, length};
  const std::size_t rows = std::size_t{kE} * coalitions * length;
  const float none = std::nanf("");

  Bytes tape(std::size_t{kE} * chain_stages<T>(kF) * T::kStageBytes);
  for (std::size_t i = 0; i < tape.size(); i += T::kStageBytes) {
    const Halves weights = random_halves(kH * kSlab);
    pack_stages<kH>(weights.data(), tape.data() + i, kSlab, kH, true);
  }
  const auto tape_bytes = static_cast<std::int64_t>(tape.size() / kE);
  const Floats out_bias = random_floats(kE * kH), up_bias = random_floats(kE * kF), down_bias = random_floats(kE * kH);
  const Floats qkv_bias = random_floats(kE * 3 * kH), states = random_floats(std::size_t{kE} * 2 * length * kH);
  const auto width = static_cast<std::int64_t>((length + 63) / 64);
  std::vector<std::uint64_t> words(static_cast<std::size_t>(coalitions * width));
  for (std::uint64_t& word : words) word = philox4x32_10({{state++, 0, 0, 0}}, 7, 8).x[0];
  const std::vector<std::int32_t> segments{0, length / 2, length / 2, length};  // the second modality is absent

  const Halves attended = random_halves(Terms * rows * kH);
  Found found;
  found.stream.assign(rows * kH, none);
  found.query.assign(Terms * rows * kH, 0xFFFF);
  found.attended.assign(Terms * rows * kH, 0xFFFF);
  found.images.assign(std::size_t{kE} * coalitions * A::kHeads * key_tiles<A>(length) * A::kImageBytes, 0);
  const std::size_t pooled = std::size_t{kE} * coalitions * query_tiles(length) * kM;
  found.pooled_stream.assign(pooled * kH, none);
  found.pooled_wide.assign(pooled * kF, none);
  const auto plane = static_cast<std::int64_t>(rows * kH);

  const ChainArgs chain{sizes, kF, attended.data(), plane, tape.data(), tape_bytes, out_bias.data(), up_bias.data(),
                        down_bias.data(), qkv_bias.data(), {Residual::states, states.data(), words.data(), width},
                        found.stream.data(), found.query.data(), plane, found.images.data()};
  emulate<T>(kE * chain_blocks<T>(coalitions, length), Fault::none, backwards,
             [&](Machine& m, std::int64_t block) { chain_block<Machine, T, A>(m, chain, block); });

  LastArgs last{sizes, kF, kM, Stage::attention, found.query.data(), plane, found.images.data(), found.attended.data(),
                plane, tape.data(), tape_bytes, out_bias.data(), up_bias.data(),
                {Residual::stream, found.stream.data(), nullptr, 0}, segments.data(), found.pooled_stream.data(),
                found.pooled_wide.data()};
  const std::int64_t blocks = std::int64_t{kE} * coalitions * last_blocks<T>(length);
  const auto block = [&](Machine& m, std::int64_t b) { last_block<Machine, T, A>(m, last, b); };
  emulate<T>(blocks, Fault::none, backwards, block);
  // The tail on what attention left is the whole in one.
  last.stage = Stage::tail;
  emulate<T>(blocks, Fault::none, backwards, block);
  const Floats stream_in_two = found.pooled_stream, wide_in_two = found.pooled_wide;
  last.stage = Stage::whole;
  emulate<T>(blocks, Fault::none, backwards, block);
  CHECK(found.pooled_stream == stream_in_two && found.pooled_wide == wide_in_two, "the last layer in two parts");
  return found;
}

void check_written(const Found& found) {
  for (const Floats* numbers : {&found.stream, &found.pooled_stream, &found.pooled_wide}) {
    for (const float x : *numbers) CHECK(std::isfinite(x), "a number that is not written, or is none");
  }
  for (const Halves* numbers : {&found.query, &found.attended}) {
    for (const std::uint16_t x : *numbers) CHECK((x & 0x7C00) != 0x7C00, "a half that is not written, or is none");
  }
}

template <int Terms>
void test_kernels(int coalitions, int length) {
  const Found found = run<Terms, 2>(coalitions, length, false);
  check_written(found);
  CHECK((found == run<Terms, 1>(coalitions, length, true)), "%d terms, %d tokens: blocks or order matter", Terms, length);
}

// The stream keeps its bits however many products are added to it: sums of tensor cores, which round nothing up, must not
// start from it. Weights of the down-projection are all the same, those before it zero, so that the answer is a sum.
template <int Terms>
void test_stream_keeps_its_bits() {
  using T = Tile<Model::kH, Terms, 1>;
  using A = Heads<T, Model::kDepth>;
  using Machine = Emulated<T>;
  constexpr int kH = Model::kH, kWide = 512, kLength = 5;
  constexpr float kWeight = 0x1.8p-12f;
  state = 0;
  Bytes tape(static_cast<std::size_t>(chain_stages<T>(kWide)) * T::kStageBytes);
  for (int slab = 0; slab < kWide / kSlab; ++slab) {
    const Halves weights(kH * kSlab, half_bits(kWeight));
    const int down = kH / kSlab + 2 * slab + 1;
    pack_stages<kH>(weights.data(), tape.data() + down * static_cast<std::int64_t>(T::kStageBytes), kSlab, kH, true);
  }
  const Floats none(3 * kH);
  Floats up_bias = random_floats(kWide), states(2 * kLength * kH);
  for (float& x : states) x = 1.5f + 0.5f * random_number();
  const std::uint64_t all = ~std::uint64_t{0};
  const Rows sizes{1, 1, kLength};
  const Halves attended(Terms * kLength * kH);
  Floats stream(kLength * kH);
  Halves query(Terms * kLength * kH);
  Bytes images(A::kHeads * key_tiles<A>(kLength) * A::kImageBytes);
  const ChainArgs chain{sizes, kWide, attended.data(), kLength * kH, tape.data(), static_cast<std::int64_t>(tape.size()),
                        none.data(), up_bias.data(), none.data(), none.data(), {Residual::states, states.data(), &all, 1},
                        stream.data(), query.data(), kLength * kH, images.data()};
  emulate<T>(chain_blocks<T>(1, kLength), Fault::none, false,
             [&](Machine& m, std::int64_t block) { chain_block<Machine, T, A>(m, chain, block); });
  double added = 0.0, size = 0.0;
  for (const float u : up_bias) {
    const double gelu = 0.5 * u * (1.0 + std::erf(static_cast<double>(u) * 0.70710678118654752));
    added += kWeight * gelu;
    size += kWeight * std::fabs(gelu);
  }
  // Two roundings of the stream; of the sum, what its terms keep, GELU's own error, and a bit a step of sixteen.
  const double kept = Terms == 2 ? 0x1p-20 : 0x1p-11;
  const double most = 2.0 * 2.0 * 0x1p-24 + size * (kept + 0x1p-22 + Terms * (kWide / 16) * 0x1p-23);
  for (int i = 0; i < kLength * kH; ++i) {
    const double error = std::fabs(stream[i] - (states[kLength * kH + i] + added));
    CHECK(error <= most, "%d terms: the stream is off by %.3g of %.3g", Terms, error, most);
  }
}

}  // namespace

int main() {
  test_halves();
  test_operand<64, 256>();
  test_operand<256, 64>();
  test_operand<64, 32>();
  test_operand<32, 64>();
  test_operand<128, 32>();
  test_operand<256, 16>();
  test_kernels<2>(3, 1);
  test_kernels<2>(2, 19);
  test_kernels<2>(1, 70);
  test_kernels<1>(2, 33);
  test_stream_keeps_its_bits<2>();
  std::printf("fused_test: %ld checks passed\n", testing::checks);
  return 0;
}
