// Products of whole numbers of 8 or 4 bits with a scale for a group of columns or for a row (see products.h).
#include <array>
#include <utility>

#include "tiles.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LANES_OF_INTEGERS 16
#elif defined(__AVX2__)
#define LANES_OF_INTEGERS 8
#else
#define LANES_OF_INTEGERS 0  // codes meet activations in float32
#endif

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

#if LANES_OF_INTEGERS
// Activations are whole numbers of 16 bits times a scale for each token: exact to 1/32,000 of the token's largest
// number, which is finer than bfloat16. What meets a vector of weights is a chunk. The sums of a chunk, and of up to
// SEGMENT columns where the only scale is that of the row, are whole numbers too, and exact.
constexpr int64_t SEGMENT = 2048;  // columns; more could leave 32 bits

// The products of 4 codes (unsigned bytes) with 4 activations to each lane, in two vectors `a` and `b`.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)  // their high bytes, and their low ones
struct Sum {
    Integers above = {}, below;
    explicit Sum(Integers start) : below(start) {}
    static Integers dot(Integers sum, Unsigned codes, Integers x) {
#if defined(__AVX512VNNI__)
        return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#else
        return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x);
#endif
    }
    void add(Unsigned codes, Integers a, Integers b) { above = dot(above, codes, a), below = dot(below, codes, b); }
    Vector value() const { return __builtin_convertvector((above << 8) + below, Vector); }
};
inline void place(char* a, char* b, int i, int x) {  // the i-th activation of a vector
    const int high = (x + 128) >> 8;
    ((int8_t*)a)[i] = high, ((int8_t*)b)[i] = x - 256 * high;
}
#else  // of the even columns, and of the odd ones, in 16 bits
struct Sum {
    Integers sum;
    explicit Sum(Integers start) : sum(start) {}
    static Integers dot(Unsigned codes, Integers x) {
#if defined(__AVX512BW__)
        return (Integers)_mm512_madd_epi16((__m512i)codes, (__m512i)x);
#else
        return (Integers)_mm256_madd_epi16((__m256i)codes, (__m256i)x);
#endif
    }
    void add(Unsigned codes, Integers a, Integers b) {
        sum += dot(codes & 0x00ff00ff, a) + dot(codes >> 8 & 0x00ff00ff, b);
    }
    Vector value() const { return __builtin_convertvector(sum, Vector); }
};
inline void place(char* a, char* b, int i, int x) { ((int16_t*)(i % 2 ? b : a))[i / 2] = x; }
#endif

template <int BITS, bool GROUPED>
struct Codes {
    static constexpr int ROWS = LANES == 16 ? 4 : 2, TOKENS = GROUPED ? (LANES == 16 ? 4 : 2) : (LANES == 16 ? 3 : 2);
    static constexpr int64_t BYTES = 4 * LANES, COLUMNS = BYTES * 8 / BITS, PARTS = COLUMNS / BYTES;
    static constexpr int64_t TOGETHER = GROUPED ? 1 : SEGMENT / COLUMNS;  // chunks that share a sum

    // Of n activations [chunks, PARTS] vectors `a`, then `b`; for 4 bits those of the even columns, then of the odd
    // ones. Then [sums, LANES] what the codes have too much, and the scale. Each array is a stream of its own.
    struct Places {
        int64_t chunks, b, start, scale, end;
        explicit Places(int64_t n)
            : chunks((n + COLUMNS - 1) / COLUMNS), b(chunks * COLUMNS), start(2 * b),
              scale(start + (chunks + TOGETHER - 1) / TOGETHER * BYTES), end(scale + 64) {}
    } places;

    // How the scales of a chunk spread over the lanes: up to 8 numbers that lie side by side (`step`; 0 where they do
    // not), of which each lane takes one into its upper half.
    alignas(64) uint8_t spread[BYTES];
    int64_t step = 0;

