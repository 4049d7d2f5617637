// Which rows go to which network of a sparse feed-forward block.
//
// Rows come in the order of coalitions and tokens, and all of a coalition's are in one unit, so a queue for every
// (coalition, modality, network) decides who finds room where it is limited. Choices depend on a row and those before it
// in its own queue, never on how rows are blocked or stacked.
#pragma once

#include "norm.h"

namespace flmoe::cpu::FLMOE_LEVEL {

constexpr int kGateRows = 8;  // rows whose logits are computed together: as many sums in flight hide an addition's latency

// One unit's routing through one block. A slot is one network that a row uses.
struct Routing {
  float* plain;           // (rows, stream) normalised rows
  float* logits;          // (kGateRows, padded networks)
  std::int32_t* chosen;   // (rows, slots) networks by falling logit, -1 where there was no room
  float* scores;          // (rows, slots)
  std::int32_t* queue;    // (coalitions * M, networks) slots that came so far
  std::int32_t* bounds;   // (networks + 1,) each network's part of the next two
  std::int32_t* row;      // (rows * slots,) rows by network
  float* score;           // (rows * slots,)
};

// Logits (kGateRows, columns) of up to kGateRows normalised rows, in plain float32 in every level: rounding, which
// elsewhere moves a value a little, can here change a choice.
inline void gate(const LayerWeights& weights, const float* plain, int width, int hidden, int rows, int networks,
                 float* logits) {
  const int columns = padded(networks);
  const float* at[kGateRows];
  for (int r = 0; r < kGateRows; ++r) at[r] = plain + static_cast<std::ptrdiff_t>(r < rows ? r : rows - 1) * width;
  for (int j = 0; j < networks; j += kLanes) {
    Vec sums[kGateRows] = {};
    const float* matrix = weights.gate + j;
    for (int i = 0; i < hidden; ++i, matrix += columns) {
      const Vec factors = load(matrix);
      for (int r = 0; r < kGateRows; ++r) sums[r] += at[r][i] * factors;
    }
    for (int r = 0; r < kGateRows; ++r) store(logits + r * columns + j, sums[r] + load(weights.gate_bias + j));
  }
}

// Sum of exp(logit - top); what is behind the logits, up to a whole cell, is overwritten.
inline float sum_of_exponentials(float* logits, int networks, float top) {
  for (int i = networks; i < padded(networks); ++i) logits[i] = -1e30f;
  Vec total = {};
  for (int j = 0; j < networks; j += kLanes) total += exp2((load(logits + j) - top) * 1.44269504f);
  return sum(total);
}

// The networks with the largest logits in falling order, ties to the lower index, and their probabilities.
inline void choose(const Shape& shape, float* logits, std::int32_t* chosen, float* scores) {
  const int slots = shape.slots;
  for (int network = 0, found = 0; network < shape.networks; ++network) {
    const float logit = logits[network];
    if (found == slots && !(logit > scores[slots - 1])) continue;
    int at = found < slots ? found++ : slots - 1;
    for (; at > 0 && logit > scores[at - 1]; --at) {
      scores[at] = scores[at - 1];
      chosen[at] = chosen[at - 1];
    }
    scores[at] = logit;
    chosen[at] = network;
  }
  const float top = scores[0];
  float total = 0;
  for (int j = 0; j < slots; ++j) total += scores[j] = __builtin_expf(scores[j] - top);
  if (shape.among_all) total = sum_of_exponentials(logits, shape.networks, top);
  for (int j = 0; j < slots; ++j) scores[j] /= total;
}

// Routes rows start..start+rows-1 of `stream`; `place` says which (coalition, modality) a row belongs to.
inline void route(const Shape& shape, const LayerWeights& weights, const float* stream, const std::int32_t* place,
                  const std::int32_t* room, int start, int rows, const Routing& routing) {
  const int width = shape.stream();
  for (int row = start; row < start + rows; row += kGateRows) {
    const int count = start + rows - row < kGateRows ? start + rows - row : kGateRows;
    float* plain = routing.plain + static_cast<std::ptrdiff_t>(row) * width;
    normalise_into(stream + static_cast<std::ptrdiff_t>(row) * width, width, shape.hidden, count,
                   [&](int r, int j, const Row& cell) { store_row(plain + r * width + j, cell); });
    gate(weights, plain, width, shape.hidden, count, shape.networks, routing.logits);
    for (int r = 0; r < count; ++r) {
      std::int32_t* chosen = routing.chosen + static_cast<std::ptrdiff_t>(row + r) * shape.slots;
      float* scores = routing.scores + static_cast<std::ptrdiff_t>(row + r) * shape.slots;
      choose(shape, routing.logits + r * padded(shape.networks), chosen, scores);
      if (room == nullptr) continue;
      std::int32_t* queue = routing.queue + static_cast<std::ptrdiff_t>(place[row + r]) * shape.networks;
      for (int j = 0; j < shape.slots; ++j) {
        if (++queue[chosen[j]] > room[place[row + r] % shape.modalities]) chosen[j] = -1;
      }
    }
  }
}

// Lists the slots of rows 0..rows-1 by network, in each by row.
inline void sort(const Shape& shape, int rows, const Routing& routing) {
  const std::ptrdiff_t slots = static_cast<std::ptrdiff_t>(rows) * shape.slots;
  // Counts two places on, then ends one place on; filling moves them to where they belong.
  std::memset(routing.bounds, 0, sizeof(std::int32_t) * (shape.networks + 1));
  for (std::ptrdiff_t slot = 0; slot < slots; ++slot) {
    const int network = routing.chosen[slot];
    if (network >= 0 && network + 2 <= shape.networks) ++routing.bounds[network + 2];
  }
  for (int network = 2; network <= shape.networks; ++network) routing.bounds[network] += routing.bounds[network - 1];
  for (std::ptrdiff_t slot = 0; slot < slots; ++slot) {
    const int network = routing.chosen[slot];
    if (network < 0) continue;
    const std::int32_t to = routing.bounds[network + 1]++;
    routing.row[to] = static_cast<std::int32_t>(slot / shape.slots);
    routing.score[to] = routing.scores[slot];
  }
}

}  // namespace flmoe::cpu::FLMOE_LEVEL
