// Threads that wait for the next loop in two stages: they spin for some tens of microseconds, then they sleep.
//
// A decode step has hundreds of loops of some microseconds each, so threads that slept at once would wake too late. On a
// busy machine a thread that spins for longer takes the core from the thread it waits for. A loop waits for tasks, not for
// threads: the others take the tasks of a thread that the system runs late.

#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <system_error>
#include <thread>

#include "old_systems.h"

QUIRE_OLDEST_VERSION(pthread_sigmask);

namespace quire {
namespace {

constexpr std::chrono::microseconds kSpin{60};
constexpr int kSpinsPerLook = 32;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether `done()` became true while this thread spun.
template <class Done>
bool spin_until(const Done& done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < kSpinsPerLook; ++i) {
            if (done()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

// The tasks [next, end) of one thread that nobody has taken, and the loop they belong to. One number, so that a thread
// which comes late cannot take a task of another loop.
struct Ticket {
    uint32_t loop;
    uint16_t next, end;
};
static_assert(std::atomic<Ticket>::is_always_lock_free);

class Pool {
  public:
    void run(int64_t threads, int64_t count, TaskFunction task, const void* context) {
        // A loop inside a task, or another thread's beside this one, runs where it was begun.
        if (threads < 2 || count < 2 || busy_.test_and_set(std::memory_order_acquire)) {
            for (int64_t index = 0; index < count; ++index) task(context, index, 0);
            return;
        }
        threads = std::min({threads, count, kMostThreads});
        while (num_workers_ < threads - 1 && add_worker()) ++num_workers_;
        task_ = task;
        context_ = context;
        threads_.store(threads, std::memory_order_relaxed);
        left_.store(int32_t(count), std::memory_order_relaxed);
        const uint32_t loop = loop_.load(std::memory_order_relaxed) + 1;
        for (int64_t t = 0; t < threads; ++t) {
            const Ticket ticket{loop, uint16_t(t * count / threads), uint16_t((t + 1) * count / threads)};
            slots_[t].ticket.store(ticket, std::memory_order_release);
        }
        loop_.store(loop, std::memory_order_seq_cst);
        loop_.notify_all();
        take_tasks(loop, 0);
        const auto all_done = [&] { return left_.load(std::memory_order_acquire) == 0; };
        if (!spin_until(all_done))
            for (int32_t left; (left = left_.load(std::memory_order_acquire)) != 0;) left_.wait(left);
        busy_.clear(std::memory_order_release);
    }

  private:
    struct alignas(64) Slot {
        std::atomic<Ticket> ticket{};
    };

    // Tasks of this thread first, in order: it did the same part of the last loop, whose weights its cache holds. Then those
    // of others, from the end.
    void take_tasks(uint32_t loop, int64_t thread) {
        const int64_t threads = threads_.load(std::memory_order_relaxed);
        int32_t done = 0;
        for (int64_t i = 0; i < threads; ++i) {
            std::atomic<Ticket>& slot = slots_[(thread + i) % threads].ticket;
            Ticket ticket = slot.load(std::memory_order_acquire);
            while (ticket.loop == loop && ticket.next < ticket.end) {
                Ticket rest = ticket;
                const uint16_t index = i == 0 ? rest.next++ : --rest.end;
                if (!slot.compare_exchange_weak(ticket, rest, std::memory_order_acquire)) continue;
                // The loop cannot end before this task does, so these are its task and context.
                task_(context_, index, thread);
                ++done;
                ticket = slot.load(std::memory_order_acquire);
            }
        }
        if (done && left_.fetch_sub(done, std::memory_order_seq_cst) == done) left_.notify_one();
    }

    void work(int64_t thread) {
        for (uint32_t seen = 0;;) {
            const auto has_begun = [&] { return loop_.load(std::memory_order_acquire) != seen; };
            if (!spin_until(has_begun)) loop_.wait(seen);
            seen = loop_.load(std::memory_order_acquire);
            if (thread < threads_.load(std::memory_order_relaxed)) take_tasks(seen, thread);
        }
    }

    // Whether the system gave another thread. Without it the others do its tasks.
    bool add_worker() {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the threads of the program
        bool added = true;
        try {
            std::thread([this, thread = num_workers_ + 1] { work(thread); }).detach();
        } catch (const std::system_error&) {
            added = false;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return added;
    }

    std::atomic_flag busy_;
    int64_t num_workers_ = 0;
    TaskFunction task_ = nullptr;
    const void* context_ = nullptr;
    std::atomic<int64_t> threads_{0};
    alignas(64) std::atomic<uint32_t> loop_{0};
    alignas(64) std::atomic<int32_t> left_{0};
    Slot slots_[kMostThreads];
};

// Never deleted: its threads use it to the end of the process. A forked process has none of them and begins anew.
Pool* pool = nullptr;

void make_pool() { pool = new Pool; }

}  // namespace

void run_tasks(int64_t threads, int64_t count, TaskFunction task, const void* context) {
    [[maybe_unused]] static const bool made = [] {
        make_pool();
        return pthread_atfork(nullptr, nullptr, make_pool) == 0;
    }();
    pool->run(threads, count, task, context);
}

}  // namespace quire
