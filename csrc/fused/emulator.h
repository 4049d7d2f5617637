// The machine of the tests: a block of threads on one core of a CPU, with no GPU's help.
//
// Every thread of the block is a fibre; one runs until it waits. Shuffles, warp and group barriers, and products meet as
// they would on a GPU. A copy does not happen when it is asked for: its stage is filled with NaN, and the bytes arrive when
// somebody waits for them. Products happen when they are waited for. So a wait that is missing is seen, every time, and
// not when the weather is bad; a wait for what never comes is reported as such.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fused.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace flmoe::fused {

// Planted mistakes, for tests that must fail.
enum class Fault : int {
  none = 0,
  consumers_wait_for_no_copy = 1,
  copies_wait_for_no_consumer = 2,
  consumers_keep_stages = 3,
  products_not_waited_for = 4,
  wrong_swizzle = 5,
};

class Emulator {
 public:
  Emulator(int threads, int shared_bytes, int barriers, Fault fault, bool backwards)
      : fault(fault),
        threads_(threads),
        backwards_(backwards),
        memory_(static_cast<char*>(std::aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024)), &std::free),
        barriers_(barriers),
        warps_(threads / kLane),
        groups_(threads / (kLane * kGroupWarps) + 1),
        values_(threads) {
    std::memset(memory_.get(), 0xFF, shared_bytes);  // NaN in any format
  }

  // Run body(thread) for every thread of the block.
  template <class Body>
  void run(Body body) {
    body_ = body;
    fibres_.clear();
    for (int t = 0; t < threads_; ++t) fibres_.push_back(std::make_unique<Fibre>());
    for (int t = 0; t < threads_; ++t) {
      Fibre& fibre = *fibres_[t];
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.get();
      fibre.context.uc_stack.ss_size = kStack;
      fibre.context.uc_link = nullptr;
      const auto self = reinterpret_cast<std::uintptr_t>(this);
      makecontext(&fibre.context, reinterpret_cast<void (*)()>(&Emulator::start), 3, static_cast<unsigned>(self),
                  static_cast<unsigned>(static_cast<std::uint64_t>(self) >> 32), static_cast<unsigned>(t));
    }
    int left = threads_;
    while (left > 0) {
      const std::uint64_t before = events_;
      for (int i = 0; i < threads_ && problem_.empty(); ++i) {
        const int t = backwards_ ? threads_ - 1 - i : i;
        if (fibres_[t]->finished) continue;
        resume(t);
        left -= fibres_[t]->finished;
      }
      if (!problem_.empty()) throw std::runtime_error(problem_);
      if (left > 0 && events_ == before) throw std::runtime_error(deadlock());
    }
  }

  struct Copy {
    char* to;
    const char* from;
    int bytes;
  };
  struct Barrier {
    int arrivals = 0, pending = 0;
    unsigned phase = 0;
    std::vector<Copy> copies;
  };
  struct Meeting {
    int arrived = 0;
    unsigned generation = 0;
  };

  char* memory() { return memory_.get(); }
  float& value(int thread) { return values_[thread]; }
  Barrier& barrier(int index) { return barriers_[index]; }

  void meet_warp(int warp) { meet(warps_[warp], kLane); }
  void meet_group(int group) { meet(groups_[group], kLane * kGroupWarps); }
  void meet_all() { meet(all_, threads_); }

  void barrier_init(int index, int arrivals) { barriers_[index] = Barrier{arrivals, arrivals, 0, {}}; }
  void arrive(int index) {
    Barrier& barrier = barriers_[index];
    if (barrier.pending == 0) {
      problem_ = "barrier " + std::to_string(index) + ": an arrival too many in one phase";
      yield();
    }
    --barrier.pending;
    ++events_;
    turn(barrier);
  }
  void copy(int index, char* to, const char* from, int bytes) {
    std::memset(to, 0xFF, bytes);
    barriers_[index].copies.push_back({to, from, bytes});
    arrive(index);
  }
  void wait(int index, unsigned parity) {
    Barrier& barrier = barriers_[index];
    fibres_[current_]->waits_for = index;
    while ((barrier.phase & 1u) == parity) {
      for (const Copy& copy : barrier.copies) std::memcpy(copy.to, copy.from, copy.bytes);
      events_ += barrier.copies.size();
      barrier.copies.clear();
      turn(barrier);
      if ((barrier.phase & 1u) == parity) yield();
    }
    fibres_[current_]->waits_for = -1;
  }

  const Fault fault;

 private:
  static constexpr std::size_t kStack = 1 << 17;
  struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    void* fake_stack = nullptr;
    bool finished = false;
    int waits_for = -1;
  };

  static void start(unsigned low, unsigned high, unsigned thread) {
    auto* self = reinterpret_cast<Emulator*>(
        static_cast<std::uintptr_t>(static_cast<std::uint64_t>(low) | (static_cast<std::uint64_t>(high) << 32)));
    self->entered(*self->fibres_[thread]);
    self->body_(static_cast<int>(thread));
    self->fibres_[thread]->finished = true;
    ++self->events_;
    self->yield();
  }

  void resume(int thread) {
    current_ = thread;
    Fibre& fibre = *fibres_[thread];
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fibre.stack.get(), kStack);
#endif
    swapcontext(&scheduler_, &fibre.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }
  void yield() {
    Fibre& fibre = *fibres_[current_];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fibre.finished ? nullptr : &fibre.fake_stack, main_stack_, main_size_);
