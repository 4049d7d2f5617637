// What a thread of the fused kernels holds of a tile of 16 rows, and the steps that both kernels are made of.
//
// `M` is the machine: a GPU's (machine.h) or the emulated one of the tests (emulator.h). It gives the thread its place,
// shared memory, barriers, exchange between the lanes of a warp, and products of a tile in registers with an operand in
// shared memory. Nothing else in a kernel's body knows where it runs.
#pragma once

#include "half.h"
#include "traits.h"

#if defined(__CUDACC__)
#define FLMOE_UNROLL _Pragma("unroll")
#define FLMOE_ROLLED _Pragma("unroll 1")
#define FLMOE_SOME _Pragma("unroll 4")
#define FLMOE_BODY __device__ __forceinline__
#else
#define FLMOE_UNROLL
#define FLMOE_ROLLED
#define FLMOE_SOME
#define FLMOE_BODY inline
#endif

namespace flmoe::fused {

// Of a tile of 16 rows and N columns: block b of eight columns gives row r (this thread's first) columns c, c + 1, then row
// r + 8 the same; c = 8 b + 2 (lane % 4).
template <int N>
struct Acc {
  float v[N / 8][4];
};

// Four numbers of one block, as they are kept in shared memory.
struct alignas(16) Quad {
  float v[4];
};

struct alignas(16) Bits {
  std::uint32_t v[4];
};

// Two neighbouring numbers of a row in global memory.
struct alignas(8) Two {
  float v[2];
};

FLMOE_BODY Two load_two(const float* from) { return *reinterpret_cast<const Two*>(from); }

// Sixteen columns of the left operand of a product: two blocks.
struct Fragment {
  std::uint32_t r[4];
};

// Two rows' numbers.
struct Pair {
  float v[2];
};

template <int N>
FLMOE_BODY void clear(Acc<N>& acc) {
  FLMOE_UNROLL
  for (int b = 0; b < N / 8; ++b) {
    FLMOE_UNROLL
    for (int i = 0; i < 4; ++i) acc.v[b][i] = 0.0f;
  }
}

// Two neighbouring blocks of fp32 numbers as one or two fragments: the rounded numbers, and what rounding left.
template <int Terms>
FLMOE_BODY void split(const float (&a)[4], const float (&b)[4], Fragment (&out)[Terms]) {
  const float* const block[2] = {a, b};
  FLMOE_UNROLL
  for (int half = 0; half < 2; ++half) {
    FLMOE_UNROLL
    for (int row = 0; row < 2; ++row) {
      const float x = block[half][2 * row], y = block[half][2 * row + 1];
      const std::uint32_t high = half_pair(x, y);
      out[0].r[2 * half + row] = high;
      if constexpr (Terms == 2) out[1].r[2 * half + row] = half_pair(x - first_of(high), y - second_of(high));
    }
  }
}

// Shared memory as one block of threads uses it.
template <class M, class T>
struct Shared {
  M& m;

  FLMOE_BODY char* stage(int index) const { return m.shared() + T::kStagesAt + index * T::kStageBytes; }
  // Block b of this thread's row: consecutive threads, consecutive sixteen bytes.
  FLMOE_BODY Quad& kept(int b) const {
    return reinterpret_cast<Quad*>(m.shared() + T::kKeptAt)[b * T::kConsumers * kLane + m.thread()];
  }
  FLMOE_BODY Bits& kept_bits(int b) const {
    return reinterpret_cast<Bits*>(m.shared() + T::kKeptAt)[b * T::kConsumers * kLane + m.thread()];
  }
  FLMOE_BODY float* pool(int warp) const { return reinterpret_cast<float*>(m.shared() + T::kPoolAt) + warp * kSlab; }
};

// Sixteen columns of halves, kept and taken back: of a block the first terms of both rows, then the second terms.
template <class M, class T>
FLMOE_BODY void keep(const Shared<M, T>& shared, int step, const Fragment (&rows)[T::kTerms]) {
  FLMOE_UNROLL
  for (int half = 0; half < 2; ++half) {
    Bits bits{};
    FLMOE_UNROLL
    for (int term = 0; term < T::kTerms; ++term) {
      FLMOE_UNROLL
      for (int row = 0; row < 2; ++row) bits.v[2 * term + row] = rows[term].r[2 * half + row];
    }
    shared.kept_bits(2 * step + half) = bits;
  }
}

template <class M, class T>
FLMOE_BODY void kept_halves(const Shared<M, T>& shared, int step, Fragment (&rows)[T::kTerms]) {
  FLMOE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const Bits bits = shared.kept_bits(2 * step + half);
    FLMOE_UNROLL
    for (int term = 0; term < T::kTerms; ++term) {
      FLMOE_UNROLL
      for (int row = 0; row < 2; ++row) rows[term].r[2 * half + row] = bits.v[2 * term + row];
    }
  }
}

