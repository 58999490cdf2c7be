// The module megatron_r1._csrc: checks of what Python hands over, and the GIL.
//
// Every call that may take a lock or long gives up the GIL first: whoever waits for a lock must not hold it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "divergence.hpp"
#include "gather.hpp"
#include "interrupt.hpp"
#include "keep.hpp"
#include "plan.hpp"
#include "records.hpp"

namespace pybind11::detail {
template <>
class type_caster<r1::Keep> : public r1::arguments::Made<r1::Keep> {
  using Made::Made;
};
template <>
class type_caster<r1::Plan> : public r1::arguments::Made<r1::Plan> {
  using Made::Made;
};
template <>
class type_caster<r1::Streams> : public r1::arguments::Made<r1::Streams> {
  using Made::Made;
};
}  // namespace pybind11::detail

namespace py = pybind11;
using r1::i32;
using r1::i64;
using r1::u64;
using r1::arguments::Array;
using r1::arguments::array;
using r1::arguments::vector;
using r1::arguments::whole;

namespace {

// `work()` without the GIL.
template <class Work>
auto apart(const Work& work) {
  const py::gil_scoped_release release;
  return work();
}

u64 sample_index(py::handle i) {
  return whole<std::out_of_range>(i, "samples count from 0: a sample", 0, r1::MAX_NUMBER);
}

u64 source_number(py::handle source) {
  return whole<std::out_of_range>(source, "a source's number", 0, r1::Plan::MAX_SOURCES);
}

template <class T>
py::array_t<T> as_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::shared_ptr<r1::Keep> make_keep(const py::object& window_count, const py::object& bytes) {
  const u64 windows = whole(window_count, "windows", 0, r1::MAX_NUMBER - 1);
  const Array<std::uint8_t> packed = array<std::uint8_t>(bytes, "packed");
  if (static_cast<u64>(packed.size()) != (windows + 7) / 8) {
    throw std::invalid_argument("a bitmap of " + std::to_string(windows) + " windows has " +
                                std::to_string((windows + 7) / 8) + " bytes, got " +
                                std::to_string(packed.size()));
  }
  std::vector<u64> words((windows + 63) / 64, 0);
  for (py::ssize_t n = 0; n < packed.size(); ++n) words[n / 8] |= u64{packed.data()[n]} << (n % 8 * 8);
  return std::make_shared<r1::Keep>(windows, std::move(words));
}

std::unique_ptr<r1::Plan> make_plan(const py::object& megatron, const py::object& shuffle,
                                    const py::object& source_key) {
  return std::make_unique<r1::Plan>(r1::arguments::flag(megatron, "megatron"),
                                    r1::arguments::flag(shuffle, "shuffle"),
                                    vector<u64>(source_key, "source_key"));
}

// `keep`: a list with a Keep or None for each source.
void add_phase(r1::Plan& plan, const py::object& start, const py::object& weights,
               const py::object& exact_weights, const py::object& windows, const py::object& limit,
               const py::object& first_draw, const py::object& first_epoch, const py::object& keep) {
  const u64 first = whole(start, "start", 0, r1::MAX_NUMBER - 1);
  std::vector<u64> whole_weights = vector<u64>(weights, "weights");
  std::vector<double> doubles = vector<double>(exact_weights, "exact_weights");
  const std::vector<u64> of_epoch = vector<u64>(windows, "windows"), limits = vector<u64>(limit, "limit"),
                         draws = vector<u64>(first_draw, "first_draw"),
                         epochs = vector<u64>(first_epoch, "first_epoch");
  if (!py::isinstance<py::list>(keep)) {
    throw py::type_error("keep must be a list, not " + r1::arguments::type_of(keep));
  }
  const py::list masks = keep;
  plan.check_sizes({of_epoch.size(), limits.size(), draws.size(), epochs.size(), masks.size()});
  std::vector<r1::SourcePhase> phase;
  for (std::size_t k = 0; k < of_epoch.size(); ++k) {
    const py::object mask = masks[k];
    if (!mask.is_none() && !py::isinstance<r1::Keep>(mask)) {
      throw py::type_error("keep must hold Keep or None, not " + r1::arguments::type_of(mask));
    }
    // Of an object that was not made, this throws; the pointer alone would be none.
    if (!mask.is_none()) mask.cast<r1::Keep&>();
    auto bitmap = mask.is_none() ? nullptr : mask.cast<std::shared_ptr<r1::Keep>>();
    phase.push_back({of_epoch[k], limits[k], draws[k], epochs[k], std::move(bitmap)});
  }
  apart([&] { plan.add_phase(first, std::move(whole_weights), std::move(doubles), phase); });
}

// source, epoch, window of samples [0, size), which `sample(n)` numbers; `window` may hold the samples.
template <class Sample>
py::tuple locate_arrays(r1::Plan& plan, py::array_t<i64> window, const Sample& sample) {
  const std::size_t size = static_cast<std::size_t>(window.size());
  py::array_t<i32> source(window.size()), epoch(window.size());
  i32* const source_out = source.mutable_data();
  i32* const epoch_out = epoch.mutable_data();
  i64* const window_out = window.mutable_data();
  bool overflow = false;
  apart([&] {
    plan.locate_each(size, sample, [&](std::size_t n, const r1::Draw& draw) {
      source_out[n] = draw.source;
      epoch_out[n] = static_cast<i32>(draw.epoch);
      window_out[n] = static_cast<i64>(draw.window);
      overflow |= draw.epoch > 0x7fffffffull;
    });
  });
  if (overflow) throw std::overflow_error("an epoch number does not fit int32; ask plan.locate for it");
  return py::make_tuple(source, epoch, window);
}

py::tuple locate_range(r1::Plan& plan, const py::object& first, const py::object& samples) {
  const u64 low = sample_index(first);
  const u64 size = whole(samples, "n, the number of samples,", 0, r1::MAX_NUMBER);
  if (size > r1::MAX_NUMBER - low) {  // Noticed before room for the answers is made.
    throw std::out_of_range("sample " + std::to_string(low + size - 1) + " is not below 2^62");
  }
  return locate_arrays(plan, py::array_t<i64>(static_cast<py::ssize_t>(size)),
                       [low](std::size_t n) { return low + n; });
}

py::tuple locate_many(r1::Plan& plan, const py::object& samples) {
  const Array<i64> given = array<i64>(samples, "samples");
  // The answers replace the samples one by one.
  py::array_t<i64> window(given.size());
  i64* const sample = window.mutable_data();
  for (py::ssize_t n = 0; n < given.size(); ++n) {
    sample[n] = given.data()[n];
    if (sample[n] < 0) throw std::out_of_range("samples count from 0, got " + std::to_string(sample[n]));
  }
  return locate_arrays(plan, std::move(window),
                       [sample](std::size_t n) { return static_cast<u64>(sample[n]); });
}

// The windows of a batch, checked against the streams. A copy: the arrays may change while they are read.
struct Windows {
  std::vector<i32> source;
  std::vector<i64> window;
  u64 length;

