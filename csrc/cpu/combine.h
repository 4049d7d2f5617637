// Layer-1 attention of one token from the shared pattern sums: the sum of one pattern per group, then one division.
#pragma once

#include "gemm.h"

namespace flmoe::cpu::FLMOE_LEVEL {

// `count` floats from memory that ends there, the rest of the cell zero.
FLMOE_INLINE Row load_some(const float* from, int count) {
  if (count >= kCell) return load_row(from);
  alignas(64) float some[kCell] = {};
  std::memcpy(some, from, sizeof(float) * count);
  return load_row(some);
}

// Writes row `at` of the left operand `attended` for query row `query` of one expert's table.
inline void combine(const Shape& shape, const FirstAttention& first, int expert, const std::int32_t* pick, int query,
                    float* attended, int at) {
  const int depth = shape.depth(), width = shape.head_width(), step = depth + 1;
  const std::ptrdiff_t head = static_cast<std::ptrdiff_t>(first.queries) * step;
  const std::ptrdiff_t pattern = static_cast<std::ptrdiff_t>(shape.experts) * shape.heads * head;
  const float* from = first.table + expert * shape.heads * head + static_cast<std::ptrdiff_t>(query) * step;
  for (int h = 0; h < shape.heads; ++h, from += head) {
    float weight = 0;
    for (int g = 0; g < first.groups; ++g) weight += from[pick[g] * pattern + depth];
    const Vec scale = splat(1.0f / weight);
    for (int j = 0; j < width; j += kCell) {
      Row sums = {};
      for (int g = 0; g < first.groups; ++g) {
        const Row term = load_some(from + pick[g] * pattern + j, depth - j);
        for (int p = 0; p < kParts; ++p) sums.part[p] += term.part[p];
      }
      for (int p = 0; p < kParts; ++p) sums.part[p] *= scale;
      put(attended, shape.attended(), at, h * width + j, sums);
    }
  }
}

}  // namespace flmoe::cpu::FLMOE_LEVEL
