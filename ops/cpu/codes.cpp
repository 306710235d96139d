// Products of whole numbers of 8 or 4 bits with a scale for a group of columns or for a row (see products.h).
#include "tiles.h"

namespace {

constexpr int64_t SCALES_AHEAD = 256;  // numbers: a second stream, at an eighth of the speed

// For each 32-bit lane the scale of its weights, `columns` to a lane, from `column` on; lanes behind the row have any.
inline Vector lane_scales(const bfloat16* scale, int64_t column, int columns, const Rows& w) {
    const int64_t group_size = w.columns / w.groups, width = LANES * columns;
    const int64_t groups = width % group_size ? 0 : width / group_size;
    const bfloat16* first = scale + column / group_size;
    Pairs high;  // the scale of a pair of lanes in its highest bits
    if (group_size % width == 0) return Vector{} + to_float(*first);
    if (groups == LANES / 4 && column + width <= w.columns) {
        uint64_t scales = 0;
        std::memcpy(&scales, first, LANES / 2);
        Pairs shift;
        for (int pair = 0; pair < LANES / 2; pair++) shift[pair] = 48 - 16 * (pair / 2);
        high = (scales << shift) & 0xffff000000000000;
    } else if (groups == LANES / 2 && column + width <= w.columns) {
        // By way of 32 bits, or GCC 12 converts one number at a time.
        auto scales = __builtin_convertvector(read<Quarters>(first), HalfUnsigned);
        high = __builtin_convertvector(scales, Pairs) << 48;
    } else {
        float lanes[LANES];
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] = to_float(scale[std::min((column + columns * lane) / group_size, w.groups - 1)]);
        return load(lanes);
    }
    return (Vector)(high | high >> 32);
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
// Codes of 8 or 4 bits. Activations are whole numbers of 16 bits times a scale for each chunk, cut into a high and a low
// byte: exact to 1/32,000 of the chunk's largest number, which is finer than bfloat16. A chunk is what meets 64 bytes of
// weights, or 128 bytes where the only scale is that of the row (GROUPED false).
template <int BITS, bool GROUPED>
struct Codes {
    static constexpr int ROWS = 4, TOKENS = 4;
    static constexpr int64_t LINES = GROUPED || BITS == 4 ? 1 : 2, LINE = 512 / BITS, COLUMNS = LINES * LINE;

    // Of n activations: [n] high bytes, [n] low bytes, for 4 bits those of the 64 even columns, then of the odd ones;
    // [chunks, 16] what the codes have too much; [chunks] scales. Each array is a stream of its own.
    struct Places {
        int64_t low, start, scale, end;
        explicit Places(int64_t n)
            : low(rounded_up(n, COLUMNS)), start(2 * low), scale(start + low / COLUMNS * 64),
              end(rounded_up(scale + low / COLUMNS * 4, 64)) {}
    };

    // What is the same for all rows of a matrix: how the scales of 64 bytes of weights spread over the lanes, up to 8
    // numbers that lie side by side (`step`; 0 where they do not), and where the activations lie.
    __m512i where;
    __mmask8 which;
    int64_t step, low, starts, scales_at;

    explicit Codes(const Rows& w) {
        const Places places(w.columns);
        low = places.low, starts = places.start, scales_at = places.scale;
        if (!GROUPED) return;
        const int64_t group_size = w.columns / w.groups;
        step = COLUMNS % group_size || COLUMNS / group_size > 8 ? 0 : COLUMNS / group_size;
        alignas(64) uint8_t spread[64];
        for (int i = 0; i < 64; i++) spread[i] = i % 4 < 2 ? 128 : 2 * (i / 4 * step / 16) + i % 4 - 2;
        where = _mm512_load_si512(spread), which = (1 << step) - 1;
    }

