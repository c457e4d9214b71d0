// The blocks of GGUF, whose layouts quire/kernels/blocks.py specifies. Eight rows are unpacked at once: a word of four
// bytes of each is a vector, so what has to be done to the bits of a row is done to eight.
//
// Interleaved, eight rows are one run of blocks of eight times the bytes: word after word of a block, each of all eight
// rows, so that a vector is one load. The bytes of a block that are no whole words lie before its words; of blocks of 256
// numbers behind them.
//
// Unpacked, a row is codes of a byte and a scale for each group of 16 or 32 of them, for some types with an offset:
// number = (code - zero point) * scale + offset.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

// Vectors of eight lanes are two registers where there is no AVX; functions on them are always inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
typedef float Floats8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef uint32_t Words8 __attribute__((vector_size(32)));

constexpr int64_t kRowsTogether = kInterleavedRows;

// Places of eight rows of blocks as a file has them, all at the same block.
struct BlocksOfRows {
    const uint8_t* rows[kRowsTogether];
    const uint8_t* ahead;  // where the next eight rows are, if they follow: read while these are

    // Rows `row` to `row + 7` of a weight, none past `end`: the last one takes their place.
    BlocksOfRows(const BlockPart& part, int64_t row, int64_t end) {
        for (int r = 0; r < kRowsTogether; ++r) rows[r] = part.rows + min_of(row + r, end - 1) * part.row_bytes;
        ahead = rows[kRowsTogether - 1] + part.row_bytes;
    }
    // The rows `ids`, at most eight.
    BlocksOfRows(const BlockPart& part, const int32_t* ids, int64_t count) {
        for (int r = 0; r < kRowsTogether; ++r) rows[r] = part.rows + ids[min_of(r, count - 1)] * part.row_bytes;
        ahead = rows[kRowsTogether - 1] + part.row_bytes;
    }

    QUIRE_INLINE void advance(int64_t block_bytes) {
        for (int64_t byte = 0; byte < kRowsTogether * block_bytes; byte += 64) __builtin_prefetch(ahead + byte, 0, 3);
        ahead += kRowsTogether * block_bytes;
        for (int r = 0; r < kRowsTogether; ++r) rows[r] += block_bytes;
    }

    // The four words at a byte of the blocks: word j of row r is lane r of words[j].
    QUIRE_INLINE void words(int64_t at, Words8* words) const {
#if defined(__AVX2__)
        const auto two = [&](int r) {
            const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + at));
            const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r + 4] + at));
            return _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
        };
        const __m256i r0 = two(0), r1 = two(1), r2 = two(2), r3 = two(3);
        const __m256i low01 = _mm256_unpacklo_epi32(r0, r1), high01 = _mm256_unpackhi_epi32(r0, r1);
        const __m256i low23 = _mm256_unpacklo_epi32(r2, r3), high23 = _mm256_unpackhi_epi32(r2, r3);
        words[0] = (Words8)_mm256_unpacklo_epi64(low01, low23);
        words[1] = (Words8)_mm256_unpackhi_epi64(low01, low23);
        words[2] = (Words8)_mm256_unpacklo_epi64(high01, high23);
        words[3] = (Words8)_mm256_unpackhi_epi64(high01, high23);
#else
        for (int r = 0; r < kRowsTogether; ++r)
            for (int j = 0; j < 4; ++j) {
                uint32_t word;
                memcpy(&word, rows[r] + at + 4 * j, sizeof word);
                words[j][r] = word;
            }
#endif
    }

    QUIRE_INLINE Words8 word(int64_t at) const {
        Words8 words;
        for (int r = 0; r < kRowsTogether; ++r) {
            uint32_t word;
            memcpy(&word, rows[r] + at, sizeof word);
            words[r] = word;
        }
        return words;
    }

    // The float16 at a byte of the blocks.
    QUIRE_INLINE Floats8 halves(int64_t at) const {
        uint16_t h[kRowsTogether];
        for (int r = 0; r < kRowsTogether; ++r) memcpy(h + r, rows[r] + at, sizeof h[r]);
#if defined(__F16C__)
        return (Floats8)_mm256_cvtph_ps(_mm_setr_epi16(h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]));
