// From the values of a pair's four corners to its second difference and its redundancy gaps, and the moments of samples.
// All of it is double: these are differences of nearly equal numbers. NaN in, NaN out.
#pragma once

#include "corners.h"

namespace flmoe {

struct CornerValues {
  double both, first, second, neither;  // v11, v10, v01, v00
};

struct Gaps {
  double max, sum, strict, ratio;
  bool defined;  // whether the ratio is; it is 0 where not
};
constexpr int kGaps = 4;

FLMOE_HD double larger(double a, double b) { return a < b || b != b ? b : a; }
FLMOE_HD double smaller(double a, double b) { return a > b || b != b ? b : a; }

FLMOE_HD double second_difference(const CornerValues& v) { return v.both - v.first - v.second + v.neither; }

// Losing one costs v11 - v01 or v11 - v10, losing both v11 - v00; joint costs up to `least` define no ratio.
FLMOE_HD Gaps redundancy_gaps(const CornerValues& v, double least) {
  const double joint = v.both - v.neither;
  const double sum = v.first + v.second - v.both - v.neither;
  const double max = joint - larger(larger(v.both - v.second, v.both - v.first), 0.0);
  const bool defined = joint > least;
  const double ratio = defined ? smaller(larger(sum / joint, -1.0), 1.0) : 0.0;
  return {max, sum, larger(smaller(max, sum), 0.0), ratio, defined};
}

// Count, mean, and sum of squared deviations from it: updated by Welford's recurrence, which subtracts before it squares.
struct Moments {
  double count, mean, squares;
};

FLMOE_HD void add(Moments& moments, double x) {
  moments.count += 1;
  const double step = x - moments.mean;
  moments.mean += step / moments.count;
  moments.squares += step * (x - moments.mean);
}

// The moments of two samples together (Chan, Golub and LeVeque, 1979).
FLMOE_HD Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (count == 0) return a;
  const double step = b.mean - a.mean;
  return {count, a.mean + step * (b.count / count), a.squares + b.squares + step * step * (a.count * b.count / count)};
}

// Samples go into runs of this many, whose moments are merged in order: the result depends on no number of threads.
constexpr std::int64_t kMomentRun = 32;

FLMOE_HD std::int64_t moment_runs(std::int64_t samples) { return (samples + kMomentRun - 1) / kMomentRun; }
FLMOE_HD std::int64_t run_samples(std::int64_t samples, std::int64_t run) {
  const std::int64_t left = samples - run * kMomentRun;
  return left < kMomentRun ? left : kMomentRun;
}

// The values of a grid's corners in K contexts, with O outputs each, and what becomes of them.
struct Reduction {
  const std::uint64_t* words;  // (K, W) contexts
  const double* values;        // (K, G, O)
  double* second;              // (K, P, O)
  double* gaps;                // (4, K, P, O): max, sum, strict, ratio
  std::uint8_t* defined;       // (K, P, O) where the ratio is
  double* moments;             // (2, P, O): mean of the second difference, sum of squared deviations from it
  double* scratch;             // (runs, P, O, 2) on a GPU, (P, O, 2) on the host
  std::int64_t contexts, outputs, players;
  double least;
};

// Reduces one output of one pair in context k, whose corners are `at`. Returns the second difference.
FLMOE_HD double reduce_sample(const CornerGrid& grid, const Reduction& to, std::int64_t k, std::int64_t pair,
                              std::int64_t output, const Corners& at) {
  const double* values = to.values + k * corner_count(grid) * to.outputs + output;
  const CornerValues v{values[at.both * to.outputs], values[at.first * to.outputs], values[at.second * to.outputs],
                       values[at.neither * to.outputs]};
  const Gaps gaps = redundancy_gaps(v, to.least);
  const std::int64_t out = (k * grid.pair_count + pair) * to.outputs + output;
  const std::int64_t all = to.contexts * grid.pair_count * to.outputs;
  const double second = second_difference(v);
  to.second[out] = second;
  to.gaps[out] = gaps.max;
  to.gaps[all + out] = gaps.sum;
  to.gaps[2 * all + out] = gaps.strict;
  to.gaps[3 * all + out] = gaps.ratio;
  to.defined[out] = gaps.defined ? 1 : 0;
  return second;
}

// Merges the moments of run `run` into a sample's.
FLMOE_HD void merge_run(const Reduction& to, std::int64_t run, std::int64_t sample, double mean, double squares,
                        std::int64_t samples) {
  const Moments before{static_cast<double>(run * kMomentRun), to.moments[sample], to.moments[samples + sample]};
  const Moments after = merge(before, {static_cast<double>(run_samples(to.contexts, run)), mean, squares});
  to.moments[sample] = after.mean;
  to.moments[samples + sample] = after.squares;
}

// All of it on the host: what a pair's corners are is found once for all outputs.
inline void reduce_corners(const CornerGrid& grid, const Reduction& to) {
  const std::int64_t samples = grid.pair_count * to.outputs, width = words_for(to.players);
  std::fill(to.moments, to.moments + 2 * samples, 0.0);
  for (std::int64_t run = 0; run < moment_runs(to.contexts); ++run) {
    std::fill(to.scratch, to.scratch + 2 * samples, 0.0);
    for (std::int64_t i = 0; i < run_samples(to.contexts, run); ++i) {
      const std::int64_t k = run * kMomentRun + i;
      for (std::int64_t pair = 0; pair < grid.pair_count; ++pair) {
        const Corners at = corners_of(grid, pair, to.words + k * width);
        for (std::int64_t o = 0; o < to.outputs; ++o) {
          double* part = to.scratch + 2 * (pair * to.outputs + o);
          Moments moments{static_cast<double>(i), part[0], part[1]};
          add(moments, reduce_sample(grid, to, k, pair, o, at));
          part[0] = moments.mean;
          part[1] = moments.squares;
        }
      }
    }
    for (std::int64_t s = 0; s < samples; ++s) merge_run(to, run, s, to.scratch[2 * s], to.scratch[2 * s + 1], samples);
  }
}

}  // namespace flmoe
