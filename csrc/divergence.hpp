// Rows of logits of a student and a teacher -> the numbers that a divergence needs, and its gradient.
//
// Rows are fp32, or bf16 as its 16 bits. A row is read twice, for its largest logit and for the sums: the
// second time it lies in the cache. One exponential is computed for each logit and temperature. Sums are
// float32 within BLOCK logits of a lane and double across blocks, so that their error does not grow with the
// vocabulary.
//
// A row has 16 sums of every 16th logit whatever vectors the CPU has, and no product is contracted with a
// sum: all CPUs give the same bits. NaN among a row's logits makes its sums NaN.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu.hpp"
#include "integer.hpp"

namespace r1::divergence {

// Sums of a row, and logits that each adds in float32.
constexpr u64 LANES = 16, BLOCK = 32;

// Vectors of `WIDTH` numbers.
template <u64 WIDTH>
struct Vector {
  typedef float Floats __attribute__((vector_size(4 * WIDTH)));
  typedef std::uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
  typedef std::uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
  static constexpr u64 PARTS = LANES / WIDTH;
};
template <u64 WIDTH>
using Floats = typename Vector<WIDTH>::Floats;

// A table of logits, [rows, tokens]; `stride`: from a row to the next. `Logit`: float, or uint16_t for bf16.
template <class Logit>
struct Table {
  Logit* logits = nullptr;
  u64 stride = 0;
  Logit* row(u64 n) const { return logits ? logits + n * stride : nullptr; }
};

// What `statistics` writes, a number of each row: z logits, i = 1 / T, s the student, t the teacher.
enum Number {
  MAX_S,      // m_s = max z_s
  SUM_S,      // sum exp((z_s - m_s) i)
  MAX_T,      // m_t = max z_t
  SUM_T,      // sum exp((z_t - m_t) i)
  ENTROPY,    // sum exp((z_t - m_t) i) (z_t - m_t) i
  DIFFERENCE, // sum exp((z_t - m_t) i) ((z_t - m_t) - (z_s - m_s)) i
  SUM_1,      // sum exp(z_s - m_s)
  PICKED,     // z_s at the first of the teacher's largest logits
  NUMBERS
};

template <u64 WIDTH>
R1_INLINE void load(const float* from, Floats<WIDTH>& to) {
  std::memcpy(&to, from, sizeof(to));
}
template <u64 WIDTH>
R1_INLINE void load(const std::uint16_t* from, Floats<WIDTH>& to) {
  typename Vector<WIDTH>::Halves half;
  std::memcpy(&half, from, sizeof(half));
  const auto bits = __builtin_convertvector(half, typename Vector<WIDTH>::Bits) << 16;
  std::memcpy(&to, &bits, sizeof(to));
}
R1_INLINE float widened(float logit) { return logit; }
R1_INLINE float widened(std::uint16_t logit) {
  const std::uint32_t bits = std::uint32_t{logit} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

template <u64 WIDTH>
R1_INLINE void store(const Floats<WIDTH>& from, float* to) {
  std::memcpy(to, &from, sizeof(from));
}
// To the nearest, of two to the even one; NaN stays NaN.
template <u64 WIDTH>
R1_INLINE void store(const Floats<WIDTH>& from, std::uint16_t* to) {
  typename Vector<WIDTH>::Bits bits;
  std::memcpy(&bits, &from, sizeof(bits));
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto number = from == from;
  bits = number ? bits : bits * 0 + 0x7fc0;
  const auto half = __builtin_convertvector(bits, typename Vector<WIDTH>::Halves);
  std::memcpy(to, &half, sizeof(half));
}

// x -> e^x within 2 ulp for x in [-87, 0]; below, e^-87. NaN stays NaN.
template <u64 WIDTH>
R1_INLINE void exponentiate(Floats<WIDTH>& x) {
  const Floats<WIDTH> least = Floats<WIDTH>{} - 87.0f;
  x = x < least ? least : x;
  // Adding 1.5 * 2^23 rounds to a whole number n, which the lowest bits then hold. x = n ln 2 + r.
  const Floats<WIDTH> shifted = x * 1.44269504f + 12582912.0f;
  const Floats<WIDTH> n = shifted - 12582912.0f;
  // The first part of ln 2 has 9 bits, so that its product is exact.
  const Floats<WIDTH> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  // The polynomial of the least relative error for |r| <= ln 2 / 2: 2^-28.
  const Floats<WIDTH> p =
      (((0.001381454049f * r + 0.008368745117f) * r + 0.04166839078f) * r + 0.166665204f) * r + 0.4999999343f;
  typename Vector<WIDTH>::Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u;
  Floats<WIDTH> power;
  std::memcpy(&power, &bits, sizeof(power));
  x = (p * (r * r) + r + 1.0f) * power;
}

// The first `count` logits of a vector, and `filler` after them.
template <u64 WIDTH, class Logit>
R1_INLINE void load_part(const Logit* from, u64 count, float filler, Floats<WIDTH>& to) {
  to = Floats<WIDTH>{} + filler;
  for (u64 lane = 0; lane < count; ++lane) to[lane] = widened(from[lane]);
}

// The largest of a row, and where the vectors begin among which it first comes.
template <u64 WIDTH, class Logit>
R1_INLINE float largest(const Logit* row, u64 tokens, u64& place) {
  constexpr u64 STEP = 1024;
  const Floats<WIDTH> none = Floats<WIDTH>{} - std::numeric_limits<float>::infinity();
  float most = none[0];
  place = 0;
  for (u64 first = 0; first < tokens; first += STEP) {
    const u64 end = std::min(first + STEP, tokens);
    Floats<WIDTH> z, best = none, other = none;
    u64 v = first;
    for (; v + 2 * WIDTH <= end; v += 2 * WIDTH) {
      load<WIDTH>(row + v, z);
      best = z > best ? z : best;
      load<WIDTH>(row + v + WIDTH, z);
      other = z > other ? z : other;
    }
    best = other > best ? other : best;
    float top = most;
    for (u64 lane = 0; lane < WIDTH; ++lane) top = best[lane] > top ? best[lane] : top;
    for (; v < end; ++v) top = widened(row[v]) > top ? widened(row[v]) : top;
    if (top > most) place = first;
    most = top;
  }
  return most;
}

// `out`: of row 0; a number's rows follow each other, `rows` in all.
template <u64 WIDTH, class Student, class Teacher>
R1_INLINE void statistics_row(const Student* s, const Teacher* t, u64 tokens, float inverse, float* out,
                              u64 rows) {
  constexpr u64 PARTS = Vector<WIDTH>::PARTS;
  using Floats = divergence::Floats<WIDTH>;
  const bool warm = inverse != 1.0f;
  u64 place;
  const float most_s = largest<WIDTH>(s, tokens, place), most_t = t ? largest<WIDTH>(t, tokens, place) : 0.0f;
  // Of the student, of it at T = 1, of the teacher, entropy, difference.
  double total[5] = {};
  Floats sum[5][PARTS] = {};
  const auto add = [&](u64 part, const Floats& zs, const Floats& zt,
                       u64 count) __attribute__((always_inline)) {
    const Floats own = zs - most_s;
    Floats e = warm ? own * inverse : own;
    exponentiate<WIDTH>(e);
    Floats e_1 = own;
    if (warm) exponentiate<WIDTH>(e_1);
    Floats f = zt - most_t, x = f, d = f;
    if (t) {
      d = f - own;
      if (warm) d *= inverse, f *= inverse;
      x = f;
      exponentiate<WIDTH>(f);
    }
    if (count < WIDTH) {
      for (u64 lane = count; lane < WIDTH; ++lane) e[lane] = e_1[lane] = f[lane] = 0.0f;
    }
    sum[0][part] += e;
    if (warm) sum[1][part] += e_1;
    if (t) sum[2][part] += f, sum[3][part] += f * x, sum[4][part] += f * d;
  };
  const auto flush = [&]() __attribute__((always_inline)) {
    for (u64 k = 0; k < 5; ++k) {
      for (u64 lane = 0; lane < LANES; ++lane) total[k] += sum[k][lane / WIDTH][lane % WIDTH];
      for (u64 part = 0; part < PARTS; ++part) sum[k][part] = Floats{};
    }
  };
  Floats zs, zt = Floats{};
  u64 v = 0;
  while (v + LANES <= tokens) {
    const u64 end = std::min(v + BLOCK * LANES, tokens / LANES * LANES);
    while (v < end) {
      for (u64 part = 0; part < PARTS; ++part, v += WIDTH) {
        load<WIDTH>(s + v, zs);
        if (t) load<WIDTH>(t + v, zt);
        add(part, zs, zt, WIDTH);
      }
    }
    flush();
  }
  for (u64 part = 0; v < tokens; ++part, v += WIDTH) {
    const u64 count = std::min(WIDTH, tokens - v);
    load_part<WIDTH>(s + v, count, most_s, zs);
    if (t) load_part<WIDTH>(t + v, count, most_t, zt);
    add(part, zs, zt, count);
  }
  flush();
  const double one = warm ? total[1] : total[0];
  const float nan = std::numeric_limits<float>::quiet_NaN();
  out[MAX_S * rows] = one == one ? most_s : nan;
  out[SUM_S * rows] = static_cast<float>(total[0]);
  out[SUM_1 * rows] = static_cast<float>(one);
  if (!t) return;
  out[MAX_T * rows] = total[2] == total[2] ? most_t : nan;
  out[SUM_T * rows] = static_cast<float>(total[2]);
  out[ENTROPY * rows] = static_cast<float>(total[3]);
  out[DIFFERENCE * rows] = static_cast<float>(total[4]);
  while (place < tokens && !(widened(t[place]) == most_t)) ++place;
  out[PICKED * rows] = place < tokens && total[2] == total[2] ? widened(s[place]) : nan;
}

// Coefficients of a row. Without a teacher b counts for nothing, and c only where `one_too`.
struct Coefficients {
  float max_s, max_t, a, b, c;
};

template <u64 WIDTH, class Student, class Teacher>
R1_INLINE void gradient_row(Student* s, const Teacher* t, u64 tokens, float inverse, bool one_too,
                            const Coefficients& with) {
  using Floats = divergence::Floats<WIDTH>;
  const auto form = [&](Floats& zs, const Floats& teacher) __attribute__((always_inline)) {
    Floats one = zs - with.max_s;
    zs = one * inverse;
    exponentiate<WIDTH>(zs);
    zs *= with.a;
    if (t) {
      Floats zt = (teacher - with.max_t) * inverse;
      exponentiate<WIDTH>(zt);
      zs -= zt * with.b;
    }
    if (one_too) {
      exponentiate<WIDTH>(one);
      zs += one * with.c;
    }
  };
  Floats zs, zt = Floats{};
  u64 v = 0;
  for (; v + WIDTH <= tokens; v += WIDTH) {
    load<WIDTH>(s + v, zs);
    if (t) load<WIDTH>(t + v, zt);
    form(zs, zt);
    store<WIDTH>(zs, s + v);
  }
  if (v == tokens) return;
  load_part<WIDTH>(s + v, tokens - v, with.max_s, zs);
  if (t) load_part<WIDTH>(t + v, tokens - v, with.max_t, zt);
  form(zs, zt);
  Student last[WIDTH];
  store<WIDTH>(zs, last);
  std::memcpy(s + v, last, (tokens - v) * sizeof(Student));
}

// A task's loop over rows [first, end) is inlined into a function for each kind of CPU.
template <class Student, class Teacher>
struct Statistics {
  Table<const Student> student;
  Table<const Teacher> teacher;
  u64 rows, tokens;
  float inverse;
  float* out;  // [NUMBERS, rows]; without a teacher its numbers are not set

  template <u64 WIDTH>
  R1_INLINE void work(u64 first, u64 end) const {
    for (u64 n = first; n < end; ++n) {
      statistics_row<WIDTH>(student.row(n), teacher.row(n), tokens, inverse, out + n, rows);
    }
  }
};

template <class Student, class Teacher>
struct Gradient {
  Table<Student> student;
  Table<const Teacher> teacher;
  u64 rows, tokens;
  float inverse;
  const float *max_s, *max_t, *a, *b, *c;  // [rows]; c: null for zeros, max_t and b: null without a teacher

  template <u64 WIDTH>
  R1_INLINE void work(u64 first, u64 end) const {
    for (u64 n = first; n < end; ++n) {
      const Teacher* t = teacher.row(n);
      const Coefficients with{max_s[n], t ? max_t[n] : 0.0f, a[n], t ? b[n] : 0.0f, c ? c[n] : 0.0f};
      gradient_row<WIDTH>(student.row(n), t, tokens, inverse, c != nullptr, with);
    }
  }
};

#ifdef R1_X86
template <class Work>
R1_AVX2 void run_avx2(const Work& task, u64 first, u64 end) {
  task.template work<8>(first, end);
}
template <class Work>
R1_AVX512 void run_avx512(const Work& task, u64 first, u64 end) {
  task.template work<16>(first, end);
}
#endif
template <class Work>
void run_plain(const Work& task, u64 first, u64 end) {
  task.template work<4>(first, end);
}

template <class Work>
void run(const Work& task, u64 first, u64 end) {
#ifdef R1_X86
  if (vector_width() >= 8) return run_avx512(task, first, end);
  if (vector_width() >= 4) return run_avx2(task, first, end);
#endif
  run_plain(task, first, end);
}

// All rows of the task, by so many threads. Where the system gives no more threads, this one does their part.
template <class Work>
void run_threads(const Work& task, u64 threads) {
  threads = std::max<u64>(1, std::min(threads, task.rows));
  std::vector<std::thread> others;
  others.reserve(threads);
  u64 done = 0;
  for (u64 k = 1; k < threads; ++k) {
    const u64 end = task.rows * k / threads;
    try {
      others.emplace_back([&task, done, end] { run(task, done, end); });
    } catch (const std::system_error&) {
      break;
    }
    done = end;
  }
  run(task, done, task.rows);
  for (std::thread& other : others) other.join();
}

}  // namespace r1::divergence
