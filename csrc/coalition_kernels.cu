// Kernels over coalition words: each computes an index, calls the function that the host shares, and stores.
#include "kernels.cuh"
#include "launch.h"

namespace flmoe {
namespace {

// Grid: one thread a byte.
__global__ void __launch_bounds__(kThreads)
    coalition_unpack(const std::uint64_t* __restrict__ words, std::uint8_t* __restrict__ bytes,
                     std::int64_t coalitions, std::int64_t players) {
  const std::int64_t width = words_for(players);
  for (std::int64_t i = first_index(); i < coalitions * players; i += grid_stride()) {
    bytes[i] = test_player(words + i / players * width, i % players) ? 1 : 0;
  }
}

// Grid: one thread an output word.
__global__ void __launch_bounds__(kThreads)
    coalition_toggle(const std::uint64_t* __restrict__ words, const std::int64_t* __restrict__ sets,
                     std::uint64_t* __restrict__ out, std::int64_t coalitions, std::int64_t width, std::int64_t groups,
                     std::int64_t size) {
  for (std::int64_t i = first_index(); i < coalitions * groups * width; i += grid_stride()) {
    const std::int64_t w = i % width;
    const std::int64_t row = i / width;
    const std::int64_t* set = sets + row % groups * size;
    std::uint64_t word = words[row / groups * width + w];
    for (std::int64_t s = 0; s < size; ++s) word ^= toggle_mask(set[s], w);
    out[i] = word;
  }
}

// Grid: one thread a coalition.
__global__ void __launch_bounds__(kThreads)
    coalition_popcount(const std::uint64_t* __restrict__ words, std::int64_t* __restrict__ counts,
                       std::int64_t coalitions, std::int64_t width) {
  for (std::int64_t i = first_index(); i < coalitions; i += grid_stride()) {
    counts[i] = popcount(words + i * width, width);
  }
}

__device__ void store_word(const Draw& draw, std::int64_t unit, std::int64_t w, std::int64_t players,
                           std::uint64_t word, std::uint64_t* words, double* sizes) {
  const std::int64_t width = words_for(players);
  std::uint64_t* row = words + unit * width * rows_per_unit(draw);
  row[w] = word;
  if (draw.antithetic) row[width + w] = ~word & valid_bits(players, w);
  if (w == 0) sizes[unit] = unit_size(draw, unit);
}

// Grid: one thread a word of one unit, for the modes with independent U.
__global__ void __launch_bounds__(kThreads)
    coalition_sliced_contexts(Draw draw, std::int64_t players, std::uint64_t* __restrict__ words,
                              double* __restrict__ sizes) {
  const std::int64_t width = words_for(players);
  for (std::int64_t i = first_index(); i < draw.units * width; i += grid_stride()) {
    const std::int64_t unit = i / width;
    const std::int64_t w = i % width;
    const std::uint64_t word = sliced_word(draw, unit, w, players, threshold(unit_size(draw, unit)));
    store_word(draw, unit, w, players, word, words, sizes);
  }
}

// Grid: one warp a word of one unit; a lane decides two players, and two ballots make the word. Each lane recomputes its
// player's ranks, so no element depends on another and no memory is needed between them.
__global__ void __launch_bounds__(kThreads)
    coalition_contexts(Draw draw, std::int64_t players, std::uint64_t* __restrict__ words,
                       double* __restrict__ sizes) {
  const std::int64_t width = words_for(players);
  const int lane = threadIdx.x % kWarp;
  for (std::int64_t i = first_index() / kWarp; i < draw.units * width; i += grid_stride() / kWarp) {
    const std::int64_t unit = i / width;
    const std::int64_t w = i % width;
    std::uint64_t word = 0;
    for (int half = 0; half < 2; ++half) {
      const std::int64_t player = 64 * w + kWarp * half + lane;
      const bool member = player < players && is_member(draw, unit, player, players);
      word |= std::uint64_t{__ballot_sync(0xFFFFFFFFu, member)} << (kWarp * half);
    }
    if (lane == 0) store_word(draw, unit, w, players, word, words, sizes);
  }
}

}  // namespace

int launch_unpack(const std::uint64_t* words, std::uint8_t* bytes, std::int64_t coalitions, std::int64_t players,
                  void* stream) {
  if (coalitions == 0 || players == 0) return 0;
  coalition_unpack<<<blocks_for(coalitions * players), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      words, bytes, coalitions, players);
  return launched();
}

int launch_toggle(const std::uint64_t* words, const std::int64_t* sets, std::uint64_t* out, std::int64_t coalitions,
                  std::int64_t width, std::int64_t groups, std::int64_t size, void* stream) {
  if (coalitions == 0 || width == 0 || groups == 0) return 0;
  coalition_toggle<<<blocks_for(coalitions * groups * width), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      words, sets, out, coalitions, width, groups, size);
  return launched();
}

int launch_popcount(const std::uint64_t* words, std::int64_t* counts, std::int64_t coalitions, std::int64_t width,
                    void* stream) {
  if (coalitions == 0) return 0;
  coalition_popcount<<<blocks_for(coalitions), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(words, counts,
                                                                                                coalitions, width);
  return launched();
}

int launch_contexts(const Draw& draw, std::int64_t players, std::uint64_t* words, double* sizes, void* stream) {
  if (draw.units == 0 || players == 0) return 0;
  const std::int64_t count = draw.units * words_for(players);
  if (is_hypercube(draw.mode)) {
    coalition_contexts<<<blocks_for(count * kWarp), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(draw, players,
                                                                                                     words, sizes);
  } else {
    coalition_sliced_contexts<<<blocks_for(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(draw, players,
                                                                                                    words, sizes);
  }
  return launched();
}

const char* error_name(int code) { return cudaGetErrorName(static_cast<cudaError_t>(code)); }
const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace flmoe
