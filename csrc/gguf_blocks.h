// The blocks of GGUF, whose layouts quire/kernels/blocks.py specifies, of all rows that gguf_rows.h takes together.
//
// Unpacked, a row is codes of a byte and a scale for each group of 16 or 32 of them, for some types with an offset:
// number = (code - zero point) * scale + offset.
#pragma once

#include "gguf_rows.h"
#include "kernels.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

// The float16 in the lower half of each word.
QUIRE_INLINE RowFloats halves_of(RowWords words) {
#if defined(__AVX512F__)
    return (RowFloats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)words));
#elif defined(__F16C__)
    const __m256i low = (__m256i)(words & 0xffff);
    return (RowFloats)_mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
#else
    RowFloats floats;
    for (int r = 0; r < kRowsTogether; ++r) floats[r] = widen(Half{uint16_t(words[r])});
    return floats;
#endif
}

QUIRE_INLINE RowFloats to_floats(RowWords words) { return __builtin_convertvector((RowInts)words, RowFloats); }
QUIRE_INLINE RowFloats byte_of_words(RowWords words, int index) { return to_floats(words >> (8 * index) & 255); }

// The byte of a table of 16 for each byte of the words, all below 16.
QUIRE_INLINE RowWords by_table(RowWords codes, const int8_t* table) {
#if defined(__AVX512F__)
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return (RowWords)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(numbers), (__m512i)codes);
#elif defined(__AVX2__)
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return (RowWords)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(numbers), (__m256i)codes);
#else
    uint8_t bytes[sizeof codes];
    memcpy(bytes, &codes, sizeof bytes);
    for (uint8_t& byte : bytes) byte = uint8_t(table[byte]);
    memcpy(&codes, bytes, sizeof bytes);
    return codes;
#endif
}

// Rows as they are unpacked. A step is four inputs.
struct UnpackedBlocks {
    uint8_t* codes;  // [step][kRowsTogether][4]
    float* scales;   // [group][kRowsTogether]
    float* offsets;  // the same

    QUIRE_INLINE void put_step(int64_t step, RowWords four) const {
        memcpy(codes + step * kRowsTogether * 4, &four, sizeof four);
    }
    QUIRE_INLINE void put_scale(int64_t group, RowFloats scale) const {
        memcpy(scales + group * kRowsTogether, &scale, sizeof scale);
    }
    QUIRE_INLINE void put_offset(int64_t group, RowFloats offset) const {
        memcpy(offsets + group * kRowsTogether, &offset, sizeof offset);
    }
    QUIRE_INLINE UnpackedBlocks from_lane(int64_t lane) const { return {codes + lane * 4, scales + lane, offsets + lane}; }
    QUIRE_INLINE UnpackedBlocks from_group(int64_t group, int64_t steps_of_group) const {
        return {codes + group * steps_of_group * kRowsTogether * 4, scales + group * kRowsTogether,
                offsets + group * kRowsTogether};
    }
};

constexpr uint32_t kLowHalves = 0x0f0f0f0f;

// 16 bytes of halves: inputs 0 to 15 in the low ones, 16 to 31 in the high ones.
template <class Blocks, class Change>
QUIRE_INLINE void unpack_halves(const Blocks& b, int64_t at, const UnpackedBlocks& to, const Change& change) {
    RowWords words[4];
    b.words(at, words);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        to.put_step(j, change(words[j] & kLowHalves, j));
        to.put_step(j + 4, change(words[j] >> 4 & kLowHalves, j + 4));
    }
}
constexpr auto kUnchanged = [](RowWords codes, int) { return codes; };

// 32 bytes: the eight steps of one group, or of several in a few bits each.
template <class Blocks>
QUIRE_INLINE void eight_words(const Blocks& b, int64_t at, RowWords* words) {
    b.words(at, words);
    b.words(at + 16, words + 4);
}

// Bit i of a row's word, times 16, as byte i of 32.
struct FifthBits {
    RowWords bits;
    QUIRE_INLINE RowWords of_step(int step) const {
        // The four bits to the lowest ones of four bytes.
        const RowWords four = bits >> (4 * step) & 15;
        return ((four | four << 7 | four << 14 | four << 21) & 0x01010101) << 4;
    }
};

