// Products of codes, whole numbers of at most 8 bits, that have a scale for each group of 32 or 16 columns.
//
// Activations are whole numbers of 16 bits with a scale for each group too: exact to 1/65,278 of the largest number of
// their group. The sum of a group is a whole number and exact, in whatever order it is formed; what follows is not:
//
//     total[lane] = fma(float(sum of a group) · the activations' scale, the weights' scale, total[lane])
//     total[lane] = fma(the group's minimum, the sum of its activations, total[lane])                     where there is one
//
// A chunk has as many groups as a vector has lanes, and each lane is a group: the codes of a chunk are transposed, four
// columns of each group to a vector, so that adding up the products of the vectors adds up each group. A few tokens
// unpack and transpose a chunk when they meet it, many do so once for some rows: the same numbers in the same order.
#pragma once
#include <array>
#include <cfloat>
#include <utility>

#include "amx.h"
#include "integers.h"

// Calls work(i) for i = 0 .. COUNT, each i a compile-time constant.
template <int COUNT, class Work>
__attribute__((always_inline)) inline void each(Work work) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        (work(std::integral_constant<int, I>()), ...);
    }(std::make_integer_sequence<int, COUNT>());
}

// Which group of a chunk has a lane: what `transpose` makes of it.
constexpr int group_of(int lane, int group_size) {
    const int quarter = lane / 4, i = lane % 4;
    if (LANES == 4 || (LANES == 8 && group_size == 32)) return lane;
    if (group_size == 16) return LANES / 4 * i + quarter;
    return quarter / 2 * 8 + 2 * i + quarter % 2;
}

// A vector whose lanes are of(group) of their groups.
template <class Result, int GROUP, class Of>
__attribute__((always_inline)) inline Result by_group(Of of) {
    return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        return Result{of(std::integral_constant<int, group_of(I, GROUP)>())...};
    }(std::make_integer_sequence<int, LANES>());
}

// GROUP / 4 vectors of codes, column by column, into as many whose lanes are groups, four columns of each.
template <int GROUP>
__attribute__((always_inline)) inline void transpose(Unsigned* codes) {
#if defined(__AVX2__)
    for (int i = 0; i < GROUP / 4; i += 4) transpose_quarters(codes + i);
    for (int i = 0; GROUP == 32 && i < 4; i++) {
        const Unsigned a = codes[i], b = codes[i + 4];
#if LANES_OF_INTEGERS == 16
        codes[i] = (Unsigned)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0x88);
        codes[i + 4] = (Unsigned)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0xdd);
#else
        codes[i] = (Unsigned)_mm256_permute2x128_si256((__m256i)a, (__m256i)b, 0x20);
        codes[i + 4] = (Unsigned)_mm256_permute2x128_si256((__m256i)a, (__m256i)b, 0x31);
#endif
    }
#else
    uint32_t words[LANES * GROUP / 4];
    std::memcpy(words, codes, sizeof words);
    for (int i = 0; i < GROUP / 4; i++)
        codes[i] = by_group<Unsigned, GROUP>([&](auto group) { return words[group * (GROUP / 4) + i]; });
#endif
}

// LANES groups of a row, transposed. The numbers are (code - offset) · scale + minimum.
template <int GROUP>
struct Chunk {
    Unsigned codes[GROUP / 4];
    Vector scale, minimum;

    static constexpr int64_t COLUMNS = LANES * GROUP;
    static int64_t count(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; }
};
static_assert(sizeof(Chunk<16>) * 256 / Chunk<16>::COLUMNS <= 640);  // as unpacked_size in products.h expects

// Activations. Of n, in whole chunks: for AMX their high bytes column by column, then their low ones; then [chunks,
// GROUP / 4] vectors `a`, then `b` (see ExactSum), arranged as the codes are; then for each chunk a vector of the groups'
// scales, of their sums as whole numbers, and of their sums.
template <int GROUP>
struct GroupedInputs {
    static constexpr int64_t BYTES = 4 * LANES, CHUNK_BYTES = GROUP / 4 * BYTES;
    static constexpr float MOST = 32639;  // 127 · 256 + 127

