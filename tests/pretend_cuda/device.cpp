// CUDA devices without a GPU: their tensors lie in the CPU's memory, their kernels are the CPU's.
// They refuse what CUDA would, tensors on two devices or a generator of another one, and tell where
// a GPU would have to be waited for. They have no streams, no NCCL, no attention but math's.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <set>

namespace {

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::IValue, c10::Stream;
using Names = std::set<std::string>;

Device GPU(DeviceType::CUDA, 0);  // this process's
void (*waited)(const char*) = [](const char*) {};
long kernels = 0;  // that were started

// What a CUDA graph is made of: calls, which are made again with the same memory.
struct Call {
  c10::OperatorHandle op;
  std::vector<IValue> arguments, results;
};
using Graph = std::vector<Call>;
Graph* recording = nullptr;

struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 8; }
  Device getDevice() const override { return GPU; }
  Device exchangeDevice(Device) const override { return GPU; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, GPU); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, GPU); }
  void record(void**, const Stream&, DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new Guard());

struct Generator : at::CPUGeneratorImpl {
  Generator() : at::CPUGeneratorImpl(0) { device_ = GPU; }
  void lend(Device device) { device_ = device; }
};

struct Pinned : c10::Allocator {
  std::set<const void*> memory;  // all that ever was
  c10::DataPtr allocate(size_t n) override {
    auto found = c10::GetCPUAllocator()->allocate(n);
    memory.insert(found.get());
    return found;
  }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
} pinned;

struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static auto generator = at::make_generator<Generator>();
    return generator;
  }
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 8; }
  int getNumGPUs() const override { return 8; }
  DeviceIndex getCurrentDevice() const override { return GPU.index(); }
  DeviceIndex current_device() const override { return GPU.index(); }
  void deviceSynchronize(DeviceIndex) const override {}
  bool isPinnedPtr(const void* p) const override { return pinned.memory.count(p); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
};

struct NoTimer : c10d::Timer {  // of DDP
  explicit NoTimer(Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return {}; }
};

// A tensor's memory as one of another device, which keeps the first one's storage.
at::Tensor as(const at::Tensor& x, Device device) {
  if (!x.defined() || x.device().type() == device.type()) return x;
  auto forget = [](void* p) { delete static_cast<c10::Storage*>(p); };
  c10::DataPtr memory(x.storage().mutable_data(), new c10::Storage(x.storage()), forget, device);
  c10::Storage storage({}, x.storage().nbytes(), std::move(memory), c10::GetCPUAllocator(), true);
  c10::InferenceMode mode(x.is_inference());
  auto key = device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  auto y = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), key, x.dtype());
  y.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return y;
}

// A value with `change` of each tensor in it, which may be in lists.
template <class F>
IValue each(const IValue& value, const F& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (!value.isList()) return value;
  auto list = value.toList().copy();
  for (size_t i = 0; i < list.size(); i++) list.set(i, each(list.get(i), change));
  return list;
}

