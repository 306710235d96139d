// Sums of products of codes (unsigned bytes) with activations (whole numbers of 16 bits): exact.
#pragma once
#include "vectors.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LANES_OF_INTEGERS 16
#elif defined(__AVX2__)
#define LANES_OF_INTEGERS 8
#else
#define LANES_OF_INTEGERS 0
#endif

// The products of 4 codes with 4 activations to each lane; these are in two vectors `a` and `b`.
#if LANES_OF_INTEGERS && (defined(__AVX512VNNI__) || defined(__AVXVNNI__))  // their high bytes, and their low ones
struct ExactSum {
    Integers above = {}, below = {};
    ExactSum() = default;
    explicit ExactSum(Integers start) : below(start) {}
    static Integers dot(Integers sum, Unsigned codes, Integers x) {
#if defined(__AVX512VNNI__)
        return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#else
        return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x);
#endif
    }
    void add(Unsigned codes, Integers a, Integers b) { above = dot(above, codes, a), below = dot(below, codes, b); }
    Integers whole() const { return (above << 8) + below; }
    // The i-th activation of a vector.
    static void place(char* a, char* b, int i, int x) {
        const int high = (x + 128) >> 8;
        ((int8_t*)a)[i] = high, ((int8_t*)b)[i] = x - 256 * high;
    }
};
#else  // of the even columns, and of the odd ones, in 16 bits
struct ExactSum {
    Integers sum = {};
    ExactSum() = default;
    explicit ExactSum(Integers start) : sum(start) {}
    static Integers dot(Unsigned codes, Integers x) {
#if defined(__AVX512BW__) && LANES_OF_INTEGERS
        return (Integers)_mm512_madd_epi16((__m512i)codes, (__m512i)x);
#elif defined(__AVX2__)
        return (Integers)_mm256_madd_epi16((__m256i)codes, (__m256i)x);
#elif defined(__SSE2__) && !defined(__AVX__)
        return (Integers)_mm_madd_epi16((__m128i)codes, (__m128i)x);
#else
        return (Integers)(codes & 0xffff) * (x << 16 >> 16) + (Integers)(codes >> 16) * (x >> 16);
#endif
    }
    void add(Unsigned codes, Integers a, Integers b) {
        sum += dot(codes & 0x00ff00ff, a) + dot(codes >> 8 & 0x00ff00ff, b);
    }
    Integers whole() const { return sum; }
    static void place(char* a, char* b, int i, int x) { ((int16_t*)(i % 2 ? b : a))[i / 2] = x; }
};
#endif
