// flmoe_fast._C: integers in (pointers, sizes, a stream), RuntimeError out. Shapes and dtypes are checked in Python, where
// every implementation shares the checks; what is checked here is only what would otherwise be undefined behaviour.
// Every call releases the interpreter lock.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "binding.h"
#include "coalition.h"
#include "cpu/bind.h"
#include "draw.h"
#include "fused/bind.h"
#ifdef FLMOE_WITH_CUDA
#include "launch.h"
#endif

namespace py = pybind11;
using std::int64_t;
using std::uint64_t;
using std::uint8_t;
using std::uintptr_t;

namespace {

#ifdef FLMOE_WITH_CUDA
using flmoe::check_launch;
#endif
using flmoe::check_size;
using flmoe::fail;
using flmoe::pointer;

flmoe::Draw make_draw(const char* function, int64_t units, int64_t players, uint64_t seed, int64_t replicate, int mode,
                      bool antithetic) {
  constexpr int64_t kMost = std::numeric_limits<std::uint32_t>::max();  // a counter word
  check_size(function, "units", units);
  check_size(function, "players", players);
  check_size(function, "replicate", replicate);
  if (units > kMost || players > kMost || replicate > kMost) {
    fail(function, "units, players and replicate must be below 2^32");
  }
  if (mode < 0 || mode >= flmoe::kModes) fail(function, "unknown mode " + std::to_string(mode));
  return {seed, static_cast<std::uint32_t>(replicate), static_cast<flmoe::Mode>(mode), antithetic, units};
}

void pack(uintptr_t bytes, uintptr_t words, int64_t coalitions, int64_t players) {
  check_size("pack", "coalitions", coalitions);
  check_size("pack", "players", players);
  const int64_t width = flmoe::words_for(players);
  const auto* from = pointer<const uint8_t>("pack", "bytes", bytes, coalitions * players);
  auto* to = pointer<uint64_t>("pack", "words", words, coalitions * width);
  for (int64_t c = 0; c < coalitions; ++c) flmoe::pack(from + c * players, to + c * width, players);
}

void unpack(uintptr_t words, uintptr_t bytes, int64_t coalitions, int64_t players) {
  check_size("unpack", "coalitions", coalitions);
  check_size("unpack", "players", players);
  const int64_t width = flmoe::words_for(players);
  const auto* from = pointer<const uint64_t>("unpack", "words", words, coalitions * width);
  auto* to = pointer<uint8_t>("unpack", "bytes", bytes, coalitions * players);
  for (int64_t c = 0; c < coalitions; ++c) flmoe::unpack(from + c * width, to + c * players, players);
}

void complement(uintptr_t words, uintptr_t out, int64_t coalitions, int64_t players) {
  check_size("complement", "coalitions", coalitions);
  check_size("complement", "players", players);
  const int64_t width = flmoe::words_for(players);
  const auto* from = pointer<const uint64_t>("complement", "words", words, coalitions * width);
  auto* to = pointer<uint64_t>("complement", "out", out, coalitions * width);
  for (int64_t c = 0; c < coalitions; ++c) flmoe::complement(from + c * width, to + c * width, players);
}

void popcount(uintptr_t words, uintptr_t counts, int64_t coalitions, int64_t width) {
  check_size("popcount", "coalitions", coalitions);
  check_size("popcount", "width", width);
  const auto* from = pointer<const uint64_t>("popcount", "words", words, coalitions * width);
  auto* to = pointer<int64_t>("popcount", "counts", counts, coalitions);
  for (int64_t c = 0; c < coalitions; ++c) to[c] = flmoe::popcount(from + c * width, width);
}

void hamming(uintptr_t a, uintptr_t b, uintptr_t counts, int64_t coalitions, int64_t width) {
  check_size("hamming", "coalitions", coalitions);
  check_size("hamming", "width", width);
  const auto* left = pointer<const uint64_t>("hamming", "a", a, coalitions * width);
  const auto* right = pointer<const uint64_t>("hamming", "b", b, coalitions * width);
  auto* to = pointer<int64_t>("hamming", "counts", counts, coalitions);
  for (int64_t c = 0; c < coalitions; ++c) to[c] = flmoe::hamming(left + c * width, right + c * width, width);
}

void toggle(uintptr_t words, uintptr_t sets, uintptr_t out, int64_t coalitions, int64_t width, int64_t groups,
            int64_t size) {
  check_size("toggle", "coalitions", coalitions);
  check_size("toggle", "width", width);
  check_size("toggle", "groups", groups);
  check_size("toggle", "size", size);
  const auto* from = pointer<const uint64_t>("toggle", "words", words, coalitions * width);
  const auto* players = pointer<const int64_t>("toggle", "sets", sets, groups * size);
  auto* to = pointer<uint64_t>("toggle", "out", out, coalitions * groups * width);
  for (int64_t i = 0; i < groups * size; ++i) {
    if (players[i] >= 64 * width) fail("toggle", "player " + std::to_string(players[i]) + " is beyond the words");
  }
  for (int64_t c = 0; c < coalitions; ++c) {
    for (int64_t g = 0; g < groups; ++g, to += width) {
      for (int64_t w = 0; w < width; ++w) to[w] = from[c * width + w];
      for (int64_t s = 0; s < size; ++s) {
        if (players[g * size + s] >= 0) flmoe::toggle_player(to, players[g * size + s]);
      }
    }
  }
}

void sample_contexts(uintptr_t words, uintptr_t sizes, int64_t units, int64_t players, uint64_t seed,
                     int64_t replicate, int mode, bool antithetic) {
  const flmoe::Draw draw = make_draw("sample_contexts", units, players, seed, replicate, mode, antithetic);
  const int64_t elements = units * flmoe::rows_per_unit(draw) * flmoe::words_for(players);
  flmoe::draw_contexts(draw, players, pointer<uint64_t>("sample_contexts", "words", words, elements),
                       pointer<double>("sample_contexts", "sizes", sizes, units));
}

#ifdef FLMOE_WITH_CUDA

void cuda_unpack(uintptr_t words, uintptr_t bytes, int64_t coalitions, int64_t players, uintptr_t stream) {
  const char* kernel = "coalition_unpack";
  check_size(kernel, "coalitions", coalitions);
  check_size(kernel, "players", players);
  check_launch(kernel, flmoe::launch_unpack(
                           pointer<const uint64_t>(kernel, "words", words, coalitions * flmoe::words_for(players)),
                           pointer<uint8_t>(kernel, "bytes", bytes, coalitions * players), coalitions, players,
                           reinterpret_cast<void*>(stream)));
}

// Players must lie below 64 * width: the caller checks, since they are on the device.
void cuda_toggle(uintptr_t words, uintptr_t sets, uintptr_t out, int64_t coalitions, int64_t width, int64_t groups,
                 int64_t size, uintptr_t stream) {
  const char* kernel = "coalition_toggle";
  check_size(kernel, "coalitions", coalitions);
  check_size(kernel, "width", width);
  check_size(kernel, "groups", groups);
  check_size(kernel, "size", size);
  check_launch(kernel,
               flmoe::launch_toggle(pointer<const uint64_t>(kernel, "words", words, coalitions * width),
                                    pointer<const int64_t>(kernel, "sets", sets, groups * size),
                                    pointer<uint64_t>(kernel, "out", out, coalitions * groups * width), coalitions,
                                    width, groups, size, reinterpret_cast<void*>(stream)));
}

void cuda_popcount(uintptr_t words, uintptr_t counts, int64_t coalitions, int64_t width, uintptr_t stream) {
  const char* kernel = "coalition_popcount";
  check_size(kernel, "coalitions", coalitions);
  check_size(kernel, "width", width);
  check_launch(kernel, flmoe::launch_popcount(pointer<const uint64_t>(kernel, "words", words, coalitions * width),
                                              pointer<int64_t>(kernel, "counts", counts, coalitions), coalitions,
                                              width, reinterpret_cast<void*>(stream)));
}

void cuda_sample_contexts(uintptr_t words, uintptr_t sizes, int64_t units, int64_t players, uint64_t seed,
                          int64_t replicate, int mode, bool antithetic, uintptr_t stream) {
  const char* kernel = "coalition_contexts";
  const flmoe::Draw draw = make_draw(kernel, units, players, seed, replicate, mode, antithetic);
  const int64_t elements = units * flmoe::rows_per_unit(draw) * flmoe::words_for(players);
  check_launch(kernel, flmoe::launch_contexts(draw, players, pointer<uint64_t>(kernel, "words", words, elements),
                                              pointer<double>(kernel, "sizes", sizes, units),
                                              reinterpret_cast<void*>(stream)));
}

#endif  // FLMOE_WITH_CUDA

py::dict info() {
  py::dict about;
  about["version"] = FLMOE_VERSION;
  about["compiler"] = FLMOE_COMPILER;
#ifdef FLMOE_WITH_CUDA
  about["cuda"] = true;
  about["nvcc"] = FLMOE_NVCC;
  about["archs"] = FLMOE_ARCHS;
#else
  about["cuda"] = false;
  about["nvcc"] = "";
  about["archs"] = "";
#endif
  return about;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ core: functions over raw addresses, which flmoe_fast.coalitions and flmoe_fast.engines use.";
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("info", &info, "What this module was built with: cuda, nvcc, archs, compiler, version.");
  m.def("pack", &pack, release(), py::arg("bytes"), py::arg("words"), py::arg("coalitions"), py::arg("players"));
  m.def("unpack", &unpack, release(), py::arg("words"), py::arg("bytes"), py::arg("coalitions"), py::arg("players"));
  m.def("complement", &complement, release(), py::arg("words"), py::arg("out"), py::arg("coalitions"),
        py::arg("players"));
  m.def("popcount", &popcount, release(), py::arg("words"), py::arg("counts"), py::arg("coalitions"),
        py::arg("width"));
  m.def("hamming", &hamming, release(), py::arg("a"), py::arg("b"), py::arg("counts"), py::arg("coalitions"),
        py::arg("width"));
  m.def("toggle", &toggle, release(), py::arg("words"), py::arg("sets"), py::arg("out"), py::arg("coalitions"),
        py::arg("width"), py::arg("groups"), py::arg("size"));
  m.def("sample_contexts", &sample_contexts, release(), py::arg("words"), py::arg("sizes"), py::arg("units"),
        py::arg("players"), py::arg("seed"), py::arg("replicate"), py::arg("mode"), py::arg("antithetic"));
  flmoe::bind_core(m);
  flmoe::cpu::bind(m);
  flmoe::fused::bind(m);
#ifdef FLMOE_WITH_CUDA
  m.def("cuda_unpack", &cuda_unpack, release(), py::arg("words"), py::arg("bytes"), py::arg("coalitions"),
        py::arg("players"), py::arg("stream"));
  m.def("cuda_toggle", &cuda_toggle, release(), py::arg("words"), py::arg("sets"), py::arg("out"),
        py::arg("coalitions"), py::arg("width"), py::arg("groups"), py::arg("size"), py::arg("stream"));
  m.def("cuda_popcount", &cuda_popcount, release(), py::arg("words"), py::arg("counts"), py::arg("coalitions"),
        py::arg("width"), py::arg("stream"));
  m.def("cuda_sample_contexts", &cuda_sample_contexts, release(), py::arg("words"), py::arg("sizes"),
        py::arg("units"), py::arg("players"), py::arg("seed"), py::arg("replicate"), py::arg("mode"),
        py::arg("antithetic"), py::arg("stream"));
#endif
}
