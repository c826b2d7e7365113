// A CUDA of eight devices for a torch that has none: tensors say cuda:N, their bytes are this machine's memory, and
// every operation is the CPU's on the same bytes. Rules and counts are in rehearsal.py.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/set_native.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <torch/library.h>

using at::Tensor;
using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Generator : at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex i) { move({c10::kCUDA, i < 0 ? Guard::getDeviceIndex() : i}); }
  void move(c10::Device device) { device_ = device; }
};

struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  int getNumGPUs() const override { return 8; }
  c10::DeviceIndex deviceCount() const override { return 8; }
  c10::DeviceIndex current_device() const override { return Guard::getDeviceIndex(); }
  c10::DeviceIndex getCurrentDevice() const override { return Guard::getDeviceIndex(); }
  void setCurrentDevice(c10::DeviceIndex i) const override { Guard::setDeviceIndex(i); }
  at::Generator getNewGenerator(c10::DeviceIndex i) const override { return at::make_generator<Generator>(i); }
};
namespace at { using ::CUDAHooks; REGISTER_CUDA_HOOKS(CUDAHooks); }

// The same bytes as memory of another device; the owner lives as long.
static c10::Storage on(const c10::Storage& s, c10::Device device) {
  auto* owner = new c10::Storage(s);
  c10::DataPtr bytes(s.mutable_data(), owner, [](void* p) { delete static_cast<c10::Storage*>(p); }, device);
  return c10::Storage(c10::Storage::use_byte_size_t(), s.nbytes(), std::move(bytes), c10::GetAllocator(c10::kCPU), true);
}

static Tensor over(const c10::Storage& s, c10::DispatchKey key, const Tensor& like) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(s), c10::DispatchKeySet(key), like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return out;
}

struct Call {
  std::vector<std::pair<Tensor, Tensor>> pairs;     // (on cuda, the CPU's view of it)
  c10::Device device{c10::kCUDA, Guard::getDeviceIndex()};

  Tensor down(const Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    for (auto& [gpu, cpu] : pairs)                  // one CPU storage for each storage: views stay views
      if (gpu.storage().unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl())
        return pairs.emplace_back(t, over(cpu.storage(), c10::DispatchKey::CPU, t)).second;
    device = t.device();
    return pairs.emplace_back(t, over(on(t.storage(), c10::kCPU), c10::DispatchKey::CPU, t)).second;
  }

  Tensor up(const Tensor& t) {
    if (!t.defined() || !t.is_cpu()) return t;
    for (auto& [gpu, cpu] : pairs)
      if (cpu.is_same(t)) return gpu;               // an operation in place
    for (auto& [gpu, cpu] : pairs)
      if (cpu.storage().unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl())
        return over(gpu.storage(), c10::DispatchKey::CUDA, t);
    return over(on(t.storage(), device), c10::DispatchKey::CUDA, t);
  }

  // An operation may have grown its result, or changed its shape.
  void settle() {
    for (auto& [gpu, cpu] : pairs) {
      if (cpu.storage().data() != gpu.storage().data()) {
        gpu.storage().set_data_ptr(std::move(on(cpu.storage(), gpu.device()).mutable_data_ptr()));
        gpu.storage().set_nbytes(cpu.storage().nbytes());
      }
      gpu.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

  template <class F> c10::IValue mapped(const c10::IValue& v, F f) {
    if (v.isTensor()) return f(v.toTensor());
    if (v.isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor& t : v.toTensorVector()) out.push_back(f(t));
      return out;
    }
    if (!v.isList()) return v;
    auto out = v.toList().copy();                   // indices, of which some are None
    for (size_t i = 0; i < out.size(); ++i) {
      c10::IValue item = out.get(i);
      if (item.isTensor()) out.set(i, f(item.toTensor()));
    }
    return out;
  }
};

static void as_cpu(const c10::OperatorHandle& op, c10::Stack* stack) {
  Call call;
  Generator* generator = nullptr;
  bool to_cpu = false;
  const auto inputs = op.schema().arguments().size(), outputs = op.schema().returns().size();
  for (size_t i = stack->size() - inputs; i < stack->size(); ++i) {
    c10::IValue& v = (*stack)[i];
    if (v.isDevice()) {
      if (v.toDevice().is_cuda()) {
        call.device = {c10::kCUDA, v.toDevice().has_index() ? v.toDevice().index() : Guard::getDeviceIndex()};
        v = c10::Device(c10::kCPU);
      } else {
        to_cpu = true;
      }
    } else if (v.isGenerator() && v.toGenerator().device().is_cuda()) {
      generator = static_cast<Generator*>(v.toGenerator().unsafeGetGeneratorImpl());
    } else {
      v = call.mapped(v, [&](const Tensor& t) { return call.down(t); });
    }
  }
  if (generator) generator->move(c10::kCPU);
  op.callBoxed(stack);
  if (generator) generator->move(call.device);
  call.settle();
  for (size_t i = stack->size() - outputs; i < stack->size() && !to_cpu; ++i)
    (*stack)[i] = call.mapped((*stack)[i], [&](const Tensor& t) { return call.up(t); });
}

static Tensor bytes_of(const Tensor& t) { return over(on(t.storage(), c10::kCPU), c10::DispatchKey::CPU, t); }

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&as_cpu>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Storage", at::native::set_);
  // What has a kernel for all devices beside the CPU's (copy_, layer norm) would not fall back.
  auto& torch_ops = c10::Dispatcher::singleton();
  for (const auto& name : torch_ops.getAllOpNames()) {
    auto op = torch_ops.findOp(name);
    const bool own = name.name == "aten::copy_" || op->hasKernelForDispatchKey(c10::DispatchKey::CPU);
    if (own && op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd))
      m.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&as_cpu>());
  }
}
TORCH_LIBRARY(rehearsal, m) { m.def("bytes_of(Tensor t) -> Tensor"); }
TORCH_LIBRARY_IMPL(rehearsal, CUDA, m) { m.impl("bytes_of", bytes_of); }

extern "C" void resize_storage(c10::StorageImpl* storage, size_t size) {    // FSDP2 lets go of memory so
  auto fresh = at::empty({static_cast<int64_t>(size)}, at::kByte);
  std::memcpy(fresh.data_ptr(), storage->data(), std::min(size, storage->nbytes()));
  storage->set_data_ptr(std::move(on(fresh.storage(), storage->device()).mutable_data_ptr()));
  storage->set_nbytes(size);
}
extern "C" void set_device(int i) { Guard::setDeviceIndex(static_cast<c10::DeviceIndex>(i)); }
extern "C" int get_device() { return Guard::getDeviceIndex(); }
