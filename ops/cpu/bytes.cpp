// Products of whole numbers of 8 bits with a scale for each row (see products.h).
#include <array>
#include <utility>

#include "amx.h"

namespace {

#if LANES_OF_INTEGERS
// Activations are whole numbers of 16 bits times a scale for each token: exact to 1/32,000 of the token's largest
// number, which is finer than bfloat16.
constexpr int64_t VECTOR_BYTES = 4 * LANES;               // of a vector
constexpr int64_t SEGMENT = VNNI ? 65536 : 2048;  // columns of a row whose sums fit 32 bits

inline Integers vector_at(const char* p) { return read<Integers>(p); }

// The sum of a row is a whole number of more than 32 bits, rounded to float32 once, however it is formed: as a double, or in
// vectors as high · 65,536 + low.
struct Wide {
    Integers high = {}, low = {};
    void add(Integers some, int shift = 0) { high += some >> (16 - shift), low += (some & (65535 >> shift)) << shift; }
    Vector number() const {
        return __builtin_convertvector(high + (low >> 16), Vector) * 65536 + __builtin_convertvector(low & 65535, Vector);
    }
};

// Sums of codes with activations: those with their high bytes, and those with their low ones.
struct ByBytes {
    static constexpr int STARTS = 2;  // vectors
    Integers above, below;
    explicit ByBytes(const char* start) : above(vector_at(start)), below(vector_at(start + VECTOR_BYTES)) {}
    void add(Unsigned codes, Integers a, Integers b) { above = dot_bytes(above, codes, a), below = dot_bytes(below, codes, b); }
    void put(char* start) const { std::memcpy(start, &above, VECTOR_BYTES), std::memcpy(start + VECTOR_BYTES, &below, VECTOR_BYTES); }

    // The sums of all lanes are added to `total`.
    template <int R, int N>
    static void add_sums(const ByBytes (&sums)[N][R], double (&total)[N][R]) {
        Integers lanes[N][R];
        alignas(64) int32_t above[N * ::ROWS], below[N * ::ROWS];
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++) lanes[k][r] = sums[k][r].above;
        ::put_sums<R, N>(lanes, above);
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++) lanes[k][r] = sums[k][r].below;
        ::put_sums<R, N>(lanes, below);
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++) total[k][r] += above[k * ::ROWS + r] * 256. + below[k * ::ROWS + r];
    }

    // See RowPanel.
    static constexpr int64_t MOST = 65536;
    static constexpr int SHIFT[] = {8, 0};
    static Integers part(Unsigned codes, int) { return (Integers)codes; }
    static Integers dot(Integers sum, Integers codes, Integers x) { return dot_bytes(sum, (Unsigned)codes, x); }
    static Integers start(const char* start, int part) { return Integers{} + sum(vector_at(start + part * VECTOR_BYTES)); }
};

// Without VNNI: activations of the even columns, and of the odd ones, in 16 bits.
struct ByWords {
    static constexpr int STARTS = 1;
    Integers sum;
    explicit ByWords(const char* start) : sum(vector_at(start)) {}
    void add(Unsigned codes, Integers a, Integers b) {
        sum = dot_words(dot_words(sum, (Integers)(codes & 0x00ff00ff), a), (Integers)(codes >> 8 & 0x00ff00ff), b);
    }
    void put(char* start) const { std::memcpy(start, &sum, VECTOR_BYTES); }

    template <int R, int N>
    static void add_sums(const ByWords (&sums)[N][R], double (&total)[N][R]) {
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++) total[k][r] += ::sum(sums[k][r].sum >> 16) * 65536. + ::sum(sums[k][r].sum & 65535);
    }

    static constexpr int64_t MOST = 1024;  // with 128 · 32,639 for each second one
    static constexpr int SHIFT[] = {0, 0};
    static Integers part(Unsigned codes, int part) {
        typedef int16_t Words __attribute__((vector_size(4 * LANES)));
        return (Integers)((Words)(codes >> 8 * part & 0x00ff00ff) - int16_t(128));
    }
    static Integers dot(Integers sum, Integers codes, Integers x) { return dot_words(sum, codes, x); }
    static Integers start(const char*, int) { return Integers{}; }
};

