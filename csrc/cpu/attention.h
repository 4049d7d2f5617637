// Attention of a few query rows to all keys of one head, keys in blocks, with a running maximum (flash attention).
#pragma once

#include "gemm.h"

namespace flmoe::cpu::FLMOE_LEVEL {

constexpr int kKeys = 128;  // keys per block: scores and weights of a block stay in the L1 cache

// Memory of one call; all of it is overwritten.
struct AttentionScratch {
  float* query;    // left operand (kRows, head width)
  float* scores;   // 2 x (kRows, kKeys)
  float* weights;  // left operand (kRows, kKeys)
  float* out;      // (kRows, head width)
};


// Turns scores (of base 2) of rows first..stop-1 into weights; the maximum of every row and its sums, one per vector lane,
// move on, and what was summed before is rescaled where the maximum rose.
FLMOE_INLINE void weigh(const AttentionScratch& scratch, float* block, int first, int stop, int keys, int width, float* top,
                        Vec* total) {
  const int whole = padded(keys);
  for (int r = first; r < stop; ++r) {
    float* scores = block + r * kKeys;
    for (int i = keys; i < whole; ++i) scores[i] = -1e30f;  // padding of the last block: hardly a weight, of a zero value
    Row most = load_row(scores);
    for (int j = kCell; j < whole; j += kCell) {
      for (int p = 0; p < kParts; ++p) most.part[p] = maximum(most.part[p], load(scores + j + p * kLanes));
    }
    for (int p = 1; p < kParts; ++p) most.part[0] = maximum(most.part[0], most.part[p]);
    if (any_above(most.part[0], splat(top[r]))) {
      const float here = largest(most.part[0]);
      const Vec shrink = exp2(splat(top[r] - here));
      total[r] *= shrink;
      float* out = scratch.out + r * width;
      for (int j = 0; j < width; j += kLanes) store(out + j, load(out + j) * shrink);
      top[r] = here;
    }
    const Vec shift = splat(top[r]);
    Vec sums[kParts] = {total[r]};
    for (int j = 0; j < whole; j += kCell) {
      Row row = load_row(scores + j);
      for (int p = 0; p < kParts; ++p) {
        row.part[p] = exp2(row.part[p] - shift);
        sums[p] += row.part[p];
      }
      put(scratch.weights, kKeys, r, j, row);
    }
    for (int p = 1; p < kParts; ++p) sums[0] += sums[p];
    total[r] = sums[0];
  }
}

// Attends `rows` <= kRows queries, given by row(i) (one head, scores of base 2), to `length` keys and values packed by
// pack_columns and pack_rows. The result goes to columns column.. of the left operand `attended`.
//
// A block's weights are computed in between the products of the next block's scores.
template <class RowAt>
inline void attend(RowAt row, int rows, const float* keys, const float* values, int length, int width,
                   const AttentionScratch& scratch, float* attended, int attended_width, int at, int column) {
  for (int r = 0; r < rows; ++r) {
    const float* from = row(r);
    for (int j = 0; j < width; j += kCell) put(scratch.query, width, r, j, load_row(from + j));
  }
  float top[kRows];
  Vec total[kRows];
  for (int r = 0; r < rows; ++r) {
    top[r] = -1e30f;
    total[r] = Vec{};
  }
  std::memset(scratch.out, 0, sizeof(float) * rows * width);
  const int height = padded(length);
  float *scores = scratch.scores, *coming = scratch.scores + kRows * kKeys;
  const auto count_at = [&](int key) { return length - key < kKeys ? length - key : kKeys; };
  for (int j = 0; j < count_at(0); j += kCell) {
    multiply<Flow::right>(scratch.query, width, 0, rows, keys + j * width, width / kCell, scores + j, kKeys, false,
                          [](int, int) {});
  }
  for (int key = 0; key < length; key += kKeys) {
    const int count = count_at(key), next = key + kKeys, products = next < length ? cells(count_at(next)) : 0;
    int done = 0;
    for (int j = 0; j < products; ++j) {
      const auto between = [&](int step, int steps) __attribute__((always_inline)) {
        const int until = rows * (j * steps + step + 1) / (products * steps);
        if (until > done) weigh(scratch, scores, done, until, count, width, top, total);
        done = until;
      };
      multiply<Flow::right>(scratch.query, width, 0, rows, keys + (next + j * kCell) * width, width / kCell,
                            coming + j * kCell, kKeys, false, between);
    }
    weigh(scratch, scores, done, rows, count, width, top, total);
    for (int j = 0; j < width; j += kCell) {
      multiply<Flow::right>(scratch.weights, kKeys, 0, rows, values + j * height + key * kCell, cells(count),
                            scratch.out + j, width, true, [](int, int) {});
    }
    float* const other = scores;
    scores = coming;
    coming = other;
  }
  for (int r = 0; r < rows; ++r) {
    const Vec scale = splat(1.0f / sum(total[r]));
    for (int j = 0; j < width; j += kCell) {
      Row out = load_row(scratch.out + r * width + j);
      for (int p = 0; p < kParts; ++p) out.part[p] *= scale;
      put(attended, attended_width, at + r, column + j, out);
    }
  }
}

}  // namespace flmoe::cpu::FLMOE_LEVEL
