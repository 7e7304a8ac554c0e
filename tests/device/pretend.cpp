// A CUDA device that is host memory, for a torch without CUDA. Each operator runs its CPU kernel on the very
// bytes, but tensors of two devices meet only where CUDA lets them (pretend.py says where).

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <unordered_set>

using at::Tensor;
using c10::DataPtr, c10::Device, c10::DeviceIndex, c10::DispatchKey, c10::Storage, c10::Stream;
constexpr auto CUDA = c10::DeviceType::CUDA;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  static Stream only() { return Stream(Stream::DEFAULT, Device(CUDA, 0)); }
  Device exchangeDevice(Device) const override { return Device(CUDA, 0); }
  Device getDevice() const override { return Device(CUDA, 0); }
  Stream getStream(Device) const noexcept override { return only(); }
  Stream getNewStream(Device, int) const override { return only(); }
  Stream exchangeStream(Stream) const noexcept override { return only(); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(DeviceIndex) const override {}
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

static std::atomic<int64_t> used{0}, most{0};

struct Held {
  DataPtr host;
  int64_t bytes;
};

struct Memory final : c10::Allocator {
  DataPtr allocate(size_t bytes) override { return taken(c10::GetCPUAllocator()->allocate(bytes), bytes); }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
  static DataPtr taken(DataPtr host, int64_t bytes) {
    auto* held = new Held{std::move(host), bytes};
    most = std::max<int64_t>(most, used += bytes);
    return {held->host.get(), held, &give_back, Device(CUDA, 0)};
  }
  static void give_back(void* held) {
    used -= static_cast<Held*>(held)->bytes;
    delete static_cast<Held*>(held);
  }
};
static Memory memory;
static std::unordered_set<std::string> mixing, missing;

static Tensor made(Storage storage, const Tensor& like, DispatchKey key) {
  auto t = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return t;
}

static Storage stored(size_t bytes, DataPtr data, c10::Allocator* allocator) {
  return Storage(Storage::use_byte_size_t{}, bytes, std::move(data), allocator, /*resizable=*/true);
}

// What a CPU kernel has made becomes the device's, without a copy.
static Storage moved(const Storage& cpu) {
  auto bytes = cpu.nbytes();
  return stored(bytes, Memory::taken(cpu.set_data_ptr(DataPtr()), bytes), &memory);
}

// The same bytes as a CPU tensor.
static Tensor host(const Tensor& t) {
  if (!t.is_cuda()) return t;
  DataPtr bytes(t.storage().mutable_data(), Device(c10::kCPU));
  return made(stored(t.storage().nbytes(), std::move(bytes), c10::GetCPUAllocator()), t, DispatchKey::CPU);
}

struct Call {
  const c10::FunctionSchema& schema;
  std::string name;
  std::vector<std::pair<Tensor, Tensor>> seen;  // on the device, and as a CPU tensor

  Tensor taken(const Tensor& t, const c10::Argument& argument) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      bool written = argument.alias_info() && argument.alias_info()->isWrite();
      bool index = argument.name() == "indices" && mixing.count("indices of " + schema.name());
      TORCH_CHECK(t.is_cpu() && !written && (index || (t.dim() == 0 && mixing.count(name))),
                  "Expected all tensors to be on the same device: ", argument.name(), " ", t.sizes(), " of ", name,
                  " is on ", t.device(), ", others are on cuda:0");
      return t;
    }
    seen.emplace_back(t, host(t));
    return seen.back().second;
  }

  Tensor given_back(const Tensor& t) {
    if (!t.defined()) return t;
    for (auto& [device, cpu] : seen) {
      if (cpu.is_same(t)) return device;
      if (cpu.storage().is_alias_of(t.storage())) return made(device.storage(), t, DispatchKey::CUDA);
    }
    return made(moved(t.storage()), t, DispatchKey::CUDA);
  }
};

template <typename F>
static c10::IValue each(const c10::IValue& value, F change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(change(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const auto& t : value.toOptionalTensorVector()) list.push_back(t ? std::optional(change(*t)) : t);
    return list;
  }
  return value.isDevice() && value.toDevice().is_cuda() ? c10::IValue(Device(c10::kCPU)) : value;
}

static void by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Call call{schema, schema.name() + "." + schema.overload_name(), {}};
  TORCH_CHECK(!missing.count(call.name), call.name, " has no kernel for CUDA");
  auto arguments = stack->end() - schema.arguments().size();
  for (size_t i = 0; i < schema.arguments().size(); i++)
    arguments[i] = each(arguments[i], [&](const Tensor& t) { return call.taken(t, schema.arguments()[i]); });
  op.callBoxed(stack);
  for (auto& [device, cpu] : call.seen) {
    if (cpu.sizes() == device.sizes() && cpu.storage().data() == device.storage().data()) continue;
    // an output that was made larger
    device.unsafeGetTensorImpl()->set_storage_keep_dtype(moved(cpu.storage()));
    device.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  }
  for (auto value = stack->end() - schema.returns().size(); value != stack->end(); ++value)
    *value = each(*value, [&](const Tensor& t) { return call.given_back(t); });
}

using Format = std::optional<at::MemoryFormat>;
static const c10::DispatchKeySet KEYS(DispatchKey::CUDA);

static Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                    std::optional<Device>, std::optional<bool>, Format format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(type), format);
}
static Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> type,
                            std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(type));
}
static Tensor& copy_(Tensor& self, const Tensor& source, bool) { return host(self).copy_(host(source)), self; }
static Tensor& set_(Tensor& self, const Tensor& source) {
  auto offset = source.storage_offset();
  return at::native::set_storage_cpu_(self, source.storage(), offset, source.sizes(), source.strides());
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("set_.source_Tensor", &set_);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("resize_", &at::native::resize_);
  // what they are made of is chosen by the device
  for (auto name : {"convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}

static int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double,
                               bool, std::optional<double>, bool) { return 0; }

static void install(std::vector<std::string> may_mix, std::vector<std::string> has_none) {
  mixing = {may_mix.begin(), may_mix.end()};
  missing = {has_none.begin(), has_none.end()};
  c10::SetAllocator(CUDA, &memory);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&plain_attention);
  // torch made its hooks when it was imported, without members: the same object becomes ours
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
}
static int64_t peak() {
  auto before = most.load();
  most = used.load();
  return before;
}
TORCH_LIBRARY(pretend, m) {
  m.def("install(str[] mixing, str[] missing) -> ()", &install);
  m.def("peak() -> int", &peak);
}
