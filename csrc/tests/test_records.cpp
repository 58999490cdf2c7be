#include "../records.hpp"

#include <cmath>

#include "../permute.hpp"
#include "check.hpp"

using namespace r1;

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Uniform in [0, 1).
double uniform(u64 n) { return static_cast<double>(mix(n * 0x9e3779b97f4a7c15ull + 1) >> 11) * 0x1p-53; }

// Some logits, spread as those of a model are.
std::vector<float> logits(u64 size, u64 seed, double spread) {
  std::vector<float> made(size);
  for (u64 v = 0; v < size; ++v) made[v] = static_cast<float>(-spread * std::log(uniform(seed * size + v) + 1e-9));
  return made;
}

struct Drawn {
  std::vector<i32> id;
  float entropy;
};

template <class Logit>
Drawn drawn(const std::vector<Logit>& logit, float inverse, double u, u64 draws) {
  Drawn made{std::vector<i32>(draws, -7), -7};
  draw_rows(logit.data(), 1, logit.size(), inverse, &u, draws, made.id.data(), &made.entropy);
  return made;
}

// Every point lies in the stretch of its id, but for what float32 rounds away.
void check_row(const std::vector<float>& logit, double inverse, double u, u64 draws) {
  const Drawn got = drawn(logit, static_cast<float>(inverse), u, draws);
  double largest = -INFINITY, total = 0, energy = 0;
  for (const float z : logit) largest = std::max(largest, double{z});
  std::vector<double> end;
  for (const float z : logit) {
    const double x = (double{z} - largest) * inverse, mass = std::exp(x);
    total += mass;
    if (mass > 0) energy += mass * x;
    end.push_back(total);
  }
  for (u64 j = 0; j < draws; ++j) {
    const double point = (u + static_cast<double>(j)) / static_cast<double>(draws);
    const i32 id = got.id[j];
    CHECK(id >= 0 && static_cast<u64>(id) < logit.size());
    CHECK(point < end[id] / total + 1e-6);
    CHECK(id == 0 || point > end[id - 1] / total - 1e-6);
    CHECK(j == 0 || got.id[j - 1] <= id);
    CHECK(logit[id] > -INFINITE);
  }
  CHECK(std::abs(double{got.entropy} - (std::log(total) - energy / total)) < 1e-5);
  // The same bits, whatever vectors this CPU has.
  std::vector<loops::BlockSums> block((logit.size() + loops::DRAWN_BLOCK - 1) / loops::DRAWN_BLOCK);
  std::vector<i32> plain(draws);
  const float entropy = loops::draw_row_any(logit.data(), logit.size(), static_cast<float>(inverse), u, draws,
                                            plain.data(), block.data());
  CHECK(plain == got.id && entropy == got.entropy);
}

}  // namespace

int main() {
  for (const u64 size : {1, 2, 15, 16, 17, 127, 128, 129, 1000, 5000}) {
    for (const u64 draws : {1, 2, 50, 256}) {
      for (const double u : {0.0, 0.25, 1 - 0x1p-53}) {
        check_row(logits(size, size + draws, 1), 1.0, u, draws);
        check_row(logits(size, size + draws, 20), 0.4, u, draws);
      }
    }
  }
  // All mass on one id, which may be the first, the last, or the last of a block.
  for (const u64 id : {0, 127, 128, 299}) {
    std::vector<float> one(300, -INFINITE);
    one[id] = 3;
    for (const double u : {0.0, 1 - 0x1p-53}) {
      const Drawn got = drawn(one, 1, u, 50);
      CHECK(got.id == std::vector<i32>(50, static_cast<i32>(id)));
      CHECK(got.entropy == 0);
    }
  }
  // bfloat16 is the upper half of float32.
  std::vector<float> whole = logits(1000, 5, 2);
  std::vector<std::uint16_t> half(whole.size());
  for (u64 v = 0; v < whole.size(); ++v) {
    u32 bits;
    std::memcpy(&bits, &whole[v], sizeof bits);
    half[v] = static_cast<std::uint16_t>(bits >> 16);
    bits &= 0xffff0000u;
    std::memcpy(&whole[v], &bits, sizeof bits);
  }
  const Drawn one = drawn(whole, 1, 0.5, 50), two = drawn(half, 1, 0.5, 50);
  CHECK(one.id == two.id && one.entropy == two.entropy);
  // What is no distribution says so, and its ids lie in the vocabulary all the same.
  for (const float bad : {NAN, INFINITE}) {
    for (const u64 at : {0, 130, 299}) {
      std::vector<float> row = logits(300, 1, 1);
      row[at] = bad;
      const Drawn got = drawn(row, 1, 0.5, 50);
      CHECK(std::isnan(got.entropy));
      for (const i32 id : got.id) CHECK(id >= 0 && id < 300);
    }
  }
  const Drawn none = drawn(std::vector<float>(300, -INFINITE), 1, 0.5, 50);
  CHECK(std::isnan(none.entropy));
  for (const i32 id : none.id) CHECK(id >= 0 && id < 300);
  // Uniforms and temperatures that are none.
  for (const double u : {-1.0, 5.0, double{NAN}, double{INFINITE}}) {
    for (const float inverse : {1.0f, 0.0f, -1.0f, NAN, INFINITE}) {
      for (const i32 id : drawn(logits(300, 1, 1), inverse, u, 50).id) CHECK(id >= 0 && id < 300);
    }
  }
  return failures;
}