using RowSum = std::conditional_t<VNNI, ByBytes, ByWords>;

// The form of the activations: [chunks] vectors `a`, then `b`, as many as there are vectors of codes; then [sums] of TOGETHER
// chunks what the codes have too much, and the scale. Each array is a stream of its own.
struct Activations {
    static constexpr int64_t TOGETHER = SEGMENT / VECTOR_BYTES, STARTS = RowSum::STARTS * VECTOR_BYTES;
    int64_t chunks, b, start, scale, end;

    explicit Activations(int64_t n)
        : chunks(rounded_up(n, VECTOR_BYTES) / VECTOR_BYTES), b(chunks * VECTOR_BYTES), start(2 * b),
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
        for (int64_t at = 0; at < places.chunks; at++) {
            const int64_t count = std::min(VECTOR_BYTES, n - at * VECTOR_BYTES);
            int32_t whole[VECTOR_BYTES] = {};
            int64_t i = 0;
            for (; i + LANES <= count; i += LANES) {
                Vector rounded = load(x + at * VECTOR_BYTES + i) * inverse + ROUND;
                Integers numbers = (Integers)rounded - (Integers)(Vector{} + ROUND);
                std::memcpy(whole + i, &numbers, sizeof numbers);
            }
            for (; i < count; i++) whole[i] = int(std::nearbyint(x[at * VECTOR_BYTES + i] * inverse));
            char *a = out + at * VECTOR_BYTES, *b = a + places.b, *start = out + places.start + at / TOGETHER * STARTS;
            place<in_bytes(8), VECTOR_BYTES>(whole, a, b);
            RowSum surplus(start);
            surplus.add(Unsigned{} + 0x80808080, vector_at(a), vector_at(b));
            surplus.put(start);
        }
        for (int64_t i = places.start; i < places.scale; i += VECTOR_BYTES) {
            const Integers negative = -vector_at(out + i);
            std::memcpy(out + i, &negative, sizeof negative);
        }
    }
};

// LANES rows, or as many as there are from `first` on, transposed once for many tokens: a lane is a row. Vectors of four codes
// of each row, for the high and for the low bytes of activations; without VNNI with their sign in 16 bits: those of the even
// columns, [columns / 4], then those of the odd ones.
struct RowPanel {
    static constexpr int MOST = LANES == 16 ? 8 : 6;  // tokens of a tile
    const Activations places;
    const int64_t fours;
    Integers* const codes;
    Vector scales = {};
    char* const end;

    RowPanel(const Rows& w, int64_t first, int64_t rows, char* memory)
        : places(w.columns), fours(places.chunks * LANES), codes((Integers*)memory), end((char*)(codes + (VNNI ? 1 : 2) * fours)) {
        for (int r = 0; r < LANES && first + r < rows; r++) scales[r] = to_float(w.scale[first + r]);
        for (int64_t at = 0; at < places.chunks; at++) {
            const int64_t bytes = std::min(w.columns - at * VECTOR_BYTES, VECTOR_BYTES);
            Unsigned v[LANES] = {};
            for (int r = 0; r < LANES; r++) {
                const char* p = w.weight + std::min(first + r, rows - 1) * w.row_bytes + at * VECTOR_BYTES;
                if (bytes == VECTOR_BYTES)
                    v[r] = read<Unsigned>(p);
                else
                    std::memcpy(&v[r], p, bytes);
            }
            transpose(v);
            for (int part = 0; part < (VNNI ? 1 : 2); part++)
                for (int i = 0; i < LANES; i++) codes[part * fours + at * LANES + i] = RowSum::part(v[i], part);
        }
    }

    int64_t steps() const { return 2 * places.chunks; }

