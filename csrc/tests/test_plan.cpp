#include "../plan.hpp"

#include <cmath>
#include <cstdlib>
#include <new>
#include <set>
#include <thread>

#include "check.hpp"

using namespace r1;

// Memory runs out at this allocation from now on, and is there again after it.
thread_local long fails_in = -1;

void* operator new(std::size_t bytes) {
  if (fails_in >= 0 && fails_in-- == 0) throw std::bad_alloc();
  if (void* const memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return fails_in >= 0 && fails_in-- == 0 ? nullptr : std::malloc(bytes);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

SourcePhase fresh(u64 windows, u64 limit = NEVER) { return {windows, limit, 0, 0, nullptr}; }

void draws_each_window_once_an_epoch(bool megatron) {
  Plan plan(megatron, true, {11, 22, 33});
  plan.add_phase(0, {5, 3, 2}, {0.5, 0.3, 0.2}, {fresh(40), fresh(7), fresh(50)});
  std::vector<std::set<u64>> seen(3);
  std::vector<u64> epoch(3, 0), drawn(3, 0);
  const u64 windows[] = {40, 7, 50};
  for (u64 i = 0; i < 700; ++i) {
    const Draw draw = plan.locate(i);
    const i32 k = draw.source;
    CHECK(draw.epoch == epoch[k]);
    CHECK(draw.window < windows[k]);
    CHECK(seen[k].insert(draw.window).second);
    CHECK(plan.count(k, i) == drawn[k]);
    CHECK(plan.position(k, drawn[k]) == i);
    ++drawn[k];
    if (seen[k].size() == windows[k]) {
      seen[k].clear();
      ++epoch[k];
    }
  }
}

void caps_hold_to_the_sample(bool megatron) {
  Plan plan(megatron, false, {1, 2, 3});
  plan.add_phase(0, {5, 3, 2}, {0.5, 0.3, 0.2}, {fresh(10, 25), fresh(10, 30), fresh(10, 60)});
  std::vector<u64> drawn(3, 0);
  for (u64 i = 0; i < 25 + 30 + 60; ++i) ++drawn[plan.locate(i).source];
  CHECK((drawn == std::vector<u64>{25, 30, 60}));
  CHECK((plan.counts(115) == drawn));
  CHECK(plan.segment_starts().size() == 3);
  CHECK_THROWS(plan.locate(115), std::out_of_range);
  CHECK_THROWS(plan.counts(116), std::out_of_range);
  CHECK(plan.position(2, 59) == 114);
  CHECK(plan.position(2, 60) == NEVER);
  // The plan goes on where it ended.
  plan.add_phase(115, {0, 1, 0}, {0.0, 1.0, 0.0}, {fresh(10), fresh(10), fresh(10)});
  const Draw draw = plan.locate(115);
  CHECK(draw.source == 1 && draw.epoch == 3 && draw.window == 0);
  CHECK(plan.position(1, 30) == 115);
}

void threads_see_one_order() {
  Plan plan(true, true, {4, 5});
  plan.add_phase(0, {1, 2}, {0.3, 0.7}, {fresh(1000), fresh(5000)});
  std::vector<Draw> got(60000);
  std::vector<std::thread> threads;
  for (u64 t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      plan.locate_each(
          15000, [t](std::size_t n) { return n * 4 + t; },
          [&got, t](std::size_t n, Draw draw) { got[n * 4 + t] = draw; });
    });
  }
  for (std::thread& thread : threads) thread.join();
  Plan again(true, true, {4, 5});
  again.add_phase(0, {1, 2}, {0.3, 0.7}, {fresh(1000), fresh(5000)});
  for (u64 i = 0; i < got.size(); i += 97) {
    const Draw draw = again.locate(i);
    CHECK(draw.source == got[i].source && draw.window == got[i].window && draw.epoch == got[i].epoch);
  }
}

