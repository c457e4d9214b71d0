// The vector type of the instruction set this file is compiled for, and the few operations on it that the language
// does not have. Arithmetic is written with operators: compilers give vector types + - * / and comparisons, and
// contract a * b + c. A kernel written against this header is complete on every instruction set by construction.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#ifdef __SSSE3__
#include <immintrin.h>
#endif

#define QUIRE_INLINE inline __attribute__((always_inline))

namespace quire::QUIRE_ISA {

// kLanes floats are one vector. The attention micro-kernels keep kAccumulators of them in registers, for at most
// kMaxRows rows, leaving room for the operands.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kAccumulators = 28, kMaxRows = 14;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kAccumulators = 12, kMaxRows = 6;
#else
constexpr int kLanes = 4, kAccumulators = 12, kMaxRows = 6;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t WordsVec __attribute__((vector_size(kLanes * 4)));  // its sums may wrap around

// 16-bit storage; arithmetic is always in float32.
struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };
// A whole number that a scale kept elsewhere is to be multiplied with.
struct Byte { int8_t value; };

QUIRE_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
QUIRE_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
QUIRE_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Fetches `bytes` of what is a page behind p: past the end of a page the processor's own fetching stops.
QUIRE_INLINE void fetch_page_ahead(const uint8_t* p, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(p + 4096 + byte, 0, 3);
}

QUIRE_INLINE Vec broadcast(float x) { return x - Vec{}; }

QUIRE_INLINE Vec lane_numbers() {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = float(i);
    return v;
}

QUIRE_INLINE Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

QUIRE_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

// A vector of what lies there, whatever that is; one word of it in every lane.
QUIRE_INLINE IntVec load_words(const void* p) {
    IntVec words;
    memcpy(&words, p, sizeof words);
    return words;
}
QUIRE_INLINE IntVec broadcast_word(const void* p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return word - IntVec{};
}

// The first n lanes; the others are zero.
QUIRE_INLINE Vec load_first(const float* p, int64_t n) {
    Vec v{};
    memcpy(&v, p, n * sizeof(float));
    return v;
}

QUIRE_INLINE void store_first(float* p, Vec v, int64_t n) { memcpy(p, &v, n * sizeof(float)); }

QUIRE_INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

QUIRE_INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

