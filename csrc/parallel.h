// Loops over tasks that threads take one by one: a thread that is late takes fewer, and none waits but for the last.
#pragma once

#include <omp.h>

#include "simd.h"

namespace quire::QUIRE_ISA {

// Threads that a loop may use.
QUIRE_INLINE int64_t num_threads() { return omp_get_max_threads(); }

// task(index, thread) for every index below `count`, in any order, each by one thread. A thread is a number below
// num_threads(). Returns when all tasks are done. `parallel` false: the caller does them all, which is sooner where
// they are worth less than waking a thread.
template <class Task>
static void share_tasks(bool parallel, int64_t count, const Task& task) {
    if (!parallel || count < 2) {
        for (int64_t index = 0; index < count; ++index) task(index, int64_t(0));
        return;
    }
    int64_t next = 0;
#pragma omp parallel
    for (int64_t index; (index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;)
        task(index, int64_t(omp_get_thread_num()));
}

}  // namespace quire::QUIRE_ISA
