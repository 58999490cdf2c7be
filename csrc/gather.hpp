// Windows of token streams -> batch buffers.
//
// A stream is a Megatron `.bin`: the concatenated tokens, 2 or 4 bytes each, mapped read-only. Window w of
// length S is tokens [wS, wS + S]: S inputs and, one further, S labels. Copies widen to int64, which is
// what an embedding and a loss take. No state besides the maps; cost: one pass over the window.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "cpu.hpp"
#include "integer.hpp"

namespace r1 {

// A file mapped read-only for as long as the object lives.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw std::system_error(errno, std::generic_category(), path);
    struct stat status;
    if (::fstat(file, &status) != 0) {
      const int reason = errno;
      ::close(file);
      throw std::system_error(reason, std::generic_category(), path);
    }
    bytes_ = static_cast<std::size_t>(status.st_size);
    if (bytes_) {
      void* map = ::mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, file, 0);
      const int reason = errno;
      ::close(file);
      if (map == MAP_FAILED) throw std::system_error(reason, std::generic_category(), path);
      data_ = static_cast<const unsigned char*>(map);
    } else {
      ::close(file);
    }
  }
  MappedFile(MappedFile&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  MappedFile& operator=(MappedFile&&) = delete;
  ~MappedFile() {
    if (data_) ::munmap(const_cast<unsigned char*>(data_), bytes_);
  }

  const unsigned char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

  // Asks for the pages of [begin, end) to be read; returns without waiting. A hint: failure is no error.
  void will_need(std::size_t begin, std::size_t end) const {
    const std::size_t page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    begin -= begin % page;
    ::madvise(const_cast<unsigned char*>(data_) + begin, end - begin, MADV_WILLNEED);
  }

 private:
  const unsigned char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

class Streams {
 public:
  // `width`: bytes of a token, 2 (uint16) or 4 (int32). `tokens`: the leading tokens that may be read.
  void add(const std::string& path, int width, u64 tokens) {
    if (width != 2 && width != 4) throw std::invalid_argument(path + ": a token is 2 or 4 bytes wide");
    MappedFile file(path);
    if (file.bytes() / static_cast<std::size_t>(width) < tokens) {
      throw std::invalid_argument(
          path + " holds " + std::to_string(file.bytes()) + " bytes, but " + std::to_string(tokens) +
          " tokens of " + std::to_string(width) +
          " bytes were declared: the file is truncated or not the one that was indexed;"
          " preprocess it again");
    }
    streams_.push_back({std::move(file), width, tokens});
  }

  std::size_t size() const { return streams_.size(); }

  // Throws std::out_of_range, before anything is read, unless every window lies within its stream.
  void check(const i64* source, const i64* window, std::size_t size, u64 length) const {
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

  // tokens, labels: [size, length]. The windows have been checked.
  void gather(const i64* source, const i64* window, std::size_t size, u64 length, i64* tokens,
              i64* labels) const {
    for (std::size_t n = 0; n < size; ++n) {
      copy(source[n], window[n], length, 0, length, tokens + n * length);
      copy(source[n], window[n], length, 1, length, labels + n * length);
    }
  }

  // out: [size, length + 1]. The windows have been checked.
  void whole_windows(const i64* source, const i64* window, std::size_t size, u64 length, i64* out) const {
    for (std::size_t n = 0; n < size; ++n) {
      copy(source[n], window[n], length, 0, length + 1, out + n * (length + 1));
    }
  }

  // Starts reading the windows' pages from disk. The windows have been checked.
  void will_need(const i64* source, const i64* window, std::size_t size, u64 length) const {
    for (std::size_t n = 0; n < size; ++n) {
      const Stream& stream = streams_[source[n]];
      const u64 begin = static_cast<u64>(window[n]) * length;
      const u64 width = static_cast<u64>(stream.width);
      stream.file.will_need(begin * width, (begin + length + 1) * width);
    }
  }

 private:
  struct Stream {
    MappedFile file;
    int width;
    u64 tokens;
  };

  template <class Token>
  R1_INLINE static void widen_any(const Token* from, u64 size, i64* to) {
    for (u64 n = 0; n < size; ++n) to[n] = static_cast<i64>(from[n]);
  }
#ifdef R1_X86
  template <class Token>
  R1_AVX2 static void widen_avx2(const Token* from, u64 size, i64* to) {
    widen_any(from, size, to);
  }
#endif
  template <class Token>
  static void widen(const Token* from, u64 size, i64* to) {
#ifdef R1_X86
    if (vector_width() >= 4) return widen_avx2(from, size, to);
#endif
    widen_any(from, size, to);
  }

  void copy(i64 source, i64 window, u64 length, u64 shift, u64 size, i64* to) const {
    const Stream& stream = streams_[source];
    const u64 begin = static_cast<u64>(window) * length + shift;
    if (stream.width == 2) {
      widen(reinterpret_cast<const std::uint16_t*>(stream.file.data()) + begin, size, to);
    } else {
      widen(reinterpret_cast<const std::int32_t*>(stream.file.data()) + begin, size, to);
    }
  }

  std::vector<Stream> streams_;
};

// A stretch of one document, from its token number `at` on.
R1_INLINE void fill_stretch(i32 document, i64 at, u64 size, i32* segment, i64* position) {
  for (u64 s = 0; s < size; ++s) segment[s] = document;
  for (u64 s = 0; s < size; ++s) position[s] = at + static_cast<i64>(s);
}

R1_INLINE void segment_rows_any(const i64* tokens, std::size_t rows, u64 length, i64 eod, i32* segment,
                                i64* position) {
  constexpr u64 BLOCK = 64;  // Most blocks hold no end of a document, and are written without a branch.
  for (std::size_t row = 0; row < rows; ++row) {
    i32 document = 0;
    i64 at = 0;
    for (u64 first = 0; first < length; first += BLOCK) {
      const u64 size = std::min(BLOCK, length - first);
      bool ends = false;
      for (u64 s = 0; s < size; ++s) ends |= tokens[s] == eod;
      for (u64 s = 0, stretch; s < size; s += stretch) {
        stretch = size - s;
        if (ends) {
          for (stretch = 1; stretch < size - s && tokens[s + stretch - 1] != eod;) ++stretch;
        }
        fill_stretch(document, at, stretch, segment + s, position + s);
        at += static_cast<i64>(stretch);
        if (ends && tokens[s + stretch - 1] == eod) {
          ++document;
          at = 0;
        }
      }
      tokens += size;
      segment += size;
      position += size;
    }
  }
}

#ifdef R1_X86
R1_AVX2 inline void segment_rows_avx2(const i64* tokens, std::size_t rows, u64 length, i64 eod, i32* segment,
                                      i64* position) {
  segment_rows_any(tokens, rows, length, eod, segment, position);
}
#endif

// For rows of `length` tokens: the document number within the row, and the position within the document.
// A document ends with its `eod` token, which belongs to it.
inline void segment_rows(const i64* tokens, std::size_t rows, u64 length, i64 eod, i32* segment,
                         i64* position) {
#ifdef R1_X86
  if (vector_width() >= 4) return segment_rows_avx2(tokens, rows, length, eod, segment, position);
#endif
  segment_rows_any(tokens, rows, length, eod, segment, position);
}

}  // namespace r1
