// Products of whole numbers of 8 or 4 bits with a scale for a group of columns or for a row (see products.h).
//
// Sums of whole numbers are exact, so instructions of any kind may form them in any order: those of a whole row, or of a
// group of 32 columns. Only what follows them, in floating point, has an order: a vector's lanes are groups, and a lane's
// total gets one group after another.
#include <array>
#include <utility>

#include "amx.h"
#include "integers.h"

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
// number, which is finer than bfloat16.
constexpr int64_t VECTOR_BYTES = 4 * LANES;               // of a vector
constexpr int64_t SEGMENT = VNNI ? 65536 : 2048;  // columns of a row whose sums fit 32 bits

inline Integers vector_at(const char* p) { return read<Integers>(p); }
inline Unsigned some_bytes(const char* p, int64_t count) {
    Unsigned bytes = {};
    std::memcpy(&bytes, p, count);
    return bytes;
}

// Sums of codes with activations: those with their high bytes, and those with their low ones.
struct ByBytes {
    static constexpr int STARTS = 2;  // vectors
    Integers above, below;
    explicit ByBytes(const char* start) : above(vector_at(start)), below(vector_at(start + VECTOR_BYTES)) {}
    void add(Unsigned codes, Integers a, Integers b) { above = dot_bytes(above, codes, a), below = dot_bytes(below, codes, b); }
    Integers value() const { return (above << 8) + below; }
    void put(char* start) const { std::memcpy(start, &above, VECTOR_BYTES), std::memcpy(start + VECTOR_BYTES, &below, VECTOR_BYTES); }

    // A chunk of activations into `a` and `b`: those of vector 0 are every PARTS-th one.
    template <int PARTS>
    static void place(const int32_t* x, char* a, char* b) {
        int8_t high[PARTS * VECTOR_BYTES], low[PARTS * VECTOR_BYTES];
        for (int i = 0; i < PARTS * VECTOR_BYTES; i++) high[i] = (x[i] + 128) >> 8, low[i] = x[i];
        for (int part = 0; part < PARTS; part++)
            for (int i = 0; i < VECTOR_BYTES; i++) {
                a[part * VECTOR_BYTES + i] = high[PARTS * i + part];
                b[part * VECTOR_BYTES + i] = low[PARTS * i + part];
            }
    }
    // The sums of all lanes, as numbers.
    template <int R, int N>
    static void put_sums(const ByBytes (&sums)[N][R], float* y) {
        Integers lanes[N][R];
        alignas(64) int32_t above[N * ::ROWS], below[N * ::ROWS];
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++) lanes[k][r] = sums[k][r].above;
        ::put_sums<R, N>(lanes, above);
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++) lanes[k][r] = sums[k][r].below;
        ::put_sums<R, N>(lanes, below);
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++) y[k * ::ROWS + r] = float(above[k * ::ROWS + r]) * 256 + float(below[k * ::ROWS + r]);
    }
};

// Without VNNI: activations of the even columns, and of the odd ones, in 16 bits.
struct ByWords {
    static constexpr int STARTS = 1;
    Integers sum;
    explicit ByWords(const char* start) : sum(vector_at(start)) {}
    void add(Unsigned codes, Integers a, Integers b) {
        sum = dot_words(dot_words(sum, (Integers)(codes & 0x00ff00ff), a), (Integers)(codes >> 8 & 0x00ff00ff), b);
    }
    Integers value() const { return sum; }
    void put(char* start) const { std::memcpy(start, &sum, VECTOR_BYTES); }

    template <int PARTS>
    static void place(const int32_t* x, char* a, char* b) {
        for (int i = 0; i < VECTOR_BYTES / 2; i++) ((int16_t*)a)[i] = x[2 * i], ((int16_t*)b)[i] = x[2 * i + 1];
    }
    template <int R, int N>
    static void put_sums(const ByWords (&sums)[N][R], float* y) {
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++) {
                int64_t total = 0;
                for (int lane = 0; lane < LANES; lane++) total += sums[k][r].sum[lane];
                y[k * ::ROWS + r] = float(total);
            }
    }
};

template <int BITS>
using Sum = std::conditional_t<VNNI || BITS == 4, ByBytes, ByWords>;

