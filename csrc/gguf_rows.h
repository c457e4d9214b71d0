// Rows of GGUF's blocks as they lie in a file, and interleaved. A word of four bytes of each row is a vector, so what has
// to be done to the bits of a row is done to all.
//
// Interleaved, eight rows are one run of blocks of eight times the bytes: word after word of a block, each of all eight
// rows, so that a vector is one load, or two. The bytes of a block that are no whole words lie before its words; of blocks
// of 256 numbers behind them.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

// Rows that are unpacked at once; unpacked, their outputs lie side by side. A vector is stored whole: loads of what
// several stores have written wait for them.
constexpr int64_t kRowsTogether = kLanes > kInterleavedRows ? kLanes : kInterleavedRows;

// A lane for each of these rows: two registers where there is no AVX; functions on them are always inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
typedef float RowFloats __attribute__((vector_size(kRowsTogether * 4)));
typedef int32_t RowInts __attribute__((vector_size(kRowsTogether * 4)));
typedef uint32_t RowWords __attribute__((vector_size(kRowsTogether * 4)));

// Float16 of all rows.
QUIRE_INLINE RowFloats widen_halves(const uint16_t* h) {
#if defined(__AVX512F__)
    return (RowFloats)_mm512_cvtph_ps(_mm256_setr_epi16(h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7], h[8], h[9], h[10], h[11],
                                                        h[12], h[13], h[14], h[15]));
#elif defined(__F16C__)
    return (RowFloats)_mm256_cvtph_ps(_mm_setr_epi16(h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]));
#else
    RowFloats floats;
    for (int r = 0; r < kRowsTogether; ++r) floats[r] = widen(Half{h[r]});
    return floats;
#endif
}

// Places of rows of blocks as a file has them, all at the same block.
struct BlocksOfRows {
    const uint8_t* rows[kRowsTogether];
    const uint8_t* ahead;  // where the next rows are, if they follow: read while these are

    // The rows from `row` on, none past `end`: the last one takes their place.
    BlocksOfRows(const BlockPart& part, int64_t row, int64_t end) {
        for (int r = 0; r < kRowsTogether; ++r) rows[r] = part.rows + min_of(row + r, end - 1) * part.row_bytes;
        ahead = rows[kRowsTogether - 1] + part.row_bytes;
    }
    // The rows `ids`, at most kRowsTogether.
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
    QUIRE_INLINE void words(int64_t at, RowWords* words) const {
#if defined(__AVX512F__)
        const auto four = [&](int r) {
            const auto row = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r + 4 * i] + at)); };
            const __m512i half = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(1), 1);
            return _mm512_inserti32x4(_mm512_inserti32x4(half, row(2), 2), row(3), 3);
        };
        const __m512i r0 = four(0), r1 = four(1), r2 = four(2), r3 = four(3);
        const __m512i low01 = _mm512_unpacklo_epi32(r0, r1), high01 = _mm512_unpackhi_epi32(r0, r1);
        const __m512i low23 = _mm512_unpacklo_epi32(r2, r3), high23 = _mm512_unpackhi_epi32(r2, r3);
        words[0] = (RowWords)_mm512_unpacklo_epi64(low01, low23);
        words[1] = (RowWords)_mm512_unpackhi_epi64(low01, low23);
        words[2] = (RowWords)_mm512_unpacklo_epi64(high01, high23);
        words[3] = (RowWords)_mm512_unpackhi_epi64(high01, high23);
#elif defined(__AVX2__)
        const auto two = [&](int r) {
            const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + at));
            const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r + 4] + at));
            return _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
        };
        const __m256i r0 = two(0), r1 = two(1), r2 = two(2), r3 = two(3);
        const __m256i low01 = _mm256_unpacklo_epi32(r0, r1), high01 = _mm256_unpackhi_epi32(r0, r1);
        const __m256i low23 = _mm256_unpacklo_epi32(r2, r3), high23 = _mm256_unpackhi_epi32(r2, r3);
        words[0] = (RowWords)_mm256_unpacklo_epi64(low01, low23);
        words[1] = (RowWords)_mm256_unpackhi_epi64(low01, low23);
        words[2] = (RowWords)_mm256_unpacklo_epi64(high01, high23);
        words[3] = (RowWords)_mm256_unpackhi_epi64(high01, high23);
