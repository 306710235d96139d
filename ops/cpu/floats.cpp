// Products of weights as numbers: float32, float16, and bfloat16 in three ways (see products.h).
#include "amx.h"

namespace {

template <class T>
void numbers_of(const char* row, int64_t columns, float* out) {
    for (int64_t i = 0; i < columns; i += LANES) {
        const T* from = (const T*)row + i;
        const Vector v = i + LANES <= columns ? load(from) : load_some(from, columns - i);
        std::memcpy(out + i, &v, std::min<int64_t>(LANES, columns - i) * sizeof(float));
    }
}

constexpr int TILE_ROWS = LANES == 16 ? 4 : 2, TILE_TOKENS = 6;  // what the registers hold

// float32 or float16.
template <class T>
struct Numbers : AsTheyAre {
    explicit Numbers(const Rows&) {}
    static constexpr int ROWS = TILE_ROWS, TOKENS = TILE_TOKENS;
    static constexpr int64_t COLUMNS = LANES, BYTES = sizeof(T);  // see NumberPanel

    static Unsigned some(const char* from, int64_t columns) {
        return (Unsigned)(columns < LANES ? load_some((const T*)from, columns) : load((const T*)from));
    }
    static Vector part(Unsigned numbers, int) { return (Vector)numbers; }

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, auto& ahead,
                                                 Vector total[N][R]) const {
        auto meet = [&](const Vector* weights, int64_t i) __attribute__((always_inline)) {
            for (int k = 0; k < N; k++) {
                Vector activations = load((const float*)x[k] + i);
                for (int r = 0; r < R; r++) total[k][r] = fma(weights[r], activations, total[k][r]);
            }
        };
        int64_t i = 0;
        Vector weights[R];
        constexpr int LINE = 64 / sizeof(T);  // columns of a cache line
        auto row = [&](int r) { return (const T*)(w.weight + r * w.row_bytes); };
        for (; i + LINE <= w.columns; i += LINE) {
            ahead.template fetch<R>((const char*)(row(0) + i), w.row_bytes);
            for (int part = 0; part < LINE; part += LANES) {
                for (int r = 0; r < R; r++) weights[r] = load(row(r) + i + part);
                meet(weights, i + part);
            }
        }
        for (; i + LANES <= w.columns; i += LANES) {
            for (int r = 0; r < R; r++) weights[r] = load(row(r) + i);
            meet(weights, i);
        }
        if (i == w.columns) return;
        for (int r = 0; r < R; r++) weights[r] = load_some(row(r) + i, w.columns - i);
        meet(weights, i);
    }
    static float finish(const Rows&, int, float y) { return y; }
};

// Of each two columns the even one is the lower half of a lane: its bits, 16 places higher, are its float32, and those
// of the odd one are already where they belong. So activations lie apart: [even] and [odd] of 2 · LANES columns.
struct BFloat16 {
    explicit BFloat16(const Rows&) {}
    static constexpr int ROWS = TILE_ROWS, TOKENS = TILE_TOKENS;
    static constexpr int64_t COLUMNS = 2 * LANES, BYTES = 2;

