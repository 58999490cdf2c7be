// Megatron's rule, three ways with one answer: plain, in lanes, and by a wheel of sleeping sources.
//
// The rule for sample i is the first source with the largest w[k] * max(i, 1) - drawn[k], in doubles; the
// plain loop is megatron-core's own. What makes the others faster, and why they are exact:
//
// - lanes: sixteen stretches of the order side by side, one a vector lane. A stretch begins with a guess of
//   the counts, run in for a while; it stands only if the stretch before it ends in the same counts.
// - wheel: only sources whose error can reach a threshold are compared. Errors rise linearly, so the sample
//   at which a source gets there is known, and it sleeps until the block of samples that holds the one
//   before. If nobody reaches the threshold, all are compared and it is lowered. Sources of one weight take
//   turns in their order, so they are one entry that stands for the one whose turn it is.
//
// Both add the draw of a sample to the counts while they compare for the next one: every count is loaded
// and stored once a sample, as part of the same whole vector, and no load waits for a narrower store.
//
// All counts are whole numbers in doubles, below 2^53. Build with -ffp-contract=off.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu.hpp"
#include "integer.hpp"

// `to = condition ? from : to`, lane by lane. Compilers take the conditional apart where the CPU has no
// blend, and do not see one in the masks where it has.
#define R1_ASSIGN_IF(condition, to, from)                                                    \
  do {                                                                                       \
    if constexpr (WIDTH > 2) {                                                               \
      to = condition ? from : to;                                                            \
    } else {                                                                                 \
      to = (std::decay_t<decltype(to)>)(((Bits)from & condition) | ((Bits)to & ~condition)); \
    }                                                                                        \
  } while (0)

