// What PyTorch asks of CUDA before it computes anything, for a PyTorch without it: that it is there, and which device is current.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

#include <new>

namespace {
struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

constexpr auto kCUDA = c10::DeviceType::CUDA;
using Guard = c10::impl::FakeGuardImpl<kCUDA>;
const Guard guard;
auto& registered = c10::impl::device_guard_impl_registry[static_cast<size_t>(kCUDA)];
const auto* const previous = registered.load();

// PyTorch makes its hooks once, and keeps them.
template <typename T>
void replace_hooks() {
  static_assert(sizeof(T) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) T;
}
} // namespace

extern "C" {
void install() {
  registered.store(&guard);
  replace_hooks<Hooks>();
}

void uninstall() {
  replace_hooks<at::CUDAHooksInterface>();
  registered.store(previous);
}

int current_device() {
  return guard.getDevice().index();
}

int exchange_device(int index) {
  return index < 0 ? -1 : guard.exchangeDevice(c10::Device(kCUDA, static_cast<c10::DeviceIndex>(index))).index();
}
}
