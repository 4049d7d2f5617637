// flmoe_fast._C.CpuModel: packed weights, and one call that evaluates coalitions. Shapes and dtypes are checked in Python;
// addresses are integers. Weights are copied, every other array stays Python's.
#include "bind.h"

#include <cstdlib>
#include <list>
#include <memory>
#include <stdexcept>

#include "dispatch.h"

namespace py = pybind11;
using std::int64_t;
using std::uintptr_t;

namespace flmoe::cpu {
namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};

template <class T>
const T* at(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

class CpuModel {
 public:
  CpuModel(const std::string& level_name, int experts, int layers, int hidden, int heads, int wide, bool residual,
           int networks, int slots, bool among_all, int ends)
      : level_(level(level_name)),
        shape_{experts, layers, 0, hidden, heads, wide, 0, 0, residual, networks, slots, among_all, ends},
        layers_(static_cast<std::size_t>(experts) * layers) {
    for (const int size : {experts, layers, hidden, heads, wide}) {
      if (size < 1) throw std::runtime_error("CpuModel: every size must be positive");
    }
    if (hidden % heads != 0) throw std::runtime_error("CpuModel: hidden must be a multiple of heads");
    const bool chosen = networks == 0 ? slots == 0 : slots >= 1 && slots <= networks;
    if (!chosen) throw std::runtime_error("CpuModel: slots must be between 1 and networks, or both 0");
    if (ends != 1 && (ends != networks || networks == 0)) throw std::runtime_error("CpuModel: ends must be 1 or networks");
  }

  // Float32 matrices (E, in, out) and vectors (E, 1, out) of one layer, all widths padded; no up and down if it is sparse.
  void set_layer(int layer, uintptr_t qkv, uintptr_t qkv_bias, uintptr_t out, uintptr_t out_bias, uintptr_t up,
                 uintptr_t up_bias, uintptr_t down, uintptr_t down_bias) {
    if (layer < 0 || layer >= shape_.layers) throw std::runtime_error("CpuModel: no such layer");
    const int stream = shape_.stream(), attended = shape_.attended(), wide = shape_.expanded();
    for (int e = 0; e < shape_.experts; ++e) {
      layers_[static_cast<std::size_t>(e) * shape_.layers + layer] = {
          matrix(qkv, e, stream, 3 * attended), vector(qkv_bias, e, 3 * attended), matrix(out, e, attended, stream),
          vector(out_bias, e, stream),
          {matrix(up, e, stream, wide), vector(up_bias, e, wide), matrix(down, e, wide, stream), vector(down_bias, e, stream)}};
    }
  }

  // The sparse feed-forward block of one layer: its gate (E, in, X) with bias (E, 1, X), and matrices (E * X, in, out) and
  // vectors (E * X, 1, out) of its networks.
  void set_networks(int layer, uintptr_t gate, uintptr_t gate_bias, uintptr_t up, uintptr_t up_bias, uintptr_t down,
                    uintptr_t down_bias) {
    if (layer < 0 || layer >= shape_.layers) throw std::runtime_error("CpuModel: no such layer");
    if (shape_.networks == 0) throw std::runtime_error("CpuModel: the model has no sparse layers");
    const int stream = shape_.stream(), wide = shape_.expanded(), columns = padded(shape_.networks);
    for (int e = 0; e < shape_.experts; ++e) {
      networks_.emplace_back();
      for (int n = e * shape_.networks; n < (e + 1) * shape_.networks; ++n) {
        networks_.back().push_back({matrix(up, n, stream, wide), vector(up_bias, n, wide), matrix(down, n, wide, stream),
                                    vector(down_bias, n, stream)});
      }
      LayerWeights& weights = layers_[static_cast<std::size_t>(e) * shape_.layers + layer];
      weights.gate = vector(gate, e, stream * columns);  // as it is: it is not multiplied in the level's arithmetic
      weights.gate_bias = vector(gate_bias, e, columns);
      weights.networks = networks_.back().data();
    }
  }

  // Bytes that one thread needs for a sample of `length` tokens in `modalities` modalities.
  std::size_t workspace(int length, int modalities) const { return level_.workspace(sample(length, modalities, 1)); }

  void run(uintptr_t table, uintptr_t pick, uintptr_t absent_row, int groups, int queries,
           uintptr_t states, uintptr_t base, uintptr_t present, uintptr_t modality, uintptr_t room, uintptr_t head,
           uintptr_t head_bias, uintptr_t logits, int64_t coalitions, int length, int modalities, int classes,
           int threads, uintptr_t workspace, std::size_t stride) const {
    const Shape shape = sample(length, modalities, classes);
    if (coalitions < 0 || threads < 1) throw std::runtime_error("CpuModel.run: a negative size, or no thread");
    if (coalitions == 0) return;
    if ((table == 0) == (states == 0)) throw std::runtime_error("CpuModel.run: expected either a table or states");
    if (stride % 64 != 0 || stride < level_.workspace(shape)) throw std::runtime_error("CpuModel.run: workspace too small");
    const Call call{{at<float>(table), at<std::int32_t>(pick), at<std::int32_t>(absent_row), groups, queries,
                     at<float>(states)},
                    at<float>(base),
                    at<std::uint8_t>(present),
                    at<std::int32_t>(modality),
                    at<std::int32_t>(room),
                    at<double>(head),
                    at<double>(head_bias),
                    reinterpret_cast<double*>(logits),
                    coalitions};
    // Signals, Ctrl-C among them, are Python's: it looks at them when it is asked to, on its main thread.
    cpu::run(level_, {shape, layers_.data()}, call, threads, reinterpret_cast<char*>(workspace), stride, [] {
      py::gil_scoped_acquire held;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      return false;
    });
  }

 private:
  // The shape of this model with a sample's part in it.
  Shape sample(int length, int modalities, int classes) const {
    for (const int size : {length, modalities, classes}) {
      if (size < 1) throw std::runtime_error("CpuModel: every size must be positive");
    }
    Shape shape = shape_;
    shape.length = length;
    shape.modalities = modalities;
    shape.classes = classes;
    return shape;
  }

  float* memory(std::size_t floats) {
    auto* p = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
    if (p == nullptr) throw std::bad_alloc();
    owned_.emplace_back(p);
    return p;
  }

  // The first layer's qkv and the last one's down are not multiplied here and may be left out.
  const float* matrix(uintptr_t from, int expert, int rows, int columns) {
    if (from == 0) return nullptr;
    const std::size_t size = static_cast<std::size_t>(rows) * columns;
    float* to = memory(size);
    level_.pack(at<float>(from) + expert * size, rows, columns, to);
    return to;
  }

  const float* vector(uintptr_t from, int expert, int columns) {
    if (from == 0) return nullptr;
    float* to = memory(columns);
    const float* values = at<float>(from) + static_cast<std::size_t>(expert) * columns;
    for (int i = 0; i < columns; ++i) to[i] = values[i];
    return to;
  }

  const Level& level_;
  const Shape shape_;
  std::vector<LayerWeights> layers_;
  std::list<std::vector<Network>> networks_;  // of every sparse layer and expert; they do not move
  std::vector<std::unique_ptr<float, Free>> owned_;
};

// ((name, arithmetic, what is missing), ...), best level first.
py::tuple describe_levels() {
  py::list found;
  for (const Support& support : levels()) {
    found.append(py::make_tuple(support.name, support.level != nullptr ? support.level->arithmetic : "", support.missing));
  }
  return py::tuple(found);
}

}  // namespace

