// Kernels of sparse feed-forward blocks: which networks every row uses, the order in which networks take their slots, and
// the tiles of a product over them. No atomics: the order is that of the rows, whatever the threads do.
#include "kernels.cuh"
#include "launch.h"

namespace flmoe {
namespace {

// Grid: one thread a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gate_choose(Gate gate, const T* __restrict__ logits, std::int64_t* __restrict__ chosen, T* __restrict__ scores,
                std::int64_t rows, int networks, int slots) {
  for (std::int64_t r = first_index(); r < rows; r += grid_stride()) {
    choose(gate, logits + r * networks, networks, slots, chosen + r * slots, scores + r * slots);
  }
}

// Grid: one thread a run.
__global__ void __launch_bounds__(kThreads) slot_count_runs(Slots slots, std::int64_t* __restrict__ lengths) {
  for (std::int64_t run = first_index(); run < run_count(slots); run += grid_stride()) {
    lengths[run] = run_length(slots, run);
  }
}

// The sums of `value(0..i-1)` to `store(i, sum)` for i = 0 .. count, by one block.
template <class Value, class Store>
__device__ void exclusive_sums(std::int64_t count, Value value, Store store) {
  __shared__ std::int64_t sums[2][kThreads];
  const int rank = threadIdx.x;
  std::int64_t before = 0;
  for (std::int64_t start = 0; start <= count; start += kThreads) {
    const std::int64_t i = start + rank;
    const std::int64_t own = i < count ? value(i) : 0;
    int now = 0;
    sums[now][rank] = own;
    __syncthreads();
    for (int reach = 1; reach < kThreads; reach *= 2) {
      sums[1 - now][rank] = sums[now][rank] + (rank >= reach ? sums[now][rank - reach] : 0);
      now = 1 - now;
      __syncthreads();
    }
    if (i <= count) store(i, before + sums[now][rank] - own);
    before += sums[now][kThreads - 1];
    __syncthreads();
  }
}

// Grid: one block. Lengths become first places, in place.
__global__ void __launch_bounds__(kThreads) slot_first_places(std::int64_t* lengths, std::int64_t runs) {
  exclusive_sums(
      runs, [=](std::int64_t i) { return lengths[i]; }, [=](std::int64_t i, std::int64_t sum) { lengths[i] = sum; });
}

// Grid: one thread a run.
__global__ void __launch_bounds__(kThreads)
    slot_place_runs(Slots slots, const std::int64_t* __restrict__ run_first, std::int64_t* __restrict__ sorted,
                    std::int64_t* __restrict__ place) {
  for (std::int64_t run = first_index(); run < run_count(slots); run += grid_stride()) {
    place_run(slots, run, run_first[run], run_first[run + 1], sorted, place);
  }
}

// Grid: one block.
__global__ void __launch_bounds__(kThreads)
    tile_number(const std::int64_t* __restrict__ run_first, std::int64_t groups, std::int64_t block_count,
                std::int64_t height, std::int64_t* __restrict__ first_row, std::int64_t* __restrict__ first_tile) {
  exclusive_sums(
      groups,
      [=](std::int64_t g) { return tiles_for(run_first[(g + 1) * block_count] - run_first[g * block_count], height); },
      [=](std::int64_t g, std::int64_t sum) {
        first_row[g] = run_first[g * block_count];
        first_tile[g] = sum;
      });
}

// Grid: one thread a tile.
__global__ void __launch_bounds__(kThreads)
    tile_locate(const std::int64_t* __restrict__ first_row, const std::int64_t* __restrict__ first_tile,
                std::int64_t groups, std::int64_t height, std::int64_t* __restrict__ map, std::int64_t count) {
  for (std::int64_t t = first_index(); t < count; t += grid_stride()) {
    const Tile tile = locate_tile(first_row, first_tile, groups, height, t);
    map[3 * t] = tile.group;
    map[3 * t + 1] = tile.first;
    map[3 * t + 2] = tile.rows;
  }
}

template <class T>
int choose_rows(Gate gate, const T* logits, std::int64_t* chosen, T* scores, std::int64_t rows, int networks, int slots,
                void* stream) {
  if (rows == 0) return 0;
  gate_choose<<<blocks_for(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(gate, logits, chosen, scores, rows,
                                                                                   networks, slots);
  return launched();
}

}  // namespace

int launch_choose(Gate gate, const float* logits, std::int64_t* chosen, float* scores, std::int64_t rows, int networks,
                  int slots, void* stream) {
  return choose_rows(gate, logits, chosen, scores, rows, networks, slots, stream);
}
int launch_choose(Gate gate, const double* logits, std::int64_t* chosen, double* scores, std::int64_t rows,
                  int networks, int slots, void* stream) {
  return choose_rows(gate, logits, chosen, scores, rows, networks, slots, stream);
}

int launch_sort_slots(const Slots& slots, std::int64_t* run_first, std::int64_t* sorted, std::int64_t* place,
                      void* stream) {
  const std::int64_t runs = run_count(slots);
  const auto on = static_cast<cudaStream_t>(stream);
  if (slot_count(slots) == 0 && runs == 0) return 0;
  // All bits one: -1, where slots that reach no network stay.
  const std::size_t bytes = sizeof(std::int64_t) * static_cast<std::size_t>(slot_count(slots));
  if (bytes != 0) {
    if (const cudaError_t code = cudaMemsetAsync(place, 0xFF, bytes, on)) return static_cast<int>(code);
  }
  if (runs != 0) {
    slot_count_runs<<<blocks_for(runs), kThreads, 0, on>>>(slots, run_first);
    if (const int code = launched()) return code;
  }
  slot_first_places<<<1, kThreads, 0, on>>>(run_first, runs);
  if (const int code = launched()) return code;
  if (runs != 0) slot_place_runs<<<blocks_for(runs), kThreads, 0, on>>>(slots, run_first, sorted, place);
  return launched();
}

int launch_tiles(const std::int64_t* run_first, std::int64_t groups, std::int64_t block_count, std::int64_t height,
                 std::int64_t* first_row, std::int64_t* first_tile, std::int64_t* map, std::int64_t count, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  tile_number<<<1, kThreads, 0, on>>>(run_first, groups, block_count, height, first_row, first_tile);
  if (const int code = launched()) return code;
  if (count != 0) {
    tile_locate<<<blocks_for(count), kThreads, 0, on>>>(first_row, first_tile, groups, height, map, count);
  }
  return launched();
}

}  // namespace flmoe
