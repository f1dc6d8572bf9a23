#include "route.h"

#include <cstring>
#include <stdexcept>

#include "cpu/runtime.h"

namespace fastres {
namespace {

TorchShims g_torch{};

void check(int32_t error) {
  if (error != 0) throw std::runtime_error("fastres: torch reports an error on a route");
}

void* data(const Tensor& t) {
  void* found = nullptr;
  check(g_torch.data_ptr(t.get(), &found));
  return found;
}

const int64_t* sizes(const Tensor& t) {
  int64_t* found = nullptr;
  check(g_torch.sizes(t.get(), &found));
  return found;
}

}  // namespace

const std::vector<const char*>& torch_shim_names() {
  static const std::vector<const char*> names{
      "aoti_torch_delete_tensor_object",
      "aoti_torch_get_data_ptr",
      "aoti_torch_get_sizes",
      "aoti_torch_empty_strided",
      "aoti_torch_cpu_mkldnn__convolution_pointwise",
      "aoti_torch_cpu_mkldnn__convolution_pointwise_binary",
      "aoti_torch_cpu_mkldnn__convolution_pointwise_binary_",
  };
  return names;
}

void set_torch_shims(const std::vector<uintptr_t>& addresses) {
  static_assert(sizeof(TorchShims) % sizeof(uintptr_t) == 0, "pointers only");
  if (addresses.size() * sizeof(uintptr_t) != sizeof(TorchShims)) {
    throw std::invalid_argument("set_torch_shims: one address for each of torch_shim_names()");
  }
  std::memcpy(&g_torch, addresses.data(), sizeof(TorchShims));
}

Tensor::~Tensor() {
  if (handle_ != nullptr) g_torch.delete_tensor(handle_);
}

void Route::add_stem(PackedConv conv, Bound bound, int kernel, int stride, int padding) {
  std::vector<PackedConv> convs;
  convs.push_back(std::move(conv));
  parts_.push_back({std::move(convs), bound, true, false, kernel, stride, padding});
}

void Route::add_block(std::vector<PackedConv> convs, Bound bound, bool projected) {
  if (convs.size() < (projected ? 2u : 1u)) {
    throw std::invalid_argument("Route: a block of no convolutions");
  }
  parts_.push_back({std::move(convs), bound, false, projected, 0, 0, 0});
}

Route::Result Route::run(Tensor x, double largest, int64_t threads) const {
  int64_t done = 0;
  bool own = false;
  for (const Part& p : parts_) {
    // as inference.admit: measured only when what is known does not do
    if (!(largest <= p.bound.safe)) largest = abs_max(x);
    if (!(largest <= p.bound.safe)) break;
    if (p.stem) {
      x = conv(p.convs.front(), x, true, threads);
      if (p.kernel > 0) x = max_pool(p, x);
    } else {
      const size_t main = p.convs.size() - (p.projected ? 1 : 0);
      Tensor shortcut, h;
      if (p.projected) shortcut = conv(p.convs.back(), x, false, threads);
      for (size_t i = 0; i + 1 < main; ++i) h = conv(p.convs[i], h ? h : x, true, threads);
      const PackedConv& last = p.convs[main - 1];
      if (p.projected) {
        conv_add_relu(last, h ? h : x, shortcut, shortcut, threads);
        x = std::move(shortcut);
      } else if (own) {
        conv_add_relu(last, h ? h : x, x, x, threads);
      } else {
        Tensor z;
        conv_add_relu(last, h ? h : x, x, z, threads);
        x = std::move(z);
      }
    }
    largest = p.bound.gain * largest + p.bound.shift;
    own = true;
    ++done;
  }
  return {std::move(x), largest, done};
}

double Route::abs_max(const Tensor& x) const {
  const int64_t* s = sizes(x);
  const int64_t count = s[0] * s[1] * s[2] * s[3];
  uint32_t bits = kernels().abs_max(data(x), dtype_, count);
  if (dtype_ != kF32) bits <<= 16;
  float found;
  std::memcpy(&found, &bits, sizeof(found));
  return found;
}

Tensor Route::empty(int64_t n, int64_t c, int64_t h, int64_t w) const {
  constexpr int32_t kFloat = 6, kBFloat16 = 15, kCPU = 0;  // c10::ScalarType, c10::DeviceType
  const int64_t shape[] = {n, c, h, w}, strides[] = {h * w * c, 1, w * c, c};
  TensorHandle found = nullptr;
  check(g_torch.empty_strided(4, shape, strides, dtype_ == kF32 ? kFloat : kBFloat16, kCPU, 0,
                              &found));
  return Tensor(found);
}

Tensor Route::conv(const PackedConv& c, const Tensor& x, bool relu, int64_t threads) const {
  if (c.channels > 0) {
    Tensor z;
    winograd(c, x, nullptr, relu, z, threads);
    return z;
  }
  TensorHandle bias = c.bias.get(), found = nullptr;
  const char* algorithm = "";
  check(g_torch.conv(x.get(), c.weight.get(), &bias, c.padding, 2, c.stride, 2, c.dilation, 2,
                     c.groups, relu ? "relu" : "none", nullptr, 0, &algorithm, &found));
  return Tensor(found);
}

void Route::conv_add_relu(const PackedConv& c, const Tensor& x, const Tensor& residual, Tensor& z,
                          int64_t threads) const {
  if (c.channels > 0) return winograd(c, x, &residual, true, z, threads);
  TensorHandle bias = c.add_bias.get(), found = nullptr;
  double alpha = 1;
  const char *relu = "relu", *algorithm = "";
  if (z) {
    check(g_torch.conv_binary_(residual.get(), x.get(), c.weight.get(), &bias, c.padding, 2,
                               c.stride, 2, c.dilation, 2, c.groups, "add", &alpha, &relu, nullptr,
                               0, &algorithm, &found));
    Tensor another_reference(found);
  } else {
    check(g_torch.conv_binary(x.get(), residual.get(), c.weight.get(), &bias, c.padding, 2,
                              c.stride, 2, c.dilation, 2, c.groups, "add", &alpha, &relu, nullptr,
                              0, &algorithm, &found));
    z = Tensor(found);
  }
}

void Route::winograd(const PackedConv& c, const Tensor& x, const Tensor* residual, bool relu,
                     Tensor& z, int64_t threads) const {
  const int64_t* s = sizes(x);
  const int64_t n = s[0], channels = s[1], h = s[2], w = s[3], padding = c.padding[0];
  const int64_t oh = h + 2 * padding - 2, ow = w + 2 * padding - 2;
  if (!z) z = empty(n, c.channels, oh, ow);
  const void* added = residual == nullptr ? nullptr : data(*residual);
  kernels().winograd_fprop({data(z),
                            data(x),
                            static_cast<const float*>(data(c.weight)),
                            {},
                            static_cast<const float*>(data(c.bias)),
                            added,
                            relu,
                            dtype_,
                            n,
                            h,
                            w,
                            channels,
                            c.channels,
                            padding,
                            oh,
                            ow,
                            threads});
}

Tensor Route::max_pool(const Part& p, const Tensor& x) const {
  const int64_t* s = sizes(x);
  const int64_t n = s[0], c = s[1], h = s[2], w = s[3];
  const int64_t oh = (h + 2 * p.padding - p.kernel) / p.stride + 1;
  const int64_t ow = (w + 2 * p.padding - p.kernel) / p.stride + 1;
  Tensor z = empty(n, c, oh, ow);
  kernels().max_pool(
      {data(z), data(x), dtype_, n, c, {h, w, oh, ow, p.kernel, p.stride, p.padding}});
  return z;
}

}  // namespace fastres