#if defined(__AVX512F__)
QUIRE_INLINE Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }
QUIRE_INLINE float largest(Vec v) { return _mm512_reduce_max_ps(v); }
QUIRE_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
QUIRE_INLINE Vec load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
QUIRE_INLINE Vec load(const BFloat* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
QUIRE_INLINE Vec load(const Byte* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(__AVX2__)
QUIRE_INLINE Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }
QUIRE_INLINE float largest(Vec v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
QUIRE_INLINE float sum(Vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
QUIRE_INLINE Vec load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
QUIRE_INLINE Vec load(const BFloat* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
QUIRE_INLINE Vec load(const Byte* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#else
QUIRE_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
QUIRE_INLINE float largest(Vec v) {
    float m = v[0];
    for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
    return m;
}
QUIRE_INLINE float sum(Vec v) {
    float s = v[0];
    for (int i = 1; i < kLanes; ++i) s += v[i];
    return s;
}
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));
QUIRE_INLINE IntVec load_16_bits(const void* p) {
    HalfBits bits;
    memcpy(&bits, p, sizeof bits);
    return __builtin_convertvector(bits, IntVec);
}
QUIRE_INLINE Vec load(const Half* p) {
    const IntVec bits = load_16_bits(p);
    const IntVec magnitude = (bits & 0x7fff) << 13;
    // Exponent and mantissa sit in float32's places; multiplying moves the bias from 15 to 127 and makes subnormals
    // normal. Infinity and NaN keep an exponent of all ones instead.
    const IntVec finite = (IntVec)((Vec)magnitude * as_float(0x77800000));
    const IntVec special = magnitude | 0x7f800000;
    return (Vec)((magnitude >= (31 << 23) ? special : finite) | (bits & 0x8000) << 16);
}
QUIRE_INLINE Vec load(const BFloat* p) { return (Vec)(load_16_bits(p) << 16); }
QUIRE_INLINE Vec load(const Byte* p) {
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    Bytes bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, Vec);
}
#endif

QUIRE_INLINE Vec minimum(Vec a, Vec b) { return a < b ? a : b; }

// float32 -> storage, rounding to nearest, ties to even.
QUIRE_INLINE void narrow(float* p, float x) { *p = x; }
QUIRE_INLINE void narrow(BFloat* p, float x) {
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    p->bits = uint16_t(x == x ? rounded : bits >> 16 | 0x40);
}
QUIRE_INLINE void narrow(Half* p, float x) {
#if defined(__F16C__)
    p->bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
    const uint32_t sign = as_bits(x) >> 16 & 0x8000;
    const uint32_t magnitude = as_bits(x) & 0x7fffffff;
    if (magnitude >= 0x47800000)  // 2^16 and above, infinity, NaN
        p->bits = uint16_t(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
    else if (magnitude < 0x38800000)  // subnormal in float16: adding 0.5 lets the adder round at the last place kept
        p->bits = uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000));
    else  // rounding may carry into the exponent, up to infinity, as it should
        p->bits = uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
#endif
}

// Pairs of bfloat16, the first in the lower half of a word. Worth it where the processor multiplies and adds pairs.
#if defined(__AVX512BF16__)
constexpr bool kMultipliesPairs = true;
QUIRE_INLINE void store(BFloat* p, Vec v) {
    const __m256bh narrowed = _mm512_cvtneps_pbh(v);
    memcpy(p, &narrowed, sizeof narrowed);
}
QUIRE_INLINE IntVec broadcast_pair(const float* x) {
    __m128 two{};
    memcpy(&two, x, 2 * sizeof(float));
    return (IntVec)_mm512_broadcastd_epi32((__m128i)_mm_cvtneps_pbh(two));
}
QUIRE_INLINE Vec add_products(Vec sum, IntVec a, IntVec b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
QUIRE_INLINE IntVec load_pairs(const BFloat* first, const BFloat* second) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (IntVec)_mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}
#else
constexpr bool kMultipliesPairs = false;
QUIRE_INLINE void store(BFloat* p, Vec v) {
    for (int i = 0; i < kLanes; ++i) narrow(p + i, v[i]);
}
QUIRE_INLINE IntVec broadcast_pair(const float* x) {
    BFloat pair[2];
    narrow(pair, x[0]);
    narrow(pair + 1, x[1]);
    return broadcast_word(pair);
}
QUIRE_INLINE Vec add_products(Vec sum, IntVec a, IntVec b) {
    const int32_t second = int32_t(0xffff0000);
    return sum + (Vec)(a << 16) * (Vec)(b << 16) + (Vec)(a & second) * (Vec)(b & second);
}
QUIRE_INLINE IntVec load_pairs(const BFloat* first, const BFloat* second) {
    IntVec pairs;
    for (int i = 0; i < kLanes; ++i) pairs[i] = int32_t(first[i].bits | uint32_t(second[i].bits) << 16);
    return pairs;
}
#endif

// Whether what is stored as T is multiplied in pairs.
template <class T> constexpr bool kInPairs = kMultipliesPairs && std::is_same_v<T, BFloat>;

QUIRE_INLINE float widen(float x) { return x; }
QUIRE_INLINE float widen(Byte x) { return float(x.value); }
QUIRE_INLINE float widen(BFloat x) { return as_float(uint32_t(x.bits) << 16); }
QUIRE_INLINE float widen(Half x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    const Half lanes[kLanes] = {x};
    return load(lanes)[0];
#endif
}

// 2^x for x <= 127, with a relative error below 2e-7; exactly 0 below 2^-126, and NaN for NaN.
QUIRE_INLINE Vec exp2(Vec x) {
    const float shifter = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits of the sum
    const Vec shifted = x + shifter;
    const Vec f = x - (shifted - shifter);
    // Minimax polynomial of 2^f on [-1/2, 1/2], exact at 0.
    Vec p = broadcast(1.32647273e-3f);
    p = p * f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    p = p * f + 1.0f;
    const Vec scaled = (Vec)((WordsVec)p + ((WordsVec)shifted << 23));
    return x < -126.0f ? Vec{} : scaled;
}

constexpr float kLog2E = 1.44269504f;

// tanh, exact to float32 rounding of 1.
QUIRE_INLINE Vec tanh(Vec x) { return 1.0f - 2.0f / (exp2(minimum(x * (2 * kLog2E), broadcast(126.0f))) + 1.0f); }

}  // namespace quire::QUIRE_ISA
