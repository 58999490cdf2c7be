// The sampler: phases of weights, caps and keep masks over the blend, and each epoch's own permutation.
//
// A phase is cut into segments, at whose ends a source reaches its cap and leaves the blend. Within a
// segment the order is a SplitTree or a Greedy; every source keeps its own cursor (draws so far) across
// all of them. A draw falls into an epoch of its source, and the epoch's permutation over the kept
// windows says which window it is. Segments are opened as far as a question needs.
//
// State: about 60 bytes a source and segment, 150 a source and phase, and the masks. Cost of `locate` in
// the balanced order: O(log segments + tree depth). One mutex makes every call safe from any thread. A call
// that throws leaves the plan as it was, but for segments that it opened.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "blend.hpp"
#include "greedy.hpp"
#include "integer.hpp"
#include "interrupt.hpp"
#include "keep.hpp"
#include "permute.hpp"

namespace r1 {

struct Draw {
  i32 source;
  u64 epoch;
  u64 window;
};

// One source in one phase.
struct SourcePhase {
  u64 windows;      // Of one epoch, after the mask.
  u64 limit;        // Draws, counted over the whole plan, at which the source leaves the phase; or NEVER.
  u64 first_draw;   // Draw, counted over the whole plan, that opened `first_epoch`.
  u64 first_epoch;  // Epochs go on from here, `windows` draws each.
  std::shared_ptr<const Keep> keep;
};

class Plan {
 public:
  static constexpr u64 MAX_SAMPLE = MAX_NUMBER;
  static constexpr std::size_t MAX_SOURCES = std::size_t{1} << 20;
  static constexpr std::size_t BLOCK = 64;
  static constexpr std::size_t RUN = std::size_t{1} << 18;

  // `source_key`: the seed of each source's permutations. Throws std::invalid_argument for too many.
  Plan(bool megatron, bool shuffle, std::vector<u64> source_key)
      : megatron_(megatron), shuffle_(shuffle), source_key_(std::move(source_key)) {
    if (source_key_.size() <= MAX_SOURCES) return;
    throw std::invalid_argument(std::to_string(source_key_.size()) + " sources: use at most 2^20");
  }

  std::size_t sources() const { return source_key_.size(); }

  // Throws std::invalid_argument unless there are so many values as sources.
  void check_sizes(const std::vector<std::size_t>& sizes) const {
    for (const std::size_t size : sizes) {
      if (size == source_key_.size()) continue;
      throw std::invalid_argument(std::to_string(size) + " values for " + std::to_string(source_key_.size()) +
                                  " sources; use one for each");
    }
  }

  // `weights` (balanced) or `exact_weights` (Megatron's doubles), one a source, 0 for a source left out.
  // Throws std::invalid_argument for a phase that does not begin behind the last one, draws nothing, or has
  // numbers that no plan can have.
  void add_phase(u64 start, std::vector<u64> weights, std::vector<double> exact_weights,
                 const std::vector<SourcePhase>& sources) {
    const Turn turn(*this);
    if (phases_.empty() ? start != 0 : start <= phases_.back()->start) {
      throw std::invalid_argument(
          "a phase at sample " + std::to_string(start) + ": use " +
          (phases_.empty() ? "0 for the first one"
                           : "more than the " + std::to_string(phases_.back()->start) + " of the last one"));
    }
    check_sizes({weights.size(), exact_weights.size(), sources.size()});
    check_weights(exact_weights);
    u64 sum = 0;
    for (const u64 weight : weights) {
      if (!__builtin_add_overflow(sum, weight, &sum)) continue;
      throw std::invalid_argument("the weights sum to 2^64 or more; use smaller ones");
    }
    const std::vector<u64> base =
        phases_.empty() ? std::vector<u64>(source_key_.size(), 0) : counts_before(start);
    auto phase = std::make_unique<Phase>();
    phase->start = start;
    phase->weights = std::move(weights);
    phase->exact_weights = std::move(exact_weights);
    phase->sources.reserve(sources.size());
    for (std::size_t k = 0; k < sources.size(); ++k) {
      check(sources[k], k, phase->weight(megatron_, k), base[k]);
      phase->sources.push_back(
          {sources[k], Divider(std::max<u64>(1, sources[k].windows)), Permutation(sources[k].windows)});
    }
    std::unique_ptr<Segment> segment = made(*phase, start, base, true);
    if (!segment) {
      throw std::invalid_argument("the phase at sample " + std::to_string(start) +
                                  " draws nothing: give a source that is below its limit a weight");
    }
    phases_.reserve(phases_.size() + 1);
    segments_.reserve(segments_.size() + 1);
    // From here on nothing throws.
    while (segments_.size() && segments_.back()->start >= start) segments_.pop_back();
    if (segments_.size()) segments_.back()->end = start;
    phases_.push_back(std::move(phase));
    segments_.push_back(std::move(segment));
    ended_ = false;
  }

