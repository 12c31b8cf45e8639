// A simulated `npu` device, so that the NPU code of pcpvt runs on machines without one (see __init__.py).
//
// It owns ordinary host memory under torch's PrivateUse1 device type (device.h). An operator on npu tensors runs the
// CPU's kernel on CPU tensors that share this memory, so results equal the CPU's bit for bit, while device types,
// placement checks and dispatch are those of another device.
#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/library.h>

#include <numeric>

namespace {

using at::Tensor, c10::DispatchKey, c10::IValue, c10::OperatorHandle, torch::jit::Stack;

const c10::DispatchKeySet ON_CPU(DispatchKey::CPU), ON_NPU(DispatchKey::PrivateUse1);
const bool is_910a = number("PCPVT_NPU_STANDIN_910A");  // no bfloat16, and float16 saturates on overflow
bool overflow[MOST];                                    // the vendor's sticky flag, per device

void check_dtype(at::ScalarType dtype) {
  TORCH_CHECK(dtype != at::kDouble, "npu stand-in: float64 is not supported on NPUs");
  TORCH_CHECK(!is_910a || dtype != at::kBFloat16, "npu stand-in: bfloat16 is not supported on Ascend910A");
}

// float16 results of a 910A have no inf and no nan; the overflow flag is set instead.
void saturate(Tensor host, DeviceIndex device) {
  if (!host.defined() || host.scalar_type() != at::kHalf || at::isfinite(host).all().item<bool>()) return;
  overflow[device] = true;
  at::nan_to_num_(host, 0.0, 65504.0, -65504.0);
}

// One operator call: maps its npu tensors to CPU tensors on the same memory, and results back.
struct Call {
  const OperatorHandle& op;
  std::vector<std::pair<Tensor, Tensor>> known;           // npu, cpu
  std::vector<std::pair<const void*, Storage>> storages;  // cpu's, npu's
  std::optional<Device> device;
  bool cpu_beside = false;

  bool is(const std::set<std::string>& names) const { return names.count(op.operator_name().name); }
  DeviceIndex index() const { return device ? device->index() : current; }

  Tensor to_cpu(const Tensor& t) {
    if (!t.defined() || !t.is_privateuseone()) {
      cpu_beside |= t.defined() && t.dim() > 0;  // 0-d CPU tensors count as numbers, which every device accepts
      return t;
    }
    TORCH_CHECK(!device || *device == t.device() || is({"aten::copy_"}),
        "Expected all tensors to be on the same device, but found ", *device, " and ", t.device());
    device = t.device();
    for (auto& [npu, cpu] : known)
      if (npu.is_same(t)) return cpu;
    Storage host = host_of(t.storage());
    storages.emplace_back(host.unsafeGetStorageImpl(), t.storage());
    auto cpu = at::detail::make_tensor<c10::TensorImpl>(std::move(host), ON_CPU, t.dtype());
    cpu.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) cpu.unsafeGetTensorImpl()->set_wrapped_number(true);
    known.emplace_back(t, cpu);
    return cpu;
  }

  Tensor to_npu(const Tensor& cpu) {
    if (!cpu.defined()) return cpu;
    for (auto& [npu, alias] : known)
      if (alias.is_same(cpu)) return npu;
    check_dtype(cpu.scalar_type());
    const Storage& host = cpu.storage();
    Storage mine;
    for (auto& [key, storage] : storages)
      if (key == host.unsafeGetStorageImpl()) mine = storage;  // a view of an argument
    if (!mine) {
      mine = Storage(Storage::use_byte_size_t(), host.nbytes(), as_npu_memory(host, index()), &allocator, true);
      storages.emplace_back(host.unsafeGetStorageImpl(), mine);
    }
    auto t = at::detail::make_tensor<c10::TensorImpl>(std::move(mine), ON_NPU, cpu.dtype());
    t.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    return t;
  }

  // Kernels may resize their outputs, and so allocate more memory (resize_, out=).
  void take_over_changes() {
    for (auto& [npu, cpu] : known) {
      const Storage &mine = npu.storage(), &host = cpu.storage();
      if (mine.data() != host.data() || mine.nbytes() != host.nbytes()) {
        mine.set_data_ptr_noswap(as_npu_memory(host, npu.device().index()));
        mine.unsafeGetStorageImpl()->set_nbytes(host.nbytes());
      }
      if (npu.sizes() != cpu.sizes() || npu.strides() != cpu.strides())
        npu.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }
};

template <class F>
IValue map_tensors(const IValue& value, const F& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    std::vector<Tensor> mapped;
    for (const Tensor& t : value.toTensorVector()) mapped.push_back(f(t));
    return mapped;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> mapped;
    for (const std::optional<Tensor> t : value.toOptionalTensorList())
      mapped.push_back(t ? std::optional<Tensor>(f(*t)) : std::nullopt);
    return mapped;
  }
  return value;
}

