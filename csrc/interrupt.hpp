// Long answers can be ended: Megatron's order may be asked for a sample that takes years to reach.
#pragma once

#include <atomic>

#include "integer.hpp"

// Lower it for builds that are slow.
#ifndef R1_WORK
#define R1_WORK (1ull << 28)
#endif

namespace r1 {

// Called by whoever works long, a few times a second; ends the work by an exception. Null: nobody asks.
inline std::atomic<void (*)()> interrupt{nullptr};

// Work between two calls, in comparisons of one source: about a tenth of a second.
constexpr u64 WORK = R1_WORK;

// Says that so much was done. What the caller keeps must be whole: an exception may come from here.
inline void worked(u64 amount) {
  thread_local u64 sum = 0;
  sum += amount;
  if (sum < WORK) return;
  sum = 0;
  if (void (*const ask)() = interrupt.load(std::memory_order_relaxed)) ask();
}

}  // namespace r1
