// The product of a block of rows with a packed matrix, handed to an epilogue while it is in the L1 cache.
#pragma once

#if defined(__AMX_BF16__)
#include "operand_amx.h"
#else
#include "operand_fp32.h"
#endif

namespace flmoe::cpu::FLMOE_LEVEL {

// left (rows, width) @ packed (width, columns); the epilogue gets (row, rows, column, product (rows, 32)).
template <class Epilogue>
inline void gemm(const float* left, int width, int rows, const float* packed, int columns, float* scratch,
                 Epilogue epilogue) {
  for (int column = 0; column < columns; column += kCell, packed += width * kCell) {
    for (int row = 0; row < rows; row += kRows) {
      const int count = rows - row < kRows ? rows - row : kRows;
      multiply(left, width, row, count, packed, width / kCell, scratch, kCell, false);
      epilogue(row, count, column, scratch);
    }
  }
}

}  // namespace flmoe::cpu::FLMOE_LEVEL
