// Matrix operands as two bfloat16 terms each, multiplied by AMX tiles.
//
// x = hi + lo with both terms rounded to nearest, so x is represented to 2^-17; a product is hi hi + hi lo + lo hi with
// float32 accumulation, and the lo lo that is left out is below 2^-16 of it.
//
// Left operand: 16 x 32 tiles, row of tiles after row of tiles, each tile hi then lo (2 KB). Right operand: panels of 32
// columns, in each for every 32 rows the tiles hi 0, hi 1, lo 0, lo 1 of 16 columns (4 KB); within a tile two consecutive
// rows are interleaved, as the instruction reads them.
#pragma once

#include "simd.h"

namespace flmoe::cpu::FLMOE_LEVEL {

constexpr int kRows = 32;
constexpr int kTile = 256;  // floats' worth of one 1 KB tile

struct Halves {
  __m512i hi, lo;  // 32 bfloat16 each
};

// hi is rounded half up in magnitude, which differs from nearest-even in exact ties only.
FLMOE_INLINE Halves split(const Row& row) {
  const __m512i half = _mm512_set1_epi32(0x8000), top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i a = _mm512_add_epi32(_mm512_castps_si512(row.part[0]), half);
  const __m512i b = _mm512_add_epi32(_mm512_castps_si512(row.part[1]), half);
  const __m512 rest_a = _mm512_sub_ps(row.part[0], _mm512_castsi512_ps(_mm512_and_si512(a, top)));
  const __m512 rest_b = _mm512_sub_ps(row.part[1], _mm512_castsi512_ps(_mm512_and_si512(b, top)));
  const __m512bh low = _mm512_cvtne2ps_pbh(rest_b, rest_a);
  return {_mm512_permutex2var_epi16(a, upper, b), __builtin_bit_cast(__m512i, low)};
}

FLMOE_INLINE void put(float* left, int width, int row, int column, const Row& values) {
  const Halves halves = split(values);
  float* tile = left + (static_cast<std::ptrdiff_t>(row / 16) * (width / kCell) + column / kCell) * (2 * kTile);
  _mm512_store_si512(tile + (row % 16) * 16, halves.hi);
  _mm512_store_si512(tile + kTile + (row % 16) * 16, halves.lo);
}

// Tile registers: 0-3 sums of the 2 x 2 tiles, 4-5 of the left operand, 6-7 of the right one.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline unsigned begin_thread() {
  // Constant memory: the intrinsic tells the compiler of the first bytes only, which could drop stores to the others.
  static constexpr TileConfig config;
  _tile_loadconfig(&config);
  return flush_denormals();
}
inline void end_thread(unsigned former) {
  _tile_release();
  restore_denormals(former);
}

// Share `part` of `parts` of some floats, whole cells, to the L2 cache.
FLMOE_INLINE void prefetch(const float* from, int count, int part, int parts) {
  const int lines = count / 16;
  for (int line = lines * part / parts; line < lines * (part + 1) / parts; ++line) {
    _mm_prefetch(from + 16 * line, _MM_HINT_T1);
  }
}

// The register's number is part of the instruction, so these cannot be functions.
#define FLMOE_LOAD_LEFT(tile, from) \
  if constexpr (flow == Flow::left) _tile_stream_loadd(tile, from, 64); else _tile_loadd(tile, from, 64)
#define FLMOE_LOAD_RIGHT(tile, from) \
  if constexpr (flow == Flow::right) _tile_stream_loadd(tile, from, 64); else _tile_loadd(tile, from, 64)

