// The CPU engine's levels against plain double arithmetic, under AddressSanitizer and UBSan: every array is an exact-size
// heap block, so a vector that reads past its matrix is an error and not luck.
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "../testing.h"
#include "dispatch.h"

namespace {
std::atomic<int> granted{1 << 30};  // threads that the system still grants
}

// In place of the system's: refuses threads when no more are granted.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const Create create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  return granted-- > 0 ? create(thread, attributes, start, argument) : EAGAIN;
}

namespace {

using namespace flmoe::cpu;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Aligned memory of exactly that many elements.
template <class T>
struct Block {
  explicit Block(std::size_t count) : size(count) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, std::max<std::size_t>(1, count * sizeof(T))) != 0) throw std::bad_alloc();
    owned.reset(static_cast<T*>(p));
  }
  T* data() { return owned.get(); }
  T& operator[](std::size_t i) { return owned.get()[i]; }
  std::size_t size;
  std::unique_ptr<T, Free> owned;
};

std::uint64_t state = 1;

// Uniform in (-1, 1).
double random_number() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<double>(state >> 11) * 0x1p-52 - 1.0;
}

double gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }

// What simd.h states, over max(1, |x|).
constexpr double kGeluError = 1.3e-7;

void test_functions(const Level& level) {
  for (const std::int64_t count : {1, 3, 16, 1001}) {
    Block<float> x(count), y(count);
    for (std::int64_t i = 0; i < count; ++i) x[i] = static_cast<float>(60 * random_number());
    level.exp2(x.data(), y.data(), count);
    for (std::int64_t i = 0; i < count; ++i) {
      const double exact = std::exp2(static_cast<double>(x[i]));
      CHECK(std::abs(y[i] - exact) <= 2.5e-7 * exact, "%s: 2^%g is %g", level.name, x[i], y[i]);
    }
    level.gelu(x.data(), y.data(), count);
    for (std::int64_t i = 0; i < count; ++i) {
      const double allowed = kGeluError * std::max(1.0f, std::abs(x[i]));
      CHECK(std::abs(y[i] - gelu(x[i])) <= allowed, "%s: gelu(%g) is %g", level.name, x[i], y[i]);
    }
  }
  // As exact as stated over all that is used of them, and where it is special.
  constexpr std::int64_t count = 1 << 18;
  Block<float> x(count), y(count);
  for (std::int64_t i = 0; i < count; ++i) x[i] = static_cast<float>(-125 + 251.0 * static_cast<double>(i) / (count - 1));
  level.exp2(x.data(), y.data(), count);
  double worst = 0;
  for (std::int64_t i = 0; i < count; ++i) worst = std::max(worst, std::abs(y[i] / std::exp2(static_cast<double>(x[i])) - 1));
  CHECK(worst <= 2.5e-7, "%s: 2^x is off by %g", level.name, worst);
  for (std::int64_t i = 0; i < count; ++i) x[i] = static_cast<float>(-30 + 60.0 * static_cast<double>(i) / (count - 1));
  const float special[] = {0.0f, -0.0f, 1e-30f, -1e-30f, 1e4f, -1e4f};
  std::copy(std::begin(special), std::end(special), x.data());
  level.gelu(x.data(), y.data(), count);
  double other = 0;  // how far the GELU by tanh is from ours: it is told apart
  worst = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double at = x[i], size = std::max(1.0, std::abs(at));
    worst = std::max(worst, std::abs(y[i] - gelu(at)) / size);
    const double by_tanh = 0.5 * at * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (at + 0.044715 * at * at * at)));
    other = std::max(other, std::abs(y[i] - by_tanh) / size);
  }
  CHECK(worst <= kGeluError && other > 1e-5, "%s: gelu is off by %g, and by %g from its form with tanh", level.name, worst, other);
}

// How the plain computation rounds: not at all (double), or as a level does, so that a tolerance is twice the error that
// the level's arithmetic makes in the plainest program, and no constant is chosen by hand.
enum class Arithmetic { exact, fp32, bf16x3 };

double rounded(Arithmetic arithmetic, double x) {
  return arithmetic == Arithmetic::exact ? x : static_cast<double>(static_cast<float>(x));
}

// Nearest bfloat16.
double short_term(double x) {
  const float single = static_cast<float>(x);
  std::uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  float term;
  std::memcpy(&term, &bits, sizeof term);
  return term;
}

