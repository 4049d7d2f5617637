// What the thin kernels share: a capped grid whose threads stride over the work, and the code of a failed launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flmoe {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
static_assert(kThreads % kWarp == 0, "a warp must not straddle blocks");

// Blocks for a grid-stride kernel: the grid is capped, the loop covers the rest.
inline unsigned blocks_for(std::int64_t threads) {
  constexpr std::int64_t kMost = std::int64_t{1} << 20;
  const std::int64_t blocks = (threads + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMost ? blocks : kMost);
}

__device__ inline std::int64_t first_index() { return std::int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ inline std::int64_t grid_stride() { return std::int64_t{gridDim.x} * kThreads; }

inline int launched() { return static_cast<int>(cudaGetLastError()); }

// A block's threads as the group that works on it (group.h).
struct Block {
  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ void sync() const { __syncthreads(); }
};

}  // namespace
}  // namespace flmoe
