// Hopper's product of a tile: 64 rows, whose left operand lies in the registers of four warps, times sixteen rows of N
// columns in shared memory, added to N / 2 numbers a thread. PTX wants every register named, one statement a width.
#pragma once

#include <cstdint>

#include "tile.h"

namespace flmoe::fused {

template <int N>
struct Wgmma;

// Eight columns are four numbers.
#define FLMOE_FOUR(b) "+f"(c[b][0]), "+f"(c[b][1]), "+f"(c[b][2]), "+f"(c[b][3])

template <>
struct Wgmma<16> {
  FLMOE_BODY static void run(float (&c)[2][4], const std::uint32_t (&a)[4], std::uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7"
        "}, {%8, %9, %10, %11}, %12, 1, 1, 1, 0;"
        :
          FLMOE_FOUR(0), FLMOE_FOUR(1)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
  }
};

template <>
struct Wgmma<32> {
  FLMOE_BODY static void run(float (&c)[4][4], const std::uint32_t (&a)[4], std::uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
        :
          FLMOE_FOUR(0), FLMOE_FOUR(1), FLMOE_FOUR(2), FLMOE_FOUR(3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
  }
};

template <>
struct Wgmma<64> {
  FLMOE_BODY static void run(float (&c)[8][4], const std::uint32_t (&a)[4], std::uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
        :
          FLMOE_FOUR(0), FLMOE_FOUR(1), FLMOE_FOUR(2), FLMOE_FOUR(3), FLMOE_FOUR(4), FLMOE_FOUR(5), FLMOE_FOUR(6), FLMOE_FOUR(7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
  }
};

template <>
struct Wgmma<128> {
  FLMOE_BODY static void run(float (&c)[16][4], const std::uint32_t (&a)[4], std::uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
        :
          FLMOE_FOUR(0), FLMOE_FOUR(1), FLMOE_FOUR(2), FLMOE_FOUR(3), FLMOE_FOUR(4), FLMOE_FOUR(5), FLMOE_FOUR(6), FLMOE_FOUR(7),
          FLMOE_FOUR(8), FLMOE_FOUR(9), FLMOE_FOUR(10), FLMOE_FOUR(11), FLMOE_FOUR(12), FLMOE_FOUR(13), FLMOE_FOUR(14), FLMOE_FOUR(15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
  }
};

template <>
struct Wgmma<256> {
  FLMOE_BODY static void run(float (&c)[32][4], const std::uint32_t (&a)[4], std::uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 0;"
        :
          FLMOE_FOUR(0), FLMOE_FOUR(1), FLMOE_FOUR(2), FLMOE_FOUR(3), FLMOE_FOUR(4), FLMOE_FOUR(5), FLMOE_FOUR(6), FLMOE_FOUR(7),
          FLMOE_FOUR(8), FLMOE_FOUR(9), FLMOE_FOUR(10), FLMOE_FOUR(11), FLMOE_FOUR(12), FLMOE_FOUR(13), FLMOE_FOUR(14), FLMOE_FOUR(15),
          FLMOE_FOUR(16), FLMOE_FOUR(17), FLMOE_FOUR(18), FLMOE_FOUR(19), FLMOE_FOUR(20), FLMOE_FOUR(21), FLMOE_FOUR(22), FLMOE_FOUR(23),
          FLMOE_FOUR(24), FLMOE_FOUR(25), FLMOE_FOUR(26), FLMOE_FOUR(27), FLMOE_FOUR(28), FLMOE_FOUR(29), FLMOE_FOUR(30), FLMOE_FOUR(31)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
  }
};

#undef FLMOE_FOUR

}  // namespace flmoe::fused
