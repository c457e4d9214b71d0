// The blocks of GGUF, whose layouts quire/kernels/blocks.py specifies: a row of them becomes bytes with a sign, a scale
// for each group of 16 or 32, and for some types an offset: number = byte * scale + offset.
#pragma once

#include "elementwise.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

QUIRE_INLINE float half_at(const uint8_t* p) {
    Half half;
    memcpy(&half.bits, p, sizeof half.bits);
    return widen(half);
}

// The low halves of `n` bytes, then the high ones.
template <int n>
QUIRE_INLINE void nibbles(const uint8_t* packed, int8_t* to, int zero_point) {
    for (int i = 0; i < n; ++i) to[i] = int8_t((packed[i] & 15) - zero_point);
    for (int i = 0; i < n; ++i) to[i + n] = int8_t((packed[i] >> 4) - zero_point);
}

template <int n>
QUIRE_INLINE void nibbles_by_table(const uint8_t* packed, int8_t* to, const int8_t* table) {
#if defined(__SSSE3__)
    static_assert(n == 16);
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)), low = _mm_set1_epi8(15);
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(numbers, _mm_and_si128(codes, low)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + n),
                     _mm_shuffle_epi8(numbers, _mm_and_si128(_mm_srli_epi16(codes, 4), low)));
#else
    for (int i = 0; i < n; ++i) to[i] = table[packed[i] & 15];
    for (int i = 0; i < n; ++i) to[i + n] = table[packed[i] >> 4];
#endif
}

// Adds bit i of a word, times 16, to byte i.
QUIRE_INLINE void add_fifth_bits(const uint8_t* word, int8_t* to) {
    uint32_t bits;
    memcpy(&bits, word, sizeof bits);
    for (int i = 0; i < 32; ++i) to[i] = int8_t(to[i] + ((bits >> i & 1) << 4));
}

// Scales and offsets of the eight sub-blocks of Q4_K and Q5_K: two halves, and 12 bytes with six bits of each.
QUIRE_INLINE void k_scales(const uint8_t* block, float* scale, float* offset) {
    const float d = half_at(block), least = half_at(block + 2);
    const uint8_t* const s = block + 4;
    for (int j = 0; j < 8; ++j) {
        const int whole = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        const int shift = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | (s[j] >> 6) << 4;
        scale[j] = d * float(whole);
        offset[j] = -(least * float(shift));
    }
}

