// Arithmetic on rows of numbers, as wide as the machine that it compiles for: dot products with weights of 32, 16, 8 and
// 4 bits, exp, softmax's parts. Used by step.cpp; each function does whole vectors first, then what is left.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
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
typedef uint32_t HalfUnsigned __attribute__((vector_size(2 * LANES)));
typedef uint16_t Quarters __attribute__((vector_size(LANES)));
typedef float Quad __attribute__((vector_size(16)));

struct bfloat16 {
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

inline Vector load(const float* p) { return read<Vector>(p); }
inline Vector load(const bfloat16* p) {
#if defined(__AVX512F__)  // one instruction, of which GCC 12 makes five
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(p)), 16);
#else
    return (Vector)(__builtin_convertvector(read<Halves>(p), Integers) << 16);
#endif
}
inline Vector load(const int8* p) {
    Integers codes = __builtin_convertvector(read<Bytes>(p) ^ int8_t(-128), Integers);
    return __builtin_convertvector(codes, Vector);
}
inline void store(float* p, Vector x) { std::memcpy(p, &x, sizeof x); }

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    return read<float>(&bits);
}

inline float to_float(int8 x) { return float(x.code) - 128; }

inline void assign(float& to, float x) { to = x; }
inline void assign(bfloat16& to, float x) {  // to the nearest, ties to even
    uint32_t bits = read<uint32_t>(&x);
    to.bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float sum(Vector x) {
    Quad quads[LANES / 4], total = {};
    std::memcpy(quads, &x, sizeof x);
    for (Quad quad : quads) total += quad;
    return (total[0] + total[2]) + (total[1] + total[3]);
}

constexpr float ROUND = 12582912;  // 1.5 · 2^23: what is added to it is rounded to a whole number, in its low bits

// exp(x) = 2^n · exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, where a Taylor polynomial is exact to a bit or two.
inline Vector exp(Vector x) {
    x = x < -87.f ? Vector{} - 87.f : x;
    x = x > 88.f ? Vector{} + 88.f : x;
    Vector rounded = x * 1.44269504f + ROUND, n = rounded - ROUND;
    Vector r = x - n * 0.693145752f - n * 1.42860677e-6f;  // ln 2 in two parts
    Vector p = r * (1.f / 720) + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    return (Vector)((Integers)p + ((Integers)rounded << 23));
}

inline Vector silu(Vector x) { return x / (1.f + exp(-x)); }

constexpr int64_t PREFETCH = 4096;  // bytes ahead: far enough to hide the memory's latency, near enough to stay in L1
constexpr int64_t SCALES_AHEAD = 256;  // numbers: a second stream, at an eighth of the speed

// Calls work(i, count) for i = 0 .. n, four at a time, then two, then one; count is a compile-time constant.
template <class Work>
inline void by_fours(int64_t n, Work work) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) work(i, std::integral_constant<int, 4>());
    for (; i + 2 <= n; i += 2) work(i, std::integral_constant<int, 2>());
    for (; i < n; i++) work(i, std::integral_constant<int, 1>());
}

// y[i] = w·x[i] for N vectors; w is read and converted once for all of them.
template <int N, class T>
inline void dot(const T* w, const float* const* x, int64_t n, float* y) {
    constexpr int FOUR = 4 * LANES;
    Vector sums[N][4] = {};
    int64_t i = 0;
    for (; i + FOUR <= n; i += FOUR) {
        for (int line = 0; line < int(FOUR * sizeof(T)); line += 64)
            __builtin_prefetch((const char*)(w + i) + PREFETCH + line);
        for (int j = 0; j < 4; j++) {
            Vector weights = load(w + i + j * LANES);
            for (int k = 0; k < N; k++) sums[k][j] += weights * load(x[k] + i + j * LANES);
        }
    }
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < N; k++) sums[k][0] += load(w + i) * load(x[k] + i);
    for (int k = 0; k < N; k++) {
        y[k] = sum((sums[k][0] + sums[k][1]) + (sums[k][2] + sums[k][3]));
        for (int64_t rest = i; rest < n; rest++) y[k] += to_float(w[rest]) * x[k][rest];
    }
}

