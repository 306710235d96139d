// Products of weights as numbers: float32, and bfloat16 in two ways (see products.h).
#include "tiles.h"

namespace {

template <class T>
void numbers_of(const char* row, int64_t columns, float* out) {
    for (int64_t i = 0; i < columns; i += LANES) {
        const T* from = (const T*)row + i;
        const Vector v = i + LANES <= columns ? load(from) : load_some(from, columns - i);
        std::memcpy(out + i, &v, std::min<int64_t>(LANES, columns - i) * sizeof(float));
    }
}

constexpr int TILE_ROWS = LANES == 16 ? 4 : 2, TILE_TOKENS = LANES == 16 ? 6 : 4;  // what the registers hold

struct Float32 : AsTheyAre {
    explicit Float32(const Rows&) {}
    static constexpr int ROWS = TILE_ROWS, TOKENS = TILE_TOKENS;

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, int64_t ahead,
                                                 Vector total[N][R]) const {
        auto meet = [&](const Vector* weights, int64_t i) __attribute__((always_inline)) {
            for (int k = 0; k < N; k++) {
                Vector activations = load((const float*)x[k] + i);
                for (int r = 0; r < R; r++) total[k][r] = fma(weights[r], activations, total[k][r]);
            }
        };
        int64_t i = 0;
        Vector weights[R];
        constexpr int LINE = 16;  // columns of a cache line
        for (; i + LINE <= w.columns; i += LINE) {
            for (int r = 0; r < R && ahead; r++) __builtin_prefetch(w.weight + r * w.row_bytes + 4 * i + ahead);
            for (int part = 0; part < LINE; part += LANES) {
                for (int r = 0; r < R; r++) weights[r] = load((const float*)(w.weight + r * w.row_bytes) + i + part);
                meet(weights, i + part);
            }
        }
        for (; i + LANES <= w.columns; i += LANES) {
            for (int r = 0; r < R; r++) weights[r] = load((const float*)(w.weight + r * w.row_bytes) + i);
            meet(weights, i);
        }
        if (i == w.columns) return;
        for (int r = 0; r < R; r++)
            weights[r] = load_some((const float*)(w.weight + r * w.row_bytes) + i, w.columns - i);
        meet(weights, i);
    }
    static float finish(const Rows&, int, float y) { return y; }
};

// Of each two columns the even one is the lower half of a lane: its bits, 16 places higher, are its float32, and those
// of the odd one are already where they belong. So activations lie apart: [even] and [odd] of 2 · LANES columns.
struct BFloat16 {
    explicit BFloat16(const Rows&) {}
    static constexpr int ROWS = TILE_ROWS, TOKENS = TILE_TOKENS;
    static constexpr int64_t COLUMNS = 2 * LANES;

    static int64_t bytes(int64_t n) { return rounded_up(4 * rounded_up(n, COLUMNS), 64) + LINE_BYTES; }
    static void prepare(const float* x, int64_t n, char* out) {
        float* to = (float*)out;
        for (int64_t at = 0; at < n; at += COLUMNS)
            for (int i = 0; i < COLUMNS; i++) to[at + i % 2 * LANES + i / 2] = at + i < n ? x[at + i] : 0;
    }
    static Vector even(Unsigned two) { return (Vector)(two << 16); }
    static Vector odd(Unsigned two) { return (Vector)(two & 0xffff0000); }
    static Unsigned some(const char* from, int64_t columns) {
        Unsigned two = {};
        std::memcpy(&two, from, 2 * columns);
        return two;
    }

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, int64_t ahead,
                                                 Vector total[N][R]) const {
        auto meet = [&](const Unsigned* weights, int64_t i) __attribute__((always_inline)) {
            for (int half = 0; half < 2; half++) {
                Vector numbers[R];
                for (int r = 0; r < R; r++) numbers[r] = half ? odd(weights[r]) : even(weights[r]);
                for (int k = 0; k < N; k++) {
                    Vector activations = load((const float*)x[k] + i + half * LANES);
                    for (int r = 0; r < R; r++) total[k][r] = fma(numbers[r], activations, total[k][r]);
                }
            }
        };
        int64_t i = 0;
        Unsigned weights[R];
        constexpr int LINE = 32;  // columns of a cache line
        for (; i + LINE <= w.columns; i += LINE) {
            for (int r = 0; r < R && ahead; r++) __builtin_prefetch(w.weight + r * w.row_bytes + 2 * i + ahead);
            for (int part = 0; part < LINE; part += COLUMNS) {
                for (int r = 0; r < R; r++) weights[r] = read<Unsigned>(w.weight + r * w.row_bytes + 2 * (i + part));
                meet(weights, i + part);
            }
        }
        for (; i < w.columns; i += COLUMNS) {
            for (int r = 0; r < R; r++)
                weights[r] = some(w.weight + r * w.row_bytes + 2 * i, std::min(COLUMNS, w.columns - i));
            meet(weights, i);
        }
    }
    static float finish(const Rows&, int, float y) { return y; }

    // Many tokens: the rows become float32 once for all of them, in the same arrangement and so with the same sums.
    static constexpr int MANY = 17;
    static void multiply_all(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y,
                             float* scratch) {
        if (count < MANY) return ::multiply<BFloat16>(w, rows, x, count, y);
        const int64_t width = unpacked_size(w.columns);
        for (int64_t r = 0; r < rows; r++) {
            const char* from = w.weight + r * w.row_bytes;
            for (int64_t i = 0; i < w.columns; i += COLUMNS) {
                __builtin_prefetch(from + 2 * i + 4096);
                Unsigned two = i + COLUMNS <= w.columns ? read<Unsigned>(from + 2 * i) : some(from + 2 * i, w.columns - i);
                store(scratch + r * width + i, even(two)), store(scratch + r * width + i + LANES, odd(two));
            }
        }
        ::multiply<Float32>({(const char*)scratch, nullptr, 4 * width, rounded_up(w.columns, COLUMNS), 0, {}}, rows, x, count, y);
    }
};

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
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, int64_t ahead,
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
            for (int r = 0; r < R; r++) {
                const char* row = w.weight + r * w.row_bytes + i;
                if (ahead) __builtin_prefetch(row + ahead);
                weights[r] = (__m512bh)_mm512_loadu_si512(row);
            }
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

// float16 becomes float32 some rows at a time, for one token and for many: few models are stored so.
void multiply_halves(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float* scratch) {
    const int64_t width = unpacked_size(w.columns);
    for (int64_t r = 0; r < rows; r++) numbers_of<float16>(w.weight + r * w.row_bytes, w.columns, scratch + r * width);
    ::multiply<Float32>({(const char*)scratch, nullptr, 4 * width, w.columns, 0, {1, 0}}, rows, x, count, y);
}

}  // namespace

const Products float32_products = products_of<Float32>(numbers_of<float>);
const Products bfloat16_products = {BFloat16::bytes, BFloat16::prepare, BFloat16::multiply_all, numbers_of<bfloat16>};
const Products float16_products = {Float32::bytes, Float32::prepare, multiply_halves, numbers_of<float16>};
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
const Products pair_products = products_of<Pairs16>(numbers_of<bfloat16>);
const bool has_pairs = true;
#else
const Products pair_products = bfloat16_products;
const bool has_pairs = false;
#endif
