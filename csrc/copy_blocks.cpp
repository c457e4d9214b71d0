// Copy-on-write: whole blocks of all layers, keys and values.

#include <omp.h>
#include <string.h>

#include <algorithm>

#include "kernels.h"
#include "thread_pool.h"

namespace quire {

static int64_t element_size(KVElement element) {
    switch (element) {
        case KVElement::float32: return 4;
        case KVElement::float16:
        case KVElement::bfloat16: return 2;
        case KVElement::int8: return 1;
    }
    return 0;
}

void copy_cache_blocks(const KVCache* caches, int64_t num_caches, const int32_t* pairs, int64_t num_pairs) {
    if (num_caches == 0) return;
    const int64_t head_bytes = caches->num_kv_heads * element_size(caches->element);
    const int64_t key_bytes = caches->key_stride() * head_bytes, value_bytes = caches->value_stride() * head_bytes;
    const int64_t num_copies = 2 * num_caches * num_pairs;
    const auto copy = [&](int64_t i) {
        const KVCache& cache = caches[i / (2 * num_pairs)];
        char* blocks = static_cast<char*>(i % 2 ? cache.values : cache.keys);
        const int64_t block_bytes = i % 2 ? value_bytes : key_bytes;
        if (block_bytes == 0) return;  // a latent cache has no values
        const int32_t* pair = pairs + i / 2 % num_pairs * 2;
        memcpy(blocks + pair[1] * block_bytes, blocks + pair[0] * block_bytes, block_bytes);
    };
    const int64_t threads = num_copies * key_bytes >= (1 << 19) ? omp_get_max_threads() : 1;
    const int64_t num_runs = std::min<int64_t>(num_copies, 1024);
    const auto copy_run = [&](int64_t run) {
        for (int64_t i = run * num_copies / num_runs; i < (run + 1) * num_copies / num_runs; ++i) copy(i);
    };
    using Run = decltype(copy_run);
    const auto call = [](const void* run, int64_t index, int64_t) { (*static_cast<const Run*>(run))(index); };
    run_tasks(threads, num_runs, call, &copy_run);
}

}  // namespace quire
