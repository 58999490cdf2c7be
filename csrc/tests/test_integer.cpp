#include "../integer.hpp"

#include "check.hpp"

using namespace r1;

int main() {
  const u64 divisors[] = {
      1, 2, 3, 7, 63, 64, 4095, 1000003, (u64{1} << 32) - 1, u64{1} << 32, u64{1} << 63, NEVER};
  const u64 dividends[] = {
      0, 1, 2, 62, 63, 64, 12345678901234567ull, (u64{1} << 63) - 1, u64{1} << 63, NEVER - 1, NEVER};
  for (const u64 divisor : divisors) {
    const Divider by(divisor);
    for (const u64 base : dividends) {
      for (u64 x = base < 3 ? 0 : base - 3; x != base + 3 && x >= base - 3; ++x) {
        u64 rest;
        CHECK(by.divide(x, rest) == x / divisor);
        CHECK(rest == x % divisor);
      }
      u64 rest;
      CHECK(by.divide(base / divisor * divisor, rest) == base / divisor);
      CHECK(rest == 0);
    }
  }
  for (u64 x = 0; x < 5000; ++x) {
    const u64 root = ceil_sqrt(x);
    CHECK(root * root >= x);
    CHECK(root == 0 || (root - 1) * (root - 1) < x);
  }
  CHECK(ceil_sqrt(NEVER) == u64{1} << 32);
  CHECK(saturate(u128{NEVER} + 1) == NEVER);
  return failures;
}
