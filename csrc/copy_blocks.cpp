// Copy-on-write: whole blocks of one layer, keys and values.

#include <string.h>

#include "kernels.h"

namespace quire {

void copy_cache_blocks(const KVCache& cache, const int32_t* pairs, int64_t num_pairs) {
    const int64_t element_size = cache.element == Element::float32 ? 4 : 2;
    const int64_t block_bytes = cache.num_kv_heads * cache.head_dim * cache.block_size * element_size;
#pragma omp parallel for schedule(static) if (num_pairs * block_bytes >= (1 << 18))
    for (int64_t i = 0; i < 2 * num_pairs; ++i) {
        char* blocks = static_cast<char*>(i % 2 ? cache.values : cache.keys);
        const int32_t* pair = pairs + i / 2 * 2;
        memcpy(blocks + pair[1] * block_bytes, blocks + pair[0] * block_bytes, block_bytes);
    }
}

}  // namespace quire