#else
        for (int r = 0; r < kRowsTogether; ++r)
            for (int j = 0; j < 4; ++j) {
                uint32_t word;
                memcpy(&word, rows[r] + at + 4 * j, sizeof word);
                words[j][r] = word;
            }
#endif
    }

    QUIRE_INLINE RowWords word(int64_t at) const {
        RowWords words;
        for (int r = 0; r < kRowsTogether; ++r) {
            uint32_t word;
            memcpy(&word, rows[r] + at, sizeof word);
            words[r] = word;
        }
        return words;
    }

    // The float16 at a byte of the blocks.
    QUIRE_INLINE RowFloats halves(int64_t at) const {
        uint16_t h[kRowsTogether];
        for (int r = 0; r < kRowsTogether; ++r) memcpy(h + r, rows[r] + at, sizeof h[r]);
        return widen_halves(h);
    }

    QUIRE_INLINE RowWords byte(int64_t at) const {
        RowWords bytes;
        for (int r = 0; r < kRowsTogether; ++r) bytes[r] = rows[r][at];
        return bytes;
    }
};

// The same of interleaved rows: one run of eight, or two side by side.
struct InterleavedBlocks {
    static constexpr int64_t kRuns = kRowsTogether / kInterleavedRows;
    const uint8_t* runs[kRuns];

    // `row` is the first of eight; past `end`, the last eight take their place.
    InterleavedBlocks(const BlockPart& part, int64_t row, int64_t end) {
        for (int64_t i = 0; i < kRuns; ++i)
            runs[i] = part.rows + min_of(row + i * kInterleavedRows, end - kInterleavedRows) * part.row_bytes;
    }

    QUIRE_INLINE void advance(int64_t block_bytes) {
        for (const uint8_t*& run : runs) {
            run += kInterleavedRows * block_bytes;
            fetch_page_ahead(run, kInterleavedRows * block_bytes);
        }
    }
    QUIRE_INLINE const uint8_t* place(int64_t at, int64_t run = 0) const { return runs[run] + kInterleavedRows * at; }
    QUIRE_INLINE RowWords word(int64_t at) const {
#if defined(__AVX512F__)
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place(at)));
        const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place(at, 1)));
        return (RowWords)_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
#else
        RowWords word;
        memcpy(&word, place(at), sizeof word);
        return word;
#endif
    }
    QUIRE_INLINE void words(int64_t at, RowWords* words) const {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) words[j] = word(at + 4 * j);
    }
    QUIRE_INLINE RowFloats halves(int64_t at) const {
#if defined(__AVX512F__)
        const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(place(at)));
        const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(place(at, 1)));
        return (RowFloats)_mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1));
#elif defined(__F16C__)
        return (RowFloats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(place(at))));
#else
        uint16_t h[kRowsTogether];
        memcpy(h, place(at), sizeof h);
        return widen_halves(h);
#endif
    }
    QUIRE_INLINE RowWords byte(int64_t at) const {
#if defined(__AVX512F__)
        const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(place(at)));
        const __m128i second = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(place(at, 1)));
        return (RowWords)_mm512_cvtepu8_epi32(_mm_unpacklo_epi64(first, second));
#else
        typedef uint8_t Bytes8 __attribute__((vector_size(8)));
        Bytes8 bytes;
        memcpy(&bytes, place(at), sizeof bytes);
        return __builtin_convertvector(bytes, RowWords);
#endif
    }
};

}  // namespace quire::QUIRE_ISA