    struct Places {
        int64_t chunks, low, a, b, scale, whole, sum, end;
        explicit Places(int64_t n)
            : chunks(Chunk<GROUP>::count(n)), low(AMX * chunks * CHUNK_BYTES), a(2 * low), b(a + chunks * CHUNK_BYTES),
              scale(b + chunks * CHUNK_BYTES), whole(scale + chunks * BYTES), sum(whole + chunks * BYTES),
              end(rounded_up(sum + chunks * BYTES, LINE_BYTES) + LINE_BYTES) {}
    };
    static int64_t bytes(int64_t n) { return Places(n).end; }

    static void prepare(const float* x, int64_t n, char* out) {
        const Places places(n);
        for (int64_t at = 0; at < places.chunks; at++)
            for (int lane = 0; lane < LANES; lane++) {
                const int64_t column = at * Chunk<GROUP>::COLUMNS + group_of(lane, GROUP) * GROUP;
                alignas(64) float padded[GROUP] = {};
                const int64_t count = std::clamp(n - column, int64_t(0), int64_t(GROUP));
                std::memcpy(padded, x + std::min(column, n), count * sizeof(float));
                Vector largest = {}, nothing = {};
                for (int i = 0; i < GROUP; i += LANES) {
                    const Vector v = load(padded + i), size = v < 0.f ? -v : v;
                    largest = size > largest ? size : largest;
                    nothing += v - v;  // NaN where something is not finite
                }
                float most = 0;
                for (int i = 0; i < LANES; i++) most = std::max(most, largest[i]);
                const float scale = most / MOST, inverse = scale >= FLT_MIN && scale < INFINITY ? 1 / scale : 0;
                alignas(64) int32_t whole[GROUP];
                Integers total = {};
                for (int i = 0; i < GROUP; i += LANES) {
                    const Vector rounded = load(padded + i) * inverse + ROUND;
                    const Integers q = (Integers)rounded - (Integers)(Vector{} + ROUND);
                    std::memcpy(whole + i, &q, sizeof q);
                    total += q;
                }
                int32_t sum_of_whole = 0;
                for (int i = 0; i < LANES; i++) sum_of_whole += total[i];
                alignas(64) char a[GROUP], b[GROUP];
                for (int i = 0; i < GROUP; i++) ExactSum::place(a, b, i, whole[i]);
                if (AMX) std::memcpy(out + column, a, GROUP), std::memcpy(out + places.low + column, b, GROUP);
                char* to = out + at * CHUNK_BYTES + 4 * lane;
                for (int i = 0; i < GROUP / 4; i++) {
                    std::memcpy(to + i * BYTES + places.a, a + 4 * i, 4);
                    std::memcpy(to + i * BYTES + places.b, b + 4 * i, 4);
                }
                const int64_t place = at * LANES + lane;
                ((float*)(out + places.scale))[place] = scale + sum(nothing);
                ((int32_t*)(out + places.whole))[place] = sum_of_whole;
                ((float*)(out + places.sum))[place] = float(sum_of_whole) * scale;
            }
    }

    // What R rows and N tokens add to their accumulators in chunk `at`.
    template <class Type, int R, int N>
    __attribute__((always_inline)) static void meet(const Chunk<GROUP>* const* w, const char* const* x, int64_t at,
                                                    const Places& places, Vector total[N][R]) {
        constexpr int ROWS = std::min(R, 4), TOKENS = R * N == 1 ? 1 : LANES == 16 ? std::min(N, 8 / ROWS) : 1;
        each<R / ROWS>([&](auto rows) __attribute__((always_inline)) {
            each<N / TOKENS>([&](auto tokens) __attribute__((always_inline)) {
                some<Type, ROWS, TOKENS, R>(w + rows * ROWS, x + tokens * TOKENS, at, places,
                                            &total[tokens * TOKENS][rows * ROWS]);
            });
        });
    }

