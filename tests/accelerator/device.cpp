// The device "testgpu": memory of the CPU behind the dispatch key PrivateUse1, with two devices.
//
// An operation runs the CPU's kernel on the same bytes. Around it there is what an accelerator adds: the checks of
// devices and generators that CUDA makes, a guard for the current device, a count of bytes for each device, pinned
// memory, autocast with CUDA's lists, and a report to a Python function of each operation for which the host would
// wait on CUDA. registration.py builds on it; the README says what the device does not show.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {

using at::Tensor;

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;
constexpr size_t kAlignment = 64;  // as the CPU's allocator, so that kernels take the same vectorised paths

const c10::DispatchKeySet kKey(c10::DispatchKey::PrivateUse1);

// ---- the current device -------------------------------------------------------------------------------------------

thread_local c10::DeviceIndex current = 0;

c10::Device current_device() { return c10::Device(kType, current); }

void set_current(c10::DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < kDevices, "testgpu: invalid device ordinal ", int(index));
  current = index;
}

c10::DeviceIndex or_current(c10::DeviceIndex index) {
  TORCH_CHECK(index < kDevices, "testgpu: invalid device ordinal ", int(index));
  return index < 0 ? current : index;
}

// Inside a block `device` is the current one. Without an index it is the current one already.
class OnDevice {
 public:
  explicit OnDevice(std::optional<c10::Device> device) {
    if (device && device->has_index()) set_current(device->index());
  }
  ~OnDevice() { current = before_; }

 private:
  c10::DeviceIndex before_ = current;
};

// ---- waits of the host --------------------------------------------------------------------------------------------

PyObject* wait_hook = nullptr;  // a function (kind, operation), or null while nothing records

void report_wait(const char* kind, const std::string& operation) {
  if (!wait_hook) return;
  py::gil_scoped_acquire gil;
  PyObject* result = PyObject_CallFunction(wait_hook, "ss", kind, operation.c_str());
  if (!result) PyErr_WriteUnraisable(wait_hook);
  Py_XDECREF(result);
}

// ---- memory -------------------------------------------------------------------------------------------------------

struct MemoryCount {
  int64_t bytes = 0;
  int64_t peak = 0;
  int64_t allocations = 0;
};

std::mutex memory_mutex;
std::array<MemoryCount, kDevices> memory;

void count_allocation(c10::DeviceIndex device, size_t bytes) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  auto& count = memory[device];
  count.bytes += static_cast<int64_t>(bytes);
  count.peak = std::max(count.peak, count.bytes);
  count.allocations += bytes > 0;
}

void count_release(c10::DeviceIndex device, size_t bytes) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  memory[device].bytes -= static_cast<int64_t>(bytes);
}

void* aligned_memory(size_t bytes) {
  void* data = nullptr;
  if (bytes && posix_memalign(&data, kAlignment, bytes)) throw std::bad_alloc();
  return data;
}

// Bytes of one device; they belong to `owner` if they are the result of a CPU kernel.
struct Block {
  void* data;
  size_t bytes;
  c10::DeviceIndex device;
  Tensor owner;
};

void release_block(void* context) {
  auto* block = static_cast<Block*>(context);
  count_release(block->device, block->bytes);
  if (!block->owner.defined()) std::free(block->data);
  delete block;
}

