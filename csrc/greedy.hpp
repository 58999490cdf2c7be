// Megatron's own order, bit for bit, without its arrays.
//
// Megatron-core picks for sample i the first source with the largest w[k] * max(i, 1) - drawn[k], in
// doubles, and stores ten bytes a sample. Here only the counts are kept, once every `spacing` samples
// (at most 1 MB per 1e9 samples); anything between is replayed from the checkpoint below it.
//
// Bit equality needs the product rounded before the subtraction: build with -ffp-contract=off.
// Cost: a question passes the samples from where the last one ended, or from a checkpoint, to its own.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "integer.hpp"

namespace r1 {

// Runs the rule for samples [i, i + steps); writes the picks, and each pick's number within its source,
// where the pointers are not null. `drawn` holds whole numbers below 2^53: exact.
inline void greedy_steps(const double* weight, double* drawn, i32 sources, u64 i, u64 steps, i32* pick, u64* draw) {
  for (u64 step = 0; step < steps; ++step) {
    const double x = std::max(static_cast<double>(i + step), 1.0);
    i32 best = 0;
    double largest = weight[0] * x - drawn[0];
    for (i32 k = 1; k < sources; ++k) {
      const double error = weight[k] * x - drawn[k];
      if (error > largest) {
        largest = error;
        best = k;
      }
    }
    if (pick) pick[step] = best;
    if (draw) draw[step] = static_cast<u64>(drawn[best]);
    drawn[best] += 1.0;
  }
}

class Greedy {
 public:
  // `budget[k]`: draws after which source k is exhausted, NEVER for none; at least 1.
  Greedy(std::vector<double> weights, std::vector<u64> budget)
      : weights_(std::move(weights)),
        budget_(std::move(budget)),
        bounded_(std::any_of(budget_.begin(), budget_.end(), [](u64 draws) { return draws != NEVER; })),
        // 8 bytes a source and checkpoint: 1 MB per 1e9 samples.
        spacing_(std::max<u64>(4096, 8000 * u64{weights_.size()})),
        checkpoints_(weights_.size(), 0.0),
        reader_{0, checkpoints_},
        counter_{0, checkpoints_} {}

  // The first sample after some source's last draw, as far as known: NEVER until a question meets it.
  u64 end() const { return end_; }

  // Picks of samples [i, i + steps), or of as many as come before the end; returns how many.
  u64 locate(u64 i, u64 steps, i32* pick, u64* draw) {
    return seek(reader_, i) ? run(reader_, steps, pick, draw) : 0;
  }

  // Looks out for the end as far as sample i.
  void reach(u64 i) {
    if (i >= covered_ && end_ == NEVER) seek(counter_, i + 1);
  }

  // Draws of source k before sample i, which must not lie past the end.
  u64 count(i32 k, u64 i) {
    seek(counter_, i);
    return static_cast<u64>(counter_.drawn[k]);
  }

  // The sample that is source k's number `draw`; NEVER if the source does not get there.
  u64 position(i32 k, u64 draw) {
    if (draw >= budget_[k]) return NEVER;
    const double target = static_cast<double>(draw);
    const u64 sources = weights_.size();
    // The last checkpoint with at most `draw` draws behind it.
    u64 low = 0, high = checkpoints_.size() / sources;
    while (high - low > 1) {
      const u64 middle = low + (high - low) / 2;
      if (checkpoints_[middle * sources + k] <= target) {
        low = middle;
      } else {
        high = middle;
      }
    }
    // A source without a lasting share is drawn early or never.
    const double share = long_run_share(k);
    const double give_up = 2.0 * (target + static_cast<double>(sources) + 2.0) / (share > 0.0 ? share : 1.0);
    seek(counter_, low * spacing_);
    while (static_cast<double>(counter_.at) <= give_up) {
      i32 pick[CHUNK];
      u64 number[CHUNK];
      const u64 first = counter_.at, done = run(counter_, CHUNK, pick, number);
      for (u64 step = 0; step < done; ++step) {
        if (pick[step] == k && number[step] == draw) return first + step;
      }
      if (done < CHUNK) break;
    }
    return NEVER;
  }

