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

#if LANES_OF_INTEGERS && (defined(__AVX512VNNI__) || defined(__AVXVNNI__))
#define VNNI 1
#else
#define VNNI 0
#endif

// Two products of 16 bits to each lane, added to `sum`.
inline Integers dot_words(Integers sum, Integers a, Integers b) {
#if LANES_OF_INTEGERS && defined(__AVX512VNNI__)
    return (Integers)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif LANES_OF_INTEGERS == 16
    return sum + (Integers)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif LANES_OF_INTEGERS && defined(__AVXVNNI__)
    return (Integers)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif LANES_OF_INTEGERS
    return sum + (Integers)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(__AVX__)
    return sum + (Integers)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

#if LANES_OF_INTEGERS
// Four products of codes (unsigned) with signed bytes to each lane, added to `sum`.
inline Integers dot_bytes(Integers sum, Unsigned codes, Integers x) {
#if defined(__AVX512VNNI__)
    return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#elif defined(__AVXVNNI__)
    return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x);
#elif LANES_OF_INTEGERS == 16  // 16 bits hold the sum of two where codes have 4
    return dot_words(sum, (Integers)_mm512_maddubs_epi16((__m512i)codes, (__m512i)x), Integers{} + 0x00010001);
#else
    return dot_words(sum, (Integers)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x), Integers{} + 0x00010001);
#endif
}
#endif

// Four activations to each lane, in two vectors `a` and `b`: their high bytes and their low ones where codes of so many bits
// meet bytes, else the even columns and the odd ones in 16 bits.
constexpr bool in_bytes(int bits) { return VNNI || (LANES_OF_INTEGERS == 8 && bits < 8); }

template <bool BYTES, int N, class Number>
inline void place(const Number* x, char* a, char* b) {
    if (BYTES)
        for (int i = 0; i < N; i++) a[i] = Number(x[i] + 128) >> 8, b[i] = x[i];
    else
        for (int i = 0; i < N / 2; i++) ((int16_t*)a)[i] = x[2 * i], ((int16_t*)b)[i] = x[2 * i + 1];
}

// The products of 4 codes of BITS with 4 such activations to each lane; `at` counts the additions.
template <int BITS>
struct ExactSum {
    Integers sum = {};
    void start(Integers whole) { sum = whole; }
    void add(Unsigned codes, Integers a, Integers b, int at) {
        sum = dot_words(dot_words(sum, (Integers)(codes & 0x00ff00ff), a), (Integers)(codes >> 8 & 0x00ff00ff), b);
    }
    Integers whole() const { return sum; }
};
#if VNNI
template <int BITS>
    requires(in_bytes(BITS))
struct ExactSum<BITS> {
    Integers above = {}, below = {};
    void start(Integers whole) { below = whole; }
    void add(Unsigned codes, Integers a, Integers b, int at) { above = dot_bytes(above, codes, a), below = dot_bytes(below, codes, b); }
    Integers whole() const { return (above << 8) + below; }
};
#elif LANES_OF_INTEGERS == 8
template <int BITS>
    requires(in_bytes(BITS))
struct ExactSum<BITS> {  // 16 bits hold the sum of two products, and MOST such sums
    static constexpr int MOST = 32767 / (2 * 128 * ((1 << BITS) - 1));
    typedef int16_t Words __attribute__((vector_size(4 * LANES)));
    Integers sum = {};
    Words above = {}, below = {};
    void start(Integers whole) { sum = whole; }
    __attribute__((always_inline)) void add(Unsigned codes, Integers a, Integers b, int at) {
        const auto high = (Words)_mm256_maddubs_epi16((__m256i)codes, (__m256i)a), low = (Words)_mm256_maddubs_epi16((__m256i)codes, (__m256i)b);
        if (at % MOST == 0)
            sum = whole(), above = high, below = low;
        else
            above += high, below += low;
    }
    Integers whole() const {
        return dot_words(dot_words(sum, (Integers)above, Integers{} + 0x01000100), (Integers)below, Integers{} + 0x00010001);
    }
};
#endif

// v[i][j] becomes v[j][i].
inline void transpose(Unsigned v[LANES]) {
#if LANES_OF_INTEGERS == 16
    for (int i = 0; i < 16; i += 4) transpose_quarters(v + i);
    __m512i four[16];
    for (int i = 0; i < 16; i++) four[i] = (__m512i)v[i];
    for (int j = 0; j < 4; j++) {
        const __m512i a = _mm512_shuffle_i32x4(four[j], four[4 + j], 0x88), b = _mm512_shuffle_i32x4(four[j], four[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0xdd);
        v[j] = (Unsigned)_mm512_shuffle_i32x4(a, c, 0x88), v[8 + j] = (Unsigned)_mm512_shuffle_i32x4(a, c, 0xdd);
        v[4 + j] = (Unsigned)_mm512_shuffle_i32x4(b, d, 0x88), v[12 + j] = (Unsigned)_mm512_shuffle_i32x4(b, d, 0xdd);
    }
#elif LANES_OF_INTEGERS == 8
    transpose_quarters(v), transpose_quarters(v + 4);
    for (int j = 0; j < 4; j++) {
        const Unsigned a = v[j], b = v[4 + j];
        v[j] = (Unsigned)_mm256_permute2x128_si256((__m256i)a, (__m256i)b, 0x20);
        v[4 + j] = (Unsigned)_mm256_permute2x128_si256((__m256i)a, (__m256i)b, 0x31);
    }
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            const uint32_t number = v[i][j];
            v[i][j] = v[j][i], v[j][i] = number;
        }
#endif
}

inline int32_t largest(Integers x) {
#if LANES_OF_INTEGERS == 16
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    int32_t lanes[LANES];
    std::memcpy(lanes, &x, sizeof x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = std::max(lanes[i], lanes[i + half]);
    return lanes[0];
#endif
}
