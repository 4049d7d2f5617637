// How the right-hand operand of a product lies in shared memory, byte for byte; global memory holds the same bytes in the
// same order, so that a tile is one bulk copy.
//
// An operand has N rows (columns of the product) of K halves. It is cut into panels of up to 64 halves; within a panel a
// row is `kPitch` bytes, and 16-byte chunks are permuted by three, two or one bits of their address (the 128-, 64- and
// 32-byte swizzles of Hopper's wgmma), so that the eight rows that an instruction reads at once lie in different banks.
#pragma once

#include "hd.h"

namespace flmoe::fused {

template <int kRows, int kDepth>
struct Operand {
  static_assert(kRows % 8 == 0, "the swizzle repeats every eight rows");
  static_assert(kDepth % 16 == 0, "an instruction multiplies sixteen halves");
  static constexpr int kN = kRows;
  static constexpr int kK = kDepth;
  static constexpr int kPanel = kDepth < 64 ? kDepth : 64;  // halves
  static constexpr int kPitch = 2 * kPanel;                 // bytes
  static_assert(kPitch == 32 || kPitch == 64 || kPitch == 128, "a panel is 16, 32 or 64 halves wide");
  static_assert(kDepth % kPanel == 0, "panels are whole");
  static constexpr int kPanelBytes = kRows * kPitch;
  static constexpr int kBytes = kRows * kDepth * 2;

  FLMOE_HD static int swizzled(int address) { return address ^ (((address >> 7) & (kPitch / 16 - 1)) << 4); }

  // Byte of half k of row n. Pairs of halves stay together when k is even, sixteen bytes when it is a multiple of 8.
  FLMOE_HD static int offset(int n, int k) {
    return k / kPanel * kPanelBytes + swizzled(n * kPitch + 2 * (k % kPanel));
  }
};

}  // namespace flmoe::fused
