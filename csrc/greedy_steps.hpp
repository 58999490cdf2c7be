// Megatron's rule, three ways with one answer: plain, in lanes, and by a wheel of sleeping sources.
//
// The rule for sample i is the first source with the largest w[k] * max(i, 1) - drawn[k], in doubles; the
// plain loop is megatron-core's own. What makes the others faster, and why they are exact:
//
// - lanes: sixteen stretches of the order side by side, one a vector lane. A stretch begins with a guess of
//   the counts, run in for a while; it stands only if the stretch before it ends in the same counts.
// - wheel: only sources whose error can reach a threshold are compared. Errors rise linearly, so the sample
//   at which a source gets there is known, and it sleeps until one before. If nobody reaches the threshold,
//   all are compared and it is lowered. Sources of one weight take turns in their order, so they are one
//   entry that stands for the one whose turn it is.
//
// All counts are whole numbers in doubles, below 2^53. Build with -ffp-contract=off.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu.hpp"
#include "integer.hpp"

// `to = condition ? from : to`, lane by lane. Compilers take the conditional apart where the CPU has no
// blend, and do not see one in the masks where it has.
#define R1_ASSIGN_IF(condition, to, from)                                \
  do {                                                                   \
    if constexpr (WIDTH > 2) {                                           \
      to = condition ? from : to;                                        \
    } else {                                                             \
      to = (Vector)(((Bits)from & condition) | ((Bits)to & ~condition)); \
    }                                                                    \
  } while (0)