// total + a * b.
double add_product(Arithmetic arithmetic, double total, double a, double b) {
  if (arithmetic != Arithmetic::bf16x3) return rounded(arithmetic, total + a * b);
  const double high_a = short_term(a), high_b = short_term(b);
  const double low_a = short_term(a - high_a), low_b = short_term(b - high_b);
  for (const double product : {low_a * high_b, high_a * low_b, high_a * high_b}) total = rounded(arithmetic, total + product);
  return total;
}

// Relative error of one product: of rounding it, or of what two terms an operand (8 bits each) leave out.
double rounding(Arithmetic arithmetic) { return arithmetic == Arithmetic::bf16x3 ? 3 * 0x1p-18 : 0x1p-23; }

Arithmetic arithmetic_of(const Level& level) {
  return level.arithmetic[0] == 'b' ? Arithmetic::bf16x3 : Arithmetic::fp32;
}

void test_products(const Level& level) {
  const Arithmetic arithmetic = arithmetic_of(level);
  for (const int m : {1, 5, 14, 16, 17, 28, 33, 61}) {
    for (const auto& [k, n] : {std::pair{32, 32}, {96, 32}, {32, 64}, {256, 128}}) {
      Block<float> a(m * k), b(k * n), c(m * n);
      for (int i = 0; i < m * k; ++i) a[i] = static_cast<float>(random_number());
      for (int i = 0; i < k * n; ++i) b[i] = static_cast<float>(random_number());
      Block<char> workspace(sizeof(float) * ((m + 15) / 16 * 16 * k + k * n + 2 * 64 * kCell) + 64);
      const unsigned before = level.begin();
      level.matmul(a.data(), b.data(), c.data(), m, k, n, workspace.data());
      level.end(before);
      for (int i = 0; i < m * n; ++i) {
        double exact = 0, size = 0;
        for (int j = 0; j < k; ++j) {
          const double product = static_cast<double>(a[i / n * k + j]) * b[j * n + i % n];
          exact += product;
          size += std::abs(product);
        }
        // Every addition rounds once; split operands take three products.
        const int additions = arithmetic == Arithmetic::bf16x3 ? 3 * k : k;
        CHECK(std::abs(c[i] - exact) <= (additions * 0x1p-23 + rounding(arithmetic)) * size,
              "%s: product %d x %d x %d, element %d", level.name, m, k, n, i);
      }
    }
  }
}

// A whole random problem, its layers as padded matrices for the engine and for the double loop below.
struct Problem {
  Problem(const Shape& s, std::int64_t count, std::vector<std::int32_t> slots_of_modality)
      : shape(s), coalitions(count), room(std::move(slots_of_modality)), states(2ul * s.experts * s.length * 3 * s.attended()),
        base(2ul * s.experts * s.length * s.stream()), head(1ul * s.experts * s.classes * s.pooled()),
        head_bias(1ul * s.experts * s.classes), present(count * s.length), modality(s.length) {
    for (int e = 0; e < s.experts; ++e) {
      for (int l = 0; l < s.layers; ++l) {
        add(s.hidden, s.stream(), 3 * s.attended(), true);
        add(1, 1, 3 * s.attended(), true);
        add(s.attended(), s.attended(), s.stream(), false, true);
        add(1, 1, s.stream(), false);
        // A sparse layer keeps a dense network too, which nothing must use.
        for (int network = 0; network < 1 + (sparse(l) ? s.networks : 0); ++network) {
          add(s.hidden, s.stream(), s.expanded(), false);
          add(1, 1, s.expanded(), false);
          add(s.wide, s.expanded(), s.stream(), false);
          add(1, 1, s.stream(), false);
        }
        gates.emplace_back(1ul * s.stream() * padded(s.networks));
        gates.emplace_back(padded(s.networks));
        for (std::size_t gate = gates.size() - 2; gate < gates.size(); ++gate) {
          for (std::size_t i = 0; i < gates[gate].size; ++i) {
            const std::size_t columns = padded(s.networks);
            gates[gate][i] = small(i / columns < static_cast<std::size_t>(s.hidden) &&
                                   i % columns < static_cast<std::size_t>(s.networks));
          }
        }
      }
    }
    for (std::size_t i = 0; i < states.size; ++i) states[i] = by_head(static_cast<int>(i % s.attended()));
    for (std::size_t i = 0; i < base.size; ++i) base[i] = small(static_cast<int>(i % s.stream()) < s.hidden);
    for (std::size_t i = 0; i < head.size; ++i) head[i] = random_number() / s.length;
    for (std::size_t i = 0; i < head_bias.size; ++i) head_bias[i] = random_number();
    for (std::size_t i = 0; i < present.size; ++i) present[i] = random_number() > 0;
    for (int t = 0; t < s.length; ++t) modality[t] = t * s.modalities / s.length;
  }

