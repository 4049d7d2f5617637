// Sums over tokens in float64, and the classifier on them. Summing row after row makes the result independent of how
// rows are blocked.
#pragma once

#include "gemm.h"

namespace flmoe::cpu::FLMOE_LEVEL {

typedef double Doubles __attribute__((vector_size(8 * kLanes)));

// Adds rows of one cell, spaced `stride`, to sums[slot[row]][column..]; consecutive rows mostly share a slot.
inline void pool(const float* rows, int stride, int count, const std::int32_t* slot, double* sums, std::ptrdiff_t pitch) {
  for (int r = 0; r < count;) {
    int stop = r + 1;
    while (stop < count && slot[stop] == slot[r]) ++stop;
    double* to = sums + slot[r] * pitch;
    for (int p = 0; p < kParts; ++p) {
      Doubles total;
      std::memcpy(&total, to + p * kLanes, sizeof total);
      for (int i = r; i < stop; ++i) {
        total += __builtin_convertvector(load(rows + static_cast<std::ptrdiff_t>(i) * stride + p * kLanes), Doubles);
      }
      std::memcpy(to + p * kLanes, &total, sizeof total);
    }
    r = stop;
  }
}

// logits (K) of one coalition from its pooled sums and the head (K, width).
inline void classify(const double* pooled, int width, const double* head, const double* bias, int classes, double* logits) {
  for (int k = 0; k < classes; ++k, head += width) {
    Doubles total = {};
    for (int i = 0; i < width; i += kLanes) {
      Doubles a, b;
      std::memcpy(&a, pooled + i, sizeof a);
      std::memcpy(&b, head + i, sizeof b);
      total += a * b;
    }
    double logit = bias[k];
    for (int i = 0; i < kLanes; ++i) logit += total[i];
    logits[k] = logit;
  }
}

}  // namespace flmoe::cpu::FLMOE_LEVEL
