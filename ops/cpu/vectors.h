// Vectors of numbers, as wide as the machine that this compiles for: loads of 32, 16 and 8 bits, sums, exp, silu.
//
// Nothing here or in products.h may depend on where in an array a number is: what is computed for a token has the
// same bits however many tokens come with it. So a multiplication with an addition is always written `fma` (the compiler
// is told to fuse nothing by itself), and the end of an array is a vector filled up with zeros, not a loop of its own.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint64_t Pairs __attribute__((vector_size(4 * LANES)));

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};
struct int8 {
    uint8_t code;  // the number + 128
};

template <class Result>
inline Result read(const void* address) {  // from any alignment: a safetensors file promises none
    Result result;
    std::memcpy(&result, address, sizeof result);
    return result;
}

inline Vector fma(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    for (int lane = 0; lane < LANES; lane++) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
#else
    return a * b + c;
#endif
}

inline Vector load(const float* p) { return read<Vector>(p); }
inline Vector load(const bfloat16* p) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)  // one instruction, of which GCC 12 makes five
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(p)), 16);
#elif defined(__AVX2__)
    return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(p)), 16);
#else
    return (Vector)(__builtin_convertvector(read<Halves>(p), Integers) << 16);
#endif
}
inline float to_float(float16 x) {
#ifdef __F16C__
    return _cvtsh_ss(x.bits);
#else
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest < 0x400) return sign ? rest * -0x1p-24f : rest * 0x1p-24f;  // zero or subnormal
    const uint32_t bits = sign | (rest < 0x7c00 ? (rest << 13) + 0x38000000 : rest << 13 | 0x7f800000);
    return read<float>(&bits);
#endif
}
inline Vector load(const float16* p) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    return (Vector)_mm512_cvtph_ps(read<__m256i>(p));
#elif defined(__F16C__)
    return (Vector)_mm256_cvtph_ps(read<__m128i>(p));
#else
    Vector numbers;
    for (int lane = 0; lane < LANES; lane++) numbers[lane] = to_float(p[lane]);
    return numbers;
#endif
}
inline Vector load(const int8* p) {
    Integers codes = __builtin_convertvector(read<Bytes>(p) ^ int8_t(-128), Integers);
    return __builtin_convertvector(codes, Vector);
}

// The first n < LANES numbers, then zeros; for int8 those of code 0, which meet zeros.
template <class T>
inline Vector load_some(const T* p, int64_t n) {
    T numbers[LANES] = {};
    std::memcpy(numbers, p, n * sizeof(T));
    return load(numbers);
}

// The number at p in all lanes. Vector{} + *p would be an addition, as it makes 0 of -0.
inline Vector load_to_all(const float* p) { return (Vector)(Integers{} + read<int32_t>(p)); }

// x, held in a register where there are 16: GCC would load it again for each use, or keep it and spill sums.
template <class Lanes>
__attribute__((always_inline)) inline Lanes in_register(Lanes x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    asm("" : "+x"(x));
#endif
    return x;
}

inline void store(float* p, Vector x) { std::memcpy(p, &x, sizeof x); }

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    return read<float>(&bits);
}

inline void assign(float& to, float x) { to = x; }
inline void assign(bfloat16& to, float x) {  // to the nearest, ties to even
    uint32_t bits = read<uint32_t>(&x);
    to.bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void assign(float16& to, float x) {  // the same; what is beyond its range becomes its largest number
    const uint32_t bits = read<uint32_t>(&x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return void(to.bits = 0x7e00);
    if (size >= 0x477ff000) return void(to.bits = sign | 0x7bff);
    if (size < 0x38800000) return void(to.bits = sign | int(std::nearbyint(std::abs(x) * 0x1p24f)));  // subnormal
    to.bits = sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
}

// Halves are added to each other, then quarters, and so on: `sums` below does the same for LANES vectors at once.
inline float sum(Vector x) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    __m512 v = (__m512)x;
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v),
                                 _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#elif defined(__AVX__)
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float lanes[LANES];
    std::memcpy(lanes, &x, sizeof x);
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
#endif
}

inline int32_t sum(Integers x) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    return _mm512_reduce_add_epi32((__m512i)x);
#elif defined(__AVX2__)
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
#else
    int32_t total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
#endif
}

// The i-th lane in an order in which `sum` adds lanes up two by two, then what follows from two pairs, and so on. Its own inverse.
constexpr int lane_in_order(int i) {
    int lane = 0;
    for (int bit = 1; bit < LANES; bit *= 2) lane = 2 * lane + (i & bit ? 1 : 0);
    return lane;
}