  static float small(bool real) { return real ? static_cast<float>(random_number()) : 0.0f; }
  float by_head(int column) { return small(column % shape.head_width() < shape.depth()); }

  // One matrix of `rows` real rows; padding is zero, by head in the columns or in the rows where asked.
  void add(int rows, int padded_rows, int columns, bool head_columns, bool head_rows = false) {
    matrices.emplace_back(1ul * padded_rows * columns);
    Block<float>& m = matrices.back();
    const float scale = rows > 1 ? 1.0f / std::sqrt(static_cast<float>(rows)) : 0.3f;
    const int real_columns = columns == shape.stream() ? shape.hidden : columns == shape.expanded() ? shape.wide : columns;
    for (int i = 0; i < padded_rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        const bool row = head_rows ? i % shape.head_width() < shape.depth() : i < rows;
        const bool column = head_columns ? j % shape.head_width() < shape.depth() : j < real_columns;
        m[1ul * i * columns + j] = scale * small(row && column);
      }
    }
  }

  bool sparse(int layer) const { return shape.networks > 0 && layer % 2 == 0; }

  // Matrices of one layer; those of a network start at 4 and, in a sparse layer, at 8, 12, ...
  float* matrix(int expert, int layer, int which) {
    std::size_t at = 0;
    for (int l = 0; l < (expert > 0 ? shape.layers : layer); ++l) {
      const std::size_t size = 8 + (sparse(l) ? 4 * shape.networks : 0);
      at += expert * size + (l < layer ? size : 0);
    }
    return matrices[at + which].data();
  }
  float* gate(int expert, int layer, int which) { return gates[(expert * shape.layers + layer) * 2 + which].data(); }

  Shape shape;
  std::int64_t coalitions;
  std::vector<std::int32_t> room;  // slots in every network by modality; empty: any number
  std::vector<Block<float>> matrices, gates;
  Block<float> states, base;
  Block<double> head, head_bias;
  Block<std::uint8_t> present;
  Block<std::int32_t> modality;
};

using Rows = std::vector<std::vector<double>>;

Rows times(Arithmetic arithmetic, const Rows& x, const float* w, const float* bias, int columns) {
  Rows y(x.size(), std::vector<double>(columns));
  for (std::size_t r = 0; r < x.size(); ++r) {
    for (std::size_t i = 0; i < x[r].size(); ++i) {
      for (int j = 0; j < columns; ++j) y[r][j] = add_product(arithmetic, y[r][j], x[r][i], w[i * columns + j]);
    }
    for (int j = 0; bias != nullptr && j < columns; ++j) y[r][j] = rounded(arithmetic, y[r][j] + bias[j]);
  }
  return y;
}

Rows normalised(Arithmetic arithmetic, const Rows& x, int hidden) {
  Rows y = x;
  for (auto& row : y) {
    double mean = 0, square = 0;
    for (int j = 0; j < hidden; ++j) mean += row[j] / hidden;
    for (int j = 0; j < hidden; ++j) square += (row[j] - mean) * (row[j] - mean) / hidden;
    for (int j = 0; j < hidden; ++j) row[j] = rounded(arithmetic, (row[j] - mean) / std::sqrt(square + 1e-5));
  }
  return y;
}

Rows attended(Arithmetic arithmetic, const Rows& qkv, const Shape& shape) {
  const int width = shape.head_width(), all = shape.attended();
  Rows out(qkv.size(), std::vector<double>(all));
  for (int h = 0; h < shape.heads; ++h) {
    for (std::size_t r = 0; r < qkv.size(); ++r) {
      double total = 0;
      for (const auto& key : qkv) {
        double score = 0;
        for (int j = 0; j < width; ++j) {
          score = add_product(arithmetic, score, qkv[r][h * width + j], key[all + h * width + j]);
        }
        const double weight = rounded(arithmetic, std::exp2(score));
        total = rounded(arithmetic, total + weight);
        for (int j = 0; j < width; ++j) {
          double& sum = out[r][h * width + j];
          sum = add_product(arithmetic, sum, weight, key[2 * all + h * width + j]);
        }
      }
      for (int j = 0; j < width; ++j) out[r][h * width + j] = rounded(arithmetic, out[r][h * width + j] / total);
    }
  }
  return out;
}

