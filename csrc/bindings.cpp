// The module megatron_r1._csrc: checks of shapes and types, nothing else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "gather.hpp"
#include "keep.hpp"
#include "plan.hpp"

namespace py = pybind11;
using r1::i32;
using r1::i64;
using r1::u64;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
std::vector<T> to_vector(const Array<T>& array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

template <class T>
void require_size(const Array<T>& array, std::size_t size, const char* name) {
  if (array.ndim() != 1 || static_cast<std::size_t>(array.size()) != size) {
    throw std::invalid_argument(std::string(name) + " must be one-dimensional, one entry a source");
  }
}

u64 sample_index(i64 i) {
  if (i < 0) throw std::out_of_range("samples count from 0, got " + std::to_string(i));
  return static_cast<u64>(i);
}

using Keeps = std::vector<std::shared_ptr<r1::Keep>>;

void add_phase(r1::Plan& plan, std::size_t sources, u64 start, const Array<u64>& weights,
               const Array<double>& exact_weights, const Array<u64>& windows, const Array<u64>& limit,
               const Array<u64>& first_draw, const Array<u64>& first_epoch, const Keeps& keep) {
  require_size(weights, sources, "weights");
  require_size(exact_weights, sources, "exact_weights");
  require_size(windows, sources, "windows");
  require_size(limit, sources, "limit");
  require_size(first_draw, sources, "first_draw");
  require_size(first_epoch, sources, "first_epoch");
  if (keep.size() != sources) throw std::invalid_argument("keep must have one entry a source");
  std::vector<r1::SourcePhase> phase;
  for (std::size_t k = 0; k < sources; ++k) {
    phase.push_back({windows.at(k), limit.at(k), first_draw.at(k), first_epoch.at(k), keep[k]});
  }
  plan.add_phase(start, to_vector(weights), to_vector(exact_weights), phase);
}

py::tuple locate_arrays(r1::Plan& plan, std::size_t size, const i64* sample, i64 low) {
  if (sample) {
    for (std::size_t n = 0; n < size; ++n) sample_index(sample[n]);
  }
  py::array_t<i32> source(size), epoch(size);
  py::array_t<i64> window(size);
  i32* const source_out = source.mutable_data();
  i32* const epoch_out = epoch.mutable_data();
  i64* const window_out = window.mutable_data();
  bool overflow = false;
  {
    const py::gil_scoped_release release;
    const auto write = [&](std::size_t n, const r1::Draw& draw) {
      source_out[n] = draw.source;
      epoch_out[n] = static_cast<i32>(draw.epoch);
      window_out[n] = static_cast<i64>(draw.window);
      overflow |= draw.epoch > 0x7fffffffull;
    };
    if (sample) {
      plan.locate_each(size, [sample](std::size_t n) { return static_cast<u64>(sample[n]); }, write);
    } else {
      plan.locate_each(size, [low](std::size_t n) { return static_cast<u64>(low) + n; }, write);
    }
  }
  if (overflow) throw std::overflow_error("an epoch number does not fit int32; ask plan.locate for it");
  return py::make_tuple(source, epoch, window);
}

struct BatchShape {
  std::size_t rows;
  u64 length;
};

// Checks windows against the streams.
BatchShape check_batch(const r1::Streams& streams, const Array<i32>& source, const Array<i64>& window,
                       u64 length) {
  if (source.ndim() != 1 || window.ndim() != 1 || source.size() != window.size()) {
    throw std::invalid_argument("source and window must be one-dimensional and of one length");
  }
  const BatchShape shape{static_cast<std::size_t>(source.size()), length};
  streams.check(source.data(), window.data(), shape.rows, length);
  return shape;
}

// Room for arrays of rows x columns, in one allocation that lives until the last of them dies: so a batch
// costs one call to the allocator, and each array starts on a cache line.
class Block {
 public:
  // `arrays`: how many at most; `bytes_each`: of one element of all of them.
  Block(std::size_t rows, u64 columns, std::size_t arrays, std::size_t bytes_each)
      : shape_{static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(columns)} {
    const std::size_t most = rows * columns * bytes_each + (arrays + 1) * LINE;
    next_ = static_cast<unsigned char*>(take(most / LINE * LINE));
    owner_ = py::capsule(next_, [](void* block) { give_back(block); });
  }

  template <class T>
  py::array_t<T> array() {
    py::array_t<T> made(shape_, reinterpret_cast<T*>(next_), owner_);
    next_ += (static_cast<std::size_t>(made.nbytes()) + LINE - 1) / LINE * LINE;
    return made;
  }

 private:
  static constexpr std::size_t LINE = 64;
  static constexpr std::size_t KEPT = 4;

  // Blocks that no batch uses any more, the oldest first: a batch is too large for the allocator to keep,
  // and the page faults of fresh memory cost as much as filling it. Guarded by the GIL.
  static std::vector<void*>& spare() {
    static std::vector<void*> blocks;
    return blocks;
  }
  // The line before a block holds its size.
  static std::size_t& size_of(void* block) {
    return *reinterpret_cast<std::size_t*>(static_cast<unsigned char*>(block) - LINE);
  }
  static void* take(std::size_t bytes) {
    std::vector<void*>& blocks = spare();
    for (std::size_t n = blocks.size(); n-- > 0;) {  // The newest may still lie in the cache.
      if (size_of(blocks[n]) != bytes) continue;
      void* const block = blocks[n];
      blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(n));
      return block;
    }
    unsigned char* const line = static_cast<unsigned char*>(std::aligned_alloc(LINE, bytes + LINE));
    if (!line) throw std::bad_alloc();
    size_of(line + LINE) = bytes;
    return line + LINE;
  }
  static void give_back(void* block) {
    std::vector<void*>& blocks = spare();
    blocks.push_back(block);
    if (blocks.size() <= KEPT) return;
    std::free(static_cast<unsigned char*>(blocks.front()) - LINE);
    blocks.erase(blocks.begin());
  }

  std::vector<py::ssize_t> shape_;
  unsigned char* next_;
  py::capsule owner_;
};