// A vector whose lane i is the sum of x[i], in numbers or in whole numbers.
template <class Lanes>
inline Lanes sums(const Lanes (&x)[LANES]) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    auto add = [](__m512 a, __m512 b) { return (__m512)((Lanes)a + (Lanes)b); };
    __m512 quarters[4];
    for (int i = 0; i < 4; i++) {
        const __m512 v[] = {(__m512)x[i], (__m512)x[4 + i], (__m512)x[8 + i], (__m512)x[12 + i]};
        __m512 first = add(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
        __m512 second = add(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
        quarters[i] = add(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
    }
    __m512 halves[2];
    for (int i = 0; i < 2; i++) {
        __m512d a = _mm512_castps_pd(quarters[2 * i]), b = _mm512_castps_pd(quarters[2 * i + 1]);
        halves[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    return (Lanes)add(_mm512_shuffle_ps(halves[0], halves[1], 0x88), _mm512_shuffle_ps(halves[0], halves[1], 0xdd));
#elif defined(__AVX__)
    auto add = [](__m256 a, __m256 b) { return (__m256)((Lanes)a + (Lanes)b); };
    __m256 halves[4];
    for (int i = 0; i < 4; i++) {
        const __m256 a = (__m256)x[i], b = (__m256)x[4 + i];
        halves[i] = add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    __m256 quarters[2];
    for (int i = 0; i < 2; i++) {
        __m256d a = _mm256_castps_pd(halves[2 * i]), b = _mm256_castps_pd(halves[2 * i + 1]);
        quarters[i] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return (Lanes)add(_mm256_shuffle_ps(quarters[0], quarters[1], 0x88), _mm256_shuffle_ps(quarters[0], quarters[1], 0xdd));
#else
    Lanes y;
    for (int i = 0; i < LANES; i++) y[i] = sum(x[i]);
    return y;
#endif
}

#if defined(__AVX2__)
// Of 4 vectors, in each quarter of 4 lanes: v[i][j] becomes v[j][i].
inline void transpose_quarters(Unsigned v[4]) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define UNPACKED(part, type, a, b) (Unsigned)_mm512_unpack##part##_##type((__m512i)(a), (__m512i)(b))
#else
#define UNPACKED(part, type, a, b) (Unsigned)_mm256_unpack##part##_##type((__m256i)(a), (__m256i)(b))
#endif
    const Unsigned a = UNPACKED(lo, epi32, v[0], v[1]), b = UNPACKED(hi, epi32, v[0], v[1]);
    const Unsigned c = UNPACKED(lo, epi32, v[2], v[3]), d = UNPACKED(hi, epi32, v[2], v[3]);
    v[0] = UNPACKED(lo, epi64, a, c), v[1] = UNPACKED(hi, epi64, a, c);
    v[2] = UNPACKED(lo, epi64, b, d), v[3] = UNPACKED(hi, epi64, b, d);
#undef UNPACKED
}
#endif

constexpr float ROUND = 12582912;  // 1.5 · 2^23: what is added to it is rounded to a whole number, in its low bits

// exp(x) = 2^n · exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, where a Taylor polynomial is exact to a bit or two.
inline Vector exp(Vector x) {
    x = x < -87.f ? Vector{} - 87.f : x;
    x = x > 88.f ? Vector{} + 88.f : x;
    const Vector one = Vector{} + 1.f;
    Vector rounded = fma(x, one * 1.44269504f, one * ROUND), n = rounded - ROUND;
    Vector r = fma(n, one * -1.42860677e-6f, fma(n, one * -0.693145752f, x));  // ln 2 in two parts
    Vector p = fma(r, one / 720.f, one / 120.f);
    p = fma(p, r, one / 24.f);
    p = fma(p, r, one / 6.f);
    p = fma(p, r, one / 2.f);
    p = fma(p, r, one);
    p = fma(p, r, one);
    return (Vector)((Integers)p + ((Integers)rounded << 23));
}

inline Vector silu(Vector x) { return x / (1.f + exp(-x)); }

// Calls work(i, v, count) for whole vectors, then for a last one of `count` < LANES numbers that is filled up.
template <class Work>
inline void by_vectors(float* x, int64_t n, Work work) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(x + i, work(i, load(x + i)));
    if (i == n) return;
    float some[LANES];
    store(some, work(i, load_some(x + i, n - i)));
    std::memcpy(x + i, some, (n - i) * sizeof(float));
}

// The largest of n numbers; -INFINITY where there are none.
inline float largest(const float* p, int64_t n) {
    Vector most = Vector{} - INFINITY;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Vector x = load(p + i);
        most = x > most ? x : most;
    }
    float result = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) result = std::max(result, most[lane]);
    return i < n ? std::max(result, *std::max_element(p + i, p + n)) : result;
}

// p[i] = exp(p[i] - largest); returns their sum.
inline float exponentials(float* p, float largest, int64_t n) {
    Vector total = {};
    by_vectors(p, n, [&](int64_t i, Vector x) {
        Vector e = exp(x - largest);
        for (int64_t lane = n - i; lane < LANES; lane++) e[lane] = 0;
        total += e;
        return e;
    });
    return sum(total);
}
