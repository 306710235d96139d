// Products of codes, whole numbers of at most 8 bits, that have a scale for each group of 32 or 16 columns.
//
// Activations are whole numbers of 16 bits with a scale for each group too: exact to 1/65,278 of the largest number of
// their group. The sum of a group is a whole number and exact, in whatever order it is formed; what follows is not:
//
//     total[lane] = fma(float(sum of a group) · the activations' scale, the weights' scale, total[lane])
//     total[lane] = fma(the group's minimum, the sum of its activations, total[lane])                     where there is one
//
// and then the sum of the lanes. There are three ways to the same bits:
//
//     few tokens             each lane of a vector is a group of one row: the codes of a chunk, as many groups as there are
//                            lanes, are transposed in registers when they are met (Chunk)
//     many tokens            each lane is a row: 16 bits for each code, transposed once for all tokens (Panel), meet
//                            activations that are spread over all lanes
//     many tokens, with AMX  each lane is a token: rows as they lie, 8 bits for each code (TileRows), meet activations of
//                            16 tokens side by side (amx.h)
//
// All three stand here, which makes the file long, because they have to round alike.
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

// Which group of a chunk a lane holds after `transpose`. PACKED: two codes of 4 bits to a byte, of which the lower ones are
// the first half of a group.
constexpr int group_of(int lane, int group_size, bool packed = false) {
    const int quarter = lane / 4, i = lane % 4;
    if (LANES == 4 || (LANES == 8 && group_size == 32 && !packed)) return lane;
    if (group_size == 16 || packed) return LANES / 4 * i + quarter;
    return quarter / 2 * 8 + 2 * i + quarter % 2;
}
template <int GROUP, bool PACKED>
constexpr auto LANE_OF = [] {  // of each group
    std::array<int, LANES> lanes = {};
    for (int lane = 0; lane < LANES; lane++) lanes[group_of(lane, GROUP, PACKED)] = lane;
    return lanes;
}();

// A vector whose lanes are of(group) of their groups.
template <class Result, int GROUP, bool PACKED = false, class Of>
__attribute__((always_inline)) inline Result by_group(Of of) {
    return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        return Result{of(std::integral_constant<int, group_of(I, GROUP, PACKED)>())...};
    }(std::make_integer_sequence<int, LANES>());
}

inline Unsigned lower_nibbles(Unsigned bytes) { return bytes & 0x0f0f0f0f; }
inline Unsigned upper_nibbles(Unsigned bytes) {
#if LANES_OF_INTEGERS == 16 && defined(__GFNI__)
    return (Unsigned)_mm512_gf2p8affine_epi64_epi8((__m512i)bytes, _mm512_set1_epi64(0x1020408000000000), 0);
#else
    return bytes >> 4 & 0x0f0f0f0f;
#endif
}

