#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flmoe::cpu {

extern const Level level_portable;
#ifdef FLMOE_WITH_AVX2
extern const Level level_avx2;
#endif
#ifdef FLMOE_WITH_AVX512
extern const Level level_avx512;
#endif
#ifdef FLMOE_WITH_AMX
extern const Level level_amx;
#endif

namespace {

#if defined(__x86_64__)

struct Features {
  bool avx2 = false, avx512 = false, amx = false;
};

// Register state the operating system saves for a process: without it the instructions fault.
std::uint64_t saved_state() {
  std::uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// Linux hands out the large tile registers on request only, once per process.
bool request_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features found;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return found;
  const bool fma = (c & bit_FMA) != 0;
  const std::uint64_t saved = saved_state();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const auto has = [](unsigned word, int bit) { return ((word >> bit) & 1u) != 0; };
  const bool wide = has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31);  // AVX-512 F, DQ, BW, VL
  const bool tiles = has(d, 22) && has(d, 24);                            // AMX-BF16, AMX-TILE
  found.avx2 = fma && has(b, 5) && (saved & 0x6) == 0x6;
  found.avx512 = found.avx2 && wide && (saved & 0xe6) == 0xe6;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return found;
  found.amx = found.avx512 && has(a, 5) && tiles && (saved & 0x60000) == 0x60000 && request_tiles();
  return found;
}

#endif

[[maybe_unused]] Support entry(const char* name, const Level* level, bool runs) {
  if (level == nullptr) return {level, name, "not built: the compiler lacks it"};
  return {level, name, runs ? "" : "this machine lacks it"};
}

std::vector<Support> find() {
  std::vector<Support> found;
#if defined(__x86_64__)
  const Features features = detect();
  const Level *amx = nullptr, *avx512 = nullptr, *avx2 = nullptr;
#ifdef FLMOE_WITH_AMX
  amx = &level_amx;
#endif
#ifdef FLMOE_WITH_AVX512
  avx512 = &level_avx512;
#endif
#ifdef FLMOE_WITH_AVX2
  avx2 = &level_avx2;
#endif
  found.push_back(entry("amx", amx, features.amx));
  found.push_back(entry("avx512", avx512, features.avx512));
  found.push_back(entry("avx2", avx2, features.avx2));
#else
  for (const char* name : {"amx", "avx512", "avx2"}) found.push_back({nullptr, name, "not an x86-64 machine"});
#endif
  found.push_back({&level_portable, "portable", ""});
  return found;
}

}  // namespace

const std::vector<Support>& levels() {
  static const std::vector<Support> found = find();
  return found;
}

const Level& level(const std::string& name) {
  std::string here;
  for (const Support& support : levels()) {
    if (support.name == name && support.missing.empty()) return *support.level;
    if (support.missing.empty()) here += (here.empty() ? "" : ", ") + support.name;
  }
  throw std::runtime_error("level '" + name + "' cannot run: this machine and build have " + here);
}

namespace {

// How long the calling thread computes before it looks whether it should go on.
constexpr std::chrono::milliseconds kPatience{50};

// Threads that take no more units once this is left, however it is left, and are waited for.
struct Crew {
  std::atomic<bool> stopped{false};
  std::vector<std::thread> members;

  ~Crew() {
    stopped = true;
    for (std::thread& member : members) member.join();
  }
};

}  // namespace

bool run(const Level& level, const Model& model, const Call& call, int threads, char* workspace, std::size_t stride,
         const std::function<bool()>& stop) {
  const std::int64_t stack = model.shape.stack(), stacks = (call.coalitions + stack - 1) / stack;
  const std::int64_t units = stacks * model.shape.experts;
  std::atomic<std::int64_t> next{0};
  // Expert by expert, so that threads at work at the same time read the same weights.
  const auto compute = [&](int thread, std::int64_t unit) {
    const std::int64_t first = unit % stacks * stack;
    level.unit(model, call, static_cast<int>(unit / stacks), first,
               static_cast<int>(std::min(stack, call.coalitions - first)), workspace + thread * stride);
  };

  Crew others;
  const auto work = [&](int thread) {
    const unsigned state = level.begin();
    while (!others.stopped) {
      const std::int64_t unit = next++;
      if (unit >= units) break;
      compute(thread, unit);
    }
    level.end(state);
  };
  const int count = static_cast<int>(std::min<std::int64_t>(threads, units));
  others.members.reserve(static_cast<std::size_t>(count));
  try {
    for (int t = 1; t < count; ++t) others.members.emplace_back(work, t);
  } catch (const std::system_error&) {
    // The system grants no more threads: those there are share the units.
  }

  unsigned state = level.begin();
  auto asked = std::chrono::steady_clock::now();
  for (std::int64_t unit = next++; unit < units; unit = next++) {
    compute(0, unit);
    if (!stop || std::chrono::steady_clock::now() - asked < kPatience) continue;
    level.end(state);  // what is asked is not ours, and finds the processor as it was
    if (stop()) return false;
    state = level.begin();
    asked = std::chrono::steady_clock::now();
  }
  level.end(state);
  return true;
}

}  // namespace flmoe::cpu
