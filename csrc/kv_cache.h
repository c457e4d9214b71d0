// Writing new keys and values to their slots.
#pragma once

#include "kernels.h"
#include "linear_low_bit.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

// One number of a key or a value. What is beyond the range of float16 becomes its largest number: one infinite key or
// value would turn all later tokens of its sequence into NaN.
template <class KV>
QUIRE_INLINE void put(KV* p, float x) { narrow(p, x); }
QUIRE_INLINE void put(Half* p, float x) {
    constexpr float largest = 65504.0f;
    narrow(p, x > largest ? largest : x < -largest ? -largest : x);
}

template <class KV>
static void write_kv_as(Rows k, Rows v, const KVCache& cache, const int32_t* slots, int64_t tokens) {
    const int64_t head_dim = cache.head_dim, value_dim = cache.value_dim, block_size = cache.block_size;
    share_tasks(tokens * cache.num_kv_heads * head_dim >= (1 << 14), tokens, [&](int64_t token, int64_t) {
        if (slots[token] < 0) return;
        const int64_t block = slots[token] / block_size, offset = slots[token] % block_size;
        for (int64_t head = 0; head < cache.num_kv_heads; ++head) {
            const float* key = k.data + token * k.stride + head * head_dim;
            const int64_t block_head = block * cache.num_kv_heads + head;
            KV* keys = static_cast<KV*>(cache.keys) + block_head * cache.key_stride() + offset;
            for (int64_t d = 0; d < head_dim; ++d) put(keys + d * block_size, key[d]);
            if (cache.latent()) continue;
            const float* value = v.data + token * v.stride + head * value_dim;
            KV* values = static_cast<KV*>(cache.values) + block_head * cache.value_stride() + offset * value_dim;
            for (int64_t d = 0; d < value_dim; ++d) put(values + d, value[d]);
        }
    });
}

// Each key and each value becomes whole numbers from -127 to 127 and one scale.
static void write_kv_as_bytes(Rows k, Rows v, const KVCache& cache, const int32_t* slots, int64_t tokens) {
    const int64_t head_dim = cache.head_dim, value_dim = cache.value_dim, block_size = cache.block_size;
    share_tasks(tokens * cache.num_kv_heads * head_dim >= (1 << 14), tokens, [&](int64_t token, int64_t) {
        if (slots[token] < 0) return;
        const int64_t block = slots[token] / block_size, offset = slots[token] % block_size;
        for (int64_t head = 0; head < cache.num_kv_heads; ++head) {
            const int64_t block_head = block * cache.num_kv_heads + head;
            int8_t* keys = static_cast<int8_t*>(cache.keys) + block_head * cache.key_stride();
            int8_t key[kMostHeadDim];
            float scales[2];
            quantize_row(k.data + token * k.stride + head * head_dim, head_dim, head_dim, head_dim, 0, key, scales, nullptr);
            if (cache.latent()) {
                scales[1] = scales[0];
            } else {
                int8_t* values =
                    static_cast<int8_t*>(cache.values) + block_head * cache.value_stride() + offset * value_dim;
                quantize_row(v.data + token * v.stride + head * value_dim, value_dim, value_dim, value_dim, 0, values,
                             scales + 1, nullptr);
            }
            for (int64_t d = 0; d < head_dim; ++d) keys[d * block_size + offset] = key[d];
            int8_t* key_scales = keys + head_dim * block_size;
            memcpy(key_scales + offset * sizeof(float), scales, sizeof(float));
            memcpy(key_scales + (block_size + offset) * sizeof(float), scales + 1, sizeof(float));
        }
    });
}

static void write_kv(Rows k, Rows v, const KVCache& cache, const int32_t* slots, int64_t tokens) {
    switch (cache.element) {
        case KVElement::float32: return write_kv_as<float>(k, v, cache, slots, tokens);
        case KVElement::float16: return write_kv_as<Half>(k, v, cache, slots, tokens);
        case KVElement::bfloat16: return write_kv_as<BFloat>(k, v, cache, slots, tokens);
        case KVElement::int8: return write_kv_as_bytes(k, v, cache, slots, tokens);
    }
}

}  // namespace quire::QUIRE_ISA
