// The allocator; allocator.h says where a span goes in its life.
#include "allocator.h"

#include <algorithm>

namespace glm_fence {
namespace {

constexpr unsigned char kPoison = 0xFF;  // NaN as float32, bfloat16, float16 and E4M3; -1 as an integer
constexpr size_t kReapedWithEachFree = 4;

thread_local std::string last_error_text;

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

void add(GlmFenceCounter& counter, int64_t amount) {
  counter.current += amount;
  (amount > 0 ? counter.allocated : counter.freed) += amount > 0 ? amount : -amount;
  counter.peak = std::max(counter.peak, counter.current);
}

}  // namespace

void set_last_error(const std::string& text) { last_error_text = text; }
const std::string& last_error() { return last_error_text; }

// Global captures forbid calls such as cuMemCreate and cuEventQuery to every thread, unless it asks for relaxed mode.
class Allocator::Scope {
 public:
  Scope(const Driver& driver, const DeviceState& state) : driver_(driver) {
    driver_.exchange_capture_mode(&mode_);
    driver_.context_push(state.context);
  }
  ~Scope() {
    Context popped;
    driver_.context_pop(&popped);
    driver_.exchange_capture_mode(&mode_);
  }
  Scope(const Scope&) = delete;

 private:
  const Driver& driver_;
  int mode_ = kRelaxedCapture;
};

Allocator& Allocator::get() {
  static Allocator* allocator = new Allocator();  // never destroyed: torch frees blocks until the process ends
  return *allocator;
}

Allocator::Allocator() {
  options_.align = 16;
  options_.cache_bytes = uint64_t(4) << 30;
  options_.only_high = UINT64_MAX;
  options_.journal_slots = 1 << 20;
}

bool Allocator::configure(const GlmFenceOptions& options) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string reason;
  if (!live_.empty() || !devices_.empty())
    reason = "the fence has handed out memory; set its options before the first CUDA allocation";
  else if (options.align == 0 || options.align > 512 || (options.align & (options.align - 1)))
    reason = "align is " + std::to_string(options.align) + "; it must be a power of two from 1 to 512";
  else if (options.only_low > options.only_high)
    reason = "only_low " + std::to_string(options.only_low) + " is above only_high " + std::to_string(options.only_high);
  if (!reason.empty()) {
    set_last_error(reason);
    return false;
  }
  options_ = options;
  options_.slack = round_up(options.slack, options.align);
  journal_path_ = options.journal ? options.journal : "";
  libcuda_ = options.libcuda ? options.libcuda : "";
  return true;
}

bool Allocator::start() {
  if (started_) return true;
  std::string error;
  started_ = driver_.load(libcuda_.empty() ? "libcuda.so.1" : libcuda_.c_str(), &error);
  if (started_ && driver_.init(0) != kSuccess) {
    started_ = false;
    error = "cuInit failed; is a GPU visible to this process?";
  }
  if (!started_) set_last_error(error);
  return started_;
}

DeviceState* Allocator::device_state(int device) {
  auto found = devices_.find(device);
  if (found != devices_.end()) return &found->second;
  if (!start()) return nullptr;
  int mode = kRelaxedCapture;
  driver_.exchange_capture_mode(&mode);
  DeviceState state;
  Device handle;
  MemoryProperties properties{1, 0, {1, device}, nullptr, {}};
  Result result = driver_.device_get(&handle, device);
  if (result == kSuccess) result = driver_.context_retain(&state.context, handle);
  if (result == kSuccess) result = driver_.granularity(&state.granularity, &properties, 0);
  driver_.exchange_capture_mode(&mode);
  if (result != kSuccess) {
    set_last_error("device " + std::to_string(device) + " cannot be used: " + driver_.name_of(result));
    return nullptr;
  }
  state.stats.granularity = int64_t(state.granularity);
  if (!journal_.opened() && !journal_path_.empty()) {
    std::string error;
    options_.journal = journal_path_.c_str();
    journal_.open(options_, state.granularity, &error);
    if (!error.empty()) {
      set_last_error(error);
      journal_path_.clear();  // said once
    }
  }
  return &devices_.emplace(device, std::move(state)).first->second;
}

