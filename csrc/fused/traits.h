// Tile sizes of the fused kernels, and the shared memory they add up to.
//
// A warp owns 16 rows, four warps are a group of 64 rows (what one wgmma multiplies), and a block has one or two groups,
// and one more warp that does nothing but start copies. A thread of a consumer warp holds, of every tile of 16 rows by N
// columns, the N / 2 numbers that the tensor cores' layout gives it: rows lane / 4 and lane / 4 + 8, two neighbouring
// columns out of eight. The layout of a result is that of a left-hand operand, so rows go from product to product without
// leaving the thread: what does not fit its registers waits in a slice of shared memory that no other thread reads.
//
// Everything a block multiplies with arrives in one ring of equal stages, in the order of use:
//   weights (a "tape", packed once per sample): 64 inputs of a matrix with H outputs, or 64 outputs of one with H inputs;
//   keys and values of a head: kKeys keys, as many as fit a stage.
#pragma once

#include "image.h"

namespace flmoe::fused {

constexpr int kWarpRows = 16;
constexpr int kGroupWarps = 4;
constexpr int kGroupRows = kWarpRows * kGroupWarps;
constexpr int kSlab = 64;  // inputs or outputs in one stage of weights
constexpr int kSlabSteps = kSlab / 16;
constexpr int kStages = 3;
constexpr int kLane = 32;

// H: width of the stream; Terms: halves that an activation is split into; Groups: of 64 rows in a block.
template <int H, int Terms, int Groups>
struct Tile {
  static_assert(H == 64 || H == 128 || H == 256, "a row must fit the registers of four threads");
  static_assert(Terms == 1 || Terms == 2, "fp16 or fp16x2");
  static_assert(Groups == 1 || Groups == 2, "one or two groups");
  static constexpr int kHidden = H;
  static constexpr int kTerms = Terms;
  static constexpr int kGroups = Groups;
  static constexpr int kRows = kGroupRows * Groups;
  static constexpr int kConsumers = kGroupWarps * Groups;  // warps
  // Two groups need more registers than an equal share of them: the warps after them give theirs away, four at a time.
  static constexpr int kThreads = kLane * (kConsumers + (Groups == 2 ? kGroupWarps : 1));
  static constexpr int kBlocks = H / 8;  // of eight columns in a row

  using Wide = Operand<H, kSlab>;  // 64 inputs, H outputs
  using Tall = Operand<kSlab, H>;  // H inputs, 64 outputs
  static_assert(Wide::kBytes == Tall::kBytes, "one size of stage");
  static constexpr int kStageBytes = Wide::kBytes;
  static constexpr int kKeptBytes = kConsumers * kLane * kBlocks * 16;  // four numbers a block of eight columns
  static constexpr int kPoolBytes = kConsumers * kSlab * 4;
  static constexpr int kBarriers = 2 * kStages;

  static constexpr int kStagesAt = 0;  // first: swizzles repeat every 1,024 bytes
  static constexpr int kKeptAt = kStagesAt + kStages * kStageBytes;
  static constexpr int kPoolAt = kKeptAt + kKeptBytes;
  static constexpr int kBarriersAt = kPoolAt + kPoolBytes;
  static constexpr int kSharedBytes = kBarriersAt + 8 * kBarriers;
  static_assert(kStageBytes % 1024 == 0, "stages keep the swizzle's alignment");
  // What a block may use at most: 163 KiB on compute capability 8.0, 227 KiB on 9.0.
  static_assert(kSharedBytes <= (Groups == 1 ? 163 : 227) * 1024, "too much shared memory");
};

// Heads of width D in a stream of T::kHidden. QueryTerms: halves that a query and an attention weight enter products as;
// keys and values have T::kTerms.
template <class T, int D, int QueryTerms = T::kTerms>
struct Heads {
  static_assert(QueryTerms >= 1 && QueryTerms <= T::kTerms, "at most the terms that are there");
  static constexpr int kQueryTerms = QueryTerms;
  static constexpr int kDepth = D;
  static constexpr int kHeads = T::kHidden / D;
  static_assert(T::kHidden % D == 0 && kHeads <= 4, "one to four heads");
  static constexpr int kKeys = 16 * kHeads;  // a stage holds their keys and values in two terms
  using Key = Operand<kKeys, D>;             // scores: keys are columns
  using Value = Operand<D, kKeys>;           // sums: keys are inputs
  // An image of a tile: the keys' terms, then the values' terms.
  static constexpr int kValuesAt = T::kTerms * Key::kBytes;
  static constexpr int kImageBytes = kValuesAt + T::kTerms * Value::kBytes;
  static_assert(kImageBytes <= T::kStageBytes, "keys and values of a tile fit a stage");
};

}  // namespace flmoe::fused
