// A checked, typed view of an array that speaks DLPack (numpy, torch, cupy): dtype, device, rank, dims, contiguity.
// Needs no numpy or torch header. Errors read "name: what got G, wanted W".
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace vcr1 {

namespace py = pybind11;

// The part of the DLPack 0.x ABI that we read (github.com/dmlc/dlpack, dlpack.h). Producers hand out this layout, in a
// capsule named "dltensor", whenever `__dlpack__` is called without max_version.
struct DLDevice {
  int32_t type;  // 1 CPU, 2 CUDA
  int32_t id;
};
struct DLDataType {
  uint8_t code;  // 0 signed integer, 2 float
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means contiguous
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* manager;
  void (*deleter)(DLManagedTensor*);
};

constexpr int32_t kCpu = 1;
constexpr int32_t kCuda = 2;
constexpr int64_t kAnyDim = -1;

template <typename T>
struct DType;
template <>
struct DType<double> {
  static constexpr uint8_t code = 2;
  static constexpr const char* name = "float64";
};
template <>
struct DType<int64_t> {
  static constexpr uint8_t code = 0;
  static constexpr const char* name = "int64";
};

[[noreturn]] inline void fail(const std::string& name, const std::string& what, const std::string& got,
                              const std::string& wanted) {
  throw py::value_error(name + ": " + what + " got " + got + ", wanted " + wanted);
}

inline std::string device_name(int32_t type) {
  return type == kCpu ? "cpu" : type == kCuda ? "cuda" : "DLPack device type " + std::to_string(type);
}

inline std::string dtype_name(DLDataType dtype) {
  static const char* const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  const char* kind = dtype.code < 7 ? kinds[dtype.code] : "unknown";
  return kind + std::to_string(dtype.bits);
}

// Owns the exported tensor until it goes out of scope. Make and destroy it with the GIL held; data() may be used
// without.
template <typename T>
class TensorView {
 public:
  // dims: the wanted shape, kAnyDim where any length will do. device: kCpu or kCuda. stream: the CUDA stream (as an
  // integer) on which the data must be ready; ignored on CPU.
  TensorView(const char* name, const py::object& array, std::initializer_list<int64_t> dims, int32_t device,
             int64_t stream = 0)
      : name_(name) {
    if (!py::hasattr(array, "__dlpack__") || !py::hasattr(array, "__dlpack_device__")) {
      throw py::type_error(name_ + ": type got " + std::string(py::str(py::type::of(array).attr("__name__"))) +
                           ", wanted an array with __dlpack__ (numpy or torch)");
    }
    const int32_t got_device = array.attr("__dlpack_device__")().cast<py::tuple>()[0].cast<int32_t>();
    if (got_device != device) fail(name_, "device", device_name(got_device), device_name(device));
    capsule_ = device == kCuda ? array.attr("__dlpack__")(py::arg("stream") = stream) : array.attr("__dlpack__")();
    managed_ = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
    if (managed_ == nullptr) throw py::error_already_set();
    check(dims);  // if this throws, the capsule still owns the tensor and frees it
    PyCapsule_SetName(capsule_.ptr(), "used_dltensor");
  }
  ~TensorView() {
    if (managed_->deleter != nullptr) managed_->deleter(managed_);
  }
  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;

  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(managed_->tensor.data) + managed_->tensor.byte_offset);
  }
  int64_t dim(int axis) const { return managed_->tensor.shape[axis]; }
  int32_t device_id() const { return managed_->tensor.device.id; }

 private:
  void check(std::initializer_list<int64_t> dims) const {
    const DLTensor& tensor = managed_->tensor;
    const DLDataType dtype = tensor.dtype;
    if (dtype.code != DType<T>::code || dtype.bits != 8 * sizeof(T) || dtype.lanes != 1) {
      fail(name_, "dtype", dtype_name(dtype), DType<T>::name);
    }
    const auto rank = static_cast<int32_t>(dims.size());
    if (tensor.ndim != rank) fail(name_, "rank", std::to_string(tensor.ndim), std::to_string(rank));
    bool is_empty = false;
    for (int axis = 0; axis < rank; ++axis) is_empty = is_empty || tensor.shape[axis] == 0;
    int64_t stride = 1;
    for (int axis = rank - 1; axis >= 0; --axis) {
      const int64_t got = tensor.shape[axis], wanted = dims.begin()[axis];
      const std::string where = " " + std::to_string(axis);
      if (wanted != kAnyDim && got != wanted) fail(name_, "dim" + where, std::to_string(got), std::to_string(wanted));
      // a dim that is never stepped over may be reported with any stride
      if (tensor.strides != nullptr && !is_empty && got > 1 && tensor.strides[axis] != stride) {
        fail(name_, "stride" + where, std::to_string(tensor.strides[axis]), std::to_string(stride) + " (contiguous)");
      }
      stride *= got;
    }
  }

  std::string name_;
  py::object capsule_;
  DLManagedTensor* managed_ = nullptr;
};

}  // namespace vcr1