// The legacy stream answers with an error while another stream is captured: that counts as capturing too.
bool Allocator::capturing(Stream stream) {
  int status = 0;
  return driver_.stream_is_capturing(stream, &status) != kSuccess || status != 0;
}

std::shared_ptr<Pool> Allocator::pool_of(DeviceState& state, Stream stream) {
  for (auto it = state.active.rbegin(); it != state.active.rend(); ++it)
    if (!it->filter || it->filter(stream)) return it->pool;
  // A capture that torch did not announce: its blocks are kept until release_graphs, reused within the capture only.
  int status = 0;
  uint64_t capture = 0;
  driver_.stream_capture_info(stream, &status, &capture, nullptr, nullptr, nullptr);
  auto& pool = state.pools[PoolId{UINT64_MAX, capture}];
  if (!pool) pool = std::make_shared<Pool>(Pool{{UINT64_MAX, capture}, 1, true, {}, {}});
  return pool;
}

bool Allocator::take_free_span(DeviceState& state, Pool* pool, Stream stream, size_t bytes, Span* out) {
  if (pool) {
    auto own = pool->free.find({stream, bytes});
    if (own != pool->free.end() && !own->second.empty()) {
      *out = own->second.back();
      own->second.pop_back();
      state.stats.graph_bytes -= int64_t(bytes);
      return true;
    }
  } else if (options_.cache_bytes) {
    auto queue = state.waiting.find(stream);
    if (queue != state.waiting.end()) {
      auto same = queue->second.by_size.find(bytes);
      if (same != queue->second.by_size.end() && !same->second.empty()) {
        auto newest = same->second.back();
        same->second.pop_back();
        *out = newest->span;
        state.events.insert(state.events.end(), newest->events.begin(), newest->events.end());
        queue->second.all.erase(newest);
        state.stats.waiting_bytes -= int64_t(bytes);
        return true;
      }
    }
  }
  auto idle = state.idle.find(bytes);
  if (idle == state.idle.end() || idle->second.empty()) return false;
  *out = idle->second.back();
  idle->second.pop_back();
  state.stats.idle_bytes -= int64_t(bytes);
  return true;
}

bool Allocator::make_span(DeviceState& state, int device, size_t bytes, Span* out) {
  MemoryProperties properties{1, 0, {1, device}, nullptr, {}};
  MemoryAccess access{{1, device}, 3};
  Span span;
  span.bytes = bytes;
  Result result = driver_.create(&span.handle, bytes, &properties, 0);
  if (result != kSuccess) return set_last_error("cuMemCreate: " + driver_.name_of(result)), false;
  // Reserved ranges may touch each other, so the guard page is part of the range and is never mapped.
  result = driver_.reserve(&span.reserved, bytes + state.granularity, state.granularity, 0, 0);
  if (result != kSuccess) {
    driver_.release(span.handle);
    return set_last_error("cuMemAddressReserve: " + driver_.name_of(result)), false;
  }
  span.begin = span.reserved + (options_.guard_before ? state.granularity : 0);
  result = driver_.map(span.begin, bytes, 0, span.handle, 0);
  bool mapped = result == kSuccess;
  if (mapped) result = driver_.set_access(span.begin, bytes, &access, 1);
  if (result != kSuccess) {
    if (mapped) driver_.unmap(span.begin, bytes);
    driver_.unreserve(span.reserved, bytes + state.granularity);
    driver_.release(span.handle);
    return set_last_error("mapping a block: " + driver_.name_of(result)), false;
  }
  add(state.stats.reserved_bytes, int64_t(bytes));
  add(state.stats.segments, 1);
  *out = span;
  return true;
}

void Allocator::drop_span(DeviceState& state, const Span& span) {
  driver_.unmap(span.begin, span.bytes);
  driver_.release(span.handle);
  driver_.unreserve(span.reserved, span.bytes + state.granularity);
  add(state.stats.reserved_bytes, -int64_t(span.bytes));
  add(state.stats.segments, -1);
}

