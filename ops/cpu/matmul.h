// Many tokens at once: a prompt. Each weight that is read meets all of them, so that the matrix unit is the limit and not
// the memory. Products are of bfloat16 with sums in float32 (vdpbf16ps: AVX512-BF16), as PyTorch's are.
//
// 32 rows of weights, laid so that a vector holds two columns of 16 rows, meet tiles of 12 tokens, two columns of each:
//
//     weights  [columns / 2, 32 rows, 2]      packed by each thread for itself, whatever their type on disk
//     x        [tokens / 12, columns / 2, 12, 2]
//     sums     [12, 32]                       24 of the 32 registers
//
// Without that instruction MANY_TOKENS is false and PyTorch computes prompts.
#pragma once
#include "vectors.h"

struct alignas(64) Line {
    uint32_t pairs[16];  // each two bfloat16, the first column in the lower bits
};

constexpr int TILE = 12, ROWS = 32;
constexpr int64_t STRIDE = 32;  // columns are filled up with zeros to a multiple of it

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

constexpr bool MANY_TOKENS = true;

inline __m512i to_bfloat16(Vector low, Vector high) {  // 32 numbers
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// x [tokens, columns] in tiles.
class Tiles {
    std::vector<Line> lines;
    uint32_t* place(int64_t token, int64_t column) {
        return &lines[0].pairs[0] + (token / TILE * columns + column) / 2 * TILE + token % TILE;
    }

  public:
    int64_t columns = 0;

    void set(int64_t tokens, int64_t count) {
        columns = rounded_up(count, STRIDE);
        lines.assign((tokens + TILE - 1) / TILE * columns / 2 * TILE / 16, Line{});  // 0 behind the last column
    }

    const uint32_t* tile(int64_t token) { return place(token, 0); }

    // A part of a token's row, from an even column on.
    void put(int64_t token, int64_t column, const float* x, int64_t n) {
        for (int64_t i = 0; i < n; i += 32) {
            alignas(64) float rest[32] = {};
            const float* from = x + i;
            int64_t count = std::min(int64_t(32), n - i);
            if (count < 32) from = std::copy(from, from + count, rest) - count;
            alignas(64) uint32_t pairs[16];
            _mm512_store_si512(pairs, to_bfloat16(load(from), load(from + 16)));
            uint32_t* to = place(token, column + i);
            for (int64_t pair = 0; pair < (count + 1) / 2; pair++) to[pair * TILE] = pairs[pair];
        }
    }
};

// A 16 x 16 transposition in four rounds: blocks of 8, 4, 2 and 1 beside the diagonal change places.
inline void transpose(__m512i rows[16]) {
    const __m512i lane = (__m512i)Integers{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int size = 8; size; size /= 2) {
        __m512i bit = _mm512_set1_epi32(size);
        __mmask16 set = _mm512_test_epi32_mask(lane, bit);
        __m512i first = _mm512_mask_add_epi32(lane, set, lane, _mm512_set1_epi32(16 - size));
        __m512i second = _mm512_mask_add_epi32(_mm512_add_epi32(lane, bit), set, lane, _mm512_set1_epi32(16));
        for (int i = 0; i < 16; i++)
            if (!(i & size)) {
                __m512i a = rows[i], b = rows[i + size];
                rows[i] = _mm512_permutex2var_epi32(a, first, b);
                rows[i + size] = _mm512_permutex2var_epi32(a, second, b);
            }
    }
}

// 32 columns of a row as bfloat16. With one scale for the whole row the codes are exact, and the scale comes at the end.
inline __m512i columns_of(const bfloat16* row, const bfloat16*, int64_t, int64_t, int) {
    return _mm512_loadu_si512(row);
}
inline __m512i columns_of(const uint8_t* row, const bfloat16* scale, int64_t column, int64_t group_size, int bits) {
    __m256i codes;
    if (bits == 8) {
        codes = _mm256_xor_si256(read<__m256i>(row), _mm256_set1_epi8(-128));
    } else {
        __m256i words = _mm256_cvtepu8_epi16(read<__m128i>(row));
        words = _mm256_or_si256(words, _mm256_slli_epi16(words, 4));
        codes = _mm256_sub_epi8(_mm256_and_si256(words, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
    }
    Vector low = (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    Vector high = (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    if (scale) {
        low *= lane_scales(scale, column, group_size, 1);
        high *= lane_scales(scale, column + 16, group_size, 1);
    }
    return to_bfloat16(low, high);
}

// 16 rows of weights, or what there is of them, into one half of `out` [columns / 2, 2, 16 pairs]. W is bfloat16, or
// uint8_t for codes of 8 or 4 bits with a scale for each group of columns.
template <class W>
inline void pack(const W* weight, int64_t row_bytes, int64_t rows, int64_t columns, Line* out,
                 const bfloat16* scale = nullptr, int64_t groups = 1, int bits = 16) {
    const int64_t group_size = columns / groups;
    for (int64_t column = 0; column < columns; column += 32) {
        __m512i lines[16];
        for (int64_t row = 0; row < 16; row++) {
            lines[row] = _mm512_setzero_si512();
            if (row >= rows) continue;
            const char* from = (const char*)weight + row * row_bytes + column * bits / 8;
            const bfloat16* scales = groups > 1 ? scale + row * groups : nullptr;
            int64_t count = std::min(int64_t(32), columns - column);
            if (count == 32) {
                __builtin_prefetch(from + 32 * bits / 8);
                lines[row] = columns_of((const W*)from, scales, column, group_size, bits);
            } else {  // the end of a row that is no multiple of 32
                alignas(64) char bytes[64] = {};
                alignas(64) bfloat16 numbers[32] = {};
                std::memcpy(bytes, from, (count * bits + 7) / 8);
                for (int64_t i = 0; i < count; i++)
                    if (bits == 16)
                        numbers[i] = ((bfloat16*)bytes)[i];
                    else
                        assign(numbers[i], code_at((uint8_t*)bytes, i, bits) *
                                               (scales ? to_float(scales[(column + i) / group_size]) : 1.f));
                lines[row] = _mm512_load_si512(numbers);
            }
        }
        transpose(lines);
        for (int pair = 0; pair < 16; pair++) _mm512_store_si512(out + (column / 2 + pair) * 2, lines[pair]);
    }
}

// Values of attention [positions, D] as weights with a row for each of 32 dimensions and a column for each position:
// [positions / 2, 32, 2]. What is behind the last position or dimension becomes 0.
inline void pack_columns(const bfloat16* values, int64_t positions, int64_t D, int64_t first, Line* out) {
    auto row = [&](int64_t position, int64_t d) {
        alignas(32) bfloat16 numbers[16] = {};
        int64_t count = position < positions ? std::clamp(D - d, int64_t(0), int64_t(16)) : 0;
        std::copy(values + position * D + d, values + position * D + d + count, numbers);
        return _mm512_cvtepu16_epi32(read<__m256i>(numbers));
    };
    for (int64_t position = 0; position < rounded_up(positions, STRIDE); position += 2)
        for (int half = 0; half < 2; half++) {
            int64_t d = first + 16 * half;
            __m512i pairs = _mm512_or_si512(row(position, d), _mm512_slli_epi32(row(position + 1, d), 16));
            _mm512_store_si512(out + position + half, pairs);
        }
}

// sums[token][half] = weights · x for a tile of tokens and 32 rows.
inline void multiply(const Line* weights, const uint32_t* x, int64_t columns, Vector sums[TILE][2]) {
    __m512 total[TILE][2];
    for (auto& token : total) token[0] = token[1] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < columns / 2; pair++, weights += 2, x += TILE) {
        auto first = (__m512bh)_mm512_load_si512(weights), second = (__m512bh)_mm512_load_si512(weights + 1);
#pragma GCC unroll 12
        for (int token = 0; token < TILE; token++) {
            auto both = (__m512bh)_mm512_set1_epi32(x[token]);
            total[token][0] = _mm512_dpbf16_ps(total[token][0], first, both);
            total[token][1] = _mm512_dpbf16_ps(total[token][1], second, both);
        }
    }
#pragma GCC unroll 12
    for (int token = 0; token < TILE; token++)
        for (int half = 0; half < 2; half++) sums[token][half] = (Vector)total[token][half];
}

#else

constexpr bool MANY_TOKENS = false;

struct Tiles {
    int64_t columns = 0;
    void set(int64_t, int64_t) {}
    const uint32_t* tile(int64_t) { return nullptr; }
    void put(int64_t, int64_t, const float*, int64_t) {}
};
template <class W>
inline void pack(const W*, int64_t, int64_t, int64_t, Line*, const bfloat16* = nullptr, int64_t = 1, int = 16) {}
inline void pack_columns(const bfloat16*, int64_t, int64_t, int64_t, Line*) {}
inline void multiply(const Line*, const uint32_t*, int64_t, Vector[TILE][2]) {}

#endif