c10::DataPtr as_data(Block* block) {
  count_allocation(block->device, block->bytes);
  return {block->data, block, &release_block, c10::Device(kType, block->device)};
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = aligned_memory(bytes);
    if (data) std::memset(data, 0xff, bytes);  // NaN, -1 or true: a read of an element that nothing wrote shows
    return as_data(new Block{data, bytes, current, {}});
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // a block is more than its bytes
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

DeviceAllocator device_allocator;
REGISTER_ALLOCATOR(kType, &device_allocator)

// Pinned memory of the host: copies from and to it do not make the host wait if they are non_blocking.
std::mutex pinned_mutex;
std::map<const char*, size_t> pinned_blocks;  // start, bytes

void release_pinned(void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  pinned_blocks.erase(static_cast<const char*>(data));
  std::free(data);
}

bool is_pinned(const void* address) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto after = pinned_blocks.upper_bound(static_cast<const char*>(address));
  if (after == pinned_blocks.begin()) return false;
  auto& [start, bytes] = *std::prev(after);
  return static_cast<const char*>(address) < start + bytes;
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = aligned_memory(bytes);
    if (data) {
      std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned_blocks[static_cast<const char*>(data)] = bytes;
    }
    return {data, data, &release_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

PinnedAllocator pinned_allocator;

// ---- guard, streams and events: everything is done when a call returns ----------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Clock = std::chrono::steady_clock;

  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = current_device();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return current_device(); }
  void setDevice(c10::Device device) const override {
    if (device.has_index()) set_current(device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& stream) const override {
    report_wait("synchronize", "stream of " + stream.device().str());
  }
  void synchronizeDevice(c10::DeviceIndex index) const override {
    report_wait("synchronize", c10::Device(kType, or_current(index)).str());
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new Clock::time_point;
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { report_wait("synchronize", "event"); }
  double elapsedTime(void* start, void* end, const c10::DeviceIndex) const override {
    auto passed = *static_cast<Clock::time_point*>(end) - *static_cast<Clock::time_point*>(start);
    return std::chrono::duration<double, std::milli>(passed).count();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---- generators: those of the CPU, so that equal seeds give equal samples --------------------------------------------

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex index) {
    device_ = c10::Device(kType, index);
    key_set_ = kKey;
  }
};

at::Generator new_generator(c10::DeviceIndex index) { return at::make_generator<Generator>(or_current(index)); }

at::Generator& default_generator(c10::DeviceIndex index) {
  static std::array<at::Generator, kDevices> generators = {new_generator(0), new_generator(1)};
  return generators[or_current(index)];
}

// ---- what PyTorch asks of an accelerator ----------------------------------------------------------------------------

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { set_current(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    auto before = current;
    set_current(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return index < 0 ? current : exchangeDevice(index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override { return new_generator(index); }
  at::Device getDeviceFromPtr(void*) const override { return current_device(); }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    OnDevice guard(storage.device());
    auto data = device_allocator.allocate(bytes);
    if (auto kept = std::min(bytes, storage.nbytes())) std::memcpy(data.get(), storage.data(), kept);
    auto* impl = storage.unsafeGetStorageImpl();
    impl->set_data_ptr_noswap(std::move(data));
    impl->set_nbytes(bytes);
  }
};

Hooks hooks;

// ---- tensors of the device and of the CPU over the same bytes --------------------------------------------------------

bool on_device(const Tensor& x) { return x.device().type() == kType; }

Tensor cpu_tensor(c10::Storage storage, const Tensor& like) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), like.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  return result;
}

// If a kernel makes it larger it gets memory of its own, and write_back copies that.
Tensor cpu_alias(const Tensor& x) {
  auto* data = x.storage().nbytes() ? x.mutable_data_ptr() : nullptr;
  auto bytes = at::detail::computeStorageNbytes(x.sizes(), x.strides(), x.element_size());
  c10::DataPtr borrowed(data, new Tensor(x), [](void* held) { delete static_cast<Tensor*>(held); }, c10::kCPU);
  auto* allocator = c10::GetAllocator(c10::DeviceType::CPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), data ? bytes : 0, std::move(borrowed), allocator, true);
  Tensor alias = cpu_tensor(std::move(storage), x);
  if (x.is_conj()) alias._set_conj(true);
  if (x.is_neg()) alias._set_neg(true);
  return alias;
}

Tensor device_tensor(c10::Storage storage, int64_t offset, const Tensor& like) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), kKey, like.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), offset);
  return result;
}

