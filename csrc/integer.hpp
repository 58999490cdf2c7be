// Unsigned integers of 64 and 128 bits, and division by a number known in advance.
//
// Everything that decides the order of the data is built on these: no floating point, so that the order
// is the same on every CPU and compiler.
#pragma once

#include <cstdint>

namespace r1 {

using i32 = std::int32_t;
using i64 = std::int64_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
__extension__ typedef unsigned __int128 u128;

// "Never": a sample or a draw that is not reached. Positions saturate here instead of wrapping.
constexpr u64 NEVER = ~u64{0};

// Samples, windows and epochs that callers name lie below: sums of two of them fit 63 bits.
constexpr u64 MAX_NUMBER = u64{1} << 62;

inline u64 high_product(u64 a, u64 b) { return static_cast<u64>((u128{a} * b) >> 64); }

inline u64 saturate(u128 x) { return x > u128{NEVER} ? NEVER : static_cast<u64>(x); }

// Quotient and remainder by a fixed divisor with one multiplication and one correction, for any 64-bit
// dividend: a hardware division costs more than the whole walk through the blend tree.
class Divider {
 public:
  Divider() = default;
  explicit Divider(u64 divisor)
      : divisor_(divisor), reciprocal_(divisor == 1 ? NEVER : static_cast<u64>((u128{1} << 64) / divisor)) {}

  u64 divide(u64 x, u64& remainder) const {
    // 2^64 / divisor - reciprocal <= 1, so the quotient is right or one too small.
    u64 quotient = high_product(x, reciprocal_);
    u64 rest = x - quotient * divisor_;
    const u64 once_more = rest >= divisor_;
    quotient += once_more;
    remainder = rest - (divisor_ & (0 - once_more));
    return quotient;
  }

  u64 divisor() const { return divisor_; }

 private:
  u64 divisor_ = 1;
  u64 reciprocal_ = NEVER;
};

// The smallest r with r * r >= x.
inline u64 ceil_sqrt(u64 x) {
  u64 low = 0, high = u64{1} << 32;
  while (low < high) {
    const u64 middle = low + (high - low) / 2;
    if (u128{middle} * middle >= x) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace r1