namespace r1 {

// Doubles side by side, and what comparing them gives: all bits or none.
template <int WIDTH>
struct Pack {
  typedef double Vector __attribute__((vector_size(WIDTH * 8)));
  typedef i64 Bits __attribute__((vector_size(WIDTH * 8)));
  static_assert(sizeof(Vector) == WIDTH * 8 && sizeof(Bits) == WIDTH * 8, "the compiler lacks vector types");
};

// The largest error at sample `x`, and the first source that has it.
inline i32 largest_error(const double* weight, const double* drawn, i32 sources, double x, double& largest) {
  i32 best = 0;
  largest = weight[0] * x - drawn[0];
  for (i32 k = 1; k < sources; ++k) {
    const double error = weight[k] * x - drawn[k];
    if (error > largest) {
      largest = error;
      best = k;
    }
  }
  return best;
}

// Samples [i, i + steps) by the plain rule; writes the picks, and each pick's number within its source,
// where the pointers are not null.
inline void plain_steps(const double* weight, double* drawn, i32 sources, u64 i, u64 steps, i32* pick,
                        u64* draw) {
  for (u64 step = 0; step < steps; ++step) {
    double largest;
    const i32 best =
        largest_error(weight, drawn, sources, std::max(static_cast<double>(i + step), 1.0), largest);
    if (pick) pick[step] = best;
    if (draw) draw[step] = static_cast<u64>(drawn[best]);
    drawn[best] += 1.0;
  }
}

// -- lanes

constexpr int LANES = 16;

// `drawn`: [sources][LANES], `x`: [LANES], the lanes' samples, at least 1; both are brought forward. Lane l
// writes to pick + l * stride, draw + l * stride, if not null; `number` is room for [LANES][sources].
template <int WIDTH, int GROUPS>
R1_INLINE void lane_steps(const double* weight, i32 sources, double* drawn, double* x, u64 steps, i32* pick,
                          u64* draw, u64 stride, u64* number) {
  static_assert(WIDTH * GROUPS == LANES, "every lane in one group");
  using Vector = typename Pack<WIDTH>::Vector;
  using Bits = typename Pack<WIDTH>::Bits;
  constexpr u64 BLOCK = 64;
  const Vector one = Vector{} + 1.0;
  Vector at[GROUPS], best[GROUPS];
  std::memcpy(at, x, sizeof at);
  alignas(64) double picked[BLOCK][LANES];
  if (pick) {
    for (int lane = 0; lane < LANES; ++lane) {
      for (i32 k = 0; k < sources; ++k)
        number[lane * sources + k] = static_cast<u64>(drawn[k * LANES + lane]);
    }
  }
  for (u64 done = 0; done < steps; done += BLOCK) {
    const u64 block = std::min(BLOCK, steps - done);
    for (u64 step = 0; step < block; ++step) {
      Vector largest[GROUPS];
      for (int g = 0; g < GROUPS; ++g) {
        Vector count;
        std::memcpy(&count, drawn + g * WIDTH, sizeof count);
        largest[g] = weight[0] * at[g] - count;
        best[g] = Vector{};
      }
      for (i32 k = 1; k < sources; ++k) {
        const Vector self = Vector{} + static_cast<double>(k);
        for (int g = 0; g < GROUPS; ++g) {
          Vector count;
          std::memcpy(&count, drawn + k * LANES + g * WIDTH, sizeof count);
          const Vector error = weight[k] * at[g] - count;
          const Bits more = error > largest[g];
          R1_ASSIGN_IF(more, largest[g], error);
          R1_ASSIGN_IF(more, best[g], self);
        }
      }
      for (i32 k = 0; k < sources; ++k) {
        const Vector self = Vector{} + static_cast<double>(k);
        for (int g = 0; g < GROUPS; ++g) {
          Vector count;
          std::memcpy(&count, drawn + k * LANES + g * WIDTH, sizeof count);
          const Bits chosen = best[g] == self;
          count += (Vector)((Bits)one & chosen);
          std::memcpy(drawn + k * LANES + g * WIDTH, &count, sizeof count);
        }
      }
      for (int g = 0; g < GROUPS; ++g) at[g] += one;
      std::memcpy(picked[step], best, sizeof best);
    }
    // Two lanes at a time: the counter that a lane steps is mostly the one that it stepped just before.
    for (int lane = 0; pick && lane < LANES; lane += 2) {
      u64* const number_a = number + lane * sources;
      u64* const number_b = number_a + sources;
      const u64 a = static_cast<u64>(lane) * stride + done, b = a + stride;
      for (u64 step = 0; step < block; ++step) {
        const i32 of_a = static_cast<i32>(picked[step][lane]),
                  of_b = static_cast<i32>(picked[step][lane + 1]);
        pick[a + step] = of_a;
        draw[a + step] = number_a[of_a]++;
        pick[b + step] = of_b;
        draw[b + step] = number_b[of_b]++;
      }
    }
  }
  std::memcpy(x, at, sizeof at);
}

#ifdef R1_X86
R1_AVX2 inline void lane_steps_avx2(const double* weight, i32 sources, double* drawn, double* x, u64 steps,
                                    i32* pick, u64* draw, u64 stride, u64* number) {
  lane_steps<4, 4>(weight, sources, drawn, x, steps, pick, draw, stride, number);
}
R1_AVX512 inline void lane_steps_avx512(const double* weight, i32 sources, double* drawn, double* x,
                                        u64 steps, i32* pick, u64* draw, u64 stride, u64* number) {
  lane_steps<8, 2>(weight, sources, drawn, x, steps, pick, draw, stride, number);
}
#endif

inline void lane_steps_any(const double* weight, i32 sources, double* drawn, double* x, u64 steps, i32* pick,
                           u64* draw, u64 stride, u64* number) {
#ifdef R1_X86
  if (vector_width() == 8)
    return lane_steps_avx512(weight, sources, drawn, x, steps, pick, draw, stride, number);
  if (vector_width() == 4)
    return lane_steps_avx2(weight, sources, drawn, x, steps, pick, draw, stride, number);
#endif
  lane_steps<2, 8>(weight, sources, drawn, x, steps, pick, draw, stride, number);
}

class Lanes {
 public:
  // Where the run-in is worth its cost; with more sources the wheel is faster.
  static constexpr u64 MIN_LENGTH = 8192;
  static constexpr i32 MAX_SOURCES = 64;

