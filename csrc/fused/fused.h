// The fused kernels' launchers. Pointers are device pointers, `stream` is a cudaStream_t (null: the default stream), and
// the return value is a cudaError code, 0 on success; a launch without work returns 0 and touches no driver.
#pragma once

#include "last.h"

namespace flmoe::fused {

constexpr int kLeastDepth = 32;

// H in {64, 128, 256}; one, two or four heads of at least 32.
constexpr bool supported(int hidden, int depth) {
  return (hidden == 64 || hidden == 128 || hidden == 256) && depth >= kLeastDepth &&
         (depth == hidden || 2 * depth == hidden || 4 * depth == hidden);
}

// What a block needs of the current device.
struct Fit {
  int groups = 0;        // of 64 rows in a block; 0 if the device cannot run it
  int shared_bytes = 0;  // that a block needs
  int shared_limit = 0;  // that it may have
};

// The kernels of one width of the stream, each defined in a source file of its own.
template <int H>
struct Width {
  static int chain(int terms, int depth, const ChainArgs& args, void* stream);
  static int last(int terms, int query_terms, int depth, const LastArgs& args, void* stream);
  static int fit(Fit& fit);
};

// The runtime's name and sentence for an error code.
const char* error_name(int code);
const char* error_text(int code);

// A call for the width that is asked for, which must be supported.
template <class Call>
int for_width(int hidden, Call call) {
  if (hidden == 64) return call(Width<64>{});
  if (hidden == 128) return call(Width<128>{});
  return call(Width<256>{});
}

}  // namespace flmoe::fused