// A view of one of `inputs`, if the result lies inside its storage; else the result's own bytes on the current device.
Tensor device_alias(const Tensor& result, const std::vector<Tensor>& inputs) {
  if (!result.defined()) return result;
  auto* data = static_cast<const char*>(result.numel() ? result.const_data_ptr() : nullptr);
  for (auto& input : inputs) {
    auto* start = static_cast<const char*>(input.storage().data());
    if (data && start && data >= start && data < start + input.storage().nbytes())
      return device_tensor(input.storage(), (data - start) / result.element_size(), result);
  }
  auto& storage = result.storage();
  auto* block = new Block{storage.mutable_data(), storage.nbytes(), current, result};
  c10::Storage wrapped(c10::Storage::use_byte_size_t(), block->bytes, as_data(block), &device_allocator, true);
  return device_tensor(std::move(wrapped), result.storage_offset(), result);
}

// ---- any operation: checks, then the CPU's kernel --------------------------------------------------------------------

// Operations for which PyTorch's generated code for CUDA does not require that all tensors are on one device: their
// kernels accept 0-dim CPU tensors, and indexing CPU indices. registration.py fills this from PyTorch's own list.
std::unordered_set<std::string> unchecked_operations;

// Operations whose CUDA kernel copies a number to the host before it returns, with how often it does so.
const std::unordered_map<std::string, std::pair<const char*, int>> waiting_operations = {
    {"aten::nonzero", {"shape", 1}},
    {"aten::nonzero.out", {"shape", 1}},
    {"aten::masked_select", {"shape", 1}},
    {"aten::masked_select.out", {"shape", 1}},
    {"aten::_unique2", {"shape", 1}},
    {"aten::unique_consecutive", {"shape", 1}},
    {"aten::unique_dim", {"shape", 1}},
    {"aten::bincount", {"shape", 2}},             // the minimum and the maximum
    {"aten::repeat_interleave.Tensor", {"shape", 2}},  // the sum, and whether a repeat is negative
    {"aten::equal", {"value", 1}},
};