template <class T>
inline float dot(const T* w, const float* x, int64_t n) {
    float y;
    dot<1>(w, &x, n, &y);
    return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights of 8 and 4 bits. They lie as formats/compressed_tensors.py packs them: one code (the number + 128) to a byte, or
// two codes (the number + 8), the lower four bits first. A group of columns shares a scale.
//
// x comes in the form that `Input` prepares once for all rows. With byte products (VNNI) x is a whole number of 16 bits
// times a scale for each chunk, cut into a high and a low byte: exact to 1/32,000 of the chunk's largest number, which
// is finer than bfloat16. Without them x stays float.

inline int code_at(const uint8_t* w, int64_t column, int bits) {
    return bits == 8 ? int(w[column]) - 128 : int(w[column / 2] >> 4 * (column % 2) & 15) - 8;
}

// For each 32-bit lane the scale of its weights, `columns` to a lane, from `column` on.
inline Vector lane_scales(const bfloat16* scale, int64_t column, int64_t group_size, int columns) {
    const int64_t width = LANES * columns, groups = width % group_size ? 0 : width / group_size;
    Pairs high;  // the scale of a pair of lanes in its highest bits
    if (group_size % width == 0) return Vector{} + to_float(scale[column / group_size]);
    if (groups == LANES / 4) {
        uint64_t scales = 0;
        std::memcpy(&scales, scale + column / group_size, LANES / 2);
        Pairs shift;
        for (int pair = 0; pair < LANES / 2; pair++) shift[pair] = 48 - 16 * (pair / 2);
        high = (scales << shift) & 0xffff000000000000;
    } else if (groups == LANES / 2) {
        // By way of 32 bits, or GCC 12 converts one number at a time.
        auto scales = __builtin_convertvector(read<Quarters>(scale + column / group_size), HalfUnsigned);
        high = __builtin_convertvector(scales, Pairs) << 48;
    } else {
        float lanes[LANES];
        for (int lane = 0; lane < LANES; lane++) lanes[lane] = to_float(scale[(column + columns * lane) / group_size]);
        return load(lanes);
    }
    return (Vector)(high | high >> 32);
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

template <int BITS>
struct alignas(64) Chunk {  // what meets 64 bytes of weights
    static constexpr int64_t COLUMNS = 512 / BITS;
    int8_t high[8 / BITS][64], low[8 / BITS][64];  // for 4 bits the even columns, then the odd ones
    int32_t start[16];                             // takes away what the codes have too much
    float scale;

    void prepare(const float* x) {
        const __m512i ones = _mm512_set1_epi8(1);
        __m512 largest = _mm512_setzero_ps();
        for (int i = 0; i < COLUMNS; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
        scale = _mm512_reduce_max_ps(largest) / 32639;  // 127 · 256 + 127
        const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
        for (int i = 0; i < COLUMNS; i += 16) {
            __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
            __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
            store(high, i, upper), store(low, i, whole);  // the low byte is what the high one leaves
        }
        __m512i above = _mm512_setzero_si512(), below = above;
        for (int part = 0; part < 8 / BITS; part++) {
            above = _mm512_dpbusd_epi32(above, ones, _mm512_load_si512(high[part]));
            below = _mm512_dpbusd_epi32(below, ones, _mm512_load_si512(low[part]));
        }
        __m512i total = _mm512_add_epi32(_mm512_slli_epi32(above, 8), below);
        _mm512_store_si512(start, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(total, BITS - 1)));
    }

    // The lowest bytes of 16 numbers to their places.
    static void store(int8_t to[8 / BITS][64], int column, __m512i numbers) {
        if constexpr (BITS == 8) {
            _mm_storeu_si128((__m128i*)&to[0][column], _mm512_cvtepi32_epi8(numbers));
        } else {
            _mm_storel_epi64((__m128i*)&to[0][column / 2], _mm512_cvtepi64_epi8(numbers));
            _mm_storel_epi64((__m128i*)&to[1][column / 2], _mm512_cvtepi64_epi8(_mm512_srli_epi64(numbers, 32)));
        }
    }
};

// How the scales of 64 bytes of weights spread over the 32-bit lanes: up to 8 numbers that lie side by side.
struct Scales {
    __m512i where;
    __mmask8 which;
    int64_t groups, group_size, step;  // of a row; numbers from one 64 bytes to the next, 0 where that is no whole one

    Scales(int64_t n, int64_t groups, int bits) : groups(groups), group_size(n / groups) {
        const int64_t columns = 512 / bits;
        step = columns % group_size || columns / group_size > 8 ? 0 : columns / group_size;
        alignas(64) uint8_t bytes[64];
        for (int i = 0; i < 64; i++) bytes[i] = i % 4 < 2 ? 128 : 2 * (i / 4 * step / 16) + i % 4 - 2;
        where = _mm512_load_si512(bytes), which = (1 << step) - 1;
    }
};

// y[i] = w·x[i] for N vectors and a row of n weights.
template <int BITS, int N>
__attribute__((always_inline)) inline void dot_packed(const uint8_t* w, const bfloat16* scale, const Scales& scales,
                                                      const void* const* prepared, const float* const* x, int64_t n,
                                                      float* y) {
    constexpr int64_t COLUMNS = Chunk<BITS>::COLUMNS;
    const __m512i nibbles = _mm512_set1_epi8(15), where = scales.where;
    const __mmask8 which = scales.which;
    const int64_t groups = scales.groups, step = scales.step;
    const Chunk<BITS>* chunks[N];
    for (int i = 0; i < N; i++) chunks[i] = (const Chunk<BITS>*)prepared[i];
    for (int64_t i = 0; i < groups && groups > 1; i += 32) __builtin_prefetch(scale + i + SCALES_AHEAD);
    __m512 total[N] = {}, of_w = _mm512_set1_ps(to_float(*scale));
    const int64_t whole = n / COLUMNS;
    for (int64_t at = 0; at < whole; at++) {
        __builtin_prefetch(w + 64 * at + PREFETCH);
        const __m512i codes = _mm512_loadu_si512(w + 64 * at), even = _mm512_and_si512(codes, nibbles);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibbles);
        if (step) {
            __m512i numbers = _mm512_broadcast_i32x4(_mm_maskz_loadu_epi16(which, scale + at * step));
            of_w = (__m512)_mm512_shuffle_epi8(numbers, where);
        } else if (groups > 1) {
            of_w = (__m512)lane_scales(scale, at * COLUMNS, scales.group_size, COLUMNS / 16);
        }
        for (int i = 0; i < N; i++) {
            const Chunk<BITS>& chunk = chunks[i][at];
            __m512i high = _mm512_setzero_si512(), low = _mm512_load_si512(chunk.start);
            high = _mm512_dpbusd_epi32(high, BITS == 8 ? codes : even, _mm512_load_si512(chunk.high[0]));
            low = _mm512_dpbusd_epi32(low, BITS == 8 ? codes : even, _mm512_load_si512(chunk.low[0]));
            if constexpr (BITS == 4) {
                high = _mm512_dpbusd_epi32(high, odd, _mm512_load_si512(chunk.high[1]));
                low = _mm512_dpbusd_epi32(low, odd, _mm512_load_si512(chunk.low[1]));
            }
            __m512 product = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
            total[i] = _mm512_fmadd_ps(_mm512_mul_ps(product, of_w), _mm512_set1_ps(chunk.scale), total[i]);
        }
    }
    for (int i = 0; i < N; i++) {
        y[i] = sum((Vector)total[i]);
        for (int64_t rest = whole * COLUMNS; rest < n; rest++)
            y[i] += x[i][rest] * code_at(w, rest, BITS) * to_float(scale[rest / scales.group_size]);
    }
}

#else

template <int BITS>
struct Chunk {  // weights of 8 bits meet x as it is
    static constexpr int64_t COLUMNS = LANES;
    void prepare(const float*) {}
};

// 8 weights of 4 bits to a 32-bit lane, lowest bits first. Where the mantissa of 1.0 begins, the bits of a number q make
// 1.5 + q / 16 without a conversion, and those of its neighbour, four places lower, 1 + (q + 8) / 256.
template <>
struct Chunk<4> {
    static constexpr int64_t COLUMNS = 8 * LANES;
    float arranged[9][LANES];  // what takes away all that is too much, then lane by lane

    void prepare(const float* x) {
        for (int lane = 0; lane < LANES; lane++) {
            float even = 0, odd = 0;
            for (int i = 0; i < 8; i += 2) {
                even += arranged[1 + i][lane] = 16 * x[8 * lane + i];
                odd += arranged[2 + i][lane] = x[8 * lane + i + 1];
            }
            arranged[0][lane] = -1.5f * odd - (1 + 8 / 256.f) * even;
        }
    }
};

template <int BITS>
inline float dot_packed(const uint8_t* w, const bfloat16* scale, const void* prepared, const float* x, int64_t n,
                        int64_t group_size) {
    if (BITS == 8) {
        float result = 0;
        for (int64_t i = 0; i < n; i += group_size)
            result += to_float(scale[i / group_size]) * dot((const int8*)w + i, x + i, group_size);
        return result;
    }
    const auto* chunk = (const Chunk<4>*)prepared;
    Vector total = {};
    int64_t column = 0;
    for (; column + Chunk<4>::COLUMNS <= n; column += Chunk<4>::COLUMNS, chunk++) {
        __builtin_prefetch(w + column / 2 + PREFETCH);
        auto bits = read<Unsigned>(w + column / 2);
        Vector sum = load(chunk->arranged[0]);
        for (int i = 0; i < 8; i += 2) {
            Unsigned two = i < 4 ? bits << (15 - 4 * i) : bits >> (4 * i - 15);
            sum += (Vector)((two & 0x078000) | 0x3f800000) * load(chunk->arranged[1 + i]);
            sum += (Vector)((two & 0x780000) | 0x3f800000) * load(chunk->arranged[2 + i]);
        }
        total += sum * lane_scales(scale, column, group_size, 8);
    }
    float rest = 16 * sum(total);
    for (; column < n; column++) rest += x[column] * code_at(w, column, 4) * to_float(scale[column / group_size]);
    return rest;
}

struct Scales {
    int64_t group_size;
    Scales(int64_t n, int64_t groups, int) : group_size(n / groups) {}
};

template <int BITS, int N>
inline void dot_packed(const uint8_t* w, const bfloat16* scale, const Scales& scales, const void* const* prepared,
                       const float* const* x, int64_t n, float* y) {
    for (int i = 0; i < N; i++) y[i] = dot_packed<BITS>(w, scale, prepared[i], x[i], n, scales.group_size);
}

#endif

// A vector x [n] on its way into linear layers, in the form that each kind of weights wants.
class Input {
    std::vector<Chunk<8>> by_8;
    std::vector<Chunk<4>> by_4;
    bool ready[2];

    template <class C>
    void prepare(std::vector<C>& chunks) {
        chunks.resize(n / C::COLUMNS);
        for (int64_t i = 0; i < int64_t(chunks.size()); i++) chunks[i].prepare(x + i * C::COLUMNS);
    }

  public:
    const float* x;
    int64_t n;

    void set(const float* numbers, int64_t count) { x = numbers, n = count, ready[0] = ready[1] = false; }

    const void* prepared(int bits) {
        bool& is_ready = ready[bits == 4];
        if (!is_ready) bits == 4 ? prepare(by_4) : prepare(by_8);
        is_ready = true;
        return bits == 4 ? (const void*)by_4.data() : by_8.data();
    }
};

// The number of x [n] that is furthest from zero, with its sign.
inline float largest_of(const float* x, int64_t n) {
    Vector least = {}, greatest = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vector v = load(x + i);
        least = v < least ? v : least, greatest = v > greatest ? v : greatest;
    }
    float low = 0, high = 0;
    for (int lane = 0; lane < LANES; lane++) low = std::min(low, least[lane]), high = std::max(high, greatest[lane]);
    for (; i < n; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
    return -low > high ? low : high;
}

// Weights x [n] as whole numbers q of so many bits, x ≈ q · scale: see ops/quant.py. Returns the squared error.
inline float quantize(const float* x, int64_t n, int bits, float scale, int32_t* q) {
    const float low = -(1 << (bits - 1)), high = -low - 1, inverse = scale == 0 ? 0 : 1 / scale;
    Vector errors = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vector v = load(x + i), rounded = v * inverse + ROUND - ROUND;
        rounded = rounded < low ? Vector{} + low : rounded;
        rounded = rounded > high ? Vector{} + high : rounded;
        Vector error = rounded * scale - v;
        errors += error * error;
        Integers whole = __builtin_convertvector(rounded, Integers);
        std::memcpy(q + i, &whole, sizeof whole);
    }
    float error = sum(errors);
    for (; i < n; i++) {
        float rounded = std::min(std::max(x[i] * inverse + ROUND - ROUND, low), high);
        q[i] = rounded;
        error += (rounded * scale - x[i]) * (rounded * scale - x[i]);
    }
    return error;
}

