// The row chain: everything between two attentions, on chip.
//
//   attended -> output projection + residual -> LayerNorm -> up -> GELU -> down + residual -> LayerNorm -> Q, K, V
//
// No row needs another, so a warp takes any 16 tokens of one coalition; coalitions are padded to 16 tokens in this kernel
// and nowhere else. The stream stays in shared memory, hidden activations in registers: they are the left operand of the
// down-projection as they come out of the up-projection. Q goes out row-major, K and V as the tiles that the attention of
// the next layer multiplies with (Heads::Key, Heads::Value).
//
// Products of the least terms come first, all in one accumulator.
#pragma once

#include "tile.h"

namespace flmoe::fused {

struct ChainArgs {
  Rows sizes;
  int wide;                       // F
  const std::uint16_t* attended;  // (terms, E, C L, H)
  std::int64_t attended_plane;    // halves
  const char* tape;               // (E, tape bytes): output projection, per 64 hidden up and down, then Q, K, V
  std::int64_t tape_bytes;
  const float* out_bias;   // (E, H)
  const float* up_bias;    // (E, F)
  const float* down_bias;  // (E, H)
  const float* qkv_bias;   // (E, 3 H)
  ResidualSource residual;
  float* stream;         // (E, C L, H)
  std::uint16_t* query;  // (terms, E, C L, H)
  std::int64_t query_plane;
  char* images;  // (E, C, heads, key tiles, image bytes) of the next layer
};

FLMOE_HD int padded_rows(int length) { return (length + kWarpRows - 1) / kWarpRows * kWarpRows; }

// Tiles of a coalition's keys.
template <class A>
FLMOE_HD int key_tiles(int length) {
  return (length + A::kKeys - 1) / A::kKeys;
}

// Blocks of one expert.
template <class T>
FLMOE_HD std::int64_t chain_blocks(int coalitions, int length) {
  return (std::int64_t{coalitions} * padded_rows(length) + T::kRows - 1) / T::kRows;
}

// Stages of one expert's tape.
template <class T>
FLMOE_HD int chain_stages(int wide) {
  return T::kHidden / kSlab * 4 + wide / kSlab * 2;
}

// Two numbers as one or two pairs of halves.
template <int Terms>
FLMOE_BODY void split_pair(float x, float y, std::uint32_t (&out)[Terms]) {
  out[0] = half_pair(x, y);
  if constexpr (Terms == 2) out[1] = half_pair(x - first_of(out[0]), y - second_of(out[0]));
}

// Rows of Q, row-major.
template <class M, class T>
FLMOE_BODY void store_query(M& m, const ChainArgs& args, const Place& at, const Acc<T::kHidden>& acc) {
  FLMOE_UNROLL
  for (int row = 0; row < 2; ++row) {
    if (!at.valid(row)) continue;
    std::uint16_t* to = args.query + at.row(args.sizes, row) * T::kHidden + m.opaque(2 * (m.lane() % 4));
    FLMOE_UNROLL
    for (int b = 0; b < T::kBlocks; ++b) {
      std::uint32_t terms[T::kTerms];
      split_pair(acc.v[b][2 * row], acc.v[b][2 * row + 1], terms);
      FLMOE_UNROLL
      for (int term = 0; term < T::kTerms; ++term) {
        *reinterpret_cast<std::uint32_t*>(to + term * args.query_plane + 8 * b) = terms[term];
      }
    }
  }
}

// Keys, a row each, or values, a column each, into their tiles.
template <class M, class T, class A, bool Values>
FLMOE_BODY void store_image(M& m, const ChainArgs& args, const Place& at, const Acc<T::kHidden>& acc) {
  if (!at.inside) return;
  const int tiles = key_tiles<A>(args.sizes.length);
  const std::int64_t first = (at.expert * std::int64_t{args.sizes.coalitions} + at.coalition) * A::kHeads * tiles;
  FLMOE_UNROLL
  for (int row = 0; row < 2; ++row) {
    // Opaque, or the compiler computes all addresses before the products and has no registers left for these.
    const int token = m.opaque(at.token) + 8 * row, column = m.opaque(2 * (m.lane() % 4));
    const int key = token % A::kKeys;
    char* const tile = args.images + (first + token / A::kKeys) * A::kImageBytes + (Values ? A::kValuesAt : 0);
    FLMOE_UNROLL
    for (int b = 0; b < T::kBlocks; ++b) {
      const int k = 8 * b % A::kDepth + column;
      char* to = tile + 8 * b / A::kDepth * tiles * A::kImageBytes;
      std::uint32_t terms[T::kTerms];
      split_pair(acc.v[b][2 * row], acc.v[b][2 * row + 1], terms);
      FLMOE_UNROLL
      for (int term = 0; term < T::kTerms; ++term) {
        if constexpr (Values) {
          const std::uint16_t low = static_cast<std::uint16_t>(terms[term]);
          const std::uint16_t high = static_cast<std::uint16_t>(terms[term] >> 16);
          *reinterpret_cast<std::uint16_t*>(to + A::Value::offset(k, key)) = low;
          *reinterpret_cast<std::uint16_t*>(to + A::Value::offset(k + 1, key)) = high;
          to += A::Value::kBytes;
        } else {
          *reinterpret_cast<std::uint32_t*>(to + A::Key::offset(key, k)) = terms[term];
          to += A::Key::kBytes;
        }
      }
    }
  }
}

// Values past a coalition's last tokens, up to the end of their tile: attention multiplies them with zero, and zero times
// what nobody wrote may be anything. `token` is the first that no warp has rows for.
template <class M, class T, class A>
FLMOE_BODY void clear_values(M& m, const ChainArgs& args, const Place& at, int token) {
  const int tiles = key_tiles<A>(args.sizes.length);
  const std::int64_t first = (at.expert * std::int64_t{args.sizes.coalitions} + at.coalition) * A::kHeads;
  FLMOE_ROLLED
  for (int row = m.lane(); row < T::kTerms * T::kHidden; row += kLane) {
    const int term = row / T::kHidden, column = row % T::kHidden;
    char* tile = args.images + ((first + column / A::kDepth) * tiles + tiles - 1) * A::kImageBytes;
    tile += A::kValuesAt + term * A::Value::kBytes;
    FLMOE_ROLLED
    for (int key = token; key < tiles * A::kKeys; key += 8) {  // sixteen bytes
      *reinterpret_cast<Bits*>(tile + A::Value::offset(column % A::kDepth, key % A::kKeys)) = Bits{};
    }
  }
}

// Grid: E * chain_blocks, the blocks of an expert together, so that its tape stays in the cache.
template <class M, class T, class A>
FLMOE_BODY void chain_block(M& m, const ChainArgs& args, std::int64_t block) {
  const std::int64_t blocks = chain_blocks<T>(args.sizes.coalitions, args.sizes.length);
  const int expert = static_cast<int>(block / blocks);
  const Shared<M, T> shared{m};
  Ring<M, T> ring{m, shared};
  Ring<M, T>::prepare(m);

  if (m.copies()) {
    if (m.warp() != T::kConsumers) return;
    const char* tape = args.tape + expert * args.tape_bytes;
    const int stages = chain_stages<T>(args.wide);
    for (int i = 0; i < stages; ++i) ring.fill(tape + static_cast<std::int64_t>(i) * T::kStageBytes, T::kStageBytes);
    return;
  }

  const int padded = padded_rows(args.sizes.length);
  const std::int64_t first = block % blocks * T::kRows + m.warp() * kWarpRows;
  const int coalition = static_cast<int>(first / padded), start = static_cast<int>(first % padded);
  const Place at{expert, coalition, start + m.lane() / 4, args.sizes.length, coalition < args.sizes.coalitions};

  // Output projection, residual, norm.
  Acc<T::kHidden> acc;
  clear(acc);
  const bool valid[2] = {at.valid(0), at.valid(1)};
  const std::uint16_t* source[2];
  FLMOE_UNROLL
  for (int row = 0; row < 2; ++row) {
    source[row] = args.attended + (valid[row] ? at.row(args.sizes, row) : 0) * T::kHidden;
  }
  FLMOE_ROLLED
  for (int slab = 0; slab < T::kHidden / kSlab; ++slab) {
    const char* weights = ring.take();
    multiply<typename T::Wide, T::kTerms, kSlabSteps>(m, weights, 0, acc, [&](int s, Fragment(&rows)[T::kTerms]) {
      load_rows(m, source, valid, args.attended_plane, slab * kSlab + 16 * s, rows);
    });
    ring.release();
  }
  keep(shared, acc);
  Norm norm = finish_rows(m, shared, args.out_bias + expert * T::kHidden, args.residual, args.sizes, at, nullptr);

  // Feed-forward: 64 hidden activations at a time, which never leave the registers.
  clear(acc);
  FLMOE_ROLLED
  for (int slab = 0; slab < args.wide / kSlab; ++slab) {
    Acc<kSlab> hidden;
    hidden_slab(m, ring, norm, args.up_bias + expert * args.wide + slab * kSlab, hidden);
    const char* weights = ring.take();
    multiply<typename T::Wide, T::kTerms, kSlabSteps>(m, weights, 0, acc, [&](int s, Fragment(&rows)[T::kTerms]) {
      split<T::kTerms>(hidden.v[2 * s], hidden.v[2 * s + 1], rows);
    });
    ring.release();
  }

  add_to_kept(shared, acc);
  norm = finish_rows(m, shared, args.down_bias + expert * T::kHidden, ResidualSource{}, args.sizes, at, args.stream);

  FLMOE_UNROLL
  for (int part = 0; part < 3; ++part) {  // Q, K, V
    set_bias(m, acc, args.qkv_bias + (expert * 3 + part) * T::kHidden);
    multiply_wide(m, ring, norm, acc);
    if (part == 0) {
      store_query<M, T>(m, args, at, acc);
    } else if (part == 1) {
      store_image<M, T, A, false>(m, args, at, acc);
    } else {
      store_image<M, T, A, true>(m, args, at, acc);
    }
  }
  if (at.inside && start + kWarpRows == padded) clear_values<M, T, A>(m, args, at, padded);
}

}  // namespace flmoe::fused