    static int64_t bytes(int64_t n) { return rounded_up(4 * rounded_up(n, COLUMNS), 64) + LINE_BYTES; }
    static void prepare(const float* x, int64_t n, char* out) {
        for (int64_t at = 0; at < n; at += COLUMNS) {
            float padded[COLUMNS] = {};
            const float* from = at + COLUMNS <= n ? x + at : (const float*)std::memcpy(padded, x + at, (n - at) * sizeof *x);
            float *even = (float*)out + at, *odd = even + LANES;
            for (int i = 0; i < LANES; i++) even[i] = from[2 * i], odd[i] = from[2 * i + 1];
        }
    }
    static Vector even(Unsigned two) { return (Vector)(two << 16); }
    static Vector odd(Unsigned two) { return (Vector)(two & 0xffff0000); }
    static Unsigned some(const char* from, int64_t columns) {
        if (columns >= COLUMNS) return read<Unsigned>(from);
        Unsigned two = {};
        std::memcpy(&two, from, 2 * columns);
        return two;
    }
    static Vector part(Unsigned two, int half) { return half ? odd(two) : even(two); }

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, auto& ahead,
                                                 Vector total[N][R]) const {
        auto meet = [&](int64_t i, auto weights) __attribute__((always_inline)) {
            for (int half = 0; half < 2; half++) {
                Vector numbers[R];
                for (int r = 0; r < R; r++) numbers[r] = part(weights(r), half);
                for (int k = 0; k < N; k++) {
                    Vector activations = load((const float*)x[k] + i + half * LANES);
                    for (int r = 0; r < R; r++) total[k][r] = fma(numbers[r], activations, total[k][r]);
                }
            }
        };
        int64_t i = 0;
        constexpr int LINE = 32;  // columns of a cache line
        for (; i + LINE <= w.columns; i += LINE) {
            ahead.template fetch<R>(w.weight + 2 * i, w.row_bytes);
            for (int part = 0; part < LINE; part += COLUMNS)
                meet(i + part, [&](int r) __attribute__((always_inline)) {
                    const char* from = w.weight + r * w.row_bytes + 2 * (i + part);
                    asm volatile("" : "+r"(from));  // loaded for each half: no register is left to keep them in
                    return read<Unsigned>(from);
                });
        }
        for (; i < w.columns; i += COLUMNS) {
            Unsigned weights[R];
            for (int r = 0; r < R; r++)
                weights[r] = some(w.weight + r * w.row_bytes + 2 * i, w.columns - i);
            meet(i, [&](int r) __attribute__((always_inline)) { return weights[r]; });
        }
    }
    static float finish(const Rows&, int, float y) { return y; }
};

// LANES rows, or as many as there are from `first` on, transposed and widened once for many tokens: a lane is a row.
//
//     weights      [LANES lanes of what few tokens meet, vectors of a row, rows]
//     activations  [LANES lanes, vectors], behind the arrangement for few tokens
template <class Kind>
struct NumberPanel {
    static constexpr int MOST = LANES == 16 ? 8 : 6;  // tokens of a tile
    static constexpr int64_t PARTS = Kind::COLUMNS / LANES, STEPS = LANES == 16 ? 4 : 16;
    const int64_t columns, vectors, lane;  // floats of a lane: each begins in another set of the cache
    float* const weights;
    char* const end;

    static int64_t vectors_of(int64_t n) { return rounded_up(n, Kind::COLUMNS) / LANES; }
    static int64_t bytes(int64_t n) { return Kind::bytes(n) + rounded_up(vectors_of(n) * LANES * 4, 64); }
    static void put_beside(char* x, int64_t n, int64_t count) {
        const int64_t all = vectors_of(n);
        for (; count > 0; count--, x += bytes(n))
            for (int64_t i = 0; i < all; i += LANES) {
                const int64_t some = std::min<int64_t>(LANES, all - i);
                Unsigned v[LANES] = {};
                for (int64_t j = 0; j < some; j++) v[j] = read<Unsigned>(x + (i + j) * sizeof *v);
                transpose(v);
                for (int lane = 0; lane < LANES; lane++) std::memcpy(x + Kind::bytes(n) + (lane * all + i) * 4, v + lane, 4 * some);
            }
    }

    NumberPanel(const Rows& w, int64_t first, int64_t rows, char* memory)
        : columns(w.columns), vectors(vectors_of(columns)), lane(vectors * LANES + 16), weights((float*)memory),
          end((char*)(weights + LANES * lane)) {
        for (int64_t i = 0; i < vectors; i += PARTS) {
            Unsigned v[LANES];
            for (int r = 0; r < LANES; r++) {
                const char* row = w.weight + std::min(first + r, rows - 1) * w.row_bytes;
                v[r] = Kind::some(row + i * LANES * Kind::BYTES, columns - i * LANES);
            }
            transpose(v);
            for (int l = 0; l < LANES; l++)
                for (int part = 0; part < PARTS; part++) store(weights + l * lane + (i + part) * LANES, Kind::part(v[l], part));
        }
    }