namespace r1 {

// Beyond every error, so that its negative is below them all.
constexpr double VOID = 1e300;

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

// A number for each lane, on the cache lines of its own.
struct alignas(64) OfLanes {
  double lane[LANES];
};

// `drawn`: [sources], `x`: the lanes' samples, at least 1; both are brought forward. Lane l writes to
// pick + l * stride, draw + l * stride, if not null; `number` is room for [LANES][sources].
template <int WIDTH>
R1_INLINE void lane_steps(const double* weight, i32 sources, OfLanes* drawn, OfLanes& x, u64 steps, i32* pick,
                          u64* draw, u64 stride, u64* number) {
  using Vector = typename Pack<WIDTH>::Vector;
  using Bits = typename Pack<WIDTH>::Bits;
  constexpr u64 BLOCK = 64;
  // Vectors compared side by side: as many as the registers of every CPU hold.
  constexpr int PAIR = 2;
  constexpr int GROUPS = LANES / WIDTH;
  static_assert(GROUPS % PAIR == 0, "every lane in one pair of groups");
  const Vector one = Vector{} + 1.0;
  Vector at[GROUPS];
  Bits best[GROUPS];
  std::memcpy(at, x.lane, sizeof at);
  for (Bits& none : best) none = Bits{} - 1;
  alignas(64) i64 picked[BLOCK][LANES];
  if (pick) {
    for (int lane = 0; lane < LANES; ++lane) {
      for (i32 k = 0; k < sources; ++k) number[lane * sources + k] = static_cast<u64>(drawn[k].lane[lane]);
    }
  }
  for (u64 done = 0; done < steps; done += BLOCK) {
    const u64 block = std::min(BLOCK, steps - done);
    for (u64 step = 0; step < block; ++step) {
      for (int first = 0; first < GROUPS; first += PAIR) {
        Vector largest[PAIR];
        Bits next[PAIR];
        for (int g = 0; g < PAIR; ++g) {
          largest[g] = Vector{} - VOID;
          next[g] = Bits{};
        }
        for (i32 k = 0; k < sources; ++k) {
          const Bits self = Bits{} + i64{k};
          for (int g = 0; g < PAIR; ++g) {
            double* const place = drawn[k].lane + (first + g) * WIDTH;
            Vector count;
            std::memcpy(&count, place, sizeof count);
            count += (Vector)((Bits)one & (best[first + g] == self));
            std::memcpy(place, &count, sizeof count);
            const Vector error = weight[k] * at[first + g] - count;
            const Bits more = error > largest[g];
            R1_ASSIGN_IF(more, largest[g], error);
            R1_ASSIGN_IF(more, next[g], self);
          }
        }
        for (int g = 0; g < PAIR; ++g) {
          at[first + g] += one;
          best[first + g] = next[g];
        }
      }
      std::memcpy(picked[step], best, sizeof best);
    }
    // Two lanes at a time: the counter that a lane steps is mostly the one that it stepped just before.
    for (int lane = 0; pick && lane < LANES; lane += 2) {
      u64* const number_a = number + lane * sources;
      u64* const number_b = number_a + sources;
      const u64 a = static_cast<u64>(lane) * stride + done, b = a + stride;
      for (u64 step = 0; step < block; ++step) {
        const i64 of_a = picked[step][lane], of_b = picked[step][lane + 1];
        pick[a + step] = static_cast<i32>(of_a);
        draw[a + step] = number_a[of_a]++;
        pick[b + step] = static_cast<i32>(of_b);
        draw[b + step] = number_b[of_b]++;
      }
    }
  }
  i64 last[LANES];
  std::memcpy(last, best, sizeof last);
  for (int lane = 0; steps && lane < LANES; ++lane) drawn[last[lane]].lane[lane] += 1.0;
  std::memcpy(x.lane, at, sizeof at);
}

#ifdef R1_X86
R1_AVX2 inline void lane_steps_avx2(const double* weight, i32 sources, OfLanes* drawn, OfLanes& x, u64 steps,
                                    i32* pick, u64* draw, u64 stride, u64* number) {
  lane_steps<4>(weight, sources, drawn, x, steps, pick, draw, stride, number);
}
R1_AVX512 inline void lane_steps_avx512(const double* weight, i32 sources, OfLanes* drawn, OfLanes& x,
                                        u64 steps, i32* pick, u64* draw, u64 stride, u64* number) {
  lane_steps<8>(weight, sources, drawn, x, steps, pick, draw, stride, number);
}
#endif

inline void lane_steps_any(const double* weight, i32 sources, OfLanes* drawn, OfLanes& x, u64 steps,
                           i32* pick, u64* draw, u64 stride, u64* number) {
#ifdef R1_X86
  if (vector_width() == 8)
    return lane_steps_avx512(weight, sources, drawn, x, steps, pick, draw, stride, number);
  if (vector_width() == 4)
    return lane_steps_avx2(weight, sources, drawn, x, steps, pick, draw, stride, number);
#endif
  lane_steps<2>(weight, sources, drawn, x, steps, pick, draw, stride, number);
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
    lane_.resize(n);
    number_.resize(n * LANES);
    std::vector<double> start(n);
    for (int l = 1; l < LANES; ++l) {
      const u64 sample = i + static_cast<u64>(l) * length - RUN_IN;
      if (!guess(weight, sources, sample, start)) return 0;
      for (std::size_t k = 0; k < n; ++k) lane_[k].lane[l] = start[k];
      x_.lane[l] = static_cast<double>(sample);
    }
    // Lane 0 knows its counts; running in, it only keeps the others company.
    for (std::size_t k = 0; k < n; ++k) lane_[k].lane[0] = drawn[k];
    x_.lane[0] = static_cast<double>(i);
    lane_steps_any(weight, sources, lane_.data(), x_, RUN_IN, nullptr, nullptr, 0, nullptr);
    for (std::size_t k = 0; k < n; ++k) lane_[k].lane[0] = drawn[k];
    x_.lane[0] = static_cast<double>(i);
    const std::vector<OfLanes> begin = lane_;
    lane_steps_any(weight, sources, lane_.data(), x_, length, pick, draw, length, number_.data());
    int stand = 0;
    for (bool same = true; same && stand < LANES; ++stand) {
      for (std::size_t k = 0; k < n; ++k) {
        same = same && (stand + 1 == LANES || begin[k].lane[stand + 1] == lane_[k].lane[stand]);
      }
    }
    for (std::size_t k = 0; k < n; ++k) drawn[k] = lane_[k].lane[stand - 1];
    return stand;
  }

