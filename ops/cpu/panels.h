// Codes in groups, unpacked once for many tokens: see groups.h.
#pragma once
#include "chunks.h"

// LANES rows, or as many as there are from `first` on, of codes in 16 bits with their sign, for many tokens: [groups, GROUP / 2,
// rows, 2] weights (of each four columns 0 and 2, then 1 and 3), [groups, rows] scales and minima. Groups of the same lane of
// a chunk follow one another, lanes in the order of by_lane.
template <class Type>
struct Panel {
    static constexpr int GROUP = Type::GROUP;
    static constexpr int MOST = LANES == 8 ? 6 : 8;  // tokens of a tile: what the registers hold sums of
    static constexpr bool PACKED = Type::PACKED;
    typedef InputsOf<Type> Form;
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
                    const int place = i * LANES + j;  // of four columns, or of four bytes
                    if constexpr (PACKED) {
                        constexpr int HALF = GROUP / 8;  // of a group
                        const int64_t to = place_of(at, place / HALF) * 2 * HALF + place % HALF;
                        put(to, lower_nibbles(codes[i][j])), put(to + HALF, upper_nibbles(codes[i][j]));
                    } else {
                        put(place_of(at, place / (GROUP / 4)) * (GROUP / 4) + place % (GROUP / 4), codes[i][j]);
                    }
                }
            }
            spread(scale, at, scales);
            if (Type::MINIMA) spread(minimum, at, minima);
        }
    }

    void put(int64_t place, Unsigned codes) const {
        typedef int16_t Words __attribute__((vector_size(4 * LANES)));
        const Words even = (Words)(codes & 0x00ff00ff) - int16_t(Type::OFFSET);
        const Words odd = (Words)(codes >> 8 & 0x00ff00ff) - int16_t(Type::OFFSET);
        char* to = weights + place * 8 * LANES;
        std::memcpy(to, &even, sizeof even), std::memcpy(to + sizeof even, &odd, sizeof odd);
    }
    int64_t place_of(int64_t chunk, int group) const { return lane_in_order(LANE_OF<GROUP, PACKED>[group]) * places.chunks + chunk; }
    void spread(Unsigned (&of_rows)[LANES], int64_t chunk, Vector* to) const {
        ::transpose(of_rows);
        for (int lane = 0; lane < LANES; lane++) to[lane_in_order(lane) * places.chunks + chunk] = (Vector)of_rows[lane];
    }

    int64_t steps() const { return groups; }  // of a tile

    // y[count, COUNT · LANES] of a [count, ROWS] array = the products of some tokens with COUNT panels.
    template <int COUNT>
    static void multiply(const Panel* panels, const char* const* x, int64_t count, float* y, Following& following) {
        const auto& places = panels->places;
        by_lane<MOST, COUNT>(count, y, [&](int lane, int64_t first, auto& total) __attribute__((always_inline)) {
            constexpr int N = sizeof total / sizeof *total;
            for (int64_t chunk = 0; chunk * LANES + group_of(lane, GROUP, PACKED) < panels->groups; chunk++) {
                following.fetch();
                const int64_t place = lane_in_order(lane) * places.chunks + chunk, group = chunk * LANES + group_of(lane, GROUP, PACKED);
                Integers sums[N][COUNT] = {};
#pragma GCC unroll 4
                for (int j = 0; j < GROUP / 2; j++) {
                    Integers codes[COUNT];
                    each<COUNT>([&](auto p) __attribute__((always_inline)) {
                        codes[p] = in_register(read<Integers>(panels[p].weights + (place * GROUP / 2 + j) * 4 * LANES));
                    });
                    each<N>([&](auto k) __attribute__((always_inline)) {
                        const Integers two = Integers{} + read<int32_t>(x[first + k] + places.words + group * GROUP * 2 + 4 * j);
                        each<COUNT>([&](auto p) __attribute__((always_inline)) { sums[k][p] = dot_words(sums[k][p], codes[p], two); });
                    });
                }
                each<N>([&](auto k) __attribute__((always_inline)) {
                    const float* rest = (const float*)x[first + k] + chunk * LANES + lane;
                    const Vector scale = load_to_all(rest + places.scale / 4), sum = load_to_all(rest + places.sum / 4);
                    each<COUNT>([&](auto p) __attribute__((always_inline)) {
                        total[k][p] = fma(__builtin_convertvector(sums[k][p], Vector) * scale, panels[p].scales[place], total[k][p]);
                        if (Type::MINIMA) total[k][p] = fma(panels[p].minima[place], sum, total[k][p]);
                    });
                });
            }
        });
    }
};

#if AMX
// SIDE rows, or as many as there are from `first` on, in bytes with their sign, as tiles take them.
template <class Type>
struct TileRows {
    static constexpr int GROUP = Type::GROUP;
    static constexpr bool PACKED = Type::PACKED;
    typedef InputsOf<Type> Form;
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
            int lane = lane_in_order(next_lane);
            while (group_in(lane, next_chunk) >= groups) {
                if (++next_lane == LANES) return;
                lane = lane_in_order(next_lane), next_chunk = 0;
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
            const int lane = lane_in_order(i);
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
                    const Vector weights = load_to_all(scales + r * places.chunks * LANES + place);
                    total[r] = fma(__builtin_convertvector(whole, Vector) * scale, weights, total[r]);
                    if (Type::MINIMA) total[r] = fma(load_to_all(minima + r * places.chunks * LANES + place), sum, total[r]);
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