// The form of the activations. A chunk of them meets a vector of weights: [chunks, PARTS] vectors `a`, then `b`; for 4
// bits those of the even columns, then of the odd ones. Then [sums] of TOGETHER chunks what the codes have too much, and
// the scale. Each array is a stream of its own.
template <int BITS, int64_t TOGETHER, int64_t BLOCK>
struct Activations {
    static constexpr int64_t COLUMNS = VECTOR_BYTES * 8 / BITS, PARTS = COLUMNS / VECTOR_BYTES, STARTS = Sum<BITS>::STARTS * VECTOR_BYTES;
    int64_t chunks, b, start, scale, end;

    explicit Activations(int64_t n)
        : chunks(rounded_up(n, BLOCK * COLUMNS) / COLUMNS), b(chunks * COLUMNS), start(2 * b),
          scale(start + (chunks + TOGETHER - 1) / TOGETHER * STARTS), end(scale + 64) {}

    static int64_t bytes(int64_t n) { return Activations(n).end; }
    static void prepare(const float* x, int64_t n, char* out) {
        const Activations places(n);
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
        for (int64_t at = 0; at * COLUMNS < n; at++) {
            const int64_t count = std::min(COLUMNS, n - at * COLUMNS);
            int32_t whole[COLUMNS] = {};
            int64_t i = 0;
            for (; i + LANES <= count; i += LANES) {
                Vector rounded = load(x + at * COLUMNS + i) * inverse + ROUND;
                Integers numbers = (Integers)rounded - (Integers)(Vector{} + ROUND);
                std::memcpy(whole + i, &numbers, sizeof numbers);
            }
            for (; i < count; i++) whole[i] = int(std::nearbyint(x[at * COLUMNS + i] * inverse));
            char *a = out + at * COLUMNS, *b = a + places.b, *start = out + places.start + at / TOGETHER * STARTS;
            Sum<BITS>::template place<PARTS>(whole, a, b);
            Sum<BITS> surplus(start);
            for (i = 0; i < COLUMNS; i += VECTOR_BYTES)
                surplus.add(Unsigned{} + (BITS == 8 ? 0x80808080 : 0x08080808), vector_at(a + i), vector_at(b + i));
            surplus.put(start);
        }
        for (int64_t i = places.start; i < places.scale; i += VECTOR_BYTES) {
            const Integers negative = -vector_at(out + i);
            std::memcpy(out + i, &negative, sizeof negative);
        }
    }
};

// Codes of 8 bits with a scale for each row.
struct Bytes8 {
    static constexpr int64_t TOGETHER = SEGMENT / VECTOR_BYTES;
    typedef Activations<8, TOGETHER, 1> Form;
    static constexpr int ROWS = LANES == 16 ? 4 : 2, TOKENS = LANES == 16 ? 3 : 2;
    const Form places;
    explicit Bytes8(const Rows& w) : places(w.columns) {}

    template <int R, int N>
    __attribute__((always_inline)) void tile(const Rows& w, const char* const* x, int64_t ahead, float* y) const {
        const int64_t whole = w.columns / VECTOR_BYTES;
        float total[N * ::ROWS] = {};
        for (int64_t first = 0; first < places.chunks; first += TOGETHER) {
            auto sums = [&]<size_t... I>(std::index_sequence<I...>) {
                return std::array<Sum<8>, N * R>{Sum<8>(x[I / R] + places.start + first / TOGETHER * Form::STARTS)...};
            }(std::make_index_sequence<N * R>());
            auto meet = [&](int64_t at, auto codes_of) __attribute__((always_inline)) {
                Unsigned codes[R];
                for (int r = 0; r < R; r++) {
                    const char* row = w.weight + r * w.row_bytes + at * VECTOR_BYTES;
                    if (ahead && at * VECTOR_BYTES % 64 == 0) __builtin_prefetch(row + ahead);
                    codes[r] = codes_of(row);
                }
                for (int k = 0; k < N; k++) {
                    const Integers a = vector_at(x[k] + at * VECTOR_BYTES), b = vector_at(x[k] + places.b + at * VECTOR_BYTES);
                    for (int r = 0; r < R; r++) sums[k * R + r].add(codes[r], a, b);
                }
            };
            const int64_t last = std::min(first + TOGETHER, places.chunks);
            for (int64_t at = first; at < std::min(last, whole); at++) meet(at, [](const char* p) { return read<Unsigned>(p); });
            if (whole < last) meet(whole, [&](const char* p) { return some_bytes(p, w.columns - whole * VECTOR_BYTES); });
            float some[N * ::ROWS];
            Sum<8>::template put_sums<R, N>((const Sum<8>(&)[N][R])sums, some);
            for (int k = 0; k < N; k++)
                for (int r = 0; r < R; r++) total[k * ::ROWS + r] += some[k * ::ROWS + r];
        }
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++)
                y[k * ::ROWS + r] = total[k * ::ROWS + r] * read<float>(x[k] + places.scale) * to_float(w.scale[r]);
    }

    static void multiply_all(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float* scratch) {
#if AMX
        if (choice.amx && count >= AMX_FEWEST && w.columns <= SEGMENT) return in_tiles_of_amx(w, rows, x, count, y, (char*)scratch);
#endif
        ::multiply<Bytes8>(w, rows, x, count, y);
    }

