// What a sparse feed-forward block decides about one token, and how many tokens its networks have room for.
#pragma once

#include <cmath>

#include "hd.h"

namespace flmoe {

enum class Gate : int {
  naive = 0,        // softmax over the chosen logits
  gshard = 1,       // the same, with limited room
  switch_gate = 2,  // one network, its probability among all, with limited room
  noisy = 3,        // as naive
};
constexpr int kGates = 4;
constexpr std::int64_t kNoLimit = -1;

// The `slots` networks with the largest of X logits, in falling order, ties to the lower index; `top` has their logits.
template <class T>
FLMOE_HD void largest(const T* logits, int networks, int slots, std::int64_t* chosen, T* top) {
  for (int network = 0, found = 0; network < networks; ++network) {
    const T logit = logits[network];
    if (found == slots && !(logit > top[slots - 1])) continue;
    int at = found < slots ? found++ : slots - 1;
    for (; at > 0 && logit > top[at - 1]; --at) {
      top[at] = top[at - 1];
      chosen[at] = chosen[at - 1];
    }
    top[at] = logit;
    chosen[at] = network;
  }
}

// A token's networks, and what the output of each is multiplied by.
template <class T>
FLMOE_HD void choose(Gate gate, const T* logits, int networks, int slots, std::int64_t* chosen, T* scores) {
  largest(logits, networks, slots, chosen, scores);
  const T top = scores[0];
  T total = 0;
  if (gate == Gate::switch_gate) {
    for (int x = 0; x < networks; ++x) total += std::exp(logits[x] - top);
  }
  for (int j = 0; j < slots; ++j) {
    scores[j] = std::exp(scores[j] - top);
    if (gate != Gate::switch_gate) total += scores[j];
  }
  for (int j = 0; j < slots; ++j) scores[j] /= total;
}

FLMOE_HD std::int64_t ceiling(double x) {
  const auto whole = static_cast<std::int64_t>(x);
  return whole + (static_cast<double>(whole) < x);
}

// Slots that each network takes from `tokens` tokens routed together: kNoLimit, or of an even spread's 1.2 (training) or
// 2.4 times as many (switch), or of that many times the tokens (gshard, whose tokens have two slots).
FLMOE_HD std::int64_t slots_per_network(Gate gate, std::int64_t tokens, std::int64_t networks, bool training) {
  const double wanted = (training ? 1.2 : 2.4) * static_cast<double>(tokens);
  if (gate == Gate::gshard) return ceiling(wanted) * 2 / networks;
  if (gate == Gate::switch_gate) return ceiling(wanted / static_cast<double>(networks));
  return kNoLimit;
}

}  // namespace flmoe