// c (rows, 32) = or += left[row.., : 32 * depth] @ panel, for row a multiple of kRows and rows <= kRows. `between` is
// called with (step, steps) after every few tile products.
template <Flow flow, class Between>
FLMOE_INLINE void multiply(const float* left, int width, int row, int rows, const float* panel, int depth, float* c,
                           int stride, bool add, Between between) {
  const std::ptrdiff_t next = static_cast<std::ptrdiff_t>(width / kCell) * (2 * kTile);
  const float* a = left + row / 16 * next;
  const int bytes = stride * 4;
  const bool both = rows > 16;
  // The tile intrinsics do not tell the compiler which memory they read: operands must be written by now.
  __asm__ volatile("" ::: "memory");
  if (add) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + 16, bytes);
    if (both) {
      _tile_loadd(2, c + 16 * stride, bytes);
      _tile_loadd(3, c + 16 * stride + 16, bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  if (both) {
    for (int i = 0; i < depth; ++i, a += 2 * kTile, panel += 4 * kTile) {
      FLMOE_LOAD_LEFT(4, a + kTile);
      FLMOE_LOAD_RIGHT(6, panel);
      _tile_dpbf16ps(0, 4, 6);
      FLMOE_LOAD_RIGHT(7, panel + kTile);
      _tile_dpbf16ps(1, 4, 7);
      FLMOE_LOAD_LEFT(5, a + next + kTile);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      between(3 * i, 3 * depth);
      FLMOE_LOAD_LEFT(4, a);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      FLMOE_LOAD_LEFT(5, a + next);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      between(3 * i + 1, 3 * depth);
      FLMOE_LOAD_RIGHT(6, panel + 2 * kTile);
      _tile_dpbf16ps(0, 4, 6);
      FLMOE_LOAD_RIGHT(7, panel + 3 * kTile);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      between(3 * i + 2, 3 * depth);
    }
  } else {
    for (int i = 0; i < depth; ++i, a += 2 * kTile, panel += 4 * kTile) {
      FLMOE_LOAD_LEFT(4, a + kTile);
      FLMOE_LOAD_RIGHT(6, panel);
      _tile_dpbf16ps(0, 4, 6);
      FLMOE_LOAD_RIGHT(7, panel + kTile);
      _tile_dpbf16ps(1, 4, 7);
      FLMOE_LOAD_LEFT(4, a);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      FLMOE_LOAD_RIGHT(6, panel + 2 * kTile);
      _tile_dpbf16ps(0, 4, 6);
      FLMOE_LOAD_RIGHT(7, panel + 3 * kTile);
      _tile_dpbf16ps(1, 4, 7);
      between(i, depth);
    }
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + 16, bytes);
  if (both) {
    _tile_stored(2, c + 16 * stride, bytes);
    _tile_stored(3, c + 16 * stride + 16, bytes);
  }
}

#undef FLMOE_LOAD_LEFT
#undef FLMOE_LOAD_RIGHT

// Two rows of 32 bfloat16 to their 32 interleaved pairs: columns 0-15 and 16-31.
FLMOE_INLINE void interleave(__m512i even, __m512i odd, float* first, float* second) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                       36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_store_si512(first, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_store_si512(second, _mm512_permutex2var_epi16(even, high, odd));
}

// Right operand of `columns` columns whose rows 0..count-1 are at row(i); the others, up to a whole cell, are zero.
template <class RowAt>
inline void pack_rows(RowAt row, int count, int columns, float* to) {
  for (int j = 0; j < columns; j += kCell) {
    for (int i = 0; i < padded(count); i += 2) {
      const Halves even = i < count ? split(load_row(row(i) + j)) : Halves{};
      const Halves odd = i + 1 < count ? split(load_row(row(i + 1) + j)) : Halves{};
      float* cell = to + i / kCell * (4 * kTile) + i % kCell / 2 * 16;
      interleave(even.hi, odd.hi, cell, cell + kTile);
      interleave(even.lo, odd.lo, cell + 2 * kTile, cell + 3 * kTile);
    }
    to += padded(count) * kCell;
  }
}

// Transposes 16 x 16 words; row i goes to to + 16 * i.
FLMOE_INLINE void transpose(const __m512i (&rows)[16], float* to) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  // b[4 q + r] holds, in its 128-bit lane l, column 4 l + r of rows 4 q .. 4 q + 3.
  for (int r = 0; r < 4; ++r) {
    const __m512i low = _mm512_shuffle_i32x4(b[r], b[4 + r], 0x88), high = _mm512_shuffle_i32x4(b[r], b[4 + r], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(b[8 + r], b[12 + r], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(b[8 + r], b[12 + r], 0xdd);
    _mm512_store_si512(to + 16 * r, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_store_si512(to + 16 * (8 + r), _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_store_si512(to + 16 * (4 + r), _mm512_shuffle_i32x4(high, high2, 0x88));
    _mm512_store_si512(to + 16 * (12 + r), _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

// The same operand transposed: its columns 0..count-1 are at row(i), each of `columns` values.
template <class RowAt>
inline void pack_columns(RowAt row, int count, int columns, float* to) {
  for (int j = 0; j < count; j += kCell) {
    for (int k = 0; k < columns; k += kCell, to += 4 * kTile) {
      for (int half = 0; half < 2; ++half) {
        __m512i hi[16], lo[16];
        for (int i = 0; i < 16; ++i) {
          const int column = j + half * 16 + i;
          const Halves halves = column < count ? split(load_row(row(column) + k)) : Halves{};
          hi[i] = halves.hi;
          lo[i] = halves.lo;
        }
        transpose(hi, to + half * kTile);
        transpose(lo, to + (2 + half) * kTile);
      }
    }
  }
}

}  // namespace flmoe::cpu::FLMOE_LEVEL