#else
        Floats8 floats;
        for (int r = 0; r < kRowsTogether; ++r) floats[r] = widen(Half{h[r]});
        return floats;
#endif
    }

    QUIRE_INLINE Words8 byte(int64_t at) const {
        Words8 bytes;
        for (int r = 0; r < kRowsTogether; ++r) bytes[r] = rows[r][at];
        return bytes;
    }
};

// The same of interleaved rows.
struct InterleavedBlocks {
    static constexpr int64_t kAhead = 4096;
    const uint8_t* block;

    // `row` is the first of eight; past `end`, the last eight take their place.
    InterleavedBlocks(const BlockPart& part, int64_t row, int64_t end)
        : block(part.rows + min_of(row, end - kRowsTogether) * part.row_bytes) {}

    QUIRE_INLINE void advance(int64_t block_bytes) {
        block += kRowsTogether * block_bytes;
        // Past the end of a page, where the processor's own prefetching stops.
        for (int64_t byte = 0; byte < kRowsTogether * block_bytes; byte += 64) __builtin_prefetch(block + kAhead + byte, 0, 3);
    }
    QUIRE_INLINE const uint8_t* place(int64_t at) const { return block + kRowsTogether * at; }
    QUIRE_INLINE Words8 word(int64_t at) const {
        Words8 word;
        memcpy(&word, place(at), sizeof word);
        return word;
    }
    QUIRE_INLINE void words(int64_t at, Words8* words) const {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) words[j] = word(at + 4 * j);
    }
    QUIRE_INLINE Floats8 halves(int64_t at) const {
#if defined(__F16C__)
        return (Floats8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(place(at))));
#else
        uint16_t h[kRowsTogether];
        memcpy(h, place(at), sizeof h);
        Floats8 floats;
        for (int r = 0; r < kRowsTogether; ++r) floats[r] = widen(Half{h[r]});
        return floats;
#endif
    }
    QUIRE_INLINE Words8 byte(int64_t at) const {
        typedef uint8_t Bytes8 __attribute__((vector_size(8)));
        Bytes8 bytes;
        memcpy(&bytes, place(at), sizeof bytes);
        return __builtin_convertvector(bytes, Words8);
    }
};

// The float16 in the lower half of each word.
QUIRE_INLINE Floats8 halves_of(Words8 words) {
#if defined(__F16C__)
    const __m256i low = (__m256i)(words & 0xffff);
    return (Floats8)_mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
#else
    Floats8 floats;
    for (int r = 0; r < kRowsTogether; ++r) floats[r] = widen(Half{uint16_t(words[r])});
    return floats;
#endif
}

QUIRE_INLINE Floats8 to_floats(Words8 words) { return __builtin_convertvector((Ints8)words, Floats8); }
QUIRE_INLINE Floats8 byte_of_words(Words8 words, int index) { return to_floats(words >> (8 * index) & 255); }

// The byte of a table of 16 for each byte of the words, all below 16.
QUIRE_INLINE Words8 by_table(Words8 codes, const int8_t* table) {
#if defined(__AVX2__)
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return (Words8)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(numbers), (__m256i)codes);
#else
    uint8_t bytes[sizeof codes];
    memcpy(bytes, &codes, sizeof bytes);
    for (uint8_t& byte : bytes) byte = uint8_t(table[byte]);
    memcpy(&codes, bytes, sizeof bytes);
    return codes;
#endif
}

// Outputs that lie side by side when they are unpacked: eight rows of blocks, or as many as a vector has lanes.
constexpr int64_t kUnpackedLanes = kLanes > kRowsTogether ? kLanes : kRowsTogether;

// Eight rows as they are unpacked, among kUnpackedLanes. A step is four inputs.
struct UnpackedBlocks {
    uint8_t* codes;  // [step][kUnpackedLanes][4]
    float* scales;   // [group][kUnpackedLanes]
    float* offsets;  // the same

