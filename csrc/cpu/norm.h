// LayerNorm without gain and shift (they are part of the next matrix), handed on cell by cell.
#pragma once

#include "gemm.h"

namespace flmoe::cpu::FLMOE_LEVEL {

// Rows 0..rows-1 of `stream` (rows, width), of which the first `hidden` columns count; the padding becomes zero. The sink
// gets (row, column, cell).
template <class Sink>
FLMOE_INLINE void normalise_into(const float* stream, int width, int hidden, int rows, Sink sink) {
  // The last cell may be partly padding, which must not count in the variance.
  alignas(64) float counts[kCell];
  for (int i = 0; i < kCell; ++i) counts[i] = width - kCell + i < hidden ? 1.0f : 0.0f;
  const Row last = load_row(counts);
  const float share = 1.0f / static_cast<float>(hidden);
  for (int r = 0; r < rows; ++r, stream += width) {
    Vec total[kParts] = {};
    for (int j = 0; j < width; j += kCell) {
      for (int p = 0; p < kParts; ++p) total[p] += load(stream + j + p * kLanes);
    }
    for (int p = 1; p < kParts; ++p) total[0] += total[p];
    const Vec mean = splat(sum(total[0]) * share);
    Vec squares[kParts] = {};
    for (int j = 0; j + kCell < width; j += kCell) {
      for (int p = 0; p < kParts; ++p) {
        const Vec off = load(stream + j + p * kLanes) - mean;
        squares[p] += off * off;
      }
    }
    for (int p = 0; p < kParts; ++p) {
      const Vec off = (load(stream + width - kCell + p * kLanes) - mean) * last.part[p];
      squares[p] += off * off;
    }
    for (int p = 1; p < kParts; ++p) squares[0] += squares[p];
    const Vec scale = splat(1.0f / __builtin_sqrtf(sum(squares[0]) * share + 1e-5f));
    for (int j = 0; j < width; j += kCell) {
      Row row = load_row(stream + j);
      for (int p = 0; p < kParts; ++p) row.part[p] = (row.part[p] - mean) * scale;
      if (j + kCell == width) {
        for (int p = 0; p < kParts; ++p) row.part[p] *= last.part[p];
      }
      sink(r, j, row);
    }
  }
}

// The same straight into a left operand.
inline void normalise(const float* stream, int width, int hidden, int rows, float* left) {
  normalise_into(stream, width, hidden, rows,
                 [&](int r, int j, const Row& row) __attribute__((always_inline)) { put(left, width, r, j, row); });
}

}  // namespace flmoe::cpu::FLMOE_LEVEL