    explicit Codes(const Rows& w) : places(w.columns) {
        if (!GROUPED) return;
        const int64_t group_size = w.columns / w.groups;
        step = COLUMNS % group_size ? 0 : COLUMNS / group_size;
        if (step > 8 || (step & (step - 1))) step = 0;
        for (int i = 0; i < BYTES; i++) spread[i] = i % 4 < 2 ? 128 : 2 * (i / 4 * step / LANES) + i % 4 - 2;
    }

    static int64_t bytes(int64_t n) { return Places(n).end; }
    static void prepare(const float* x, int64_t n, char* out) {
        const Places places(n);
        Vector most = {};
        for (int64_t i = 0; i < n; i += LANES) {
            Vector some = i + LANES <= n ? load(x + i) : load_some(x + i, n - i);
            some = some < 0 ? -some : some;
            most = some > most ? some : most;
        }
        float largest = 0;
        for (int lane = 0; lane < LANES; lane++) largest = std::max(largest, most[lane]);
        const float scale = largest / 32639, inverse = scale > 0 ? 1 / scale : 0;  // 127 · 256 + 127
        std::memset(out, 0, places.end);
        std::memcpy(out + places.scale, &scale, sizeof scale);
        for (int64_t at = 0; at < places.chunks; at++) {
            const int64_t count = std::min(COLUMNS, n - at * COLUMNS);
            int32_t* start = (int32_t*)(out + places.start) + at / TOGETHER * LANES;
            int32_t whole[COLUMNS] = {};
            int64_t i = 0;
            for (; i + LANES <= count; i += LANES) {
                Vector rounded = load(x + at * COLUMNS + i) * inverse + ROUND;
                Integers numbers = (Integers)rounded - (Integers)(Vector{} + ROUND);
                std::memcpy(whole + i, &numbers, sizeof numbers);
            }
            for (; i < count; i++) whole[i] = int(std::nearbyint(x[at * COLUMNS + i] * inverse));
            for (i = 0; i < COLUMNS; i++) {
                const int64_t part = i % PARTS, byte = i / PARTS;
                char* a = out + (at * PARTS + part) * BYTES;
                place(a, a + places.b, byte, whole[i]);
                start[byte / 4] -= whole[i] << (BITS - 1);
            }
        }
    }

    // Vector `part` of a chunk's codes, one to a byte.
    template <class Whole>
    __attribute__((always_inline)) static void unpack(const char* row, int64_t begin, int64_t row_bytes, Whole whole, Unsigned* codes) {
        Unsigned bytes = {};
        if constexpr (whole)
            bytes = read<Unsigned>(row + begin);
        else
            std::memcpy(&bytes, row + begin, std::min(BYTES, row_bytes - begin));
        if constexpr (BITS == 8)
            codes[0] = bytes;
        else
            codes[0] = bytes & 0x0f0f0f0f, codes[1] = bytes >> 4 & 0x0f0f0f0f;
    }
    template <class Inside>
    __attribute__((always_inline)) Vector scales_of(const Rows& w, int r, int64_t at, Inside inside) const {
        const bfloat16* scale = w.scale + r * w.groups;
        if (!inside && (!step || at * step + step > w.groups)) return lane_scales(scale, at * COLUMNS, COLUMNS / LANES, w);
        __m128i numbers;
        const bfloat16* from = scale + at * step;
        if constexpr (inside)
            numbers = _mm_loadu_si128((const __m128i*)from);
        else  // no more than there are: a power of two, and 8 would be inside
            numbers = _mm_cvtsi64_si128(step == 1 ? from->bits : step == 2 ? read<uint32_t>(from) : read<uint64_t>(from));
#if LANES_OF_INTEGERS == 16
        return (Vector)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(numbers), _mm512_load_si512(spread));
#else
        return (Vector)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(numbers), _mm256_load_si256((__m256i*)spread));
