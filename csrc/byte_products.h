// Sums of products of bytes, four to a lane, by whatever the instruction set has for them.
#pragma once

#include "simd.h"

namespace quire::QUIRE_ISA {

// A vector of weights ready to be multiplied. Where the processor can only add products of bytes in 16 bits, with
// saturation, weights of 8 bits are split into magnitude and sign: 2 * 127 * 127 still fits.
struct Unsigned {
    IntVec bytes;
};
// A sum that the compiler adds to in the order written. Sums of integers it would reorder, with more products at once
// than there are registers.
template <class V>
QUIRE_INLINE V in_order(V sum) {
#if defined(__AVX2__)
    asm("" : "+v"(sum));
#endif
    return sum;
}
// Sums of two products each. With 4-bit weights there is room for more, and they are widened to 32 bits together.
typedef int16_t WordVec __attribute__((vector_size(kLanes * 4)));
#if defined(__AVX512VNNI__)
constexpr int kRowsOfBytes = 8;
constexpr bool kSignedWeights = false, kSumsInWords = false;
QUIRE_INLINE IntVec add_products(IntVec sum, Unsigned weight, IntVec x) {
    return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weight.bytes, (__m512i)x);
}
#elif defined(__AVX512BW__)
constexpr int kRowsOfBytes = 12;
constexpr bool kSignedWeights = true, kSumsInWords = true;
struct Signed {
    IntVec magnitude;
    __mmask64 negative;
    explicit Signed(IntVec v) : magnitude((IntVec)_mm512_abs_epi8((__m512i)v)), negative(_mm512_movepi8_mask((__m512i)v)) {}
};
QUIRE_INLINE WordVec products(Unsigned weight, IntVec x) {
    return (WordVec)_mm512_maddubs_epi16((__m512i)weight.bytes, (__m512i)x);
}
QUIRE_INLINE IntVec add_pairs(IntVec sum, WordVec words) {
    return in_order(sum + (IntVec)_mm512_madd_epi16((__m512i)words, _mm512_set1_epi16(1)));
}
QUIRE_INLINE IntVec add_products(IntVec sum, Signed weight, IntVec x) {
    const __m512i signed_x = _mm512_mask_sub_epi8((__m512i)x, weight.negative, _mm512_setzero_si512(), (__m512i)x);
    return add_pairs(sum, products(Unsigned{weight.magnitude}, (IntVec)signed_x));
}
#elif defined(__AVX2__)
constexpr int kRowsOfBytes = 6;
constexpr bool kSignedWeights = true, kSumsInWords = true;
struct Signed {
    IntVec magnitude, value;
    explicit Signed(IntVec v) : magnitude((IntVec)_mm256_abs_epi8((__m256i)v)), value(v) {}
};
QUIRE_INLINE WordVec products(Unsigned weight, IntVec x) {
    return (WordVec)_mm256_maddubs_epi16((__m256i)weight.bytes, (__m256i)x);
}
QUIRE_INLINE IntVec add_pairs(IntVec sum, WordVec words) {
    return in_order(sum + (IntVec)_mm256_madd_epi16((__m256i)words, _mm256_set1_epi16(1)));
}
QUIRE_INLINE IntVec add_products(IntVec sum, Signed weight, IntVec x) {
    return add_pairs(sum, products(Unsigned{weight.magnitude}, (IntVec)_mm256_sign_epi8((__m256i)x, (__m256i)weight.value)));
}
#elif defined(__SSSE3__)
constexpr int kRowsOfBytes = 4;
constexpr bool kSignedWeights = true, kSumsInWords = true;
struct Signed {
    IntVec magnitude, value;
    explicit Signed(IntVec v) : magnitude((IntVec)_mm_abs_epi8((__m128i)v)), value(v) {}
};
QUIRE_INLINE WordVec products(Unsigned weight, IntVec x) {
    return (WordVec)_mm_maddubs_epi16((__m128i)weight.bytes, (__m128i)x);
}
QUIRE_INLINE IntVec add_pairs(IntVec sum, WordVec words) {
    return sum + (IntVec)_mm_madd_epi16((__m128i)words, _mm_set1_epi16(1));
}
QUIRE_INLINE IntVec add_products(IntVec sum, Signed weight, IntVec x) {
    return add_pairs(sum, products(Unsigned{weight.magnitude}, (IntVec)_mm_sign_epi8((__m128i)x, (__m128i)weight.value)));
}
#else
constexpr int kRowsOfBytes = 4;
constexpr bool kSignedWeights = true, kSumsInWords = false;
struct Signed {
    IntVec bytes;
    explicit Signed(IntVec v) : bytes(v) {}
};
// Byte i of every lane, with its sign. The shift left is one of unsigned lanes, which may drop bits.
QUIRE_INLINE IntVec byte_of(IntVec v, int i) {
    typedef uint32_t Lanes __attribute__((vector_size(kLanes * 4)));
    return (IntVec)((Lanes)v << (24 - 8 * i)) >> 24;
}
QUIRE_INLINE IntVec add_products(IntVec sum, Signed weight, IntVec x) {
    for (int i = 0; i < 4; ++i) sum += byte_of(weight.bytes, i) * byte_of(x, i);
    return sum;
}
// Below 128, hence the same bytes with a sign.
QUIRE_INLINE IntVec add_products(IntVec sum, Unsigned weight, IntVec x) { return add_products(sum, Signed(weight.bytes), x); }
#endif

// Sums of products of 16 bits, two to a lane.
QUIRE_INLINE IntVec add_wide_products(IntVec sum, WordVec weight, IntVec x) {
#if defined(__AVX512VNNI__)
    return (IntVec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)weight, (__m512i)x);
#elif defined(__AVX512BW__)
    return in_order(sum + (IntVec)_mm512_madd_epi16((__m512i)weight, (__m512i)x));
#elif defined(__AVX2__)
    return in_order(sum + (IntVec)_mm256_madd_epi16((__m256i)weight, (__m256i)x));
#elif defined(__SSSE3__)
    return sum + (IntVec)_mm_madd_epi16((__m128i)weight, (__m128i)x);
#else
    const IntVec pairs = (IntVec)weight;
    return sum + (pairs << 16 >> 16) * (x << 16 >> 16) + (pairs >> 16) * (x >> 16);
#endif
}

}  // namespace quire::QUIRE_ISA
