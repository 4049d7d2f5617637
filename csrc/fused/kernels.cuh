// The fused kernels and the definitions of Width; a source file a width, so that they compile in parallel.
#pragma once

#include "fused.h"
#include "machine.h"

namespace flmoe::fused {

// In the code for one architecture a kernel exists with one number of groups only. The other one is a stub: it stops the
// program where it is launched, and is known beforehand by the static shared memory that only stubs have.
FLMOE_BODY void stub() {
  __shared__ volatile char mark;
  mark = 0;
  __trap();
}

// Grid: as the body says.
template <int H, int Terms, int Depth, int Groups>
__global__ void __launch_bounds__(Tile<H, Terms, Groups>::kThreads, 1)
    fused_chain(const __grid_constant__ ChainArgs args) {
  if constexpr (Groups == kBuiltGroups) {
    using T = Tile<H, Terms, Groups>;
    Machine<T> machine;
    chain_block<Machine<T>, T, Heads<T, Depth>>(machine, args, blockIdx.x);
  } else {
    stub();
  }
}

template <int H, int Terms, int QueryTerms, int Depth, int Groups>
__global__ void __launch_bounds__(Tile<H, Terms, Groups>::kThreads, 1)
    fused_last(const __grid_constant__ LastArgs args) {
  if constexpr (Groups == kBuiltGroups) {
    using T = Tile<H, Terms, Groups>;
    Machine<T> machine;
    last_block<Machine<T>, T, Heads<T, Depth, QueryTerms>>(machine, args, blockIdx.x);
  } else {
    stub();
  }
}

// The code of a call of the runtime. An error is reported here once, and not again by whoever asks the runtime next.
inline int code_of(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return static_cast<int>(error);
}

// Whether the code that the current device runs has the kernel of two groups; that of one is a stub then, else the other.
template <class Kernel>
int built_for_hopper(Kernel* one, Kernel* two, bool& hopper) {
  cudaFuncAttributes of_one, of_two;
  int error = code_of(cudaFuncGetAttributes(&of_one, one));
  if (error == 0) error = code_of(cudaFuncGetAttributes(&of_two, two));
  if (error == 0) hopper = of_two.sharedSizeBytes < of_one.sharedSizeBytes;
  return error;
}

template <class T, class Kernel, class Args>
int launch(Kernel* kernel, std::int64_t blocks, const Args& args, void* stream) {
  if (blocks > 0x7FFFFFFF) return static_cast<int>(cudaErrorInvalidConfiguration);
  const int error =
      code_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes));
  if (error != 0) return error;
  kernel<<<static_cast<unsigned>(blocks), T::kThreads, T::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

template <int H, int Terms, int Depth>
int run(const ChainArgs& args, void* stream) {
  using One = Tile<H, Terms, 1>;
  using Two = Tile<H, Terms, 2>;
  const auto one = &fused_chain<H, Terms, Depth, 1>;
  const auto two = &fused_chain<H, Terms, Depth, 2>;
  bool hopper = false;
  const int error = built_for_hopper(one, two, hopper);
  if (error != 0) return error;
  const Rows& sizes = args.sizes;
  const std::int64_t blocks =
      hopper ? chain_blocks<Two>(sizes.coalitions, sizes.length) : chain_blocks<One>(sizes.coalitions, sizes.length);
  if (hopper) return launch<Two>(two, sizes.experts * blocks, args, stream);
  return launch<One>(one, sizes.experts * blocks, args, stream);
}

template <int H, int Terms, int QueryTerms, int Depth>
int run(const LastArgs& args, void* stream) {
  using One = Tile<H, Terms, 1>;
  using Two = Tile<H, Terms, 2>;
  const auto one = &fused_last<H, Terms, QueryTerms, Depth, 1>;
  const auto two = &fused_last<H, Terms, QueryTerms, Depth, 2>;
  bool hopper = false;
  const int error = built_for_hopper(one, two, hopper);
  if (error != 0) return error;
  const int blocks = hopper ? last_blocks<Two>(args.sizes.length) : last_blocks<One>(args.sizes.length);
  const std::int64_t all = std::int64_t{args.sizes.experts} * args.sizes.coalitions * blocks;
  if (hopper) return launch<Two>(two, all, args, stream);
  return launch<One>(one, all, args, stream);
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
  int error = built_for_hopper(&fused_chain<H, 1, H, 1>, &fused_chain<H, 1, H, 2>, hopper);
  int device = 0;
  if (error == 0) error = code_of(cudaGetDevice(&device));
  if (error == 0) {
    error = code_of(cudaDeviceGetAttribute(&fit.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  }
  if (error != 0) return error;
  fit.shared_bytes = hopper ? Tile<H, 1, 2>::kSharedBytes : Tile<H, 1, 1>::kSharedBytes;
  fit.groups = fit.shared_bytes > fit.shared_limit ? 0 : hopper ? 2 : 1;
  return 0;
}

}  // namespace flmoe::fused
