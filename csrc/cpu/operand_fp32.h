// Matrix operands as plain float32.
//
// Left operand: row-major, `width` floats a row. Right operand: panels of 32 columns, each (k, 32). A cell of 32 x 32 is
// 4 KB in both, as in every other level, so sizes and offsets are the same everywhere.
#pragma once

#include "simd.h"

namespace flmoe::cpu::FLMOE_LEVEL {

#if defined(__AVX512F__)
constexpr int kTileRows = 14, kTileParts = 2;  // 28 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileParts = 2;  // 12 of 16
#else
constexpr int kTileRows = 4, kTileParts = 2;  // 8 of 16
#endif
constexpr int kRows = kTileRows * (kTileRows > 8 ? 2 : 4);  // rows of one product with a panel

FLMOE_INLINE void put(float* left, int width, int row, int column, const Row& values) {
  store_row(left + static_cast<std::ptrdiff_t>(row) * width + column, values);
}

template <int rows>
FLMOE_INLINE void tile(const float* a, int width, const float* panel, int k, float* c, int stride, bool add) {
  Vec sums[rows][kTileParts];
  for (int r = 0; r < rows; ++r) {
    for (int p = 0; p < kTileParts; ++p) sums[r][p] = add ? load(c + r * stride + p * kLanes) : Vec{};
  }
  for (int i = 0; i < k; ++i, panel += kCell) {
    Vec b[kTileParts];
    for (int p = 0; p < kTileParts; ++p) b[p] = load(panel + p * kLanes);
    for (int r = 0; r < rows; ++r) {
      const float factor = a[r * width + i];
      for (int p = 0; p < kTileParts; ++p) sums[r][p] += factor * b[p];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int p = 0; p < kTileParts; ++p) store(c + r * stride + p * kLanes, sums[r][p]);
  }
}

// Any number of rows up to kTileRows; every row's additions happen in the same order whichever instance runs.
template <int rows>
inline void tile_of(int count, const float* a, int width, const float* panel, int k, float* c, int stride, bool add) {
  if constexpr (rows > 1) {
    if (count < rows) return tile_of<rows - 1>(count, a, width, panel, k, c, stride, add);
  }
  tile<rows>(a, width, panel, k, c, stride, add);
}

// c (rows, 32) = or += left[row.., : 32 * depth] @ panel, for row a multiple of kRows and rows <= kRows. `between` is
// called with (step, steps) while the product is computed; here products and the rest share the vector units, so once.
template <Flow, class Between>
FLMOE_INLINE void multiply(const float* left, int width, int row, int rows, const float* panel, int depth, float* c,
                           int stride, bool add, Between between) {
  between(0, 1);
  const float* a = left + static_cast<std::ptrdiff_t>(row) * width;
  for (int r = 0; r < rows; r += kTileRows) {
    for (int part = 0; part < kParts; part += kTileParts) {
      tile_of<kTileRows>(rows - r, a + r * width, width, panel + part * kLanes, depth * kCell,
                         c + r * stride + part * kLanes, stride, add);
    }
  }
}

// Right operand of `columns` columns whose rows 0..count-1 are at row(i); the others, up to a whole cell, are zero.
template <class RowAt>
inline void pack_rows(RowAt row, int count, int columns, float* to) {
  const int height = padded(count);
  for (int j = 0; j < columns; j += kCell, to += height * kCell) {
    for (int i = 0; i < count; ++i) store_row(to + i * kCell, load_row(row(i) + j));
    std::memset(to + count * kCell, 0, sizeof(float) * (height - count) * kCell);
  }
}

// The same operand transposed: its columns 0..count-1 are at row(i), each of `columns` values.
template <class RowAt>
inline void pack_columns(RowAt row, int count, int columns, float* to) {
  for (int j = 0; j < count; j += kCell, to += columns * kCell) {
    for (int i = 0; i < kCell; ++i) {
      const float* from = j + i < count ? row(j + i) : nullptr;
      for (int k = 0; k < columns; ++k) to[k * kCell + i] = from ? from[k] : 0.0f;
    }
  }
}

// Weights are read in order, which the processor's own prefetching sees; float32 products leave it the time.
FLMOE_INLINE void prefetch(const float*, int, int, int) {}

inline unsigned begin_thread() { return flush_denormals(); }
inline void end_thread(unsigned former) { restore_denormals(former); }

}  // namespace flmoe::cpu::FLMOE_LEVEL