    // y[count, COUNT · LANES] of a [count, ROWS] array = the products of some tokens with COUNT panels.
    template <int COUNT>
    static void multiply(const RowPanel* panels, const char* const* x, int64_t count, float* y, Following& following) {
        in_tiles<MOST>(count, [&](int64_t i, auto n) { tile<COUNT, n>(panels, x + i, y + i * ROWS, following); });
    }
    template <int COUNT, int N>  // inline, GCC has no registers left for all sums (AVX2: 98 instead of 128 · 10⁹/s)
    __attribute__((noinline)) static void tile(const RowPanel* panels, const char* const* x, float* y, Following& following) {
        const Activations& places = panels->places;
        const int64_t fours = panels->fours, some = RowSum::MOST / 4;
        const char* tokens[N];
        for (int k = 0; k < N; k++) tokens[k] = x[k];
        Wide total[N][COUNT];
        for (int part = 0; part < 2; part++)
            for (int64_t first = 0; first < fours; first += some) {
                const int64_t count = std::min(some, fours - first);
                Integers sums[N][COUNT];
                for (int k = 0; k < N; k++)
                    for (auto& sum : sums[k]) sum = RowSum::start(x[k] + places.start, part);
                const int64_t at = part * places.b + 4 * first;
                for (int64_t four = 0; four < count; four++) {
                    if (four % LANES == 0) following.fetch();
                    Integers codes[COUNT];
                    each<COUNT>([&](auto p) __attribute__((always_inline)) {
                        codes[p] = in_register(panels[p].codes[(VNNI ? 0 : part) * fours + first + four]);
                    });
                    each<N>([&](auto k) __attribute__((always_inline)) {
                        const Integers all = Integers{} + read<int32_t>(tokens[k] + at + 4 * four);
                        each<COUNT>([&](auto p) __attribute__((always_inline)) { sums[k][p] = RowSum::dot(sums[k][p], codes[p], all); });
                    });
                }
                for (int k = 0; k < N; k++)
                    for (int p = 0; p < COUNT; p++) total[k][p].add(sums[k][p], RowSum::SHIFT[part]);
            }
        for (int k = 0; k < N; k++)
            for (int p = 0; p < COUNT; p++)
                store(y + k * ROWS + p * LANES, total[k][p].number() * read<float>(x[k] + places.scale) * panels[p].scales);
    }
};

struct RowBytes : Activations {
    static constexpr int ROWS = LANES == 16 ? 4 : 2, TOKENS = LANES == 16 ? 3 : 2;
    explicit RowBytes(const Rows& w) : Activations(w.columns) {}

    template <int R, int N>
    __attribute__((always_inline)) void tile(const Rows& w, const char* const* x, auto& ahead, float* y) const {
        const int64_t whole = w.columns / VECTOR_BYTES;
        double total[N][R] = {};
        for (int64_t first = 0; first < chunks; first += TOGETHER) {
            auto sums = [&]<size_t... I>(std::index_sequence<I...>) {
                return std::array<RowSum, N * R>{RowSum(x[I / R] + start + first / TOGETHER * STARTS)...};
            }(std::make_index_sequence<N * R>());
            auto meet = [&](int64_t at, auto codes_of) __attribute__((always_inline)) {
                Unsigned codes[R];
                if (at * VECTOR_BYTES % 64 == 0) ahead.template fetch<R>(w.weight + at * VECTOR_BYTES, w.row_bytes);
                for (int r = 0; r < R; r++) codes[r] = codes_of(w.weight + r * w.row_bytes + at * VECTOR_BYTES);
                for (int k = 0; k < N; k++) {
                    const Integers one = vector_at(x[k] + at * VECTOR_BYTES), other = vector_at(x[k] + b + at * VECTOR_BYTES);
                    for (int r = 0; r < R; r++) sums[k * R + r].add(codes[r], one, other);
                }
            };
            const int64_t last = std::min(first + TOGETHER, chunks);
            for (int64_t at = first; at < std::min(last, whole); at++) meet(at, [](const char* p) { return read<Unsigned>(p); });
            if (whole < last) meet(whole, [&](const char* p) {
                Unsigned bytes = {};
                std::memcpy(&bytes, p, w.columns - whole * VECTOR_BYTES);
                return bytes;
            });
            RowSum::template add_sums<R, N>((const RowSum(&)[N][R])sums, total);
        }
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++)
                y[k * ::ROWS + r] = float(total[k][r]) * read<float>(x[k] + scale) * to_float(w.scale[r]);
    }

    static void multiply_all(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float* scratch) {
        if (!w.many || (VNNI && w.columns > SEGMENT)) return ::multiply<RowBytes>(w, rows, x, count, y);
#if AMX
        if (choice.amx)
            return count < ::MANY ? rows_in_tiles(w, rows, count, y, (char*)scratch)
                                  : tokens_in_tiles(w, rows, x, count, y, (char*)scratch);
#endif
        in_panels(w, rows, x, count, y, (char*)scratch, [&](int64_t first, char* memory) {
            return RowPanel(w, first, rows, memory);
        });
    }