#if AMX
    static void in_tiles_of_amx(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, char* scratch) {
        const Form places(w.columns);
        const int64_t both = places.chunks * 2 * SUMS;  // bytes of 32 rows
        for (int64_t at = 0; at < places.chunks; at++)
            for (int half = 0; half < 2 && half * SIDE < rows; half++) {
                Unsigned codes[16];
                transposed(w, half * SIDE, rows, at * 64, w.columns, codes);
                for (int i = 0; i < 16; i++) codes[i] ^= 0x80808080;
                std::memcpy(scratch + (2 * at + half) * SUMS, codes, SUMS);
            }
        alignas(64) float row_scales[2 * SIDE] = {};
        for (int64_t r = 0; r < rows; r++) row_scales[r] = to_float(w.scale[r]);
        for (int64_t i = 0; i < count;) {
            const int64_t tokens = std::min<int64_t>(count - i, SIDE);
            const TileRegisters registers(tokens, 64);
            for (; i + tokens <= count; i += tokens) {
                const Spaced spaced(x + i, tokens, places.end, scratch + both);
                alignas(64) Integers sums[4][SIDE];
                zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
                for (int64_t at = 0; at < places.chunks; at++) {
                    const char* weights = scratch + 2 * at * SUMS;
                    load_tile<4>(spaced.first + at * 64, spaced.stride);
                    load_tile<5>(spaced.first + places.b + at * 64, spaced.stride);
                    load_tile<6>(weights, 64);
                    multiply_tiles<0, 4, 6>(), multiply_tiles<1, 5, 6>();
                    if (rows <= SIDE) continue;
                    load_tile<7>(weights + SUMS, 64);
                    multiply_tiles<2, 4, 7>(), multiply_tiles<3, 5, 7>();
                }
                store_tile<0>(sums[0]), store_tile<1>(sums[1]), store_tile<2>(sums[2]), store_tile<3>(sums[3]);
                for (int64_t k = 0; k < tokens; k++)
                    for (int half = 0; half < 2; half++) {
                        const Vector above = __builtin_convertvector(sums[2 * half][k], Vector);
                        const Vector below = __builtin_convertvector(sums[2 * half + 1][k], Vector);
                        const Vector total = above * 256 + below;
                        store(y + (i + k) * ::ROWS + half * SIDE,
                              total * read<float>(x[i + k] + places.scale) * load(row_scales + half * SIDE));
                    }
            }
        }
    }
#endif
};

// Codes with a scale for each group of columns. In a block a vector's lanes get the sums of as many groups of 32.
template <int BITS>
struct Groups {
    typedef Activations<BITS, 1, BITS == 4 ? 4 : 8> Form;
    static constexpr int64_t COLUMNS = Form::COLUMNS, PARTS = Form::PARTS, STARTS = Form::STARTS;
    static constexpr int ROWS = LANES == 16 ? 4 : 2, TOKENS = LANES == 16 ? 4 : 2;
    static constexpr int64_t GROUP = 32, VECTORS = BITS == 4 ? 4 : 8;  // of codes, in a block
    static constexpr int PER_VECTOR = LANES / VECTORS;                 // groups
    static constexpr int64_t BLOCK_BYTES = VECTORS * VECTOR_BYTES, BLOCK_COLUMNS = VECTORS * COLUMNS;

    // Which group of a block is in a lane: see `gathered`.
    static constexpr int group_of(int lane) {
        const int four = lane / 4;
        return PER_VECTOR * (four / PER_VECTOR * 4 + lane % 4) + four % PER_VECTOR;
    }

    const Form places;
    int64_t group_size, step;  // step: scales of a block, where a group is 32 columns or 2, 4, … times as many; else 0
    // The scales of a block spread over the lanes: of numbers that lie side by side, each lane takes one as its upper half.
    alignas(64) uint8_t spread[VECTOR_BYTES];