    static int64_t bytes(int64_t n) { return Places(n).end; }
    static void prepare(const float* x, int64_t n, char* out) {
        const Places places(n);
        for (int64_t at = 0; at < places.low / COLUMNS; at++) {
            alignas(64) float padded[COLUMNS] = {};
            std::memcpy(padded, x + at * COLUMNS, std::min(COLUMNS, n - at * COLUMNS) * sizeof(float));
            char *high = out + at * COLUMNS, *low = high + places.low;
            prepare(padded, high, low, out + places.start + 64 * at, (float*)(out + places.scale) + at);
        }
    }
    static void prepare(const float* x, char* high, char* low, char* start, float* scale) {
        const __m512i ones = _mm512_set1_epi8(1);
        __m512 largest = _mm512_setzero_ps();
        for (int i = 0; i < COLUMNS; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_load_ps(x + i)));
        *scale = _mm512_reduce_max_ps(largest) / 32639;  // 127 · 256 + 127
        const __m512 inverse = _mm512_set1_ps(*scale > 0 ? 1 / *scale : 0);
        for (int i = 0; i < COLUMNS; i += 16) {
            __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(x + i), inverse));
            __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
            put(high, i, upper), put(low, i, whole);  // the low byte is what the high one leaves
        }
        __m512i above = _mm512_setzero_si512(), below = above;
        for (int64_t i = 0; i < COLUMNS; i += 64) {
            above = _mm512_dpbusd_epi32(above, ones, _mm512_load_si512(high + i));
            below = _mm512_dpbusd_epi32(below, ones, _mm512_load_si512(low + i));
        }
        __m512i total = _mm512_add_epi32(_mm512_slli_epi32(above, 8), below);
        _mm512_store_si512(start, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(total, BITS - 1)));
    }
    // The lowest bytes of 16 numbers to their places.
    static void put(char* to, int column, __m512i numbers) {
        if constexpr (BITS == 8) {
            _mm_storeu_si128((__m128i*)(to + column), _mm512_cvtepi32_epi8(numbers));
        } else {
            _mm_storel_epi64((__m128i*)(to + column / 2), _mm512_cvtepi64_epi8(numbers));
            _mm_storel_epi64((__m128i*)(to + 64 + column / 2), _mm512_cvtepi64_epi8(_mm512_srli_epi64(numbers, 32)));
        }
    }

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, int64_t ahead,
                                                 Vector total[N][R]) const {
        constexpr int PARTS = COLUMNS / 64;  // of a chunk: vectors of activations
        const __m512i nibbles = _mm512_set1_epi8(15);
        if (GROUPED && N == 1 && ahead)
            for (int64_t i = 0; i < R * w.groups; i += 32) __builtin_prefetch(w.scale + i + SCALES_AHEAD);

        auto meet = [&](int64_t at, auto whole, auto inside) __attribute__((always_inline)) {
            __m512i codes[R][PARTS];
            __m512 scales[R];
            for (int r = 0; r < R; r++) {
                for (int line = 0; line < LINES; line++) {
                    const int64_t begin = (at * LINES + line) * 64;
                    const char* row = w.weight + r * w.row_bytes + begin;
                    if (ahead) __builtin_prefetch(row + ahead);
                    __m512i bytes;
                    if constexpr (whole)
                        bytes = _mm512_loadu_si512(row);
                    else {
                        const int64_t rest = std::clamp((w.columns * BITS + 7) / 8 - begin, int64_t(0), int64_t(64));
                        bytes = _mm512_maskz_loadu_epi8(rest == 64 ? ~0ull : (1ull << rest) - 1, row);
                    }
                    if constexpr (BITS == 8)
                        codes[r][line] = bytes;
                    else
                        codes[r][0] = _mm512_and_si512(bytes, nibbles),
                        codes[r][1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibbles);
                }
                if constexpr (GROUPED) {
                    const bfloat16* scale = w.scale + r * w.groups;
                    if (inside || (step && (whole || at * step + step <= w.groups))) {
                        const bfloat16* from = scale + at * step;
                        __m128i numbers = inside ? _mm_loadu_si128((const __m128i*)from) : _mm_maskz_loadu_epi16(which, from);
                        scales[r] = (__m512)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(numbers), where);
                    } else {
                        scales[r] = (__m512)lane_scales(scale, at * COLUMNS, COLUMNS / 16, w);
                    }
                }
            }
            for (int k = 0; k < N; k++) {
                const char *high = x[k] + at * COLUMNS, *rest = high + low;
                const __m512 scale = _mm512_set1_ps(((const float*)(x[k] + scales_at))[at]);
                const __m512i start = _mm512_load_si512(x[k] + starts + 64 * at);
                for (int r = 0; r < R; r++) {
                    __m512i above = _mm512_setzero_si512(), below = start;
                    for (int part = 0; part < PARTS; part++) {
                        above = _mm512_dpbusd_epi32(above, codes[r][part], _mm512_load_si512(high + 64 * part));
                        below = _mm512_dpbusd_epi32(below, codes[r][part], _mm512_load_si512(rest + 64 * part));
                    }
                    __m512 product = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(above, 8), below));
                    if constexpr (GROUPED) product = _mm512_mul_ps(product, scales[r]);
                    total[k][r] = (Vector)_mm512_fmadd_ps(product, scale, (__m512)total[k][r]);
                }
            }
        };
        const int64_t whole = w.columns / COLUMNS;
        int64_t at = 0;
        // As long as 8 scales, 16 bytes, lie within the row: one load that spreads them, without a mask.
        if (GROUPED && step)
            for (; at < whole && at * step + 8 <= w.groups; at++) meet(at, std::true_type(), std::true_type());
        for (; at < whole; at++) meet(at, std::true_type(), std::false_type());
        if (whole * COLUMNS < w.columns) meet(whole, std::false_type(), std::false_type());
    }
    static float finish(const Rows& w, int r, float y) { return GROUPED ? y : y * to_float(w.scale[r * w.groups]); }
};