#if AMX
    // a · b = b · a: some tokens meet rows where they lie, and are arranged in columns for that; many tokens are taken as they
    // lie, and the weights are arranged, once for all of them.
    //
    // Some tokens, fewer than ::MANY, as groups of SIDE: [columns / 64, 2] tiles of 8 tokens each, [16 fours of columns; the high
    // bytes of 8 tokens, then the low ones]; what the sums with either start at, and the scales, [SIDE].
    static int64_t group_bytes(int64_t columns) { return Activations(columns).chunks * 2 * SUMS + 3 * 64; }
    static void arrange(const char* const* x, int64_t count, int64_t columns, bool many, float* scratch) {
        if (!many || !choice.amx || count >= ::MANY || columns > SEGMENT) return;
        const Activations places(columns);
        char* out = (char*)scratch;
        for (int64_t i = 0; i < count; i += SIDE, out += 3 * 64) {
            const int64_t tokens = std::min<int64_t>(count - i, SIDE);
            for (int64_t at = 0; at < places.chunks; at++)
                for (int64_t first = 0; first < SIDE; first += 8, out += SUMS) {
                    if (first >= tokens) continue;
                    Unsigned v[16] = {};
                    for (int64_t k = first; k < std::min(first + 8, tokens); k++) {
                        v[k - first] = read<Unsigned>(x[i + k] + at * 64);
                        v[k - first + 8] = read<Unsigned>(x[i + k] + places.b + at * 64);
                    }
                    transpose(v);
                    std::memcpy(out, v, SUMS);
                }
            Integers above = {}, below = {};
            Vector scales = {};
            for (int64_t k = 0; k < tokens; k++) {
                above[k] = RowSum::start(x[i + k] + places.start, 0)[0], below[k] = RowSum::start(x[i + k] + places.start, 1)[0];
                scales[k] = read<float>(x[i + k] + places.scale);
            }
            std::memcpy(out, &above, 64), std::memcpy(out + 64, &below, 64), std::memcpy(out + 128, &scales, 64);
        }
    }

    // Registers: 0 to 3 sums [rows, high and low bytes of 8 tokens], 4 and 5 rows, 6 and 7 tokens.
    static void rows_in_tiles(const Rows& w, int64_t rows, int64_t count, float* y, const char* group) {
        const int64_t chunks = Activations(w.columns).chunks, whole = w.columns / 64, left = w.columns % 64;
        const uint8_t first = std::min<int64_t>(rows, SIDE), second = rows > SIDE ? rows - SIDE : first;
        const TileRegisters registers({first, first, second, second, first, second, SIDE, SIDE}, {64, 64, 64, 64, 64, 64, 64, 64});
        alignas(64) char rest[::ROWS][64] = {};
        for (int64_t r = 0; r < rows && left; r++) std::memcpy(rest[r], w.weight + r * w.row_bytes + whole * 64, left);
        Following following(w, rows, 0, rows, (count + SIDE - 1) / SIDE * chunks);
        for (int64_t i = 0; i < count; i += SIDE, group += group_bytes(w.columns)) {
            const int64_t tokens = std::min<int64_t>(count - i, SIDE);
            zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
            for (int64_t at = 0; at < chunks; at++) {
                following.fetch();
                const char *codes = at < whole ? w.weight + at * 64 : rest[0], *beside = group + at * 2 * SUMS;
                const int64_t stride = at < whole ? w.row_bytes : 64;
                load_tile<4>(codes, stride), load_tile<6>(beside, 64), multiply_unsigned<0, 4, 6>();
                if (rows > SIDE) load_tile<5>(codes + SIDE * stride, stride), multiply_unsigned<2, 5, 6>();
                if (tokens <= 8) continue;
                load_tile<7>(beside + SUMS, 64), multiply_unsigned<1, 4, 7>();
                if (rows > SIDE) multiply_unsigned<3, 5, 7>();
            }
            alignas(64) __m512i sums[4][SIDE];
            store_tile<0>(sums[0]), store_tile<1>(sums[1]), store_tile<2>(sums[2]), store_tile<3>(sums[3]);
            const char* starts = group + chunks * 2 * SUMS;
            for (int64_t row = 0; row < rows; row += SIDE) {
                const __m512i *a = sums[row / SIDE * 2], *b = a + SIDE;
                Unsigned v[SIDE] = {};
                for (int64_t r = 0; r < std::min<int64_t>(rows - row, SIDE); r++) {
                    Wide total;
                    total.add((Integers)_mm512_shuffle_i64x2(a[r], b[r], 0x44) + vector_at(starts), 8);
                    total.add((Integers)_mm512_shuffle_i64x2(a[r], b[r], 0xee) + vector_at(starts + 64));
                    v[r] = (Unsigned)(total.number() * read<Vector>(starts + 128) * to_float(w.scale[row + r]));
                }
                transpose(v);
                for (int64_t k = 0; k < tokens; k++) std::memcpy(y + (i + k) * ::ROWS + row, v + k, 64);
            }
        }
    }

    // Registers: 0 to 3 sums [tokens, rows] with the high and the low bytes of tokens, 4 and 5 these, 6 and 7 weights.
    static void tokens_in_tiles(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, char* scratch) {
        const Activations places(w.columns);
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
        Following following(w, rows, 0, rows, (count + SIDE - 1) / SIDE * places.chunks);
        for (int64_t i = 0; i < count;) {
            const int64_t tokens = std::min<int64_t>(count - i, SIDE);
            const TileRegisters registers(tokens, 64);
            for (; i + tokens <= count; i += tokens) {
                const Spaced spaced(x + i, tokens, places.end, scratch + both);
                alignas(64) Integers sums[4][SIDE];
                zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
                for (int64_t at = 0; at < places.chunks; at++) {
                    following.fetch();
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
                        Wide total;
                        total.add(sums[2 * half][k], 8), total.add(sums[2 * half + 1][k]);
                        store(y + (i + k) * ::ROWS + half * SIDE,
                              total.number() * read<float>(x[i + k] + places.scale) * load(row_scales + half * SIDE));
                    }
            }
        }
    }
