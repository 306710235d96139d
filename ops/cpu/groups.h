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
//                            lanes, are transposed in registers when they are met (chunks.h)
//     many tokens            each lane is a row: 16 bits for each code, transposed once for all tokens (panels.h), meet
//                            activations that are spread over all lanes
//     many tokens, with AMX  each lane is a token: rows as they lie, 8 bits for each code (panels.h), meet activations of
//                            16 tokens side by side (amx.h)
#pragma once
#include "panels.h"

// Rows where they lie. A type of weights has
//
//     BITS, GROUP, PACKED             see in_bytes, Chunk and group_of
//     OFFSET, MINIMA                  see Chunk
//     ROWS                            that one token may read together
//     unpack(w, at, chunk)            chunk `at` of the first row of w, its codes column by column (PACKED: as they are)
//     unpack_by_group(w, at, chunk)   the same, as `transpose` leaves codes
//     fetch(w, at, ahead)             prefetches the lines that far in front of that chunk
template <class Type>
struct Grouped : InputsOf<Type> {
    static constexpr int ROWS = Type::ROWS, TOKENS = 4, GROUP = Type::GROUP;
    typedef InputsOf<Type> Form;
    const Type type;
    const typename Form::Places places;
    explicit Grouped(const Rows& w) : type(w), places(w.columns) {}

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, auto& ahead, Vector total[N][R]) const {
        constexpr int SOME = N == 1 && LANES == 16 ? std::min(R, 2) : 1;  // rows whose codes the registers hold
        for (int64_t at = 0; at < places.chunks; at++)
            each<R / SOME>([&](auto part) __attribute__((always_inline)) {
                Chunk<GROUP> chunks[SOME];
                each<SOME>([&](auto r) __attribute__((always_inline)) {
                    const Rows row = from_row(w, part * SOME + r);
                    type.fetch(row, at, ahead);
                    type.unpack_by_group(row, at, chunks[r]);
                });
                Form::template meet<Type, SOME, N>(chunks, x, at, places, total, part * SOME);
            });
    }
    static float finish(const Rows&, int, float y) { return y; }

    static constexpr int32_t MANY = LANES < 16 ? 5 : ROWS == 1 ? 7 : 9;
    static void multiply_all(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float* scratch) {
        if (!w.many) return ::multiply<Grouped>(w, rows, x, count, y);
        const Type type(w);
#if AMX
        if (choice.amx && Form::side_by_side(x, count, w.columns)) {
            const uint8_t pieces = GROUP / 4;
            const TileRegisters registers({SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, pieces, pieces}, {64, 64, 64, 64, GROUP, GROUP, 64, 64});
            for (int64_t row = 0; row < rows; row += SIDE) {
                const TileRows<Type> some(type, w, row, rows, (char*)scratch);
                Following following(w, rows, row, SIDE, (count + SIDE - 1) / SIDE * some.groups);
                for (int64_t i = 0; i < count; i += SIDE)
                    some.multiply(x[i], std::min<int64_t>(count - i, SIDE), y + i * ::ROWS + row, following);
            }
            return;
        }
#endif
        in_panels(w, rows, x, count, y, (char*)scratch, [&](int64_t first, char* memory) {
            return Panel<Type>(type, w, first, rows, memory);
        });
    }
};

// Rows in blocks of Type::BLOCK columns and Type::BYTES bytes.
//
//     codes<I>(p, first)             vector I of a chunk, column by column; p: the block in which it begins,
//     scales(p, first), minima(…)    with the group `first` of that block
//     codes_by_group(p, codes)       all of them as `transpose` leaves them, where there is a shorter way
template <class Type>
struct InBlocks : Type {
    using Type::GROUP;
    static constexpr bool PACKED = false;
    static constexpr int ROWS = 1;
    static constexpr int64_t GROUPS = Type::BLOCK / GROUP;                         // of a block
    static constexpr int64_t BYTES = (LANES + GROUPS - 1) / GROUPS * Type::BYTES;  // of a chunk, at least
    explicit InBlocks(const Rows&) {}

    __attribute__((always_inline)) void unpack(const Rows& w, int64_t at, Chunk<GROUP>& to) const {
        from_blocks(w, at, to, [&](const char* p, int first) __attribute__((always_inline)) {
            each<GROUP / 4>([&](auto i) __attribute__((always_inline)) { to.codes[i] = Type::template codes<i>(p, first); });
        });
    }
    __attribute__((always_inline)) void unpack_by_group(const Rows& w, int64_t at, Chunk<GROUP>& to) const {
        if constexpr (requires(const char* p) { Type::codes_by_group(p, to.codes); })
            from_blocks(w, at, to, [&](const char* p, int) __attribute__((always_inline)) { Type::codes_by_group(p, to.codes); });
        else
            unpack(w, at, to), transpose<GROUP, PACKED>(to.codes);
    }
    template <class Codes>
    __attribute__((always_inline)) void from_blocks(const Rows& w, int64_t at, Chunk<GROUP>& to, Codes codes) const {
        const int64_t begin = at * LANES / GROUPS, first = GROUPS > LANES ? at * LANES % GROUPS : 0;
        const int64_t left = w.columns / Type::BLOCK - begin;
        const char* p = w.weight + begin * Type::BYTES;
        alignas(64) char last[BYTES];
        if (BYTES > Type::BYTES && left * Type::BYTES < BYTES) {
            std::memset(last, 0, sizeof last);
            p = (const char*)std::memcpy(last, p, left * Type::BYTES);
        }
        codes(p, first);
        to.scale = Type::scales(p, first);
        if constexpr (Type::MINIMA) to.minimum = Type::minima(p, first);
    }
    __attribute__((always_inline)) void fetch(const Rows& w, int64_t at, auto& ahead) const {
        for (int64_t line = 0; line < BYTES; line += 64)
            ahead.template fetch<1>(w.weight + at * LANES / GROUPS * Type::BYTES + line, 0);
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
    return {Kind::bytes, Kind::prepare, Kind::multiply_all, InBlocks<Type>::numbers, nullptr, beside<Kind>(), Kind::ROWS, Kind::MANY};
}