    explicit Groups(const Rows& w) : places(w.columns), group_size(w.columns / w.groups), step(0) {
        const int64_t repeats = group_size / GROUP;
        if (group_size % GROUP || (LANES % repeats && repeats % LANES)) return;
        step = std::max<int64_t>(1, LANES / repeats);
        for (int lane = 0; lane < LANES; lane++) {
            const int which = step == 1 ? 0 : group_of(lane) / repeats;
            if (LANES == 16)
                ((uint16_t*)spread)[2 * lane] = ((uint16_t*)spread)[2 * lane + 1] = which;
            else
                for (int i = 0; i < 4; i++) spread[4 * lane + i] = i < 2 ? 128 : 2 * which + i - 2;
        }
    }

    // The scales of block `at` of a row; where not all of it is in the row, zeros take the place of some.
    template <class Whole>
    __attribute__((always_inline)) Vector scales_of(const bfloat16* scales, int64_t at, int64_t groups, Whole whole) const {
        const int64_t first = step > 1 ? at * step : at * BLOCK_COLUMNS / group_size;
        const bfloat16* from = scales + first;
#if LANES_OF_INTEGERS == 16
        __m256i numbers;
        if constexpr (!whole)
            numbers = _mm256_maskz_loadu_epi16((1 << std::min<int64_t>(groups - first, 16)) - 1, from);
        else if (step == 16)
            numbers = _mm256_loadu_si256((const __m256i*)from);
        else
            numbers = _mm256_maskz_loadu_epi16((1 << step) - 1, from);
        return (Vector)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_load_si512(spread), _mm512_castsi256_si512(numbers));
#else
        uint16_t some[8] = {};
        if constexpr (!whole)
            from = (const bfloat16*)std::memcpy(some, from, 2 * std::min<int64_t>(groups - first, 8));
        const __m128i numbers = !whole || step == 8 ? _mm_loadu_si128((const __m128i*)from)
                                : _mm_cvtsi64_si128(step == 1   ? from->bits
                                                    : step == 2 ? read<uint32_t>(from)
                                                                : read<uint64_t>(from));
        return (Vector)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(numbers), _mm256_load_si256((__m256i*)spread));
