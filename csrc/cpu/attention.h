// Attention of a few query rows to all keys of one head, keys in blocks, with a running maximum (flash attention).
#pragma once

#include "gemm.h"

namespace flmoe::cpu::FLMOE_LEVEL {

constexpr int kKeys = 128;  // keys per block: scores and weights of a block stay in the L1 cache

// Memory of one call; all of it is overwritten.
struct AttentionScratch {
  float* query;    // left operand (kRows, head width)
  float* scores;   // (kRows, kKeys)
  float* weights;  // left operand (kRows, kKeys)
  float* out;      // (kRows, head width)
};

// Floats that AttentionScratch's arrays take together.
inline std::size_t attention_floats(int width) {
  constexpr int rows = (kRows + 15) / 16 * 16;
  return static_cast<std::size_t>(rows) * (2 * width + 2 * kKeys);
}

// Turns a block's scores (of base 2) into weights; the maximum and sum of every row move on, and what was summed before
// is rescaled where the maximum rose.
inline void weigh(const AttentionScratch& scratch, int rows, int keys, int width, float* top, float* total) {
  const int whole = padded(keys);
  for (int r = 0; r < rows; ++r) {
    float* scores = scratch.scores + r * kKeys;
    for (int i = keys; i < whole; ++i) scores[i] = -1e30f;  // padding of the last block: weight 2^-125 of a zero value
    Vec most[kParts];
    for (int p = 0; p < kParts; ++p) most[p] = load(scores + p * kLanes);
    for (int j = kCell; j < whole; j += kCell) {
      for (int p = 0; p < kParts; ++p) most[p] = maximum(most[p], load(scores + j + p * kLanes));
    }
    for (int p = 1; p < kParts; ++p) most[0] = maximum(most[0], most[p]);
    const float here = largest(most[0]);
    if (here > top[r]) {
      const Vec shrink = exp2(splat(top[r] - here));
      total[r] *= shrink[0];
      float* out = scratch.out + r * width;
      for (int j = 0; j < width; j += kLanes) store(out + j, load(out + j) * shrink);
      top[r] = here;
    }
    const Vec shift = splat(top[r]);
    Vec sums[kParts] = {};
    for (int j = 0; j < whole; j += kCell) {
      Row row = load_row(scores + j);
      for (int p = 0; p < kParts; ++p) {
        row.part[p] = exp2(row.part[p] - shift);
        sums[p] += row.part[p];
      }
      put(scratch.weights, kKeys, r, j, row);
    }
    for (int p = 1; p < kParts; ++p) sums[0] += sums[p];
    total[r] += sum(sums[0]);
  }
}

// Attends `rows` <= kRows queries, given by row(i) (one head, scores of base 2), to `length` keys and values packed by
// pack_columns and pack_rows. The result goes to columns column.. of the left operand `attended`.
template <class RowAt>
inline void attend(RowAt row, int rows, const float* keys, const float* values, int length, int width,
                   const AttentionScratch& scratch, float* attended, int attended_width, int at, int column) {
  for (int r = 0; r < rows; ++r) {
    const float* from = row(r);
    for (int j = 0; j < width; j += kCell) put(scratch.query, width, r, j, load_row(from + j));
  }
  float top[kRows], total[kRows];
  for (int r = 0; r < rows; ++r) {
    top[r] = -1e30f;
    total[r] = 0;
  }
  std::memset(scratch.out, 0, sizeof(float) * rows * width);
  const int height = padded(length);
  for (int key = 0; key < length; key += kKeys) {
    const int count = length - key < kKeys ? length - key : kKeys;
    for (int j = 0; j < count; j += kCell) {
      multiply(scratch.query, width, 0, rows, keys + (key + j) * width, width / kCell, scratch.scores + j, kKeys, false);
    }
    weigh(scratch, rows, count, width, top, total);
    for (int j = 0; j < width; j += kCell) {
      multiply(scratch.weights, kKeys, 0, rows, values + j * height + key * kCell, cells(count), scratch.out + j, width,
               true);
    }
  }
  for (int r = 0; r < rows; ++r) {
    const Vec scale = splat(1.0f / total[r]);
    for (int j = 0; j < width; j += kCell) {
      Row out = load_row(scratch.out + r * width + j);
      for (int p = 0; p < kParts; ++p) out.part[p] *= scale;
      put(attended, attended_width, at + r, column + j, out);
    }
  }
}

}  // namespace flmoe::cpu::FLMOE_LEVEL