// Where the tokens of a coalition go: networks and scores of each.
struct Sent {
  std::vector<std::vector<int>> networks;
  Rows scores;
};

// `seen` gets every gate's logits. They are float32 even where products are split.
Sent sent(Arithmetic arithmetic, Problem& p, int expert, int layer, const Rows& rows, std::vector<double>& seen) {
  const Shape& s = p.shape;
  const Arithmetic plain = arithmetic == Arithmetic::exact ? arithmetic : Arithmetic::fp32;
  const Rows logits = times(plain, rows, p.gate(expert, layer, 0), p.gate(expert, layer, 1), padded(s.networks));
  std::vector<std::vector<int>> served(s.modalities, std::vector<int>(s.networks));
  Sent to;
  for (int t = 0; t < s.length; ++t) {
    const std::vector<double>& mine = logits[t];
    seen.insert(seen.end(), mine.begin(), mine.begin() + s.networks);
    std::vector<int> order(s.networks);
    for (int i = 0; i < s.networks; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return mine[a] > mine[b]; });
    double total = 0;
    for (int i = 0; i < (s.among_all ? s.networks : s.slots); ++i) total += std::exp(mine[order[i]]);
    to.networks.emplace_back();
    to.scores.emplace_back();
    for (int i = 0; i < s.slots; ++i) {
      int& before = served[p.modality[t]][order[i]];
      if (!p.room.empty() && before >= p.room[p.modality[t]]) continue;
      ++before;
      to.networks[t].push_back(order[i]);
      to.scores[t].push_back(rounded(arithmetic, std::exp(mine[order[i]]) / total));
    }
  }
  return to;
}

std::vector<double> logits_of(Arithmetic arithmetic, Problem& p, int expert, std::int64_t coalition,
                              std::vector<double>& seen) {
  const Shape& s = p.shape;
  Rows qkv(s.length), stream(s.length);
  for (int t = 0; t < s.length; ++t) {
    const std::size_t row = (2ul * expert + p.present[coalition * s.length + t]) * s.length + t;
    qkv[t].assign(p.states.data() + row * 3 * s.attended(), p.states.data() + (row + 1) * 3 * s.attended());
    stream[t].assign(p.base.data() + row * s.stream(), p.base.data() + (row + 1) * s.stream());
  }
  std::vector<double> pooled(s.pooled());
  for (int l = 0; l < s.layers; ++l) {
    const float* bias = l > 0 ? p.matrix(expert, l, 3) : nullptr;
    const Rows branch = times(arithmetic, attended(arithmetic, qkv, s), p.matrix(expert, l, 2), bias, s.stream());
    for (int t = 0; t < s.length; ++t) {
      for (int j = 0; j < s.stream(); ++j) {
        stream[t][j] = rounded(arithmetic, branch[t][j] + (l == 0 || s.residual ? stream[t][j] : 0.0));
      }
    }
    const Rows rows = normalised(arithmetic, stream, s.hidden);
    Sent to;
    if (p.sparse(l)) to = sent(arithmetic, p, expert, l, rows, seen);
    for (int t = 0; t < s.length; ++t) {
      double* pool = pooled.data() + p.modality[t] * s.pooled_row();
      for (std::size_t slot = 0; slot < (p.sparse(l) ? to.networks[t].size() : 1); ++slot) {
        const int network = p.sparse(l) ? to.networks[t][slot] : 0, at = p.sparse(l) ? 8 + 4 * network : 4;
        const double score = p.sparse(l) ? to.scores[t][slot] : 1.0;
        Rows wide = times(arithmetic, {rows[t]}, p.matrix(expert, l, at), p.matrix(expert, l, at + 1), s.expanded());
        for (double& x : wide[0]) x = rounded(arithmetic, gelu(x));
        if (l + 1 < s.layers) {
          const Rows down = times(arithmetic, wide, p.matrix(expert, l, at + 2), p.matrix(expert, l, at + 3), s.stream());
          for (int j = 0; j < s.stream(); ++j) stream[t][j] = rounded(arithmetic, stream[t][j] + score * down[0][j]);
          continue;
        }
        for (int j = 0; j < s.expanded(); ++j) {
          pool[network * s.expanded() + j] += rounded(arithmetic, score * wide[0][j]);
        }
        const float* shift = p.matrix(expert, l, at + 3);  // a dense block's is part of the head
        for (int j = 0; p.sparse(l) && j < s.stream(); ++j) {
          stream[t][j] = rounded(arithmetic, stream[t][j] + score * shift[j]);
        }
      }
      for (int j = 0; l + 1 == s.layers && j < s.stream(); ++j) pool[s.ends * s.expanded() + j] += stream[t][j];
    }
    if (l + 1 == s.layers) break;
    qkv = times(arithmetic, normalised(arithmetic, stream, s.hidden), p.matrix(expert, l + 1, 0),
                p.matrix(expert, l + 1, 1), 3 * s.attended());
  }
  std::vector<double> logits(s.classes);
  for (int k = 0; k < s.classes; ++k) {
    logits[k] = p.head_bias[expert * s.classes + k];
    for (int j = 0; j < s.pooled(); ++j) logits[k] += pooled[j] * p.head[(1ul * expert * s.classes + k) * s.pooled() + j];
  }
  return logits;
}

