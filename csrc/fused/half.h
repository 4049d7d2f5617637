// fp16 as 16 bits, with one rounding (to nearest, ties to even) on host and device.
#pragma once

#include <cstring>

#include "hd.h"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace flmoe::fused {

FLMOE_HD std::uint16_t half_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(x));
#else
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u);   // not a number
  if (magnitude >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);  // rounds past the largest half
  // Bits to drop: 13 of a normal half, more of a subnormal one, whose implicit one becomes a stored one.
  const std::uint32_t exponent = magnitude >> 23;
  if (exponent < 102) return static_cast<std::uint16_t>(sign);  // below half the least subnormal
  const bool normal = exponent >= 113;
  const std::uint32_t kept = normal ? magnitude - (112u << 23) : (magnitude & 0x7FFFFFu) | 0x800000u;
  const std::uint32_t drop = normal ? 13 : 126 - exponent;
  const std::uint32_t rest = kept & ((1u << drop) - 1), middle = 1u << (drop - 1);
  std::uint32_t rounded = kept >> drop;
  rounded += rest > middle || (rest == middle && (rounded & 1));
  return static_cast<std::uint16_t>(sign | rounded);
#endif
}

FLMOE_HD float half_value(std::uint16_t half) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(half));
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 31u, fraction = half & 0x3FFu;
  if (exponent == 0) {
    const float small = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -small : small;
  }
  const std::uint32_t bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | (fraction << 13);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// Two halves in a register, the first in the low bits.
FLMOE_HD std::uint32_t half_pair(float first, float second) {
  return half_bits(first) | (static_cast<std::uint32_t>(half_bits(second)) << 16);
}

FLMOE_HD float first_of(std::uint32_t pair) { return half_value(static_cast<std::uint16_t>(pair)); }
FLMOE_HD float second_of(std::uint32_t pair) { return half_value(static_cast<std::uint16_t>(pair >> 16)); }

}  // namespace flmoe::fused
