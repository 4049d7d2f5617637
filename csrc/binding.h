// What every function bound to Python shares: checks of what would otherwise be undefined behaviour, as RuntimeError.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace flmoe {

[[noreturn]] inline void fail(const char* function, const std::string& cause) {
  throw std::runtime_error(std::string(function) + ": " + cause);
}

// A size given from Python: not negative.
inline void check_size(const char* function, const char* name, std::int64_t size) {
  if (size < 0) fail(function, std::string(name) + " is " + std::to_string(size) + ", expected >= 0");
}

// An address given from Python: not null unless there is nothing behind it.
template <typename T>
T* pointer(const char* function, const char* name, std::uintptr_t address, std::int64_t elements) {
  if (address == 0 && elements != 0) fail(function, std::string(name) + " is a null pointer");
  return reinterpret_cast<T*>(address);
}

}  // namespace flmoe
