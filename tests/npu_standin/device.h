// The simulated device: its memory, current index, stream and events. Everything is synchronous.
#pragma once

#include <ATen/ATen.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <chrono>
#include <cstdlib>
#include <mutex>
#include <set>

namespace {

using c10::Device, c10::DeviceIndex, c10::Storage;

constexpr auto NPU = c10::DeviceType::PrivateUse1;
constexpr int MOST = 16;  // devices

int number(const char* variable) { return std::atoi(std::getenv(variable) ? std::getenv(variable) : "0"); }
const DeviceIndex device_count = std::min(number("PCPVT_NPU_STANDIN_DEVICES"), MOST);

thread_local DeviceIndex current = 0;

// ---- memory --------------------------------------------------------------------------------------------------------

struct Usage {
  int64_t now = 0, peak = 0, allocations = 0;
} usage[MOST];
std::mutex lock;

void use(DeviceIndex device, int64_t bytes) {
  std::lock_guard<std::mutex> hold(lock);
  Usage& u = usage[device];
  u.now += bytes;
  u.peak = std::max(u.peak, u.now);
  u.allocations += bytes > 0;
}

// The context of every npu data pointer: the CPU storage that owns the memory.
struct Block {
  Storage host;
  DeviceIndex device;
  int64_t bytes;
  ~Block() { use(device, -bytes); }
};
void release(void* context) { delete static_cast<Block*>(context); }

c10::DataPtr as_npu_memory(const Storage& host, DeviceIndex device) {
  const auto bytes = static_cast<int64_t>(host.nbytes());
  use(device, bytes);
  return {host.mutable_data(), new Block{host, device, bytes}, &release, Device(NPU, device)};
}

const Storage& host_of(const Storage& npu) {
  TORCH_CHECK(npu.data_ptr().get_deleter() == &release, "npu stand-in: memory of unknown origin");
  return static_cast<Block*>(npu.data_ptr().get_context())->host;
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* cpu = c10::GetAllocator(c10::DeviceType::CPU);
    return as_npu_memory(Storage(Storage::use_byte_size_t(), bytes, cpu->allocate(bytes), cpu, true), current);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> hold(lock);
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* kind : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes}) {
      (*kind)[0].current = usage[device].now;
      (*kind)[0].peak = usage[device].peak;
    }
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override { usage[device].peak = usage[device].now; }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    const size_t total = size_t(64) << 30;
    return {total - usage[device].now, total};
  }
} allocator;
REGISTER_ALLOCATOR(NPU, &allocator);

// Pinned memory is host memory whose addresses are recorded for is_pinned().
struct PinnedAllocator final : c10::Allocator {
  inline static auto& live = *new std::set<const void*>;  // never destroyed: tensors may outlive main()
  static void drop(void* memory) {
    std::lock_guard<std::mutex> hold(lock);
    live.erase(memory);
    std::free(memory);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = std::aligned_alloc(64, (bytes / 64 + 1) * 64);
    std::lock_guard<std::mutex> hold(lock);
    live.insert(memory);
    return {memory, memory, &drop, Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} pinned;

// ---- current device; one stream per device, on which all work is done when a call returns --------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Clock = std::chrono::steady_clock;
  c10::DeviceType type() const override { return NPU; }
  DeviceIndex deviceCount() const noexcept override { return device_count; }
  Device getDevice() const override { return {NPU, current}; }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < device_count, "npu:", +device.index(), " of ", +device_count, " devices");
    uncheckedSetDevice(device);
  }
  Device exchangeDevice(Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device.has_index() ? device : getDevice());
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
  void record(void** event, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Clock::time_point;
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void destroyEvent(void* e, DeviceIndex) const noexcept override { delete static_cast<Clock::time_point*>(e); }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void* from, void* to, DeviceIndex) const override {
    const auto elapsed = *static_cast<Clock::time_point*>(to) - *static_cast<Clock::time_point*>(from);
    return std::chrono::duration<double, std::milli>(elapsed).count();
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { Guard().setDevice({NPU, device}); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  bool isPinnedPtr(const void* memory) const override {
    std::lock_guard<std::mutex> hold(lock);
    return PinnedAllocator::live.count(memory) > 0;
  }
};
const bool hooked = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

}  // namespace
