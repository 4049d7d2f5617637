// Vectors of kLanes floats on the compiler's own vector types, so that one text serves every instruction level. Each
// level includes it in a namespace of its own: no function compiled for a newer machine can be linked into an older
// level's code.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "shape.h"

namespace flmoe::cpu::FLMOE_LEVEL {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kParts = kCell / kLanes;  // vectors of one cell's row

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef float LooseVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

FLMOE_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
FLMOE_INLINE void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
FLMOE_INLINE Vec splat(float x) { return x - Vec{}; }
FLMOE_INLINE Ints bits(Vec v) { return __builtin_bit_cast(Ints, v); }
FLMOE_INLINE Vec floats(Ints v) { return __builtin_bit_cast(Vec, v); }

FLMOE_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

FLMOE_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}

FLMOE_INLINE float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

FLMOE_INLINE bool any_above(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#else
  const Ints above = a > b;
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= above[i] != 0;
  return any;
#endif
}

// 1 / x for x in [1, 2^20], to two roundings.
FLMOE_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec guess = _mm512_rcp14_ps(x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// 2^x with relative error below 2.5e-7 on [-125, 126]; smaller x gives at most 2^-125.
FLMOE_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
  // x = floor(x) + f, 2^f by a minimax polynomial, and one instruction that multiplies by 2^floor(x).
  const Vec f = _mm512_reduce_ps(x, 0x09);
  Vec p = splat(1.877576688e-3f);
  p = p * f + 8.989340330e-3f;
  p = p * f + 5.582631756e-2f;
  p = p * f + 2.401536174e-1f;
  p = p * f + 6.931530731e-1f;
  p = p * f + 9.999999251e-1f;
  return _mm512_scalef_ps(p, x);
#else
  x = maximum(x, splat(-125.0f));
  // Adding 1.5 * 2^23 rounds to an integer and leaves that integer in the low bits.
  const Vec shifted = x + 0x1.8p23f;
  const Vec f = x - (shifted - 0x1.8p23f);
  Vec p = splat(1.53453458e-4f);
  p = p * f + 1.33999315e-3f;
  p = p * f + 9.61848896e-3f;
  p = p * f + 5.55032878e-2f;
  p = p * f + 2.40226469e-1f;
  p = p * f + 6.93147206e-1f;
  p = p * f + 1.0f;
  return floats(bits(p) + (bits(shifted) << 23));
#endif
}

// x * Phi(x), the erf form of GELU, with absolute error below 1.3e-7 * max(1, |x|): 1.28e-7 at most over every third float
// from 2^-11 to 18 of either sign, at x = 0.86 with AVX-512's reciprocal.
//
// gelu(x) = max(x, 0) - a * Phi(-a) with a = |x|, and Phi(-a) = exp(-a^2 / 2) * m(1 / (1 + 0.275 a)) where m is a minimax
// polynomial of degree 6 (error 9e-9 of a * Phi(-a)): no cancellation, and the tail goes to zero by itself.
FLMOE_INLINE Vec gelu(Vec x) {
  const Vec a = floats(bits(x) & 0x7fffffff);
  const Vec u = reciprocal(a * 0.275f + 1.0f);
  Vec m = splat(-0.113098657f);
  m = m * u + 0.445053504f;
  m = m * u - 0.320102515f;
  m = m * u + 0.325452317f;
  m = m * u + 0.0453894031f;
  m = m * u + 0.117306116f;
  const Vec tail = exp2(a * a * -0.721347520f) * (m * u) * a;
  return maximum(x, Vec{}) - tail;
}

// Denormals become zero: they are far below any rounding here, and a product of one costs hundreds of cycles. Returns the
// calling thread's former state, which must be restored.
inline unsigned flush_denormals() {
#if defined(__x86_64__)
  const unsigned former = _mm_getcsr();
  _mm_setcsr(former | 0x8040);
  return former;
#else
  return 0;
#endif
}

inline void restore_denormals([[maybe_unused]] unsigned former) {
#if defined(__x86_64__)
  _mm_setcsr(former);
#endif
}

// Which operand of a product passes through the first-level cache once, so that it need not push the other one out.
enum class Flow { left, right };

// One row of one cell.
struct Row {
  Vec part[kParts];
};

FLMOE_INLINE Row load_row(const float* p) {
  Row row;
  for (int i = 0; i < kParts; ++i) row.part[i] = load(p + i * kLanes);
  return row;
}

FLMOE_INLINE void store_row(float* p, const Row& row) {
  for (int i = 0; i < kParts; ++i) store(p + i * kLanes, row.part[i]);
}

}  // namespace flmoe::cpu::FLMOE_LEVEL