#endif
    }

    // Vector `part` of a chunk's codes, one to a byte.
    __attribute__((always_inline)) static void unpack(Unsigned bytes, Unsigned (&codes)[PARTS]) {
        if constexpr (BITS == 8)
            codes[0] = bytes;
        else
            codes[0] = bytes & 0x0f0f0f0f, codes[1] = bytes >> 4 & 0x0f0f0f0f;
    }

    // Sums of two neighbouring lanes: of each four, two of a, then two of b.
    static Integers halves(const Sum<BITS>& a, const Sum<BITS>& b) {
        if constexpr (BITS == 4) {  // 16 bits hold the sums of 8 products, and one instruction multiplies and adds
            const Integers ones = Integers{} + 0x00010001;
#if LANES_OF_INTEGERS == 16
            const auto above = (Integers)_mm512_packs_epi32((__m512i)a.above, (__m512i)b.above);
            const auto below = (Integers)_mm512_packs_epi32((__m512i)a.below, (__m512i)b.below);
#else
            const auto above = (Integers)_mm256_packs_epi32((__m256i)a.above, (__m256i)b.above);
            const auto below = (Integers)_mm256_packs_epi32((__m256i)a.below, (__m256i)b.below);
#endif
            return dot_words(dot_words(Integers{}, above, ones << 8), below, ones);
        } else {
            return add_neighbours(a.value(), b.value());
        }
    }

    // What block `at` of R rows adds to the totals of N tokens.
    template <int R, int N>
    __attribute__((always_inline)) void meet(const char* const (&codes)[R], const Vector (&scales)[R], const char* const* x,
                                             int64_t at, Vector (*total)[R]) const {
        Integers half[N][R], fours[2][N][R];
#pragma GCC unroll 4
        for (int pair = 0; pair < VECTORS / 2; pair++) {
            Unsigned some[R][2][PARTS];
            for (int r = 0; r < R; r++)
                for (int i = 0; i < 2; i++) unpack(read<Unsigned>(codes[r] + (2 * pair + i) * VECTOR_BYTES), some[r][i]);
#pragma GCC unroll 4
            for (int k = 0; k < N; k++) {
                auto sum_of = [&](int r, int i) __attribute__((always_inline)) {
                    const int64_t chunk = at * VECTORS + 2 * pair + i;
                    const char* a = x[k] + chunk * COLUMNS;
                    Sum<BITS> sum(x[k] + places.start + chunk * STARTS);
                    for (int part = 0; part < PARTS; part++)
                        sum.add(some[r][i][part], vector_at(a + part * VECTOR_BYTES), vector_at(a + places.b + part * VECTOR_BYTES));
                    return sum;
                };
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    const Integers both = halves(sum_of(r, 0), sum_of(r, 1));
                    if (pair % 2)
                        fours[pair / 2][k][r] = add_neighbours(half[k][r], both);
                    else
                        half[k][r] = both;
                }
            }
        }
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++) {
                const Integers whole = VECTORS == 4 ? fours[0][k][r] : add_fours(fours[0][k][r], fours[1][k][r]);
                total[k][r] = fma(__builtin_convertvector(whole, Vector), scales[r], total[k][r]);
            }
    }

    template <int R, int N>
    __attribute__((always_inline)) void tile(const Rows& w, const char* const* x, int64_t ahead, float* y) const {
        if (!step) return by_lanes<R, N>(w, x, ahead, y);
        if (N == 1 && ahead)
            for (int64_t i = 0; i < R * w.groups; i += 32) __builtin_prefetch(w.scale + i + SCALES_AHEAD);
        const int64_t row_bytes = w.columns * BITS / 8, whole = w.columns / BLOCK_COLUMNS;
        constexpr int SOME = N == 1 ? R : std::min(R, LANES / 8);  // rows that the registers hold
        Vector total[N][R];
        for (int first = 0; first < R; first += SOME) {
            const Rows some = from_row(w, first);
            const char* codes[SOME];
            Vector scales[SOME], sums[N][SOME] = {};
            for (int64_t at = 0; at < whole; at++) {
                for (int r = 0; r < SOME; r++) {
                    codes[r] = some.weight + r * w.row_bytes + at * BLOCK_BYTES;
                    for (int64_t line = 0; ahead && line < BLOCK_BYTES; line += 64) __builtin_prefetch(codes[r] + line + ahead);
                    scales[r] = scales_of(some.scale + r * w.groups, at, w.groups, std::true_type());
                }
                meet<SOME, N>(codes, scales, x, at, sums);
            }
            if (whole * BLOCK_COLUMNS < w.columns) {
                alignas(64) char rest[SOME][BLOCK_BYTES] = {};
                for (int r = 0; r < SOME; r++) {
                    codes[r] = rest[r];
                    std::memcpy(rest[r], some.weight + r * w.row_bytes + whole * BLOCK_BYTES, row_bytes - whole * BLOCK_BYTES);
                    scales[r] = scales_of(some.scale + r * w.groups, whole, w.groups, std::false_type());
                }
                meet<SOME, N>(codes, scales, x, whole, sums);
            }
            for (int k = 0; k < N; k++)
                for (int r = 0; r < SOME; r++) total[k][first + r] = sums[k][r];
        }
        finish<R, N>(total, x, y);
    }

    template <int R, int N>
    void finish(const Vector (&total)[N][R], const char* const* x, float* y) const {
        put_sums<R, N>(total, y);
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++) y[k * ::ROWS + r] *= read<float>(x[k] + places.scale);
    }

    // Groups of other sizes: a lane is of one group only, and has its scale.
    template <int R, int N>
    void by_lanes(const Rows& w, const char* const* x, int64_t ahead, float* y) const {
        Vector total[N][R] = {};
        const int64_t row_bytes = w.columns * BITS / 8;
        for (int64_t at = 0; at * COLUMNS < w.columns; at++)
            for (int r = 0; r < R; r++) {
                const char* row = w.weight + r * w.row_bytes + at * VECTOR_BYTES;
                if (ahead) __builtin_prefetch(row + ahead);
                const Vector scales = lane_scales(w.scale + r * w.groups, at * COLUMNS, COLUMNS / LANES, w);
                Unsigned codes[PARTS];
                unpack(at * VECTOR_BYTES + VECTOR_BYTES <= row_bytes ? read<Unsigned>(row) : some_bytes(row, row_bytes - at * VECTOR_BYTES), codes);
                for (int k = 0; k < N; k++) {
                    const char* a = x[k] + at * COLUMNS;
                    Sum<BITS> sum(x[k] + places.start + at * STARTS);
                    for (int part = 0; part < PARTS; part++)
                        sum.add(codes[part], vector_at(a + part * VECTOR_BYTES), vector_at(a + places.b + part * VECTOR_BYTES));
                    total[k][r] = fma(__builtin_convertvector(sum.value(), Vector), scales, total[k][r]);
                }
            }
        finish<R, N>(total, x, y);
    }

    static void multiply_all(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float* scratch) {
#if AMX
        if (choice.amx && count >= AMX_FEWEST && w.columns / w.groups % GROUP == 0 && Groups(w).step)
            return in_tiles_of_amx(w, rows, x, count, y, (char*)scratch);
#endif
        ::multiply<Groups>(w, rows, x, count, y);
    }

