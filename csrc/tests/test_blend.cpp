#include "../blend.hpp"

#include <cmath>

#include "../permute.hpp"
#include "check.hpp"

using namespace r1;

namespace {

void answers_agree(const std::vector<u64>& weights, u64 from, u64 samples) {
  const SplitTree tree(weights);
  const i32 leaves = static_cast<i32>(weights.size());
  u64 total = 0;
  for (const u64 weight : weights) total += weight;
  std::vector<u64> drawn(leaves);
  u64 sum = 0;
  for (i32 leaf = 0; leaf < leaves; ++leaf) sum += drawn[leaf] = tree.count(leaf, from);
  CHECK(sum == from);
  for (u64 i = from; i < from + samples; ++i) {
    u64 draw;
    const i32 leaf = tree.locate(i, draw);
    CHECK(leaf >= 0 && leaf < leaves);
    CHECK(draw == drawn[leaf]);
    CHECK(tree.position(leaf, draw) == i);
    CHECK(tree.count(leaf, i) == draw);
    ++drawn[leaf];
    CHECK(tree.count(leaf, i + 1) == draw + 1);
    for (i32 k = 0; k < leaves; ++k) {
      const long double share = static_cast<long double>(weights[k]) / static_cast<long double>(total);
      const long double off = static_cast<long double>(drawn[k]) - share * static_cast<long double>(i + 1);
      CHECK(std::fabs(off) <= static_cast<long double>(tree.bound(k)));
    }
  }
}

}  // namespace

int main() {
  answers_agree({1}, 0, 50);
  answers_agree({1, 1}, 0, 200);
  answers_agree({5, 3, 2}, 0, 2000);
  answers_agree({1, 1000000, 1}, 0, 3000);
  answers_agree({u64{1} << 62, 1, 3}, 0, 500);
  std::vector<u64> mixed;
  for (u64 k = 0; k < 14; ++k) mixed.push_back(1 + mix(k) % 100000);
  answers_agree(mixed, 0, 3000);
  answers_agree(mixed, (u64{1} << 40) - 1500, 3000);
  std::vector<u64> fibonacci = {1, 1};  // The deepest tree that 64 bits allow.
  while (fibonacci.size() < 90) fibonacci.push_back(fibonacci.back() + fibonacci[fibonacci.size() - 2]);
  answers_agree(fibonacci, 0, 300);
  answers_agree(fibonacci, (u64{1} << 40) - 100, 200);
  // A share of 2^-63: its second item lies beyond 64 bits, which saturates.
  const SplitTree rare({(u64{1} << 63) - 1, 1});
  CHECK(rare.position(1, 0) < NEVER);
  CHECK(rare.position(1, 5) == NEVER);
  return failures;
}