void bind(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("cpu_levels", &describe_levels, "Instruction levels, best first: (name, arithmetic, what is missing).");
  py::class_<CpuModel>(m, "CpuModel")
      .def(py::init<const std::string&, int, int, int, int, int, bool, int, int, bool, int>(), py::arg("level"),
           py::arg("experts"), py::arg("layers"), py::arg("hidden"), py::arg("heads"), py::arg("wide"),
           py::arg("residual"), py::arg("networks") = 0, py::arg("slots") = 0, py::arg("among_all") = false, py::arg("ends") = 1)
      .def("set_layer", &CpuModel::set_layer, release(), py::arg("layer"), py::arg("qkv"), py::arg("qkv_bias"),
           py::arg("out"), py::arg("out_bias"), py::arg("up"), py::arg("up_bias"), py::arg("down"), py::arg("down_bias"))
      .def("set_networks", &CpuModel::set_networks, release(), py::arg("layer"), py::arg("gate"), py::arg("gate_bias"),
           py::arg("up"), py::arg("up_bias"), py::arg("down"), py::arg("down_bias"))
      .def("workspace", &CpuModel::workspace, py::arg("length"), py::arg("modalities"))
      .def("run", &CpuModel::run, release(), py::arg("table"), py::arg("pick"), py::arg("absent_row"),
           py::arg("groups"), py::arg("queries"), py::arg("states"), py::arg("base"),
           py::arg("present"), py::arg("modality"), py::arg("room"), py::arg("head"), py::arg("head_bias"), py::arg("logits"),
           py::arg("coalitions"), py::arg("length"), py::arg("modalities"), py::arg("classes"), py::arg("threads"), py::arg("workspace"), py::arg("stride"));
}

}  // namespace flmoe::cpu
