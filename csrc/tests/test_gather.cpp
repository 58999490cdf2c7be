#include "../gather.hpp"

#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "check.hpp"

using namespace r1;

namespace {

template <class Token>
std::string write(const std::string& path, const std::vector<Token>& tokens) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(tokens.data()),
             static_cast<std::streamsize>(tokens.size() * sizeof(Token)));
  return path;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string folder = argc > 1 ? argv[1] : ".";
  std::vector<std::uint16_t> narrow;
  std::vector<std::int32_t> wide;
  for (int n = 0; n < 1001; ++n) {
    narrow.push_back(static_cast<std::uint16_t>(65535 - n));
    wide.push_back(n * 100);
  }
  Streams streams;
  streams.add(write(folder + "/narrow.bin", narrow), 2, 1001);
  streams.add(write(folder + "/wide.bin", wide), 4, 900);  // A corpus may be the head of a file.
  streams.add(write<std::int32_t>(folder + "/empty.bin", {}), 4, 0);

  constexpr u64 S = 10;
  const i64 source[] = {0, 1, 0, 1}, window[] = {99, 88, 0, 3};
  streams.check(source, window, 4, S);
  streams.will_need(source, window, 4, S);
  std::vector<i64> tokens(4 * S), labels(4 * S), whole(4 * (S + 1));
  streams.gather(source, window, 4, S, tokens.data(), labels.data());
  streams.whole_windows(source, window, 4, S, whole.data());
  for (u64 row = 0; row < 4; ++row) {
    for (u64 s = 0; s <= S; ++s) {
      const u64 at = static_cast<u64>(window[row]) * S + s;
      const i64 want = source[row] ? wide[at] : narrow[at];
      if (s < S) CHECK(tokens[row * S + s] == want);
      if (s > 0) CHECK(labels[row * S + s - 1] == want);
      CHECK(whole[row * (S + 1) + s] == want);
    }
  }

  const i64 bad[][2] = {{0, 100}, {0, -1}, {1, 89}, {2, 0}, {3, 0}, {-1, 0}};
  for (const auto& pair : bad) CHECK_THROWS(streams.check(&pair[0], &pair[1], 1, S), std::out_of_range);
  CHECK_THROWS(streams.check(source, window, 4, 0), std::out_of_range);
  CHECK_THROWS(streams.add(folder + "/narrow.bin", 2, 1002), std::invalid_argument);
  CHECK_THROWS(streams.add(folder + "/empty.bin", 2, 1), std::invalid_argument);
  CHECK_THROWS(streams.add(folder + "/narrow.bin", 3, 1), std::invalid_argument);
  CHECK_THROWS(streams.add(folder + "/absent.bin", 2, 1), std::system_error);

  const i64 row[] = {5, 0, 7, 7, 0, 0, 3};
  i32 segment[7];
  i64 position[7];
  segment_rows(row, 1, 7, 0, segment, position);
  const i32 want_segment[] = {0, 0, 1, 1, 1, 2, 3};
  const i64 want_position[] = {0, 1, 0, 1, 2, 0, 0};
  for (int s = 0; s < 7; ++s) {
    CHECK(segment[s] == want_segment[s]);
    CHECK(position[s] == want_position[s]);
  }
  return failures;
}
