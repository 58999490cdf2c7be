#include "../greedy.hpp"

#include <cmath>

#include "../permute.hpp"
#include "check.hpp"

using namespace r1;

namespace {

// Stretches that begin with a wrong guess must not stand: with shares down to 1e-30 some do.
void only_true_stretches_stand() {
  constexpr u64 START = 1000, LENGTH = 8192;
  int whole = 0, part = 0;
  for (u64 trial = 0; trial < 10; ++trial) {
    const std::size_t sources = 2 + mix(trial) % 30;
    std::vector<double> weights;
    double sum = 0;
    for (std::size_t k = 0; k < sources; ++k) {
      const double uniform = static_cast<double>(mix(trial * 100 + k) % 10000 + 1) / 10000;
      weights.push_back(std::pow(uniform, trial % 2 ? 8.0 : 1.0));
      sum += weights.back();
    }
    for (double& weight : weights) weight /= sum;
    const i32 n = static_cast<i32>(sources);
    std::vector<double> plain(sources, 0.0);
    plain_steps(weights.data(), plain.data(), n, 0, START, nullptr, nullptr);
    std::vector<double> lanes = plain;
    std::vector<i32> pick(LANES * LENGTH), want(LANES * LENGTH);
    std::vector<u64> draw(LANES * LENGTH), want_draw(LANES * LENGTH);
    Lanes run;
    const int stand = run.run(weights.data(), lanes.data(), n, START, LENGTH, pick.data(), draw.data());
    const u64 steps = static_cast<u64>(stand) * LENGTH;
    plain_steps(weights.data(), plain.data(), n, START, steps, want.data(), want_draw.data());
    CHECK(lanes == plain);
    CHECK(std::equal(pick.begin(), pick.begin() + static_cast<std::ptrdiff_t>(steps), want.begin()));
    CHECK(std::equal(draw.begin(), draw.begin() + static_cast<std::ptrdiff_t>(steps), want_draw.begin()));
    ++(stand == LANES ? whole : part);
  }
  CHECK(whole > 4 && part > 0);
}

// Weights of one kind: any; with shares down to 1e-30; of few values, which tie; whole percents, which tie
// also across values; all but one next to nothing.
std::vector<double> weights_like(int kind, std::size_t sources) {
  std::vector<double> weights;
  double sum = 0;
  for (std::size_t k = 0; k < sources; ++k) {
    const u64 random = mix(k * 5 + static_cast<u64>(kind) + sources);
    const double uniform = static_cast<double>(random % 10000 + 1) / 10000;
    weights.push_back(kind == 0   ? uniform
                      : kind == 1 ? std::pow(uniform, 8.0)
                      : kind == 2 ? static_cast<double>(random % 3 + 1)
                      : kind == 3 ? static_cast<double>(random % 40 + 1)
                      : k == 7    ? 1.0
                                  : uniform * 1e-11);
    sum += weights.back();
  }
  for (double& weight : weights) weight /= sum;
  return weights;
}

// Calls of every length leave the same counts and write the same as the plain loop, from any sample on.
void steps_like_the_plain_rule(const std::vector<double>& weights, u64 from) {
  const i32 sources = static_cast<i32>(weights.size());
  std::vector<double> plain(weights.size());
  for (std::size_t k = 0; k < plain.size(); ++k) {
    plain[k] = std::floor(weights[k] * static_cast<double>(from));
  }
  std::vector<double> turning = plain;
  std::vector<OfLanes> lanes(weights.size());
  for (std::size_t k = 0; k < plain.size(); ++k) std::fill_n(lanes[k].lane, LANES, plain[k]);
  OfLanes x;
  std::fill_n(x.lane, LANES, static_cast<double>(from));
  Wheel wheel;
  for (const u64 steps : {1, 31, 32, 33, 1, 64, 700, 1300}) {
    std::vector<i32> want(steps), pick(steps), pick_lanes(LANES * steps);
    std::vector<u64> want_draw(steps), draw(steps), draw_lanes(LANES * steps), number(LANES * weights.size());
    plain_steps(weights.data(), plain.data(), sources, from, steps, want.data(), want_draw.data());
    wheel.run(weights.data(), turning.data(), sources, from, steps, pick.data(), draw.data());
    CHECK(turning == plain);
    CHECK(pick == want);
    CHECK(draw == want_draw);
    lane_steps_any(weights.data(), sources, lanes.data(), x, steps, pick_lanes.data(), draw_lanes.data(),
                   steps, number.data());
    for (int lane = 0; lane < LANES; ++lane) {
      for (std::size_t k = 0; k < plain.size(); ++k) CHECK(lanes[k].lane[lane] == plain[k]);
      const std::ptrdiff_t start = static_cast<std::ptrdiff_t>(steps) * lane;
      CHECK(std::equal(want.begin(), want.end(), pick_lanes.begin() + start));
      CHECK(std::equal(want_draw.begin(), want_draw.end(), draw_lanes.begin() + start));
    }
    from += steps;
  }
}

// Megatron-core's loop, word for word.
void megatron(const std::vector<double>& weights, std::vector<i32>& pick, std::vector<u64>& draw, u64 size) {
  std::vector<i64> current(weights.size(), 0);
  for (u64 i = 0; i < size; ++i) {
    const double x = std::max(static_cast<double>(i), 1.0);
    std::size_t best = 0;
    double largest = weights[0] * x - static_cast<double>(current[0]);
    for (std::size_t k = 1; k < weights.size(); ++k) {
      const double error = weights[k] * x - static_cast<double>(current[k]);
      if (error > largest) {
        largest = error;
        best = k;
      }
    }
    pick.push_back(static_cast<i32>(best));
    draw.push_back(static_cast<u64>(current[best]++));
  }
}

void equals_megatron(const std::vector<double>& weights, u64 size) {
  std::vector<i32> want;
  std::vector<u64> want_draw;
  megatron(weights, want, want_draw, size);
  const i32 sources = static_cast<i32>(weights.size());
  Greedy greedy(weights, std::vector<u64>(weights.size(), NEVER));
  std::vector<i32> pick(size);
  std::vector<u64> draw(size);
  CHECK(greedy.locate(0, size, pick.data(), draw.data()) == size);
  CHECK(greedy.end() == NEVER);
  // One megabyte per 1e9 samples, and the start.
  CHECK(static_cast<double>(greedy.bytes()) <= static_cast<double>(size) * 1e-3 + 8.0 * (sources + 1));
  CHECK(pick == want);
  CHECK(draw == want_draw);
  for (int n = 0; n < 12; ++n) {  // At random, back and forth.
    const u64 i = mix(static_cast<u64>(n)) % size;
    i32 one;
    u64 number;
    greedy.locate(i, 1, &one, &number);
    CHECK(one == want[i]);
    CHECK(number == want_draw[i]);
    CHECK(greedy.position(one, number) == i);
    CHECK(greedy.count(one, i) == number);
  }
}

void ends_at_the_first_budget(const std::vector<double>& weights, const std::vector<u64>& budget, u64 size) {
  std::vector<i32> want;
  std::vector<u64> want_draw;
  megatron(weights, want, want_draw, size);
  u64 end = NEVER;
  for (u64 i = 0; i < size && end == NEVER; ++i) {
    if (want_draw[i] + 1 == budget[want[i]]) end = i + 1;
  }
  Greedy greedy(weights, budget);
  std::vector<i32> pick(size);
  std::vector<u64> draw(size);
  CHECK(greedy.locate(0, size, pick.data(), draw.data()) == end);
  CHECK(greedy.end() == end);
  CHECK(std::equal(pick.begin(), pick.begin() + static_cast<std::ptrdiff_t>(end), want.begin()));
  CHECK(greedy.position(0, budget[0]) == NEVER);
  Greedy other(weights, budget);
  other.reach(end - 1);
  other.reach(end + 5000);
  CHECK(other.end() == end);
}

}  // namespace

