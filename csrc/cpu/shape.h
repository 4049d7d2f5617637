// What the CPU engine is asked: sizes, and addresses that Python owns. Plain data, shared by every instruction level.
#pragma once

#include <cstddef>
#include <cstdint>

// Every function that two instruction levels share is inlined: an outlined copy could be the newer machine's.
#define FLMOE_INLINE inline __attribute__((always_inline))

namespace flmoe::cpu {

constexpr int kCell = 32;  // every width is padded to whole cells of 32 columns
constexpr int kStackRows = 128;  // short coalitions are stacked until a unit has about this many rows
constexpr int kBlockRows = 192;  // rows that go through the whole chain while they are in the L2 cache

FLMOE_INLINE constexpr int cells(int columns) { return (columns + kCell - 1) / kCell; }
FLMOE_INLINE constexpr int padded(int columns) { return cells(columns) * kCell; }

struct Shape {
  int experts, layers, length, hidden, heads, wide, classes, modalities;
  bool residual;  // whether attention is added to its input
  // Sparse feed-forward blocks: networks of each, how many of them a token uses, and whether its scores are probabilities
  // among all networks (else among those it uses).
  int networks = 0, slots = 0;
  bool among_all = false;
  int ends = 1;  // feed-forward networks of the last layer

  FLMOE_INLINE int depth() const { return hidden / heads; }
  FLMOE_INLINE int head_width() const { return padded(depth()); }      // columns of one head, padded
  FLMOE_INLINE int attended() const { return heads * head_width(); }   // columns of all heads
  FLMOE_INLINE int stream() const { return padded(hidden); }           // columns of the residual stream
  FLMOE_INLINE int expanded() const { return padded(wide); }           // columns of the feed-forward block
  FLMOE_INLINE int pooled_row() const { return ends * expanded() + stream(); }  // what is pooled of one modality
  FLMOE_INLINE int pooled() const { return modalities * pooled_row(); }
  // Coalitions that one unit of work evaluates together.
  FLMOE_INLINE int stack() const { return length >= kStackRows ? 1 : kStackRows / length; }
};

// Matrices are in the level's packed order, vectors padded with zeros.
struct Network {
  const float *up, *up_bias, *down, *down_bias;
};

// One layer of one expert. The gate of a sparse block is a plain (stream, padded networks) matrix, since it is not
// multiplied in the level's arithmetic; a dense block has none, a sparse one has no network of its own.
struct LayerWeights {
  const float *qkv, *qkv_bias, *out, *out_bias;
  Network dense;
  const float *gate = nullptr, *gate_bias = nullptr;
  const Network* networks = nullptr;  // (X,)
};

// Layer-1 attention, either way. All tables are float32 and hold every expert.
//
// Shared: `table` is (P, E, h, Q, depth + 1): for pattern p and query row q the sum of weighted values and of weights.
// A coalition adds `groups` patterns, pick[c][g], and a token t asks with row absent_row[t] where it is absent and varies
// (-1: it does not vary), else with row t.
//
// Direct (table == nullptr): `states` is (E, 2, L, 3 * attended), the projected q, k, v of absent and present tokens.
struct FirstAttention {
  const float* table;
  const std::int32_t* pick;
  const std::int32_t* absent_row;
  int groups, queries;
  const float* states;
};

struct Call {
  FirstAttention first;
  const float* base;                // (E, 2, L, stream): what layer 1's projection is added to, its bias included
  const std::uint8_t* present;      // (C, L)
  const std::int32_t* modality;     // (L,)
  const std::int32_t* room;         // (M,): slots that a coalition may fill in each network, nullptr: any number
  const double* head;               // (E, K, M, pooled_row), the mean over tokens included
  const double* head_bias;          // (E, K)
  double* logits;                   // (C, E, K)
  std::int64_t coalitions;
};

struct Model {
  Shape shape;
  const LayerWeights* layers;  // (E, layers)
};

// One instruction level: the same templates compiled with other flags.
struct Level {
  const char* name;
  const char* arithmetic;
  // Packs a (rows, columns) row-major matrix, both multiples of a cell, for multiplication from the right.
  void (*pack)(const float* from, int rows, int columns, float* to);
  std::size_t (*workspace)(const Shape&);  // bytes one thread needs
  // Evaluates coalitions [first, first + count) of one expert; count <= shape.stack().
  void (*unit)(const Model&, const Call&, int expert, std::int64_t first, int count, char* workspace);
  unsigned (*begin)();  // once per thread before its first unit; what it returns goes to end() after the last
  void (*end)(unsigned);
  // For tests: elementwise functions, and c (m, n) = a (m, k) @ b (k, n) with all widths multiples of a cell.
  void (*exp2)(const float* x, float* y, std::int64_t count);
  void (*gelu)(const float* x, float* y, std::int64_t count);
  void (*matmul)(const float* a, const float* b, float* c, int m, int k, int n, char* workspace);
};

}  // namespace flmoe::cpu
