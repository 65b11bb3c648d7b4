// The list of blocks in a file that outlives a crash: the fault report reads it after the driver has aborted the process.
#pragma once

#include <cstdint>
#include <deque>
#include <string>

#include "glm_fence.h"

namespace glm_fence {

struct JournalHeader {  // 64 bytes, read by fence/journal.py
  char magic[8];        // "GLMFENCE"
  uint32_t version, slots;
  uint64_t pid, granularity;
  uint32_t align, guard_before;
  uint64_t unused[3];
};
static_assert(sizeof(JournalHeader) == 64, "fence/journal.py reads a header of 64 bytes");

class Journal {
 public:
  static constexpr uint32_t kNoSlot = UINT32_MAX;

  // Creates the file; a journal that cannot be written is no reason to fail: *error says why, rows are then dropped.
  void open(const GlmFenceOptions& options, uint64_t granularity, std::string* error);
  void close();
  bool opened() const { return rows_ != nullptr; }

  // Takes an unused row, else the one that was freed longest ago; kNoSlot when all are live.
  uint32_t add(const GlmFenceBlock& block);
  void freed(uint32_t slot);  // the row stays readable until it is needed again

 private:
  JournalHeader* header_ = nullptr;
  GlmFenceBlock* rows_ = nullptr;
  size_t bytes_ = 0;
  uint32_t used_ = 0;
  std::deque<uint32_t> free_rows_;
};

}  // namespace glm_fence