// The ring of stages. Barrier 2 s says that stage s is full, barrier 2 s + 1 that all consumer warps have let go of it.
template <class M, class T>
struct Ring {
  M& m;
  Shared<M, T> shared;
  int next = 0;

  FLMOE_BODY static void prepare(M& m) {
    if (m.thread() == 0) {
      for (int s = 0; s < kStages; ++s) {
        m.barrier_init(2 * s, M::kFillArrivals);
        m.barrier_init(2 * s + 1, T::kConsumers);
      }
    }
    m.barriers_ready();
  }

  // The copying warp: start the next copy as soon as its stage is free.
  FLMOE_BODY void fill(const char* from, int bytes) {
    const int s = next % kStages, round = next / kStages;
    if (round > 0) m.wait(2 * s + 1, (round - 1) & 1);
    m.fill(2 * s, shared.stage(s), from, bytes);
    m.sync_warp();  // a lane that lagged two rounds behind would take one phase for another
    ++next;
  }

  // A consumer: the next stage, once it is full; then let go of it, when nothing reads it any more.
  FLMOE_BODY const char* take() {
    const int s = next % kStages;
    m.wait(2 * s, (next / kStages) & 1);
    return shared.stage(s);
  }
  FLMOE_BODY void release() {
    m.sync_warp();
    if (m.lane() == 0) m.arrive(2 * (next % kStages) + 1);
    ++next;
  }
};

// Sum over the four threads that share a row.
template <class M>
FLMOE_BODY float row_sum(M& m, float x) {
  x += m.shuffle_xor(x, 1);
  return x + m.shuffle_xor(x, 2);
}

template <class M>
FLMOE_BODY float row_max(M& m, float x) {
  float other = m.shuffle_xor(x, 1);
  x = x > other ? x : other;
  other = m.shuffle_xor(x, 2);
  return x > other ? x : other;
}

// LayerNorm's numbers of both rows: mean, and one over the standard deviation.
struct Norm {
  Pair mean, scale;
};

constexpr float kEpsilon = 1e-5f;

// Columns 16 step ... 16 step + 15 of the kept rows, normalised, as fragments.
template <class M, class T>
FLMOE_BODY void normalised(const Shared<M, T>& shared, const Norm& norm, int step, Fragment (&out)[T::kTerms]) {
  Quad block[2] = {shared.kept(2 * step), shared.kept(2 * step + 1)};
  FLMOE_UNROLL
  for (int half = 0; half < 2; ++half) {
    FLMOE_UNROLL
    for (int i = 0; i < 4; ++i) block[half].v[i] = (block[half].v[i] - norm.mean.v[i / 2]) * norm.scale.v[i / 2];
  }
  split<T::kTerms>(block[0].v, block[1].v, out);
}

// acc = bias, the same for all rows.
template <class M, int N>
FLMOE_BODY void set_bias(M& m, Acc<N>& acc, const float* bias) {
  FLMOE_UNROLL
  for (int b = 0; b < N / 8; ++b) {
    const Two two = load_two(bias + 8 * b + 2 * (m.lane() % 4));
    FLMOE_UNROLL
    for (int i = 0; i < 4; ++i) acc.v[b][i] = two.v[i % 2];
  }
}

// acc += rows times `Steps` steps of an operand, from step `first`; make(s, rows) gives the rows' fragments of one step.
template <class Weights, int Terms, int Steps, class M, class Make>
FLMOE_BODY void multiply(M& m, const char* weights, int first, Acc<Weights::kN>& acc, const Make& make) {
  m.mma_begin(acc);
  FLMOE_UNROLL
  for (int s = 0; s < Steps; ++s) {
    Fragment rows[Terms];
    make(s, rows);
    m.mma_fence();
    FLMOE_UNROLL
    for (int term = Terms - 1; term >= 0; --term) m.template mma<Weights>(acc, rows[term], weights, first + s);
  }
  m.mma_end(acc);
}