#endif
    swapcontext(&fibre.context, &scheduler_);
    entered(fibre);
  }
  void entered([[maybe_unused]] Fibre& fibre) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fibre.fake_stack, &main_stack_, &main_size_);
#endif
  }

  void meet(Meeting& meeting, int count) {
    const unsigned generation = meeting.generation;
    ++events_;
    if (++meeting.arrived == count) {
      meeting.arrived = 0;
      ++meeting.generation;
      return;
    }
    while (meeting.generation == generation) yield();
  }
  void turn(Barrier& barrier) {
    if (barrier.pending > 0 || !barrier.copies.empty()) return;
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
    ++events_;
  }
  std::string deadlock() const {
    std::string text = "nobody can go on:";
    for (int w = 0; w < threads_ / kLane; ++w) {
      const Fibre& fibre = *fibres_[w * kLane];
      if (fibre.finished) continue;
      text += " warp " + std::to_string(w);
      text += fibre.waits_for < 0 ? " meets others;" : " waits for barrier " + std::to_string(fibre.waits_for) + ";";
    }
    return text;
  }

  int threads_, current_ = 0;
  bool backwards_;
  std::uint64_t events_ = 0;
  std::string problem_;
  std::unique_ptr<char, void (*)(void*)> memory_;
  std::vector<Barrier> barriers_;
  std::vector<Meeting> warps_, groups_;
  Meeting all_;
  std::vector<float> values_;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  std::function<void(int)> body_;
  ucontext_t scheduler_;
  const void* main_stack_ = nullptr;
  std::size_t main_size_ = 0;
};

// One thread's view of it, as the kernels' bodies ask for.
template <class T>
class Emulated {
 public:
  static constexpr int kFillArrivals = 1;

  Emulated(Emulator& block, int thread, std::vector<Emulated*>& others) : block_(block), thread_(thread), others_(others) {}

  int thread() const { return thread_; }
  int warp() const { return thread_ / kLane; }
  int lane() const { return thread_ % kLane; }
  char* shared() const { return block_.memory(); }
  bool copies() const { return warp() >= T::kConsumers; }
  int opaque(int x) const { return x; }

  float shuffle_xor(float x, int lanes) {
    block_.value(thread_) = x;
    sync_warp();
    const float other = block_.value(thread_ ^ lanes);
    sync_warp();
    return other;
  }
  void sync_warp() { block_.meet_warp(warp()); }
  void sync_group(int group) { block_.meet_group(group); }

  float erf(float x) const { return std::erf(x); }
  float exp2(float x) const { return std::exp2(x); }
  float reciprocal_root(float x) const { return 1.0f / std::sqrt(x); }
  float reciprocal(float x) const { return 1.0f / x; }
  float infinity() const { return HUGE_VALF; }

  void barrier_init(int index, int arrivals) { block_.barrier_init(index, arrivals); }
  void barriers_ready() { block_.meet_all(); }
  void arrive(int index) {
    if (block_.fault == Fault::consumers_keep_stages) return;
    block_.arrive(index);
  }
  void wait(int index, int parity) {
    if (block_.fault == Fault::consumers_wait_for_no_copy && !copies()) return;
    if (block_.fault == Fault::copies_wait_for_no_consumer && copies()) return;
    block_.wait(index, static_cast<unsigned>(parity));
  }
  void fill(int index, char* to, const char* from, int bytes) {
    if (lane() == 0) block_.copy(index, to, from, bytes);
  }

  template <int N>
  void mma_begin(Acc<N>&) {}
  void mma_fence() {}
  template <class B>
  void mma(Acc<B::kN>& acc, const Fragment& a, const char* operand, int step) {
    asked_.push_back({&acc.v[0][0], a, operand, step, &multiply<B>});
  }
  template <int N>
  void mma_end(Acc<N>&) {
    if (block_.fault == Fault::products_not_waited_for) {
      asked_.clear();
      return;
    }
    sync_warp();
    if (lane() == 0) {
      for (std::size_t i = 0; i < asked_.size(); ++i) asked_[i].run(*this, i);
    }
    sync_warp();
    asked_.clear();
  }

