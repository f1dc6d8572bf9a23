// Route: CPU inference of a network's folded convolutions, one after the other, in one call.
// fastres/_route.py is the caller, and says when a network may run so.
//
// The convolutions are those that Python would call, oneDNN's by torch and Winograd's here. From
// Python each costs some 20 us beside its work, which a ResNet-50 on one image has 53 times.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace fastres {

// torch's tensors and CPU functions as libtorch_cpu exports them for AOTInductor's programs: plain
// C, kept stable from release to release (torch/csrc/inductor/aoti_torch/c/shim.h and shim_cpu.h).
// Nonzero means an error, which torch 2.11 also writes to its log. Results are new references.
struct AtenTensorOpaque;
using TensorHandle = AtenTensorOpaque*;

struct TorchShims {
  int32_t (*delete_tensor)(TensorHandle);
  int32_t (*data_ptr)(TensorHandle, void**);
  int32_t (*sizes)(TensorHandle, int64_t**);
  int32_t (*empty_strided)(int64_t dims, const int64_t* sizes, const int64_t* strides,
                           int32_t dtype, int32_t device_type, int32_t device, TensorHandle*);
  int32_t (*conv)(TensorHandle x, TensorHandle w, TensorHandle* bias, const int64_t* padding,
                  int64_t, const int64_t* stride, int64_t, const int64_t* dilation, int64_t,
                  int64_t groups, const char* attr, const double** scalars, int64_t,
                  const char** algorithm, TensorHandle*);
  int32_t (*conv_binary)(TensorHandle x, TensorHandle other, TensorHandle w, TensorHandle* bias,
                         const int64_t* padding, int64_t, const int64_t* stride, int64_t,
                         const int64_t* dilation, int64_t, int64_t groups, const char* binary,
                         double* alpha, const char** unary, const double** scalars, int64_t,
                         const char** algorithm, TensorHandle*);
  int32_t (*conv_binary_)(TensorHandle other, TensorHandle x, TensorHandle w, TensorHandle* bias,
                          const int64_t* padding, int64_t, const int64_t* stride, int64_t,
                          const int64_t* dilation, int64_t, int64_t groups, const char* binary,
                          double* alpha, const char** unary, const double** scalars, int64_t,
                          const char** algorithm, TensorHandle*);
};

// Their names, in the order of TorchShims' members, and where they are found: all or none.
const std::vector<const char*>& torch_shim_names();
void set_torch_shims(const std::vector<uintptr_t>& addresses);

class Tensor {  // owns one reference
 public:
  Tensor() = default;
  explicit Tensor(TensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor();
  explicit operator bool() const { return handle_ != nullptr; }
  TensorHandle get() const { return handle_; }
  TensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  TensorHandle handle_ = nullptr;
};

// inference.Packed. channels: of a Winograd convolution's result, 0 for oneDNN's.
struct PackedConv {
  Tensor weight, bias, add_bias;
  int64_t padding[2], stride[2], dilation[2], groups, channels;
};

// |z| <= gain * |x| + shift for |x| <= safe: inference.Bound.
struct Bound {
  double gain, shift, safe;
};

class Route {
 public:
  explicit Route(int dtype) : dtype_(dtype) {}

  // z = maxpool(relu(conv(x))), kernel = 0: without the pool
  void add_stem(PackedConv conv, Bound bound, int kernel, int stride, int padding);
  // z = relu(conv_K(... relu(conv_1(x))) + s), s = x or, `projected`, the last of convs of x
  void add_block(std::vector<PackedConv> convs, Bound bound, bool projected);

  struct Result {
    Tensor z;
    double largest;  // a bound of |z|
    int64_t done;    // parts that ran: fewer than all where the next one's input is too large
  };
  // x is NHWC, dense, and not written to. largest: a bound of |x|, NaN when it is unknown. Throws
  // where torch reports an error; the caller's own way of running all this then says which.
  Result run(Tensor x, double largest, int64_t threads) const;

 private:
  struct Part {
    std::vector<PackedConv> convs;
    Bound bound;
    bool stem, projected;
    int kernel, stride, padding;
  };
  double abs_max(const Tensor& x) const;
  Tensor empty(int64_t n, int64_t c, int64_t h, int64_t w) const;
  Tensor conv(const PackedConv& c, const Tensor& x, bool relu, int64_t threads) const;
  // z: the residual itself, to be written over, or empty
  void conv_add_relu(const PackedConv& c, const Tensor& x, const Tensor& residual, Tensor& z,
                     int64_t threads) const;
  void winograd(const PackedConv& c, const Tensor& x, const Tensor* residual, bool relu, Tensor& z,
                int64_t threads) const;
  Tensor max_pool(const Part& p, const Tensor& x) const;

  std::vector<Part> parts_;
  int dtype_;
};

}  // namespace fastres