  Windows(const r1::Streams& streams, const py::object& sources, const py::object& windows,
          const py::object& tokens)
      : source(vector<i32>(sources, "source")),
        window(vector<i64>(windows, "window")),
        length(whole(tokens, "the sequence length", 0, r1::NEVER)) {
    if (source.size() != window.size()) {
      throw std::invalid_argument(std::to_string(source.size()) + " sources for " +
                                  std::to_string(window.size()) + " windows; use one for each");
    }
    streams.check(source.data(), window.data(), rows(), length);
  }

  std::size_t rows() const { return source.size(); }
};

// Room for arrays of rows x columns, in one allocation that lives until the last of them dies: so a batch
// costs one call to the allocator, and each array starts on a cache line.
class Block {
 public:
  // `arrays`: how many at most; `bytes_each`: of one element of all of them.
  Block(std::size_t rows, u64 columns, std::size_t arrays, std::size_t bytes_each)
      : shape_{static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(columns)} {
    std::size_t most;
    if (__builtin_mul_overflow(rows, columns, &most) || __builtin_mul_overflow(most, bytes_each, &most) ||
        __builtin_add_overflow(most, (arrays + 2) * LINE, &most)) {
      throw std::length_error(std::to_string(rows) + " rows of " + std::to_string(columns) +
                              " tokens do not fit any memory; ask for fewer at once");
    }
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
    static auto& blocks = *new std::vector<void*>();  // The last array may die after all else.
    blocks.reserve(KEPT + 1);                         // So that giving back does not throw.
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
py::tuple gather(const r1::Streams& streams, const py::object& source, const py::object& window,
                 const py::object& length, const py::object& eod) {
  const Windows rows(streams, source, window, length);
  // An id that does not fit ends no document, like any other that no token can be.
  const i64 end = eod.is_none() ? 0 : r1::arguments::saturated(eod, "eod");
  Block block(rows.rows(), rows.length, 5, 3 * sizeof(i64) + sizeof(float) + sizeof(i32));
  py::array_t<i64> tokens = block.array<i64>(), labels = block.array<i64>(), position = block.array<i64>();
  py::array_t<float> loss_mask = block.array<float>();
  std::optional<py::array_t<i32>> segment;
  if (!eod.is_none()) segment = block.array<i32>();
  const r1::BatchRows out{tokens.mutable_data(), labels.mutable_data(), loss_mask.mutable_data(),
                          position.mutable_data(), segment ? segment->mutable_data() : nullptr};
  apart([&] { streams.gather(rows.source.data(), rows.window.data(), rows.rows(), rows.length, end, out); });
  return py::make_tuple(tokens, labels, loss_mask, position, segment);
}

py::array_t<i64> whole_windows(const r1::Streams& streams, const py::object& source, const py::object& window,
                               const py::object& length) {
  const Windows rows(streams, source, window, length);
  py::array_t<i64> out({rows.rows(), static_cast<std::size_t>(rows.length + 1)});
  i64* const to = out.mutable_data();
  apart([&] { streams.whole_windows(rows.source.data(), rows.window.data(), rows.rows(), rows.length, to); });
  return out;
}

void will_need(const r1::Streams& streams, const py::object& source, const py::object& window,
               const py::object& length) {
  const Windows rows(streams, source, window, length);
  apart([&] { streams.will_need(rows.source.data(), rows.window.data(), rows.rows(), rows.length); });
}

// ids [rows, draws] and entropy [rows] of rows of `size` logits, float32 or the bits of bfloat16 as uint16.
py::tuple draw(const py::object& logits, const py::object& row_size, const py::object& inverse_temperature,
               const py::object& uniforms, const py::object& draw_count) {
  const u64 size = whole(row_size, "size", 1, 1u << 30), draws = whole(draw_count, "draws", 1, 1u << 16);
  const std::vector<double> uniform = vector<double>(uniforms, "uniform");
  py::detail::make_caster<float> inverse;
  if (!inverse.load(inverse_temperature, false)) {
    throw py::type_error("inverse must be a float, not " + r1::arguments::type_of(inverse_temperature));
  }
  const std::size_t rows = uniform.size();
  const float factor = inverse;
  const auto of_type = [&](const auto& logit) {
    if (static_cast<u64>(logit.size()) % size || static_cast<u64>(logit.size()) / size != rows) {
      throw std::invalid_argument(std::to_string(logit.size()) + " logits are not " + std::to_string(rows) +
                                  " rows of " + std::to_string(size));
    }
    py::array_t<i32> id({rows, static_cast<std::size_t>(draws)});
    py::array_t<float> entropy(static_cast<py::ssize_t>(rows));
    i32* const id_out = id.mutable_data();
    float* const entropy_out = entropy.mutable_data();
    const auto* const from = logit.data();
    // Not copied: whoever writes to the logits meanwhile gets other ids, all within the vocabulary.
    apart([&] { r1::draw_rows(from, rows, size, factor, uniform.data(), draws, id_out, entropy_out); });
    return py::make_tuple(id, entropy);
  };
  const py::array any(logits);
  if (any.dtype().kind() == 'f') return of_type(array<float>(logits, "logits"));
  return of_type(array<std::uint16_t>(logits, "logits"));
}

// megatron-core's build_blending_indices: (source, number of the draw within its source) of each sample.
py::tuple megatron_order(const py::object& source_weights, const py::object& samples) {
  std::vector<double> weights = vector<double>(source_weights, "weights");
  const u64 size = whole(samples, "samples", 0, r1::MAX_NUMBER);
  if (weights.empty() || weights.size() > r1::Plan::MAX_SOURCES) {
    throw std::invalid_argument(std::to_string(weights.size()) + " weights: use 1 to 2^20");
  }
  r1::check_weights(weights);
  py::array_t<i32> source(static_cast<py::ssize_t>(size));
  py::array_t<i64> draw(static_cast<py::ssize_t>(size));
  i32* const source_out = source.mutable_data();
  u64* const draw_out = reinterpret_cast<u64*>(draw.mutable_data());
  apart([&] {
    std::vector<u64> budget(weights.size(), r1::NEVER);
    r1::Greedy(std::move(weights), std::move(budget)).locate(0, size, source_out, draw_out);
  });
  return py::make_tuple(source, draw);
}

// Logits, [rows, tokens]: fp32, or uint16 for the bits of bf16. They are used where they lie: a table may be
// most of the memory that there is. Another thread that writes to one changes numbers and nothing else.
struct Logits {
  py::array array;
  bool half;
  u64 rows, tokens;

  Logits(const py::object& given, const char* name) {
    if (!py::isinstance<py::array>(given)) {
      throw py::type_error(std::string(name) + " must be an array, not " + r1::arguments::type_of(given));
    }
    array = given;
    half = array.dtype().equal(py::dtype::of<std::uint16_t>());
    if (!half && !array.dtype().equal(py::dtype::of<float>())) {
      throw py::type_error(std::string(name) + " must be an array of float32 or uint16, not of " +
                           std::string(py::str(array.dtype())).substr(0, 80));
    }
    const bool aligned = array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    // The step along an axis of one is anything.
    if (array.ndim() != 2 || !aligned || array.size() == 0 ||
        (array.shape(1) > 1 && array.strides(1) != array.itemsize()) ||
        (array.shape(0) > 1 && array.strides(0) < array.shape(1) * array.itemsize())) {
      throw std::invalid_argument(std::string(name) + " must be [rows, tokens] of logits that lie in order");
    }
    rows = static_cast<u64>(array.shape(0));
    tokens = static_cast<u64>(array.shape(1));
  }

  template <class T>
  r1::divergence::Table<const T> table() const {
    return {static_cast<const T*>(array.data()), static_cast<u64>(array.strides(0)) / sizeof(T)};
  }
  template <class T>
  r1::divergence::Table<T> mutable_table() {
    return {static_cast<T*>(array.mutable_data()), static_cast<u64>(array.strides(0)) / sizeof(T)};
  }
};

// Calls `work` with a value of the student's type and one of the teacher's.
template <class Work>
void with_types(bool student_half, bool teacher_half, const Work& work) {
  const std::uint16_t half = 0;
  if (student_half && teacher_half) return work(half, half);
  if (student_half) return work(half, 0.0f);
  if (teacher_half) return work(0.0f, half);
  work(0.0f, 0.0f);
}

// Student and teacher of a call, and its numbers.
struct Pair {
  Logits student;
  std::optional<Logits> teacher;
  float inverse;
  u64 threads;

  Pair(const py::object& student_logits, const py::object& teacher_logits, double inverse_temperature,
       const py::object& thread_count)
      : student(student_logits, "student"),
        inverse(static_cast<float>(inverse_temperature)),
        threads(whole(thread_count, "threads", 1, 1024)) {
    if (!teacher_logits.is_none()) teacher.emplace(teacher_logits, "teacher");
    if (teacher && (teacher->rows != student.rows || teacher->tokens != student.tokens)) {
      throw std::invalid_argument("the teacher has logits [" + std::to_string(teacher->rows) + ", " +
                                  std::to_string(teacher->tokens) + "], the student [" +
                                  std::to_string(student.rows) + ", " + std::to_string(student.tokens) + "]");
    }
    if (!(inverse > 0 && inverse < std::numeric_limits<float>::infinity())) {
      throw std::invalid_argument("1 / temperature must be above 0 and finite, got " +
                                  std::to_string(inverse_temperature));
    }
  }

  bool teacher_half() const { return teacher ? teacher->half : student.half; }
  template <class T>
  r1::divergence::Table<const T> teacher_table() const {
    return teacher ? teacher->table<T>() : r1::divergence::Table<const T>{};
  }
};

py::array_t<float> statistics(const py::object& student, const py::object& teacher, double inverse,
                              const py::object& threads) {
  const Pair pair(student, teacher, inverse, threads);
  py::array_t<float> out({u64{r1::divergence::NUMBERS}, pair.student.rows});
  float* const to = out.mutable_data();
  // Without a teacher five rows are not computed.
  std::memset(to, 0, static_cast<std::size_t>(out.nbytes()));
  with_types(pair.student.half, pair.teacher_half(), [&](auto s, auto t) {
    using Student = decltype(s);
    using Teacher = decltype(t);
    const r1::divergence::Statistics<Student, Teacher> task{pair.student.table<Student>(),
                                                            pair.teacher_table<Teacher>(),
                                                            pair.student.rows,
                                                            pair.student.tokens,
                                                            pair.inverse,
                                                            to};
    apart([&] { r1::divergence::run_threads(task, pair.threads); });
  });
  return out;
}

void gradient(const py::object& student, const py::object& teacher, const py::object& max_s,
              const py::object& max_t, double inverse, const py::object& a, const py::object& b,
              const py::object& c, const py::object& threads) {
  Pair pair(student, teacher, inverse, threads);
  const auto numbers = [&](const py::object& given, const char* name) {
    const Array<float> got = array<float>(given, name);
    if (static_cast<u64>(got.size()) != pair.student.rows) {
      throw std::invalid_argument(std::string(name) + " has " + std::to_string(got.size()) + " numbers for " +
                                  std::to_string(pair.student.rows) + " rows");
    }
    return got;
  };
  const Array<float> of_s = numbers(max_s, "max_s"), scale_s = numbers(a, "a");
  std::optional<Array<float>> of_t, scale_t, one;
  if (pair.teacher) of_t = numbers(max_t, "max_t"), scale_t = numbers(b, "b");
  if (!c.is_none()) one = numbers(c, "c");
  with_types(pair.student.half, pair.teacher_half(), [&](auto s, auto t) {
    using Student = decltype(s);
    using Teacher = decltype(t);
    const r1::divergence::Gradient<Student, Teacher> task{pair.student.mutable_table<Student>(),
                                                          pair.teacher_table<Teacher>(),
                                                          pair.student.rows,
                                                          pair.student.tokens,
                                                          pair.inverse,
                                                          of_s.data(),
                                                          of_t ? of_t->data() : nullptr,
                                                          scale_s.data(),
                                                          scale_t ? scale_t->data() : nullptr,
                                                          one ? one->data() : nullptr};
    apart([&] { r1::divergence::run_threads(task, pair.threads); });
  });
}

void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::system_error& e) {
    const py::object arguments = py::make_tuple(e.code().value(), r1::arguments::text(e.what()));
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  } catch (const std::invalid_argument& e) {
    PyErr_SetObject(PyExc_ValueError, r1::arguments::text(e.what()).ptr());
  }
}

// pybind11's objects have no state that Python could copy; what pickle does by default ends the process.
void refuse_copy(const py::object& self) {
  throw py::type_error("cannot pickle or copy a " + r1::arguments::type_of(self) + "; make another one");
}

// Runs the signal handlers that wait, and hands on what they raise.
void handle_signals() {
  const py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace

PYBIND11_MODULE(_csrc, m) {
  r1::interrupt = &handle_signals;
  py::register_exception_translator(&translate);

  py::class_<r1::Keep, std::shared_ptr<r1::Keep>>(m, "Keep")
      .def(py::init(&make_keep), py::arg("windows"), py::arg("packed"))
      .def_property_readonly("windows", &r1::Keep::windows)
      .def_property_readonly("kept", &r1::Keep::kept)
      .def_property_readonly("bytes", &r1::Keep::bytes)
      .def("__reduce__", &refuse_copy);

  py::class_<r1::Plan>(m, "Plan")
      .def(py::init(&make_plan), py::arg("megatron"), py::arg("shuffle"), py::arg("source_key"))
      .def("add_phase", &add_phase)
      .def("locate",
           [](r1::Plan& plan, py::handle i) {
             const u64 sample = sample_index(i);
             const r1::Draw draw = apart([&] { return plan.locate(sample); });
             return py::make_tuple(draw.source, draw.epoch, draw.window);
           })
      .def("locate_range", &locate_range)
      .def("locate_many", &locate_many)
      .def("counts",
           [](r1::Plan& plan, py::handle i) {
             const u64 sample = sample_index(i);
             return as_array(apart([&] { return plan.counts(sample); }));
           })
      .def("count",
           [](r1::Plan& plan, py::handle source, py::handle i) {
             const u64 k = source_number(source), sample = sample_index(i);
             return apart([&] { return plan.count(k, sample); });
           })
      // -1: the plan does not get there.
      .def("position",
           [](r1::Plan& plan, py::handle source, py::handle draw) {
             const u64 k = source_number(source);
             const u64 j = whole<std::out_of_range>(draw, "draws count from 0: a draw", 0, r1::NEVER);
             const u64 at = apart([&] { return plan.position(k, j); });
             return at == r1::NEVER ? i64{-1} : static_cast<i64>(at);
           })
      .def("bounds", [](r1::Plan& plan) { return as_array(apart([&] { return plan.bounds(); })); })
      .def("segment_starts", [](r1::Plan& plan) { return apart([&] { return plan.segment_starts(); }); })
      .def_property_readonly("bytes", [](r1::Plan& plan) { return apart([&] { return plan.bytes(); }); })
      .def("__reduce__", &refuse_copy);

  py::class_<r1::Streams>(m, "Streams")
      .def(py::init<>())
      .def(
          "add",
          [](r1::Streams& streams, const py::object& path, const py::object& width,
             const py::object& tokens) {
            const std::string name = r1::arguments::path(path);
            const int bytes = static_cast<int>(whole(width, "width", 2, 4));
            const u64 count = whole(tokens, "tokens", 0, r1::NEVER);
            apart([&] { streams.add(name, bytes, count); });
          },
          py::arg("path"), py::arg("width"), py::arg("tokens"))
      .def("gather", &gather)
      .def("whole_windows", &whole_windows)
      .def("will_need", &will_need)
      .def("__reduce__", &refuse_copy);

  m.def("megatron_order", &megatron_order);
  m.def("divergence_statistics", &statistics);
  m.def("divergence_gradient", &gradient);
  m.def("draw", &draw, py::arg("logits"), py::arg("size"), py::arg("inverse"), py::arg("uniform"),
        py::arg("draws"));
}
