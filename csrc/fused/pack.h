// Weights as the stages that the kernels copy, on the host, once per sample.
#pragma once

#include "traits.h"

#include <cstring>

namespace flmoe::fused {

// A row-major matrix (inputs, outputs) of halves to stages of 64 inputs each (`wide`, H outputs), or 64 outputs each (H
// inputs).
template <int H>
void pack_stages(const std::uint16_t* from, char* to, int inputs, int outputs, bool wide) {
  using T = Tile<H, 1, 1>;
  for (int i = 0; i < inputs; ++i) {
    for (int o = 0; o < outputs; ++o) {
      const int stage = (wide ? i : o) / kSlab;
      const int offset = wide ? T::Wide::offset(o, i % kSlab) : T::Tall::offset(o % kSlab, i);
      std::memcpy(to + std::int64_t{stage} * T::kStageBytes + offset, from + std::int64_t{i} * outputs + o,
                  sizeof(std::uint16_t));
    }
  }
}

}  // namespace flmoe::fused