bool starts_with(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

std::string name_of(const c10::OperatorHandle& op) {
  auto& name = op.schema().operator_name();
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

// One call of an operation: its arguments on the stack are replaced by CPU aliases, and its results by device tensors.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op),
        schema_(op.schema()),
        name_(name_of(op)),
        stack_(*stack),
        count_(schema_.arguments().size()),
        first_(stack->size() - count_),
        tensors_(count_),
        lists_(count_) {}

  void run() {
    replace_arguments();
    check_devices();
    OnDevice guard(inputs_.empty() ? std::nullopt : std::optional<c10::Device>(inputs_[0].device()));
    replace_generator();
    report_waits();
    {
      at::AutoDispatchBelowADInplaceOrView below;
      op_.callBoxed(&stack_);
    }
    if (generator_) generator_->set_state(cpu_generator_->get_state());
    for (auto& [x, alias] : written_) write_back(x, alias);
    replace_results();
  }

 private:
  c10::IValue& argument(size_t i) { return stack_[first_ + i]; }

  void replace_arguments() {
    for (size_t i = 0; i < count_; ++i) {
      auto& value = argument(i);
      auto& declared = schema_.arguments()[i];
      if (value.isTensor()) {
        tensors_[i] = value.toTensor();
        value = replaced(tensors_[i], declared);
      } else if (value.isTensorList()) {
        lists_[i] = value.toTensorVector();
        std::vector<Tensor> aliases;
        for (auto& x : lists_[i]) aliases.push_back(replaced(x, declared));
        value = c10::IValue(aliases);
      } else if (value.isOptionalTensorList()) {
        c10::List<std::optional<Tensor>> aliases;
        for (std::optional<Tensor> x : value.toOptionalTensorList())
          aliases.push_back(x ? std::optional<Tensor>(replaced(*x, declared)) : std::nullopt);
        value = aliases;
      } else if (value.isDevice()) {
        value = c10::Device(c10::DeviceType::CPU);
      }
    }
  }

  Tensor replaced(const Tensor& x, const c10::Argument& declared) {
    if (!x.defined()) return x;
    const bool writes = declared.alias_info() && declared.alias_info()->isWrite();
    if (!on_device(x)) {
      others_.push_back({x, declared.name(), writes});
      return x;
    }
    inputs_.push_back(x);
    if (declared.name() == "indices" && is_mask(x)) ++masks_;
    Tensor alias = cpu_alias(x);
    if (writes) written_.emplace_back(x, alias);
    return alias;
  }

  static bool is_mask(const Tensor& x) { return x.scalar_type() == c10::kBool || x.scalar_type() == c10::kByte; }

  bool indexes() const {
    return starts_with(name_, "aten::index.") || starts_with(name_, "aten::_index_put_impl_") ||
        starts_with(name_, "aten::index_put");
  }

  // What CUDA allows beside tensors of one device: CPU indices, and 0-dim CPU tensors where nothing is written to them.
  bool allowed(const Tensor& x, const std::string& argument, bool writes) const {
    if (x.device().type() != c10::DeviceType::CPU || writes || !unchecked_operations.count(name_)) return false;
    return x.dim() == 0 || (indexes() && argument == "indices");
  }

  void check_devices() const {
    const char* found = "Expected all tensors to be on the same device, but found at least two devices, ";
    for (auto& x : inputs_)
      TORCH_CHECK(x.device() == inputs_[0].device(), found, inputs_[0].device(), " and ", x.device(), "! (", name_, ")");
    for (auto& other : others_) {
      if (allowed(other.tensor, other.argument, other.writes)) continue;
      auto here = inputs_.empty() ? current_device() : inputs_[0].device();
      TORCH_CHECK(false, found, here, " and ", other.tensor.device(), "! (argument ", other.argument, " of ", name_, ")");
    }
  }

  // The CPU's kernels take only generators of the CPU: a copy advances, and its state is copied back afterwards.
  void replace_generator() {
    for (size_t i = 0; i < count_; ++i) {
      if (schema_.arguments()[i].type()->str().find("Generator") == std::string::npos) continue;
      auto& value = argument(i);
      auto generator = value.isNone() ? default_generator(-1) : value.toGenerator();
      TORCH_CHECK(
          generator.device() == current_device(),
          "Expected a '", current_device(), "' device for generator but found '", generator.device(), "' (", name_, ")");
      generator_ = generator;
      cpu_generator_ = at::make_generator<at::CPUGeneratorImpl>();
      cpu_generator_->set_state(generator.get_state());
      value = *cpu_generator_;
    }
  }

  void report_waits() {
    auto found = waiting_operations.find(name_);
    if (found != waiting_operations.end() && !has_output_size())
      for (int i = 0; i < found->second.second; ++i) report_wait(found->second.first, name_);
    if (name_ == "aten::index.Tensor_out") return;  // index.Tensor called nonzero() and to() for its indices before
    if (indexes())
      for (int i = 0; i < masks_; ++i) report_wait("shape", name_ + " with a mask");
    const bool copies_scalars = indexes() || starts_with(name_, "aten::where");  // elsewhere they are kernel arguments
    for (auto& other : others_)
      if (copies_scalars) report_wait("copy to device", name_ + " with " + other.argument + " on the CPU");
  }

  // repeat_interleave with an output_size copies nothing to the host.
  bool has_output_size() {
    for (size_t i = 0; i < count_; ++i)
      if (schema_.arguments()[i].name() == "output_size") return !argument(i).isNone();
    return false;
  }

  static void write_back(const Tensor& x, const Tensor& alias) {
    const bool moved = alias.numel() && alias.const_data_ptr() != x.const_data_ptr();
    if (moved || x.sizes() != alias.sizes()) {  // an `out` of another shape
      x.resize_(alias.sizes());
      cpu_alias(x).copy_(alias);
    } else if (x.strides() != alias.strides()) {
      x.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides());
    }
  }

  void replace_results() {
    auto results = schema_.returns().size();
    auto first = stack_.size() - results;
    for (size_t i = 0; i < results; ++i) {
      auto& value = stack_[first + i];
      auto* alias = schema_.returns()[i].alias_info();
      const bool is_argument = alias && alias->isWrite();
      if (value.isTensor()) {
        value = is_argument ? tensors_[written_argument(*alias)] : device_alias(value.toTensor(), inputs_);
      } else if (value.isTensorList()) {
        std::vector<Tensor> list;
        for (auto& x : value.toTensorVector()) list.push_back(device_alias(x, inputs_));
        value = is_argument ? c10::IValue(lists_[written_argument(*alias)]) : c10::IValue(list);
      }
    }
  }

  size_t written_argument(const c10::AliasInfo& result) const {
    for (size_t i = 0; i < count_; ++i) {
      auto* alias = schema_.arguments()[i].alias_info();
      if (alias && alias->isWrite() && *alias == result) return i;
    }
    TORCH_CHECK(false, "testgpu: no argument for the result of ", name_);
  }

  struct Other {
    Tensor tensor;
    std::string argument;
    bool writes;
  };

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  const std::string name_;
  torch::jit::Stack& stack_;
  const size_t count_;
  const size_t first_;
  std::vector<Tensor> tensors_;             // as they were passed
  std::vector<std::vector<Tensor>> lists_;  // as they were passed
  std::vector<Tensor> inputs_;              // all that are on the device
  std::vector<Other> others_;               // all that are not
  std::vector<std::pair<Tensor, Tensor>> written_;  // those that the operation writes, and their aliases
  int masks_ = 0;
  std::optional<at::Generator> generator_;
  std::optional<at::Generator> cpu_generator_;
};