// tokens, labels, loss_mask, position, segment (None without `eod`).
py::tuple gather(const r1::Streams& streams, const Array<i32>& source, const Array<i64>& window, u64 length,
                 std::optional<i64> eod) {
  const BatchShape shape = check_batch(streams, source, window, length);
  Block block(shape.rows, length, 5, 3 * sizeof(i64) + sizeof(float) + sizeof(i32));
  py::array_t<i64> tokens = block.array<i64>(), labels = block.array<i64>(), position = block.array<i64>();
  py::array_t<float> loss_mask = block.array<float>();
  std::optional<py::array_t<i32>> segment;
  if (eod) segment = block.array<i32>();
  const r1::BatchRows out{tokens.mutable_data(), labels.mutable_data(), loss_mask.mutable_data(),
                          position.mutable_data(), segment ? segment->mutable_data() : nullptr};
  {
    const py::gil_scoped_release release;
    streams.gather(source.data(), window.data(), shape.rows, length, eod.value_or(0), out);
  }
  return py::make_tuple(tokens, labels, loss_mask, position, segment);
}

}  // namespace

PYBIND11_MODULE(_csrc, m) {
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const std::system_error& e) {
      const py::object arguments = py::make_tuple(e.code().value(), e.what());
      PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
  });

  py::class_<r1::Keep, std::shared_ptr<r1::Keep>>(m, "Keep")
      .def(py::init([](u64 windows, const Array<std::uint8_t>& packed) {
             if (static_cast<u64>(packed.size()) != (windows + 7) / 8) {
               throw std::invalid_argument("a bitmap of " + std::to_string(windows) + " windows has " +
                                           std::to_string((windows + 7) / 8) + " bytes, got " +
                                           std::to_string(packed.size()));
             }
             std::vector<u64> words((windows + 63) / 64, 0);
             for (py::ssize_t n = 0; n < packed.size(); ++n)
               words[n / 8] |= u64{packed.data()[n]} << (n % 8 * 8);
             return std::make_shared<r1::Keep>(windows, std::move(words));
           }),
           py::arg("windows"), py::arg("packed"))
      .def_property_readonly("windows", &r1::Keep::windows)
      .def_property_readonly("kept", &r1::Keep::kept)
      .def_property_readonly("bytes", &r1::Keep::bytes);

  py::class_<r1::Plan>(m, "Plan")
      .def(py::init([](bool megatron, bool shuffle, const Array<u64>& source_key) {
             return std::make_unique<r1::Plan>(megatron, shuffle, to_vector(source_key));
           }),
           py::arg("megatron"), py::arg("shuffle"), py::arg("source_key"))
      .def("add_phase",
           [](r1::Plan& plan, u64 start, const Array<u64>& weights, const Array<double>& exact_weights,
              const Array<u64>& windows, const Array<u64>& limit, const Array<u64>& first_draw,
              const Array<u64>& first_epoch, const Keeps& keep) {
             add_phase(plan, plan.sources(), start, weights, exact_weights, windows, limit, first_draw,
                       first_epoch, keep);
           })
      .def("locate",
           [](r1::Plan& plan, i64 i) {
             const u64 sample = sample_index(i);
             r1::Draw draw;
             {
               const py::gil_scoped_release release;
               draw = plan.locate(sample);
             }
             return py::make_tuple(draw.source, draw.epoch, draw.window);
           })
      .def("locate_range",
           [](r1::Plan& plan, i64 low, i64 size) {
             if (size < 0) throw std::invalid_argument("n must not be negative, got " + std::to_string(size));
             sample_index(low);
             return locate_arrays(plan, static_cast<std::size_t>(size), nullptr, low);
           })
      .def("locate_many",
           [](r1::Plan& plan, const Array<i64>& samples) {
             if (samples.ndim() != 1) throw std::invalid_argument("samples must be one-dimensional");
             return locate_arrays(plan, static_cast<std::size_t>(samples.size()), samples.data(), 0);
           })
      .def("counts",
           [](r1::Plan& plan, i64 i) {
             const u64 sample = sample_index(i);
             std::vector<u64> counts;
             {
               const py::gil_scoped_release release;
               counts = plan.counts(sample);
             }
             return py::array_t<u64>(counts.size(), counts.data());
           })
      .def(
          "count", [](r1::Plan& plan, i32 source, i64 i) { return plan.count(source, sample_index(i)); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "position",
          [](r1::Plan& plan, i32 source, i64 draw) {
            const u64 at = plan.position(source, static_cast<u64>(draw));
            return at == r1::NEVER ? i64{-1} : static_cast<i64>(at);
          },
          py::call_guard<py::gil_scoped_release>())
      .def("bounds",
           [](r1::Plan& plan) {
             const std::vector<double> bounds = plan.bounds();
             return py::array_t<double>(bounds.size(), bounds.data());
           })
      .def("segment_starts", &r1::Plan::segment_starts)
      .def_property_readonly("bytes", &r1::Plan::bytes);

  py::class_<r1::Streams>(m, "Streams")
      .def(py::init<>())
      .def("add", &r1::Streams::add, py::arg("path"), py::arg("width"), py::arg("tokens"))
      .def("gather", &gather)
      .def("whole_windows",
           [](const r1::Streams& streams, const Array<i32>& source, const Array<i64>& window, u64 length) {
             const BatchShape shape = check_batch(streams, source, window, length);
             py::array_t<i64> out({shape.rows, static_cast<std::size_t>(length + 1)});
             i64* const to = out.mutable_data();
             {
               const py::gil_scoped_release release;
               streams.whole_windows(source.data(), window.data(), shape.rows, length, to);
             }
             return out;
           })
      .def("will_need",
           [](const r1::Streams& streams, const Array<i32>& source, const Array<i64>& window, u64 length) {
             const BatchShape shape = check_batch(streams, source, window, length);
             const py::gil_scoped_release release;
             streams.will_need(source.data(), window.data(), shape.rows, length);
           });

  // megatron-core's build_blending_indices: (source, number of the draw within its source) of each sample.
  m.def("megatron_order", [](const Array<double>& weights, i64 samples) {
    if (weights.ndim() != 1 || weights.size() == 0 || samples < 0) {
      throw std::invalid_argument("megatron_order takes a row of weights and a number of samples");
    }
    py::array_t<i32> source(samples);
    py::array_t<i64> draw(samples);
    i32* const source_out = source.mutable_data();
    u64* const draw_out = reinterpret_cast<u64*>(draw.mutable_data());
    r1::Greedy greedy(to_vector(weights),
                      std::vector<u64>(static_cast<std::size_t>(weights.size()), r1::NEVER));
    {
      const py::gil_scoped_release release;
      greedy.locate(0, static_cast<u64>(samples), source_out, draw_out);
    }
    return py::make_tuple(source, draw);
  });
}
