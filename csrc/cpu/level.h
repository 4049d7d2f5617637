// Makes one instruction level's table from the templates, in the file that defines FLMOE_LEVEL.
#pragma once

#include "unit.h"

namespace flmoe::cpu::FLMOE_LEVEL {

inline void pack_matrix(const float* from, int rows, int columns, float* to) {
  pack_rows([&](int i) { return from + static_cast<std::ptrdiff_t>(i) * columns; }, rows, columns, to);
}

inline void run_unit(const Model& model, const Call& call, int expert, std::int64_t first, int count, char* workspace) {
  Unit(model, call, expert, workspace).run(first, count);
}

template <class Function>
inline void each(const float* x, float* y, std::int64_t count, Function function) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::size_t bytes = sizeof(float) * (count - i < kLanes ? count - i : kLanes);
    Vec v = {};
    std::memcpy(&v, x + i, bytes);
    v = function(v);
    std::memcpy(y + i, &v, bytes);
  }
}

inline void exp2_all(const float* x, float* y, std::int64_t count) {
  each(x, y, count, [](Vec v) __attribute__((always_inline)) { return exp2(v); });
}

inline void gelu_all(const float* x, float* y, std::int64_t count) {
  each(x, y, count, [](Vec v) __attribute__((always_inline)) { return gelu(v); });
}

// The workspace holds the left operand (m rounded up to kRows + 16, k), the packed right one (k, n) and one product.
inline void matmul(const float* a, const float* b, float* c, int m, int k, int n, char* workspace) {
  auto* left = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(workspace) + 63) / 64 * 64);
  float* right = left + static_cast<std::ptrdiff_t>((m + 15) / 16 * 16) * k;
  float* product = right + static_cast<std::ptrdiff_t>(k) * n;
  pack_matrix(b, k, n, right);
  for (int r = 0; r < m; ++r) {
    for (int j = 0; j < k; j += kCell) put(left, k, r, j, load_row(a + static_cast<std::ptrdiff_t>(r) * k + j));
  }
  gemm(left, k, m, right, n, product, [&](int row, int count, int column, const float* x) {
    for (int r = 0; r < count; ++r) {
      store_row(c + static_cast<std::ptrdiff_t>(row + r) * n + column, load_row(x + r * kCell));
    }
  });
}

constexpr Level make_level(const char* name, const char* arithmetic) {
  return {name, arithmetic, pack_matrix, Unit::bytes, run_unit, begin_thread, end_thread, exp2_all, gelu_all, matmul};
}

}  // namespace flmoe::cpu::FLMOE_LEVEL