    QUIRE_INLINE void put_step(int64_t step, Words8 four) const {
        memcpy(codes + step * kUnpackedLanes * 4, &four, sizeof four);
    }
    QUIRE_INLINE void put_scale(int64_t group, Floats8 scale) const {
        memcpy(scales + group * kUnpackedLanes, &scale, sizeof scale);
    }
    QUIRE_INLINE void put_offset(int64_t group, Floats8 offset) const {
        memcpy(offsets + group * kUnpackedLanes, &offset, sizeof offset);
    }
    QUIRE_INLINE UnpackedBlocks from_lane(int64_t lane) const { return {codes + lane * 4, scales + lane, offsets + lane}; }
    QUIRE_INLINE UnpackedBlocks from_group(int64_t group, int64_t steps_of_group) const {
        return {codes + group * steps_of_group * kUnpackedLanes * 4, scales + group * kUnpackedLanes,
                offsets + group * kUnpackedLanes};
    }
};

constexpr uint32_t kLowHalves = 0x0f0f0f0f;

// 16 bytes of halves: inputs 0 to 15 in the low ones, 16 to 31 in the high ones.
template <class Blocks, class Change>
QUIRE_INLINE void unpack_halves(const Blocks& b, int64_t at, const UnpackedBlocks& to, const Change& change) {
    Words8 words[4];
    b.words(at, words);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        to.put_step(j, change(words[j] & kLowHalves, j));
        to.put_step(j + 4, change(words[j] >> 4 & kLowHalves, j + 4));
    }
}
constexpr auto kUnchanged = [](Words8 codes, int) { return codes; };

// 32 bytes: the eight steps of one group, or of several in a few bits each.
template <class Blocks>
QUIRE_INLINE void eight_words(const Blocks& b, int64_t at, Words8* words) {
    b.words(at, words);
    b.words(at + 16, words + 4);
}

// Bit i of a row's word, times 16, as byte i of 32.
struct FifthBits {
    Words8 bits;
    QUIRE_INLINE Words8 of_step(int step) const {
        // The four bits to the lowest ones of four bytes.
        const Words8 four = bits >> (4 * step) & 15;
        return ((four | four << 7 | four << 14 | four << 21) & 0x01010101) << 4;
    }
};

// Scales and offsets of the eight groups of Q4_K and Q5_K: two float16, and 12 bytes with six bits of each.
template <class Blocks>
QUIRE_INLINE void unpack_k_scales(const Blocks& b, const UnpackedBlocks& to) {
    Words8 words[4];
    b.words(0, words);
    const Floats8 d = halves_of(words[0]), least = -halves_of(words[0] >> 16);
    const uint32_t six = 0x3f3f3f3f, two = 0x03030303;
    const Words8 scales[] = {words[1] & six, (words[3] & kLowHalves) | (words[1] >> 6 & two) << 4};
    const Words8 offsets[] = {words[2] & six, (words[3] >> 4 & kLowHalves) | (words[2] >> 6 & two) << 4};
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
        to.put_scale(group, byte_of_words(scales[group / 4], group % 4) * d);
        to.put_offset(group, byte_of_words(offsets[group / 4], group % 4) * least);
    }
}

