// The product of a block of rows with a packed matrix, handed to an epilogue while it is in the L1 cache.
#pragma once

#if defined(__AMX_BF16__)
#include "operand_amx.h"
#else
#include "operand_fp32.h"
#endif

namespace flmoe::cpu::FLMOE_LEVEL {

// left (rows, width) @ packed (width, columns); the epilogue gets (row, rows, column, product (rows, 32)) and may be
// called for a few rows at a time.
//
// A product is handed over while the next one is computed, a few rows after every step of it: the tile unit works
// alongside the vector units, but out-of-order execution alone reaches only a fraction of one product ahead.
template <class Epilogue>
inline void gemm(const float* left, int width, int rows, const float* packed, int columns, float* scratch,
                 Epilogue epilogue) {
  float *now = scratch, *before = scratch + kRows * kCell;
  int row_before = 0, count_before = 0, column_before = 0;
  const int blocks = (rows + kRows - 1) / kRows;
  for (int column = 0; column < columns; column += kCell, packed += width * kCell) {
    for (int row = 0, block = 0; row < rows; row += kRows, ++block) {
      const int count = rows - row < kRows ? rows - row : kRows;
      int done = 0;
      const auto between = [&](int step, int steps) __attribute__((always_inline)) {
        const int until = count_before * (step + 1) / steps;
        if (until > done) epilogue(row_before + done, until - done, column_before, before + done * kCell);
        done = until;
        // The next panel of weights comes from beyond the L2 cache; every block asks for its share of it.
        prefetch(packed + width * kCell, width * kCell, block * steps + step, blocks * steps);
      };
      multiply<Flow::left>(left, width, row, count, packed, width / kCell, now, kCell, false, between);
      float* const other = before;
      before = now;
      now = other;
      row_before = row;
      count_before = count;
      column_before = column;
    }
  }
  epilogue(row_before, count_before, column_before, before);
}

}  // namespace flmoe::cpu::FLMOE_LEVEL
