// Megatron's own order, bit for bit, without its arrays.
//
// Megatron-core picks for sample i the first source with the largest w[k] * max(i, 1) - drawn[k], in
// doubles, and stores ten bytes a sample. Here only the counts are kept, once every `spacing` samples
// (at most 1 MB per 1e9 samples); anything between is replayed from the checkpoint below it.
//
// Bit equality needs the product rounded before the subtraction: build with -ffp-contract=off.
// Cost: `extend` and `seek` are linear in the samples they pass; a seek passes at most `spacing`.
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
        // 8 bytes a source and checkpoint: 1 MB per 1e9 samples.
        spacing_(std::max<u64>(4096, 8000 * u64{weights_.size()})),
        drawn_(weights_.size(), 0.0) {
    checkpoints_.insert(checkpoints_.end(), drawn_.begin(), drawn_.end());
  }

  // The first sample after some source's last draw, as far as known: NEVER until `extend` meets it.
  u64 end() const { return end_; }

  // Makes samples [0, i) answerable, or meets the end on the way.
  void extend(u64 i) {
    while (end_ == NEVER && covered_ < i) {
      std::vector<double> counts(checkpoints_.end() - sources(), checkpoints_.end());
      greedy_steps(weights_.data(), counts.data(), sources(), covered_, spacing_, nullptr, nullptr);
      if (exhausted(counts)) {
        end_ = first_exhaustion();
      } else {
        checkpoints_.insert(checkpoints_.end(), counts.begin(), counts.end());
        covered_ += spacing_;
      }
    }
  }

  // Picks of samples [i, i + steps). The range must lie below end() and have been extended to.
  void locate(u64 i, u64 steps, i32* pick, u64* draw) {
    seek(i);
    greedy_steps(weights_.data(), drawn_.data(), sources(), i, steps, pick, draw);
    at_ = i + steps;
  }

  u64 count(i32 k, u64 i) {
    seek(i);
    return static_cast<u64>(drawn_[k]);
  }

  // The sample that is source k's number `draw`; NEVER if the source does not get there.
  u64 position(i32 k, u64 draw) {
    if (draw >= budget_[k]) return NEVER;
    const double target = static_cast<double>(draw);
    const double give_up = 2.0 * (target + sources() + 2.0) / long_run_share(k) + static_cast<double>(spacing_);
    while (end_ == NEVER && checkpoints_[checkpoints_.size() - sources() + k] <= target) {
      if (!(static_cast<double>(covered_) <= give_up)) return NEVER;
      extend(covered_ + 1);
    }
    // The last checkpoint with at most `draw` draws behind it.
    u64 low = 0, high = checkpoints_.size() / sources();
    while (high - low > 1) {
      const u64 middle = low + (high - low) / 2;
      if (checkpoints_[middle * sources() + k] <= target) {
        low = middle;
      } else {
        high = middle;
      }
    }
    seek(low * spacing_);
    for (i32 pick = -1; at_ < end_;) {
      u64 number;
      locate(at_, 1, &pick, &number);
      if (pick == k && number == draw) return at_ - 1;
    }
    return NEVER;
  }

  std::size_t bytes() const { return checkpoints_.size() * sizeof(double); }
  u64 spacing() const { return spacing_; }

 private:
  i32 sources() const { return static_cast<i32>(weights_.size()); }

  bool exhausted(const std::vector<double>& counts) const {
    for (i32 k = 0; k < sources(); ++k) {
      if (budget_[k] != NEVER && counts[k] >= static_cast<double>(budget_[k])) return true;
    }
    return false;
  }

  u64 first_exhaustion() {
    seek(covered_);
    for (;;) {
      i32 pick;
      u64 number;
      locate(at_, 1, &pick, &number);
      if (number + 1 >= budget_[pick]) return at_;
    }
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

  // Brings the cursor to sample i: onward from where it stands, or from the checkpoint below.
  void seek(u64 i) {
    const u64 block = std::min(i, covered_) / spacing_;
    if (at_ > i || at_ < block * spacing_) {
      std::copy_n(checkpoints_.begin() + static_cast<std::ptrdiff_t>(block * sources()), sources(), drawn_.begin());
      at_ = block * spacing_;
    }
    greedy_steps(weights_.data(), drawn_.data(), sources(), at_, i - at_, nullptr, nullptr);
    at_ = i;
  }

  std::vector<double> weights_;
  std::vector<u64> budget_;
  u64 spacing_;
  std::vector<double> checkpoints_;  // Counts before sample 0, spacing, 2 spacing, ...
  u64 covered_ = 0;                  // The last checkpoint's sample.
  u64 end_ = NEVER;
  // Cursor: counts before sample at_. A run reads the order in sequence, so most seeks are free.
  std::vector<double> drawn_;
  u64 at_ = 0;
};

}  // namespace r1
