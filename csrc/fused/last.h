// The last layer: attention over all of a coalition's keys, output projection + residual -> LayerNorm -> up -> GELU, and
// sums over each modality's tokens. Neither the activations nor the down-projection's output are ever written: the mean
// over tokens commutes with it, and the head reads the sums (engines/gpu/kernels/head.py).
//
// A group takes 64 queries of one coalition, whose keys and values the groups of a block share. Attention is by online
// softmax in base 2 (log2 e is part of Q), head by head; queries wait in the kept slice of shared memory, and a head's
// result takes their place there.
#pragma once

#include "chain.h"

namespace flmoe::fused {

// Which part of it to run.
enum class Stage : int {
  whole = 0,
  tail = 1,       // the attention is done: models of one layer
  attention = 2,  // only that: middle layers, whose row chain follows
};

struct LastArgs {
  Rows sizes;
  int wide, modalities;
  Stage stage;
  const std::uint16_t* query;  // (terms, E, C L, H)
  std::int64_t query_plane;
  const char* images;  // (E, C, heads, key tiles, image bytes)
  std::uint16_t* attended;  // (terms, E, C L, H): read by the tail, written by the attention
  std::int64_t attended_plane;
  const char* tape;  // (E, tape bytes): output projection, then up, 64 hidden a stage
  std::int64_t tape_bytes;
  const float* out_bias;  // (E, H)
  const float* up_bias;   // (E, F)
  ResidualSource residual;
  const std::int32_t* segments;  // (M + 1): where each modality's tokens start
  float* pooled_stream;          // (E, C, query tiles, M, H)
  float* pooled_wide;            // (E, C, query tiles, M, F)
};

// Query tiles of a coalition: one a group.
FLMOE_HD int query_tiles(int length) { return (length + kGroupRows - 1) / kGroupRows; }

// Blocks of one coalition of one expert.
template <class T>
FLMOE_HD int last_blocks(int length) {
  return (query_tiles(length) + T::kGroups - 1) / T::kGroups;
}

template <class T>
FLMOE_HD int last_stages(int wide) {
  return (T::kHidden + wide) / kSlab;
}

// Attention weights are kept 2^8 times too large, as the Triton kernels keep them.
constexpr float kShift = 8.0f;

// One head: its queries leave the kept slice, its result enters it.
template <class M, class T, class A>
FLMOE_BODY void attend(M& m, Ring<M, T>& ring, const LastArgs& args, int head) {
  const Shared<M, T>& shared = ring.shared;
  constexpr int kSteps = A::kDepth / 16;
  constexpr int kAtOnce = kSteps < 4 ? kSteps : 4;  // whose queries fit the registers
  Acc<A::kDepth> sums;
  clear(sums);
  Pair top{{-1e30f, -1e30f}}, below{{0.0f, 0.0f}};
  FLMOE_ROLLED
  for (int start = 0; start < args.sizes.length; start += A::kKeys) {
    const char* image = ring.take();
    const char* const keys[2] = {image, image + A::Key::kBytes};
    const char* const values[2] = {image + A::kValuesAt, image + A::kValuesAt + A::Value::kBytes};
    Acc<A::kKeys> score;
    clear(score);
    FLMOE_ROLLED
    for (int part = 0; part < kSteps; part += kAtOnce) {
      m.mma_begin(score);
      FLMOE_UNROLL
      for (int s = part; s < part + kAtOnce; ++s) {
        Fragment query[T::kTerms];
        kept_halves<M, T>(shared, head * kSteps + s, query);
        m.mma_fence();
        if constexpr (A::kQueryTerms == 2) m.template mma<typename A::Key>(score, query[A::kQueryTerms - 1], keys[0], s);
        if constexpr (T::kTerms == 2) m.template mma<typename A::Key>(score, query[0], keys[1], s);
        m.template mma<typename A::Key>(score, query[0], keys[0], s);
      }
      m.mma_end(score);
    }

    const int left = args.sizes.length - start;
    Pair fade;
    FLMOE_UNROLL
    for (int row = 0; row < 2; ++row) {
      float most = top.v[row];
      FLMOE_UNROLL
      for (int b = 0; b < A::kKeys / 8; ++b) {
        FLMOE_UNROLL
        for (int i = 2 * row; i < 2 * row + 2; ++i) {
          if (8 * b + 2 * (m.lane() % 4) + i % 2 >= left) score.v[b][i] = -m.infinity();
          most = most > score.v[b][i] ? most : score.v[b][i];
        }
      }
      most = row_max(m, most);
      float sum = 0.0f;
      FLMOE_UNROLL
      for (int b = 0; b < A::kKeys / 8; ++b) {
        FLMOE_UNROLL
        for (int i = 2 * row; i < 2 * row + 2; ++i) {
          score.v[b][i] = m.exp2(score.v[b][i] - most + kShift);
          sum += score.v[b][i];
        }
      }
      fade.v[row] = m.exp2(top.v[row] - most);
      below.v[row] = below.v[row] * fade.v[row] + row_sum(m, sum);
      top.v[row] = most;
    }
    FLMOE_UNROLL
    for (int b = 0; b < A::kDepth / 8; ++b) {
      FLMOE_UNROLL
      for (int i = 0; i < 4; ++i) sums.v[b][i] *= fade.v[i / 2];
    }

    m.mma_begin(sums);
    FLMOE_UNROLL
    for (int s = 0; s < A::kKeys / 16; ++s) {
      Fragment weight[A::kQueryTerms];
      split<A::kQueryTerms>(score.v[2 * s], score.v[2 * s + 1], weight);
      m.mma_fence();
      if constexpr (A::kQueryTerms == 2) m.template mma<typename A::Value>(sums, weight[A::kQueryTerms - 1], values[0], s);
      if constexpr (T::kTerms == 2) m.template mma<typename A::Value>(sums, weight[0], values[1], s);
      m.template mma<typename A::Value>(sums, weight[0], values[0], s);
    }
    m.mma_end(sums);
    ring.release();
  }

  const Pair share{{m.reciprocal(below.v[0]), m.reciprocal(below.v[1])}};
  FLMOE_UNROLL
  for (int s = 0; s < kSteps; ++s) {
    FLMOE_UNROLL
    for (int i = 0; i < 4; ++i) {
      sums.v[2 * s][i] *= share.v[i / 2];
      sums.v[2 * s + 1][i] *= share.v[i / 2];
    }
    Fragment rows[T::kTerms];
    split<T::kTerms>(sums.v[2 * s], sums.v[2 * s + 1], rows);
    keep<M, T>(shared, head * kSteps + s, rows);
  }
}

// Sums of 64 columns over the rows of each modality, to `to` + modality * stride: within the warp, then over the group's
// warps, always in the same order.
template <class M, class T>
FLMOE_BODY void pool(M& m, const Shared<M, T>& shared, const LastArgs& args, const Place& at, const Acc<kSlab>& x,
                     float* to, std::int64_t stride) {
  const int group = m.warp() / kGroupWarps;
  const int column = (m.warp() % kGroupWarps) * kLane + m.lane();
  const int first = at.token / kGroupRows * kGroupRows;
  FLMOE_ROLLED
  for (int modality = 0; modality < args.modalities; ++modality) {
    const int start = args.segments[modality], stop = args.segments[modality + 1];
    if (start >= stop || stop <= first || start >= first + kGroupRows) {
      if (column < kSlab) to[modality * stride + column] = 0.0f;
      continue;
    }
    bool inside[2];
    FLMOE_UNROLL
    for (int row = 0; row < 2; ++row) {
      const int token = at.token + 8 * row;
      inside[row] = token >= start && token < stop;
    }
    FLMOE_UNROLL
    for (int b = 0; b < kSlab / 8; ++b) {
      FLMOE_UNROLL
      for (int i = 0; i < 2; ++i) {
        float sum = (inside[0] ? x.v[b][i] : 0.0f) + (inside[1] ? x.v[b][2 + i] : 0.0f);
        FLMOE_UNROLL
        for (int lanes = 4; lanes < kLane; lanes *= 2) sum += m.shuffle_xor(sum, lanes);
        if (m.lane() < 4) shared.pool(m.warp())[8 * b + 2 * m.lane() + i] = sum;
      }
    }
    m.sync_group(group);
    if (column < kSlab) {
      float sum = 0.0f;
      FLMOE_UNROLL
      for (int warp = 0; warp < kGroupWarps; ++warp) sum += shared.pool(group * kGroupWarps + warp)[column];
      to[modality * stride + column] = sum;
    }
    m.sync_group(group);
  }
}

// Grid: E * C * last_blocks, the blocks of a coalition together, so that its keys stay in the cache.
template <class M, class T, class A>
FLMOE_BODY void last_block(M& m, const LastArgs& args, std::int64_t block) {
  constexpr int kSlabs = T::kHidden / kSlab;
  const int blocks = last_blocks<T>(args.sizes.length);
  const std::int64_t of = block / blocks;  // coalition of an expert
  const int expert = static_cast<int>(of / args.sizes.coalitions);
  const int coalition = static_cast<int>(of % args.sizes.coalitions);
  const Shared<M, T> shared{m};
  Ring<M, T> ring{m, shared};
  Ring<M, T>::prepare(m);
  const int images = args.stage == Stage::tail ? 0 : key_tiles<A>(args.sizes.length) * A::kHeads;
  const int weights = args.stage == Stage::attention ? 0 : last_stages<T>(args.wide);

  if (m.copies()) {
    if (m.warp() != T::kConsumers) return;
    for (int i = 0; i < images; ++i) {
      ring.fill(args.images + (of * images + i) * A::kImageBytes, A::kImageBytes);
    }
    const char* tape = args.tape + expert * args.tape_bytes;
    for (int i = 0; i < weights; ++i) ring.fill(tape + static_cast<std::int64_t>(i) * T::kStageBytes, T::kStageBytes);
    return;
  }

  const int tile = static_cast<int>(block % blocks) * T::kGroups + m.warp() / kGroupWarps;
  const Place at{expert, coalition, tile * kGroupRows + m.warp() % kGroupWarps * kWarpRows + m.lane() / 4,
                 args.sizes.length, true};
  if (tile >= query_tiles(args.sizes.length)) {  // a group without a query lets every stage pass
    for (int i = 0; i < images + weights; ++i) {
      ring.take();
      ring.release();
    }
    return;
  }

  // Queries, or what attention gave, wait in the kept slice.
  const std::uint16_t* rows = args.stage == Stage::tail ? args.attended : args.query;
  const std::int64_t plane = args.stage == Stage::tail ? args.attended_plane : args.query_plane;
  const bool valid[2] = {at.valid(0), at.valid(1)};
  const std::uint16_t* source[2];
  FLMOE_UNROLL
  for (int row = 0; row < 2; ++row) source[row] = rows + (valid[row] ? at.row(args.sizes, row) : 0) * T::kHidden;
  FLMOE_ROLLED
  for (int step = 0; step < T::kHidden / 16; ++step) {
    Fragment loaded[T::kTerms];
    load_rows(m, source, valid, plane, 16 * step, loaded);
    keep<M, T>(shared, step, loaded);
  }
  if (args.stage != Stage::tail) {
    FLMOE_ROLLED
    for (int head = 0; head < A::kHeads; ++head) attend<M, T, A>(m, ring, args, head);
  }
  if (args.stage == Stage::attention) {
    FLMOE_ROLLED
    for (int step = 0; step < T::kHidden / 16; ++step) {
      Fragment rows_out[T::kTerms];
      kept_halves<M, T>(shared, step, rows_out);
      FLMOE_UNROLL
      for (int r = 0; r < 4; ++r) {
        if (!at.valid(r % 2)) continue;
        std::uint16_t* row = args.attended + at.row(args.sizes, r % 2) * T::kHidden + 16 * step + 8 * (r / 2) + 2 * (m.lane() % 4);
        FLMOE_UNROLL
        for (int term = 0; term < T::kTerms; ++term) {
          *reinterpret_cast<std::uint32_t*>(row + term * args.attended_plane) = rows_out[term].r[r];
        }
      }
    }
    return;
  }

  // Output projection, residual, norm.
  Acc<T::kHidden> acc;
  clear(acc);
  FLMOE_ROLLED
  for (int slab = 0; slab < kSlabs; ++slab) {
    const char* slab_weights = ring.take();
    multiply<typename T::Wide, T::kTerms, kSlabSteps>(m, slab_weights, 0, acc, [&](int s, Fragment(&kept)[T::kTerms]) {
      kept_halves<M, T>(shared, slab * kSlabSteps + s, kept);
    });
    ring.release();
  }
  keep(shared, acc);
  const Norm norm = finish_rows(m, shared, args.out_bias + expert * T::kHidden, args.residual, args.sizes, at, nullptr);

  // Sums of the stream, then of the hidden activations, 64 columns at a time.
  const std::int64_t into = (of * query_tiles(args.sizes.length) + tile) * args.modalities;
  FLMOE_ROLLED
  for (int slab = 0; slab < kSlabs; ++slab) {
    Acc<kSlab> part;
    FLMOE_UNROLL
    for (int b = 0; b < kSlab / 8; ++b) {
      const Quad quad = shared.kept(slab * (kSlab / 8) + b);
      FLMOE_UNROLL
      for (int i = 0; i < 4; ++i) part.v[b][i] = quad.v[i];
    }
    pool(m, shared, args, at, part, args.pooled_stream + into * T::kHidden + slab * kSlab, T::kHidden);
  }
  FLMOE_ROLLED
  for (int slab = 0; slab < args.wide / kSlab; ++slab) {
    Acc<kSlab> hidden;
    hidden_slab(m, ring, norm, args.up_bias + expert * args.wide + slab * kSlab, hidden);
    pool(m, shared, args, at, hidden, args.pooled_wide + into * args.wide + slab * kSlab, args.wide);
  }
}

}  // namespace flmoe::fused
