// What Python hands over, as the numbers and arrays that are meant, or an exception that says what is wrong.
//
// No value changes on the way: 1.5 is no whole number, and 2^40 no int32. Arrays come back aligned,
// contiguous and in this machine's byte order. Whoever reads one without the GIL copies it first, because
// other threads may write to it.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "integer.hpp"

namespace r1::arguments {

namespace py = pybind11;

template <class T>
using Array =
    py::array_t<T, py::array::c_style | py::array::forcecast | py::detail::npy_api::NPY_ARRAY_ALIGNED_>;

// The name of a value's type; class names have no limit.
inline std::string type_of(py::handle value) {
  return std::string(Py_TYPE(value.ptr())->tp_name).substr(0, 80);
}

// A Python int. Throws TypeError for what is none: text, 1.5, and 1.0 as well.
inline py::object integer(py::handle value, const char* name) {
  if (PyLong_CheckExact(value.ptr())) return py::reinterpret_borrow<py::object>(value);
  py::object number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (number) return number;
  if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
  PyErr_Clear();
  throw py::type_error(std::string(name) + " must be a whole number, not " + type_of(value));
}

// A whole number in [least, most]. Throws TypeError, and `Outside` for a number outside.
template <class Outside = std::invalid_argument>
u64 whole(py::handle value, const char* name, u64 least, u64 most) {
  const py::object number = integer(value, name);
  int overflow;
  const i64 small = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  u64 got = static_cast<u64>(small);
  bool fits = overflow == 0 && small >= 0;
  if (overflow > 0) {
    got = PyLong_AsUnsignedLongLong(number.ptr());
    fits = !PyErr_Occurred();
    PyErr_Clear();
  }
  if (fits && got >= least && got <= most) return got;
  throw Outside(std::string(name) + " must be from " + std::to_string(least) + " to " + std::to_string(most) +
                ", got " +
                (fits            ? std::to_string(got)
                 : overflow > 0  ? "2^64 or more"
                 : overflow == 0 ? std::to_string(small)
                                 : "less than -2^63"));
}

// A whole number; the largest one in place of any that does not fit.
inline i64 saturated(py::handle value, const char* name) {
  int overflow;
  const i64 got = PyLong_AsLongLongAndOverflow(integer(value, name).ptr(), &overflow);
  return overflow ? std::numeric_limits<i64>::max() : got;
}

inline bool flag(py::handle value, const char* name) {
  py::detail::make_caster<bool> caster;
  if (!caster.load(value, false))
    throw py::type_error(std::string(name) + " must be a bool, not " + type_of(value));
  return static_cast<bool>(caster);
}

template <class T, class From>
Array<T> checked(const py::array& values, const char* name) {
  const Array<From> from(values);
  Array<T> to(from.size());
  for (py::ssize_t n = 0; n < from.size(); ++n) {
    const From value = from.data()[n];
    const bool fits = value < 0
                          ? std::numeric_limits<T>::is_signed &&
                                static_cast<i64>(value) >= static_cast<i64>(std::numeric_limits<T>::min())
                          : static_cast<u64>(value) <= static_cast<u64>(std::numeric_limits<T>::max());
    if (!fits) {
      throw std::invalid_argument(std::string(name) + ": entry " + std::to_string(n) + " is " +
                                  std::to_string(value) + ", which a " + std::to_string(8 * sizeof(T)) +
                                  "-bit " + (std::numeric_limits<T>::is_signed ? "" : "unsigned ") +
                                  "number cannot be");
    }
    to.mutable_data()[n] = static_cast<T>(value);
  }
  return to;
}

// A one-dimensional array of T: whole numbers of any type for a whole T, of at most 64 bits; for a double
// floating point of at most 64 bits. An empty one may be of any type. Throws TypeError, ValueError.
template <class T>
Array<T> array(const py::object& values, const char* name) {
  const py::array any(values);
  if (any.ndim() != 1) {
    throw std::invalid_argument(std::string(name) + " must be one-dimensional, got " +
                                std::to_string(any.ndim()) + " dimensions");
  }
  if (any.size() == 0) return Array<T>(0);
  const char kind = any.dtype().kind();
  constexpr bool whole = std::numeric_limits<T>::is_integer;
  if constexpr (whole) {
    const char own = std::numeric_limits<T>::is_signed ? 'i' : 'u';
    if (kind == own && any.itemsize() <= static_cast<py::ssize_t>(sizeof(T))) return Array<T>(any);
    if (kind == 'i') return checked<T, i64>(any, name);
    if (kind == 'u') return checked<T, u64>(any, name);
  } else if (kind == 'f' && any.itemsize() <= static_cast<py::ssize_t>(sizeof(T))) {
    return Array<T>(any);
  }
  throw py::type_error(std::string(name) + " must be an array of " +
                       (whole ? "whole numbers" : "floating point") + ", not of " +
                       std::string(py::str(any.dtype())).substr(0, 80));
}

template <class T>
std::vector<T> vector(const py::object& values, const char* name) {
  const Array<T> from = array<T>(values, name);
  return std::vector<T>(from.data(), from.data() + from.size());
}

// A path as the system takes it: text, bytes or os.PathLike.
inline std::string path(const py::object& value) {
  PyObject* bytes;
  if (!PyUnicode_FSConverter(value.ptr(), &bytes)) throw py::error_already_set();
  const py::bytes owned = py::reinterpret_steal<py::bytes>(bytes);
  return std::string(owned);
}

// A message, which may quote a path that is not UTF-8.
inline py::object text(const char* message) {
  return py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(message));
}

// An object whose constructor has run: `T.__new__(T)` makes one whose memory holds nothing.
template <class T>
class Made : public py::detail::type_caster_base<T> {
  using Base = py::detail::type_caster_base<T>;

 public:
  using Base::Base;
  bool load(py::handle source, bool convert) {
    if (source && PyObject_TypeCheck(source.ptr(), this->typeinfo->type)) {
      auto* const instance = reinterpret_cast<py::detail::instance*>(source.ptr());
      if (!instance->get_value_and_holder(this->typeinfo).holder_constructed()) {
        throw py::type_error("this " + type_of(source) + " was not made: its __init__ has not run");
      }
    }
    return Base::load(source, convert);
  }
};

}  // namespace r1::arguments
