// CUDA's device guard and hooks, doing nothing: with them a CPU build of torch runs autograd on fake "cuda" tensors.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using namespace c10;
const Device kCard(DeviceType::CUDA, 0);

struct Guard final : public impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return kCard; }
  Device getDevice() const override { return kCard; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, kCard); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, kCard); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, kCard); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};

struct Hooks final : public at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
};

Guard guard;
std::unique_ptr<at::CUDAHooksInterface> make(at::CUDAHooksArgs args) { return std::make_unique<Hooks>(args); }
} // namespace

extern "C" void phantom_arm() {
  at::CUDAHooksRegistry()->Register("CUDAHooks", make);
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
}