// acc += the normalised kept rows times a matrix with T::kHidden outputs, which arrives slab by slab.
template <class M, class T>
FLMOE_BODY void multiply_wide(M& m, Ring<M, T>& ring, const Norm& norm, Acc<T::kHidden>& acc) {
  FLMOE_ROLLED
  for (int slab = 0; slab < T::kHidden / kSlab; ++slab) {
    const char* weights = ring.take();
    multiply<typename T::Wide, T::kTerms, kSlabSteps>(m, weights, 0, acc, [&](int s, Fragment(&rows)[T::kTerms]) {
      normalised<M, T>(ring.shared, norm, slab * kSlabSteps + s, rows);
    });
    ring.release();
  }
}

// 64 hidden activations of the kept rows: normalise, multiply, GELU.
template <class M, class T>
FLMOE_BODY void hidden_slab(M& m, Ring<M, T>& ring, const Norm& norm, const float* bias, Acc<kSlab>& acc) {
  set_bias(m, acc, bias);
  const char* weights = ring.take();
  FLMOE_ROLLED
  for (int part = 0; part < T::kHidden / kSlab; ++part) {
    const int first = part * kSlabSteps;
    multiply<typename T::Tall, T::kTerms, kSlabSteps>(m, weights, first, acc, [&](int s, Fragment(&rows)[T::kTerms]) {
      normalised<M, T>(ring.shared, norm, first + s, rows);
    });
  }
  ring.release();
  FLMOE_UNROLL
  for (int b = 0; b < kSlab / 8; ++b) {
    FLMOE_UNROLL
    for (int i = 0; i < 4; ++i) {
      acc.v[b][i] = 0.5f * acc.v[b][i] * (1.0f + m.erf(acc.v[b][i] * 0.70710678118654752f));
    }
  }
}

// What is added to attention's output.
enum class Residual : int {
  none = 0,    // nothing: the original generation
  states = 1,  // the input of the first layer, (E, 2, L, H): absent and present token, chosen by the coalition's bits
  stream = 2,  // the stream so far, (E, C L, H)
};

struct Rows {
  int experts, coalitions, length;
};

// The two rows of a thread: tokens of one coalition of one expert, or of none.
struct Place {
  int expert, coalition, token;  // of the first row; the second is eight further
  int length;
  bool inside;  // the coalition exists

  FLMOE_BODY bool valid(int row) const { return inside && token + 8 * row < length; }
  // Among all experts' rows.
  FLMOE_BODY std::int64_t row(const Rows& sizes, int row) const {
    return (expert * std::int64_t{sizes.coalitions} + coalition) * sizes.length + token + 8 * row;
  }
};

struct ResidualSource {
  Residual kind = Residual::none;
  const float* rows = nullptr;
  const std::uint64_t* words = nullptr;  // (C, width) presence of tokens
  std::int64_t width = 0;

  // Address of one row's numbers; where there is no row, of some other's.
  FLMOE_BODY const float* row(const Rows& sizes, const Place& at, int row, int hidden) const {
    if (kind == Residual::stream) return rows + (at.valid(row) ? at.row(sizes, row) : 0) * hidden;
    const int token = at.valid(row) ? at.token + 8 * row : 0, coalition = at.valid(row) ? at.coalition : 0;
    const std::uint64_t word = words[coalition * width + (token >> 6)];
    const int state = static_cast<int>((word >> (token & 63)) & 1);
    return rows + ((at.expert * 2 + state) * std::int64_t{sizes.length} + token) * hidden;
  }
};

template <class M, class T>
FLMOE_BODY void keep(const Shared<M, T>& shared, const Acc<T::kHidden>& acc) {
  FLMOE_UNROLL
  for (int b = 0; b < T::kBlocks; ++b) {
    Quad quad;
    FLMOE_UNROLL
    for (int i = 0; i < 4; ++i) quad.v[i] = acc.v[b][i];
    shared.kept(b) = quad;
  }
}