void run_on_cpu(const OperatorHandle& op, Stack* stack) {
  const auto &arguments = op.schema().arguments(), &returns = op.schema().returns();
  const auto& name = op.operator_name().name;
  Call call{op};
  const bool draws = op.hasTag(at::Tag::nondeterministic_seeded);
  TORCH_CHECK(!draws || call.is({"aten::_scaled_dot_product_flash_attention_for_cpu"}), "npu stand-in: ", name,
      ": there are no random numbers on this device; draw on the host");
  const size_t first = stack->size() - arguments.size();
  for (size_t i = first; i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    if (value.isDevice() && value.toDevice().type() == NPU) {
      call.device = Guard().getStream(value.toDevice()).device();
      value = Device(c10::DeviceType::CPU);
    } else {
      value = map_tensors(value, [&](const Tensor& t) { return call.to_cpu(t); });
    }
  }
  const bool may_mix = call.is({"aten::copy_", "aten::_foreach_copy_", "aten::index", "aten::_index_put_impl_"});
  TORCH_CHECK(!call.cpu_beside || !call.device || may_mix,
      "Expected all tensors to be on the same device, but found npu and cpu (", name, ")");

  std::vector<Tensor> computed;  // tensors whose values the kernel computes; copies are not among them
  const auto note = [&](const Tensor& t) { return computed.push_back(t), t; };
  const auto dtype = [&](size_t i) { return (*stack)[first + i].toTensor().scalar_type(); };
  const bool moves = call.is({"aten::resize_"}) || (call.is({"aten::copy_"}) && dtype(0) == dtype(1));
  for (size_t i = 0; i < arguments.size(); i++)
    if (auto* alias = arguments[i].alias_info(); alias && alias->isWrite()) map_tensors((*stack)[first + i], note);

  op.redispatchBoxed(ON_CPU, stack);

  for (size_t i = 0; i < returns.size(); i++)
    if (!returns[i].alias_info()) map_tensors((*stack)[first + i], note);
  if (is_910a && !moves)
    for (const Tensor& t : computed) saturate(t, call.index());
  call.take_over_changes();
  for (size_t i = 0; i < returns.size(); i++)
    (*stack)[first + i] = map_tensors((*stack)[first + i], [&](const Tensor& t) { return call.to_npu(t); });
}

using Dtype = std::optional<at::ScalarType>;
using Format = std::optional<at::MemoryFormat>;

Tensor empty(at::IntArrayRef size, Dtype dtype, std::optional<at::Layout>, std::optional<Device> device,
    std::optional<bool>, Format format) {
  check_dtype(c10::dtype_or_default(dtype));
  TORCH_CHECK(format != at::MemoryFormat::ChannelsLast, "npu stand-in: channels_last is not supported on NPUs");
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, &allocator, ON_NPU, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Dtype dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>) {
  check_dtype(c10::dtype_or_default(dtype));
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &allocator, ON_NPU, c10::dtype_or_default(dtype));
}

// ---- what the real device refuses ----------------------------------------------------------------------------------

void no_kernel(const OperatorHandle& op, Stack*) {
  TORCH_CHECK(false, "npu stand-in: ", op.operator_name(), " has no NPU kernel");
}

// torch_npu's kernel accepts these two arguments and ignores them (op-plugin, FusedAdamWKernelNpuOpApi.cpp).
void fused_adamw(const OperatorHandle& op, Stack* stack) {
  TORCH_CHECK(torch::jit::peek(*stack, 0, 2).isNone() && torch::jit::peek(*stack, 1, 2).isNone(),
      "npu stand-in: _fused_adamw_ ignores grad_scale and found_inf on NPUs");
  run_on_cpu(op, stack);
}

// torch_npu replaces these composite operators above autograd with code that reads its inputs' storage. The wrappers
// of torch.func have none, and reading it raises "Cannot access storage of TensorWrapper", as on the real device.
void reads_storage(const OperatorHandle& op, Stack* stack) {
  for (const IValue& value : torch::jit::last(*stack, op.schema().arguments().size()))
    if (value.isTensor() && value.toTensor().is_privateuseone()) (void)value.toTensor().storage();
  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::AutogradCPU), stack);  // the composition itself
}

// F.gelu is the tanh form on NPUs although its argument says "none". The argument's other value, which F.gelu is not
// called with, stands for npu_gelu's exact form here: a third value would be refused when a graph is captured.
void swapped_gelu(const OperatorHandle& op, Stack* stack) {
  IValue& approximate = stack->back();
  approximate = std::string(approximate.toStringRef() == "none" ? "tanh" : "none");
  run_on_cpu(op, stack);
}