    int64_t steps() const { return LANES * ((vectors + STEPS - 1) / STEPS); }  // of a tile

    // y[count, COUNT · LANES] of a [count, ROWS] array = the products of some tokens with COUNT panels.
    template <int COUNT>
    static void multiply(const NumberPanel* panels, const char* const* x, int64_t count, float* y, Following& following) {
        const int64_t vectors = panels->vectors, stride = panels->end - (char*)panels->weights, numbers = Kind::bytes(panels->columns);
        by_lane<MOST, COUNT>(count, y, [&](int lane, int64_t first, auto& total) __attribute__((always_inline)) {
            constexpr int N = sizeof total / sizeof *total;
            const char* weights = (const char*)(panels->weights + lane * panels->lane);
            const float* activations[N];
            for (int k = 0; k < N; k++) activations[k] = (const float*)(x[first + k] + numbers) + lane * vectors;
            auto step = [&](int64_t i) __attribute__((always_inline)) {
                Vector w[COUNT];
                each<COUNT>([&](auto p) __attribute__((always_inline)) {
                    w[p] = in_register(read<Vector>(weights + p * stride + i * sizeof *w));
                });
                each<N>([&](auto k) __attribute__((always_inline)) {
                    const Vector all = load_to_all(activations[k] + i);
                    each<COUNT>([&](auto p) __attribute__((always_inline)) { total[k][p] = fma(w[p], all, total[k][p]); });
                });
            };
            int64_t i = 0;
            if constexpr (LANES == 16)  // with 32 registers four at once are faster, with 16 they are spilled
                for (; i + STEPS <= vectors; i += STEPS) {
                    following.fetch();
#pragma GCC unroll 4
                    for (int64_t j = 0; j < STEPS; j++) step(i + j);
                }
            while (i < vectors) {
                following.fetch();
                for (const int64_t end = std::min(i + STEPS, vectors); i < end; i++) step(i);
            }
        });
    }

    static constexpr Products products(decltype(Products::numbers) numbers, int32_t many) {
        return {bytes, Kind::prepare,
                [](const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float* scratch) {
                    if (!w.many) return ::multiply<Kind>(w, rows, x, count, y);
                    in_panels(w, rows, x, count, y, (char*)scratch, [&](int64_t first, char* memory) {
                        return NumberPanel(w, first, rows, memory);
                    });
                },
                numbers, nullptr, put_beside, Kind::ROWS, many};
    }
};

#if AMX && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define AMX_OF_FLOATS 1
// bfloat16 weights by tdpbf16ps, which meets 16 vectors of 32 columns with 16 others: for each output the products of the
// even columns and those of the odd ones are added up apart, then to each other and to the sum so far. One token has to
// take the same way. Its activations are a sum of two bfloat16, 17 bits of each number, and so two of the vectors; a
// tile is 8 tokens. The instruction takes numbers below 2^-126 for zero.
//
// a · b = b · a: a few tokens meet rows of weights where they lie, and are arranged in columns for that; many tokens are
// taken as they lie, and the weights are arranged, once for all of them.
struct Tiled {
    static constexpr int64_t COLUMNS = 32, TOKENS = SIDE / 2;  // of a tile

