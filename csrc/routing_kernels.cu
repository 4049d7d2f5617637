// Kernels of the routing: weights of every coalition, and the mixture of the experts' logits.
#include "kernels.cuh"
#include "launch.h"

namespace flmoe {
namespace {

// Grid: one block a coalition; two rows of doubles in shared memory.
__global__ void __launch_bounds__(kThreads)
    coalition_route(Router<double> router, const std::uint64_t* __restrict__ words, double* __restrict__ weights,
                    std::int64_t coalitions, std::int64_t width) {
  extern __shared__ double rows[];
  const int experts = router.network[router.layers - 1].out;
  for (std::int64_t c = blockIdx.x; c < coalitions; c += gridDim.x) {
    route(router, words + c * width, Block{}, rows, weights + c * experts);
  }
}

// Grid: one thread a logit of a mixture.
__global__ void __launch_bounds__(kThreads)
    coalition_mixture(const double* __restrict__ logits, const double* __restrict__ weights,
                      double* __restrict__ mixtures, std::int64_t coalitions, int experts, int classes) {
  for (std::int64_t i = first_index(); i < coalitions * classes; i += grid_stride()) {
    const std::int64_t c = i / classes;
    mixtures[i] = mixture(logits + c * experts * classes, weights + c * experts, experts, classes,
                          static_cast<int>(i % classes));
  }
}

}  // namespace

int launch_route(const Router<double>& router, const std::uint64_t* words, double* weights, std::int64_t coalitions,
                 std::int64_t players, void* stream) {
  if (coalitions == 0) return 0;
  constexpr std::int64_t kMostBlocks = 1 << 16;
  const std::size_t shared = 2 * sizeof(double) * static_cast<std::size_t>(router.widest());
  // More shared memory than every device grants unasked has to be asked for; more than there is is an error here.
  const cudaError_t granted =
      cudaFuncSetAttribute(coalition_route, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (granted != cudaSuccess) return static_cast<int>(cudaGetLastError());
  const auto blocks = static_cast<unsigned>(coalitions < kMostBlocks ? coalitions : kMostBlocks);
  coalition_route<<<blocks, kThreads, shared, static_cast<cudaStream_t>(stream)>>>(router, words, weights, coalitions,
                                                                                   words_for(players));
  return launched();
}

int launch_mixture(const double* logits, const double* weights, double* mixtures, std::int64_t coalitions, int experts,
                   int classes, void* stream) {
  if (coalitions == 0 || classes == 0) return 0;
  coalition_mixture<<<blocks_for(coalitions * classes), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      logits, weights, mixtures, coalitions, experts, classes);
  return launched();
}

}  // namespace flmoe
