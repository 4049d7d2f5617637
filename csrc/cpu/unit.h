// One unit of work: a stack of coalitions through one expert, from layer-1 attention to logits.
//
// Rows go through a layer in blocks small enough for the L2 cache: attention, output projection and residual, LayerNorm,
// feed-forward and residual, LayerNorm, the next layer's q, k, v. In the last layer the feed-forward block ends with the
// pooled activations: its second matrix is linear and part of the head. Keys and values of a layer are packed before its
// first block. A sparse feed-forward block waits for all rows of the unit, so that every network has many at a time. Nothing
// is allocated.
#pragma once

#include "attention.h"
#include "combine.h"
#include "norm.h"
#include "pool.h"
#include "sparse.h"

namespace flmoe::cpu::FLMOE_LEVEL {

class Unit {
 public:
  Unit(const Model& model, const Call& call, int expert, char* memory)
      : shape_(model.shape), weights_(model.layers + static_cast<std::ptrdiff_t>(expert) * shape_.layers), call_(call),
        expert_(expert) {
    lay_out(memory);
  }

  // Bytes of `memory`.
  static std::size_t bytes(const Shape& shape) {
    const Model model{shape, nullptr};
    const Call call{};
    Unit unit(model, call, 0, nullptr);
    return unit.used_ + 64;
  }

  void run(std::int64_t first, int count) {
    first_ = first;
    count_ = count;
    const int length = shape_.length, rows = count * length;
    for (int c = 0; c < count; ++c) {
      for (int t = 0; t < length; ++t) {
        const std::ptrdiff_t state = static_cast<std::ptrdiff_t>(expert_) * 2 + present(c, t);
        place_[c * length + t] = c * shape_.modalities + call_.modality[t];
        base_[c * length + t] = call_.base + (state * length + t) * shape_.stream();
      }
    }
    std::memset(pooled_, 0, sizeof(double) * count * shape_.pooled());
    for (int layer = 0; layer < shape_.layers; ++layer) {
      if (layer > 0 || call_.first.table == nullptr) pack_keys(layer);
      const LayerWeights& weights = weights_[layer];
      const bool last = layer + 1 == shape_.layers;
      const auto hand_on = [&](int start, int some) {
        last ? pool_stream(start, some) : project(weights_[layer + 1], start, some);
      };
      if (weights.networks == nullptr) {
        blocks(rows, [&](int start, int some) {
          mix(layer, start, some);
          dense(weights.dense, last, start, some);
          hand_on(start, some);
        });
        continue;
      }
      std::memset(routing_.queue, 0, sizeof(std::int32_t) * count * shape_.modalities * shape_.networks);
      blocks(rows, [&](int start, int some) {
        mix(layer, start, some);
        route(shape_, weights, stream_, place_, call_.room, start, some, routing_);
      });
      sort(shape_, rows, routing_);
      for (int network = 0; network < shape_.networks; ++network) sparse(weights.networks[network], network, last);
      blocks(rows, hand_on);
    }
    for (int c = 0; c < count; ++c) {
      const std::int64_t index = (first + c) * shape_.experts + expert_;
      classify(pooled_ + static_cast<std::ptrdiff_t>(c) * shape_.pooled(), shape_.pooled(),
               call_.head + static_cast<std::ptrdiff_t>(expert_) * shape_.classes * shape_.pooled(),
               call_.head_bias + static_cast<std::ptrdiff_t>(expert_) * shape_.classes, shape_.classes,
               call_.logits + index * shape_.classes);
    }
  }

 private:
  static constexpr int kMostRows = (kBlockRows + kRows + 15) / 16 * 16;

  // Calls block(start, some) for all rows; never more than kBlockRows + kRows of them.
  template <class Block>
  static void blocks(int rows, Block block) {
    if (rows == 0) return;
    const int count = (rows + kBlockRows - 1) / kBlockRows;
    const int step = ((rows + count - 1) / count + kRows - 1) / kRows * kRows;
    for (int start = 0; start < rows; start += step) block(start, rows - start < step ? rows - start : step);
  }

