// Which instruction levels this binary has and this machine can run, and the threads that run units.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "shape.h"

namespace flmoe::cpu {

struct Support {
  const Level* level;   // nullptr: the compiler could not build it
  std::string name;
  std::string missing;  // empty where it can run, else what is missing
};

// Best level first.
const std::vector<Support>& levels();

// A level that can run here, by name; throws std::runtime_error naming it and what the machine has.
const Level& level(const std::string& name);

// Evaluates all coalitions of a call on up to `threads` threads, or on as many as the system grants. `workspace` holds
// threads * stride bytes. Every unit is computed by one thread, so results do not depend on their number.
//
// The calling thread asks `stop` between units, at most every kPatience; where it answers true, or throws, every thread
// ends after its unit, and the call returns false, or throws, with logits that are not all there.
bool run(const Level& level, const Model& model, const Call& call, int threads, char* workspace, std::size_t stride,
         const std::function<bool()>& stop = {});

}  // namespace flmoe::cpu
