#include "../permute.hpp"

#include <cmath>
#include <vector>

#include "check.hpp"

using namespace r1;

namespace {

void is_a_bijection(u64 size, u64 key) {
  const Permutation permutation(size);
  std::vector<bool> seen(size, false);
  for (u64 x = 0; x < size; ++x) {
    const u64 y = permutation.forward(x, key);
    CHECK(y < size && !seen[y]);
    seen[y] = true;
    CHECK(permutation.inverse(y, key) == x);
  }
}

void inverts_at_large_sizes() {
  for (const u64 size : {(u64{1} << 40) - 1, u64{1} << 40, (u64{1} << 40) + 12345, (u64{1} << 62) - 57}) {
    const Permutation permutation(size);
    u64 x = 17;
    for (int n = 0; n < 2000; ++n) {
      x = mix(x) % size;
      const u64 y = permutation.forward(x, 99);
      CHECK(y < size);
      CHECK(permutation.inverse(y, 99) == x);
    }
  }
}

// Neighbours at a lag land as far apart as independent draws do: the cells of the pair
// (image of x, image of x + lag) on a 16 x 16 grid follow chi-square with 255 degrees of freedom.
void lags_are_independent(u64 size) {
  constexpr u64 GRID = 16;
  for (const u64 lag : {1, 2, 16, 256}) {
    double worst = 0;
    for (u64 epoch = 0; epoch < 8; ++epoch) {
      const Permutation permutation(size);
      const u64 key = Permutation::epoch_key(1234, epoch);
      std::vector<double> cell(GRID * GRID, 0.0);
      const u64 pairs = 20000;
      for (u64 x = 0; x < pairs; ++x) {
        const u64 a = permutation.forward(x % (size - lag), key);
        const u64 b = permutation.forward(x % (size - lag) + lag, key);
        cell[a * GRID / size * GRID + b * GRID / size] += 1;
      }
      const double expected = static_cast<double>(pairs) / (GRID * GRID);
      double chi = 0;
      for (const double n : cell) chi += (n - expected) * (n - expected) / expected;
      worst = std::max(worst, (chi - 255) / std::sqrt(2 * 255.0));
    }
    CHECK(worst < 4.5);
  }
}

// Where the first window lands over many epochs is uniform, also for a source of a handful of windows.
void epochs_are_independent(u64 size) {
  const Permutation permutation(size);
  std::vector<double> cell(size * size, 0.0);
  constexpr u64 EPOCHS = 40000;
  for (u64 epoch = 0; epoch < EPOCHS; ++epoch) {
    const u64 first = permutation.forward(0, Permutation::epoch_key(7, epoch));
    const u64 next = permutation.forward(0, Permutation::epoch_key(7, epoch + 1));
    cell[first * size + next] += 1;
  }
  const double expected = static_cast<double>(EPOCHS) / static_cast<double>(size * size);
  double chi = 0;
  for (const double n : cell) chi += (n - expected) * (n - expected) / expected;
  const double freedom = static_cast<double>(size * size - 1);
  CHECK((chi - freedom) / std::sqrt(2 * freedom) < 4.5);
}

}  // namespace

int main() {
  for (u64 size = 1; size < 70; ++size) is_a_bijection(size, size * 31);
  is_a_bijection(4096, 5);
  is_a_bijection(10007, 6);
  inverts_at_large_sizes();
  lags_are_independent(100003);
  lags_are_independent((u64{1} << 40) + 7);
  epochs_are_independent(5);
  epochs_are_independent(12);
  return failures;
}
