// One source for host and device: FLMOE_HD functions are plain arithmetic, compiled by g++ for the CPU and by nvcc for
// both sides, so that the tests run on the host check the very text that runs on a GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FLMOE_HD __host__ __device__ __forceinline__
#else
#define FLMOE_HD inline
#endif
