// The allocator: blocks that end at an unmapped page, frees that wait for their stream, memory that graphs keep.
//
// Words: a span is a mapped range with its guard page; a block is what a caller holds, at the end (or start) of a span.
// Where a freed span goes:
//   ordinary block      -> waiting (event on its stream) -> idle -> unmapped
//                          a new block on the same stream may take a waiting span at once: the stream orders the two
//   block of a graph    -> its pool, for later blocks of that pool on that stream; never unmapped while the pool lives
//   freed in a capture  -> kept until no pool is alive, or release_graphs
//   after its pool      -> after_sync: unmapped once the whole context has been synchronised
// One mutex guards everything. Each operation is O(1), but for find and snapshot, which a fault report uses.
#pragma once

#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "driver.h"
#include "glm_fence.h"
#include "journal.h"

namespace glm_fence {

using PoolId = std::pair<uint64_t, uint64_t>;

struct Span {
  Address reserved = 0;  // start of the reserved range, guard page included
  Address begin = 0;     // start of the mapped range
  size_t bytes = 0;      // mapped
  Handle handle = 0;
};

struct Pool {
  PoolId id;
  int uses = 0;
  bool alive = true;
  std::map<std::pair<Stream, size_t>, std::vector<Span>> free;
  std::vector<Span> kept;  // seen by several streams: not reused while the pool lives
};

struct Block {
  Span span;
  Address address = 0;
  size_t size = 0;
  int device = 0;
  Stream stream = nullptr;
  uint32_t slot = Journal::kNoSlot;
  uint32_t stack = 0;
  uint64_t sequence = 0;
  std::vector<Stream> other_streams;  // from record_stream
  std::shared_ptr<Pool> pool;         // null: an ordinary block
};

struct Waiting {
  Span span;
  std::vector<Event> events;
};

// Freed spans of one stream, oldest first. Its events complete in order.
struct StreamQueue {
  std::list<Waiting> all;
  std::unordered_map<size_t, std::deque<std::list<Waiting>::iterator>> by_size;
};

struct ActivePool {
  std::shared_ptr<Pool> pool;
  std::function<bool(void*)> filter;  // torch's: does an allocation on this stream belong to the pool
};

struct DeviceState {
  Context context = nullptr;
  size_t granularity = 0;
  std::unordered_map<Stream, StreamQueue> waiting;
  std::list<Waiting> entangled;  // freed spans that several streams used
  std::unordered_map<size_t, std::vector<Span>> idle;
  std::vector<Span> after_sync, freed_in_capture;
  std::map<PoolId, std::shared_ptr<Pool>> pools;
  std::vector<ActivePool> active;  // begun, not ended
  std::vector<Event> events;       // spare
  GlmFenceStats stats{};
};

class Allocator {
 public:
  static Allocator& get();

  bool configure(const GlmFenceOptions& options);
  void* allocate(size_t size, int device, Stream stream, uint32_t stack);
  void free(void* address);
  void record_stream(void* address, Stream stream);
  void begin_pool(int device, PoolId id, std::function<bool(void*)> filter);
  void end_pool(int device, PoolId id);
  void release_pool(int device, PoolId id);
  void release_graphs();
  void reap();
  void empty_cache();
  void shutdown();
  GlmFenceStats stats(int device);
  void reset_peak(int device);
  bool find(Address address, GlmFenceBlock* out);
  size_t snapshot(GlmFenceBlock* out, size_t capacity);
  std::string out_of_memory_text(size_t size, int device);

 private:
  class Scope;  // the device's context, and a capture mode in which the calls below are allowed

  Allocator();
  bool start();  // loads the driver
  DeviceState* device_state(int device);
  bool capturing(Stream stream);
  std::shared_ptr<Pool> pool_of(DeviceState& state, Stream stream);
  bool take_free_span(DeviceState& state, Pool* pool, Stream stream, size_t bytes, Span* out);
  bool make_span(DeviceState& state, int device, size_t bytes, Span* out);
  void drop_span(DeviceState& state, const Span& span);
  void wait_for(DeviceState& state, Stream stream, const std::vector<Stream>& others, const Span& span);
  void retire(DeviceState& state, Waiting& waiting);  // its streams are done: idle, or unmapped
  bool finished(const Waiting& waiting) const;
  void reap_stream(DeviceState& state, StreamQueue& queue, size_t at_most);
  void reap_device(DeviceState& state);
  void trim(DeviceState& state);
  GlmFenceBlock row(const Block& block) const;

  std::mutex mutex_;
  Driver driver_{};
  bool started_ = false;
  GlmFenceOptions options_{};
  std::string journal_path_, libcuda_;
  Journal journal_;
  std::unordered_map<int, DeviceState> devices_;
  std::unordered_map<Address, Block> live_;
  uint64_t sequence_ = 0;
};

void set_last_error(const std::string& text);
const std::string& last_error();

}  // namespace glm_fence