// A plan whose n-th allocation fails answers afterwards as one that had all memory.
void wants_of_memory_leave_no_trace(bool megatron, std::size_t sources) {
  const std::vector<u64> weights(sources, 1), keys(sources, 7);
  const std::vector<double> exact(sources, 1.0 / static_cast<double>(sources));
  const auto phase = [&](Plan& plan, u64 start, u64 limit) {
    std::vector<SourcePhase> phases(sources, fresh(50));
    phases[0].limit = limit;
    plan.add_phase(start, weights, exact, phases);
  };
  // More samples than a checkpoint of the counts is apart.
  const u64 last = megatron ? 8100 * (sources + 1) : 3000;
  const auto ask = [&](Plan& plan) {
    std::vector<u64> answers = plan.counts(last);
    const Draw draw = plan.locate(last + 5);
    answers.insert(answers.end(), {plan.position(1, last / sources - 9), draw.window, draw.epoch});
    return answers;
  };
  Plan whole(megatron, true, keys);
  phase(whole, 0, 20);
  phase(whole, 500, NEVER);
  const std::vector<u64> want = ask(whole);
  int failed = 0;
  bool ran_out = true;
  for (long n = 0; ran_out && n < 40; n += 1 + n / 12) {
    Plan plan(megatron, true, keys);
    phase(plan, 0, 20);
    bool added = false;
    fails_in = n;
    try {
      phase(plan, 500, NEVER);
      added = true;
      ask(plan);
    } catch (const std::bad_alloc&) {
      ++failed;
    }
    ran_out = fails_in < 0;
    fails_in = -1;
    if (!added) phase(plan, 500, NEVER);
    CHECK(ask(plan) == want);
  }
  CHECK(failed > 8);
}

void refuses_what_no_plan_can_have(bool megatron) {
  Plan plan(megatron, true, {1, 2});
  const auto add = [&](u64 start, const SourcePhase& first, double exact = 0.5, u64 weight = 1) {
    plan.add_phase(start, {weight, 1}, {exact, 0.5}, {first, fresh(9)});
  };
  const auto empty = std::make_shared<const Keep>(20, std::vector<u64>{0});
  for (int turn = 0; turn < 2; ++turn) {
    const u64 start = turn ? 30 : 0;
    CHECK_THROWS(add(start, {10, NEVER, 0, 0, empty}), std::invalid_argument);
    CHECK_THROWS(add(start, fresh(0)), std::invalid_argument);
    CHECK_THROWS(add(start, fresh(MAX_NUMBER)), std::invalid_argument);
    CHECK_THROWS(add(start, {10, NEVER, 100, 0, nullptr}), std::invalid_argument);
    CHECK_THROWS(add(start, {10, NEVER, 0, NEVER, nullptr}), std::invalid_argument);
    CHECK_THROWS(add(start, fresh(9), 0.5, NEVER), std::invalid_argument);
    CHECK_THROWS(add(start, fresh(9), NAN), std::invalid_argument);
    CHECK_THROWS(add(start, fresh(9), -0.5), std::invalid_argument);
    CHECK_THROWS(add(turn ? 0 : 5, fresh(9)), std::invalid_argument);
    CHECK_THROWS(plan.add_phase(start, {1, 1}, {1}, {fresh(9), fresh(9)}), std::invalid_argument);
    CHECK_THROWS(plan.add_phase(start, {0, 0}, {0, 0}, {fresh(9), fresh(9)}), std::invalid_argument);
    CHECK_THROWS(plan.count(2, 0), std::out_of_range);
    CHECK_THROWS(plan.position(NEVER, 0), std::out_of_range);
    // Nothing of them stays.
    CHECK(plan.segment_starts().size() == static_cast<std::size_t>(turn));
    if (turn == 0) add(0, fresh(9));
  }
  CHECK(plan.position(0, NEVER) == NEVER);
}

}  // namespace

int main() {
  for (const bool megatron : {false, true}) {
    draws_each_window_once_an_epoch(megatron);
    caps_hold_to_the_sample(megatron);
    refuses_what_no_plan_can_have(megatron);
    wants_of_memory_leave_no_trace(megatron, 20);
  }
  threads_see_one_order();
  Plan empty(false, true, {1});
  CHECK_THROWS(empty.locate(0), std::out_of_range);
  CHECK(empty.count(0, 0) == 0);
  CHECK(empty.position(0, 0) == NEVER);
  return failures;
}
