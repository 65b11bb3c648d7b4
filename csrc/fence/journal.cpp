// Writes the list of blocks into a shared mapping of its file.
#include "journal.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace glm_fence {

void Journal::open(const GlmFenceOptions& options, uint64_t granularity, std::string* error) {
  std::string path = options.journal ? options.journal : "";
  if (path.empty() || opened()) return;
  if (size_t at = path.find("%p"); at != std::string::npos) path.replace(at, 2, std::to_string(getpid()));
  bytes_ = sizeof(JournalHeader) + size_t(options.journal_slots) * sizeof(GlmFenceBlock);
  int file = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  void* memory = MAP_FAILED;
  if (file >= 0 && ftruncate(file, off_t(bytes_)) == 0)
    memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) *error = "the fence cannot write its journal " + path + ": " + strerror(errno);
  if (file >= 0) ::close(file);
  if (memory == MAP_FAILED) return;
  header_ = static_cast<JournalHeader*>(memory);
  rows_ = reinterpret_cast<GlmFenceBlock*>(header_ + 1);
  *header_ = JournalHeader{{'G', 'L', 'M', 'F', 'E', 'N', 'C', 'E'}, 1, options.journal_slots, uint64_t(getpid()),
                           granularity, options.align, options.guard_before, {}};
}

void Journal::close() {
  if (header_) munmap(header_, bytes_);
  *this = Journal();
}

uint32_t Journal::add(const GlmFenceBlock& block) {
  if (!rows_) return kNoSlot;
  uint32_t slot = kNoSlot;
  if (used_ < header_->slots) {
    slot = used_++;
  } else if (!free_rows_.empty()) {
    slot = free_rows_.front();
    free_rows_.pop_front();
  }
  if (slot != kNoSlot) rows_[slot] = block;
  return slot;
}

void Journal::freed(uint32_t slot) {
  if (!rows_ || slot == kNoSlot) return;
  rows_[slot].state = GLM_FENCE_FREED;
  free_rows_.push_back(slot);
}

}  // namespace glm_fence