  Draw locate(u64 i) {
    Draw out;
    locate_each(1, [i](std::size_t) { return i; }, [&out](std::size_t, Draw draw) { out = draw; });
    return out;
  }

  // `sample(n)` gives the n-th global sample, `write(n, draw)` takes the answer; in any order of n.
  // `write(n)` comes after the last `sample(n)`, so that both may use one array.
  template <class Sample, class Write>
  void locate_each(std::size_t size, Sample sample, Write write) {
    const Turn turn(*this);
    if (size == 0) return;
    if (megatron_) {
      locate_replayed(size, sample, write);
      return;
    }
    u64 last = 0;
    for (std::size_t n = 0; n < size; ++n) last = std::max<u64>(last, sample(n));
    require(last);
    const Segment* segment = segments_.back().get();
    in_blocks(
        size,
        [&](std::size_t n) {
          const u64 i = sample(n);
          if (i < segment->start || i >= segment->end) segment = &segment_of(i);
          u64 draw;
          const i32 leaf = segment->tree->locate(i - segment->start, draw);
          return Item{&segment->leaves[leaf], draw};
        },
        write);
  }

  // Draws of every source among samples [0, i).
  std::vector<u64> counts(u64 i) {
    const Turn turn(*this);
    return counts_before(i);
  }

  u64 count(u64 source, u64 i) {
    const Turn turn(*this);
    check_source(source);
    if (i) require(i - 1);
    if (segments_.empty()) return 0;
    Segment& segment = segment_of(i);
    const i32 leaf = segment.leaf_of[source];
    if (leaf < 0) return segment.base[source];
    const u64 n = i - segment.start;
    return segment.base[source] + (megatron_ ? segment.greedy->count(leaf, n) : segment.tree->count(leaf, n));
  }

  // The global sample that is the source's draw number `draw`; NEVER if the plan does not get there.
  u64 position(u64 source, u64 draw) {
    const Turn turn(*this);
    check_source(source);
    if (segments_.empty() || draw >= MAX_SAMPLE) return NEVER;
    for (;;) {
      const auto after = std::upper_bound(
          segments_.begin(), segments_.end(), draw,
          [source](u64 j, const std::unique_ptr<Segment>& segment) { return j < segment->base[source]; });
      Segment& segment = **(after - 1);
      const i32 leaf = segment.leaf_of[source];
      if (leaf >= 0) {
        const u64 j = draw - segment.base[source];
        const u64 item = megatron_ ? segment.greedy->position(leaf, j) : segment.tree->position(leaf, j);
        if (item < segment.end - segment.start && item < MAX_SAMPLE) return segment.start + item;
      }
      // Not in this segment, so only a segment that is not open yet can hold it.
      if (&segment != segments_.back().get() || ended_ || leaf < 0) return NEVER;
      if (megatron_) segment.end = std::min(segment.end, end_of(segment));
      if (segment.end == NEVER) return NEVER;
      open_next();
    }
  }

  // For each source, the sum over phases of its tree's bound; segments that a cap opens are left out.
  std::vector<double> bounds() {
    const Turn turn(*this);
    std::vector<double> sum(source_key_.size(), 0.0);
    for (const auto& segment : segments_) {
      if (!segment->opens_phase || !segment->tree) continue;
      for (std::size_t leaf = 0; leaf < segment->leaves.size(); ++leaf) {
        sum[segment->leaves[leaf].source] += segment->tree->bound(static_cast<i32>(leaf));
      }
    }
    return sum;
  }

  // First samples of the segments opened so far.
  std::vector<u64> segment_starts() {
    const Turn turn(*this);
    std::vector<u64> starts;
    for (const auto& segment : segments_) starts.push_back(segment->start);
    return starts;
  }

