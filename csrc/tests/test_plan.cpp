#include "../plan.hpp"

#include <set>
#include <thread>

#include "check.hpp"

using namespace r1;

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

}  // namespace

int main() {
  for (const bool megatron : {false, true}) {
    draws_each_window_once_an_epoch(megatron);
    caps_hold_to_the_sample(megatron);
  }
  threads_see_one_order();
  Plan empty(false, true, {1});
  CHECK_THROWS(empty.locate(0), std::out_of_range);
  CHECK(empty.count(0, 0) == 0);
  CHECK(empty.position(0, 0) == NEVER);
  return failures;
}