// Pattern sums of the whole problem, every token a group of its own with the patterns absent and present.
struct Table {
  explicit Table(Problem& p)
      : sums(1ul * p.shape.experts * p.shape.heads * patterns(p) * queries(p) * step(p)),
        pick(p.coalitions * p.shape.length), absent_row(p.shape.length) {
    const Shape& s = p.shape;
    const int width = s.head_width(), all = s.attended();
    for (int t = 0; t < s.length; ++t) absent_row[t] = s.length + t;
    for (std::size_t i = 0; i < pick.size; ++i) {
      pick[i] = 2 * static_cast<int>(i % s.length) + p.present[i];
    }
    std::size_t at = 0;
    for (int pattern = 0; pattern < patterns(p); ++pattern) {
      for (int e = 0; e < s.experts; ++e) {
        const auto row = [&](int present, int t) {
          return p.states.data() + ((2ul * e + present) * s.length + t) * 3 * all;
        };
        for (int h = 0; h < s.heads; ++h) {
          const float* key = row(pattern % 2, pattern / 2) + h * width;
          for (int q = 0; q < queries(p); ++q, at += step(p)) {
            const float* query = row(q < s.length, q % s.length) + h * width;
            double score = 0;
            for (int j = 0; j < width; ++j) score += static_cast<double>(query[j]) * key[all + j];
            const double weight = std::exp2(score);
            for (int j = 0; j < s.depth(); ++j) sums[at + j] = static_cast<float>(weight * key[2 * all + j]);
            sums[at + s.depth()] = static_cast<float>(weight);
          }
        }
      }
    }
  }
  static int patterns(const Problem& p) { return 2 * p.shape.length; }
  static int queries(const Problem& p) { return 2 * p.shape.length; }
  static int step(const Problem& p) { return p.shape.depth() + 1; }

  Block<float> sums;
  Block<std::int32_t> pick, absent_row;
};

// Smallest difference between the last network that is chosen and the first that is not.
double smallest_gap(const Shape& shape, std::vector<double> seen) {
  double gap = HUGE_VAL;
  for (auto at = seen.begin(); at != seen.end() && shape.slots < shape.networks; at += shape.networks) {
    std::sort(at, at + shape.networks, std::greater<double>());
    gap = std::min(gap, at[shape.slots - 1] - at[shape.slots]);
  }
  return gap;
}