// Scales and offsets of the eight groups of Q4_K and Q5_K: two float16, and 12 bytes with six bits of each.
template <class Blocks>
QUIRE_INLINE void unpack_k_scales(const Blocks& b, const UnpackedBlocks& to) {
    RowWords words[4];
    b.words(0, words);
    const RowFloats d = halves_of(words[0]), least = -halves_of(words[0] >> 16);
    const uint32_t six = 0x3f3f3f3f, two = 0x03030303;
    const RowWords scales[] = {words[1] & six, (words[3] & kLowHalves) | (words[1] >> 6 & two) << 4};
    const RowWords offsets[] = {words[2] & six, (words[3] >> 4 & kLowHalves) | (words[2] >> 6 & two) << 4};
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
        to.put_scale(group, byte_of_words(scales[group / 4], group % 4) * d);
        to.put_offset(group, byte_of_words(offsets[group / 4], group % 4) * least);
    }
}

alignas(16) constexpr int8_t kIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
alignas(16) constexpr int8_t kTwiceE2m1And12[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// For each type: numbers of a block, its bytes, numbers that share a scale, the largest code (0: codes have a sign), what
// is taken from a code, whether there are offsets, and a block of each row.
template <int values, int bytes, int group, int largest, int zero_point, bool has_offsets>
struct BlockForm {
    static constexpr int kValues = values, kBytes = bytes, kGroup = group, kLargest = largest, kZeroPoint = zero_point;
    static constexpr bool kOffsets = has_offsets;
};

struct Q4_0 : BlockForm<32, 18, 32, 15, 8, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        unpack_halves(b, 2, to, kUnchanged);
        to.put_scale(0, b.halves(0));
    }
};
struct Q4_1 : BlockForm<32, 20, 32, 15, 0, true> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        unpack_halves(b, 4, to, kUnchanged);
        const RowWords both = b.word(0);
        to.put_scale(0, halves_of(both));
        to.put_offset(0, halves_of(both >> 16));
    }
};
struct Q5_0 : BlockForm<32, 22, 32, 31, 16, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        const FifthBits fifth{b.word(2)};
        unpack_halves(b, 6, to, [&](RowWords codes, int step) { return codes | fifth.of_step(step); });
        to.put_scale(0, b.halves(0));
    }
};
struct Q5_1 : BlockForm<32, 24, 32, 31, 0, true> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        const FifthBits fifth{b.word(4)};
        unpack_halves(b, 8, to, [&](RowWords codes, int step) { return codes | fifth.of_step(step); });
        const RowWords both = b.word(0);
        to.put_scale(0, halves_of(both));
        to.put_offset(0, halves_of(both >> 16));
    }
};
struct Q8_0 : BlockForm<32, 34, 32, 0, 0, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        RowWords words[8];
        eight_words(b, 2, words);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) to.put_step(j, words[j]);
        to.put_scale(0, b.halves(0));
    }
};
struct Q2_K : BlockForm<256, 84, 16, 3, 0, true> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        for (int half = 0; half < 2; ++half) {
            RowWords words[8];
            eight_words(b, 16 + 32 * half, words);
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part)
#pragma GCC unroll 8
                for (int j = 0; j < 8; ++j) to.put_step(half * 32 + part * 8 + j, words[j] >> (2 * part) & 0x03030303);
        }
        RowWords both[4];
        b.words(0, both);
        const RowWords units = b.word(80);
        const RowFloats d = halves_of(units), least = -halves_of(units >> 16);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            const RowWords byte = both[i / 4] >> (8 * (i % 4));
            to.put_scale(i, to_floats(byte & 15) * d);
            to.put_offset(i, to_floats(byte >> 4 & 15) * least);
        }
    }
};
struct Q3_K : BlockForm<256, 110, 16, 7, 4, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        RowWords high[8], low[8];
        eight_words(b, 0, high);
        for (int half = 0; half < 2; ++half) {
            eight_words(b, 32 + 32 * half, low);
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part)
#pragma GCC unroll 8
                for (int j = 0; j < 8; ++j) {
                    const RowWords third = (high[j] >> (4 * half + part) & 0x01010101) << 2;
                    to.put_step(half * 32 + part * 8 + j, (low[j] >> (2 * part) & 0x03030303) | third);
                }
        }
        const RowFloats d = b.halves(108);
        const RowWords first = b.word(96), second = b.word(100), upper = b.word(104);
        const RowWords of_low[] = {first & kLowHalves, second & kLowHalves, first >> 4 & kLowHalves, second >> 4 & kLowHalves};