 private:
  struct Product {
    float* acc;
    Fragment a;
    const char* operand;
    int step;
    void (*run)(Emulated&, std::size_t);
  };

  // What the tensor cores do for a warp: sixteen rows of the left operand, of which four threads hold two each, times the
  // columns of the right one. Sixteen exact products and the number they are added to are aligned to the largest of them,
  // lose what lies more than kAligned bits below its first, and their sum loses what fp32 cannot hold: nothing is rounded
  // up, so that errors do not cancel (Fasi, Higham, Mikaitis, Pranesh 2021, of which later devices keep a bit more).
  template <class B>
  static void multiply(Emulated& m, std::size_t index) {
    const Product& asked = m.asked_[index];
    float a[16][16], b[16][B::kN];
    for (int n = 0; n < B::kN; ++n) {
      for (int k = 0; k < 16; ++k) {
        int at = B::offset(n, 16 * asked.step + k);
        if (m.block_.fault == Fault::wrong_swizzle) at ^= 16;
        std::uint16_t half;
        std::memcpy(&half, asked.operand + at, sizeof half);
        b[k][n] = half_value(half);
      }
    }
    for (int lane = 0; lane < kLane; ++lane) {
      const Fragment& held = m.others_[m.thread_ + lane]->asked_[index].a;
      for (int r = 0; r < 4; ++r) {
        float* to = &a[lane / 4 + r % 2 * 8][r / 2 * 8 + lane % 4 * 2];
        to[0] = first_of(held.r[r]);
        to[1] = second_of(held.r[r]);
      }
    }
    for (int row = 0; row < 16; ++row) {
      float start[B::kN], plain[B::kN], largest[B::kN], scale[B::kN];
      std::int32_t sums[B::kN];
      for (int n = 0; n < B::kN; ++n) {
        start[n] = plain[n] = *m.result(index, row, n);
        largest[n] = std::fabs(start[n]);
      }
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < B::kN; ++n) {
          const float product = a[row][k] * b[k][n];
          plain[n] += product;
          largest[n] = std::max(largest[n], std::fabs(product));
        }
      }
      for (int n = 0; n < B::kN; ++n) {
        scale[n] = power_of_two(kAligned - std::max(exponent(largest[n]), kLeastExponent));
        sums[n] = whole(start[n] * scale[n], plain[n]);
      }
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < B::kN; ++n) sums[n] += whole(a[row][k] * b[k][n] * scale[n], plain[n]);
      }
      for (int n = 0; n < B::kN; ++n) {
        const double sum = sums[n] / static_cast<double>(scale[n]);
        *m.result(index, row, n) = std::isfinite(plain[n]) ? toward_zero(sum) : plain[n];
      }
    }
  }

  // Bits kept below the first of the largest addend, and an exponent below which nothing is told from zero.
  static constexpr int kAligned = 24, kLeastExponent = -100;

  static int exponent(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<int>(bits >> 23 & 0xFF) - 127;
  }
  static float power_of_two(int power) {
    const auto bits = static_cast<std::uint32_t>(power + 127) << 23;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  // The whole part of an addend; of a sum that is no number there is none.
  static std::int32_t whole(float x, float plain) { return std::isfinite(plain) ? static_cast<std::int32_t>(x) : 0; }
  static float toward_zero(double x) {
    const auto near = static_cast<float>(x);
    return std::fabs(static_cast<double>(near)) > std::fabs(x) ? std::nextafter(near, 0.0f) : near;
  }

  // Where a number of the product lies, in the registers of which thread.
  float* result(std::size_t index, int row, int n) const {
    const int lane = row % 8 * 4 + n % 8 / 2;
    return others_[thread_ + lane]->asked_[index].acc + 4 * (n / 8) + row / 8 * 2 + n % 2;
  }

  Emulator& block_;
  int thread_;
  std::vector<Emulated*>& others_;
  std::vector<Product> asked_;
};

// Run a kernel's body for every block of its grid.
template <class T, class Body>
void emulate(std::int64_t blocks, Fault fault, bool backwards, Body body) {
  for (std::int64_t block = 0; block < blocks; ++block) {
    Emulator emulator(T::kThreads, T::kSharedBytes, T::kBarriers, fault, backwards);
    std::vector<std::unique_ptr<Emulated<T>>> machines;
    std::vector<Emulated<T>*> all(T::kThreads);
    for (int t = 0; t < T::kThreads; ++t) {
      machines.push_back(std::make_unique<Emulated<T>>(emulator, t, all));
      all[t] = machines.back().get();
    }
    emulator.run([&](int thread) { body(*machines[thread], block); });
  }
}

}  // namespace flmoe::fused
