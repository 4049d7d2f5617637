// The fused kernels and the definitions of Width; a source file a width, so that they compile in parallel.
#pragma once

#include "fused.h"
#include "machine.h"

namespace flmoe::fused {

// Grid: as the body says. The body exists where the number of groups is the architecture's.
template <int H, int Terms, int Depth, int Groups>
__global__ void __launch_bounds__(Tile<H, Terms, Groups>::kThreads, 1)
    fused_chain(const __grid_constant__ ChainArgs args) {
  if constexpr (Groups == kBuiltGroups) {
    using T = Tile<H, Terms, Groups>;
    Machine<T> machine;
    chain_block<Machine<T>, T, Heads<T, Depth>>(machine, args, blockIdx.x);
  }
}

template <int H, int Terms, int QueryTerms, int Depth, int Groups>
__global__ void __launch_bounds__(Tile<H, Terms, Groups>::kThreads, 1)
    fused_last(const __grid_constant__ LastArgs args) {
  if constexpr (Groups == kBuiltGroups) {
    using T = Tile<H, Terms, Groups>;
    Machine<T> machine;
    last_block<Machine<T>, T, Heads<T, Depth, QueryTerms>>(machine, args, blockIdx.x);
  }
}

// A kernel built for Hopper has virtual code of 9.0 behind it; one that came from older virtual code has one group.
template <class Kernel>
int built_for_hopper(Kernel* kernel, bool& hopper) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) hopper = attributes.ptxVersion == 90 && attributes.binaryVersion == 90;
  return static_cast<int>(error);
}

template <class T, class Kernel, class Args>
int launch(Kernel* kernel, std::int64_t blocks, const Args& args, void* stream) {
  if (blocks > 0x7FFFFFFF) return static_cast<int>(cudaErrorInvalidConfiguration);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (error != cudaSuccess) return static_cast<int>(error);
  kernel<<<static_cast<unsigned>(blocks), T::kThreads, T::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

template <int H, int Terms, int Depth>
int run(const ChainArgs& args, void* stream) {
  using One = Tile<H, Terms, 1>;
  using Two = Tile<H, Terms, 2>;
  const auto two = &fused_chain<H, Terms, Depth, 2>;
  bool hopper = false;
  const int error = built_for_hopper(two, hopper);
  if (error != 0) return error;
  const Rows& sizes = args.sizes;
  const std::int64_t blocks =
      hopper ? chain_blocks<Two>(sizes.coalitions, sizes.length) : chain_blocks<One>(sizes.coalitions, sizes.length);
  if (hopper) return launch<Two>(two, sizes.experts * blocks, args, stream);
  return launch<One>(&fused_chain<H, Terms, Depth, 1>, sizes.experts * blocks, args, stream);
}

template <int H, int Terms, int QueryTerms, int Depth>
int run(const LastArgs& args, void* stream) {
  using One = Tile<H, Terms, 1>;
  using Two = Tile<H, Terms, 2>;
  const auto two = &fused_last<H, Terms, QueryTerms, Depth, 2>;
  bool hopper = false;
  const int error = built_for_hopper(two, hopper);
  if (error != 0) return error;
  const int blocks = hopper ? last_blocks<Two>(args.sizes.length) : last_blocks<One>(args.sizes.length);
  const std::int64_t all = std::int64_t{args.sizes.experts} * args.sizes.coalitions * blocks;
  if (hopper) return launch<Two>(two, all, args, stream);
  return launch<One>(&fused_last<H, Terms, QueryTerms, Depth, 1>, all, args, stream);
}

// The kernels of one width and terms, by the width of a head.
template <int H, int... Terms, class Args>
int run_depth(int depth, const Args& args, void* stream) {
  if constexpr (H / 4 >= kLeastDepth) {
    if (depth == H / 4) return run<H, Terms..., H / 4>(args, stream);
  }
  if (depth == H / 2) return run<H, Terms..., H / 2>(args, stream);
  return run<H, Terms..., H>(args, stream);
}

template <int H>
int Width<H>::chain(int terms, int depth, const ChainArgs& args, void* stream) {
  return terms == 1 ? run_depth<H, 1>(depth, args, stream) : run_depth<H, 2>(depth, args, stream);
}

template <int H>
int Width<H>::last(int terms, int query_terms, int depth, const LastArgs& args, void* stream) {
  if (terms == 1) return run_depth<H, 1, 1>(depth, args, stream);
  return query_terms == 1 ? run_depth<H, 2, 1>(depth, args, stream) : run_depth<H, 2, 2>(depth, args, stream);
}

template <int H>
int Width<H>::fit(Fit& fit) {
  bool hopper = false;
  int error = built_for_hopper(&fused_chain<H, 1, H, 2>, hopper);
  int device = 0;
  if (error == 0) error = static_cast<int>(cudaGetDevice(&device));
  if (error == 0) {
    error = static_cast<int>(cudaDeviceGetAttribute(&fit.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  }
  if (error != 0) return error;
  fit.shared_bytes = hopper ? Tile<H, 1, 2>::kSharedBytes : Tile<H, 1, 1>::kSharedBytes;
  fit.groups = fit.shared_bytes > fit.shared_limit ? 0 : hopper ? 2 : 1;
  return 0;
}

}  // namespace flmoe::fused