    // As many as the registers hold sums of.
    template <class Type, int R, int N, int ALL>
    __attribute__((always_inline)) static void some(const Chunk<GROUP>* const* w, const char* const* x, int64_t at,
                                                    const Places& places, Vector* total) {
        ExactSum sums[N][R];
        each<GROUP / 4>([&](auto i) __attribute__((always_inline)) {
            Unsigned codes[R];
            each<R>([&](auto r) __attribute__((always_inline)) { codes[r] = w[r]->codes[i]; });
            each<N>([&](auto k) __attribute__((always_inline)) {
                const char* a = x[k] + at * CHUNK_BYTES + i * BYTES;
                const Integers one = read<Integers>(a + places.a), other = read<Integers>(a + places.b);
                each<R>([&](auto r) __attribute__((always_inline)) { sums[k][r].add(codes[r], one, other); });
            });
        });
        each<N>([&](auto k) __attribute__((always_inline)) {
            const char* rest = x[k] + at * BYTES;
            const Vector scale = read<Vector>(rest + places.scale);
            each<R>([&](auto r) __attribute__((always_inline)) {
                Integers whole = sums[k][r].whole();
                if (Type::OFFSET) whole -= read<Integers>(rest + places.whole) * Type::OFFSET;
                Vector& to = total[k * ALL + r];
                to = fma(__builtin_convertvector(whole, Vector) * scale, w[r]->scale, to);
                if (Type::MINIMA) to = fma(w[r]->minimum, read<Vector>(rest + places.sum), to);
            });
        });
    }
};

// Chunks that were unpacked before, some rows of them: whatever their type is.
template <int GROUP_, int OFFSET_, bool MINIMA_>
struct Numbers {
    static constexpr int GROUP = GROUP_, OFFSET = OFFSET_;
    static constexpr bool MINIMA = MINIMA_;
};
template <class Type>
struct Unpacked : GroupedInputs<Type::GROUP> {
    explicit Unpacked(const Rows&) {}
    static constexpr int ROWS = LANES == 16 ? 4 : 2, TOKENS = 4;

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, int64_t, Vector total[N][R]) const {
        const typename GroupedInputs<Type::GROUP>::Places places(w.columns);
        for (int64_t at = 0; at < places.chunks; at++) {
            const Chunk<Type::GROUP>* here[R];
            for (int r = 0; r < R; r++) here[r] = (const Chunk<Type::GROUP>*)(w.weight + r * w.row_bytes) + at;
            GroupedInputs<Type::GROUP>::template meet<Type, R, N>(here, x, at, places, total);
        }
    }
    static float finish(const Rows&, int, float y) { return y; }
};

#if AMX
// 16 rows, unpacked for AMX: [groups, GROUP / 4, rows, 4] weights, [groups, rows] scales and minima; then room for the
// activations of 16 tokens.
template <int GROUP, bool MINIMA>
struct Panel {
    const typename GroupedInputs<GROUP>::Places places;
    const int64_t groups;
    char* weights;
    Vector *scales, *minima;
    char* copies;

    Panel(int64_t columns, char* scratch)
        : places(columns), groups(columns / GROUP), weights(scratch),
          scales((Vector*)(weights + places.chunks * Chunk<GROUP>::COLUMNS * SIDE)),
          minima(scales + places.chunks * LANES), copies((char*)(minima + MINIMA * places.chunks * LANES)) {}

    // Chunk `at` of each row, column by column. Overwrites them.
    void put(int64_t at, Unsigned (*codes)[SIDE], Unsigned* scale, Unsigned* minimum) const {
        for (int i = 0; i < GROUP / 4; i++) {
            ::transpose(codes[i]);
            std::memcpy(weights + (at * Chunk<GROUP>::COLUMNS / 4 + i * LANES) * 64, codes[i], sizeof codes[i]);
        }
        ::transpose(scale);
        for (int lane = 0; lane < LANES; lane++) scales[at * LANES + group_of(lane, GROUP)] = (Vector)scale[lane];
        if (!MINIMA) return;
        ::transpose(minimum);
        for (int lane = 0; lane < LANES; lane++) minima[at * LANES + group_of(lane, GROUP)] = (Vector)minimum[lane];
    }

