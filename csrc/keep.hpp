// Which windows of a source are kept (Eq. 6): a bitmap with rank and select.
//
// A draw from a masked source is select(r), r below the number kept, so a dropped window costs nothing and
// the rest of the sampler never knows that it existed. State: one bit a window plus 7 % for the directory.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <utility>
#include <vector>

#include "integer.hpp"

namespace r1 {

// Portable: without a CPU flag the compiler's builtin is a call into a table.
inline u32 bits_set(u64 x) {
  x -= (x >> 1) & 0x5555555555555555ull;
  x = (x & 0x3333333333333333ull) + ((x >> 2) & 0x3333333333333333ull);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0full;
  return static_cast<u32>((x * 0x0101010101010101ull) >> 56);
}

class Keep {
 public:
  // `words`: bit w % 64 of word w / 64 says whether window w is kept; bits from `windows` on are ignored.
  Keep(u64 windows, std::vector<u64> words) : windows_(windows), words_(std::move(words)) {
    if (words_.size() != (windows + 63) / 64) throw std::invalid_argument("bitmap has the wrong size");
    if (windows % 64) words_.back() &= (u64{1} << (windows % 64)) - 1;
    words_.resize((words_.size() + BLOCK_WORDS - 1) / BLOCK_WORDS * BLOCK_WORDS);
    u64 kept = 0;
    for (std::size_t word = 0; word < words_.size(); ++word) {
      if (word % BLOCK_WORDS == 0) rank_.push_back(kept);
      const u64 before = kept;
      kept += bits_set(words_[word]);
      // The block that holds the kept window number SAMPLE * hint.
      while (hint_.size() * SAMPLE < kept && hint_.size() * SAMPLE >= before) {
        hint_.push_back(word / BLOCK_WORDS);
      }
    }
    rank_.push_back(kept);
    kept_ = kept;
  }

  u64 windows() const { return windows_; }
  u64 kept() const { return kept_; }
  bool test(u64 window) const { return words_[window / 64] >> (window % 64) & 1; }

  // Kept windows below `window` (at most windows()).
  u64 rank(u64 window) const {
    const u64 word = window / 64;
    u64 kept = rank_[word / BLOCK_WORDS];
    for (u64 w = word / BLOCK_WORDS * BLOCK_WORDS; w < word; ++w) kept += bits_set(words_[w]);
    if (window % 64) kept += bits_set(words_[word] & ((u64{1} << (window % 64)) - 1));
    return kept;
  }

  // The kept window with `order` kept windows below it; order below kept().
  u64 select(u64 order) const {
    const u64 sample = order / SAMPLE;
    u64 low = hint_[sample];
    u64 high = sample + 1 < hint_.size() ? hint_[sample + 1] + 1 : rank_.size() - 1;
    while (high - low > 1) {
      const u64 middle = low + (high - low) / 2;
      if (rank_[middle] <= order) {
        low = middle;
      } else {
        high = middle;
      }
    }
    u64 left = order - rank_[low];
    u64 word = low * BLOCK_WORDS;
    for (u64 here; left >= (here = bits_set(words_[word])); ++word) left -= here;
    return word * 64 + select_in_word(words_[word], left);
  }

  std::size_t bytes() const { return (words_.size() + rank_.size() + hint_.size()) * sizeof(u64); }

 private:
  static constexpr u64 BLOCK_WORDS = 16;
  static constexpr u64 SAMPLE = 4096;

  static u64 select_in_word(u64 word, u64 order) {
    u64 base = 0;
    for (u32 width = 32; width >= 8; width /= 2) {
      const u64 below = bits_set(word & ((u64{1} << width) - 1));
      if (order >= below) {
        order -= below;
        word >>= width;
        base += width;
      }
    }
    for (; order; --order) word &= word - 1;
    u64 low = word & (0 - word), at = 0;
    while (low >>= 1) ++at;
    return base + at;
  }

  u64 windows_;
  u64 kept_ = 0;
  std::vector<u64> words_;
  std::vector<u64> rank_;  // Kept windows before each block, and the total at the end.
  std::vector<u64> hint_;
};

}  // namespace r1