// GROUP / 4 vectors of codes, column by column (PACKED: half as many, of bytes), into as many whose lanes are groups, four
// columns of each.
template <int GROUP, bool PACKED>
__attribute__((always_inline)) inline void transpose(Unsigned* codes) {
    constexpr int VECTORS = GROUP / (PACKED ? 8 : 4);
#if defined(__AVX2__)
    for (int i = 0; i < VECTORS; i += 4) transpose_quarters(codes + i);
    for (int i = 0; VECTORS == 8 && i < 4; i++) {
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
    uint32_t words[LANES * VECTORS];
    std::memcpy(words, codes, sizeof words);
    for (int i = 0; i < VECTORS; i++)
        codes[i] = by_group<Unsigned, GROUP, PACKED>([&](auto group) { return words[group * VECTORS + i]; });
#endif
    for (int i = 0; PACKED && i < VECTORS; i++)
        codes[VECTORS + i] = upper_nibbles(codes[i]), codes[i] = lower_nibbles(codes[i]);
}

// LANES groups of a row. The numbers are (code - offset) · scale + minimum.
template <int GROUP>
struct Chunk {
    Unsigned codes[GROUP / 4];
    Vector scale, minimum;

    static constexpr int64_t COLUMNS = LANES * GROUP;
    static int64_t count(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; }
};

// Activations. Of n, in whole chunks: for AMX their high bytes group by group, then their low ones; for each chunk a vector of
// the groups' scales, of their sums, and of their sums as whole numbers times -8; then all as words of 16 bits, of each four
// columns 0, 2, 1, 3; then [chunks, GROUP / 4] vectors `a` and `b` (see ExactSum), arranged as the codes of a chunk are.
template <int GROUP, bool PACKED>
struct GroupedInputs {
    static constexpr int64_t BYTES = 4 * LANES, CHUNK_BYTES = GROUP / 4 * BYTES;
    static constexpr float MOST = 32639;  // 127 · 256 + 127

    struct Places {
        int64_t chunks, scale, sum, whole, words, a, b, end;
        explicit Places(int64_t n)
            : chunks(Chunk<GROUP>::count(n)), scale(side_by_side(chunks)), sum(scale + chunks * BYTES),
              whole(sum + chunks * BYTES), words(whole + chunks * BYTES), a(words + 2 * chunks * CHUNK_BYTES),
              b(a + chunks * CHUNK_BYTES), end(rounded_up(b + chunks * CHUNK_BYTES, LINE_BYTES) + LINE_BYTES) {}
        static int64_t side_by_side(int64_t chunks) {
#if AMX
            return SideBySide<GROUP>(chunks).bytes;
#endif
            return 0;
        }
    };
    static int64_t bytes(int64_t n) { return Places(n).end; }

    static void prepare(const float* x, int64_t n, char* out) {
        const Places places(n);
        for (int64_t group = 0; group < places.chunks * LANES; group++) {
            const int64_t column = group * GROUP, at = group / LANES, lane = LANE_OF<GROUP, PACKED>[group % LANES];
            alignas(64) float padded[GROUP];
            const float* from = x + column;
            if (column + GROUP > n) {
                std::memset(padded, 0, sizeof padded);
                if (column < n) std::memcpy(padded, from, (n - column) * sizeof(float));
                from = padded;
            }
            Integers most = {};  // as bits, so that what is not finite is larger than all else
            for (int i = 0; i < GROUP; i += LANES) {
                const Integers size = (Integers)load(from + i) & 0x7fffffff;
                most = size > most ? size : most;
            }
            const int32_t bits = largest(most);
            const float scale = read<float>(&bits) / MOST, inverse = scale >= FLT_MIN && scale < INFINITY ? 1 / scale : 0;
            alignas(64) int32_t whole[GROUP];
            Integers total = {};
            for (int i = 0; i < GROUP; i += LANES) {
                const Vector rounded = load(from + i) * inverse + ROUND;
                const Integers q = (Integers)rounded - (Integers)(Vector{} + ROUND);
                std::memcpy(whole + i, &q, sizeof q);
                total += q;
            }
            alignas(64) int16_t placed[GROUP];
            for (int i = 0; i < GROUP / 2 && PACKED; i++) placed[i] = whole[2 * i], placed[GROUP / 2 + i] = whole[2 * i + 1];
            for (int i = 0; i < GROUP && !PACKED; i++) placed[i] = whole[i];
            alignas(64) char a[GROUP], b[GROUP];
            ExactSum::place<GROUP>(placed, a, b);
            uint64_t fours[GROUP / 4];
            std::memcpy(fours, placed, sizeof fours);
            for (auto& four : fours)
                four = (four & 0xffff00000000ffff) | (four & 0xffff0000) << 16 | (four >> 16 & 0xffff0000);
            std::memcpy(out + places.words + 2 * column, fours, sizeof fours);
            char* to = out + at * CHUNK_BYTES + 4 * lane;
            for (int i = 0; i < GROUP / 4; i++) {
                std::memcpy(to + i * BYTES + places.a, a + 4 * i, 4);
                std::memcpy(to + i * BYTES + places.b, b + 4 * i, 4);
            }
            const int64_t place = at * LANES + lane;
            const int32_t sum_of_whole = ::sum(total);
            ((float*)(out + places.scale))[place] = scale;
            ((int32_t*)(out + places.whole))[place] = -8 * sum_of_whole;
            ((float*)(out + places.sum))[place] = float(sum_of_whole) * scale;
        }
    }

#if AMX
    // What `prepare` made of `count` consecutive tokens, at most SIDE, side by side.
    static void put_beside(char* x, int64_t n, int64_t count) {
        if (!choice.amx) return;
        const Places places(n);
        const SideBySide<GROUP> lines(places.chunks);
        for (int64_t at = 0; at < places.chunks; at++) {
            auto put = [&](int64_t from, auto line) {
                Unsigned v[SIDE];  // behind `count` whatever is there
                for (int64_t k = 0; k < SIDE; k++) v[k] = read<Unsigned>(x + k * places.end + from);
                transpose(v);
                for (int lane = 0; lane < LANES; lane++) std::memcpy(x + line(lane), v + lane, sizeof *v);
            };
            for (int64_t i = 0; i < GROUP / 2; i++) {  // high bytes, then low ones
                const int64_t from = i < GROUP / 4 ? places.a + i * BYTES : places.b + (i - GROUP / 4) * BYTES;
                put(from + at * CHUNK_BYTES, [&](int lane) { return lines.high(lane, at, places.end) + i * places.end; });
            }
            put(places.scale + at * BYTES, [&](int lane) { return lines.scale(lane, at, places.end); });
            put(places.sum + at * BYTES, [&](int lane) { return lines.sum(lane, at, places.end); });
        }
        for (int64_t k = 0; k < count; k++) ((int32_t*)(x + (k + 1) * places.end))[-1] = k;
    }
    // Whether such neighbours begin here.
    static bool side_by_side(const char* const* x, int64_t count, int64_t n) {
        const Places places(n);
        bool found = ((const int32_t*)(x[0] + places.end))[-1] == 0;
        for (int64_t i = 1; i < count; i++) found = found && x[i] - x[i - 1] == places.end;
        return found;
    }
#endif

    // The numbers that they stand for.
    static void values(const char* x, int64_t n, float* out) {
        const Places places(n);
        for (int64_t group = 0; group * GROUP < n; group++)
            for (int i = 0; i < GROUP; i++) {
                const int placed = i / 4 * 4 + i % 2 * 2 + i / 2 % 2;
                const int in_group = !PACKED ? placed : placed < GROUP / 2 ? 2 * placed : 2 * placed - GROUP + 1;
                const int64_t column = group * GROUP + in_group;
                const int64_t place = group / LANES * LANES + LANE_OF<GROUP, PACKED>[group % LANES];
                const float word = ((const int16_t*)(x + places.words))[group * GROUP + i];
                if (column < n) out[column] = word * ((const float*)(x + places.scale))[place];
            }
    }

    // What R rows and N tokens add to their accumulators in chunk `at`.
    template <class Type, int R, int N, int ALL>
    __attribute__((always_inline)) static void meet(const Chunk<GROUP> (&w)[R], const char* const* x, int64_t at,
                                                    const Places& places, Vector (*total)[ALL], int first) {
        ExactSum sums[N][R];
        each<N>([&](auto k) __attribute__((always_inline)) {
            if (!Type::OFFSET) return;
            const Integers whole = read<Integers>(x[k] + at * BYTES + places.whole) * (Type::OFFSET / 8);
            for (auto& sum : sums[k]) sum.start(whole);
        });
        each<GROUP / 4>([&](auto i) __attribute__((always_inline)) {
            each<N>([&](auto k) __attribute__((always_inline)) {
                const char* from = x[k] + at * CHUNK_BYTES + i * BYTES;
                const Integers a = read<Integers>(from + places.a), b = read<Integers>(from + places.b);
                each<R>([&](auto r) __attribute__((always_inline)) { sums[k][r].add(w[r].codes[i], a, b); });
            });
        });
        each<N>([&](auto k) __attribute__((always_inline)) {
            const char* rest = x[k] + at * BYTES;
            const Vector scale = read<Vector>(rest + places.scale);
            each<R>([&](auto r) __attribute__((always_inline)) {
                Vector& to = total[k][first + r];
                to = fma(__builtin_convertvector(sums[k][r].whole(), Vector) * scale, w[r].scale, to);
                if (Type::MINIMA) to = fma(w[r].minimum, read<Vector>(rest + places.sum), to);
            });
        });
    }
};

// LANES rows, or as many as there are from `first` on, of codes in 16 bits with their sign, for many tokens: [groups, GROUP / 2,
// rows, 2] weights (of each four columns 0 and 2, then 1 and 3), [groups, rows] scales and minima.
template <class Type>
struct Panel {
    static constexpr int GROUP = Type::GROUP;
    static constexpr bool PACKED = Type::PACKED;
    typedef GroupedInputs<GROUP, PACKED> Form;
    const typename Form::Places places;
    const int64_t groups;
    char* const weights;
    Vector *const scales, *const minima;
    char* const end;

    Panel(const Type& type, const Rows& w, int64_t first, int64_t rows, char* memory)
        : places(w.columns), groups(w.columns / GROUP), weights(memory),
          scales((Vector*)(weights + places.chunks * Chunk<GROUP>::COLUMNS * LANES * 2)),
          minima(scales + places.chunks * LANES), end((char*)(minima + Type::MINIMA * places.chunks * LANES)) {
        for (int64_t at = 0; at < places.chunks; at++) {
            Unsigned codes[GROUP / 4][LANES], scale[LANES], minimum[LANES];
            for (int r = 0; r < LANES; r++) {
                Chunk<GROUP> chunk;
                type.unpack(from_row(w, std::min(first + r, rows - 1)), at, chunk);
                for (int i = 0; i < GROUP / (PACKED ? 8 : 4); i++) codes[i][r] = chunk.codes[i];
                scale[r] = (Unsigned)chunk.scale;
                if (Type::MINIMA) minimum[r] = (Unsigned)chunk.minimum;
            }
            for (int i = 0; i < GROUP / (PACKED ? 8 : 4); i++) {
                ::transpose(codes[i]);
                for (int j = 0; j < LANES; j++) {
                    const int64_t begin = at * Chunk<GROUP>::COLUMNS / 4, place = i * LANES + j;
                    if constexpr (PACKED) {
                        put(begin + place / 4 * 8 + place % 4, lower_nibbles(codes[i][j]));
                        put(begin + place / 4 * 8 + place % 4 + 4, upper_nibbles(codes[i][j]));
                    } else {
                        put(begin + place, codes[i][j]);
                    }
                }
            }
            spread(scale, scales + at * LANES);
            if (Type::MINIMA) spread(minimum, minima + at * LANES);
        }
    }

    void put(int64_t place, Unsigned codes) const {
        typedef int16_t Words __attribute__((vector_size(4 * LANES)));
        const Words even = (Words)(codes & 0x00ff00ff) - int16_t(Type::OFFSET);
        const Words odd = (Words)(codes >> 8 & 0x00ff00ff) - int16_t(Type::OFFSET);
        char* to = weights + place * 8 * LANES;
        std::memcpy(to, &even, sizeof even), std::memcpy(to + sizeof even, &odd, sizeof odd);
    }
    static void spread(Unsigned (&of_rows)[LANES], Vector* to) {
        ::transpose(of_rows);
        for (int lane = 0; lane < LANES; lane++) to[group_of(lane, GROUP, PACKED)] = (Vector)of_rows[lane];
    }

    // A token's number for a group, in all lanes.
    __attribute__((always_inline)) Vector all(const char* x, int64_t array, int64_t group) const {
        const int64_t place = group / LANES * LANES + LANE_OF<GROUP, PACKED>[group % LANES];
        return (Vector)(Integers{} + ((const int32_t*)(x + array))[place]);
    }
    // `total` with a group's sum in it.
    __attribute__((always_inline)) Vector meet(const char* x, int64_t group, Integers whole, Vector total) const {
        total = fma(__builtin_convertvector(whole, Vector) * all(x, places.scale, group), scales[group], total);
        return Type::MINIMA ? fma(minima[group], all(x, places.sum, group), total) : total;
    }

    // y[N, COUNT · LANES] of a [N, ROWS] array = the products of N tokens with COUNT panels. Groups of the same lane follow
    // one another, so that their totals stay in registers; lanes are added up as in sum(Vector).
    template <int COUNT, int N>
    static void multiply(const Panel* panels, const char* const* x, float* y) {
        Vector total[N][COUNT], waiting[4][N][COUNT];
        for (int i = 0; i < LANES; i++) {
            int lane = 0;
            for (int bit = 1; bit < LANES; bit *= 2) lane = 2 * lane + (i & bit ? 1 : 0);
            each<N>([&](auto k) __attribute__((always_inline)) { for (auto& some : total[k]) some = Vector{}; });
            for (int64_t group = group_of(lane, GROUP, PACKED); group < panels->groups; group += LANES) {
                Integers sums[N][COUNT] = {};
#pragma GCC unroll 4
                for (int j = 0; j < GROUP / 2; j++) {
                    Integers codes[COUNT];
                    each<COUNT>([&](auto p) __attribute__((always_inline)) {
                        codes[p] = read<Integers>(panels[p].weights + (group * GROUP / 2 + j) * 4 * LANES);
                    });
                    each<N>([&](auto k) __attribute__((always_inline)) {
                        const char* words = x[k] + panels->places.words + group * GROUP * 2;
                        const Integers two = Integers{} + ((const int32_t*)words)[j];
                        each<COUNT>([&](auto p) __attribute__((always_inline)) { sums[k][p] = dot_words(sums[k][p], codes[p], two); });
                    });
                }
                each<N>([&](auto k) __attribute__((always_inline)) {
                    each<COUNT>([&](auto p) __attribute__((always_inline)) {
                        total[k][p] = panels[p].meet(x[k], group, sums[k][p], total[k][p]);
                    });
                });
            }
            int level = 0;
            for (; i >> level & 1; level++)
                for (int k = 0; k < N; k++)
                    for (int p = 0; p < COUNT; p++) total[k][p] = waiting[level][k][p] + total[k][p];
            if (i < LANES - 1) std::memcpy(waiting[level], total, sizeof total);
        }
        for (int k = 0; k < N; k++)
            for (int p = 0; p < COUNT; p++) store(y + k * ROWS + p * LANES, total[k][p]);
    }

};

#if AMX
// SIDE rows, or as many as there are from `first` on, in bytes with their sign, as tiles take them.
template <class Type>
struct TileRows {
    static constexpr int GROUP = Type::GROUP;
    static constexpr bool PACKED = Type::PACKED;
    typedef GroupedInputs<GROUP, PACKED> Form;
    const typename Form::Places places;
    const SideBySide<GROUP> lines;
    const int64_t groups, stride;    // of codes: rows begin in different sets of the cache
    char* const codes;               // [SIDE, stride]
    float *const scales, *const minima;  // [SIDE, chunks, lanes]

    TileRows(const Type& type, const Rows& w, int64_t first, int64_t rows, char* memory)
        : places(w.columns), lines(places.chunks), groups(w.columns / GROUP), stride(places.chunks * Chunk<GROUP>::COLUMNS + 64),
          codes(memory), scales((float*)(codes + SIDE * stride)), minima(scales + SIDE * places.chunks * LANES) {
        for (int64_t r = 0; r < SIDE; r++)
            for (int64_t at = 0; at < places.chunks; at++) {
                Chunk<GROUP> chunk;
                type.unpack(from_row(w, std::min(first + r, rows - 1)), at, chunk);
                char* to = codes + r * stride + at * Chunk<GROUP>::COLUMNS;
                each<GROUP / (PACKED ? 8 : 4)>([&](auto i) __attribute__((always_inline)) {
                    if constexpr (PACKED) {
                        const __m512i low = with_sign(lower_nibbles(chunk.codes[i])), high = with_sign(upper_nibbles(chunk.codes[i]));
                        const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
                        _mm512_storeu_si512(to + 128 * i, _mm512_permutex2var_epi64(low, first, high));
                        _mm512_storeu_si512(to + 128 * i + 64, _mm512_permutex2var_epi64(low, second, high));
                    } else {
                        _mm512_storeu_si512(to + 64 * i, with_sign(chunk.codes[i]));
                    }
                });
                store(scales + (r * places.chunks + at) * LANES, chunk.scale);
                if (Type::MINIMA) store(minima + (r * places.chunks + at) * LANES, chunk.minimum);
            }
    }
    static __m512i with_sign(Unsigned codes) { return _mm512_sub_epi8((__m512i)codes, _mm512_set1_epi8(Type::OFFSET)); }

    // y[count, SIDE] of a [count, ROWS] array = the products with up to SIDE tokens that are side by side. While vectors
    // take in one group's sums, the tiles are at work on the next group.
    void multiply(const char* x, int64_t count, float* y) const {
        alignas(64) Integers sums[2][2][SIDE];
        Vector total[SIDE], waiting[4][SIDE];
        const auto there = __mmask16((1 << count) - 1);
        auto group_in = [&](int lane, int64_t chunk) { return chunk * LANES + group_of(lane, GROUP, PACKED); };
        int next_lane = 0;  // in their order; and the chunk that the tiles are at
        int64_t next_chunk = 0;
        auto start = [&](auto turn) __attribute__((always_inline)) {
            constexpr int ABOVE = 2 * turn, BELOW = ABOVE + 1;
            int lane = lines.order(next_lane);
            while (group_in(lane, next_chunk) >= groups) {
                if (++next_lane == LANES) return;
                lane = lines.order(next_lane), next_chunk = 0;
            }
            const char* high = x + lines.high(lane, next_chunk, places.end);
            zero_tile<ABOVE>(), zero_tile<BELOW>();
            load_tile<4>(codes + group_in(lane, next_chunk) * GROUP, stride);
            load_tile<6>(high, places.end), load_tile<7>(high + GROUP / 4 * places.end, places.end);
            multiply_tiles<ABOVE, 4, 6>(), multiply_tiles<BELOW, 4, 7>();
            next_chunk++;
        };
        auto put = [&](auto turn) __attribute__((always_inline)) {
            store_tile<2 * turn>(sums[turn][0]), store_tile<2 * turn + 1>(sums[turn][1]);
        };
        const std::integral_constant<int, 0> even;
        const std::integral_constant<int, 1> odd;
        start(even), put(even);
        if (next_lane < LANES) start(odd);
        bool at_odd = false;
        for (int i = 0; i < LANES; i++) {
            const int lane = lines.order(i);
            each<SIDE>([&](auto r) __attribute__((always_inline)) { total[r] = Vector{}; });
            auto take = [&](int64_t chunk, auto turn) __attribute__((always_inline)) {
                put(std::integral_constant<int, 1 - turn>());
                if (next_lane < LANES) start(turn);
                const auto scale = (Vector)_mm512_maskz_loadu_ps(there, x + lines.scale(lane, chunk, places.end));
                const auto sum = Type::MINIMA ? (Vector)_mm512_maskz_loadu_ps(there, x + lines.sum(lane, chunk, places.end)) : scale;
                const int64_t place = chunk * LANES + lane;
                each<SIDE>([&](auto r) __attribute__((always_inline)) {
                    const Integers whole = (sums[turn][0][r] << 8) + sums[turn][1][r];
                    const Vector weights = Vector{} + scales[r * places.chunks * LANES + place];
                    total[r] = fma(__builtin_convertvector(whole, Vector) * scale, weights, total[r]);
                    if (Type::MINIMA) total[r] = fma(Vector{} + minima[r * places.chunks * LANES + place], sum, total[r]);
                });
            };
            for (int64_t chunk = 0; group_in(lane, chunk) < groups; chunk++, at_odd = !at_odd)
                at_odd ? take(chunk, odd) : take(chunk, even);
            int level = 0;
            for (; i >> level & 1; level++)
                each<SIDE>([&](auto r) __attribute__((always_inline)) { total[r] = waiting[level][r] + total[r]; });
            if (i < LANES - 1) each<SIDE>([&](auto r) __attribute__((always_inline)) { waiting[level][r] = total[r]; });
        }
        Unsigned by_token[SIDE];
        each<SIDE>([&](auto r) __attribute__((always_inline)) { by_token[r] = (Unsigned)total[r]; });
        ::transpose(by_token);
        for (int64_t k = 0; k < count; k++) store(y + k * ROWS, (Vector)by_token[k]);
    }
};
#endif

// Rows where they lie. A type of weights has
//
//     GROUP, PACKED, OFFSET, MINIMA   see Chunk and group_of
//     ROWS                            that one token may read together
//     unpack(w, at, chunk)            chunk `at` of the first row of w, its codes column by column (PACKED: as they are)
//     fetch(w, at, ahead)             prefetches the lines `ahead` bytes in front of that chunk
template <class Type>
struct Grouped : GroupedInputs<Type::GROUP, Type::PACKED> {
    static constexpr int ROWS = Type::ROWS, TOKENS = 4, GROUP = Type::GROUP;
    typedef GroupedInputs<GROUP, Type::PACKED> Form;
    const Type type;
    explicit Grouped(const Rows& w) : type(w) {}

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, int64_t ahead, Vector total[N][R]) const {
        const typename Form::Places places(w.columns);
        constexpr int SOME = N == 1 && LANES == 16 ? std::min(R, 2) : 1;  // rows whose codes the registers hold
        for (int64_t at = 0; at < places.chunks; at++)
            each<R / SOME>([&](auto part) __attribute__((always_inline)) {
                Chunk<GROUP> chunks[SOME];
                each<SOME>([&](auto r) __attribute__((always_inline)) {
                    const Rows row = from_row(w, part * SOME + r);
                    if (ahead) type.fetch(row, at, ahead);
                    type.unpack(row, at, chunks[r]);
                    transpose<GROUP, Type::PACKED>(chunks[r].codes);
                });
                Form::template meet<Type, SOME, N>(chunks, x, at, places, total, part * SOME);
            });
    }
    static float finish(const Rows&, int, float y) { return y; }

    static constexpr int64_t MANY = LANES < 16 ? 5 : ROWS == 1 ? ::MANY : 9;  // tokens from which rows are unpacked once
    static void multiply_all(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float* scratch) {
        if (count < MANY) return ::multiply<Grouped>(w, rows, x, count, y);
        const Type type(w);
#if AMX
        if (choice.amx && Form::side_by_side(x, count, w.columns)) {
            const uint8_t pieces = GROUP / 4;
            const TileRegisters registers({SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, pieces, pieces}, {64, 64, 64, 64, GROUP, GROUP, 64, 64});
            for (int64_t row = 0; row < rows; row += SIDE) {
                const TileRows<Type> some(type, w, row, rows, (char*)scratch);
                for (int64_t i = 0; i < count; i += SIDE)
                    some.multiply(x[i], std::min<int64_t>(count - i, SIDE), y + i * ::ROWS + row);
            }
            return;
        }
#endif
        constexpr int MOST = LANES == 8 ? 6 : 8;  // what the registers hold sums of
        in_panels<MOST>(rows, x, count, y, (char*)scratch, [&](int64_t first, char* memory) {
            return Panel<Type>(type, w, first, rows, memory);
        });
    }
};