  // Bytes of state, the masks not counted.
  std::size_t bytes() {
    const Turn turn(*this);
    std::size_t sum = source_key_.size() * sizeof(u64);
    for (const auto& phase : phases_) {
      sum += sizeof(Phase) + phase->sources.size() * sizeof(Epochs) + phase->weights.size() * sizeof(u64) +
             phase->exact_weights.size() * sizeof(double);
    }
    for (const auto& segment : segments_) {
      sum += sizeof(Segment) + segment->leaves.size() * sizeof(Leaf) + segment->base.size() * sizeof(u64) +
             segment->leaf_of.size() * sizeof(i32);
      if (segment->tree) sum += segment->tree->bytes();
      if (segment->greedy) sum += segment->greedy->bytes();
    }
    return sum;
  }

 private:
  struct Epochs {
    SourcePhase at;
    Divider windows;
    Permutation permutation;
  };
  struct Phase {
    u64 start;
    std::vector<u64> weights;
    std::vector<double> exact_weights;
    std::vector<Epochs> sources;

    bool weight(bool megatron, std::size_t k) const {
      return megatron ? exact_weights[k] != 0.0 : weights[k] != 0;
    }
  };
  struct Leaf {
    const Epochs* epochs;
    u64 draws;  // Draws of the source between `first_draw` and the segment's start.
    i32 source;
  };
  // A draw of a segment's source, counted from the segment's start.
  struct Item {
    const Leaf* leaf;
    u64 draw;
    const Keep* keep() const { return leaf->epochs->at.keep.get(); }
  };
  struct Segment {
    u64 start;
    u64 end;  // NEVER while unknown.
    bool opens_phase;
    std::vector<Leaf> leaves;
    std::vector<i32> leaf_of;  // Of each source, or -1.
    std::vector<u64> base;     // Draws of each source before `start`.
    std::unique_ptr<SplitTree> tree;
    std::unique_ptr<Greedy> greedy;
  };

  // One thread's call. Whoever ends long work (interrupt.hpp) may run any code within a call; that may not
  // call the same plan again.
  class Turn {
   public:
    explicit Turn(Plan& plan) : plan_(plan) {
      const std::thread::id self = std::this_thread::get_id();
      if (plan.inside_.load(std::memory_order_relaxed) == self) {
        throw std::runtime_error("the plan was called from within one of its own calls, by a signal handler");
      }
      plan.mutex_.lock();
      plan.inside_.store(self, std::memory_order_relaxed);
    }
    ~Turn() {
      plan_.inside_.store(std::thread::id(), std::memory_order_relaxed);
      plan_.mutex_.unlock();
    }
    Turn(const Turn&) = delete;

   private:
    Plan& plan_;
  };

  void check_source(u64 source) const {
    if (source < source_key_.size()) return;
    throw std::out_of_range("source " + std::to_string(source) + " of " + std::to_string(source_key_.size()));
  }

  // `drawn`: draws of source k before the phase.
  static void check(const SourcePhase& source, std::size_t k, bool has_weight, u64 drawn) {
    const auto refuse = [&](const std::string& why) {
      throw std::invalid_argument("source " + std::to_string(k) + ": " + why);
    };
    const std::string windows = std::to_string(source.windows) + " windows";
    if (source.windows >= MAX_NUMBER) refuse(windows + ", use fewer than 2^62");
    if (source.keep && source.windows > source.keep->kept()) {
      refuse(windows + ", but its mask keeps " + std::to_string(source.keep->kept()));
    }
    if (has_weight && !source.windows) refuse("a weight, but no window; give it weight 0");
    if (source.first_epoch >= MAX_NUMBER) {
      refuse("first epoch " + std::to_string(source.first_epoch) + ", use less than 2^62");
    }
    if (source.first_draw > drawn) {
      refuse("first draw " + std::to_string(source.first_draw) + ", but only " + std::to_string(drawn) +
             " draws come before the phase");
    }
  }

