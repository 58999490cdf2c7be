#include "../divergence.hpp"

#include <cmath>

#include "../permute.hpp"
#include "check.hpp"

using namespace r1;
using namespace r1::divergence;

namespace {

// Bits of the nearest bf16, as this machine's own rounding of a double gives it.
template <class Logit>
Logit narrowed(double x);
template <>
float narrowed<float>(double x) {
  return static_cast<float>(x);
}
template <>
std::uint16_t narrowed<std::uint16_t>(double x) {
  if (x == 0) return 0;
  const int exponent = std::max(std::ilogb(x), -126);
  const double whole = std::nearbyint(std::ldexp(x, 7 - exponent));
  const float near = static_cast<float>(std::ldexp(whole, exponent - 7));
  std::uint32_t bits;
  std::memcpy(&bits, &near, sizeof(bits));
  return static_cast<std::uint16_t>(bits >> 16);
}

double uniform(u64 n) { return static_cast<double>(mix(n) >> 11) / 9007199254740992.0; }

// Calls `check` after each form of the loops that this CPU can run has done the task.
template <class Work, class Check>
void each_form(const Work& task, const Check& check) {
  run_plain(task, 0, task.rows);
  check();
#ifdef R1_X86
  if (vector_width() < 4) return;
  run_avx2(task, 0, task.rows);
  check();
  if (vector_width() < 8) return;
  run_avx512(task, 0, task.rows);
  check();
#endif
}

bool near(double got, double want, double bound) { return std::abs(got - want) <= bound; }

// Rows of random logits in wider rows, whose rest must stay as it is, against sums of doubles in order.
template <class Student, class Teacher>
void rows_agree(u64 tokens, float inverse, bool teacher, bool one, u64 threads) {
  const u64 rows = 5, wide = tokens + 3;
  std::vector<Student> s(rows * wide);
  std::vector<Teacher> t(rows * wide);
  for (u64 n = 0; n < rows * wide; ++n) {
    s[n] = narrowed<Student>(20 * uniform(n + tokens) - 5);
    t[n] = narrowed<Teacher>(30 * uniform(n + 7919 * tokens) + 40);
  }
  std::vector<float> out(NUMBERS * rows, -1.0f), a(rows), b(rows), c(rows);
  const Table<const Student> of_s{s.data(), wide};
  const Table<const Teacher> of_t{teacher ? t.data() : nullptr, wide};
  const Statistics<Student, Teacher> numbers{of_s, of_t, rows, tokens, inverse, out.data()};
  run_threads(numbers, threads);
  const std::vector<float> first = out;
  each_form(numbers, [&] { CHECK(out == first); });
  for (u64 n = 0; n < rows; ++n) {
    const Student* x = &s[n * wide];
    const Teacher* y = &t[n * wide];
    double m_s = -1e9, m_t = -1e9, picked = 0, sum_s = 0, sum_t = 0, sum_1 = 0, entropy = 0, difference = 0;
    for (u64 v = 0; v < tokens; ++v) {
      m_s = std::max<double>(m_s, widened(x[v]));
      if (widened(y[v]) > m_t) m_t = widened(y[v]), picked = widened(x[v]);
    }
    for (u64 v = 0; v < tokens; ++v) {
      const double own = widened(x[v]) - m_s, its = widened(y[v]) - m_t, e = std::exp(its * inverse);
      sum_s += std::exp(own * inverse);
      sum_1 += std::exp(own);
      sum_t += e;
      entropy += e * its * inverse;
      difference += e * (its - own) * inverse;
    }
    const double want[] = {m_s, sum_s, m_t, sum_t, entropy, difference, sum_1, picked};
    for (u64 k = 0; k < NUMBERS; ++k) {
      const float got = out[k * rows + n];
      const bool of_teacher = k == MAX_T || k == SUM_T || k == ENTROPY || k == DIFFERENCE || k == PICKED;
      if (of_teacher && !teacher) {
        CHECK(got == -1.0f);
      } else {
        // Terms of a difference have both signs: its error is that of the largest.
        CHECK(near(got, want[k], 5e-7 * (k == DIFFERENCE ? 10 * sum_t : std::abs(want[k]))));
      }
    }
    a[n] = 0.7f / out[SUM_S * rows + n], b[n] = 0.7f / static_cast<float>(sum_t), c[n] = one ? 0.2f : 0.0f;
  }
  const std::vector<Student> before = s;
  const Gradient<Student, Teacher> slope{{s.data(), wide}, of_t,     rows,     tokens,
                                         inverse,          &out[MAX_S * rows], &out[MAX_T * rows], a.data(),
                                         b.data(),         one ? c.data() : nullptr};
  run_threads(slope, threads);
  const std::vector<Student> after = s;
  s = before;
  each_form(slope, [&] {
    CHECK(s == after);
    s = before;
  });
  s = after;
  // bf16 rounds once, by half of 2^-7 of its power of two at most.
  const double rounding = sizeof(Student) == 2 ? 0.00391 : 0.0;
  for (u64 n = 0; n < rows * wide; ++n) {
    const u64 row = n / wide;
    if (n % wide >= tokens) {
      CHECK(s[n] == before[n]);
      continue;
    }
    const double own = widened(before[n]) - double{out[MAX_S * rows + row]};
    const double its = teacher ? widened(t[n]) - double{out[MAX_T * rows + row]} : 0;
    const double p = a[row] * std::exp(own * inverse), q = teacher ? b[row] * std::exp(its * inverse) : 0;
    const double r = c[row] * std::exp(own);
    CHECK(near(widened(s[n]), p - q + r, rounding * std::abs(p - q + r) + 4e-6 * (p + q + r)));
  }
}

void exponentials_are_within_2_ulp() {
  double worst = 0;
  for (u64 n = 0; n < 20000; ++n) {
    Floats<LANES> x;
    for (u64 lane = 0; lane < LANES; ++lane) x[lane] = static_cast<float>(-87 * uniform(n * LANES + lane));
    const Floats<LANES> given = x;
    exponentiate<LANES>(x);
    for (u64 lane = 0; lane < LANES; ++lane) {
      const double want = std::exp(double{given[lane]});
      worst = std::max(worst, std::abs(x[lane] - want) / std::ldexp(1.0, std::ilogb(want) - 23));
    }
  }
  CHECK(worst <= 2);
  Floats<LANES> x{0.0f, -87.0f, -200.0f, -3e38f, std::numeric_limits<float>::quiet_NaN()};
  exponentiate<LANES>(x);
  CHECK(x[0] == 1 && x[1] > 0 && x[1] < 2e-38f && x[2] == x[1] && x[3] == x[1] && x[4] != x[4]);
}

void bf16_rounds_to_even() {
  for (const std::uint32_t bits : {0x3f800000u, 0x3f808000u, 0x3f818000u, 0x3f808001u, 0x3f807fffu,
                                   0xbf818000u, 0x7f7fffffu, 0x7fffffffu, 0u}) {
    Floats<LANES> x{};
    std::memcpy(&x, &bits, sizeof(bits));
    const float given = x[0];
    std::uint16_t out[LANES];
    store<LANES>(x, out);
    if (given != given || std::abs(given) > 3.39e38f) {
      CHECK(given != given ? (out[0] & 0x7fff) > 0x7f80 : out[0] == 0x7f80);
    } else {
      CHECK(out[0] == narrowed<std::uint16_t>(given));
    }
  }
}

template <class Logit>
void nan_gives_nan(u64 tokens, u64 at, bool in_teacher) {
  std::vector<Logit> s(tokens, narrowed<Logit>(1)), t(tokens, narrowed<Logit>(2));
  (in_teacher ? t : s)[at] = static_cast<Logit>(sizeof(Logit) == 2 ? 0x7fc0 : std::nanf(""));
  float out[NUMBERS];
  const Table<const Logit> of_s{s.data(), tokens}, of_t{t.data(), tokens};
  run_threads(Statistics<Logit, Logit>{of_s, of_t, 1, tokens, 1.0f, out}, 1);
  CHECK(out[DIFFERENCE] != out[DIFFERENCE]);
  const Number max = in_teacher ? MAX_T : MAX_S, sum = in_teacher ? SUM_T : SUM_S;
  CHECK(out[max] != out[max] && out[sum] != out[sum]);
  CHECK(in_teacher ? out[PICKED] != out[PICKED] : out[SUM_1] != out[SUM_1]);
}

}  // namespace

int main() {
  exponentials_are_within_2_ulp();
  bf16_rounds_to_even();
  for (const u64 tokens : {1, 15, 16, 17, 511, 513, 1023, 1025, 2100}) {
    for (int choice = 0; choice < 8; ++choice) {
      const float inverse = choice & 1 ? 0.5f : 1.0f;
      const u64 threads = tokens % 4 + 1;
      rows_agree<float, float>(tokens, inverse, choice & 2, choice & 4, threads);
      rows_agree<std::uint16_t, std::uint16_t>(tokens, inverse, choice & 2, choice & 4, threads);
    }
    rows_agree<float, std::uint16_t>(tokens, 1.0f, true, false, 9);
    for (const bool in_teacher : {false, true}) {
      nan_gives_nan<float>(tokens, tokens / 2, in_teacher);
      nan_gives_nan<std::uint16_t>(tokens, tokens - 1, in_teacher);
    }
  }
  return failures;
}
