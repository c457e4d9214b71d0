// Writing new keys and values to their slots.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

template <class KV>
static void write_kv_as(Rows k, Rows v, const KVCache& cache, const int32_t* slots, int64_t tokens) {
    const int64_t head_dim = cache.head_dim, block_size = cache.block_size;
    const int64_t head_stride = head_dim * block_size;
#pragma omp parallel for schedule(static) if (tokens * cache.num_kv_heads * head_dim >= (1 << 14))
    for (int64_t token = 0; token < tokens; ++token) {
        if (slots[token] < 0) continue;
        const int64_t block = slots[token] / block_size, offset = slots[token] % block_size;
        for (int64_t head = 0; head < cache.num_kv_heads; ++head) {
            const float* key = k.data + token * k.stride + head * head_dim;
            const float* value = v.data + token * v.stride + head * head_dim;
            const int64_t base = (block * cache.num_kv_heads + head) * head_stride;
            KV* keys = static_cast<KV*>(cache.keys) + base + offset;
            KV* values = static_cast<KV*>(cache.values) + base + offset * head_dim;
            for (int64_t d = 0; d < head_dim; ++d) narrow(keys + d * block_size, key[d]);
            for (int64_t d = 0; d < head_dim; ++d) narrow(values + d, value[d]);
        }
    }
}

static void write_kv(Rows k, Rows v, const KVCache& cache, const int32_t* slots, int64_t tokens) {
    switch (cache.element) {
        case Element::float32: return write_kv_as<float>(k, v, cache, slots, tokens);
        case Element::float16: return write_kv_as<Half>(k, v, cache, slots, tokens);
        case Element::bfloat16: return write_kv_as<BFloat>(k, v, cache, slots, tokens);
    }
}

}  // namespace quire::QUIRE_ISA