    // y[i, 0 .. 16] of a [count, ROWS] array.
    void multiply(const char* const* x, int64_t count, float* y) const {
        static constexpr auto LANE_OF = [] {
            std::array<int, LANES> lane_of = {};
            for (int lane = 0; lane < LANES; lane++) lane_of[group_of(lane, GROUP)] = lane;
            return lane_of;
        }();
        for (int64_t i = 0; i < count;) {
            const int64_t tokens = std::min<int64_t>(count - i, SIDE);
            const TileRegisters registers(tokens, GROUP);
            for (; i + tokens <= count; i += tokens) {
                const Spaced spaced(x + i, tokens, places.a, copies);
                const char* of_token[SIDE];
                for (int64_t k = 0; k < SIDE; k++) of_token[k] = x[i + std::min(k, tokens - 1)];
                Vector total[SIDE];
                by_groups<GROUP, 1>(
                    spaced, places.low, weights, groups, [](int64_t group, int) { return group * GROUP; },
                    [](int lane) { return group_of(lane, GROUP); },
                    [&](int64_t group, int k, Integers whole, Vector sum) __attribute__((always_inline)) {
                        const int64_t place = group / LANES * LANES + LANE_OF[group % LANES];
                        auto all = [&](int64_t array) __attribute__((always_inline)) {
                            return (Vector)_mm512_set1_ps(((const float*)(of_token[k] + array))[place]);
                        };
                        const Vector number = __builtin_convertvector(whole, Vector) * all(places.scale);
                        sum = fma(number, scales[group], sum);
                        return MINIMA ? fma(minima[group], all(places.sum), sum) : sum;
                    },
                    total);
                for (int64_t k = 0; k < tokens; k++) store(y + (i + k) * ROWS, total[k]);
            }
        }
    }
};
#endif

// Rows where they lie, in blocks of Type::BLOCK columns and Type::BYTES bytes.
//
//     codes<I>(p, first)             vector I of a chunk, column by column; p: the block in which it begins,
//     scales(p, first), minima(…)    with the group `first` of that block
template <class Type>
struct InPlace : GroupedInputs<Type::GROUP> {
    explicit InPlace(const Rows&) {}
    static constexpr int ROWS = 1, TOKENS = 4, GROUP = Type::GROUP;
    static constexpr int64_t COLUMNS = Chunk<GROUP>::COLUMNS, GROUPS = Type::BLOCK / GROUP;  // of a block
    static constexpr int64_t BYTES = (LANES + GROUPS - 1) / GROUPS * Type::BYTES;            // of a chunk, at least

