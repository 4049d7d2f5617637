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

namespace py = pybind11;
using std::int64_t;
using std::uint64_t;
using std::uint8_t;
using std::uintptr_t;

namespace {

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

void sample_contexts(uintptr_t words, uintptr_t sizes, int64_t units, int64_t players, uint64_t seed,
                     int64_t replicate, int mode, bool antithetic) {
  const flmoe::Draw draw = make_draw("sample_contexts", units, players, seed, replicate, mode, antithetic);
  const int64_t elements = units * flmoe::rows_per_unit(draw) * flmoe::words_for(players);
  flmoe::draw_contexts(draw, players, pointer<uint64_t>("sample_contexts", "words", words, elements),
                       pointer<double>("sample_contexts", "sizes", sizes, units));
}

py::dict info() {
  py::dict about;
  about["version"] = FLMOE_VERSION;
  about["compiler"] = FLMOE_COMPILER;
#ifdef FLMOE_WITH_CUDA
  about["cuda"] = true;
  about["without_cuda"] = "";
  about["nvcc"] = FLMOE_NVCC;
  about["archs"] = FLMOE_ARCHS;
#else
  about["cuda"] = false;
  about["without_cuda"] = FLMOE_WITHOUT_CUDA;
  about["nvcc"] = "";
  about["archs"] = "";
#endif
  return about;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ core: functions over raw addresses, which flmoe_fast.coalitions and flmoe_fast.engines use.";
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("info", &info, "What this module was built with: cuda, or why without it, nvcc, archs, compiler, version.");
  m.def("pack", &pack, release(), py::arg("bytes"), py::arg("words"), py::arg("coalitions"), py::arg("players"));
  m.def("unpack", &unpack, release(), py::arg("words"), py::arg("bytes"), py::arg("coalitions"), py::arg("players"));
  m.def("sample_contexts", &sample_contexts, release(), py::arg("words"), py::arg("sizes"), py::arg("units"),
        py::arg("players"), py::arg("seed"), py::arg("replicate"), py::arg("mode"), py::arg("antithetic"));
  flmoe::cpu::bind(m);
  flmoe::fused::bind(m);
}