  // Draws of source k at the end of a stretch of the last run.
  double drawn_after(int stretch, i32 k) const { return lane_[k].lane[stretch]; }

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

  std::vector<OfLanes> lane_;  // Draws of each source.
  std::vector<u64> number_;
  OfLanes x_;
};

// -- wheel

class Wheel {
 public:
  // Sources from which it is worth its upkeep, and samples beyond which its margin would be too thin.
  static constexpr i32 MIN_SOURCES = 17;
  static constexpr u64 MAX_SAMPLE = u64{1} << 46;

  // Samples [i, i + steps), below MAX_SAMPLE; outputs may be null. The weights sum to 1, nearly, and are
  // the same in every call. `drawn` must have come about by the rule.
  void run(const double* weight, double* drawn, i32 sources, u64 i, u64 steps, i32* pick, u64* draw) {
    if (rows_.empty()) lay_out(weight, sources);
    take(drawn);
    Output out{pick, draw};
    double largest;
    best_of_all(i, largest);
    set_threshold(largest - LOWER, i);
    for (const u64 end = i + steps; i < end;) {
      const u64 stop = std::min(end, block_end(i));
      i = compare_any(i, stop, out);
      if (i < stop) {
        draw_from(best_of_all(i, largest), out);
        set_threshold(largest - LOWER, ++i);
      } else {
        next_block(i);
      }
    }
    give_back(drawn);
  }

 private:
  // Below the largest error by these, the threshold is lowered to and raised to. A matter of speed alone:
  // lower keeps more entries awake, higher has all of them compared more often.
  static constexpr double LOWER = 0.005, RAISE = 0.0005;
  static constexpr double MIN_WEIGHT = 1e-9;
  // Samples between which entries fall asleep and wake, and after which the threshold is raised.
  static constexpr u64 BLOCK = 32, RAISE_EVERY = 32 * BLOCK;
  static constexpr int ROW = 8;
  static constexpr i64 SINGLE = i64{1} << 32, SHARED = 2 * SINGLE;

  // The sources of one weight, in their order.
  struct Entry {
    double weight;
    double pace;   // Samples in which the error rises by 1; 0 for a weight that never sleeps.
    double drawn;  // Of the member whose turn it is.
    i32 first, size;
    i32 turn;
  };

  // Entries that are awake, in whole vectors. A mark is the entry and SINGLE or SHARED, so that the sum of
  // some marks tells a single entry with one member, and which, from all else.
  struct alignas(64) Row {
    double weight[ROW], drawn[ROW], error[ROW];
    i64 mark[ROW];
  };

  struct Output {
    i32* pick;
    u64* draw;
  };

  static u64 block_end(u64 i) { return (i / BLOCK + 1) * BLOCK; }
  static double sample(u64 i) { return std::max(static_cast<double>(i), 1.0); }

  i32 source_of(i32 e) const { return member_[entry_[e].first + entry_[e].turn]; }

  void draw_from(i32 e, Output& out) {
    Entry& entry = entry_[e];
    if (out.pick) *out.pick++ = source_of(e);
    if (out.draw) *out.draw++ = static_cast<u64>(entry.drawn);
    if (++entry.turn == entry.size) {
      entry.turn = 0;
      entry.drawn += 1.0;
    }
  }

  u64 compare_any(u64 i, u64 stop, Output& out) {
#ifdef R1_X86
    if (vector_width() == 8) return compare_avx512(i, stop, out);
    if (vector_width() == 4) return compare_avx2(i, stop, out);
#endif
    return compare<2>(i, stop, out);
  }

#ifdef R1_X86
  R1_AVX2 u64 compare_avx2(u64 i, u64 stop, Output& out) { return compare<4>(i, stop, out); }
  R1_AVX512 u64 compare_avx512(u64 i, u64 stop, Output& out) { return compare<8>(i, stop, out); }
#endif

