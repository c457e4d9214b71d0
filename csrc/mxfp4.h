// MXFP4: weights of four bits (e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign), 32 of which share a power of two (e8m0).
//
// A packed weight is a row of panels of kPanel outputs:
//   values  [k / 8][kPanel][4]    inputs 0 to 3 of eight in the low halves of four bytes, 4 to 7 in the high halves
//   scales  [k / 32][kPanel]      e, for 2^(e - 127)
// This is the layout of 4-bit integers, so one packed weight serves floats and inputs of 8 bits.
#pragma once

#include "simd.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kMxfp4Block = 32;

// Eight weights of one output.
struct Mxfp4 {
    uint8_t steps[4];
};
// Where the weight of a step along k lies in the word of its eight.
QUIRE_INLINE int mxfp4_shift(int64_t k) { return int(k % 4 * 8 + k / 4 % 2 * 4); }

// The numbers that the lowest four bits of each lane stand for.
QUIRE_INLINE Vec e2m1(IntVec codes) {
#if defined(__AVX512F__)
    const __m512 numbers = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,  //
                                          -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
    return _mm512_permutexvar_ps((__m512i)codes, numbers);
#else
    const IntVec sign = (codes << 28) & int32_t(0x80000000);
#if defined(__AVX2__)
    const __m256 numbers = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
    return (Vec)((IntVec)_mm256_permutevar8x32_ps(numbers, (__m256i)codes) ^ sign);
#else
    // Exponent and mantissa in float32's places; the product moves the exponent's bias from 1 to 127.
    return (Vec)((IntVec)((Vec)((codes & 7) << 22) * 0x1p126f) ^ sign);
#endif
#endif
}

// 2^(e - 127) of each lane's byte; 255 is NaN.
QUIRE_INLINE Vec powers_of_two(const uint8_t* exponents) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    Bytes bytes;
    memcpy(&bytes, exponents, sizeof bytes);
    const IntVec bits = __builtin_convertvector(bytes, IntVec) << 23;
    return (Vec)(bits == 0 || bits == 0x7f800000 ? bits + 0x00400000 : bits);
}

// Twice the numbers, plus 12, of codes in the low halves of bytes.
QUIRE_INLINE IntVec doubled_e2m1(IntVec codes) {
#define QUIRE_E2M1 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0
#if defined(__AVX512BW__)
    return (IntVec)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_setr_epi8(QUIRE_E2M1)), (__m512i)codes);
#elif defined(__AVX2__)
    return (IntVec)_mm256_shuffle_epi8(_mm256_setr_epi8(QUIRE_E2M1, QUIRE_E2M1), (__m256i)codes);
#elif defined(__SSSE3__)
    return (IntVec)_mm_shuffle_epi8(_mm_setr_epi8(QUIRE_E2M1), (__m128i)codes);
#else
    static const uint8_t doubled[] = {QUIRE_E2M1};
    uint8_t bytes[sizeof codes];
    memcpy(bytes, &codes, sizeof bytes);
    for (uint8_t& byte : bytes) byte = doubled[byte];
    return load_words(bytes);
#endif
#undef QUIRE_E2M1
}

}  // namespace quire::QUIRE_ISA