    // Column by column.
    __attribute__((always_inline)) static void unpack_plain(const char* row, int64_t columns, int64_t at, Chunk<GROUP>& to) {
        const int64_t begin = at * LANES / GROUPS, first = GROUPS > LANES ? at * LANES % GROUPS : 0;
        const int64_t left = columns / Type::BLOCK - begin;
        const char* p = row + begin * Type::BYTES;
        alignas(64) char last[BYTES];
        if (BYTES > Type::BYTES && left * Type::BYTES < BYTES) {
            std::memset(last, 0, sizeof last);
            p = (const char*)std::memcpy(last, p, left * Type::BYTES);
        }
        each<GROUP / 4>([&](auto i) __attribute__((always_inline)) { to.codes[i] = Type::template codes<i>(p, first); });
        to.scale = Type::scales(p, first);
        if constexpr (Type::MINIMA) to.minimum = Type::minima(p, first);
    }
    __attribute__((always_inline)) static void unpack(const char* row, int64_t columns, int64_t at, Chunk<GROUP>& to) {
        unpack_plain(row, columns, at, to);
        transpose<GROUP>(to.codes);
    }

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, int64_t ahead,
                                                 Vector total[N][R]) const {
        const typename GroupedInputs<GROUP>::Places places(w.columns);
        for (int64_t at = 0; at < places.chunks; at++) {
            for (int64_t line = 0; line < BYTES && ahead; line += 64)
                __builtin_prefetch(w.weight + at * LANES / GROUPS * Type::BYTES + line + ahead);
            Chunk<GROUP> chunk;
            unpack(w.weight, w.columns, at, chunk);
            const Chunk<GROUP>* here[R] = {&chunk};
            GroupedInputs<GROUP>::template meet<Type, R, N>(here, x, at, places, total);
        }
    }
    static float finish(const Rows&, int, float y) { return y; }

    static constexpr int MANY = 5;
    static void multiply_all(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y,
                             float* scratch) {
        if (count < MANY) return ::multiply<InPlace>(w, rows, x, count, y);
#if AMX
        if constexpr (GROUP == 32)  // of 16 columns a tile is a quarter full, and no faster than vectors
            if (choice.amx && count >= AMX_FEWEST) return in_tiles_of_amx(w, rows, x, count, y, (char*)scratch);
#endif
        const int64_t width = Chunk<GROUP>::count(w.columns);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t at = 0; at < width; at++)
                unpack(w.weight + r * w.row_bytes, w.columns, at, ((Chunk<GROUP>*)scratch)[r * width + at]);
        const Rows once = {(const char*)scratch, nullptr, width * int64_t(sizeof(Chunk<GROUP>)), w.columns, 0, {}};
        ::multiply<Unpacked<Numbers<GROUP, Type::OFFSET, Type::MINIMA>>>(once, rows, x, count, y);
    }

#if AMX
    static void in_tiles_of_amx(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y,
                                char* scratch) {
        typedef uint8_t Codes8 __attribute__((vector_size(64)));
        const Panel<GROUP, Type::MINIMA> panel(w.columns, scratch);
        for (int64_t row = 0; row < rows; row += SIDE) {
            for (int64_t at = 0; at < panel.places.chunks; at++) {
                Unsigned codes[GROUP / 4][SIDE], scale[SIDE], minimum[SIDE];
                for (int r = 0; r < SIDE; r++) {
                    Chunk<GROUP> chunk;
                    unpack_plain(w.weight + std::min(row + r, rows - 1) * w.row_bytes, w.columns, at, chunk);
                    for (int i = 0; i < GROUP / 4; i++) codes[i][r] = (Unsigned)((Codes8)chunk.codes[i] - Type::OFFSET);
                    scale[r] = (Unsigned)chunk.scale;
                    if (Type::MINIMA) minimum[r] = (Unsigned)chunk.minimum;
                }
                panel.put(at, codes, scale, minimum);
            }
            panel.multiply(x, count, y + row);
        }
    }
#endif

    static void numbers(const char* row, int64_t columns, float* out) {
        Chunk<GROUP> chunk;
        for (int64_t at = 0; at < Chunk<GROUP>::count(columns); at++) {
            unpack(row, columns, at, chunk);
            for (int lane = 0; lane < LANES; lane++) {
                const int64_t begin = at * COLUMNS + group_of(lane, GROUP) * GROUP;
                for (int i = 0; i < GROUP && begin < columns; i++) {
                    const int code = chunk.codes[i / 4][lane] >> i % 4 * 8 & 255;
                    const float number = float(code - Type::OFFSET) * chunk.scale[lane];
                    out[begin + i] = Type::MINIMA ? number + chunk.minimum[lane] : number;
                }
            }
        }
    }
};

template <class Type>
constexpr Products groups_of() {
    return {GroupedInputs<Type::GROUP>::bytes, GroupedInputs<Type::GROUP>::prepare, InPlace<Type>::multiply_all,
            InPlace<Type>::numbers};
}