#else
template <int BITS, bool GROUPED>
struct Codes;

// Codes of 8 bits meet activations as they are.
template <bool GROUPED>
struct Codes<8, GROUPED> {
    explicit Codes(const Rows&) {}
    static constexpr int ROWS = 2, TOKENS = 4;

    static int64_t bytes(int64_t n) { return rounded_up(4 * n, 64); }
    static void prepare(const float* x, int64_t n, char* out) { 
        std::memcpy(out, x, 4 * n);
        std::memset(out + 4 * n, 0, bytes(n) - 4 * n);
    }

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, int64_t ahead,
                                                 Vector total[N][R]) const {
        for (int64_t i = 0; i < w.columns; i += LANES)
            for (int r = 0; r < R; r++) {
                const auto* row = (const int8*)(w.weight + r * w.row_bytes) + i;
                if (ahead) __builtin_prefetch((const char*)row + ahead);
                Vector weights = i + LANES <= w.columns ? load(row) : load_some(row, w.columns - i);
                if (GROUPED) weights *= lane_scales(w.scale + r * w.groups, i, 1, w);
                for (int k = 0; k < N; k++) total[k][r] = fma(weights, load((const float*)x[k] + i), total[k][r]);
            }
    }
    static float finish(const Rows& w, int r, float y) { return GROUPED ? y : y * to_float(w.scale[r * w.groups]); }
};

// 8 codes of 4 bits to a 32-bit lane, lowest bits first. Where the mantissa of 1.0 begins, the bits of a number q make
// 1.5 + q / 16 without a conversion, and those of its neighbour, four places lower, 1 + (q + 8) / 256.
template <bool GROUPED>
struct Codes<4, GROUPED> {
    explicit Codes(const Rows&) {}
    static constexpr int ROWS = 2, TOKENS = 2;
    static constexpr int64_t COLUMNS = 8 * LANES;

    // Of each chunk [9, LANES] numbers: what takes away all that is too much, then lane by lane.
    static int64_t bytes(int64_t n) { return rounded_up(n, COLUMNS) / COLUMNS * 9 * LANES * sizeof(float); }
    static void prepare(const float* x, int64_t n, char* out) {
        for (int64_t at = 0; at * COLUMNS < n; at++) {
            float padded[COLUMNS] = {}, *to = (float*)out + at * 9 * LANES;
            std::memcpy(padded, x + at * COLUMNS, std::min(COLUMNS, n - at * COLUMNS) * sizeof(float));
            for (int lane = 0; lane < LANES; lane++) {
                float even = 0, odd = 0;
                for (int i = 0; i < 8; i += 2) {
                    even += to[(1 + i) * LANES + lane] = 16 * padded[8 * lane + i];
                    odd += to[(2 + i) * LANES + lane] = padded[8 * lane + i + 1];
                }
                to[lane] = -1.5f * odd - (1 + 8 / 256.f) * even;
            }
        }
    }

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, int64_t ahead,
                                                 Vector total[N][R]) const {
        for (int64_t column = 0; column < w.columns; column += COLUMNS)
            for (int r = 0; r < R; r++) {
                const char* row = w.weight + r * w.row_bytes + column / 2;
                if (ahead) __builtin_prefetch(row + ahead);
                Unsigned bits = {};
                std::memcpy(&bits, row, std::min(int64_t(sizeof bits), (w.columns - column + 1) / 2));
                const Vector scales = lane_scales(w.scale + r * w.groups, column, 8, w);
                Vector weights[8];
                for (int i = 0; i < 8; i += 2) {
                    Unsigned two = i < 4 ? bits << (15 - 4 * i) : bits >> (4 * i - 15);
                    weights[i] = (Vector)((two & 0x078000) | 0x3f800000);
                    weights[i + 1] = (Vector)((two & 0x780000) | 0x3f800000);
                }
                for (int k = 0; k < N; k++) {
                    const float* arranged = (const float*)x[k] + column / COLUMNS * 9 * LANES;
                    Vector sum = load(arranged);
                    for (int i = 0; i < 8; i++) sum = fma(weights[i], load(arranged + (1 + i) * LANES), sum);
                    total[k][r] = fma(sum, scales, total[k][r]);
                }
            }
    }
    static float finish(const Rows&, int, float y) { return 16 * y; }
};

#endif

}  // namespace

const Products byte_products = products_of<Codes<8, false>>();
const Products grouped_byte_products = products_of<Codes<8, true>>();
const Products nibble_products = products_of<Codes<4, true>>();
