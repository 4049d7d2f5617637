// Python's view of the fused kernels: what they take, the packing of weights, and both kernels, on a GPU or emulated.
#include "bind.h"

#include <string>

#include "../binding.h"
#include "emulator.h"
#include "pack.h"

namespace py = pybind11;
using std::int64_t;
using std::uintptr_t;

namespace flmoe::fused {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

#ifdef FLMOE_WITH_CUDA
void check_launch(const char* kernel, int code) {
  if (code == 0) return;
  fail(kernel, "CUDA error " + std::to_string(code) + " (" + error_name(code) + "): " + error_text(code));
}
#endif

// Call with Tile<H, Terms, Groups> and Heads<.., Depth> of sizes known only now.
template <int Groups, int H, int Terms, class Call>
auto with_depth(int depth, Call call) {
  using T = Tile<H, Terms, Groups>;
  if constexpr (H / 4 >= kLeastDepth) {
    if (depth == H / 4) return call(T{}, Heads<T, H / 4>{});
  }
  if (depth == H / 2) return call(T{}, Heads<T, H / 2>{});
  return call(T{}, Heads<T, H>{});
}

template <int Groups, int H, class Call>
auto with_terms(int terms, int depth, Call call) {
  return terms == 1 ? with_depth<Groups, H, 1>(depth, call) : with_depth<Groups, H, 2>(depth, call);
}

void check_sizes(const char* function, int hidden, int terms, int depth) {
  if (!supported(hidden, depth)) {
    fail(function, "there is no kernel for width " + std::to_string(hidden) + " and heads of " + std::to_string(depth));
  }
  if (terms != 1 && terms != 2) fail(function, "terms is " + std::to_string(terms) + ", expected 1 or 2");
}

template <int Groups, class Call>
auto with_sizes(int hidden, int terms, int depth, Call call) {
  if (hidden == 64) return with_terms<Groups, 64>(terms, depth, call);
  if (hidden == 128) return with_terms<Groups, 128>(terms, depth, call);
  return with_terms<Groups, 256>(terms, depth, call);
}

// Sizes that the host needs for its buffers.
py::dict layout(int hidden, int terms, int depth, int length, int wide) {
  check_sizes("fused_layout", hidden, terms, depth);
  py::dict about;
  with_sizes<1>(hidden, terms, depth, [&](auto tile, auto heads) {
    using T = decltype(tile);
    using A = decltype(heads);
    about["stage_bytes"] = T::kStageBytes;
    about["chain_stages"] = chain_stages<T>(wide);
    about["last_stages"] = last_stages<T>(wide);
    about["image_bytes"] = A::kImageBytes;
    about["key_tiles"] = key_tiles<A>(length);
    about["query_tiles"] = query_tiles(length);
    about["slab"] = kSlab;
    return 0;
  });
  return about;
}

void pack(uintptr_t from, uintptr_t to, int inputs, int outputs, int hidden, bool wide) {
  check_sizes("fused_pack", hidden, 1, hidden);
  if ((wide ? outputs : inputs) != hidden || (wide ? inputs : outputs) % kSlab != 0) {
    fail("fused_pack", "a matrix of " + std::to_string(inputs) + " by " + std::to_string(outputs) + " is no " +
                           std::to_string(hidden) + " by a multiple of 64");
  }
  const auto* weights = at<const std::uint16_t>(from);
  auto* stages = at<char>(to);
  if (hidden == 64) pack_stages<64>(weights, stages, inputs, outputs, wide);
  if (hidden == 128) pack_stages<128>(weights, stages, inputs, outputs, wide);
  if (hidden == 256) pack_stages<256>(weights, stages, inputs, outputs, wide);
}

// Where a kernel runs.
enum class Where : int { device = 0, one_group = 1, two_groups = 2 };  // the latter emulated

struct Run {
  int where;
  int fault;
  bool backwards;
  uintptr_t stream;
};

template <class Args, class Device, class Block>
void run(const char* kernel, int hidden, int terms, int depth, const Args& args, const Run& how, Device device,
         Block block) {
  check_sizes(kernel, hidden, terms, depth);
  if (args.sizes.experts == 0 || args.sizes.coalitions == 0) return;
  const auto emulated = [&](auto tile, auto heads) {
    block(tile, heads, static_cast<Fault>(how.fault), how.backwards);
    return 0;
  };
  if (how.where == static_cast<int>(Where::one_group)) {
    with_sizes<1>(hidden, terms, depth, emulated);
  } else if (how.where == static_cast<int>(Where::two_groups)) {
    with_sizes<2>(hidden, terms, depth, emulated);
  } else {
    device();
  }
}

void chain(int hidden, int terms, int depth, int experts, int coalitions, int length, int wide, uintptr_t attended,
           int64_t attended_plane, uintptr_t tape, int64_t tape_bytes, uintptr_t out_bias, uintptr_t up_bias,
           uintptr_t down_bias, uintptr_t qkv_bias, int residual, uintptr_t residual_rows, uintptr_t words, int64_t width,
           uintptr_t stream_rows, uintptr_t query, int64_t query_plane, uintptr_t images, int where, int fault,
           bool backwards, uintptr_t stream) {
  const ChainArgs args{{experts, coalitions, length},
                       wide,
                       at<const std::uint16_t>(attended),
                       attended_plane,
                       at<const char>(tape),
                       tape_bytes,
                       at<const float>(out_bias),
                       at<const float>(up_bias),
                       at<const float>(down_bias),
                       at<const float>(qkv_bias),
                       {static_cast<Residual>(residual), at<const float>(residual_rows), at<const std::uint64_t>(words), width},
                       at<float>(stream_rows),
                       at<std::uint16_t>(query),
                       query_plane,
                       at<char>(images)};
  run(
      "fused_chain", hidden, terms, depth, args, {where, fault, backwards, stream},
      [&] {
#ifdef FLMOE_WITH_CUDA
        check_launch("fused_chain", for_width(hidden, [&](auto width_of) {
                       return decltype(width_of)::chain(terms, depth, args, at<void>(stream));
                     }));
#else
        fail("fused_chain", "this build has no CUDA kernels");
#endif
      },
      [&](auto tile, auto heads, Fault planted, bool order) {
        using T = decltype(tile);
        using A = decltype(heads);
        emulate<T>(experts * chain_blocks<T>(coalitions, length), planted, order, [&](Emulated<T>& m, int64_t block) {
          chain_block<Emulated<T>, T, A>(m, args, block);
        });
      });
}

void last(int hidden, int terms, int query_terms, int depth, int experts, int coalitions, int length, int wide, int modalities, int stage,
          uintptr_t query, int64_t query_plane, uintptr_t images, uintptr_t attended, int64_t attended_plane,
          uintptr_t tape, int64_t tape_bytes, uintptr_t out_bias, uintptr_t up_bias, int residual,
          uintptr_t residual_rows, uintptr_t words, int64_t width, uintptr_t segments, uintptr_t pooled_stream,
          uintptr_t pooled_wide, int where, int fault, bool backwards, uintptr_t stream) {
  const LastArgs args{{experts, coalitions, length},
                      wide,
                      modalities,
                      static_cast<Stage>(stage),
                      at<const std::uint16_t>(query),
                      query_plane,
                      at<const char>(images),
                      at<std::uint16_t>(attended),
                      attended_plane,
                      at<const char>(tape),
                      tape_bytes,
                      at<const float>(out_bias),
                      at<const float>(up_bias),
                      {static_cast<Residual>(residual), at<const float>(residual_rows), at<const std::uint64_t>(words), width},
                      at<const std::int32_t>(segments),
                      at<float>(pooled_stream),
                      at<float>(pooled_wide)};
  if (query_terms < 1 || query_terms > terms) {
    fail("fused_last", "query_terms is " + std::to_string(query_terms) + ", expected 1 to terms");
  }
  run(
      "fused_last", hidden, terms, depth, args, {where, fault, backwards, stream},
      [&] {
#ifdef FLMOE_WITH_CUDA
        check_launch("fused_last", for_width(hidden, [&](auto width_of) {
                       return decltype(width_of)::last(terms, query_terms, depth, args, at<void>(stream));
                     }));
#else
        fail("fused_last", "this build has no CUDA kernels");
#endif
      },
      [&](auto tile, auto heads, Fault planted, bool order) {
        using T = decltype(tile);
        const auto emulated = [&](auto all_or_one) {
          using A = decltype(all_or_one);
          emulate<T>(int64_t{experts} * coalitions * last_blocks<T>(length), planted, order,
                     [&](Emulated<T>& m, int64_t block) { last_block<Emulated<T>, T, A>(m, args, block); });
        };
        if (query_terms == terms) {
          emulated(heads);
        } else {
          emulated(Heads<T, decltype(heads)::kDepth, 1>{});
        }
      });
}

}  // namespace

