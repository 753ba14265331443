// A device guard and hooks for CUDA that do nothing. Autograd asks them which device it is on, for fake CUDA tensors as
// for real ones, and a build of torch without CUDA has none: it would abort with "not linked with support for cuda".
#include <ATen/ATen.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto kCUDA = c10::DeviceType::CUDA;

c10::Stream default_stream() {
  return c10::Stream(c10::Stream::DEFAULT, c10::Device(kCUDA, 0));
}

struct Guard final : public c10::impl::NoOpDeviceGuardImpl<kCUDA> {
  c10::Device getDevice() const override { return c10::Device(kCUDA, 0); }
  c10::Device exchangeDevice(c10::Device) const override { return c10::Device(kCUDA, 0); }
  c10::Stream getStream(c10::Device) const noexcept override { return default_stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return default_stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return default_stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

c10::impl::DeviceGuardImplRegistrar registrar(kCUDA, new Guard());

struct Hooks final : public at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
};

}  // namespace

namespace at {
// preferred to those inside a build with CUDA, which would ask the driver
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, Hooks)
}