void* Allocator::allocate(size_t size, int device, Stream stream, uint32_t stack) {
  if (size == 0) return nullptr;
  std::lock_guard<std::mutex> lock(mutex_);
  DeviceState* found = device_state(device);
  if (!found) return nullptr;
  DeviceState& state = *found;
  size_t payload = round_up(size, options_.align);
  size_t slack = size < options_.only_low || size > options_.only_high ? options_.slack : 0;
  size_t bytes = round_up(payload + slack, state.granularity);
  if (bytes < size) {  // overflow
    ++state.stats.out_of_memory;
    return nullptr;
  }
  Scope scope(driver_, state);
  Block block;
  bool in_capture = capturing(stream);
  if (in_capture) block.pool = pool_of(state, stream);
  bool ready = take_free_span(state, block.pool.get(), stream, bytes, &block.span);
  if (!ready && !in_capture && state.active.empty()) {
    reap_device(state);
    ready = take_free_span(state, nullptr, stream, bytes, &block.span);
  }
  ready = ready || make_span(state, device, bytes, &block.span);
  if (!ready && !in_capture && state.active.empty()) {
    ++state.stats.retries;
    trim(state);
    ready = make_span(state, device, bytes, &block.span);
  }
  if (!ready) {
    ++state.stats.out_of_memory;
    return nullptr;
  }
  block.address = options_.guard_before ? block.span.begin + slack : block.span.begin + bytes - payload - slack;
  block.size = size;
  block.device = device;
  block.stream = stream;
  block.stack = stack;
  block.sequence = ++sequence_;
  block.slot = journal_.add(row(block));
  // Within a capture the fill would become a part of the graph.
  if ((options_.poison & 1) && !in_capture) driver_.memset8(block.address, kPoison, payload, stream);
  add(state.stats.allocated_bytes, int64_t(bytes));
  add(state.stats.requested_bytes, int64_t(size));
  add(state.stats.blocks, 1);
  Address address = block.address;
  live_.emplace(address, std::move(block));
  return reinterpret_cast<void*>(address);
}

void Allocator::free(void* pointer) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = live_.find(reinterpret_cast<Address>(pointer));
  if (found == live_.end()) return;  // null, or after shutdown
  Block block = std::move(found->second);
  live_.erase(found);
  DeviceState& state = devices_.at(block.device);
  journal_.freed(block.slot);
  add(state.stats.allocated_bytes, -int64_t(block.span.bytes));
  add(state.stats.requested_bytes, -int64_t(block.size));
  add(state.stats.blocks, -1);
  Scope scope(driver_, state);
  if (block.pool && block.pool->alive) {
    state.stats.graph_bytes += int64_t(block.span.bytes);
    if (block.other_streams.empty())
      block.pool->free[{block.stream, block.span.bytes}].push_back(block.span);
    else
      block.pool->kept.push_back(block.span);
  } else if (block.pool) {
    state.after_sync.push_back(block.span);
  } else if (!state.active.empty() || capturing(block.stream)) {
    state.freed_in_capture.push_back(block.span);
    state.stats.graph_bytes += int64_t(block.span.bytes);
  } else {
    if ((options_.poison & 2) && block.other_streams.empty())
      driver_.memset8(block.address, kPoison, round_up(block.size, options_.align), block.stream);
    wait_for(state, block.stream, block.other_streams, block.span);
    reap_stream(state, state.waiting[block.stream], kReapedWithEachFree);
  }
}

void Allocator::wait_for(DeviceState& state, Stream stream, const std::vector<Stream>& others, const Span& span) {
  std::vector<Stream> streams = others;
  streams.push_back(stream);
  Waiting waiting{span, {}};
  for (Stream one : streams) {
    Event event = nullptr;
    if (!state.events.empty()) {
      event = state.events.back();
      state.events.pop_back();
    } else if (driver_.event_create(&event, kEventWithoutTiming) != kSuccess) {
      event = nullptr;
    }
    if (event && driver_.event_record(event, one) == kSuccess) {
      waiting.events.push_back(event);
      continue;
    }
    // No event can be had, as for a stream that is gone: only a synchronised context says that the work is done.
    if (event) state.events.push_back(event);
    state.events.insert(state.events.end(), waiting.events.begin(), waiting.events.end());
    state.after_sync.push_back(span);
    return;
  }
  state.stats.waiting_bytes += int64_t(span.bytes);
  if (!others.empty()) {
    state.entangled.push_back(std::move(waiting));
    return;
  }
  StreamQueue& queue = state.waiting[stream];
  queue.all.push_back(std::move(waiting));
  queue.by_size[span.bytes].push_back(std::prev(queue.all.end()));
}