  // Samples [i, i + LANES * length), i > 0; both outputs or neither. Returns the stretches that stand: the
  // counts are brought to there, and what was written beyond is void.
  int run(const double* weight, double* drawn, i32 sources, u64 i, u64 length, i32* pick, u64* draw) {
    const std::size_t n = static_cast<std::size_t>(sources);
    lane_.resize(n * LANES);
    number_.resize(n * LANES);
    std::vector<double> start(n);
    for (int l = 1; l < LANES; ++l) {
      const u64 sample = i + static_cast<u64>(l) * length - RUN_IN;
      if (!guess(weight, sources, sample, start)) return 0;
      for (std::size_t k = 0; k < n; ++k) lane_[k * LANES + l] = start[k];
      x_[l] = static_cast<double>(sample);
    }
    // Lane 0 knows its counts; running in, it only keeps the others company.
    for (std::size_t k = 0; k < n; ++k) lane_[k * LANES] = drawn[k];
    x_[0] = static_cast<double>(i);
    lane_steps_any(weight, sources, lane_.data(), x_, RUN_IN, nullptr, nullptr, 0, nullptr);
    for (std::size_t k = 0; k < n; ++k) lane_[k * LANES] = drawn[k];
    x_[0] = static_cast<double>(i);
    const std::vector<double> begin = lane_;
    lane_steps_any(weight, sources, lane_.data(), x_, length, pick, draw, length, number_.data());
    int stand = 0;
    for (bool same = true; same && stand < LANES; ++stand) {
      for (std::size_t k = 0; k < n; ++k) {
        same = same && (stand + 1 == LANES || begin[k * LANES + stand + 1] == lane_[k * LANES + stand]);
      }
    }
    for (std::size_t k = 0; k < n; ++k) drawn[k] = lane_[k * LANES + stand - 1];
    return stand;
  }

  // Draws of source k at the end of a stretch of the last run.
  double drawn_after(int stretch, i32 k) const {
    return lane_[static_cast<std::size_t>(k) * LANES + stretch];
  }

 private:
  static constexpr u64 RUN_IN = 2048;

  // Counts near the true ones: every share rounded down, and the rest by the rule. False where shares do
  // not nearly add up to the samples, so that the true counts have drifted away from them.
  static bool guess(const double* weight, i32 sources, u64 sample, std::vector<double>& drawn) {
    const double x = static_cast<double>(sample);
    double sum = 0.0;
    for (i32 k = 0; k < sources; ++k) {
      drawn[k] = static_cast<double>(static_cast<u64>(weight[k] * x));
      sum += drawn[k];
    }
    if (!(x - sum >= 0.0 && x - sum <= sources)) return false;
    for (; sum < x; sum += 1.0) {
      double largest;
      drawn[largest_error(weight, drawn.data(), sources, x, largest)] += 1.0;
    }
    return true;
  }

  std::vector<double> lane_;
  std::vector<u64> number_;
  double x_[LANES];
};

// -- wheel

class Wheel {
 public:
  // Sources from which it is worth its upkeep, and samples beyond which its margin would be too thin.
  static constexpr i32 MIN_SOURCES = 33;
  static constexpr u64 MAX_SAMPLE = u64{1} << 46;

  // Samples [i, i + steps), below MAX_SAMPLE; outputs may be null. The weights sum to 1, nearly, and are
  // the same in every call. `drawn` must have come about by the rule.
  void run(const double* weight, double* drawn, i32 sources, u64 i, u64 steps, i32* pick, u64* draw) {
    if (member_.empty()) lay_out(weight, sources);
    take(drawn);
    run_any(i, i + steps, pick, draw);
    give_back(drawn);
  }

 private:
  // Below the largest error by these, the threshold is lowered to and raised to. A matter of speed alone:
  // lower keeps more entries awake, higher has all of them compared more often.
  static constexpr double LOWER = 0.005, RAISE = 0.0005;
  static constexpr double MIN_WEIGHT = 1e-9;
  static constexpr double VOID = 1e300;

  // The sources of one weight, in their order.
  struct Entry {
    double weight;
    double pace;   // Samples in which the error rises by 1; 0 for a weight that never sleeps.
    double drawn;  // Of the member whose turn it is.
    i32 first, size;
    i32 turn;
  };

  i32 source_of(i32 e) const { return member_[entry_[e].first + entry_[e].turn]; }

  void run_any(u64 i, u64 end, i32* pick, u64* draw) {
#ifdef R1_X86
    if (vector_width() >= 4) return run_avx2(i, end, pick, draw);
#endif
    run_with([this](double x, double& largest) { return best_awake(x, largest); }, i, end, pick, draw);
  }