void run_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) { Call(op, stack).run(); }

// ---- what cannot run on aliases: memory, views, copies, numbers ------------------------------------------------------

Tensor empty(
    c10::SymIntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  OnDevice guard(device);
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  return at::detail::empty_generic(sizes, &device_allocator, kKey, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>) {
  OnDevice guard(device);
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto strides = C10_AS_INTARRAYREF_SLOW(stride);
  return at::detail::empty_strided_generic(sizes, strides, &device_allocator, kKey, c10::dtype_or_default(dtype));
}

Tensor as_strided(
    const Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

const Tensor& resize(const Tensor& x, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  OnDevice guard(x.device());
  return at::native::resize_(x, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor view(const Tensor& x, c10::SymIntArrayRef size) { return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage_and_shape(
    Tensor& x, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  return at::cpu::set_(x, storage, offset.expect_int(), sizes, C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& x, at::Storage storage) {
  auto elements = static_cast<int64_t>(storage.nbytes() / x.dtype().itemsize());
  return at::cpu::set_(x, storage, 0, {elements}, {1});
}

Tensor& set_tensor(Tensor& x, const Tensor& source) {
  return at::cpu::set_(x, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// CUDA returns at once only if the copy is non_blocking and reaches pinned memory directly: pageable memory, and a
// temporary for memory that is not contiguous, are copied in steps that the host takes part in.
void report_copy(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (on_device(source) == on_device(target)) return;
  const Tensor& host = on_device(source) ? target : source;
  const bool pinned = is_pinned(host.const_data_ptr());
  if (non_blocking && pinned && host.is_contiguous()) return;
  std::string operation = pinned ? "aten::copy_ of pinned memory" : "aten::copy_ of pageable memory";
  report_wait(on_device(source) ? "copy to host" : "copy to device", operation + (non_blocking ? ", non_blocking" : ""));
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (!source.numel()) return target;  // nothing is launched, so nothing waits
  report_copy(source, target, non_blocking);
  at::AutoDispatchBelowADInplaceOrView below;
  (on_device(target) ? cpu_alias(target) : target).copy_(on_device(source) ? cpu_alias(source) : source);
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Scalar local_scalar(const Tensor& x) {
  report_wait("item", "aten::_local_scalar_dense");
  at::AutoDispatchBelowADInplaceOrView below;
  return cpu_alias(x).item();
}

// SDPA's math path, which consists of plain operations: the fused kernels are what this device does not have.
int64_t sdp_choice(
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const std::optional<Tensor>&,
    double,
    bool,
    std::optional<double>,
    bool) {
  return 0;
}

// ---- convolutions, which PyTorch gives to a backend as a whole -------------------------------------------------------

std::vector<int64_t> plain(c10::SymIntArrayRef values) { return C10_AS_INTARRAYREF_SLOW(values).vec(); }

Tensor convolution(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation,
    bool transposed,
    c10::SymIntArrayRef output_padding,
    c10::SymInt groups) {
  const bool biased = bias && bias->defined();
  TORCH_CHECK(
      x.device() == weight.device() && (!biased || bias->device() == x.device()),
      "Expected all tensors to be on the same device (aten::convolution)");
  OnDevice guard(x.device());
  at::AutoDispatchBelowADInplaceOrView below;
  auto cpu_bias = biased ? std::optional<Tensor>(cpu_alias(*bias)) : std::nullopt;
  auto result = at::convolution(
      cpu_alias(x),
      cpu_alias(weight),
      cpu_bias,
      plain(stride),
      plain(padding),
      plain(dilation),
      transposed,
      plain(output_padding),
      groups.expect_int());
  return device_alias(result, {});
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& weight,
    c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation,
    bool transposed,
    c10::SymIntArrayRef output_padding,
    c10::SymInt groups,
    std::array<bool, 3> needed) {
  OnDevice guard(x.device());
  at::AutoDispatchBelowADInplaceOrView below;
  std::vector<int64_t> bias_size{weight.size(transposed ? 1 : 0)};
  auto [for_x, for_weight, for_bias] = at::convolution_backward(
      cpu_alias(grad),
      cpu_alias(x),
      cpu_alias(weight),
      at::OptionalIntArrayRef(bias_size),
      plain(stride),
      plain(padding),
      plain(dilation),
      transposed,
      plain(output_padding),
      groups.expect_int(),
      needed);
  return {device_alias(for_x, {}), device_alias(for_weight, {}), device_alias(for_bias, {})};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("resize_", resize);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("set_.source_Storage_storage_offset", set_storage_and_shape);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Tensor", set_tensor);
  // PyTorch composes it of other operations for a backend that has no kernel; CUDA has one.
  library.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar);
  library.impl("_fused_sdp_choice", sdp_choice);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
}

}  // namespace

// ---- autocast with the lists that PyTorch uses for CUDA --------------------------------------------------------------

namespace at::autocast {

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // the macros want the name m
#define TESTGPU_LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define TESTGPU_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define TESTGPU_SET_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define TESTGPU_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(TESTGPU_LOWER)
  AT_FORALL_FP32(TESTGPU_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(TESTGPU_SET_DTYPE)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(TESTGPU_PROMOTE)
}

}  // namespace at::autocast

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.attr("DEVICES") = kDevices;
  module.def("register_hooks", [] { at::RegisterPrivateUse1HooksInterface(&hooks); });
  module.def("set_unchecked_operations", [](std::unordered_set<std::string> names) { unchecked_operations = names; });
  module.def("set_wait_hook", [](py::object hook) {
    PyObject* before = wait_hook;
    wait_hook = hook.is_none() ? nullptr : hook.release().ptr();
    Py_XDECREF(before);
  });
  module.def("default_generator", [](int index) { return default_generator(static_cast<c10::DeviceIndex>(index)); });
  module.def("current_device", [] { return static_cast<int>(current); });
  module.def("set_device", [](int index) { set_current(static_cast<c10::DeviceIndex>(index)); });
  module.def("memory", [](int index) {  // bytes, peak of bytes, allocations
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto& count = memory.at(index);
    return std::make_tuple(count.bytes, count.peak, count.allocations);
  });
  module.def("reset_peak_memory", [](int index) {
    std::lock_guard<std::mutex> lock(memory_mutex);
    memory.at(index).peak = memory.at(index).bytes;
  });
}