  // Answers `size` questions, `item(n)` each, block by block and stage by stage: the stages' cache misses
  // and mispredictions then overlap across samples.
  template <class ItemOf, class Write>
  void in_blocks(std::size_t size, ItemOf item, Write write) const {
    Item items[BLOCK];
    Draw draws[BLOCK];
    for (std::size_t first = 0; first < size; first += BLOCK) {
      const std::size_t block = std::min(BLOCK, size - first);
      worked(16 * block);
      for (std::size_t n = 0; n < block; ++n) items[n] = item(first + n);
      for (std::size_t n = 0; n < block; ++n) {
        draws[n] = in_epoch(items[n]);
        if (const Keep* keep = items[n].keep()) keep->expect_hint(draws[n].window);
      }
      for (std::size_t n = 0; n < block; ++n) {
        if (const Keep* keep = items[n].keep()) keep->expect_lines(draws[n].window);
      }
      for (std::size_t n = 0; n < block; ++n) {
        if (const Keep* keep = items[n].keep()) draws[n].window = keep->select(draws[n].window);
        write(first + n, draws[n]);
      }
    }
  }

  // Source, epoch, and for a window its place among the epoch's kept windows.
  Draw in_epoch(const Item& item) const {
    const Epochs& epochs = *item.leaf->epochs;
    u64 place;
    const u64 epoch = epochs.at.first_epoch + epochs.windows.divide(item.draw + item.leaf->draws, place);
    if (shuffle_) {
      const u64 key = Permutation::epoch_key(source_key_[item.leaf->source], epoch);
      place = epochs.permutation.forward(place, key);
    }
    return {item.leaf->source, epoch, place};
  }

  // The segment of a phase that starts at `start`; null where every source with weight is at its limit.
  std::unique_ptr<Segment> made(const Phase& phase, u64 start, const std::vector<u64>& base,
                                bool opens_phase) const {
    worked(64 * base.size());
    auto segment = std::make_unique<Segment>();
    segment->start = start;
    segment->end = NEVER;
    segment->opens_phase = opens_phase;
    segment->base = base;
    segment->leaf_of.assign(base.size(), -1);
    std::vector<u64> weights, budget;
    std::vector<double> exact_weights;
    for (std::size_t k = 0; k < base.size(); ++k) {
      const SourcePhase& source = phase.sources[k].at;
      if (!phase.weight(megatron_, k) || base[k] >= source.limit) continue;
      segment->leaf_of[k] = static_cast<i32>(segment->leaves.size());
      segment->leaves.push_back({&phase.sources[k], base[k] - source.first_draw, static_cast<i32>(k)});
      budget.push_back(source.limit == NEVER ? NEVER : source.limit - base[k]);
      if (megatron_) {
        exact_weights.push_back(phase.exact_weights[k]);
      } else {
        weights.push_back(phase.weights[k]);
      }
    }
    if (segment->leaves.empty()) return nullptr;
    if (megatron_) {
      restore_sum(phase, exact_weights);
      segment->greedy = std::make_unique<Greedy>(std::move(exact_weights), std::move(budget));
    } else {
      segment->tree = std::make_unique<SplitTree>(weights);
      for (std::size_t leaf = 0; leaf < budget.size(); ++leaf) {
        if (budget[leaf] == NEVER) continue;
        const u64 item = segment->tree->position(static_cast<i32>(leaf), budget[leaf] - 1);
        if (item < MAX_SAMPLE) segment->end = std::min(segment->end, start + item + 1);
      }
    }
    return segment;
  }

  // When sources have left, the others take up their weight in proportion: greedy needs the sum it had.
  static void restore_sum(const Phase& phase, std::vector<double>& active) {
    std::size_t drawn = 0;
    for (const double weight : phase.exact_weights) drawn += weight != 0.0;
    if (active.size() == drawn) return;
    const double whole = std::accumulate(phase.exact_weights.begin(), phase.exact_weights.end(), 0.0);
    const double rest = std::accumulate(active.begin(), active.end(), 0.0);
    for (double& weight : active) weight *= whole / rest;
  }

  static u64 end_of(const Segment& segment) {
    const u64 end = segment.greedy->end();
    return end == NEVER ? NEVER : segment.start + end;
  }

  // Opens segments until samples [0, i] are covered or the plan has ended.
  void cover(u64 i) {
    while (!ended_) {
      Segment& last = *segments_.back();
      if (megatron_ && last.end == NEVER && i >= last.start) {
        last.greedy->reach(i - last.start);
        last.end = end_of(last);
      }
      if (i < last.end) return;
      open_next();
    }
  }