  // Hands out parts of the memory; with no memory, only counts it.
  template <class T>
  void take(T*& array, std::size_t count) {
    array = reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(memory_) + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
  }

  void lay_out(char* memory) {
    memory_ = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(memory) + 63) / 64 * 64);
    const std::size_t rows = static_cast<std::size_t>(shape_.stack()) * shape_.length;
    const std::size_t packed = static_cast<std::size_t>(shape_.stack()) * shape_.attended() * padded(shape_.length);
    take(product_, 2 * kRows * kCell);
    take(scratch_.query, (kRows + 15) / 16 * 16 * shape_.head_width());
    take(scratch_.scores, 2 * kRows * kKeys);
    take(scratch_.weights, (kRows + 15) / 16 * 16 * kKeys);
    take(scratch_.out, kRows * shape_.head_width());
    take(attended_, kMostRows * shape_.attended());
    take(norm_, kMostRows * shape_.stream());
    take(wide_, kMostRows * shape_.expanded());
    take(stream_, rows * shape_.stream());
    take(qkv_, shape_.layers > 1 ? rows * 3 * shape_.attended() : 0);
    take(keys_, packed);
    take(values_, packed);
    take(pooled_, static_cast<std::size_t>(shape_.stack()) * shape_.pooled());
    take(place_, rows);
    take(base_, rows);
    if (shape_.networks == 0) return;
    take(routing_.plain, rows * shape_.stream());
    take(routing_.logits, kGateRows * padded(shape_.networks));
    take(routing_.chosen, rows * shape_.slots);
    take(routing_.scores, rows * shape_.slots);
    take(routing_.queue, static_cast<std::size_t>(shape_.stack()) * shape_.modalities * shape_.networks);
    take(routing_.bounds, shape_.networks + 1);
    take(routing_.row, rows * shape_.slots);
    take(routing_.score, rows * shape_.slots);
    take(sent_, kMostRows);
  }

  bool present(int coalition, int token) const {
    return call_.present[(first_ + coalition) * shape_.length + token] != 0;
  }

  // Projected q, k, v of a token.
  const float* projected(int layer, int coalition, int token) const {
    const std::ptrdiff_t width = 3 * shape_.attended();
    if (layer > 0) return qkv_ + (static_cast<std::ptrdiff_t>(coalition) * shape_.length + token) * width;
    const std::ptrdiff_t state = static_cast<std::ptrdiff_t>(expert_) * 2 + present(coalition, token);
    return call_.first.states + (state * shape_.length + token) * width;
  }

  std::ptrdiff_t packed_at(int coalition, int head) const {
    return static_cast<std::ptrdiff_t>(coalition * shape_.heads + head) * shape_.head_width() * padded(shape_.length);
  }

  void pack_keys(int layer) {
    const int width = shape_.head_width();
    for (int c = 0; c < count_; ++c) {
      for (int h = 0; h < shape_.heads; ++h) {
        const int key = shape_.attended() + h * width, value = key + shape_.attended();
        pack_columns([&](int t) { return projected(layer, c, t) + key; }, shape_.length, width, keys_ + packed_at(c, h));
        pack_rows([&](int t) { return projected(layer, c, t) + value; }, shape_.length, width, values_ + packed_at(c, h));
      }
    }
  }

  // Attention of stacked rows [start, start + rows) into attended_.
  void attention(int layer, int start, int rows) {
    const int length = shape_.length, width = shape_.head_width();
    for (int r = 0; r < rows;) {
      const int c = (start + r) / length, token = (start + r) % length;
      if (layer == 0 && call_.first.table != nullptr) {
        const std::int32_t absent = call_.first.absent_row[token];
        const int query = absent >= 0 && !present(c, token) ? absent : token;
        combine(shape_, call_.first, expert_, call_.first.pick + (first_ + c) * call_.first.groups, query, attended_, r);
        ++r;
        continue;
      }
      int most = rows - r < length - token ? rows - r : length - token;
      most = most < kRows ? most : kRows;
      for (int h = 0; h < shape_.heads; ++h) {
        attend([&](int i) { return projected(layer, c, token + i) + h * width; }, most, keys_ + packed_at(c, h),
               values_ + packed_at(c, h), length, width, scratch_, attended_, shape_.attended(), r, h * width);
      }
      r += most;
    }
  }

  float* stream_at(int row) { return stream_ + static_cast<std::ptrdiff_t>(row) * shape_.stream(); }

  // Attention, and its projection into the stream.
  void mix(int layer, int start, int rows) {
    const LayerWeights& weights = weights_[layer];
    const int width = shape_.stream();
    float* stream = stream_at(start);
    attention(layer, start, rows);
    gemm(attended_, shape_.attended(), rows, weights.out, width, product_, [&](int row, int count, int column, float* x) {
      // Layer 1 is added to its input's states, whose rows hold the bias; the original generation's other layers, to nothing.
      const Row bias = layer > 0 ? load_row(weights.out_bias + column) : Row{};
      const bool add = layer == 0 || shape_.residual;
      for (int r = 0; r < count; ++r) {
        float* to = stream + (row + r) * width + column;
        const Row old = add ? load_row(layer == 0 ? base_[start + row + r] + column : to) : Row{};
        Row sum = load_row(x + r * kCell);
        for (int p = 0; p < kParts; ++p) sum.part[p] += old.part[p] + bias.part[p];
        store_row(to, sum);
      }
    });
  }

  void dense(const Network& network, bool last, int start, int rows) {
    float* stream = stream_at(start);
    normalise(stream, shape_.stream(), shape_.hidden, rows, norm_);
    if (last) return pool_activations(network, rows, place_ + start, pooled_, [](int, Row&) {});
    expand(network, rows);
    contract(network, rows, [&](int row, int column, const Row& sum) {
      float* to = stream + row * shape_.stream() + column;
      Row old = load_row(to);
      for (int p = 0; p < kParts; ++p) old.part[p] += sum.part[p];
      store_row(to, old);
    });
  }

  // One network's part of a sparse block, for the rows that are sent to it.
  void sparse(const Network& network, int index, bool last) {
    const int begin = routing_.bounds[index], width = shape_.stream();
    blocks(routing_.bounds[index + 1] - begin, [&](int start, int rows) {
      const std::int32_t* row_of = routing_.row + begin + start;
      const float* score = routing_.score + begin + start;
      for (int r = 0; r < rows; ++r) {
        const float* from = routing_.plain + static_cast<std::ptrdiff_t>(row_of[r]) * width;
        for (int j = 0; j < width; j += kCell) put(norm_, width, r, j, load_row(from + j));
      }
      const auto add = [&](int row, int column, const Row& sum) {
        float* to = stream_at(row_of[row]) + column;
        Row old = load_row(to);
        for (int p = 0; p < kParts; ++p) old.part[p] += score[row] * sum.part[p];
        store_row(to, old);
      };
      if (!last) {
        expand(network, rows);
        contract(network, rows, add);
        return;
      }
      for (int r = 0; r < rows; ++r) {
        sent_[r] = place_[row_of[r]];
        for (int j = 0; j < width; j += kCell) add(r, j, load_row(network.down_bias + j));
      }
      pool_activations(network, rows, sent_, pooled_ + static_cast<std::ptrdiff_t>(index) * shape_.expanded(),
                       [&](int r, Row& row) {
                         for (int p = 0; p < kParts; ++p) row.part[p] *= score[r];
                       });
    });
  }

  // Hidden activations of the rows in norm_ into wide_.
  void expand(const Network& network, int rows) {
    gemm(norm_, shape_.stream(), rows, network.up, shape_.expanded(), product_, [&](int row, int count, int column, float* x) {
      const Row bias = load_row(network.up_bias + column);
      for (int r = 0; r < count; ++r) {
        Row sum = load_row(x + r * kCell);
        for (int p = 0; p < kParts; ++p) sum.part[p] = gelu(sum.part[p] + bias.part[p]);
        put(wide_, shape_.expanded(), row + r, column, sum);
      }
    });
  }

  // What a network makes of the activations in wide_, as (row, column, cell).
  template <class Sink>
  void contract(const Network& network, int rows, Sink sink) {
    gemm(wide_, shape_.expanded(), rows, network.down, shape_.stream(), product_,
         [&](int row, int count, int column, float* x) {
           const Row bias = load_row(network.down_bias + column);
           for (int r = 0; r < count; ++r) {
             Row sum = load_row(x + r * kCell);
             for (int p = 0; p < kParts; ++p) sum.part[p] += bias.part[p];
             sink(row + r, column, sum);
           }
         });
  }

  // The same activations in the last layer, changed by finish(row, cell) and pooled in `sums` by place.
  template <class Finish>
  void pool_activations(const Network& network, int rows, const std::int32_t* place, double* sums, Finish finish) {
    gemm(norm_, shape_.stream(), rows, network.up, shape_.expanded(), product_, [&](int row, int count, int column, float* x) {
      const Row bias = load_row(network.up_bias + column);
      for (int r = 0; r < count; ++r) {
        Row sum = load_row(x + r * kCell);
        for (int p = 0; p < kParts; ++p) sum.part[p] = gelu(sum.part[p] + bias.part[p]);
        finish(row + r, sum);
        store_row(x + r * kCell, sum);
      }
      pool(x, kCell, count, place + row, sums + column, shape_.pooled_row());
    });
  }

  void pool_stream(int start, int rows) {
    const int width = shape_.stream();
    for (int column = 0; column < width; column += kCell) {
      pool(stream_at(start) + column, width, rows, place_ + start, pooled_ + shape_.ends * shape_.expanded() + column,
           shape_.pooled_row());
    }
  }

  // q, k and v of the next layer.
  void project(const LayerWeights& next, int start, int rows) {
    normalise(stream_at(start), shape_.stream(), shape_.hidden, rows, norm_);
    const int projected = 3 * shape_.attended();
    float* qkv = qkv_ + static_cast<std::ptrdiff_t>(start) * projected;
    gemm(norm_, shape_.stream(), rows, next.qkv, projected, product_, [&](int row, int count, int column, float* x) {
      const Row bias = load_row(next.qkv_bias + column);
      for (int r = 0; r < count; ++r) {
        Row sum = load_row(x + r * kCell);
        for (int p = 0; p < kParts; ++p) sum.part[p] += bias.part[p];
        store_row(qkv + static_cast<std::ptrdiff_t>(row + r) * projected + column, sum);
      }
    });
  }

  const Shape shape_;
  const LayerWeights* weights_;
  const Call& call_;
  const int expert_;
  std::int64_t first_ = 0;
  int count_ = 0;
  char* memory_ = nullptr;
  std::size_t used_ = 0;
  float* product_;   // 2 x (kRows, 32): two products
  AttentionScratch scratch_;
  float* attended_;  // left operand (block, attended)
  float* norm_;      // left operand (block, stream)
  float* wide_;      // left operand (block, expanded)
  float* stream_;    // (rows, stream)
  float* qkv_;       // (rows, 3 * attended)
  float *keys_, *values_;  // packed, per coalition and head
  double* pooled_;   // (coalitions, M, pooled_row): each network's activations, then the stream
  std::int32_t* place_;  // (rows,) which of the pooled rows a row belongs to
  const float** base_;   // (rows,) what layer 1's projection is added to
  Routing routing_;
  std::int32_t* sent_;   // (block,) place of every row in norm_, where those are gathered
};

}  // namespace flmoe::cpu::FLMOE_LEVEL