void test_whole(const Shape& shape, std::int64_t coalitions, const std::vector<std::int32_t>& room = {}) {
  Problem p(shape, coalitions, room);
  Table table(p);
  std::vector<double> exact;
  bool full = true;  // whether limited room changes nothing
  double size = 0, error_of[] = {0, 0, 0};  // of every arithmetic
  for (std::int64_t c = 0; c < coalitions; ++c) {
    for (int e = 0; e < shape.experts; ++e) {
      std::vector<double> seen;
      const std::vector<double> logits = logits_of(Arithmetic::exact, p, e, c, seen);
      const double gap = smallest_gap(shape, seen);
      if (!room.empty()) {
        p.room.clear();
        std::vector<double> ignored;
        full = full && logits_of(Arithmetic::exact, p, e, c, ignored) == logits;
        p.room = room;
      }
      for (const Arithmetic arithmetic : {Arithmetic::fp32, Arithmetic::bf16x3}) {
        std::vector<double> also;
        const std::vector<double> rough = logits_of(arithmetic, p, e, c, also);
        double off = 0;
        for (std::size_t i = 0; i < seen.size(); ++i) off = std::max(off, std::abs(also[i] - seen[i]));
        // Otherwise a choice could change, and what follows would say nothing.
        CHECK(gap > 4 * off, "L %d, H %d: gap %g of the gate, error %g", shape.length, shape.hidden, gap, off);
        double& worst = error_of[static_cast<int>(arithmetic)];
        for (int k = 0; k < shape.classes; ++k) worst = std::max(worst, std::abs(rough[k] - logits[k]));
      }
      for (const double logit : logits) size = std::max(size, std::abs(logit));
      exact.insert(exact.end(), logits.begin(), logits.end());
    }
  }
  CHECK(room.empty() || !full, "L %d, H %d: no token is left without room", shape.length, shape.hidden);
  for (const Support& support : levels()) {
    if (!support.missing.empty()) continue;
    const Level& level = *support.level;
    const Arithmetic arithmetic = arithmetic_of(level);
    const double allowed = 2 * (error_of[static_cast<int>(arithmetic)] + rounding(arithmetic) * size);
    std::vector<Block<float>> packed;
    std::vector<LayerWeights> layers;
    std::vector<std::vector<Network>> networks;
    for (int e = 0; e < shape.experts; ++e) {
      for (int l = 0; l < shape.layers; ++l) {
        const auto pack = [&](int which, int rows, int columns) {
          packed.emplace_back(1ul * rows * columns);
          level.pack(p.matrix(e, l, which), rows, columns, packed.back().data());
          return packed.back().data();
        };
        const auto network = [&](int at) -> Network {
          return {pack(at, shape.stream(), shape.expanded()), p.matrix(e, l, at + 1),
                  pack(at + 2, shape.expanded(), shape.stream()), p.matrix(e, l, at + 3)};
        };
        layers.push_back({pack(0, shape.stream(), 3 * shape.attended()), p.matrix(e, l, 1),
                          pack(2, shape.attended(), shape.stream()), p.matrix(e, l, 3), network(4)});
        if (!p.sparse(l)) continue;
        networks.emplace_back();
        for (int n = 0; n < shape.networks; ++n) networks.back().push_back(network(8 + 4 * n));
        layers.back().gate = p.gate(e, l, 0);
        layers.back().gate_bias = p.gate(e, l, 1);
        layers.back().networks = networks.back().data();
      }
    }
    const std::size_t stride = (level.workspace(shape) + 63) / 64 * 64;
    for (const bool shared : {false, true}) {
      const FirstAttention first{shared ? table.sums.data() : nullptr, table.pick.data(), table.absent_row.data(),
                                 shape.length, Table::queries(p), shared ? nullptr : p.states.data()};
      std::vector<double> one;
      for (const int threads : {1, 3}) {
        Block<char> workspace(threads * stride);
        std::fill(workspace.data(), workspace.data() + workspace.size, static_cast<char>(0xff));  // NaN everywhere
        Block<double> logits(coalitions * shape.experts * shape.classes);
        const Call call{first, p.base.data(), p.present.data(), p.modality.data(), room.empty() ? nullptr : p.room.data(),
                        p.head.data(), p.head_bias.data(), logits.data(), coalitions};
        run(level, {shape, layers.data()}, call, threads, workspace.data(), stride);
        for (std::size_t i = 0; i < logits.size; ++i) {
          const double error = std::abs(logits[i] - exact[i]);
          CHECK(error <= allowed, "%s: L %d, H %d, %d networks, shared %d: error %g, allowed %g", level.name,
                shape.length, shape.hidden, shape.networks, shared, error, allowed);
        }
        const std::vector<double> got(logits.data(), logits.data() + logits.size);
        if (threads == 1) one = got;
        CHECK(got == one, "%s: %d threads", level.name, threads);
      }
    }
  }
}

void test_dispatch() {
  CHECK(levels().back().name == "portable" && levels().back().missing.empty(), "portable is always there");
  CHECK(std::string(level("portable").name) == "portable", "by name");
  bool refused = false;
  try {
    level("none");
  } catch (const std::runtime_error& error) {
    refused = std::string(error.what()).find("portable") != std::string::npos;
  }
  CHECK(refused, "an unknown level");
}