bool waits(const std::string& name, const std::vector<IValue>& args) {
  static const Names always{"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select",
                            "aten::_unique2", "aten::bincount", "aten::equal"};
  bool found = always.count(name);
  if (name == "aten::segment_reduce") found = !args[6].toBool();  // its `unsafe`
  if (name == "aten::copy_") {
    const auto &to = args[0].toTensor(), &from = args[1].toTensor();
    const auto& host = to.is_cuda() ? from : to;
    bool free = args[2].toBool() && pinned.memory.count(host.storage().data());
    found = to.device() != from.device() && !free;
  }
  if (name.rfind("aten::index", 0) == 0 || name == "aten::_index_put_impl_")
    each(args[1], [&](const at::Tensor& x) {  // of a mask `index` itself asks for the places
      bool mask = x.defined() && x.scalar_type() == at::kBool && name != "aten::index";
      found |= x.defined() && (x.is_cpu() || mask);
      return x;
    });
  return found;
}

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const Names mixed{"aten::copy_", "aten::index", "aten::index_put_",
                           "aten::_index_put_impl_"};
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const auto args = torch::jit::last(stack, schema.arguments().size()).vec();
  if (waits(name, args)) {
    TORCH_CHECK(!recording, name, ": operation not permitted when stream is capturing");
    waited(name.c_str());
  }
  std::vector<std::shared_ptr<Generator>> lent;  // to the CPU, as long as this lasts
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;
  torch::jit::drop(*stack, args.size());
  for (const auto& arg : args) {
    stack->push_back(each(arg, [&](const at::Tensor& x) {
      bool here = !x.defined() || x.is_cuda() || x.dim() == 0 || mixed.count(name);
      TORCH_CHECK(here, name, ": Expected all tensors to be on the same device, found cpu and cuda");
      pairs.emplace_back(x, as(x, c10::kCPU));
      return pairs.back().second;
    }));
    if (arg.isDevice()) stack->back() = Device(c10::kCPU);
    if (arg.isGenerator()) {
      auto* generator = arg.toGenerator().unsafeGetGeneratorImpl();
      TORCH_CHECK(generator->device().is_cuda(), name, ": Expected a 'cuda' generator, found 'cpu'");
      lent.emplace_back(static_cast<Generator*>(generator), [](Generator* g) { g->lend(GPU); });
      lent.back()->lend(c10::kCPU);
    }
  }
  if (name == "aten::index" || name == "aten::index_put_")
    TORCH_CHECK(args[0].toTensor().is_cuda(), name, ": indices should be on the CPU, as the tensor");
  if (recording) recording->push_back({op, torch::jit::last(*stack, args.size()).vec(), {}});
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [x, y] : pairs)  // an `out` may have been given another size
    if (x.defined() && x.sizes() != y.sizes())
      x.unsafeGetTensorImpl()->shallow_copy_from(as(y, GPU).getIntrusivePtr());
  const auto results = torch::jit::last(stack, schema.returns().size()).vec();
  if (recording) recording->back().results = results;
  bool view = !results.empty() && schema.returns()[0].alias_info() &&
              !schema.returns()[0].alias_info()->isWrite();
  kernels += !view;
  torch::jit::drop(*stack, results.size());
  for (size_t i = 0; i < results.size(); i++) {
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) {  // what was written to is what comes back
      for (size_t j = 0; j < args.size(); j++) {
        const auto* other = schema.arguments()[j].alias_info();
        if (other && other->isWrite() && other->beforeSets() == alias->beforeSets())
          stack->push_back(args[j]);
      }
    } else {
      stack->push_back(each(results[i], [](const at::Tensor& x) { return as(x, GPU); }));
    }
  }
}

auto boxed() { return torch::CppFunction::makeFromBoxedFunction<&kernel>(); }
TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(boxed()); }
// What picks its code by the tensor's device, or goes to NCCL.
TORCH_LIBRARY_IMPL(aten, CUDA, library) { library.impl("copy_", boxed()); }
TORCH_LIBRARY_IMPL(c10d, CUDA, library) {
  for (const char* name : {"allreduce_", "broadcast_", "allgather_"}) library.impl(name, boxed());
}

}  // namespace

extern "C" {
void on_wait(void (*function)(const char*)) { waited = function; }
long count_kernels() { return kernels; }
void set_device(int index) { GPU = Device(DeviceType::CUDA, index); }
void* record() { return recording = new Graph(); }
void stop() { recording = nullptr; }
void forget(void* graph) { delete static_cast<Graph*>(graph); }
void replay(void* graph) {
  c10::InferenceMode mode;
  kernels++;
  for (auto& call : *static_cast<Graph*>(graph)) {
    auto stack = call.arguments;
    call.op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
    for (size_t i = 0; i < stack.size(); i++) {
      if (!stack[i].isTensor()) continue;
      auto was = call.results[i].toTensor(), is = stack[i].toTensor();
      if (was.data_ptr() != is.data_ptr()) was.copy_(is);
    }
  }
}
}

using namespace at;
namespace at { REGISTER_CUDA_HOOKS(CUDAHooks) }
namespace c10d { C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, NoTimer) }
