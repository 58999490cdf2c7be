// Megatron's own order, bit for bit, without its arrays.
//
// Megatron-core picks for sample i the first source with the largest w[k] * max(i, 1) - drawn[k], in
// doubles, and stores ten bytes a sample. Here only the counts are kept, at checkpoints (at most 1 MB per
// 1e9 samples); anything between is replayed from the checkpoint below it.
//
// Cost: a question passes the samples from where the last one ended, or from a checkpoint, to its own, at
// about 3 ns a sample with 14 sources and 25 ns with 1024 (greedy_steps.hpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "greedy_steps.hpp"
#include "integer.hpp"
#include "interrupt.hpp"

namespace r1 {

// Throws std::invalid_argument unless every weight is finite and none is negative.
inline void check_weights(const std::vector<double>& weights) {
  double sum = 0.0;
  for (std::size_t k = 0; k < weights.size(); ++k) {
    sum += weights[k];
    if (!(weights[k] >= 0.0 && std::isfinite(weights[k]))) {
      throw std::invalid_argument("weight " + std::to_string(k) + " is " + std::to_string(weights[k]) +
                                  "; use a finite number, 0 or more");
    }
  }
  if (!std::isfinite(sum)) throw std::invalid_argument("the sum of the weights is too large for a double");
}

class Greedy {
 public:
  // `weights`: at least one, see check_weights. `budget[k]`: draws after which source k is exhausted, NEVER
  // for none; at least 1. Where an exception ends a question, the next one goes on from what was passed.
  Greedy(std::vector<double> weights, std::vector<u64> budget)
      : weights_(std::move(weights)),
        budget_(std::move(budget)),
        bounded_(std::any_of(budget_.begin(), budget_.end(), [](u64 draws) { return draws != NEVER; })),
        sums_to_one_(std::fabs(std::accumulate(weights_.begin(), weights_.end(), 0.0) - 1.0) < 1e-6),
        // 8 bytes a source and 8 for the sample: 1 MB per 1e9 samples.
        spacing_(8000 * (u64{weights_.size()} + 1)),
        most_(std::max<u64>(weights_.size(), 4 * WORK / work_of(1))),
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
    const std::size_t sources = weights_.size();
    // The last checkpoint with at most `draw` draws behind it.
    std::size_t low = 0, high = checkpoint_at_.size();
    while (high - low > 1) {
      const std::size_t middle = low + (high - low) / 2;
      if (checkpoints_[middle * sources + k] <= target) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const double give_up = latest(k, target);
    seek(counter_, checkpoint_at_[low]);
    while (static_cast<double>(counter_.at) <= give_up) {
      // A source is drawn at most once a sample, so all of these but the last can be passed unseen.
      const double missing = target - counter_.drawn[k];
      if (missing > 0.0) {
        const u64 steps = static_cast<u64>(missing);
        if (run(counter_, steps, nullptr, nullptr) < steps) return NEVER;
      } else {
        i32 pick = -1;
        if (!run(counter_, 1, &pick, nullptr)) return NEVER;
        if (pick == k) return counter_.at - 1;
      }
    }
    return NEVER;
  }

  std::size_t bytes() const {
    return checkpoints_.size() * sizeof(double) + checkpoint_at_.size() * sizeof(u64);
  }

 private:
  // Counts before a sample.
  struct Cursor {
    u64 at;
    std::vector<double> drawn;
  };

  i32 sources() const { return static_cast<i32>(weights_.size()); }

  u64 work_of(u64 samples) const { return samples * (weights_.size() + 16); }

  // Brings the cursor to sample i: onward from where it stands, or from the checkpoint below i. False if
  // the end comes first.
  bool seek(Cursor& cursor, u64 i) {
    const auto after = std::upper_bound(checkpoint_at_.begin(), checkpoint_at_.end(), i);
    const u64 below = *(after - 1);
    if (cursor.at > i || cursor.at < below) {
      const std::ptrdiff_t row = (after - 1 - checkpoint_at_.begin()) * sources();
      std::copy_n(checkpoints_.begin() + row, weights_.size(), cursor.drawn.begin());
      cursor.at = below;
    }
    const u64 steps = i - cursor.at;
    return run(cursor, steps, nullptr, nullptr) == steps;
  }

  // Runs the rule from the cursor on, `steps` samples or to the end; returns how many. On samples that
  // were never passed before it looks out for the end and leaves checkpoints.
  u64 run(Cursor& cursor, u64 steps, i32* pick, u64* draw) {
    const u64 first = cursor.at;
    while (cursor.at < std::min(first + steps, end_)) {
      const u64 done = cursor.at - first;
      i32* const pick_here = pick ? pick + done : nullptr;
      u64* const draw_here = draw ? draw + done : nullptr;
      const bool new_ground = cursor.at >= covered_;
      u64 chunk = new_ground ? steps - done : std::min(steps - done, covered_ - cursor.at);
      if (new_ground && bounded_) {
        // Within so many samples no source can be exhausted.
        const u64 safe = smallest_rest(cursor) - 1;
        if (safe == 0) {
          i32 k;
          plain_steps(weights_.data(), cursor.drawn.data(), sources(), cursor.at, 1, &k, draw_here);
          if (pick_here) *pick_here = k;
          if (cursor.drawn[k] >= static_cast<double>(budget_[k])) end_ = cursor.at + 1;
          passed(cursor, 1);
          worked(work_of(1));
          continue;
        }
        chunk = std::min(chunk, safe);
      }
      chunk = std::min(chunk, most_);
      const u64 before = cursor.at;
      if (!run_lanes(cursor, chunk, pick_here, draw_here)) {
        if (cursor.at == 0) chunk = 1;  // The lanes can take over at sample 1.
        if (new_ground) chunk = std::min(chunk, checkpoint_at_.back() + spacing_ - cursor.at);
        run_one_by_one(cursor, chunk, pick_here, draw_here);
      }
      worked(work_of(cursor.at - before));
    }
    return cursor.at - first;
  }

