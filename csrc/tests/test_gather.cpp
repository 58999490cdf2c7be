#include "../gather.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>

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

// Buffers of a batch, each exactly as large as it must be: the sanitizer watches their ends.
struct Outputs {
  std::vector<i64> tokens, labels, position;
  std::vector<float> loss_mask;
  std::vector<i32> segment;

  Outputs(std::size_t rows, u64 length)
      : tokens(rows * length, -7),
        labels(rows * length, -7),
        position(rows * length, -7),
        loss_mask(rows * length, -7),
        segment(rows * length, -7) {}
  BatchRows rows(bool documents) {
    return {tokens.data(), labels.data(), loss_mask.data(), position.data(),
            documents ? segment.data() : nullptr};
  }
};

template <class Error, class Work>
std::string message(const Work& work) {
  try {
    work();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool holds(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

// Every output of a batch against the stream, token by token. `eod`: none where documents are not apart.
template <class Token>
void check_batch(const Streams& streams, i32 source, const std::vector<Token>& stream, u64 length,
                 std::optional<i64> eod) {
  const i64 last = static_cast<i64>((stream.size() - 1) / length) - 1;
  const std::vector<i64> window = {last, 0, last / 2};
  const std::vector<i32> sources(window.size(), source);
  Outputs out(window.size(), length);
  streams.check(sources.data(), window.data(), window.size(), length);
  streams.will_need(sources.data(), window.data(), window.size(), length);
  streams.gather(sources.data(), window.data(), window.size(), length, eod.value_or(0),
                 out.rows(eod.has_value()));
  std::vector<i64> whole(window.size() * (length + 1));
  streams.whole_windows(sources.data(), window.data(), window.size(), length, whole.data());
  bool right = true;
  for (std::size_t row = 0; row < window.size(); ++row) {
    const Token* from = stream.data() + static_cast<u64>(window[row]) * length;
    i32 document = 0;
    i64 position = 0;
    for (u64 s = 0; s < length; ++s) {
      const std::size_t at = row * length + s;
      right &= out.tokens[at] == from[s] && out.labels[at] == from[s + 1] && out.loss_mask[at] == 1;
      right &= out.position[at] == position && out.segment[at] == (eod ? document : -7);
      right &= whole[row * (length + 1) + s] == from[s];
      ++position;
      if (eod && from[s] == *eod) ++document, position = 0;
    }
    right &= whole[row * (length + 1) + length] == from[length];
  }
  CHECK(right);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string folder = argc > 1 ? argv[1] : ".";
  std::vector<std::uint16_t> narrow;
  std::vector<std::int32_t> wide;
  for (u64 n = 0; n < 30001; ++n) {
    // Documents of 1 to some hundred tokens: 0 ends them. The narrow ones are beyond int16 as well.
    const bool end = n * n % 211 < 2;
    narrow.push_back(static_cast<std::uint16_t>(end ? 0 : 65535 - n % 1000));
    wide.push_back(end ? 0 : static_cast<i32>(n * 70000));
  }
  Streams streams;
  streams.add(write(folder + "/narrow.bin", narrow), 2, narrow.size());
  streams.add(write(folder + "/wide.bin", wide), 4, 900);  // A corpus may be the head of a file.
  streams.add(write<std::int32_t>(folder + "/empty.bin", {}), 4, 0);

  const std::vector<std::int32_t> head(wide.begin(), wide.begin() + 900);
  // Around a block of the search and a stretch of the read, which a window may be shorter or longer than.
  const std::optional<i64> eods[] = {std::nullopt, 0, 65535};
  for (const u64 length : {1, 10, 63, 64, 65, 128, 4095, 4096, 4097, 9999}) {
    for (const std::optional<i64>& eod : eods) {
      check_batch(streams, 0, narrow, length, eod);
      if (length < 900) check_batch(streams, 1, head, length, eod);
    }
  }
  // What no token can be ends no document: -1 and 65536 would be 65535 and 0 in two bytes.
  for (const i64 eod : {i64{-1}, i64{65536}, i64{1} << 32}) {
    check_batch(streams, 0, narrow, 64, eod);
    check_batch(streams, 1, head, 64, eod);
  }

  struct Pair {
    i32 source;
    i64 window;
  };
  for (const Pair& bad : {Pair{0, 3000}, {0, -1}, {1, 89}, {2, 0}, {3, 0}, {-1, 0}}) {
    CHECK_THROWS(streams.check(&bad.source, &bad.window, 1, 10), std::out_of_range);
  }
  const i32 source = 0;
  const i64 window = 2999;  // The last of 10 tokens: the bytes [59980, 60002).
  CHECK_THROWS(streams.check(&source, &window, 1, 0), std::out_of_range);
  CHECK_THROWS(streams.add(folder + "/narrow.bin", 2, 30002), std::invalid_argument);
  CHECK_THROWS(streams.add(folder + "/empty.bin", 2, 1), std::invalid_argument);
  CHECK_THROWS(streams.add(folder + "/narrow.bin", 3, 1), std::invalid_argument);
  CHECK_THROWS(streams.add(folder + "/absent.bin", 2, 1), std::system_error);

  // Another file of the same name, put there by rename: the one that was opened is read on.
  write<std::uint16_t>(folder + "/other.bin", std::vector<std::uint16_t>(30001, 5));
  CHECK(std::rename((folder + "/other.bin").c_str(), (folder + "/narrow.bin").c_str()) == 0);
  check_batch(streams, 0, narrow, 64, 0);

  // Cut short while open, inside the last window and before it. What is still there can be read.
  Streams cut;
  cut.add(write(folder + "/cut.bin", narrow), 2, narrow.size());
  Outputs out(1, 10);
  for (const off_t bytes : {60001, 59990, 59980, 100, 0}) {
    CHECK(::truncate((folder + "/cut.bin").c_str(), bytes) == 0);
    const std::string said =
        message<std::invalid_argument>([&] { cut.gather(&source, &window, 1, 10, 0, out.rows(true)); });
    CHECK(holds(said, "cut.bin ends at byte ") && holds(said, "22 bytes at offset 59980 were wanted"));
    CHECK(holds(said, "cut short after it was opened"));
    CHECK_THROWS(cut.whole_windows(&source, &window, 1, 10, out.tokens.data()), std::invalid_argument);
    cut.will_need(&source, &window, 1, 10);
    const i64 first = 0;
    if (bytes >= 22) cut.gather(&source, &first, 1, 10, 0, out.rows(true));
  }

  // A read may be interrupted, and may bring less than was asked, any number of times.
  int calls = 0;
  const auto stutter = [&](unsigned char* to, std::size_t bytes, off_t offset) -> ssize_t {
    if (++calls % 2) {
      errno = EINTR;
      return -1;
    }
    const std::size_t size = std::min<std::size_t>(bytes, 3);
    std::memcpy(to, reinterpret_cast<const unsigned char*>(narrow.data()) + offset, size);
    return static_cast<ssize_t>(size);
  };
  unsigned char bytes[20];
  const ReadResult all = read_fully(stutter, bytes, sizeof bytes, 40);
  CHECK(all.bytes == sizeof bytes && all.error == 0);
  CHECK(std::memcmp(bytes, narrow.data() + 20, sizeof bytes) == 0);

  // A file that cannot be read any more: the system's reason, with the file's name and the place.
  Streams closed;
  const int next = ::dup(0);  // The number that the file will have.
  ::close(next);
  closed.add(folder + "/narrow.bin", 2, 11);
  ::close(next);
  const i64 zero = 0;
  const std::string said =
      message<std::system_error>([&] { closed.gather(&source, &zero, 1, 10, 0, out.rows(false)); });
  CHECK(holds(said, "narrow.bin: cannot read 22 bytes at offset 0") && holds(said, std::strerror(EBADF)));

  // Folders, pipes and devices do not open; opening a pipe would wait.
  const std::string pipe = folder + "/pipe";
  CHECK(::mkfifo(pipe.c_str(), 0600) == 0);
  for (const std::string& path : {folder, pipe, std::string("/dev/zero")}) {
    Streams refusing;
    CHECK(holds(message<std::invalid_argument>([&] { refusing.add(path, 2, 0); }), " is no regular file"));
  }
  Streams refusing;
  const std::string endless = folder + std::string(100000, 'x');
  const std::string told = message<std::system_error>([&] { refusing.add(endless, 2, 0); });
  CHECK(told.size() < 500 && holds(told, folder) && holds(told, std::strerror(ENAMETOOLONG)));

  // Others read while a stream is added.
  Streams growing;
  growing.add(folder + "/narrow.bin", 2, 30001);
  std::vector<std::thread> readers;
  for (int n = 0; n < 2; ++n) {
    readers.emplace_back([&] {
      Outputs mine(1, 10);
      for (int turn = 0; turn < 300; ++turn) {
        growing.check(&source, &zero, 1, 10);
        growing.gather(&source, &zero, 1, 10, 0, mine.rows(true));
        CHECK(mine.tokens[0] == 5);
      }
    });
  }
  for (int n = 0; n < 100; ++n) growing.add(folder + "/narrow.bin", 2, 30001);
  for (std::thread& reader : readers) reader.join();
  return failures;
}