#if AMX
    static void in_tiles_of_amx(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, char* scratch) {
        typedef uint8_t Codes8 __attribute__((vector_size(64)));  // wraps around
        const Form places(w.columns);
        const int64_t groups = w.columns / GROUP, repeats = w.columns / w.groups / GROUP, row_bytes = w.columns * BITS / 8;
        const int64_t codes_size = places.chunks * COLUMNS * SIDE, scales_size = groups * SIDE * 4;
        const int64_t halves = rows > SIDE ? 2 : 1;
        char *all_codes = scratch, *all_scales = all_codes + halves * codes_size, *copies = all_scales + halves * scales_size;
        for (int64_t half = 0; half < halves; half++) {
            Unsigned some[16];
            auto* scales = (float*)(all_scales + half * scales_size);
            const Rows of_scales = {(const char*)w.scale, nullptr, 2 * w.groups, 0, 0, {}};
            for (int64_t at = 0; at < w.groups; at += 32) {
                transposed(of_scales, half * SIDE, rows, 2 * at, 2 * w.groups, some);
                for (int64_t i = 0; i < std::min<int64_t>(32, w.groups - at); i++) {
                    const auto scale = (Vector)(i % 2 ? some[i / 2] & 0xffff0000 : some[i / 2] << 16);
                    for (int64_t g = (at + i) * repeats; g < (at + i + 1) * repeats; g++) store(scales + g * SIDE, scale);
                }
            }
            for (int64_t at = 0; at * VECTOR_BYTES < row_bytes; at++) {
                transposed(w, half * SIDE, rows, at * VECTOR_BYTES, row_bytes, some);
                auto* to = (Codes8*)(all_codes + half * codes_size) + at * 16 * PARTS;
                for (int i = 0; i < 16; i++) {  // for 4 bits [group, even columns and odd ones, 16 rows · 16 columns]
                    Unsigned codes[PARTS];
                    unpack(some[i], codes);
                    for (int part = 0; part < PARTS; part++)
                        to[i / 4 * 4 * PARTS + part * 4 + i % 4] = (Codes8)codes[part] - uint8_t(1 << (BITS - 1));
                }
            }
        }
        for (int64_t i = 0; i < count;) {
            const int64_t tokens = std::min<int64_t>(count - i, SIDE);
            const TileRegisters registers(tokens, GROUP / PARTS);
            for (; i + tokens <= count; i += tokens) {
                const Spaced spaced(x + i, tokens, places.end, copies);
                for (int64_t half = 0; half < halves; half++) {
                    const float* scales = (const float*)(all_scales + half * scales_size);
                    auto at = [](int64_t g, int piece) { return BITS == 8 ? g * GROUP : g / 4 * COLUMNS + g % 4 * 16 + piece * VECTOR_BYTES; };
                    auto with = [&](int64_t g, int, Integers sum, Vector total) {
                        return fma(__builtin_convertvector(sum, Vector), load(scales + g * SIDE), total);
                    };
                    Vector total[SIDE];
                    by_groups<GROUP / PARTS, PARTS>(spaced, places.b, all_codes + half * codes_size, groups, at, group_of, with, total);
                    for (int64_t k = 0; k < tokens; k++)
                        store(y + (i + k) * ::ROWS + half * SIDE, total[k] * read<float>(x[i + k] + places.scale));
                }
            }
        }
    }
#endif
};

template <class Kind>
constexpr Products codes_of() { return {Kind::Form::bytes, Kind::Form::prepare, Kind::multiply_all}; }

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

template <class Kind>
constexpr Products codes_of() { return products_of<Kind>(); }
typedef Codes<8, false> Bytes8;
template <int BITS>
using Groups = Codes<BITS, true>;

#endif

}  // namespace

const Products byte_products = codes_of<Bytes8>();
const Products grouped_byte_products = codes_of<Groups<8>>();
const Products nibble_products = codes_of<Groups<4>>();