bool Allocator::finished(const Waiting& waiting) const {
  return std::all_of(waiting.events.begin(), waiting.events.end(),
                     [&](Event event) { return driver_.event_query(event) == kSuccess; });
}

void Allocator::retire(DeviceState& state, Waiting& waiting) {
  state.events.insert(state.events.end(), waiting.events.begin(), waiting.events.end());
  state.stats.waiting_bytes -= int64_t(waiting.span.bytes);
  if (uint64_t(state.stats.idle_bytes) + waiting.span.bytes <= options_.cache_bytes) {
    state.idle[waiting.span.bytes].push_back(waiting.span);
    state.stats.idle_bytes += int64_t(waiting.span.bytes);
    return;
  }
  // Not told of other streams' uses: make sure that they are over.
  if (!options_.streams_recorded) driver_.context_synchronize();
  drop_span(state, waiting.span);
}

void Allocator::reap_stream(DeviceState& state, StreamQueue& queue, size_t at_most) {
  for (; at_most && !queue.all.empty() && finished(queue.all.front()); --at_most) {
    queue.by_size[queue.all.front().span.bytes].pop_front();
    retire(state, queue.all.front());
    queue.all.pop_front();
  }
}

void Allocator::reap_device(DeviceState& state) {
  for (auto& [stream, queue] : state.waiting) reap_stream(state, queue, SIZE_MAX);
  for (auto it = state.entangled.begin(); it != state.entangled.end();) {
    bool done = finished(*it);
    if (done) retire(state, *it);
    it = done ? state.entangled.erase(it) : std::next(it);
  }
}

// Gives all memory back that nobody holds. Waits for the device; not to be called during a capture.
void Allocator::trim(DeviceState& state) {
  if (driver_.context_synchronize() != kSuccess) return;
  reap_device(state);
  for (const Span& span : state.after_sync) drop_span(state, span);
  state.after_sync.clear();
  for (auto& [bytes, spans] : state.idle)
    for (const Span& span : spans) drop_span(state, span);
  state.idle.clear();
  state.stats.idle_bytes = 0;
}

void Allocator::record_stream(void* address, Stream stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = live_.find(reinterpret_cast<Address>(address));
  if (found == live_.end() || found->second.stream == stream) return;
  auto& others = found->second.other_streams;
  if (std::find(others.begin(), others.end(), stream) == others.end()) others.push_back(stream);
}

void Allocator::begin_pool(int device, PoolId id, std::function<bool(void*)> filter) {
  std::lock_guard<std::mutex> lock(mutex_);
  DeviceState* state = device_state(device);
  if (!state) return;
  auto& pool = state->pools[id];
  if (!pool) pool = std::make_shared<Pool>(Pool{id, 0, true, {}, {}});
  ++pool->uses;
  state->active.push_back({pool, std::move(filter)});
}

void Allocator::end_pool(int device, PoolId id) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = devices_.find(device);
  if (found == devices_.end()) return;
  auto& active = found->second.active;
  auto it = std::find_if(active.begin(), active.end(), [&](const ActivePool& one) { return one.pool->id == id; });
  if (it != active.end()) active.erase(it);
}

void Allocator::release_pool(int device, PoolId id) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = devices_.find(device);
  if (found == devices_.end()) return;
  DeviceState& state = found->second;
  auto it = state.pools.find(id);
  if (it == state.pools.end() || --it->second->uses > 0) return;
  Pool& pool = *it->second;
  pool.alive = false;
  auto move = [&](std::vector<Span>& spans) {
    for (const Span& span : spans) state.stats.graph_bytes -= int64_t(span.bytes);
    state.after_sync.insert(state.after_sync.end(), spans.begin(), spans.end());
    spans.clear();
  };
  for (auto& [key, spans] : pool.free) move(spans);
  move(pool.kept);
  state.pools.erase(it);
  if (state.pools.empty()) move(state.freed_in_capture);
}