void bind(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("fused_supported", &supported, py::arg("hidden"), py::arg("depth"));
  m.def("fused_layout", &layout, py::arg("hidden"), py::arg("terms"), py::arg("depth"), py::arg("length"),
        py::arg("wide"));
  m.def("fused_pack", &pack, release(), py::arg("from_"), py::arg("to"), py::arg("inputs"), py::arg("outputs"),
        py::arg("hidden"), py::arg("wide"));
#ifdef FLMOE_WITH_CUDA
  m.def(
      "fused_fit",
      [](int hidden) {
        check_sizes("fused_fit", hidden, 1, hidden);
        Fit fit;
        check_launch("fused_fit", for_width(hidden, [&](auto width_of) { return decltype(width_of)::fit(fit); }));
        return py::make_tuple(fit.groups, fit.shared_bytes, fit.shared_limit);
      },
      py::arg("hidden"));
#endif
  m.def("fused_chain", &chain, release(), py::arg("hidden"), py::arg("terms"), py::arg("depth"), py::arg("experts"),
        py::arg("coalitions"), py::arg("length"), py::arg("wide"), py::arg("attended"), py::arg("attended_plane"),
        py::arg("tape"), py::arg("tape_bytes"), py::arg("out_bias"), py::arg("up_bias"), py::arg("down_bias"),
        py::arg("qkv_bias"), py::arg("residual"), py::arg("residual_rows"), py::arg("words"), py::arg("width"),
        py::arg("stream_rows"), py::arg("query"), py::arg("query_plane"), py::arg("images"), py::arg("where"),
        py::arg("fault"), py::arg("backwards"), py::arg("stream"));
  m.def("fused_last", &last, release(), py::arg("hidden"), py::arg("terms"), py::arg("query_terms"), py::arg("depth"), py::arg("experts"),
        py::arg("coalitions"), py::arg("length"), py::arg("wide"), py::arg("modalities"), py::arg("stage"),
        py::arg("query"), py::arg("query_plane"), py::arg("images"), py::arg("attended"), py::arg("attended_plane"),
        py::arg("tape"), py::arg("tape_bytes"), py::arg("out_bias"), py::arg("up_bias"), py::arg("residual"),
        py::arg("residual_rows"), py::arg("words"), py::arg("width"), py::arg("segments"), py::arg("pooled_stream"),
        py::arg("pooled_wide"), py::arg("where"), py::arg("fault"), py::arg("backwards"), py::arg("stream"));
}

}  // namespace flmoe::fused
