#include "../keep.hpp"

#include "../permute.hpp"
#include "check.hpp"

using namespace r1;

namespace {

// Density in 1/256: from empty through sparse (hints far apart) to full.
void rank_and_select_agree(u64 windows, u64 density) {
  std::vector<u64> words((windows + 63) / 64, 0);
  std::vector<u64> kept;
  for (u64 w = 0; w < windows; ++w) {
    if ((mix(w * 1000003 + density) & 255) >= density) continue;
    words[w / 64] |= u64{1} << (w % 64);
    kept.push_back(w);
  }
  if (windows % 64) words.back() |= ~u64{0} << (windows % 64);  // Bits past the end are ignored.
  const Keep keep(windows, words);
  CHECK(keep.kept() == kept.size());
  for (u64 r = 0; r < kept.size(); ++r) {
    CHECK(keep.select(r) == kept[r]);
    CHECK(keep.rank(kept[r]) == r);
    CHECK(keep.test(kept[r]));
  }
  u64 rank = 0;
  for (u64 w = 0; w < windows; ++w) {
    CHECK(keep.rank(w) == rank);
    rank += keep.test(w);
  }
  CHECK(keep.rank(windows) == kept.size());
}

}  // namespace

int main() {
  for (const u64 density : {0, 1, 20, 128, 255, 256}) {
    for (const u64 windows : {1, 63, 64, 65, 1023, 1024, 1025, 70000})
      rank_and_select_agree(windows, density);
  }
  // A long gap between two runs of ones: hints skip many blocks.
  std::vector<u64> words(40000, 0);
  for (int w = 0; w < 100; ++w) words[w] = words[39999 - w] = NEVER;
  const Keep gap(40000 * 64, words);
  CHECK(gap.select(6399) == 6399);
  CHECK(gap.select(6400) == 39900 * 64);
  CHECK(gap.select(12799) == 40000 * 64 - 1);
  CHECK_THROWS(Keep(65, {1}), std::invalid_argument);
  CHECK_THROWS(Keep(NEVER, {}), std::invalid_argument);
  return failures;
}
