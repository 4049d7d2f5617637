// The machine of a GPU: shared memory, barriers, copies and products in PTX.
//
// Compute capability 9.0 ("sm_90a"): products by wgmma, whose right operand is read from shared memory by the tensor cores
// themselves, 64 rows at a time; a stage is one bulk copy. 8.0 and everything else: mma.sync with operands fetched by
// ldmatrix, copies by cp.async. Both wait on the same barriers in the same places.
#pragma once

#include <cuda_runtime_api.h>

#include "tile.h"
#include "wgmma.h"

namespace flmoe::fused {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int kBuiltGroups = 2;
#else
constexpr int kBuiltGroups = 1;
#endif

extern __shared__ __align__(1024) char block_memory[];

template <class T>
struct Machine {
  static constexpr int kFillArrivals = kBuiltGroups == 2 ? 1 : kLane;

  FLMOE_BODY int thread() const { return static_cast<int>(threadIdx.x); }
  FLMOE_BODY int warp() const { return thread() / kLane; }
  FLMOE_BODY int lane() const { return thread() % kLane; }
  FLMOE_BODY char* shared() const { return block_memory; }

  // Whether this warp is the one that copies; it gives its registers to the others, which cannot do with their share.
  FLMOE_BODY bool copies() const {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (warp() >= T::kConsumers) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
      return true;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    return false;
#else
    return warp() >= T::kConsumers;
#endif
  }

  FLMOE_BODY static std::uint32_t address(const void* pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
  }
  FLMOE_BODY std::uint32_t barrier(int index) const { return address(block_memory + T::kBarriersAt + 8 * index); }

  FLMOE_BODY int opaque(int x) const {
    asm volatile("" : "+r"(x));
    return x;
  }

  FLMOE_BODY float shuffle_xor(float x, int lanes) const { return __shfl_xor_sync(0xFFFFFFFFu, x, lanes); }
  FLMOE_BODY void sync_warp() const { __syncwarp(); }
  FLMOE_BODY void sync_group(int group) const {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupWarps * kLane) : "memory");
  }

  FLMOE_BODY float erf(float x) const { return erff(x); }
  // Without the slow paths of division and root, which are calls: neither zero nor a subnormal number gets here.
  FLMOE_BODY float reciprocal_root(float x) const { return rsqrtf(x); }
  FLMOE_BODY float reciprocal(float x) const { return __fdividef(1.0f, x); }
  FLMOE_BODY float infinity() const { return __int_as_float(0x7F800000); }
  FLMOE_BODY float exp2(float x) const {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  FLMOE_BODY void barrier_init(int index, int arrivals) const {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier(index)), "r"(arrivals) : "memory");
  }
  FLMOE_BODY void barriers_ready() const {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncthreads();
  }
  FLMOE_BODY void arrive(int index) const {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier(index)) : "memory");
  }
  // Until the phase of that parity is over.
  FLMOE_BODY void wait(int index, int parity) const {
    std::uint32_t done = 0;
    do {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(barrier(index)), "r"(parity)
          : "memory");
#else
      asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
                   : "=r"(done)
                   : "r"(barrier(index)), "r"(parity)
                   : "memory");
#endif
    } while (done == 0);
  }
  // The copying warp: `bytes` from global to shared memory, then one phase of the barrier.
  FLMOE_BODY void fill(int index, char* to, const char* from, int bytes) const {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (thread() == kLane * T::kConsumers) {
      asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
                       barrier(index)),
                   "r"(bytes)
                   : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       address(to)),
                   "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier(index))
                   : "memory");
    }
#else
    for (int at = 16 * lane(); at < bytes; at += 16 * kLane) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to + at)),
                   "l"(__cvta_generic_to_global(from + at))
                   : "memory");
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier(index)) : "memory");
#endif
  }

  // Products between begin and end may run on after the statement that asks for them.
  template <int N>
  FLMOE_BODY void mma_begin(Acc<N>& acc) const {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    pin(acc);
#endif
  }
  // What was written to registers is there for the products that follow.
  FLMOE_BODY void mma_fence() const {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
  }
  template <int N>
  FLMOE_BODY void mma_end(Acc<N>& acc) const {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin(acc);
#endif
  }

  // acc += a times sixteen inputs (those of `step`) of the operand.
  template <class B>
  FLMOE_BODY void mma(Acc<B::kN>& acc, const Fragment& a, const char* operand, int step) const {
    const int panel = 16 * step / B::kPanel, within = 16 * step % B::kPanel;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    // Swizzling is a function of the address, so that a step within a panel is a plain offset.
    const std::uint32_t start = address(operand) + panel * B::kPanelBytes + 2 * within;
    constexpr std::uint64_t kSwizzle = B::kPitch == 128 ? 1 : B::kPitch == 64 ? 2 : 3;
    constexpr std::uint64_t kEightRows = 8 * B::kPitch;
    const std::uint64_t descriptor =
        ((start & 0x3FFFFu) >> 4) | (std::uint64_t{1} << 16) | ((kEightRows >> 4) << 32) | (kSwizzle << 62);
    Wgmma<B::kN>::run(acc.v, a.r, descriptor);
#else
    // Sixteen columns a fetch: lanes 0 to 7 name the first eight rows of the operand, inputs 0 to 7; then inputs 8 to 15;
    // then the same of the next eight rows.
    const int row = lane() % 8 + lane() / 16 * 8, input = within + lane() / 8 % 2 * 8;
    const std::uint32_t first = address(operand) + panel * B::kPanelBytes + B::swizzled(row * B::kPitch + 2 * input);
    FLMOE_UNROLL
    for (int n = 0; n < B::kN; n += 16) {
      const std::uint32_t from = first + n * B::kPitch;  // the swizzle is the same every eight rows
      std::uint32_t b[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                   : "r"(from)
                   : "memory");
      FLMOE_UNROLL
      for (int half = 0; half < 2; ++half) {
        float(&c)[4] = acc.v[n / 8 + half];
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b[2 * half]), "r"(b[2 * half + 1]));
      }
    }
#endif
  }

 private:
  // The compiler must not move what reads or writes these registers across.
  template <int N>
  FLMOE_BODY static void pin(Acc<N>& acc) {
    FLMOE_UNROLL
    for (int b = 0; b < N / 8; ++b) {
      FLMOE_UNROLL
      for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(acc.v[b][i])::"memory");
    }
  }
};

}  // namespace flmoe::fused