    // [high parts] [low parts], zeros behind each: a line more, see LINE_BYTES.
    static int64_t part(int64_t n) { return rounded_up(2 * n, 64) + LINE_BYTES; }
    static int64_t bytes(int64_t n) { return 2 * part(n); }
    static void prepare(const float* x, int64_t n, char* out) {
        char* low_parts = out + part(n);
        for (int64_t i = 0; i < n; i += LANES) {
            const Vector v = i + LANES <= n ? load(x + i) : load_some(x + i, n - i);
            const __m256i high = (__m256i)_mm512_cvtneps_pbh((__m512)v);
            const auto rounded = (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
            const Vector rest = rounded - rounded == 0 ? v - rounded : Vector{};  // zero where it is not finite
            const __m256i low = (__m256i)_mm512_cvtneps_pbh((__m512)rest);
            std::memcpy(out + 2 * i, &high, sizeof high), std::memcpy(low_parts + 2 * i, &low, sizeof low);
        }
        const int64_t end = 2 * rounded_up(n, LANES);
        std::memset(out + end, 0, part(n) - end), std::memset(low_parts + end, 0, part(n) - end);
    }

    // A few tokens, fewer than ::MANY, as [count / 8] groups of [columns / 32, 16 pairs of columns, 2 parts of each of up to 8 tokens].
    static int64_t group_bytes(int64_t columns, int64_t tokens) {
        return rounded_up(columns, COLUMNS) / COLUMNS * 128 * tokens;
    }
    static void arrange(const char* const* x, int64_t count, int64_t columns, bool many, float* scratch) {
        if (many) return;
        char* out = (char*)scratch;
        const Unsigned first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, second = first + 8;
        for (int64_t i = 0; i < count; i += TOKENS) {
            const int64_t tokens = std::min(count - i, TOKENS);
            for (int64_t at = 0; at < 2 * columns; at += 64) {
                if (tokens == 1) {
                    const __m512i high = _mm512_loadu_si512(x[i] + at), low = _mm512_loadu_si512(x[i] + part(columns) + at);
                    _mm512_storeu_si512(out, _mm512_permutex2var_epi32(high, (__m512i)first, low));
                    _mm512_storeu_si512(out + 64, _mm512_permutex2var_epi32(high, (__m512i)second, low));
                    out += 128;
                    continue;
                }
                Unsigned v[16] = {};
                for (int64_t k = 0; k < tokens; k++)
                    v[2 * k] = read<Unsigned>(x[i + k] + at), v[2 * k + 1] = read<Unsigned>(x[i + k] + part(columns) + at);
                transpose(v);
                for (int pair = 0; pair < 16; pair++, out += 8 * tokens) std::memcpy(out, v + pair, 64);
            }
        }
    }

    // Up to 16 tokens and 32 rows. Registers: 0 to 3 sums [rows, 2 · tokens], 4 and 5 weights, 6 and 7 tokens.
    template <int HALVES, int GROUPS>
    static void few(const Rows& w, int64_t rows, const char* x, int64_t count, float* y) {
        uint8_t shape[8], bytes[8];
        const int64_t halves[] = {std::min<int64_t>(rows, SIDE), rows - SIDE}, groups[] = {std::min(count, TOKENS), count - TOKENS};
        const char* group[] = {x, x + group_bytes(w.columns, TOKENS)};
        for (int i = 0; i < 4; i++) shape[i] = halves[HALVES == 1 ? 0 : i / 2], bytes[i] = 8 * groups[GROUPS == 1 ? 0 : i % 2];
        for (int i = 0; i < 2; i++) {
            shape[4 + i] = halves[HALVES == 1 ? 0 : i], bytes[4 + i] = 64;
            shape[6 + i] = 16, bytes[6 + i] = 8 * groups[GROUPS == 1 ? 0 : i];
        }
        const TileRegisters registers(shape, bytes);
        zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
        const char* next = w.weight + rows * w.row_bytes;  // read as one stream, a line of each row here
        auto coming = [&](int64_t block, int64_t from, int64_t to) __attribute__((always_inline)) {
            for (int64_t r = from; r < to && w.tuning.ahead; r++) __builtin_prefetch(next + 64 * (block * rows + r), 0, 1);
        };
        auto meet = [&](const char* weights, int64_t stride, int64_t block) __attribute__((always_inline)) {
            coming(block, 0, std::min<int64_t>(rows, 16));
            load_tile<4>(weights, stride);
            load_tile<6>(group[0] + block * 128 * groups[0], 8 * groups[0]);
            multiply_pairs<0, 4, 6>();
            if constexpr (GROUPS == 2) load_tile<7>(group[1] + block * 128 * groups[1], 8 * groups[1]), multiply_pairs<1, 4, 7>();
            if constexpr (HALVES == 2) {
                coming(block, 16, rows);
                load_tile<5>(weights + SIDE * stride, stride);
                multiply_pairs<2, 5, 6>();
                if constexpr (GROUPS == 2) multiply_pairs<3, 5, 7>();
            }
        };
        int64_t block = 0;
        for (; (block + 1) * COLUMNS <= w.columns; block++) {
            meet(w.weight + 64 * block, w.row_bytes, block);
        }
        if (const int64_t columns = w.columns - block * COLUMNS) {
            alignas(64) char rest[::ROWS][64] = {};
            for (int64_t r = 0; r < rows; r++) std::memcpy(rest[r], w.weight + r * w.row_bytes + 64 * block, 2 * columns);
            meet(rest[0], 64, block);
        }
        auto put = [&](auto from, int half, int64_t tokens, float* to) __attribute__((always_inline)) {
            alignas(64) Unsigned sums[16];
            store_tile<from>(sums, tokens == 1 ? 8 : 64);  // [rows, 2 · tokens]
            if (tokens == 1) {
                const Unsigned even = Unsigned{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
                const __m512 a = (__m512)sums[0], b = (__m512)sums[1];
                const auto high = (Vector)_mm512_permutex2var_ps(a, (__m512i)even, b);
                return store(to + half * SIDE, high + (Vector)_mm512_permutex2var_ps(a, (__m512i)(even + 1), b));
            }
            transpose(sums);
            for (int64_t k = 0; k < tokens; k++) store(to + k * ::ROWS + half * SIDE, (Vector)sums[2 * k] + (Vector)sums[2 * k + 1]);
        };
        put(std::integral_constant<int, 0>(), 0, groups[0], y);
        if constexpr (GROUPS == 2) put(std::integral_constant<int, 1>(), 0, groups[1], y + TOKENS * ::ROWS);
        if constexpr (HALVES == 2) put(std::integral_constant<int, 2>(), 1, groups[0], y);
        if constexpr (HALVES == 2 && GROUPS == 2) put(std::integral_constant<int, 3>(), 1, groups[1], y + TOKENS * ::ROWS);
    }

    // Registers: 0 to 3 sums [2 · tokens, rows], 4 and 5 tokens, 6 and 7 weights [16 pairs of columns, 16 rows].
    static void many(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, char* scratch) {
        const int64_t blocks = rounded_up(w.columns, COLUMNS) / COLUMNS, halves = rows > SIDE ? 2 : 1;
        char* copies = scratch + halves * blocks * 1024;
        for (int64_t half = 0; half < halves; half++)
            for (int64_t block = 0; block < blocks; block++)
                transposed(w, half * SIDE, rows, 64 * block, 2 * w.columns, (Unsigned*)(scratch + (half * blocks + block) * 1024));
        const char *weights = scratch, *others = scratch + (halves - 1) * blocks * 1024;
        for (int64_t i = 0; i < count; i += 2 * TOKENS) {
            const int64_t tokens = std::min(count - i, 2 * TOKENS), first = std::min(tokens, TOKENS), second = tokens - first;
            const uint8_t a = 2 * first, b = second ? 2 * second : a;
            const TileRegisters registers({a, a, b, b, a, b, 16, 16}, {64, 64, 64, 64, 64, 64, 64, 64});
            bool side_by_side = true;
            for (int64_t k = 1; k < tokens; k++) side_by_side = side_by_side && x[i + k] - x[i] == k * bytes(w.columns);
            for (int64_t k = 0; k < tokens && !side_by_side; k++) std::memcpy(copies + k * bytes(w.columns), x[i + k], bytes(w.columns));
            const char *low = side_by_side ? x[i] : copies, *high = low + TOKENS * bytes(w.columns);
            const int64_t stride = part(w.columns);
            zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
            for (int64_t block = 0; block < blocks; block++) {
                load_tile<4>(low + 64 * block, stride), load_tile<6>(weights + 1024 * block, 64), multiply_pairs<0, 4, 6>();
                load_tile<7>(others + 1024 * block, 64), multiply_pairs<1, 4, 7>();
                if (second) load_tile<5>(high + 64 * block, stride), multiply_pairs<2, 5, 6>(), multiply_pairs<3, 5, 7>();
            }
            alignas(64) Vector sums[4][16];
            store_tile<0>(sums[0]), store_tile<1>(sums[1]), store_tile<2>(sums[2]), store_tile<3>(sums[3]);
            for (int64_t k = 0; k < tokens; k++)
                for (int half = 0; half < halves; half++) {
                    const Vector* v = sums[k / TOKENS * 2 + half] + 2 * (k % TOKENS);
                    store(y + (i + k) * ::ROWS + half * SIDE, v[0] + v[1]);
                }
        }
    }

    static void multiply(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float* scratch) {
        if (w.many) return many(w, rows, x, count, y, (char*)scratch);
        for (int64_t i = 0; i < count; i += 2 * TOKENS) {
            const int64_t tokens = std::min(count - i, 2 * TOKENS);
            auto few = [&](auto halves, auto groups) { Tiled::few<halves, groups>(w, rows, (const char*)scratch + group_bytes(w.columns, i), tokens, y + i * ::ROWS); };
            const std::integral_constant<int, 1> one;
            const std::integral_constant<int, 2> two;
            rows > SIDE ? tokens > TOKENS ? few(two, two) : few(two, one) : tokens > TOKENS ? few(one, two) : few(one, one);
        }
    }
};
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
struct Pairs16 {  // bfloat16 weights and activations, two products to a lane
    explicit Pairs16(const Rows&) {}
    static constexpr int ROWS = 4, TOKENS = 6;

    static int64_t bytes(int64_t n) { return rounded_up(2 * n, 64); }
    static void prepare(const float* x, int64_t n, char* out) {
        for (int64_t i = 0; i < n; i++) assign(((bfloat16*)out)[i], x[i]);
        std::memset(out + 2 * n, 0, bytes(n) - 2 * n);
    }

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, auto& ahead,
                                                 Vector total[N][R]) const {
        const int64_t bytes = 2 * w.columns;
        auto meet = [&](const __m512bh* weights, int64_t i) __attribute__((always_inline)) {
            for (int k = 0; k < N; k++) {
                auto activations = (__m512bh)_mm512_load_si512(x[k] + i);
                for (int r = 0; r < R; r++)
                    total[k][r] = (Vector)_mm512_dpbf16_ps((__m512)total[k][r], weights[r], activations);
            }
        };
        int64_t i = 0;
        __m512bh weights[R];
        for (; i + 64 <= bytes; i += 64) {
            ahead.template fetch<R>(w.weight + i, w.row_bytes);
            for (int r = 0; r < R; r++) weights[r] = (__m512bh)_mm512_loadu_si512(w.weight + r * w.row_bytes + i);
            meet(weights, i);
        }
        if (i == bytes) return;
        for (int r = 0; r < R; r++)
            weights[r] = (__m512bh)_mm512_maskz_loadu_epi8((1ull << (bytes - i)) - 1, w.weight + r * w.row_bytes + i);
        meet(weights, i);
    }
    static float finish(const Rows&, int, float y) { return y; }
};
#endif

}  // namespace

const Products float32_products = NumberPanel<Numbers<float>>::products(numbers_of<float>, LANES == 16 ? MANY : 14);
const Products bfloat16_products = NumberPanel<BFloat16>::products(numbers_of<bfloat16>, LANES == 16 ? 24 : 10);
const Products float16_products = NumberPanel<Numbers<float16>>::products(numbers_of<float16>, LANES == 16 ? MANY : 18);
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
const Products pair_products = products_of<Pairs16>(numbers_of<bfloat16>);
const bool has_pairs = true;
#else
const Products pair_products = bfloat16_products;
const bool has_pairs = false;
#endif
#if AMX_OF_FLOATS
const Products tile_products = {Tiled::bytes, Tiled::prepare, Tiled::multiply, numbers_of<bfloat16>, Tiled::arrange};
const bool has_tiles = true;
#else
const Products tile_products = bfloat16_products;
const bool has_tiles = false;
#endif
