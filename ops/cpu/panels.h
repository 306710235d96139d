// Codes in groups, unpacked once for many tokens: see groups.h.
#pragma once
#include "chunks.h"

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
                        constexpr int HALF = GROUP / 8;  // of a group
                        put(begin + place / HALF * 2 * HALF + place % HALF, lower_nibbles(codes[i][j]));
                        put(begin + place / HALF * 2 * HALF + place % HALF + HALF, upper_nibbles(codes[i][j]));
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

    int64_t steps() const { return groups; }

    // y[N, COUNT · LANES] of a [N, ROWS] array = the products of N tokens with COUNT panels. Groups of the same lane follow
    // one another, so that their totals stay in registers; lanes are added up as in sum(Vector).
    template <int COUNT, int N>
    static void multiply(const Panel* panels, const char* const* x, float* y, Following& following) {
        Vector total[N][COUNT], waiting[4][N][COUNT];
        for (int i = 0; i < LANES; i++) {
            int lane = 0;
            for (int bit = 1; bit < LANES; bit *= 2) lane = 2 * lane + (i & bit ? 1 : 0);
            each<N>([&](auto k) __attribute__((always_inline)) { for (auto& some : total[k]) some = Vector{}; });
            for (int64_t group = group_of(lane, GROUP, PACKED); group < panels->groups; group += LANES) {
                following.fetch();
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
                        const __m512i first = GROUP == 32 ? _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11) : _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
                        const __m512i second = first + 4;
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
    void multiply(const char* x, int64_t count, float* y, Following& following) const {
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
                following.fetch();
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