#pragma GCC unroll 4
        for (int word = 0; word < 4; ++word) {
            const RowWords six = of_low[word] | (upper >> (2 * word) & 0x03030303) << 4;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) to.put_scale(4 * word + i, (byte_of_words(six, i) - 32.0f) * d);
        }
    }
};
struct Q4_K : BlockForm<256, 144, 32, 15, 0, true> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
#pragma GCC unroll 4
        for (int pair = 0; pair < 4; ++pair) {
            RowWords words[8];
            eight_words(b, 16 + 32 * pair, words);
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                to.put_step(pair * 16 + j, words[j] & kLowHalves);
                to.put_step(pair * 16 + 8 + j, words[j] >> 4 & kLowHalves);
            }
        }
        unpack_k_scales(b, to);
    }
};
struct Q5_K : BlockForm<256, 176, 32, 31, 0, true> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        RowWords high[8], low[8];
        eight_words(b, 16, high);
#pragma GCC unroll 4
        for (int pair = 0; pair < 4; ++pair) {
            eight_words(b, 48 + 32 * pair, low);
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                to.put_step(pair * 16 + j, (low[j] & kLowHalves) | (high[j] >> (2 * pair) & 0x01010101) << 4);
                to.put_step(pair * 16 + 8 + j, (low[j] >> 4 & kLowHalves) | (high[j] >> (2 * pair + 1) & 0x01010101) << 4);
            }
        }
        unpack_k_scales(b, to);
    }
};
struct Q6_K : BlockForm<256, 210, 16, 63, 32, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        for (int half = 0; half < 2; ++half) {
            RowWords high[8], low[8];
            eight_words(b, 128 + 32 * half, high);
#pragma GCC unroll 2
            for (int part = 0; part < 2; ++part) {
                eight_words(b, 64 * half + 32 * part, low);
#pragma GCC unroll 8
                for (int j = 0; j < 8; ++j) {
                    const int step = half * 32 + part * 8 + j;
                    to.put_step(step, (low[j] & kLowHalves) | (high[j] >> (2 * part) & 0x03030303) << 4);
                    to.put_step(step + 16, (low[j] >> 4 & kLowHalves) | (high[j] >> (2 * part + 4) & 0x03030303) << 4);
                }
            }
        }
        RowWords scales[4];
        b.words(192, scales);
        const RowFloats d = b.halves(208);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            const RowInts scale = (RowInts)(scales[i / 4] << (24 - 8 * (i % 4))) >> 24;
            to.put_scale(i, __builtin_convertvector(scale, RowFloats) * d);
        }
    }
};
struct IQ4_NL : BlockForm<32, 18, 32, 0, 0, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        unpack_halves(b, 2, to, [](RowWords codes, int) { return by_table(codes, kIq4); });
        to.put_scale(0, b.halves(0));
    }
};
struct IQ4_XS : BlockForm<256, 136, 32, 0, 0, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        const RowWords first = b.word(0), low = b.word(4), high = first >> 16;
        const RowFloats d = halves_of(first);
        for (int j = 0; j < 8; ++j) {
            unpack_halves(b, 8 + 16 * j, to.from_group(j, 8), [](RowWords codes, int) { return by_table(codes, kIq4); });
            const RowWords six = (low >> (4 * j) & 15) | (high >> (2 * j) & 3) << 4;
            to.put_scale(j, (to_floats(six) - 32.0f) * d);
        }
    }
};
struct Mxfp4Block : BlockForm<32, 17, 32, 24, 12, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        unpack_halves(b, 1, to, [](RowWords codes, int) { return by_table(codes, kTwiceE2m1And12); });
        // Half of 2^(e - 127). Exponents 0 and 1 make numbers below the normal ones, 255 is NaN.
        const RowWords e = b.byte(0);
        const RowWords normal = (e - 1) << 23, small = e == 0 ? 0x00200000u - RowWords{} : 0x00400000u - RowWords{};
        const RowWords number = e < 2 ? small : normal;
        to.put_scale(0, (RowFloats)(e == 255 ? 0x7fc00000u - RowWords{} : number));
    }
};

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

// Calls f<Blocks>() for the way in which a weight's rows lie.
template <class F>
QUIRE_INLINE void with_blocks_of(const BlockPart& part, F f) {
    if (part.interleaved) f.template operator()<InterleavedBlocks>();
    else f.template operator()<BlocksOfRows>();
}

// Rows of k numbers.
template <class Block, class Blocks>
static void unpack_rows(Blocks b, int64_t k, const UnpackedBlocks& to) {
    constexpr int64_t kGroups = Block::kValues / Block::kGroup;
    for (int64_t i = 0; i < k / Block::kValues; ++i, b.advance(Block::kBytes))
        Block::unpack(b, to.from_group(i * kGroups, Block::kGroup / 4));
}

}  // namespace quire::QUIRE_ISA
