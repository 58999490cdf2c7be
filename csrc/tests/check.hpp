// The whole test framework: CHECK prints what failed and where, `failures` is the exit status.
#pragma once

#include <cstdio>

inline int failures = 0;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                          \
    }                                                                      \
  } while (0)

// The expression throws the exception type.
#define CHECK_THROWS(expression, type) \
  do {                                 \
    bool thrown = false;               \
    try {                              \
      (void)(expression);              \
    } catch (const type&) {            \
      thrown = true;                   \
    }                                  \
    CHECK(thrown && #expression);      \
  } while (0)