// Rows in blocks of Type::BLOCK columns and Type::BYTES bytes.
//
//     codes<I>(p, first)             vector I of a chunk, column by column; p: the block in which it begins,
//     scales(p, first), minima(…)    with the group `first` of that block
template <class Type>
struct InBlocks : Type {
    using Type::GROUP;
    static constexpr bool PACKED = false;
    static constexpr int ROWS = 1;
    static constexpr int64_t GROUPS = Type::BLOCK / GROUP;                         // of a block
    static constexpr int64_t BYTES = (LANES + GROUPS - 1) / GROUPS * Type::BYTES;  // of a chunk, at least
    explicit InBlocks(const Rows&) {}

    __attribute__((always_inline)) void unpack(const Rows& w, int64_t at, Chunk<GROUP>& to) const {
        const int64_t begin = at * LANES / GROUPS, first = GROUPS > LANES ? at * LANES % GROUPS : 0;
        const int64_t left = w.columns / Type::BLOCK - begin;
        const char* p = w.weight + begin * Type::BYTES;
        alignas(64) char last[BYTES];
        if (BYTES > Type::BYTES && left * Type::BYTES < BYTES) {
            std::memset(last, 0, sizeof last);
            p = (const char*)std::memcpy(last, p, left * Type::BYTES);
        }
        each<GROUP / 4>([&](auto i) __attribute__((always_inline)) { to.codes[i] = Type::template codes<i>(p, first); });
        to.scale = Type::scales(p, first);
        if constexpr (Type::MINIMA) to.minimum = Type::minima(p, first);
    }
    __attribute__((always_inline)) void fetch(const Rows& w, int64_t at, int64_t ahead) const {
        for (int64_t line = 0; line < BYTES; line += 64)
            __builtin_prefetch(w.weight + at * LANES / GROUPS * Type::BYTES + line + ahead);
    }