  void open_next() {
    Segment& last = *segments_.back();
    std::unique_ptr<Segment> next = made(*phases_.back(), last.end, counts_in(last, last.end), false);
    if (!next) {
      ended_ = true;
      end_ = last.end;
    } else {
      segments_.push_back(std::move(next));
    }
  }

  void require_start(u64 i) const {
    if (phases_.empty()) throw std::out_of_range("the plan has no phase: add_phase(0, weights) first");
    if (i >= MAX_SAMPLE) throw std::out_of_range("sample " + std::to_string(i) + " is not below 2^62");
  }

  void require(u64 i) {
    require_start(i);
    cover(i);
    if (ended_ && i >= end_) {
      const std::string end = std::to_string(end_);
      throw std::out_of_range("sample " + std::to_string(i) + " is past the end of the plan: at sample " +
                              end +
                              " every source with weight has reached max_epochs; raise max_epochs or add a"
                              " phase that starts at or before sample " +
                              end);
    }
  }

  std::vector<u64> counts_before(u64 i) {
    if (i) require(i - 1);
    if (phases_.empty()) return std::vector<u64>(source_key_.size(), 0);
    return counts_in(segment_of(i), i);
  }

  std::vector<u64> counts_in(Segment& segment, u64 i) const {
    std::vector<u64> counts = segment.base;
    for (std::size_t leaf = 0; leaf < segment.leaves.size(); ++leaf) {
      const i32 l = static_cast<i32>(leaf);
      const u64 n = i - segment.start;
      counts[segment.leaves[leaf].source] +=
          megatron_ ? segment.greedy->count(l, n) : segment.tree->count(l, n);
    }
    return counts;
  }

  // The last open segment that starts at or before sample i.
  Segment& segment_of(u64 i) const {
    const auto after =
        std::upper_bound(segments_.begin(), segments_.end(), i,
                         [](u64 sample, const std::unique_ptr<Segment>& s) { return sample < s->start; });
    return **(after - 1);
  }

  // Megatron's order is replayed, so the questions are asked in ascending order whatever order they come in.
  template <class Sample, class Write>
  void locate_replayed(std::size_t size, Sample sample, Write write) {
    const u64 first = sample(0);
    bool in_sequence = true;
    for (std::size_t n = 1; n < size; ++n) in_sequence = in_sequence && sample(n) == first + n;
    if (in_sequence) {
      replay(first, size, write);
      return;
    }
    std::vector<std::size_t> order(size);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return sample(a) < sample(b); });
    for (std::size_t n = 0, next; n < size; n = next) {
      const u64 low = sample(order[n]);
      Draw draw;
      replay(low, 1, [&](std::size_t, Draw it) { draw = it; });
      for (next = n; next < size && sample(order[next]) == low; ++next) write(order[next], draw);
    }
  }

  // Samples [first, first + size).
  template <class Write>
  void replay(u64 first, std::size_t size, Write write) {
    pick_.resize(std::min(size, RUN));
    draw_.resize(pick_.size());
    for (std::size_t done = 0; done < size;) {
      const u64 i = first + done;
      require_start(i);
      const Segment& segment = segment_of(i);
      u64 steps = 0;
      if (i < segment.end) {
        steps = std::min<u64>({size - done, RUN, segment.end - i});
        steps = segment.greedy->locate(i - segment.start, steps, pick_.data(), draw_.data());
      }
      if (steps == 0) require(i);  // Opens the segment that holds it; the next turn asks there.
      in_blocks(
          steps, [&](std::size_t n) { return Item{&segment.leaves[pick_[n]], draw_[n]}; },
          [&](std::size_t n, const Draw& draw) { write(done + n, draw); });
      done += steps;
    }
  }

  bool megatron_;
  bool shuffle_;
  std::vector<u64> source_key_;
  std::vector<std::unique_ptr<Phase>> phases_;
  std::vector<std::unique_ptr<Segment>> segments_;
  bool ended_ = false;
  u64 end_ = NEVER;        // Where the plan ended, if it did.
  std::vector<i32> pick_;  // Room for replayed runs.
  std::vector<u64> draw_;
  std::mutex mutex_;
  std::atomic<std::thread::id> inside_{};  // Whose turn it is.
};

}  // namespace r1