int main() {
  only_true_stretches_stand();
  for (int kind = 0; kind < 5; ++kind) {
    for (const std::size_t sources : {17, 64, 203}) {
      for (const u64 from : {u64{1}, u64{123457}, u64{1} << 45}) {
        steps_like_the_plain_rule(weights_like(kind, sources), from);
      }
    }
  }
  equals_megatron({1.0}, 500);
  equals_megatron({0.5, 0.5}, 10000);
  equals_megatron({0.25, 0.25, 0.25, 0.25}, 10000);
  equals_megatron({0.3, 0.3, 0.2, 0.1, 0.1}, 20000);
  equals_megatron({30, 70}, 10000);
  equals_megatron({0.2, 0.1}, 10000);
  equals_megatron({1e-9, 0.4, 0.6 - 1e-9}, 30000);
  for (const std::size_t sources : {3, 17, 40, 130, 700}) {
    std::vector<double> weights;
    double sum = 0;
    for (std::size_t k = 0; k < sources; ++k) {
      weights.push_back(1.0 + static_cast<double>(mix(k + sources) % 1000));
      sum += weights.back();
    }
    for (double& weight : weights) weight /= sum;
    equals_megatron(weights, sources > 100 ? 9000 : sources > 30 ? 20000 : 140000);
  }
  // Equal weights take turns, also where they tie with others.
  equals_megatron(std::vector<double>(70, 1.0 / 70), 20000);
  equals_megatron(std::vector<double>(128, 1.0 / 128), 20000);
  std::vector<double> groups;
  for (int k = 0; k < 90; ++k) groups.push_back((k % 3 + 1) / 180.0);
  equals_megatron(groups, 30000);
  ends_at_the_first_budget(groups, std::vector<u64>(90, 60), 9000);
  ends_at_the_first_budget({0.5, 0.3, 0.2}, {NEVER, NEVER, 3000}, 40000);
  ends_at_the_first_budget({0.5, 0.3, 0.2}, {20000, 7000, 4000}, 70000);
  ends_at_the_first_budget({0.5, 0.5}, {1, NEVER}, 10);
  ends_at_the_first_budget({0.7, 0.2, 0.1}, {1025, 300, 2000}, 9000);
  // A source that the rule never draws is not waited for.
  Greedy starved({30, 70}, {NEVER, NEVER});
  CHECK(starved.position(0, 5) == NEVER);
  return failures;
}