#endif
    }

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, int64_t ahead,
                                                 Vector total[N][R]) const {
        const int64_t row_bytes = (w.columns * BITS + 7) / 8, whole = w.columns / COLUMNS, other_half = places.b;
        auto codes_of = [&](int64_t at, auto is_whole, Unsigned(*codes)[PARTS]) __attribute__((always_inline)) {
            for (int r = 0; r < R; r++) {
                const char* row = w.weight + r * w.row_bytes;
                if (ahead && at * BYTES % 64 == 0) __builtin_prefetch(row + at * BYTES + ahead);
                unpack(row, at * BYTES, row_bytes, is_whole, codes[r]);
            }
        };
        auto from = [](const char* p) __attribute__((always_inline)) { return read<Integers>(p); };
        if constexpr (GROUPED) {
            if (N == 1 && ahead)
                for (int64_t i = 0; i < R * w.groups; i += 32) __builtin_prefetch(w.scale + i + SCALES_AHEAD);
            auto meet = [&](int64_t at, auto is_whole, auto inside) __attribute__((always_inline)) {
                Unsigned codes[R][PARTS];
                Vector scales[R];
                codes_of(at, is_whole, codes);
                for (int r = 0; r < R; r++) scales[r] = scales_of(w, r, at, inside);
                for (int k = 0; k < N; k++) {
                    const char* a = x[k] + at * COLUMNS;
                    const Integers start = from(x[k] + places.start + at * BYTES);
                    for (int r = 0; r < R; r++) {
                        Sum sum(start);
                        for (int part = 0; part < PARTS; part++)
                            sum.add(codes[r][part], from(a + part * BYTES), from(a + other_half + part * BYTES));
                        total[k][r] = fma(sum.value(), scales[r], total[k][r]);
                    }
                }
            };
            int64_t at = 0;
            // As long as 8 scales, 16 bytes, lie within the row: one load that spreads them.
            if (step)
                for (; at < whole && at * step + 8 <= w.groups; at++) meet(at, std::true_type(), std::true_type());
            for (; at < whole; at++) meet(at, std::true_type(), std::false_type());
            if (whole * COLUMNS < w.columns) meet(whole, std::false_type(), std::false_type());
        } else {
            for (int64_t first = 0; first < places.chunks; first += TOGETHER) {
                std::array<Sum, N * R> sums = [&]<size_t... I>(std::index_sequence<I...>) {
                    return std::array<Sum, N * R>{Sum(from(x[I / R] + places.start + first / TOGETHER * BYTES))...};
                }(std::make_index_sequence<N * R>());
                auto meet = [&](int64_t at, auto is_whole) __attribute__((always_inline)) {
                    Unsigned codes[R][PARTS];
                    codes_of(at, is_whole, codes);
                    for (int k = 0; k < N; k++) {
                        const char* a = x[k] + at * COLUMNS;
                        const Integers one = from(a), other = from(a + other_half);
                        for (int r = 0; r < R; r++) sums[k * R + r].add(codes[r][0], one, other);
                    }
                };
                const int64_t last = std::min(first + TOGETHER, places.chunks);
                for (int64_t at = first; at < std::min(last, whole); at++) meet(at, std::true_type());
                if (whole < last) meet(whole, std::false_type());
                for (int k = 0; k < N; k++)
                    for (int r = 0; r < R; r++) total[k][r] += sums[k * R + r].value();
            }
        }
        for (int k = 0; k < N; k++) {
            const float scale = read<float>(x[k] + places.scale);
            for (int r = 0; r < R; r++) total[k][r] *= scale;
        }
    }
    static float finish(const Rows& w, int r, float y) { return GROUPED ? y : y * to_float(w.scale[r * w.groups]); }
};

#else
template <int BITS, bool GROUPED>
struct Codes;

// Codes of 8 bits meet activations as they are.
template <bool GROUPED>
struct Codes<8, GROUPED> : AsTheyAre {
    explicit Codes(const Rows&) {}
    static constexpr int ROWS = 2, TOKENS = 4;

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