  template <class Best>
  R1_INLINE void run_with(Best best, u64 i, u64 end, i32* pick, u64* draw) {
    double largest;
    best_of_all(std::max(static_cast<double>(i), 1.0), largest);
    set_threshold(largest - LOWER, i);
    double lowest = VOID;
    for (; i < end; ++i) {
      const double x = std::max(static_cast<double>(i), 1.0);
      for (i32 e = std::exchange(slot_[i & mask_], -1); e >= 0;) {
        const i32 next = next_[e];
        place(e, i);
        e = next;
      }
      const i32 at = best(x, largest);
      const bool found = largest >= threshold_;
      const i32 e = found ? awake_[at] : best_of_all(x, largest);
      Entry& entry = entry_[e];
      if (pick) *pick++ = source_of(e);
      if (draw) *draw++ = static_cast<u64>(entry.drawn);
      if (++entry.turn == entry.size) {
        entry.turn = 0;
        entry.drawn += 1.0;
      }
      if (!found) {
        set_threshold(largest - LOWER, i + 1);
        lowest = VOID;
        continue;
      }
      const u64 wakes = wake(entry);
      if (wakes <= i + 1) {
        awake_drawn_[at] = entry.drawn;
        awake_source_[at] = source_of(e);
      } else {
        retire(at);
        sleep(e, wakes, i + 1);
      }
      lowest = std::min(lowest, largest);
      if ((i & mask_) == mask_) {
        raise_threshold(lowest - RAISE, i + 1);
        lowest = VOID;
      }
    }
  }

  // The entry with the largest error, and of the lowest source where several have it.
  i32 best_of_all(double x, double& largest) const {
    i32 best = 0;
    largest = -VOID;
    for (i32 e = 0; e < static_cast<i32>(entry_.size()); ++e) {
      const double error = entry_[e].weight * x - entry_[e].drawn;
      if (error > largest || (error == largest && source_of(e) < source_of(best))) {
        largest = error;
        best = e;
      }
    }
    return best;
  }

  // The largest error among those awake, below any threshold if none is, and where the one of the lowest
  // number is that has it.
  i32 best_awake(double x, double& largest) const {
    i32 best = 0;
    largest = -VOID;
    for (i32 at = 0; at < awakes_; ++at) {
      const double error = awake_weight_[at] * x - awake_drawn_[at];
      if (error > largest || (error == largest && awake_source_[at] < awake_source_[best])) {
        largest = error;
        best = at;
      }
    }
    return best;
  }

#ifdef R1_X86
  R1_AVX2 R1_INLINE i32 best_awake_avx2(double x, double& largest) {
    const __m256d at_x = _mm256_set1_pd(x);
    __m256d most = _mm256_set1_pd(-VOID), other = most;
    double* const errors = errors_.data();
    for (i32 n = 0; n < awakes_; n += 8) {
      const __m256d a = _mm256_sub_pd(_mm256_mul_pd(_mm256_loadu_pd(&awake_weight_[n]), at_x),
                                      _mm256_loadu_pd(&awake_drawn_[n]));
      const __m256d b = _mm256_sub_pd(_mm256_mul_pd(_mm256_loadu_pd(&awake_weight_[n + 4]), at_x),
                                      _mm256_loadu_pd(&awake_drawn_[n + 4]));
      _mm256_storeu_pd(errors + n, a);
      _mm256_storeu_pd(errors + n + 4, b);
      most = _mm256_max_pd(most, a);
      other = _mm256_max_pd(other, b);
    }
    most = _mm256_max_pd(most, other);
    most = _mm256_max_pd(most, _mm256_permute2f128_pd(most, most, 1));
    most = _mm256_max_pd(most, _mm256_permute_pd(most, 5));
    largest = _mm256_cvtsd_f64(most);
    i32 best = -1;
    for (i32 group = 0; group < awakes_; group += 64) {
      u64 equal = 0;
      for (i32 n = 0; n < std::min(awakes_ - group, 64); n += 4) {
        const __m256d same = _mm256_cmp_pd(_mm256_loadu_pd(errors + group + n), most, _CMP_EQ_OQ);
        equal |= static_cast<u64>(_mm256_movemask_pd(same)) << n;
      }
      for (; equal; equal &= equal - 1) {
        const i32 at = group + __builtin_ctzll(equal);
        if (best < 0 || awake_source_[at] < awake_source_[best]) best = at;
      }
    }
    return best;
  }

  R1_AVX2 void run_avx2(u64 i, u64 end, i32* pick, u64* draw) {
    run_with([this](double x, double& largest) R1_AVX2 { return best_awake_avx2(x, largest); }, i, end, pick,
             draw);
  }
#endif

