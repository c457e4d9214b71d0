// Loops over tasks that threads share: a thread that is late does fewer, and none waits but for the last task.
#pragma once

#include <omp.h>

#include "simd.h"
#include "thread_pool.h"

namespace quire::QUIRE_ISA {

// Threads that a loop may use: as many as torch, whose number OpenMP keeps.
QUIRE_INLINE int64_t num_threads() { return min_of(omp_get_max_threads(), kMostThreads); }

// Taking a task costs some tens of nanoseconds, so many short ones are taken in runs.
constexpr int64_t kRunsPerThread = 32;

// task(index, thread) for every index below `count`, in any order, each by one thread. A thread is a number below
// num_threads(). Returns when all tasks are done. `parallel` false: the caller does them all, which is sooner where
// they are worth less than waking a thread.
template <class Task>
static void share_tasks(bool parallel, int64_t count, const Task& task) {
    const int64_t threads = parallel ? num_threads() : 1;
    if (threads < 2 || count < 2) {
        for (int64_t index = 0; index < count; ++index) task(index, int64_t(0));
        return;
    }
    const int64_t num_runs = min_of(count, threads * kRunsPerThread);
    const auto do_run = [&](int64_t run, int64_t thread) {
        for (int64_t i = run * count / num_runs; i < (run + 1) * count / num_runs; ++i) task(i, thread);
    };
    using Run = decltype(do_run);
    const auto call = [](const void* run, int64_t index, int64_t thread) { (*static_cast<const Run*>(run))(index, thread); };
    run_tasks(threads, num_runs, call, &do_run);
}

}  // namespace quire::QUIRE_ISA
