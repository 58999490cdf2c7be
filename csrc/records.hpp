// Systematic draws from softmax(logits / T), the records of a teacher cache, and its entropy.
//
// A row of logits is read twice: for its largest, and for the sums of exp by block. Points (u + j) / n of the
// total then ascend through the blocks, and only blocks that a point falls into are computed again. Numbers
// are added in a fixed order, so that a row's draws do not depend on the vectors of this CPU. No
// memory but 512 bytes a block of the vocabulary.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu.hpp"
#include "integer.hpp"

namespace r1 {

namespace loops {

constexpr u64 DRAWN_BLOCK = 128;

// Logits: float, or the bits of bfloat16.
R1_INLINE void widen(const float* logit, u64 size, float* to) { std::memcpy(to, logit, size * sizeof *to); }
R1_INLINE void widen(const std::uint16_t* logit, u64 size, float* to) {
  u32 bits[DRAWN_BLOCK];
  for (u64 v = 0; v < size; ++v) bits[v] = u32{logit[v]} << 16;
  std::memcpy(to, bits, size * sizeof *to);
}

// DRAWN_BLOCK logits at `to`, of which `size` are there: in place of the others -infinity.
template <class Logit>
R1_INLINE void load(const Logit* logit, u64 size, float* to) {
  if (size == DRAWN_BLOCK) return widen(logit, DRAWN_BLOCK, to);
  widen(logit, size, to);
  std::fill(to + size, to + DRAWN_BLOCK, -std::numeric_limits<float>::infinity());
}

// The sum of DRAWN_BLOCK numbers, by halves; it overwrites them.
R1_INLINE float sum_of(float* x) {
  for (u64 v = 0; v < 64; ++v) x[v] += x[v + 64];
  for (u64 v = 0; v < 32; ++v) x[v] += x[v + 32];
  for (u64 v = 0; v < 16; ++v) x[v] += x[v + 16];
  for (u64 v = 0; v < 8; ++v) x[v] += x[v + 8];
  for (u64 v = 0; v < 4; ++v) x[v] += x[v + 4];
  return (x[0] + x[2]) + (x[1] + x[3]);
}

// What a block of the vocabulary adds: exp(x), and exp(x) x, of x = (logit - largest) / T.
struct BlockSums {
  double mass, energy;
};

// exp(x) of `size` <= DRAWN_BLOCK logits to `mass`, which is filled up with zeros; relative error 2e-7. x is not
// above 0. Where exp(x) is below 2^-126 it is 0. NaN stays NaN.
template <class Logit>
R1_INLINE BlockSums exp_block(const Logit* logit, u64 size, float largest, float inverse, float* mass) {
  float x[DRAWN_BLOCK], scale[DRAWN_BLOCK];
  u32 bits[DRAWN_BLOCK];
  load(logit, size, x);
  for (u64 v = 0; v < DRAWN_BLOCK; ++v) x[v] = (x[v] - largest) * inverse;
  // In a loop of its own: compilers make a branch of it, and then no vectors of what follows.
  for (u64 v = 0; v < DRAWN_BLOCK; ++v) x[v] = x[v] < -88.0f ? -88.0f : x[v];
  for (u64 v = 0; v < DRAWN_BLOCK; ++v) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number.
    scale[v] = x[v] * 1.44269504f + ROUND;
    const float power = scale[v] - ROUND;
    const float r = (x[v] - power * 0.693359375f) + power * 2.12194440e-4f;  // ln 2 in two parts
    float y = r * 1.9875691e-4f + 1.3981999e-3f;  // Of exp on [-ln 2 / 2, ln 2 / 2], as Cephes has it.
    y = y * r + 8.3334519e-3f;
    y = y * r + 4.1665796e-2f;
    y = y * r + 1.6666665e-1f;
    y = y * r + 0.5f;
    mass[v] = (y * r * r + r) + 1.0f;
  }
  // The lower bits are the power, from -127, whose exponent of 0 makes 0, to 0.
  std::memcpy(bits, scale, sizeof bits);
  for (u64 v = 0; v < DRAWN_BLOCK; ++v) bits[v] = (bits[v] + 127) << 23;
  std::memcpy(scale, bits, sizeof scale);
  for (u64 v = 0; v < DRAWN_BLOCK; ++v) mass[v] *= scale[v];
  for (u64 v = 0; v < DRAWN_BLOCK; ++v) x[v] *= mass[v];
  std::memcpy(scale, mass, sizeof scale);
  return {double{sum_of(scale)}, double{sum_of(x)}};
}

// Ids of one row at the points (uniform + j) / draws of its cumulated mass; returns its entropy. `block` has
// room for the sums of the row's blocks.
template <class Logit>
R1_INLINE float draw_row_any(const Logit* logit, u64 size, float inverse, double uniform, u64 draws, i32* id,
                             BlockSums* block) {
  float mass[DRAWN_BLOCK], most[DRAWN_BLOCK];
  std::fill_n(most, DRAWN_BLOCK, -std::numeric_limits<float>::infinity());
  for (u64 v = 0; v < size; v += DRAWN_BLOCK) {
    load(logit + v, std::min(DRAWN_BLOCK, size - v), mass);
    for (u64 l = 0; l < DRAWN_BLOCK; ++l) most[l] = mass[l] > most[l] ? mass[l] : most[l];
  }
  const float largest = *std::max_element(most, most + DRAWN_BLOCK);
  double total = 0, energy = 0;
  const u64 blocks = (size + DRAWN_BLOCK - 1) / DRAWN_BLOCK;
  for (u64 b = 0; b < blocks; ++b) {
    const u64 first = b * DRAWN_BLOCK;
    block[b] = exp_block(logit + first, std::min(DRAWN_BLOCK, size - first), largest, inverse, mass);
    total += block[b].mass, energy += block[b].energy;
  }
  // Below the total, so that a block with mass holds it.
  const double most_point = std::nextafter(total, 0.0);
  const auto point = [&](u64 j) {
    return std::min((uniform + static_cast<double>(j)) / static_cast<double>(draws) * total, most_point);
  };
  double before = 0;  // Mass of the blocks before block b.
  for (u64 b = 0, j = 0; j < draws; before += block[b++].mass) {
    // The last block takes what NaN has left.
    const bool at_end = b + 1 == blocks;
    const double end = before + block[b].mass;
    if (!at_end && !(point(j) < end)) continue;
    const u64 first = b * DRAWN_BLOCK, here = std::min(DRAWN_BLOCK, size - first);
    exp_block(logit + first, here, largest, inverse, mass);
    double sum = before, next = point(j);
    for (u64 v = 0; v < here && j < draws; ++v) {
      for (sum += double{mass[v]}; next < sum && j < draws; next = point(++j)) id[j] = static_cast<i32>(first + v);
    }
    // Points that rounding has put behind the last id with mass go to it.
    u64 last = here - 1;
    while (last > 0 && !(mass[last] > 0)) --last;
    for (; j < draws && (at_end || next < end); next = point(++j)) id[j] = static_cast<i32>(first + last);
  }
  return static_cast<float>(std::log(total) - energy / total);
}

#ifdef R1_X86
template <class Logit>
R1_AVX2 float draw_row_avx2(const Logit* logit, u64 size, float inverse, double uniform, u64 draws, i32* id,
                            BlockSums* block) {
  return draw_row_any(logit, size, inverse, uniform, draws, id, block);
}
template <class Logit>
R1_AVX512 float draw_row_avx512(const Logit* logit, u64 size, float inverse, double uniform, u64 draws, i32* id,
                                BlockSums* block) {
  return draw_row_any(logit, size, inverse, uniform, draws, id, block);
}
#endif

template <class Logit>
float draw_row(const Logit* logit, u64 size, float inverse, double uniform, u64 draws, i32* id,
               BlockSums* block) {
#ifdef R1_X86
  if (vector_width() >= 8) return draw_row_avx512(logit, size, inverse, uniform, draws, id, block);
  if (vector_width() >= 4) return draw_row_avx2(logit, size, inverse, uniform, draws, id, block);
#endif
  return draw_row_any(logit, size, inverse, uniform, draws, id, block);
}

}  // namespace loops

// `draws` ids of each row, ascending, at the points (uniform + j) / draws of the cumulated softmax(logits / T),
// and its entropy in nats. `inverse` is 1 / T. Where a row holds NaN or an infinity above, its entropy is NaN.
// Ids are below `size`, which is at least 1, whatever the logits and uniforms are, and whoever changes them
// meanwhile.
template <class Logit>
void draw_rows(const Logit* logit, u64 rows, u64 size, float inverse, const double* uniform, u64 draws, i32* id,
               float* entropy) {
  std::vector<loops::BlockSums> block((size + loops::DRAWN_BLOCK - 1) / loops::DRAWN_BLOCK);
  for (u64 n = 0; n < rows; ++n) {
    entropy[n] =
        loops::draw_row(logit + n * size, size, inverse, uniform[n], draws, id + n * draws, block.data());
  }
}

}  // namespace r1
