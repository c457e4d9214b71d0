// Rows of GGUF's blocks eight by eight, as gguf_rows.h reads them fastest; moves bytes, hence no instruction set.

#include <omp.h>
#include <string.h>

#include <algorithm>

#include "kernels.h"
#include "thread_pool.h"

namespace quire {

void interleave_blocks(const uint8_t* rows, int64_t num_rows, int64_t row_bytes, BlockSizes sizes, uint8_t* to) {
    constexpr int64_t kRows = kInterleavedRows, kWord = 4;
    const int64_t rest = sizes.bytes % kWord, words = sizes.bytes - rest;
    const int64_t rest_at = sizes.numbers == 256 ? words : 0, words_at = rest_at ? 0 : rest;
    const auto interleave = [&](int64_t run) {
        const uint8_t* const first = rows + run * kRows * row_bytes;
        for (int64_t block = 0; block < row_bytes; block += sizes.bytes) {
            uint8_t* const target = to + kRows * (run * row_bytes + block);
            for (int64_t r = 0; r < kRows; ++r) {
                const uint8_t* const from = first + r * row_bytes + block;
                memcpy(target + kRows * rest_at + r * rest, from + rest_at, rest);
                for (int64_t at = words_at; at < words_at + words; at += kWord)
                    memcpy(target + kRows * at + r * kWord, from + at, kWord);
            }
        }
    };
    const int64_t num_runs = num_rows / kRows, num_tasks = std::min<int64_t>(num_runs, 1024);
    const auto interleave_some = [&](int64_t task) {
        for (int64_t run = task * num_runs / num_tasks; run < (task + 1) * num_runs / num_tasks; ++run) interleave(run);
    };
    using Task = decltype(interleave_some);
    const auto call = [](const void* task, int64_t index, int64_t) { (*static_cast<const Task*>(task))(index); };
    const int64_t threads = num_rows * row_bytes >= 1 << 19 ? std::min<int64_t>(omp_get_max_threads(), kMostThreads) : 1;
    run_tasks(threads, num_tasks, call, &interleave_some);
}

}  // namespace quire