#endif
};

#else
struct RowBytes : AsTheyAre {
    explicit RowBytes(const Rows&) {}
    static constexpr int ROWS = 2, TOKENS = 4;

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, auto& ahead,
                                                 Vector total[N][R]) const {
        for (int64_t i = 0; i < w.columns; i += LANES)
            for (int r = 0; r < R; r++) {
                const auto* row = (const int8*)(w.weight + r * w.row_bytes) + i;
                ahead.template fetch<1>((const char*)row, 0);
                const Vector weights = i + LANES <= w.columns ? load(row) : load_some(row, w.columns - i);
                for (int k = 0; k < N; k++) total[k][r] = fma(weights, load((const float*)x[k] + i), total[k][r]);
            }
    }
    static float finish(const Rows& w, int r, float y) { return y * to_float(w.scale[r]); }

    static void multiply_all(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float*) {
        ::multiply<RowBytes>(w, rows, x, count, y);
    }
};
#endif

}  // namespace

#if AMX
constexpr decltype(Products::arrange) arrange_bytes = RowBytes::arrange;
#else
constexpr decltype(Products::arrange) arrange_bytes = nullptr;
#endif
const Products byte_products = {RowBytes::bytes, RowBytes::prepare, RowBytes::multiply_all, nullptr, arrange_bytes, nullptr,
                                RowBytes::ROWS, AMX ? 6 : LANES == 16 ? 13 : 5};
