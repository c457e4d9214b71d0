// The threads that share a kernel's tasks.
#pragma once

#include <stdint.h>

namespace quire {

// Does the task `index`, on the thread of that number.
using TaskFunction = void (*)(const void* context, int64_t index, int64_t thread);

constexpr int64_t kMostThreads = 256, kMostTasks = 65535;

// Do the tasks 0 … count - 1, each once, on the caller and up to threads - 1 others; `thread` is below `threads`. Returns
// when all are done. With `threads` up to kMostThreads and `count` up to kMostTasks.
void run_tasks(int64_t threads, int64_t count, TaskFunction task, const void* context);

}  // namespace quire
