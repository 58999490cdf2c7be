// Which windows of a source are kept (Eq. 6): a bitmap with rank and select.
//
// A draw from a masked source is select(r), r below the number kept, so a dropped window costs nothing and
// the rest of the sampler never knows that it existed. State: one bit a window, 14 % for the ranks
// beside the bits, and one hint for 512 kept windows.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
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
  // Throws std::invalid_argument for another number of words, and for 2^62 windows or more.
  Keep(u64 windows, std::vector<u64> words) : windows_(windows) {
    check(windows);
    if (words.size() != (windows + 63) / 64) throw std::invalid_argument("bitmap has the wrong size");
    if (windows % 64) words.back() &= (u64{1} << (windows % 64)) - 1;
    lines_.resize(words.size() / WORDS + 1);
    for (std::size_t line = 0; line < lines_.size(); ++line) {
      lines_[line].rank = kept_;
      for (std::size_t word = 0; word < WORDS; ++word) {
        const std::size_t at = line * WORDS + word;
        lines_[line].words[word] = at < words.size() ? words[at] : 0;
        kept_ += bits_set(lines_[line].words[word]);
      }
      while (hint_.size() * SAMPLE < kept_) hint_.push_back(line);
    }
    hint_.push_back(lines_.size() - 1);
  }

  static void check(u64 windows) {
    if (windows < MAX_NUMBER) return;
    throw std::invalid_argument("a mask of " + std::to_string(windows) + " windows: use fewer than 2^62");
  }

  u64 windows() const { return windows_; }
  u64 kept() const { return kept_; }
  bool test(u64 window) const { return word(window) >> (window % 64) & 1; }

  // Kept windows below `window`, which may be windows().
  u64 rank(u64 window) const {
    const Line& line = lines_[window / 64 / WORDS];
    u64 kept = line.rank;
    for (u64 w = 0; w < window / 64 % WORDS; ++w) kept += bits_set(line.words[w]);
    if (window % 64) kept += bits_set(word(window) & ((u64{1} << (window % 64)) - 1));
    return kept;
  }

  // The kept window with `order` kept windows below it; order below kept().
  u64 select(u64 order) const {
    u64 low = hint_[order / SAMPLE], high = hint_[order / SAMPLE + 1] + 1;
    while (high - low > 1) {
      const u64 middle = low + (high - low) / 2;
      if (lines_[middle].rank <= order) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const Line& line = lines_[low];
    u64 left = order - line.rank, at = 0;
    for (u64 here; left >= (here = bits_set(line.words[at])); ++at) left -= here;
    return (low * WORDS + at) * 64 + select_in_word(line.words[at], left);
  }

  // Bring what select(order) reads first, and then, into the cache.
  void expect_hint(u64 order) const { __builtin_prefetch(&hint_[order / SAMPLE]); }
  void expect_lines(u64 order) const {
    const u64 low = hint_[order / SAMPLE], high = hint_[order / SAMPLE + 1];
    for (u64 line = low; line <= high && line < low + 3; ++line) __builtin_prefetch(&lines_[line]);
  }

  std::size_t bytes() const { return lines_.size() * sizeof(Line) + hint_.size() * sizeof(u64); }

 private:
  static constexpr u64 WORDS = 7;
  static constexpr u64 SAMPLE = 512;

  // A cache line: kept windows before it, and which of its 448 are kept.
  struct alignas(64) Line {
    u64 rank;
    u64 words[WORDS];
  };

  u64 word(u64 window) const { return lines_[window / 64 / WORDS].words[window / 64 % WORDS]; }

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
    return base + bits_set((word & (0 - word)) - 1);
  }

  u64 windows_;
  u64 kept_ = 0;
  std::vector<Line> lines_;
  std::vector<u64> hint_;  // The line that holds kept window number SAMPLE * n; the last line at the end.
};

}  // namespace r1
