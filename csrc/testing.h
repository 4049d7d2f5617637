// What the host tests share: a check that stops with a message, and how many there were.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace flmoe::testing {
inline long checks = 0;
}

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    ++flmoe::testing::checks;                                              \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)