  void lay_out(const double* weight, i32 sources) {
    member_.resize(sources);
    std::iota(member_.begin(), member_.end(), 0);
    std::stable_sort(member_.begin(), member_.end(), [&](i32 a, i32 b) { return weight[a] < weight[b]; });
    for (i32 n = 0; n < sources; ++n) {
      const double w = weight[member_[n]];
      if (n == 0 || w != entry_.back().weight) {
        entry_.push_back({w, w < MIN_WEIGHT ? 0.0 : 1.0 / w, 0.0, n, 0, 0});
      }
      ++entry_.back().size;
    }
    std::size_t slots = 64;
    while (slots < 2 * entry_.size()) slots *= 2;
    mask_ = slots - 1;
    slot_.resize(slots);
    next_.resize(entry_.size());
    const std::size_t padded = entry_.size() + 8;
    awake_.resize(padded);
    awake_source_.resize(padded);
    awake_weight_.resize(padded);
    awake_drawn_.resize(padded);
    errors_.resize(padded);
  }

  // Whose turn it is: the members before it were drawn once more than those from it on.
  void take(const double* drawn) {
    for (Entry& entry : entry_) {
      const i32* const members = &member_[entry.first];
      entry.drawn = drawn[members[entry.size - 1]];
      entry.turn = 0;
      while (drawn[members[entry.turn]] > entry.drawn) ++entry.turn;
    }
  }

  void give_back(double* drawn) const {
    for (const Entry& entry : entry_) {
      for (i32 n = 0; n < entry.size; ++n) {
        drawn[member_[entry.first + n]] = entry.drawn + (n < entry.turn ? 1.0 : 0.0);
      }
    }
  }

  // A sample at or before which the error reaches the threshold: a tenth of a sample would cover the
  // rounding here and in the error.
  u64 wake(const Entry& entry) const {
    const double sample = (entry.drawn + threshold_) * entry.pace - 1.0;
    return sample < 1.0 ? 0 : sample < 0x1p50 ? static_cast<u64>(sample) : u64{1} << 50;
  }

  // An entry that sleeps longer than the wheel is around is looked at once a turn.
  void sleep(i32 e, u64 until, u64 now) {
    i32& slot = slot_[std::min(until, now + mask_) & mask_];
    next_[e] = slot;
    slot = e;
  }

  void place(i32 e, u64 now) {
    const u64 wakes = wake(entry_[e]);
    if (wakes > now) {
      sleep(e, wakes, now);
      return;
    }
    awake_[awakes_] = e;
    awake_source_[awakes_] = source_of(e);
    awake_weight_[awakes_] = entry_[e].weight;
    awake_drawn_[awakes_] = entry_[e].drawn;
    ++awakes_;
  }

  void retire(i32 at) {
    --awakes_;
    awake_[at] = awake_[awakes_];
    awake_source_[at] = awake_source_[awakes_];
    awake_weight_[at] = awake_weight_[awakes_];
    awake_drawn_[at] = awake_drawn_[awakes_];
    clear(awakes_);
  }

  // Below every error: rows of eight are compared whole.
  void clear(i32 at) {
    awake_weight_[at] = 0.0;
    awake_drawn_[at] = 2 * VOID;
  }

  void set_threshold(double threshold, u64 now) {
    threshold_ = threshold;
    std::fill(slot_.begin(), slot_.end(), -1);
    awakes_ = 0;
    for (i32 n = 0; n < static_cast<i32>(awake_.size()); ++n) clear(n);
    for (i32 e = 0; e < static_cast<i32>(entry_.size()); ++e) place(e, now);
  }

  void raise_threshold(double threshold, u64 now) {
    if (threshold <= threshold_) return;
    threshold_ = threshold;
    for (i32 at = 0; at < awakes_;) {
      const i32 e = awake_[at];
      const u64 wakes = wake(entry_[e]);
      if (wakes > now) {
        retire(at);
        sleep(e, wakes, now);
      } else {
        ++at;
      }
    }
  }

  std::vector<i32> member_;  // Sources by weight, and in their order within one weight.
  std::vector<Entry> entry_;
  double threshold_ = 0.0;
  u64 mask_ = 0;
  std::vector<i32> slot_, next_;  // Sleepers that wake at sample s are a list from slot_[s & mask_].
  i32 awakes_ = 0;
  std::vector<i32> awake_, awake_source_;  // Entries that are compared, with room for a row of eight.
  std::vector<double> awake_weight_, awake_drawn_, errors_;
};

}  // namespace r1
