// Names the kernel that faults: CUPTI tells of every launch, each is waited for, and the first that fails is written down.
// It does not depend on the driver's core dump, which stays unwritten where a server faults (fence/launches.py).
#pragma once

#include "glm_fence.h"

namespace glm_fence {

// Subscribes to CUPTI if launches are to be watched and this process does not yet; called after CUDA has been used, so
// that a process that only forks those that use CUDA stays free of it. What fails is said once; the process goes on.
void begin_watching_launches();

}  // namespace glm_fence