void Allocator::release_graphs() {
  std::vector<std::pair<int, PoolId>> all;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [device, state] : devices_) {
      for (auto& [id, pool] : state.pools) {
        pool->uses = 1;
        all.push_back({device, id});
      }
      for (const Span& span : state.freed_in_capture) state.stats.graph_bytes -= int64_t(span.bytes);
      state.after_sync.insert(state.after_sync.end(), state.freed_in_capture.begin(), state.freed_in_capture.end());
      state.freed_in_capture.clear();
    }
  }
  for (auto& [device, id] : all) release_pool(device, id);
}

void Allocator::reap() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [device, state] : devices_) {
    if (!state.active.empty()) continue;
    Scope scope(driver_, state);
    reap_device(state);
  }
}

void Allocator::empty_cache() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [device, state] : devices_) {
    if (!state.active.empty()) continue;
    Scope scope(driver_, state);
    trim(state);
  }
}

void Allocator::shutdown() {
  release_graphs();
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [address, block] : live_) devices_.at(block.device).after_sync.push_back(block.span);
  live_.clear();
  for (auto& [device, state] : devices_) {
    {
      Scope scope(driver_, state);
      state.active.clear();
      trim(state);
      for (Event event : state.events) driver_.event_destroy(event);
    }
    driver_.context_release(device);
  }
  devices_.clear();
  journal_.close();
  sequence_ = 0;
}

GlmFenceStats Allocator::stats(int device) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = devices_.find(device);
  return found == devices_.end() ? GlmFenceStats{} : found->second.stats;
}

void Allocator::reset_peak(int device) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = devices_.find(device);
  if (found == devices_.end()) return;
  GlmFenceStats& stats = found->second.stats;
  for (GlmFenceCounter* counter : {&stats.allocated_bytes, &stats.requested_bytes, &stats.reserved_bytes,
                                   &stats.blocks, &stats.segments})
    counter->peak = counter->current;
}

GlmFenceBlock Allocator::row(const Block& block) const {
  return {block.address,
          block.size,
          block.span.begin,
          block.span.begin + block.span.bytes,
          reinterpret_cast<uint64_t>(block.stream),
          block.sequence,
          block.device,
          GLM_FENCE_LIVE,
          block.stack,
          block.pool ? 1u : 0u};
}

bool Allocator::find(Address address, GlmFenceBlock* out) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [start, block] : live_) {
    const DeviceState& state = devices_.at(block.device);
    Address end = block.span.reserved + block.span.bytes + state.granularity;
    if (address < block.span.reserved || address >= end) continue;
    *out = row(block);
    return true;
  }
  return false;
}

size_t Allocator::snapshot(GlmFenceBlock* out, size_t capacity) {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t copied = 0;
  for (const auto& [start, block] : live_) {
    if (copied == capacity) break;
    out[copied++] = row(block);
  }
  return live_.size();
}

std::string Allocator::out_of_memory_text(size_t size, int device) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto mib = [](int64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; };
  std::string text = "CUDA out of memory. Tried to allocate " + mib(int64_t(size)) + " under the fence. GPU " +
                     std::to_string(device);
  auto found = devices_.find(device);
  if (found == devices_.end()) return text + " cannot be used: " + last_error();
  const GlmFenceStats& stats = found->second.stats;
  size_t free_bytes = 0, total = 0;
  {
    Scope scope(driver_, found->second);
    driver_.memory_info(&free_bytes, &total);
  }
  return text + " has " + mib(int64_t(total)) + ", " + mib(int64_t(free_bytes)) + " of it free; live blocks take " +
         mib(stats.allocated_bytes.current) + " for " + mib(stats.requested_bytes.current) + " asked for, graphs keep " +
         mib(stats.graph_bytes) + ". Every block takes at least " + mib(stats.granularity) +
         " under the fence: leave more room (vLLM: a lower --gpu-memory-utilization, fewer layers or sequences).";
}

}  // namespace glm_fence
