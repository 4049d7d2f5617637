// The CUDA launchers. Pointers are device pointers, `stream` is a cudaStream_t (null: the default stream), and the return
// value is a cudaError code, 0 on success. A launch without work returns 0 and touches no driver.
#pragma once

#include <cstdint>

#include "contexts.h"

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

// The runtime's name and sentence for an error code.
const char* error_name(int code);
const char* error_text(int code);

}  // namespace flmoe
