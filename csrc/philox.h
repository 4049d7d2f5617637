// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011). A number is a pure function of (key, counter): no state, hence any element of a stream can be
// recomputed alone, in any order, on any machine.
#pragma once

#include <cstdint>

namespace flmoe {

struct Philox4 {
  std::uint32_t x[4];
};

constexpr std::uint32_t kPhiloxA = 0xD2511F53u, kPhiloxB = 0xCD9E8D57u;  // multipliers
constexpr std::uint32_t kPhiloxKey0 = 0x9E3779B9u;                       // golden ratio
constexpr std::uint32_t kPhiloxKey1 = 0xBB67AE85u;                       // sqrt(3) - 1
constexpr int kPhiloxRounds = 10;

// Ten rounds on `counter` under the key (key0 = low word, key1 = high word).
inline Philox4 philox4x32_10(Philox4 counter, std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t a = std::uint64_t{kPhiloxA} * counter.x[0];
    const std::uint64_t b = std::uint64_t{kPhiloxB} * counter.x[2];
    counter = Philox4{{static_cast<std::uint32_t>(b >> 32) ^ counter.x[1] ^ key0, static_cast<std::uint32_t>(b),
                       static_cast<std::uint32_t>(a >> 32) ^ counter.x[3] ^ key1, static_cast<std::uint32_t>(a)}};
    key0 += kPhiloxKey0;
    key1 += kPhiloxKey1;
  }
  return counter;
}

#if !defined(__CUDACC__)
// The same for N counters at once, counters[i][l] being word i of counter l. Plain loops over lanes, N large enough that a
// compiler vectorises them (32x32 -> 64 bit products are part of SSE2 and of Neon) rather than unrolls them.
template <int N>
inline void philox4x32_10(std::uint32_t (&counters)[4][N], std::uint32_t key0, std::uint32_t key1) {
  auto& [x0, x1, x2, x3] = counters;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int l = 0; l < N; ++l) {
      const std::uint64_t a = std::uint64_t{kPhiloxA} * x0[l];
      const std::uint64_t b = std::uint64_t{kPhiloxB} * x2[l];
      x0[l] = static_cast<std::uint32_t>(b >> 32) ^ x1[l] ^ key0;
      x2[l] = static_cast<std::uint32_t>(a >> 32) ^ x3[l] ^ key1;
      x1[l] = static_cast<std::uint32_t>(b);
      x3[l] = static_cast<std::uint32_t>(a);
    }
    key0 += kPhiloxKey0;
    key1 += kPhiloxKey1;
  }
}
#endif

// A double in [0, 1) from 64 random bits: the upper 53, so every value is an exact multiple of 2^-53.
inline double unit_double(std::uint32_t high, std::uint32_t low) {
  const std::uint64_t bits = (std::uint64_t{high} << 32) | low;
  return static_cast<double>(bits >> 11) * (1.0 / 9007199254740992.0);
}

}  // namespace flmoe