template <auto* kernel>
void implement(torch::Library& library, const std::set<std::string>& names) {
  for (const auto& name : names) library.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<kernel>());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("record_stream", [](Tensor&, c10::Stream) {});
  implement<&fused_adamw>(m, {"aten::_fused_adamw_"});
  implement<&swapped_gelu>(m, {"aten::gelu", "aten::gelu_", "aten::gelu_backward"});
  const std::set<std::string> refused{"aten::_foreach_add.Tensor", "aten::_foreach_add_.Tensor",
      "aten::_foreach_mul.Tensor", "aten::_foreach_mul_.Tensor", "aten::_foreach_div.Tensor",
      "aten::_foreach_div_.Tensor", "aten::_foreach_lerp.ScalarList", "aten::_foreach_lerp_.ScalarList",
      "aten::_foreach_max", "aten::_fused_adamw_.tensor_lr"};
  implement<&no_kernel>(m, refused);
  // Generic compositions, which may round differently, take precedence over the fallback: register all CPU operators.
  std::set<std::string> rest{"aten::copy_", "aten::convolution", "aten::convolution_backward"};
  for (const auto& name : c10::Dispatcher::singleton().getRegistrationsForDispatchKey(DispatchKey::CPU))
    if (name.name.rfind("aten::", 0) == 0) rest.insert(c10::toString(name));
  for (auto* own : {"empty.memory_format", "empty_strided", "record_stream", "_fused_adamw_", "gelu", "gelu_", "gelu_backward"})
    rest.erase(std::string("aten::") + own);
  for (const auto& name : refused) rest.erase(name);
  implement<&run_on_cpu>(m, rest);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  implement<&reads_storage>(m, {"scaled_dot_product_attention", "softmax.int", "adaptive_avg_pool2d", "one_hot",
      "argsort", "argsort.stable", "log_sigmoid"});
}

// ---- hccl: gloo on the same memory ---------------------------------------------------------------------------------

struct Hccl final : c10d::Backend {
  using Work = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<Tensor>;
  c10::intrusive_ptr<c10d::Backend> gloo;
  explicit Hccl(const c10::intrusive_ptr<c10d::Backend>& g) : Backend(g->getRank(), g->getSize()), gloo(g) {}
  const std::string getBackendName() const override { return "hccl"; }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo->setTimeout(timeout); }
  void setSequenceNumberForGroup() override { gloo->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return gloo->getSequenceNumberForGroup(); }

  static Tensor cpu(const Tensor& t) {
    TORCH_CHECK(t.is_privateuseone(), "hccl takes npu tensors only, and this one is on ", t.device());
    static const auto any = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
    return Call{any}.to_cpu(t);
  }
  template <class T>
  static std::vector<T> cpu(const std::vector<T>& list) {
    std::vector<T> mapped;
    for (const T& t : list) mapped.push_back(cpu(t));
    return mapped;
  }
#define ONE(name, T, Options) \
  Work name(T& t, const c10d::Options& o) override { auto x = cpu(t); return gloo->name(x, o); }
#define TWO(name, To, From, Options) \
  Work name(To& to, From& from, const c10d::Options& o) override { \
    auto x = cpu(to); auto y = cpu(from); return gloo->name(x, y, o); }
  ONE(broadcast, Tensors, BroadcastOptions)
  ONE(allreduce, Tensors, AllreduceOptions)
  ONE(reduce, Tensors, ReduceOptions)
  TWO(allgather, std::vector<Tensors>, Tensors, AllgatherOptions)
  TWO(_allgather_base, Tensor, Tensor, AllgatherOptions)
  TWO(_reduce_scatter_base, Tensor, Tensor, ReduceScatterOptions)
  Work barrier(const c10d::BarrierOptions& o) override { return gloo->barrier(o); }
};

TORCH_LIBRARY(npu_standin, m) {
  using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
  // The group comes with gloo for cpu tensors and gets hccl for npu tensors.
  m.def("add_hccl(__torch__.torch.classes.c10d.ProcessGroup group) -> ()", [](const Group& group) {
    auto hccl = c10::make_intrusive<Hccl>(group->getBackend(c10::DeviceType::CPU));
    group->setBackend(NPU, c10d::ProcessGroup::BackendType::CUSTOM, hccl);
  });
  m.def("overflow() -> bool", []() { return overflow[current]; });
  m.def("set_overflow(bool raised) -> ()", [](bool raised) { overflow[current] = raised; });
  m.def("allocations() -> int", []() {
    const auto add = [](int64_t sum, const Usage& u) { return sum + u.allocations; };
    return std::accumulate(usage, usage + MOST, int64_t(0), add);
  });
}

}  // namespace
