// Watch: whether Python modules and their tensors are still as they were when a decision was taken
// on them. fastres/_watch.py is the caller, and says what is watched and why.
//
// Every call of a converted model asks. Interpreted, one module costs 3 to 10 us, and several times
// that when a convolution has just thrown the interpreter out of the caches; here a module is some
// 60 pointers, compared in memory order.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace fastres {

namespace py = pybind11;

// Borrows everything: its owner in Python keeps the objects, and the values in their dicts, alive
// (and is seen by the garbage collector, which this is not). Needs the GIL.
class Watch {
 public:
  // objects: their type and the contents of their __dict__; dicts: their contents; tensors: their
  // version, storage, shape and strides, aliases[i] being the detached tensors[i].
  Watch(const py::list& objects, const py::list& dicts, const py::list& tensors,
        const py::list& aliases) {
    for (const py::handle o : objects) {
      const auto dict =
          py::reinterpret_steal<py::object>(PyObject_GenericGetDict(o.ptr(), nullptr));
      if (!dict) throw py::error_already_set();
      objects_.push_back({o.ptr(), Py_TYPE(o.ptr()), take(dict)});
    }
    for (const py::handle d : dicts) dicts_.push_back(take(d));
    for (size_t i = 0; i < tensors.size(); ++i) {
      const py::object tensor = tensors[i], alias = aliases[i];
      tensors_.push_back({tensor.ptr(), alias.ptr(), tensor.attr(version_).cast<int64_t>()});
    }
    for (const Object& o : objects_) {
      will_read(o.object, 64);
      will_read(o.contents);
    }
    for (const Dict& d : dicts_) will_read(d);
    for (const Tensor& t : tensors_) {
      for (const py::handle h : {t.tensor, t.alias}) {
        will_read(h.ptr(), 64);
        will_read(reinterpret_cast<void*>(h.attr("_cdata").cast<uintptr_t>()), kTensorImpl);
      }
    }
  }

  bool holds() const {
    for (const char* line : lines_) __builtin_prefetch(line, 0, 2);
    for (const Object& o : objects_) {
      if (Py_TYPE(o.object) != o.type) return false;
      PyObject* dict = PyObject_GenericGetDict(o.object, nullptr);
      if (dict == nullptr) throw py::error_already_set();
      Py_DECREF(dict);  // the object holds it
      if (dict != o.contents.dict || !same(o.contents)) return false;
    }
    for (const Dict& d : dicts_) {
      if (!same(d)) return false;
    }
    for (const Tensor& t : tensors_) {
      if (!same(t)) return false;
    }
    return true;
  }

 private:
  struct Item {
    PyObject *key, *value;
  };
  struct Dict {
    PyObject* dict;
    std::vector<Item> items;
  };
  struct Object {
    PyObject* object;
    PyTypeObject* type;
    Dict contents;
  };
  struct Tensor {
    PyObject *tensor, *alias;
    int64_t version;
  };

  static Dict take(py::handle dict) {
    if (!PyDict_Check(dict.ptr())) throw py::type_error("Watch: a dict is expected");
    Dict found{dict.ptr(), {}};
    Item item;
    Py_ssize_t at = 0;
    while (PyDict_Next(dict.ptr(), &at, &item.key, &item.value)) found.items.push_back(item);
    return found;
  }

  // A key that was taken out and put back moves to the end: seen, though nothing changed.
  static bool same(const Dict& d) {
    if (PyDict_Size(d.dict) != static_cast<Py_ssize_t>(d.items.size())) return false;
    Py_ssize_t at = 0;
    PyObject *key, *value;
    for (const Item& item : d.items) {
      if (!PyDict_Next(d.dict, &at, &key, &value)) return false;
      if (value != item.value || key != item.key) return false;
    }
    return true;
  }

  void will_read(const void* data, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 64) lines_.push_back(static_cast<const char*>(data) + at);
  }

  void will_read(const Dict& d) {
    will_read(d.dict, 64);
    const void* table = reinterpret_cast<const PyDictObject*>(d.dict)->ma_keys;
    will_read(table, 64 + 26 * d.items.size());  // about: hash table, then keys and values
  }

  bool same(const Tensor& t) const {
    const auto version =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(t.tensor, version_.ptr()));
    if (!version) {  // swapped for an inference tensor, which has no version
      PyErr_Clear();
      return false;
    }
    if (PyLong_AsLongLong(version.ptr()) != t.version) return false;
    const auto set = py::reinterpret_steal<py::object>(
        PyObject_CallMethodObjArgs(t.tensor, is_set_to_.ptr(), t.alias, nullptr));
    if (!set) throw py::error_already_set();
    return set.ptr() == Py_True;
  }

  std::vector<Object> objects_;
  std::vector<Dict> dicts_;
  std::vector<Tensor> tensors_;
  // Where all that lies: between two calls the convolutions throw it out of the caches, and
  // followed pointer by pointer it takes 360 us to come back (ResNet-50, batch 1); asked for ahead,
  // 240 to 330. A line that was freed meanwhile is a wasted prefetch, no more.
  std::vector<const char*> lines_;
  static constexpr size_t kTensorImpl = 192;  // bytes that is_set_to reads of a c10::TensorImpl
  py::str version_{"_version"}, is_set_to_{"is_set_to"};
};

}  // namespace fastres