    static void numbers(const char* row, int64_t columns, float* out) {
        const Rows w = {row, nullptr, 0, columns, 0, {}};
        for (int64_t at = 0; at < Chunk<GROUP>::count(columns); at++) {
            Chunk<GROUP> chunk;
            InBlocks(w).unpack(w, at, chunk);
            transpose<GROUP, PACKED>(chunk.codes);
            for (int lane = 0; lane < LANES; lane++) {
                const int64_t begin = at * Chunk<GROUP>::COLUMNS + group_of(lane, GROUP) * GROUP;
                for (int i = 0; i < GROUP && begin < columns; i++) {
                    const int code = chunk.codes[i / 4][lane] >> i % 4 * 8 & 255;
                    const float number = float(code - Type::OFFSET) * chunk.scale[lane];
                    out[begin + i] = Type::MINIMA ? number + chunk.minimum[lane] : number;
                }
            }
        }
    }
};

template <class Kind>
constexpr decltype(Products::put_beside) beside() {
#if AMX
    return Kind::put_beside;
#else
    return nullptr;
#endif
}

template <class Type>
constexpr Products blocks_of() {
    typedef Grouped<InBlocks<Type>> Kind;
    return {Kind::bytes, Kind::prepare, Kind::multiply_all, InBlocks<Type>::numbers, nullptr, beside<Kind>()};
}