  // Samples [i, stop) of one block, or fewer: up to one at which nobody awake reaches the threshold. Returns
  // the sample after them.
  template <int WIDTH>
  R1_INLINE u64 compare(u64 i, const u64 stop, Output& output) {
    using Vector = typename Pack<WIDTH>::Vector;
    using Bits = typename Pack<WIDTH>::Bits;
    const Vector one = Vector{} + 1.0;
    const double threshold = threshold_;
    double lowest = lowest_;
    Output out = output;  // Kept in registers.
    Row* const rows = rows_.data();
    Row* const end = rows + (awakes_ + ROW - 1) / ROW;
    double drawn = NAN;  // The error whose entry was drawn last and is to count it.
    for (; i < stop; ++i) {
      const Vector x = Vector{} + sample(i);
      Vector most = Vector{} - VOID;
      Bits most_mark{};
      for (Row* row = rows; row != end; ++row) {
        for (int n = 0; n < ROW; n += WIDTH) {
          Vector weight, count, error;
          Bits mark;
          std::memcpy(&weight, row->weight + n, sizeof weight);
          std::memcpy(&count, row->drawn + n, sizeof count);
          std::memcpy(&error, row->error + n, sizeof error);
          std::memcpy(&mark, row->mark + n, sizeof mark);
          count += (Vector)((error == drawn) & (Bits)one);
          error = weight * x - count;
          std::memcpy(row->drawn + n, &count, sizeof count);
          std::memcpy(row->error + n, &error, sizeof error);
          most_mark = (most_mark & (error <= most)) + (mark & (error >= most));
          most = error > most ? error : most;
        }
      }
      const double largest = largest_of<WIDTH>(most);
      if (largest < threshold) break;
      lowest = std::min(lowest, largest);
      most_mark &= most == largest;
      const i64 mark = sum_of<WIDTH>(most_mark);
      if (mark < SHARED) {
        draw_from(static_cast<i32>(mark), out);
        drawn = largest;
      } else {
        draw_first(largest, out);
        drawn = NAN;
      }
    }
    lowest_ = lowest;
    output = out;
    return i;
  }

  template <int WIDTH>
  static R1_INLINE double largest_of(const typename Pack<WIDTH>::Vector& v) {
    double lane[WIDTH];
    std::memcpy(lane, &v, sizeof lane);
    for (int half = WIDTH / 2; half; half /= 2) {
      for (int n = 0; n < half; ++n) lane[n] = std::max(lane[n], lane[n + half]);
    }
    return lane[0];
  }

  template <int WIDTH>
  static R1_INLINE i64 sum_of(const typename Pack<WIDTH>::Bits& v) {
    i64 lane[WIDTH], sum = 0;
    std::memcpy(lane, &v, sizeof lane);
    for (int n = 0; n < WIDTH; ++n) sum += lane[n];
    return sum;
  }

  // Draws from the lowest source of those awake that have the largest error.
  void draw_first(double largest, Output& out) {
    i32 best = -1;
    double* count = nullptr;
    for (i32 at = 0; at < awakes_; ++at) {
      Row& row = rows_[at / ROW];
      if (row.error[at % ROW] != largest) continue;
      const i32 e = static_cast<i32>(row.mark[at % ROW]);
      if (best >= 0 && source_of(best) < source_of(e)) continue;
      best = e;
      count = &row.drawn[at % ROW];
    }
    draw_from(best, out);
    // Most turns leave the count as it is, and then nothing waits for this narrow store.
    if (*count != entry_[best].drawn) *count = entry_[best].drawn;
  }

  // The entry with the largest error, and of the lowest source where several have it.
  i32 best_of_all(u64 i, double& largest) const {
    i32 best = 0;
    largest = -VOID;
    for (i32 e = 0; e < static_cast<i32>(entry_.size()); ++e) {
      const double error = entry_[e].weight * sample(i) - entry_[e].drawn;
      if (error > largest || (error == largest && source_of(e) < source_of(best))) {
        largest = error;
        best = e;
      }
    }
    return best;
  }