  // The bulk of a long chunk in lanes; false where that does not apply. `pick` and `draw` go together.
  bool run_lanes(Cursor& cursor, u64 chunk, i32* pick, u64* draw) {
    if (!sums_to_one_ || sources() > Lanes::MAX_SOURCES || lanes_failed_ > 3 || cursor.at == 0) return false;
    if (!pick != !draw || chunk < LANES * Lanes::MIN_LENGTH) return false;
    const u64 length = std::min(chunk / LANES, spacing_), from = cursor.at;
    const int stand = lanes_.run(weights_.data(), cursor.drawn.data(), sources(), from, length, pick, draw);
    if (stand < LANES) ++lanes_failed_;
    // The counts are those behind all stretches that stand, so the cursor goes there before anything throws.
    cursor.at += static_cast<u64>(stand) * length;
    for (int stretch = 0; stretch < stand; ++stretch) {
      const u64 at = from + static_cast<u64>(stretch + 1) * length;
      if (at < covered_) continue;
      covered_ = at;
      if (covered_ < checkpoint_at_.back() + spacing_) continue;
      std::vector<double> drawn(weights_.size());
      for (i32 k = 0; k < sources(); ++k) drawn[k] = lanes_.drawn_after(stretch, k);
      leave_checkpoint(drawn);
    }
    return stand > 0;
  }

  void run_one_by_one(Cursor& cursor, u64 steps, i32* pick, u64* draw) {
    // Laying out the wheel passes over all sources a few times.
    const bool wheel = sums_to_one_ && sources() >= Wheel::MIN_SOURCES && steps >= weights_.size() / 4 &&
                       cursor.at + steps < Wheel::MAX_SAMPLE;
    if (wheel) {
      wheel_.run(weights_.data(), cursor.drawn.data(), sources(), cursor.at, steps, pick, draw);
    } else {
      plain_steps(weights_.data(), cursor.drawn.data(), sources(), cursor.at, steps, pick, draw);
    }
    passed(cursor, steps);
  }

  void passed(Cursor& cursor, u64 steps) {
    cursor.at += steps;
    if (cursor.at < covered_) return;
    covered_ = cursor.at;
    if (covered_ >= checkpoint_at_.back() + spacing_) leave_checkpoint(cursor.drawn);
  }

  // The counts before sample `covered_`. What an earlier call could not finish for want of memory is undone.
  void leave_checkpoint(const std::vector<double>& drawn) {
    checkpoints_.resize(checkpoint_at_.size() * weights_.size());
    checkpoints_.insert(checkpoints_.end(), drawn.begin(), drawn.end());
    checkpoint_at_.push_back(covered_);
  }

  // Draws that the source closest to its budget has left.
  u64 smallest_rest(const Cursor& cursor) const {
    u64 smallest = NEVER;
    for (std::size_t k = 0; k < budget_.size(); ++k) {
      if (budget_[k] != NEVER) smallest = std::min(smallest, budget_[k] - static_cast<u64>(cursor.drawn[k]));
    }
    return smallest;
  }

  // A sample before which source k's number `draw` comes, if it comes at all.
  //
  // The rule keeps the errors w * i - drawn of the sources that it draws level, so their shares are w - level
  // with the level that makes them sum to 1; weights that sum to 1 have level 0. A source whose weight is
  // below the level falls behind the others for good, one that is on it may be drawn at any time.
  double latest(i32 k, double draw) const {
    std::vector<double> falling = weights_;
    std::sort(falling.rbegin(), falling.rend());
    double sum = 0.0, level = falling[0] - 1.0;
    for (std::size_t n = 0; n < falling.size(); ++n) {
      sum += falling[n];
      level = std::max(level, (sum - 1.0) / static_cast<double>(n + 1));
    }
    const double share = weights_[k] - level, slack = static_cast<double>(weights_.size()) + 2.0;
    if (share > ON_THE_LEVEL) return 2.0 * (draw + slack) / share;
    if (share < -ON_THE_LEVEL) return 2.0 * slack / -share;
    return static_cast<double>(u64{1} << 24);
  }

  static constexpr double ON_THE_LEVEL = 1e-9;
  std::vector<double> weights_;
  std::vector<u64> budget_;
  bool bounded_;
  bool sums_to_one_;
  u64 spacing_;
  u64 most_;  // Samples between two calls of worked().
  std::vector<u64> checkpoint_at_{0};
  std::vector<double> checkpoints_;  // Counts before each of these samples.
  u64 covered_ = 0;                  // Samples below were passed: the end is not among them.
  u64 end_ = NEVER;
  Cursor reader_;   // A run reads the order in sequence, so most seeks are free,
  Cursor counter_;  // also when it asks for counts behind what it read.
  Lanes lanes_;
  Wheel wheel_;
  int lanes_failed_ = 0;
};

}  // namespace r1
