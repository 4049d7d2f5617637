// The CUDA launchers. Pointers are device pointers, `stream` is a cudaStream_t (null: the default stream), and the return
// value is a cudaError code, 0 on success. A launch without work returns 0 and touches no driver.
#pragma once

#include <cstdint>

#include "contexts.h"
#include "corners.h"
#include "gates.h"
#include "reduce.h"
#include "route.h"
#include "tiles.h"

namespace flmoe {

// words (coalitions, W) -> bytes (coalitions, players), each 0 or 1.
int launch_unpack(const std::uint64_t* words, std::uint8_t* bytes, std::int64_t coalitions, std::int64_t players,
                  void* stream);

// words (coalitions, width), sets (groups, size) of players, negative for none -> out (coalitions, groups, width): every
// coalition with every set's players toggled.
int launch_toggle(const std::uint64_t* words, const std::int64_t* sets, std::uint64_t* out, std::int64_t coalitions,
                  std::int64_t width, std::int64_t groups, std::int64_t size, void* stream);

// words (coalitions, width) -> counts (coalitions,).
int launch_popcount(const std::uint64_t* words, std::int64_t* counts, std::int64_t coalitions, std::int64_t width,
                    void* stream);

// -> words (units * rows_per_unit, W), sizes (units,): the bits of draw_contexts.
int launch_contexts(const Draw& draw, std::int64_t players, std::uint64_t* words, double* sizes, void* stream);

// words (contexts, W) -> out (contexts, G, W): every corner of the grid, whose arrays are on the device.
int launch_corner_words(const CornerGrid& grid, const std::uint64_t* words, std::uint64_t* out, std::int64_t contexts,
                        std::int64_t players, void* stream);

// What reduce_corners gives (reduce.h); every array is on the device.
int launch_reduce(const CornerGrid& grid, const Reduction& reduction, void* stream);

// words (coalitions, W) -> weights (coalitions, E); E is the last layer's width. The router's arrays are on the device.
int launch_route(const Router<double>& router, const std::uint64_t* words, double* weights, std::int64_t coalitions,
                 std::int64_t players, void* stream);

// logits (coalitions, E, K), weights (coalitions, E) -> mixtures (coalitions, K).
int launch_mixture(const double* logits, const double* weights, double* mixtures, std::int64_t coalitions, int experts,
                   int classes, void* stream);

// logits (rows, X) -> chosen (rows, slots), scores (rows, slots).
int launch_choose(Gate gate, const float* logits, std::int64_t* chosen, float* scores, std::int64_t rows, int networks,
                  int slots, void* stream);
int launch_choose(Gate gate, const double* logits, std::int64_t* chosen, double* scores, std::int64_t rows,
                  int networks, int slots, void* stream);

// -> run_first (G B + 1,), sorted (room for every slot), place (E, R, k); what sort_slots gives. Arrays on the device.
int launch_sort_slots(const Slots& slots, std::int64_t* run_first, std::int64_t* sorted, std::int64_t* place,
                      void* stream);

// run_first (G B + 1,) -> first_row, first_tile (G + 1,), and map (count, 3): group, first row and rows of each tile.
int launch_tiles(const std::int64_t* run_first, std::int64_t groups, std::int64_t block_count, std::int64_t height,
                 std::int64_t* first_row, std::int64_t* first_tile, std::int64_t* map, std::int64_t count, void* stream);

// The runtime's name and sentence for an error code.
const char* error_name(int code);
const char* error_text(int code);

}  // namespace flmoe