alignas(16) constexpr int8_t kIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
alignas(16) constexpr int8_t kTwiceE2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// For each type: numbers of a block, its bytes, numbers that share a scale, whether there are offsets, and the block.
struct Q4_0 {
    static constexpr int kValues = 32, kBytes = 18, kGroup = 32;
    static constexpr bool kOffsets = false;
    static QUIRE_INLINE void unpack(const uint8_t* b, int8_t* q, float* scale, float*) {
        nibbles<16>(b + 2, q, 8);
        *scale = half_at(b);
    }
};
struct Q4_1 {
    static constexpr int kValues = 32, kBytes = 20, kGroup = 32;
    static constexpr bool kOffsets = true;
    static QUIRE_INLINE void unpack(const uint8_t* b, int8_t* q, float* scale, float* offset) {
        nibbles<16>(b + 4, q, 0);
        *scale = half_at(b);
        *offset = half_at(b + 2);
    }
};
struct Q5_0 {
    static constexpr int kValues = 32, kBytes = 22, kGroup = 32;
    static constexpr bool kOffsets = false;
    static QUIRE_INLINE void unpack(const uint8_t* b, int8_t* q, float* scale, float*) {
        nibbles<16>(b + 6, q, 16);
        add_fifth_bits(b + 2, q);
        *scale = half_at(b);
    }
};
struct Q5_1 {
    static constexpr int kValues = 32, kBytes = 24, kGroup = 32;
    static constexpr bool kOffsets = true;
    static QUIRE_INLINE void unpack(const uint8_t* b, int8_t* q, float* scale, float* offset) {
        nibbles<16>(b + 8, q, 0);
        add_fifth_bits(b + 4, q);
        *scale = half_at(b);
        *offset = half_at(b + 2);
    }
};
struct Q8_0 {
    static constexpr int kValues = 32, kBytes = 34, kGroup = 32;
    static constexpr bool kOffsets = false;
    static QUIRE_INLINE void unpack(const uint8_t* b, int8_t* q, float* scale, float*) {
        memcpy(q, b + 2, 32);
        *scale = half_at(b);
    }
};
struct Q2_K {
    static constexpr int kValues = 256, kBytes = 84, kGroup = 16;
    static constexpr bool kOffsets = true;
    static QUIRE_INLINE void unpack(const uint8_t* b, int8_t* q, float* scale, float* offset) {
        for (int half = 0; half < 2; ++half)
            for (int shift = 0; shift < 4; ++shift)
                for (int i = 0; i < 32; ++i)
                    q[half * 128 + shift * 32 + i] = int8_t(b[16 + half * 32 + i] >> (2 * shift) & 3);
        const float d = half_at(b + 80), least = half_at(b + 82);
        for (int i = 0; i < 16; ++i) {
            scale[i] = d * float(b[i] & 15);
            offset[i] = -(least * float(b[i] >> 4));
        }
    }
};
struct Q3_K {
    static constexpr int kValues = 256, kBytes = 110, kGroup = 16;
    static constexpr bool kOffsets = false;
    static QUIRE_INLINE void unpack(const uint8_t* b, int8_t* q, float* scale, float*) {
        for (int part = 0; part < 8; ++part)
            for (int i = 0; i < 32; ++i) {
                const int low = b[32 + part / 4 * 32 + i] >> (2 * (part % 4)) & 3;
                q[part * 32 + i] = int8_t(low + ((b[i] >> part & 1) << 2) - 4);
            }
        const float d = half_at(b + 108);
        const uint8_t* s = b + 96;
        for (int i = 0; i < 16; ++i) {
            const int low = i < 8 ? s[i] & 15 : s[i - 8] >> 4, high = s[8 + i % 4] >> (2 * (i / 4)) & 3;
            scale[i] = d * float((low | high << 4) - 32);
        }
    }
};
struct Q4_K {
    static constexpr int kValues = 256, kBytes = 144, kGroup = 32;
    static constexpr bool kOffsets = true;
    static QUIRE_INLINE void unpack(const uint8_t* b, int8_t* q, float* scale, float* offset) {
        for (int i = 0; i < 4; ++i) nibbles<32>(b + 16 + 32 * i, q + 64 * i, 0);
        k_scales(b, scale, offset);
    }
};
struct Q5_K {
    static constexpr int kValues = 256, kBytes = 176, kGroup = 32;
    static constexpr bool kOffsets = true;
    static QUIRE_INLINE void unpack(const uint8_t* b, int8_t* q, float* scale, float* offset) {
        for (int i = 0; i < 4; ++i) nibbles<32>(b + 48 + 32 * i, q + 64 * i, 0);
        for (int j = 0; j < 8; ++j)
            for (int i = 0; i < 32; ++i) q[32 * j + i] = int8_t(q[32 * j + i] + ((b[16 + i] >> j & 1) << 4));
        k_scales(b, scale, offset);
    }
};
struct Q6_K {
    static constexpr int kValues = 256, kBytes = 210, kGroup = 16;
    static constexpr bool kOffsets = false;
    static QUIRE_INLINE void unpack(const uint8_t* b, int8_t* q, float* scale, float*) {
        const float d = half_at(b + 208);
        for (int half = 0; half < 2; ++half) {
            const uint8_t *low = b + 64 * half, *high = b + 128 + 32 * half;
            int8_t* to = q + 128 * half;
            for (int i = 0; i < 32; ++i) {
                to[i] = int8_t(((low[i] & 15) | (high[i] & 3) << 4) - 32);
                to[i + 32] = int8_t(((low[i + 32] & 15) | (high[i] >> 2 & 3) << 4) - 32);
                to[i + 64] = int8_t((low[i] >> 4 | (high[i] >> 4 & 3) << 4) - 32);
                to[i + 96] = int8_t((low[i + 32] >> 4 | (high[i] >> 6) << 4) - 32);
            }
        }
        for (int i = 0; i < 16; ++i) scale[i] = d * float(int8_t(b[192 + i]));
    }
};
struct IQ4_NL {
    static constexpr int kValues = 32, kBytes = 18, kGroup = 32;
    static constexpr bool kOffsets = false;
    static QUIRE_INLINE void unpack(const uint8_t* b, int8_t* q, float* scale, float*) {
        nibbles_by_table<16>(b + 2, q, kIq4);
        *scale = half_at(b);
    }
};
struct IQ4_XS {
    static constexpr int kValues = 256, kBytes = 136, kGroup = 32;
    static constexpr bool kOffsets = false;
    static QUIRE_INLINE void unpack(const uint8_t* b, int8_t* q, float* scale, float*) {
        const float d = half_at(b);
        const int high = b[2] | b[3] << 8;
        for (int j = 0; j < 8; ++j) {
            nibbles_by_table<16>(b + 8 + 16 * j, q + 32 * j, kIq4);
            scale[j] = d * float(((b[4 + j / 2] >> (4 * (j % 2)) & 15) | (high >> (2 * j) & 3) << 4) - 32);
        }
    }
};
struct Mxfp4Block {
    static constexpr int kValues = 32, kBytes = 17, kGroup = 32;
    static constexpr bool kOffsets = false;
    static QUIRE_INLINE void unpack(const uint8_t* b, int8_t* q, float* scale, float*) {
        nibbles_by_table<16>(b + 1, q, kTwiceE2m1);
        // Half of 2^(e - 127). Exponents 0 and 1 make numbers below the normal ones, 255 is NaN.
        const uint32_t e = b[0];
        *scale = as_float(e == 255 ? 0x7fc00000 : e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
};

// A row of k numbers: bytes [k], scales [k / kGroup], and offsets of that size where there are any.
template <class Block>
QUIRE_INLINE void unpack_row(const uint8_t* row, int64_t k, int8_t* bytes, float* scales, float* offsets) {
    constexpr int kGroups = Block::kValues / Block::kGroup;
    for (int64_t i = 0; i < k / Block::kValues; ++i)
        Block::unpack(row + i * Block::kBytes, bytes + i * Block::kValues, scales + i * kGroups, offsets + i * kGroups);
}

// Calls f<Block>() for the struct of a type.
template <class F>
QUIRE_INLINE auto with_block(BlockType type, F f) {
    switch (type) {
        case BlockType::q4_0: return f.template operator()<Q4_0>();
        case BlockType::q4_1: return f.template operator()<Q4_1>();
        case BlockType::q5_0: return f.template operator()<Q5_0>();
        case BlockType::q5_1: return f.template operator()<Q5_1>();
        case BlockType::q8_0: return f.template operator()<Q8_0>();
        case BlockType::q2_k: return f.template operator()<Q2_K>();
        case BlockType::q3_k: return f.template operator()<Q3_K>();
        case BlockType::q4_k: return f.template operator()<Q4_K>();
        case BlockType::q5_k: return f.template operator()<Q5_K>();
        case BlockType::q6_k: return f.template operator()<Q6_K>();
        case BlockType::iq4_nl: return f.template operator()<IQ4_NL>();
        case BlockType::iq4_xs: return f.template operator()<IQ4_XS>();
        case BlockType::mxfp4: break;
    }
    return f.template operator()<Mxfp4Block>();
}

static void gather_rows_blocks(const BlockPart& from, int64_t k, const int32_t* ids, int64_t count, float* out,
                               float* scratch) {
    // For each thread the bytes, scales and offsets of a row.
    const int64_t words = k / 4 + 2 * (k / 16);
    share_tasks(count * k >= kParallelElements, count, [&](int64_t i, int64_t thread) {
        float* const scales = scratch + thread * words;
        float* const offsets = scales + k / 16;
        int8_t* const bytes = reinterpret_cast<int8_t*>(offsets + k / 16);
        with_block(from.type, [&]<class Block>() {
            unpack_row<Block>(from.rows + ids[i] * from.row_bytes, k, bytes, scales, offsets);
            for (int64_t j = 0; j < k; ++j) {
                const float number = float(bytes[j]) * scales[j / Block::kGroup];
                out[i * k + j] = Block::kOffsets ? number + offsets[j / Block::kGroup] : number;
            }
        });
    });
}

}  // namespace quire::QUIRE_ISA