// A level whose units only say that they ran, and on which thread.
struct Roll {
  std::atomic<int> units{0};
  std::mutex lock;
  std::set<std::thread::id> threads;
} roll;

const Level counting{"counting",
                     "none",
                     nullptr,
                     nullptr,
                     [](const Model&, const Call&, int, std::int64_t, int count, char*) {
                       roll.units += count;
                       std::this_thread::sleep_for(std::chrono::milliseconds(1));
                       const std::lock_guard<std::mutex> held(roll.lock);
                       roll.threads.insert(std::this_thread::get_id());
                     },
                     [] { return 0u; },
                     [](unsigned) {},
                     nullptr,
                     nullptr,
                     nullptr};

// Units of one coalition each, on up to `threads` threads of which the system grants so many beside the calling one.
bool roll_call(std::int64_t coalitions, int threads, int of_system, const std::function<bool()>& stop = {}) {
  struct Settle {
    ~Settle() { granted = 1 << 30; }
  } settle;
  roll.units = 0;
  roll.threads.clear();
  granted = of_system;
  const Shape shape{1, 1, kStackRows, 32, 1, 32, 1, 1, true};
  Call call{};
  call.coalitions = coalitions;
  return run(counting, {shape, nullptr}, call, threads, nullptr, 0, stop);
}

// Whatever the system grants, every coalition is evaluated, and threads that started are waited for.
void test_threads_that_do_not_start() {
  for (const int of_system : {0, 1, 2, 9}) {
    CHECK(roll_call(40, 4, of_system), "%d of 3 threads granted", of_system);
    const int most = 1 + std::min(of_system, 3), seen = static_cast<int>(roll.threads.size());
    CHECK(roll.units == 40, "%d of 40 units with %d of 3 threads", roll.units.load(), of_system);
    CHECK(seen <= most && (of_system == 0 || seen > 1), "%d threads at work, %d granted", seen, of_system);
  }
}

// Asked to stop, or thrown out, no thread takes another unit and all are waited for.
void test_stopping() {
  int asked = 0;
  CHECK(!roll_call(100000, 3, 9, [&] { return ++asked == 2; }), "stopped");
  CHECK(asked == 2 && roll.units > 2 && roll.units < 10000, "%d units after %d questions", roll.units.load(), asked);
  bool thrown = false;
  try {
    roll_call(100000, 3, 9, []() -> bool { throw std::runtime_error("enough"); });
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  const int units = roll.units;
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(thrown && roll.units == units && units < 10000, "%d units, then %d", units, roll.units.load());
}

}  // namespace

int main() {
  test_dispatch();
  test_threads_that_do_not_start();
  test_stopping();
  for (const Support& support : levels()) {
    if (!support.missing.empty()) continue;
    test_functions(*support.level);
    test_products(*support.level);
  }
  // experts, layers, length, hidden, heads, wide, classes, modalities, residual
  test_whole({2, 2, 1, 8, 1, 16, 3, 1, true}, 3);
  test_whole({1, 1, 7, 24, 3, 48, 5, 2, true}, 20);
  test_whole({2, 3, 9, 40, 5, 80, 2, 3, true}, 16);
  test_whole({1, 2, 33, 32, 1, 64, 2, 2, false}, 5);
  test_whole({1, 2, 131, 16, 1, 32, 2, 2, true}, 2);
  test_whole({1, 2, 230, 64, 2, 72, 2, 2, true}, 1);
  // and networks, slots, whether scores are among all, networks of the last layer; then room by modality
  test_whole({2, 1, 7, 24, 3, 48, 5, 2, true, 4, 2, false, 4}, 20);
  test_whole({2, 2, 9, 40, 5, 80, 2, 3, true, 33, 1, true, 1}, 16);
  test_whole({1, 3, 5, 24, 2, 40, 2, 2, true, 3, 3, false, 3}, 9);
  test_whole({1, 3, 11, 16, 2, 32, 2, 2, false, 5, 2, false, 5}, 13, {2, 1});
  test_whole({1, 2, 230, 32, 1, 40, 2, 2, true, 2, 1, true, 1}, 1, {40, 0});
  std::printf("cpu_test: %ld checks passed\n", flmoe::testing::checks);
  return 0;
}