  std::size_t bytes() const { return checkpoints_.size() * sizeof(double); }

 private:
  static constexpr u64 CHUNK = 1024;

  // Counts before a sample.
  struct Cursor {
    u64 at;
    std::vector<double> drawn;
  };

  // Brings the cursor to sample i: onward from where it stands, or from the checkpoint below i. False if
  // the end comes first.
  bool seek(Cursor& cursor, u64 i) {
    const u64 sources = weights_.size();
    const u64 block = std::min(i / spacing_, checkpoints_.size() / sources - 1);
    if (cursor.at > i || cursor.at < block * spacing_) {
      std::copy_n(checkpoints_.begin() + static_cast<std::ptrdiff_t>(block * sources), sources, cursor.drawn.begin());
      cursor.at = block * spacing_;
    }
    const u64 steps = i - cursor.at;
    return run(cursor, steps, nullptr, nullptr) == steps;
  }

  // Runs the rule from the cursor on, `steps` samples or to the end; returns how many. On samples that
  // were never passed before it looks out for the end and leaves checkpoints.
  u64 run(Cursor& cursor, u64 steps, i32* pick, u64* draw) {
    const u64 first = cursor.at;
    while (cursor.at < std::min(first + steps, end_)) {
      const u64 done = cursor.at - first, left = steps - done;
      i32* const pick_here = pick ? pick + done : nullptr;
      u64* const draw_here = draw ? draw + done : nullptr;
      if (cursor.at < covered_) {
        advance(cursor, std::min(left, covered_ - cursor.at), pick_here, draw_here);
        continue;
      }
      const u64 to_checkpoint = spacing_ - cursor.at % spacing_;
      if (!near_the_end(cursor)) {
        advance(cursor, std::min({left, to_checkpoint, bounded_ ? CHUNK : NEVER}), pick_here, draw_here);
      } else {
        i32 k;
        advance(cursor, 1, &k, draw_here);
        if (pick_here) *pick_here = k;
        if (cursor.drawn[k] >= static_cast<double>(budget_[k])) end_ = cursor.at;
      }
      covered_ = cursor.at;
      if (covered_ % spacing_ == 0) {
        checkpoints_.insert(checkpoints_.end(), cursor.drawn.begin(), cursor.drawn.end());
      }
    }
    return cursor.at - first;
  }

  void advance(Cursor& cursor, u64 steps, i32* pick, u64* draw) {
    greedy_steps(weights_.data(), cursor.drawn.data(), static_cast<i32>(weights_.size()), cursor.at, steps, pick,
                 draw);
    cursor.at += steps;
  }

  // Whether some source could be exhausted within the next chunk.
  bool near_the_end(const Cursor& cursor) const {
    for (std::size_t k = 0; bounded_ && k < budget_.size(); ++k) {
      if (budget_[k] != NEVER && static_cast<double>(budget_[k]) - cursor.drawn[k] <= double{CHUNK}) return true;
    }
    return false;
  }

  // The rule keeps the errors of the sources that it draws level, so their shares are w - level with the
  // level that makes them sum to 1; weights that sum to 1 have level 0. Only says when to stop looking.
  double long_run_share(i32 k) const {
    std::vector<double> falling = weights_;
    std::sort(falling.rbegin(), falling.rend());
    double sum = 0.0, level = falling[0] - 1.0;
    for (std::size_t n = 0; n < falling.size(); ++n) {
      sum += falling[n];
      level = std::max(level, (sum - 1.0) / static_cast<double>(n + 1));
    }
    return std::max(weights_[k] - level, 0.0);
  }

  std::vector<double> weights_;
  std::vector<u64> budget_;
  bool bounded_;
  u64 spacing_;
  std::vector<double> checkpoints_;  // Counts before sample 0, spacing, 2 spacing, ...
  u64 covered_ = 0;                  // Samples below were passed: the end is not among them.
  u64 end_ = NEVER;
  Cursor reader_;   // A run reads the order in sequence, so most seeks are free,
  Cursor counter_;  // also when it asks for counts behind what it read.
};

}  // namespace r1
