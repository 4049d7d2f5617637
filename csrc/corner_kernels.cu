// Kernels over corner grids: their coalitions, and what the values of these say about every pair.
#include "kernels.cuh"
#include "launch.h"

namespace flmoe {
namespace {

// Grid: one thread an output word.
__global__ void __launch_bounds__(kThreads)
    corner_words(CornerGrid grid, const std::uint64_t* __restrict__ words, std::uint64_t* __restrict__ out,
                 std::int64_t contexts, std::int64_t width) {
  const std::int64_t corners = corner_count(grid);
  for (std::int64_t i = first_index(); i < contexts * corners * width; i += grid_stride()) {
    const std::int64_t w = i % width;
    const std::int64_t row = i / width;
    out[i] = words[row / corners * width + w] ^ corner_mask(grid, row % corners, w);
  }
}

// Grid: one thread an output of one pair in one run of contexts.
__global__ void __launch_bounds__(kThreads) corner_reduce(CornerGrid grid, Reduction to) {
  const std::int64_t width = words_for(to.players);
  const std::int64_t samples = grid.pair_count * to.outputs;
  for (std::int64_t i = first_index(); i < moment_runs(to.contexts) * samples; i += grid_stride()) {
    const std::int64_t run = i / samples;
    const std::int64_t pair = i % samples / to.outputs;
    Moments moments{0, 0, 0};
    for (std::int64_t k = run * kMomentRun; k < run * kMomentRun + run_samples(to.contexts, run); ++k) {
      const Corners at = corners_of(grid, pair, to.words + k * width);
      add(moments, reduce_sample(grid, to, k, pair, i % to.outputs, at));
    }
    to.scratch[2 * i] = moments.mean;
    to.scratch[2 * i + 1] = moments.squares;
  }
}

// Grid: one thread an output of one pair.
__global__ void __launch_bounds__(kThreads) corner_merge(Reduction to, std::int64_t samples) {
  for (std::int64_t s = first_index(); s < samples; s += grid_stride()) {
    to.moments[s] = to.moments[samples + s] = 0;
    for (std::int64_t run = 0; run < moment_runs(to.contexts); ++run) {
      const double* part = to.scratch + 2 * (run * samples + s);
      merge_run(to, run, s, part[0], part[1], samples);
    }
  }
}

}  // namespace

int launch_corner_words(const CornerGrid& grid, const std::uint64_t* words, std::uint64_t* out, std::int64_t contexts,
                        std::int64_t players, void* stream) {
  const std::int64_t count = contexts * corner_count(grid) * words_for(players);
  if (count == 0) return 0;
  corner_words<<<blocks_for(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(grid, words, out, contexts,
                                                                                     words_for(players));
  return launched();
}

int launch_reduce(const CornerGrid& grid, const Reduction& reduction, void* stream) {
  const std::int64_t samples = grid.pair_count * reduction.outputs;
  if (samples == 0) return 0;
  const auto on = static_cast<cudaStream_t>(stream);
  const std::int64_t count = moment_runs(reduction.contexts) * samples;
  if (count != 0) {
    corner_reduce<<<blocks_for(count), kThreads, 0, on>>>(grid, reduction);
    if (const int code = launched()) return code;
  }
  corner_merge<<<blocks_for(samples), kThreads, 0, on>>>(reduction, samples);
  return launched();
}

}  // namespace flmoe
