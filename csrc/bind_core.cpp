// The corner grid, its reduction, routing, gates and tiles for Python: the host's versions, and with CUDA the kernels
// around the same functions, under names that begin with cuda_ and with a stream as their last argument.
#include <pybind11/stl.h>

#include <limits>
#include <tuple>
#include <vector>

#include "binding.h"
#include "corners.h"
#include "gates.h"
#include "reduce.h"
#include "route.h"
#include "tiles.h"

namespace py = pybind11;
using std::int64_t;
using std::uint64_t;
using std::uint8_t;
using std::uintptr_t;

namespace flmoe {
namespace {

// Numbers on the host must lie in least .. below - 1; those on a device are the caller's to check.
void check_range(const char* function, const char* name, const int64_t* numbers, int64_t count, int64_t least,
                 int64_t below) {
  for (int64_t i = 0; i < count; ++i) {
    if (numbers[i] >= least && numbers[i] < below) continue;
    fail(function, std::string(name) + " has " + std::to_string(numbers[i]) + ", expected " + std::to_string(least) +
                       ".." + std::to_string(below - 1));
  }
}

// ---- corner grids

CornerGrid make_grid(const char* function, uintptr_t pairs, uintptr_t players, uintptr_t single, int64_t pair_count,
                     int64_t player_count) {
  check_size(function, "pair_count", pair_count);
  check_size(function, "player_count", player_count);
  return {pointer<const int64_t>(function, "pairs", pairs, 2 * pair_count),
          pointer<const int64_t>(function, "players", players, player_count),
          pointer<const int64_t>(function, "single", single, 2 * pair_count), pair_count, player_count};
}

void check_grid(const char* function, const CornerGrid& grid, int64_t players) {
  check_range(function, "pairs", grid.pairs, 2 * grid.pair_count, 0, players);
  check_range(function, "players", grid.players, grid.player_count, 0, players);
  check_range(function, "single", grid.single, 2 * grid.pair_count, 1, 1 + grid.player_count);
}

int64_t number_corners_of(uintptr_t pairs, int64_t pair_count, uintptr_t players, uintptr_t single) {
  const char* function = "number_corners";
  check_size(function, "pair_count", pair_count);
  return number_corners(pointer<const int64_t>(function, "pairs", pairs, 2 * pair_count), pair_count,
                        pointer<int64_t>(function, "players", players, 2 * pair_count),
                        pointer<int64_t>(function, "single", single, 2 * pair_count));
}

void product_pairs(uintptr_t rows, int64_t row_count, uintptr_t columns, int64_t column_count, uintptr_t pairs) {
  const char* function = "product_pairs";
  check_size(function, "row_count", row_count);
  check_size(function, "column_count", column_count);
  const auto* first = pointer<const int64_t>(function, "rows", rows, row_count);
  const auto* second = pointer<const int64_t>(function, "columns", columns, column_count);
  auto* to = pointer<int64_t>(function, "pairs", pairs, 2 * row_count * column_count);
  for (int64_t p = 0; p < row_count * column_count; ++p) product_pair(first, second, column_count, p, to + 2 * p);
}

struct CornerWords {
  const uint64_t* words;
  uint64_t* out;
};

CornerWords corner_arrays(const char* function, const CornerGrid& grid, uintptr_t words, uintptr_t out,
                          int64_t contexts, int64_t players) {
  check_size(function, "contexts", contexts);
  check_size(function, "n", players);
  const int64_t width = words_for(players);
  return {pointer<const uint64_t>(function, "words", words, contexts * width),
          pointer<uint64_t>(function, "out", out, contexts * corner_count(grid) * width)};
}

void corner_words(uintptr_t pairs, uintptr_t players, uintptr_t single, int64_t pair_count, int64_t player_count,
                  uintptr_t words, uintptr_t out, int64_t contexts, int64_t n) {
  const char* function = "corner_words";
  const CornerGrid grid = make_grid(function, pairs, players, single, pair_count, player_count);
  const CornerWords arrays = corner_arrays(function, grid, words, out, contexts, n);
  check_grid(function, grid, n);
  const int64_t width = words_for(n), corners = corner_count(grid);
  std::vector<uint64_t> masks(static_cast<std::size_t>(corners * width));
  for (int64_t i = 0; i < corners * width; ++i) {
    masks[static_cast<std::size_t>(i)] = corner_mask(grid, i / width, i % width);
  }
  uint64_t* to = arrays.out;
  for (int64_t k = 0; k < contexts; ++k) {
    const uint64_t* context = arrays.words + k * width;
    for (int64_t i = 0; i < corners * width; ++i) *to++ = context[i % width] ^ masks[static_cast<std::size_t>(i)];
  }
}

Reduction make_reduction(const char* function, const CornerGrid& grid, uintptr_t words, uintptr_t values,
                         uintptr_t second, uintptr_t gaps, uintptr_t defined, uintptr_t moments, uintptr_t scratch,
                         int64_t contexts, int64_t outputs, int64_t players, double least, int64_t scratch_runs) {
  check_size(function, "contexts", contexts);
  check_size(function, "outputs", outputs);
  check_size(function, "n", players);
  const int64_t samples = grid.pair_count * outputs;
  return {pointer<const uint64_t>(function, "words", words, contexts * words_for(players)),
          pointer<const double>(function, "values", values, contexts * corner_count(grid) * outputs),
          pointer<double>(function, "second", second, contexts * samples),
          pointer<double>(function, "gaps", gaps, kGaps * contexts * samples),
          pointer<uint8_t>(function, "defined", defined, contexts * samples),
          pointer<double>(function, "moments", moments, 2 * samples),
          pointer<double>(function, "scratch", scratch, 2 * scratch_runs * samples),
          contexts,
          outputs,
          players,
          least};
}

void reduce_corners_of(uintptr_t pairs, uintptr_t players, uintptr_t single, int64_t pair_count, int64_t player_count,
                       uintptr_t words, uintptr_t values, uintptr_t second, uintptr_t gaps, uintptr_t defined,
                       uintptr_t moments, int64_t contexts, int64_t outputs, int64_t n, double least) {
  const char* function = "reduce_corners";
  const CornerGrid grid = make_grid(function, pairs, players, single, pair_count, player_count);
  std::vector<double> scratch(static_cast<std::size_t>(2 * pair_count * (outputs > 0 ? outputs : 0)));
  const Reduction to =
      make_reduction(function, grid, words, values, second, gaps, defined, moments,
                     reinterpret_cast<uintptr_t>(scratch.data()), contexts, outputs, n, least, 1);
  check_grid(function, grid, n);
  reduce_corners(grid, to);
}

// ---- routing

using Layers = std::vector<std::tuple<uintptr_t, uintptr_t, int>>;  // weight, bias, width out

Router<double> make_router(const char* function, uintptr_t absent, uintptr_t step, uintptr_t players, int64_t n,
                           int modalities, int hidden, bool normalised, double temperature, const Layers& layers) {
  if (modalities < 1 || hidden < 1) fail(function, "modalities and hidden must be positive");
  if (layers.empty() || layers.size() > kMostRoutingLayers) {
    fail(function, std::to_string(layers.size()) + " layers, expected 1.." + std::to_string(kMostRoutingLayers));
  }
  Router<double> router{};
  router.absent = pointer<const double>(function, "absent", absent, int64_t{modalities} * hidden);
  router.step = pointer<const double>(function, "step", step, n * hidden);
  router.players = pointer<const int64_t>(function, "players", players, modalities + 1);
  router.modalities = modalities;
  router.hidden = hidden;
  router.normalised = normalised;
  router.temperature = temperature;
  for (const auto& [weight, bias, out] : layers) {
    if (out < 1) fail(function, "a layer of width " + std::to_string(out));
    router.network[router.layers++] = {pointer<const double>(function, "weight", weight, 1),
                                       pointer<const double>(function, "bias", bias, 1), out};
  }
  return router;
}

void route_of(uintptr_t absent, uintptr_t step, uintptr_t players, int64_t n, int modalities, int hidden,
              bool normalised, double temperature, const Layers& layers, uintptr_t words, uintptr_t weights,
              int64_t coalitions) {
  const char* function = "route";
  check_size(function, "coalitions", coalitions);
  check_size(function, "n", n);
  const Router<double> router =
      make_router(function, absent, step, players, n, modalities, hidden, normalised, temperature, layers);
  check_range(function, "players", router.players, modalities + 1, 0, n + 1);
  const int64_t width = words_for(n), experts = router.network[router.layers - 1].out;
  const auto* from = pointer<const uint64_t>(function, "words", words, coalitions * width);
  auto* to = pointer<double>(function, "weights", weights, coalitions * experts);
  std::vector<double> rows(2 * static_cast<std::size_t>(router.widest()));
  for (int64_t c = 0; c < coalitions; ++c) route(router, from + c * width, Alone{}, rows.data(), to + c * experts);
}

struct Mixture {
  const double* logits;
  const double* weights;
  double* mixtures;
};

Mixture mixture_arrays(const char* function, uintptr_t logits, uintptr_t weights, uintptr_t mixtures,
                       int64_t coalitions, int experts, int classes) {
  check_size(function, "coalitions", coalitions);
  check_size(function, "experts", experts);
  check_size(function, "classes", classes);
  return {pointer<const double>(function, "logits", logits, coalitions * experts * classes),
          pointer<const double>(function, "weights", weights, coalitions * experts),
          pointer<double>(function, "mixtures", mixtures, coalitions * classes)};
}

void mixture_of(uintptr_t logits, uintptr_t weights, uintptr_t mixtures, int64_t coalitions, int experts, int classes) {
  const Mixture arrays = mixture_arrays("mixture", logits, weights, mixtures, coalitions, experts, classes);
  for (int64_t c = 0; c < coalitions; ++c) {
    for (int k = 0; k < classes; ++k) {
      arrays.mixtures[c * classes + k] = mixture(arrays.logits + c * experts * classes, arrays.weights + c * experts,
                                                 experts, classes, k);
    }
  }
}

// ---- gates and tiles

Gate gate_of(const char* function, int gate) {
  if (gate < 0 || gate >= kGates) fail(function, "unknown gate " + std::to_string(gate));
  return static_cast<Gate>(gate);
}

template <class T>
struct Choice {
  Gate gate;
  const T* logits;
  int64_t* chosen;
  T* scores;
};

template <class T>
Choice<T> make_choice(const char* function, int gate, uintptr_t logits, uintptr_t chosen, uintptr_t scores,
                      int64_t rows, int networks, int slots) {
  check_size(function, "rows", rows);
  if (slots < 1 || slots > networks) fail(function, "slots must be between 1 and networks");
  return {gate_of(function, gate), pointer<const T>(function, "logits", logits, rows * networks),
          pointer<int64_t>(function, "chosen", chosen, rows * slots),
          pointer<T>(function, "scores", scores, rows * slots)};
}

template <class T>
void choose_of(int gate, uintptr_t logits, uintptr_t chosen, uintptr_t scores, int64_t rows, int networks, int slots) {
  const auto made = make_choice<T>("gate_choose", gate, logits, chosen, scores, rows, networks, slots);
  for (int64_t r = 0; r < rows; ++r) {
    choose(made.gate, made.logits + r * networks, networks, slots, made.chosen + r * slots, made.scores + r * slots);
  }
}

int64_t room_of(int gate, int64_t tokens, int64_t networks, bool training) {
  check_size("slots_per_network", "tokens", tokens);
  if (networks < 1) fail("slots_per_network", "networks must be positive");
  return slots_per_network(gate_of("slots_per_network", gate), tokens, networks, training);
}

Slots make_slots(const char* function, uintptr_t chosen, uintptr_t blocks, uintptr_t room, int64_t experts,
                 int64_t rows, int64_t slots, int64_t networks, int64_t block_count) {
  check_size(function, "experts", experts);
  check_size(function, "rows", rows);
  check_size(function, "slots", slots);
  check_size(function, "networks", networks);
  check_size(function, "block_count", block_count);
  return {pointer<const int64_t>(function, "chosen", chosen, experts * rows * slots),
          pointer<const int64_t>(function, "blocks", blocks, block_count + 1),
          reinterpret_cast<const int64_t*>(room),  // null: no limit
          experts,
          rows,
          slots,
          networks,
          block_count};
}

void sort_slots_of(uintptr_t chosen, uintptr_t blocks, uintptr_t room, int64_t experts, int64_t rows, int64_t slots,
                   int64_t networks, int64_t block_count, uintptr_t run_first, uintptr_t sorted, uintptr_t place) {
  const char* function = "sort_slots";
  const Slots made = make_slots(function, chosen, blocks, room, experts, rows, slots, networks, block_count);
  const int64_t count = slot_count(made);
  check_range(function, "chosen", made.chosen, count, std::numeric_limits<int64_t>::min(), networks);
  check_range(function, "blocks", made.blocks, block_count + 1, 0, rows + 1);
  for (int64_t b = 0; b < block_count; ++b) {
    if (made.blocks[b] > made.blocks[b + 1]) fail(function, "blocks must ascend");
  }
  sort_slots(made, pointer<int64_t>(function, "run_first", run_first, run_count(made) + 1),
             pointer<int64_t>(function, "sorted", sorted, count), pointer<int64_t>(function, "place", place, count));
}

void check_tiles(const char* function, int64_t groups, int64_t block_count, int64_t height, int64_t count) {
  check_size(function, "groups", groups);
  check_size(function, "block_count", block_count);
  check_size(function, "count", count);
  if (height < 1) fail(function, "height must be positive");
}

void tile_map(uintptr_t run_first, int64_t groups, int64_t block_count, int64_t height, uintptr_t first_row,
              uintptr_t first_tile, uintptr_t map, int64_t count) {
  const char* function = "tile_map";
  check_tiles(function, groups, block_count, height, count);
  auto* row = pointer<int64_t>(function, "first_row", first_row, groups + 1);
  auto* tile = pointer<int64_t>(function, "first_tile", first_tile, groups + 1);
  number_tiles(pointer<const int64_t>(function, "run_first", run_first, groups * block_count + 1), groups, block_count,
               height, row, tile);
  auto* to = pointer<int64_t>(function, "map", map, 3 * count);
  for (int64_t t = 0; t < count; ++t) {
    const Tile found = locate_tile(row, tile, groups, height, t);
    to[3 * t] = found.group;
    to[3 * t + 1] = found.first;
    to[3 * t + 2] = found.rows;
  }
}

#ifdef FLMOE_WITH_CUDA

void cuda_corner_words(uintptr_t pairs, uintptr_t players, uintptr_t single, int64_t pair_count, int64_t player_count,
                       uintptr_t words, uintptr_t out, int64_t contexts, int64_t n, uintptr_t stream) {
  const char* kernel = "corner_words";
  const CornerGrid grid = make_grid(kernel, pairs, players, single, pair_count, player_count);
  const CornerWords arrays = corner_arrays(kernel, grid, words, out, contexts, n);
  check_launch(kernel, launch_corner_words(grid, arrays.words, arrays.out, contexts, n, reinterpret_cast<void*>(stream)));
}

void cuda_reduce_corners(uintptr_t pairs, uintptr_t players, uintptr_t single, int64_t pair_count,
                         int64_t player_count, uintptr_t words, uintptr_t values, uintptr_t second, uintptr_t gaps,
                         uintptr_t defined, uintptr_t moments, uintptr_t scratch, int64_t contexts, int64_t outputs,
                         int64_t n, double least, uintptr_t stream) {
  const char* kernel = "corner_reduce";
  const CornerGrid grid = make_grid(kernel, pairs, players, single, pair_count, player_count);
  const Reduction to = make_reduction(kernel, grid, words, values, second, gaps, defined, moments, scratch, contexts,
                                      outputs, n, least, moment_runs(contexts));
  check_launch(kernel, launch_reduce(grid, to, reinterpret_cast<void*>(stream)));
}

void cuda_route(uintptr_t absent, uintptr_t step, uintptr_t players, int64_t n, int modalities, int hidden,
                bool normalised, double temperature, const Layers& layers, uintptr_t words, uintptr_t weights,
                int64_t coalitions, uintptr_t stream) {
  const char* kernel = "coalition_route";
  check_size(kernel, "coalitions", coalitions);
  check_size(kernel, "n", n);
  const Router<double> router =
      make_router(kernel, absent, step, players, n, modalities, hidden, normalised, temperature, layers);
  const int64_t experts = router.network[router.layers - 1].out;
  check_launch(kernel, launch_route(router, pointer<const uint64_t>(kernel, "words", words, coalitions * words_for(n)),
                                    pointer<double>(kernel, "weights", weights, coalitions * experts), coalitions, n,
                                    reinterpret_cast<void*>(stream)));
}

void cuda_mixture(uintptr_t logits, uintptr_t weights, uintptr_t mixtures, int64_t coalitions, int experts, int classes,
                  uintptr_t stream) {
  const char* kernel = "coalition_mixture";
  const Mixture arrays = mixture_arrays(kernel, logits, weights, mixtures, coalitions, experts, classes);
  check_launch(kernel, launch_mixture(arrays.logits, arrays.weights, arrays.mixtures, coalitions, experts, classes,
                                      reinterpret_cast<void*>(stream)));
}

template <class T>
void cuda_choose(int gate, uintptr_t logits, uintptr_t chosen, uintptr_t scores, int64_t rows, int networks, int slots,
                 uintptr_t stream) {
  const char* kernel = "gate_choose";
  const auto made = make_choice<T>(kernel, gate, logits, chosen, scores, rows, networks, slots);
  check_launch(kernel, launch_choose(made.gate, made.logits, made.chosen, made.scores, rows, networks, slots,
                                     reinterpret_cast<void*>(stream)));
}

void cuda_sort_slots(uintptr_t chosen, uintptr_t blocks, uintptr_t room, int64_t experts, int64_t rows, int64_t slots,
                     int64_t networks, int64_t block_count, uintptr_t run_first, uintptr_t sorted, uintptr_t place,
                     uintptr_t stream) {
  const char* kernel = "slot_place_runs";
  const Slots made = make_slots(kernel, chosen, blocks, room, experts, rows, slots, networks, block_count);
  const int64_t count = slot_count(made);
  check_launch(kernel, launch_sort_slots(made, pointer<int64_t>(kernel, "run_first", run_first, run_count(made) + 1),
                                         pointer<int64_t>(kernel, "sorted", sorted, count),
                                         pointer<int64_t>(kernel, "place", place, count),
                                         reinterpret_cast<void*>(stream)));
}

void cuda_tile_map(uintptr_t run_first, int64_t groups, int64_t block_count, int64_t height, uintptr_t first_row,
                   uintptr_t first_tile, uintptr_t map, int64_t count, uintptr_t stream) {
  const char* kernel = "tile_locate";
  check_tiles(kernel, groups, block_count, height, count);
  check_launch(kernel,
               launch_tiles(pointer<const int64_t>(kernel, "run_first", run_first, groups * block_count + 1), groups,
                            block_count, height, pointer<int64_t>(kernel, "first_row", first_row, groups + 1),
                            pointer<int64_t>(kernel, "first_tile", first_tile, groups + 1),
                            pointer<int64_t>(kernel, "map", map, 3 * count), count, reinterpret_cast<void*>(stream)));
}

#endif  // FLMOE_WITH_CUDA

}  // namespace

void bind_core(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("number_corners", &number_corners_of, release(), py::arg("pairs"), py::arg("pair_count"), py::arg("players"),
        py::arg("single"));
  m.def("product_pairs", &product_pairs, release(), py::arg("rows"), py::arg("row_count"), py::arg("columns"),
        py::arg("column_count"), py::arg("pairs"));
  m.def("corner_words", &corner_words, release(), py::arg("pairs"), py::arg("players"), py::arg("single"),
        py::arg("pair_count"), py::arg("player_count"), py::arg("words"), py::arg("out"), py::arg("contexts"),
        py::arg("n"));
  m.def("reduce_corners", &reduce_corners_of, release(), py::arg("pairs"), py::arg("players"), py::arg("single"),
        py::arg("pair_count"), py::arg("player_count"), py::arg("words"), py::arg("values"), py::arg("second"),
        py::arg("gaps"), py::arg("defined"), py::arg("moments"), py::arg("contexts"), py::arg("outputs"), py::arg("n"),
        py::arg("least"));
  m.def("route", &route_of, release(), py::arg("absent"), py::arg("step"), py::arg("players"), py::arg("n"),
        py::arg("modalities"), py::arg("hidden"), py::arg("normalised"), py::arg("temperature"), py::arg("layers"),
        py::arg("words"), py::arg("weights"), py::arg("coalitions"));
  m.def("mixture", &mixture_of, release(), py::arg("logits"), py::arg("weights"), py::arg("mixtures"),
        py::arg("coalitions"), py::arg("experts"), py::arg("classes"));
  m.def("gate_choose32", &choose_of<float>, release(), py::arg("gate"), py::arg("logits"), py::arg("chosen"),
        py::arg("scores"), py::arg("rows"), py::arg("networks"), py::arg("slots"));
  m.def("gate_choose64", &choose_of<double>, release(), py::arg("gate"), py::arg("logits"), py::arg("chosen"),
        py::arg("scores"), py::arg("rows"), py::arg("networks"), py::arg("slots"));
  m.def("slots_per_network", &room_of, py::arg("gate"), py::arg("tokens"), py::arg("networks"), py::arg("training"));
  m.def("sort_slots", &sort_slots_of, release(), py::arg("chosen"), py::arg("blocks"), py::arg("room"),
        py::arg("experts"), py::arg("rows"), py::arg("slots"), py::arg("networks"), py::arg("block_count"),
        py::arg("run_first"), py::arg("sorted"), py::arg("place"));
  m.def("most_tiles", &most_tiles, py::arg("rows"), py::arg("groups"), py::arg("height"));
  m.def("tile_map", &tile_map, release(), py::arg("run_first"), py::arg("groups"), py::arg("block_count"),
        py::arg("height"), py::arg("first_row"), py::arg("first_tile"), py::arg("map"), py::arg("count"));
#ifdef FLMOE_WITH_CUDA
  m.def("cuda_corner_words", &cuda_corner_words, release(), py::arg("pairs"), py::arg("players"), py::arg("single"),
        py::arg("pair_count"), py::arg("player_count"), py::arg("words"), py::arg("out"), py::arg("contexts"),
        py::arg("n"), py::arg("stream"));
  m.def("cuda_reduce_corners", &cuda_reduce_corners, release(), py::arg("pairs"), py::arg("players"), py::arg("single"),
        py::arg("pair_count"), py::arg("player_count"), py::arg("words"), py::arg("values"), py::arg("second"),
        py::arg("gaps"), py::arg("defined"), py::arg("moments"), py::arg("scratch"), py::arg("contexts"),
        py::arg("outputs"), py::arg("n"), py::arg("least"), py::arg("stream"),
        "scratch: 2 * ceil(contexts / 32) * pairs * outputs doubles.");
  m.def("cuda_route", &cuda_route, release(), py::arg("absent"), py::arg("step"), py::arg("players"), py::arg("n"),
        py::arg("modalities"), py::arg("hidden"), py::arg("normalised"), py::arg("temperature"), py::arg("layers"),
        py::arg("words"), py::arg("weights"), py::arg("coalitions"), py::arg("stream"));
  m.def("cuda_mixture", &cuda_mixture, release(), py::arg("logits"), py::arg("weights"), py::arg("mixtures"),
        py::arg("coalitions"), py::arg("experts"), py::arg("classes"), py::arg("stream"));
  m.def("cuda_gate_choose32", &cuda_choose<float>, release(), py::arg("gate"), py::arg("logits"), py::arg("chosen"),
        py::arg("scores"), py::arg("rows"), py::arg("networks"), py::arg("slots"), py::arg("stream"));
  m.def("cuda_gate_choose64", &cuda_choose<double>, release(), py::arg("gate"), py::arg("logits"), py::arg("chosen"),
        py::arg("scores"), py::arg("rows"), py::arg("networks"), py::arg("slots"), py::arg("stream"));
  m.def("cuda_sort_slots", &cuda_sort_slots, release(), py::arg("chosen"), py::arg("blocks"), py::arg("room"),
        py::arg("experts"), py::arg("rows"), py::arg("slots"), py::arg("networks"), py::arg("block_count"),
        py::arg("run_first"), py::arg("sorted"), py::arg("place"), py::arg("stream"));
  m.def("cuda_tile_map", &cuda_tile_map, release(), py::arg("run_first"), py::arg("groups"), py::arg("block_count"),
        py::arg("height"), py::arg("first_row"), py::arg("first_tile"), py::arg("map"), py::arg("count"),
        py::arg("stream"));
#endif
}

}  // namespace flmoe