  // `rows_` comes last: where memory ran out, all is laid out anew.
  void lay_out(const double* weight, i32 sources) {
    entry_.clear();
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
    while (slots * BLOCK < 2 * entry_.size()) slots *= 2;
    mask_ = slots - 1;
    slot_.resize(slots);
    next_.resize(entry_.size());
    tired_.resize(entry_.size());
    rows_.resize(entry_.size() / ROW + 1);
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
    return static_cast<u64>(static_cast<i64>(std::min(std::max(sample, 0.0), 0x1p50)));
  }

  // An entry that sleeps longer than the wheel is around is looked at once a turn.
  void sleep(i32 e, u64 until, u64 now) {
    i32& slot = slot_[std::min(until / BLOCK, now / BLOCK + mask_) & mask_];
    next_[e] = slot;
    slot = e;
  }

  void place(i32 e, u64 now) {
    const Entry& entry = entry_[e];
    const u64 wakes = wake(entry);
    if (wakes >= block_end(now)) {
      sleep(e, wakes, now);
      return;
    }
    Row& row = rows_[awakes_ / ROW];
    const int n = awakes_++ % ROW;
    row.mark[n] = (entry.size == 1 ? SINGLE : SHARED) + e;
    row.weight[n] = entry.weight;
    row.drawn[n] = entry.drawn;
  }

  void next_block(u64 now) {
    if (now % RAISE_EVERY == 0) {
      threshold_ = std::max(threshold_, lowest_ - RAISE);
      lowest_ = VOID;
    }
    // First who falls asleep, listed without a branch that nobody could predict; from the last on, so that
    // the last can take the place of each.
    i32* const tired = tired_.data();
    i32 n = 0;
    for (i32 at = awakes_ - 1; at >= 0; --at) {
      Row& row = rows_[at / ROW];
      const Entry& entry = entry_[static_cast<i32>(row.mark[at % ROW])];
      row.drawn[at % ROW] = entry.drawn;
      tired[n] = at;
      n += wake(entry) >= block_end(now);
    }
    for (i32 k = 0; k < n; ++k) {
      Row& row = rows_[tired[k] / ROW];
      const Row& last = rows_[--awakes_ / ROW];
      const int to = tired[k] % ROW, from = awakes_ % ROW;
      const i32 e = static_cast<i32>(row.mark[to]);
      sleep(e, wake(entry_[e]), now);
      row.mark[to] = last.mark[from];
      row.weight[to] = last.weight[from];
      row.drawn[to] = last.drawn[from];
    }
    for (i32 e = std::exchange(slot_[(now / BLOCK) & mask_], -1); e >= 0;) {
      const i32 next = next_[e];
      place(e, now);
      e = next;
    }
    fill_row();
  }

  // Below every error: rows are compared whole.
  void fill_row() {
    for (i32 at = awakes_; at % ROW; ++at) {
      rows_[at / ROW].weight[at % ROW] = 0.0;
      rows_[at / ROW].drawn[at % ROW] = 2 * VOID;
    }
  }

  void set_threshold(double threshold, u64 now) {
    threshold_ = threshold;
    lowest_ = VOID;
    std::fill(slot_.begin(), slot_.end(), -1);
    awakes_ = 0;
    for (i32 e = 0; e < static_cast<i32>(entry_.size()); ++e) place(e, now);
    fill_row();
  }

  std::vector<i32> member_;  // Sources by weight, and in their order within one weight.
  std::vector<Entry> entry_;
  double threshold_ = 0.0;
  double lowest_ = VOID;  // The lowest of the largest errors since the threshold was looked at.
  u64 mask_ = 0;
  std::vector<i32> slot_, next_;  // Sleepers that wake in block b are a list from slot_[b & mask_].
  i32 awakes_ = 0;
  std::vector<Row> rows_;
  std::vector<i32> tired_;  // Room for places of those who fall asleep.
};

}  // namespace r1