alignas(16) constexpr int8_t kIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
alignas(16) constexpr int8_t kTwiceE2m1And12[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// For each type: numbers of a block, its bytes, numbers that share a scale, the largest code (0: codes have a sign), what
// is taken from a code, whether there are offsets, and eight blocks.
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
        const Words8 both = b.word(0);
        to.put_scale(0, halves_of(both));
        to.put_offset(0, halves_of(both >> 16));
    }
};
struct Q5_0 : BlockForm<32, 22, 32, 31, 16, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        const FifthBits fifth{b.word(2)};
        unpack_halves(b, 6, to, [&](Words8 codes, int step) { return codes | fifth.of_step(step); });
        to.put_scale(0, b.halves(0));
    }
};
struct Q5_1 : BlockForm<32, 24, 32, 31, 0, true> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        const FifthBits fifth{b.word(4)};
        unpack_halves(b, 8, to, [&](Words8 codes, int step) { return codes | fifth.of_step(step); });
        const Words8 both = b.word(0);
        to.put_scale(0, halves_of(both));
        to.put_offset(0, halves_of(both >> 16));
    }
};
struct Q8_0 : BlockForm<32, 34, 32, 0, 0, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        Words8 words[8];
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
            Words8 words[8];
            eight_words(b, 16 + 32 * half, words);
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part)
#pragma GCC unroll 8
                for (int j = 0; j < 8; ++j) to.put_step(half * 32 + part * 8 + j, words[j] >> (2 * part) & 0x03030303);
        }
        Words8 both[4];
        b.words(0, both);
        const Words8 units = b.word(80);
        const Floats8 d = halves_of(units), least = -halves_of(units >> 16);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            const Words8 byte = both[i / 4] >> (8 * (i % 4));
            to.put_scale(i, to_floats(byte & 15) * d);
            to.put_offset(i, to_floats(byte >> 4 & 15) * least);
        }
    }
};
struct Q3_K : BlockForm<256, 110, 16, 7, 4, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        Words8 high[8], low[8];
        eight_words(b, 0, high);
        for (int half = 0; half < 2; ++half) {
            eight_words(b, 32 + 32 * half, low);
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part)
#pragma GCC unroll 8
                for (int j = 0; j < 8; ++j) {
                    const Words8 third = (high[j] >> (4 * half + part) & 0x01010101) << 2;
                    to.put_step(half * 32 + part * 8 + j, (low[j] >> (2 * part) & 0x03030303) | third);
                }
        }
        const Floats8 d = b.halves(108);
        const Words8 first = b.word(96), second = b.word(100), upper = b.word(104);
        const Words8 of_low[] = {first & kLowHalves, second & kLowHalves, first >> 4 & kLowHalves, second >> 4 & kLowHalves};
#pragma GCC unroll 4
        for (int word = 0; word < 4; ++word) {
            const Words8 six = of_low[word] | (upper >> (2 * word) & 0x03030303) << 4;
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
            Words8 words[8];
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
        Words8 high[8], low[8];
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
            Words8 high[8], low[8];
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
        Words8 scales[4];
        b.words(192, scales);
        const Floats8 d = b.halves(208);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            const Ints8 scale = (Ints8)(scales[i / 4] << (24 - 8 * (i % 4))) >> 24;
            to.put_scale(i, __builtin_convertvector(scale, Floats8) * d);
        }
    }
};
struct IQ4_NL : BlockForm<32, 18, 32, 0, 0, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        unpack_halves(b, 2, to, [](Words8 codes, int) { return by_table(codes, kIq4); });
        to.put_scale(0, b.halves(0));
    }
};
struct IQ4_XS : BlockForm<256, 136, 32, 0, 0, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        const Words8 first = b.word(0), low = b.word(4), high = first >> 16;
        const Floats8 d = halves_of(first);
        for (int j = 0; j < 8; ++j) {
            unpack_halves(b, 8 + 16 * j, to.from_group(j, 8), [](Words8 codes, int) { return by_table(codes, kIq4); });
            const Words8 six = (low >> (4 * j) & 15) | (high >> (2 * j) & 3) << 4;
            to.put_scale(j, (to_floats(six) - 32.0f) * d);
        }
    }
};
struct Mxfp4Block : BlockForm<32, 17, 32, 24, 12, false> {
    template <class Blocks>
    static QUIRE_INLINE void unpack(const Blocks& b, const UnpackedBlocks& to) {
        unpack_halves(b, 1, to, [](Words8 codes, int) { return by_table(codes, kTwiceE2m1And12); });
        // Half of 2^(e - 127). Exponents 0 and 1 make numbers below the normal ones, 255 is NaN.
        const Words8 e = b.byte(0);
        const Words8 normal = (e - 1) << 23, small = e == 0 ? 0x00200000u - Words8{} : 0x00400000u - Words8{};
        const Words8 number = e < 2 ? small : normal;
        to.put_scale(0, (Floats8)(e == 255 ? 0x7fc00000u - Words8{} : number));
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

// Eight rows of k numbers.
template <class Block, class Blocks>
static void unpack_rows(Blocks b, int64_t k, const UnpackedBlocks& to) {
    constexpr int64_t kGroups = Block::kValues / Block::kGroup;
    for (int64_t i = 0; i < k / Block::kValues; ++i, b.advance(Block::kBytes))
        Block::unpack(b, to.from_group(i * kGroups, Block::kGroup / 4));
}

}  // namespace quire::QUIRE_ISA
