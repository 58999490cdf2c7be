// Windows of token streams -> batch buffers.
//
// A stream is a Megatron `.bin`: the concatenated tokens, 2 or 4 bytes each. Window w of length S is tokens
// [wS, wS + S]: S inputs and, one further, S labels. Tokens widen to int64, which is what an embedding and a
// loss take.
//
// State: one open file a stream and nothing between calls, so any threads may gather at once, also while one
// adds a stream. Cost: each
// window is read once, by one `pread` for every 4096 tokens into a buffer on the stack, and each output is
// written once from there while the tokens are in the first-level cache. A token moves 2 or 4 bytes in and
// 28 out (tokens, labels, positions: 8 each; loss mask: 4), or 32 with segments.
//
// Why `pread` and not a map: a window is read once an epoch, so a map pays page faults that cost more than
// the copy they save; and a map turns a file that was cut short, or a disk that fails, into a signal that
// ends the process. Here both are errors that name the file and the offset. A file that another one replaced
// by rename is read on as it was; one overwritten in place is not noticed.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "cpu.hpp"
#include "integer.hpp"

namespace r1 {

// What a read brought: its bytes, and the errno that stopped it (0: all came, or the file ended).
struct ReadResult {
  std::size_t bytes;
  int error;
};

// Calls `read(to, bytes, offset)`, which answers as pread does, until all came, the file ended or it failed.
template <class Read>
ReadResult read_fully(const Read& read, void* to, std::size_t bytes, u64 offset) noexcept {
  unsigned char* const begin = static_cast<unsigned char*>(to);
  std::size_t done = 0;
  while (done < bytes) {
    const ssize_t got = read(begin + done, bytes - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return {done, errno};
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return {done, 0};
}

// A path for a message: of a long one both ends.
inline std::string shown(const std::string& path) {
  if (path.size() <= 400) return path;
  return path.substr(0, 200) + "..." + path.substr(path.size() - 200);
}

// A regular file open for reading for as long as the object lives.
class InputFile {
 public:
  // Throws std::system_error where the file does not open, std::invalid_argument where it is no regular file:
  // opening a pipe would wait, and a device could do anything.
  explicit InputFile(const std::string& path) : path_(shown(path)) {
    struct stat status;
    if (::stat(path.c_str(), &status) != 0) fail();
    if (!S_ISREG(status.st_mode)) {
      throw std::invalid_argument(path_ + " is no regular file; name the .bin file of a dataset");
    }
    file_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file_ < 0) fail();
  }
  InputFile(InputFile&& other) noexcept
      : path_(std::move(other.path_)), file_(std::exchange(other.file_, -1)) {}
  InputFile& operator=(InputFile&&) = delete;
  ~InputFile() {
    if (file_ >= 0) ::close(file_);
  }

  const std::string& path() const { return path_; }

  u64 bytes() const {
    struct stat status;
    if (::fstat(file_, &status) != 0) fail();
    return static_cast<u64>(status.st_size);
  }

  ReadResult read(void* to, std::size_t bytes, u64 offset) const noexcept {
    const auto pread = [this](void* at, std::size_t size, off_t from) {
      return ::pread(file_, at, size, from);
    };
    return read_fully(pread, to, bytes, offset);
  }

  // Asks for [begin, end) to be read from disk; returns without waiting. A hint: failure is no error.
  void will_need(u64 begin, u64 end) const noexcept {
#ifdef POSIX_FADV_WILLNEED
    ::posix_fadvise(file_, static_cast<off_t>(begin), static_cast<off_t>(end - begin), POSIX_FADV_WILLNEED);
#else
    static_cast<void>(begin), static_cast<void>(end);
#endif
  }

 private:
  [[noreturn]] void fail() const { throw std::system_error(errno, std::generic_category(), path_); }

  std::string path_;  // As messages show it.
  int file_ = -1;
};

// Where a batch goes, [rows, length] each. `segment`, the document's number within its row, is null where
// windows attend across documents; positions then count through the row.
struct BatchRows {
  i64* tokens;
  i64* labels;
  float* loss_mask;
  i64* position;
  i32* segment;

  BatchRows from(u64 n) const {
    return {tokens + n, labels + n, loss_mask + n, position + n, segment ? segment + n : nullptr};
  }
};

// The loops over one stretch of a window, for the vectors that this CPU has.
namespace loops {

// The document that a row is in, and the next token's position within it.
struct Place {
  i32 document = 0;
  i64 position = 0;
};

template <class Token>
R1_INLINE void widen_any(const Token* from, u64 size, i64* to) {
  for (u64 s = 0; s < size; ++s) to[s] = static_cast<i64>(from[s]);
}

R1_INLINE Place fill_document(Place place, u64 size, i32* segment, i64* position) {
  for (u64 s = 0; s < size; ++s) segment[s] = place.document;
  for (u64 s = 0; s < size; ++s) position[s] = place.position + static_cast<i64>(s);
  return {place.document, place.position + static_cast<i64>(size)};
}

// A document ends with its `eod` token, which belongs to it.
template <class Token>
R1_INLINE Place fill_documents(const Token* from, u64 size, Token eod, Place place, i32* segment,
                               i64* position) {
  constexpr u64 BLOCK = 64;  // Most blocks hold no end of a document, and are passed over as vectors.
  u64 start = 0;
  for (u64 first = 0; first < size; first += BLOCK) {
    const u64 end = std::min(first + BLOCK, size);
    if (end - first == BLOCK) {
      Token found = 0;
      for (u64 s = 0; s < BLOCK; ++s) found |= static_cast<Token>(from[first + s] == eod);
      if (!found) continue;
    }
    for (u64 s = first; s < end; ++s) {
      if (from[s] != eod) continue;
      fill_document(place, s + 1 - start, segment + start, position + start);
      place = {place.document + 1, 0};
      start = s + 1;
    }
  }
  return fill_document(place, size - start, segment + start, position + start);
}

// All outputs of `size` inputs; `from` holds one token more. `eod` is read only where there are segments.
template <class Token>
R1_INLINE Place fill_any(const Token* from, u64 size, Place place, i64 eod, const BatchRows& to) {
  widen_any(from, size, to.tokens);
  widen_any(from + 1, size, to.labels);
  for (u64 s = 0; s < size; ++s) to.loss_mask[s] = 1.0f;
  if (!to.segment) {
    for (u64 s = 0; s < size; ++s) to.position[s] = place.position + static_cast<i64>(s);
    return {0, place.position + static_cast<i64>(size)};
  }
  // Narrowed, an eod that no token can be would equal some other token.
  using Limits = std::numeric_limits<Token>;
  if (eod < Limits::min() || eod > Limits::max()) {
    return fill_document(place, size, to.segment, to.position);
  }
  return fill_documents(from, size, static_cast<Token>(eod), place, to.segment, to.position);
}

#ifdef R1_X86
template <class Token>
R1_AVX2 void widen_avx2(const Token* from, u64 size, i64* to) {
  widen_any(from, size, to);
}
template <class Token>
R1_AVX2 Place fill_avx2(const Token* from, u64 size, Place place, i64 eod, const BatchRows& to) {
  return fill_any(from, size, place, eod, to);
}
template <class Token>
R1_AVX512 Place fill_avx512(const Token* from, u64 size, Place place, i64 eod, const BatchRows& to) {
  return fill_any(from, size, place, eod, to);
}
#endif

template <class Token>
void widen(const Token* from, u64 size, i64* to) {
#ifdef R1_X86
  if (vector_width() >= 4) return widen_avx2(from, size, to);
#endif
  widen_any(from, size, to);
}
template <class Token>
Place fill(const Token* from, u64 size, Place place, i64 eod, const BatchRows& to) {
#ifdef R1_X86
  if (vector_width() >= 8) return fill_avx512(from, size, place, eod, to);
  if (vector_width() >= 4) return fill_avx2(from, size, place, eod, to);
#endif
  return fill_any(from, size, place, eod, to);
}

}  // namespace loops

class Streams {
 public:
  // `width`: bytes of a token, 2 (uint16) or 4 (int32). `tokens`: the leading tokens that may be read.
  void add(const std::string& path, int width, u64 tokens) {
    if (width != 2 && width != 4) {
      throw std::invalid_argument(shown(path) + ": a token is 2 or 4 bytes wide, not " +
                                  std::to_string(width));
    }
    InputFile file(path);
    const u64 bytes = file.bytes();
    if (bytes / static_cast<u64>(width) < tokens) {
      throw std::invalid_argument(
          file.path() + " holds " + std::to_string(bytes) + " bytes, but " + std::to_string(tokens) +
          " tokens of " + std::to_string(width) +
          " bytes were declared: the file is truncated or not the one that was indexed;"
          " preprocess it again");
    }
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    streams_.push_back({std::move(file), width, tokens});
  }

  // Throws std::out_of_range, before anything is read, unless every window lies within its stream.
  void check(const i32* source, const i64* window, std::size_t size, u64 length) const {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    if (length == 0 || length >> 40) throw std::out_of_range("sequence length must be in [1, 2^40)");
    for (std::size_t n = 0; n < size; ++n) {
      if (source[n] < 0 || static_cast<std::size_t>(source[n]) >= streams_.size()) {
        throw std::out_of_range("source " + std::to_string(source[n]) + " of " +
                                std::to_string(streams_.size()));
      }
      const u64 tokens = streams_[source[n]].tokens;
      const u64 windows = tokens ? (tokens - 1) / length : 0;
      if (window[n] < 0 || static_cast<u64>(window[n]) >= windows) {
        throw std::out_of_range("window " + std::to_string(window[n]) + " of source " +
                                std::to_string(source[n]) + ", which has " + std::to_string(windows) +
                                " windows of " + std::to_string(length) + " tokens");
      }
    }
  }

  // The windows have been checked. Throws std::invalid_argument where a file has become shorter since it was
  // added and std::system_error where it cannot be read; the outputs are then not to be used.
  void gather(const i32* source, const i64* window, std::size_t size, u64 length, i64 eod,
              const BatchRows& out) const {
    read(source, window, size, length, [&](std::size_t n) {
      return [to = out.from(n * length), place = loops::Place{}, eod](const auto* from, u64 first,
                                                                      u64 count) mutable {
        place = loops::fill(from, count, place, eod, to.from(first));
      };
    });
  }

  // out: [size, length + 1]. As `gather`.
  void whole_windows(const i32* source, const i64* window, std::size_t size, u64 length, i64* out) const {
    read(source, window, size, length, [&](std::size_t n) {
      return [to = out + n * (length + 1)](const auto* from, u64 first, u64 count) {
        loops::widen(from, count + 1, to + first);
      };
    });
  }

  // Starts reading the windows from disk, the first gigabyte of them: the call cannot be ended. The windows
  // have been checked.
  void will_need(const i32* source, const i64* window, std::size_t size, u64 length) const {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    u64 left = u64{1} << 30;
    for (std::size_t n = 0; n < size && left; ++n) {
      const Stream& stream = streams_[source[n]];
      const u64 begin = static_cast<u64>(window[n]) * length;
      const u64 width = static_cast<u64>(stream.width);
      const u64 bytes = std::min((length + 1) * width, left);
      stream.file.will_need(begin * width, begin * width + bytes);
      left -= bytes;
    }
  }

 private:
  struct Stream {
    InputFile file;
    int width;
    u64 tokens;
  };

  // A read that did not bring all it was asked for.
  struct Failure {
    const Stream* stream;
    u64 offset;
    std::size_t wanted;
    ReadResult came;
  };

  // For each window n, `make_use(n)` is called with each stretch (tokens, first, count): inputs
  // [first, first + count) of the window, and tokens[count], the last label.
  template <class MakeUse>
  void read(const i32* source, const i64* window, std::size_t size, u64 length,
            const MakeUse& make_use) const {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    std::optional<Failure> failure;
    for (std::size_t n = 0; n < size && !failure; ++n) {
      const Stream& stream = streams_[source[n]];
      const u64 begin = static_cast<u64>(window[n]) * length;
      failure = stream.width == 2 ? read_window<std::uint16_t>(stream, begin, length, make_use(n))
                                  : read_window<std::int32_t>(stream, begin, length, make_use(n));
    }
    if (failure) refuse(*failure);
  }

  template <class Token, class Use>
  static std::optional<Failure> read_window(const Stream& stream, u64 begin, u64 length, Use use) noexcept {
    constexpr u64 STRETCH = 4096;
    alignas(64) Token tokens[STRETCH + 1];
    for (u64 first = 0; first < length; first += STRETCH) {
      const u64 count = std::min(STRETCH, length - first);
      const u64 offset = (begin + first) * sizeof(Token);
      const std::size_t wanted = (count + 1) * sizeof(Token);
      const ReadResult came = stream.file.read(tokens, wanted, offset);
      if (came.bytes != wanted) return Failure{&stream, offset, wanted, came};
      use(tokens, first, count);
    }
    return std::nullopt;
  }

  [[noreturn]] static void refuse(const Failure& failure) {
    const std::string& path = failure.stream->file.path();
    const std::string what =
        std::to_string(failure.wanted) + " bytes at offset " + std::to_string(failure.offset);
    if (failure.came.error) {
      throw std::system_error(
          failure.came.error, std::generic_category(),
          path + ": cannot read " + what + "; see that its disk answers, then start again");
    }
    throw std::invalid_argument(path + " ends at byte " +
                                std::to_string(failure.offset + failure.came.bytes) + ", where " + what +
                                " were wanted: it was cut short after it was opened; restore it or preprocess"
                                " it again, then start again");
  }

  std::vector<Stream> streams_;
  mutable std::shared_mutex mutex_;
};

}  // namespace r1