// The kept rows grow by what the products gave. Tensor cores drop bits of what their sums start from, so these start at
// zero and meet the stream here, in fp32.
template <class M, class T>
FLMOE_BODY void add_to_kept(const Shared<M, T>& shared, const Acc<T::kHidden>& acc) {
  FLMOE_UNROLL
  for (int b = 0; b < T::kBlocks; ++b) {
    Quad quad = shared.kept(b);
    FLMOE_UNROLL
    for (int i = 0; i < 4; ++i) quad.v[i] += acc.v[b][i];
    shared.kept(b) = quad;
  }
}

// The stream: kept rows + bias + residual, kept again; its norm. `out` takes the rows (E, C L, H) unless it is null.
// In loops over what is kept, since whole rows in registers, with as many numbers to add, are more than there are.
template <class M, class T>
FLMOE_BODY Norm finish_rows(M& m, const Shared<M, T>& shared, const float* bias, const ResidualSource& residual,
                            const Rows& sizes, const Place& at, float* out) {
  const int column = 2 * (m.lane() % 4);
  const bool valid[2] = {at.valid(0), at.valid(1)};
  Norm norm{{{0.0f, 0.0f}}, {{0.0f, 0.0f}}};
  FLMOE_SOME
  for (int b = 0; b < T::kBlocks; ++b) {
    Quad quad = shared.kept(b);
    const Two two = load_two(bias + column + 8 * b);
    FLMOE_UNROLL
    for (int i = 0; i < 4; ++i) {
      quad.v[i] += two.v[i % 2];
      norm.mean.v[i / 2] += quad.v[i];
    }
    shared.kept(b) = quad;
  }
  if (residual.kind != Residual::none) {
    const float* from[2] = {residual.row(sizes, at, 0, T::kHidden) + column,
                            residual.row(sizes, at, 1, T::kHidden) + column};
    FLMOE_SOME
    for (int b = 0; b < T::kBlocks; ++b) {
      Quad quad = shared.kept(b);
      FLMOE_UNROLL
      for (int row = 0; row < 2; ++row) {
        const Two two = load_two(from[row] + 8 * b);
        FLMOE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float x = valid[row] ? two.v[i] : 0.0f;  // rows that are none stay finite: attention weighs them with zero
          quad.v[2 * row + i] += x;
          norm.mean.v[row] += x;
        }
      }
      shared.kept(b) = quad;
    }
  }
  FLMOE_UNROLL
  for (int row = 0; row < 2; ++row) norm.mean.v[row] = row_sum(m, norm.mean.v[row]) * (1.0f / T::kHidden);
  float* to[2];
  FLMOE_UNROLL
  for (int row = 0; row < 2; ++row) to[row] = out + (valid[row] ? at.row(sizes, row) : 0) * T::kHidden + column;
  FLMOE_SOME
  for (int b = 0; b < T::kBlocks; ++b) {
    const Quad quad = shared.kept(b);
    FLMOE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float apart = quad.v[i] - norm.mean.v[i / 2];
      norm.scale.v[i / 2] += apart * apart;
    }
    FLMOE_UNROLL
    for (int row = 0; row < 2; ++row) {
      if (out != nullptr && valid[row]) {
        *reinterpret_cast<Two*>(to[row] + 8 * b) = Two{{quad.v[2 * row], quad.v[2 * row + 1]}};
      }
    }
  }
  FLMOE_UNROLL
  for (int row = 0; row < 2; ++row) {
    norm.scale.v[row] = m.reciprocal_root(row_sum(m, norm.scale.v[row]) * (1.0f / T::kHidden) + kEpsilon);
  }
  return norm;
}

// Sixteen inputs, from `column` on, of a row-major matrix of halves (terms, ..., H): fragments of both rows, zeros where
// there is no row.
template <class M, int Terms>
FLMOE_BODY void load_rows(M& m, const std::uint16_t* const (&source)[2], const bool (&valid)[2], std::int64_t plane,
                          int column, Fragment (&out)[Terms]) {
  FLMOE_UNROLL
  for (int term = 0; term < Terms; ++term) {
    FLMOE_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int at = column + 8 * (r / 2) + 2 * (m.lane() % 4);
      const std::uint32_t two = *reinterpret_cast<const std::uint32_t*>(source[r % 2] + term * plane + at);
      out[term].r[r] = valid[r % 2] ? two : 0u;
    }
  }
}

}  // namespace flmoe::fused