inline void silu_and_multiply(float* gate, const float* up, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(gate + i, silu(load(gate + i)) * load(up + i));
    for (; i < n; i++) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

// p[i] = exp(p[i] - largest); returns their sum.
inline float exponentials(float* p, float largest, int64_t n) {
    Vector sums = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vector e = exp(load(p + i) - largest);
        store(p + i, e);
        sums += e;
    }
    float total = sum(sums);
    for (; i < n; i++) total += p[i] = std::exp(p[i] - largest);
    return total;
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention of a few queries to a block of positions.

constexpr int64_t BLOCK = 256;  // positions

// scores[g, 0] = q[g]·key for N queries. q [N, D], key [D], scores [N, BLOCK].
template <class T, int N>
inline void score(const float* q, const T* key, int64_t D, float* scores) {
    Vector sums[N] = {};
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES) {
        __builtin_prefetch((const char*)(key + d) + PREFETCH);
        Vector k = load(key + d);
        for (int g = 0; g < N; g++) sums[g] += k * load(q + g * D + d);
    }
    for (int g = 0; g < N; g++) {
        scores[g * BLOCK] = sum(sums[g]);
        for (int64_t rest = d; rest < D; rest++) scores[g * BLOCK] += to_float(key[rest]) * q[g * D + rest];
    }
}

// out[g] += weights[g]·values for N queries and ROWS positions. weights [N, BLOCK], values [ROWS, D], out [N, D].
template <class T, int N, int ROWS>
inline void add_weighted(const float* weights, const T* values, int64_t D, float* out) {
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES) {
        Vector totals[N];
        for (int g = 0; g < N; g++) totals[g] = load(out + g * D + d);
        for (int row = 0; row < ROWS; row++) {
            __builtin_prefetch((const char*)(values + row * D + d) + PREFETCH);
            Vector v = load(values + row * D + d);
            for (int g = 0; g < N; g++) totals[g] += weights[g * BLOCK + row] * v;
        }
        for (int g = 0; g < N; g++) store(out + g * D + d, totals[g]);
    }
    for (; d < D; d++)
        for (int g = 0; g < N; g++)
            for (int row = 0; row < ROWS; row++)
                out[g * D + d] += weights[g * BLOCK + row] * to_float(values[row * D + d]);
}
