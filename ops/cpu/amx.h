// Products of whole numbers by AMX, for many tokens at once.
//
// One instruction multiplies 16 tokens by 16 rows of up to 64 columns and adds to 16 x 16 sums. Sums of whole numbers are
// exact, so they are those that vectors give one token, and what follows them, in floating point, is done in the same
// order for both: no bit of a result depends on which of the two computed it.
#pragma once
#include "integers.h"
#include "tiles.h"

constexpr int64_t SUMS = 1024;    // bytes of a tile of sums, int32 [tokens, rows]
constexpr int64_t AMX_FEWEST = 16;  // tokens: fewer are as fast by vectors, as the weights need not be transposed for them

#if defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define AMX 1

// The tile registers of this thread: 0 to 3 sums [tokens, rows], 4 and 5 activations [tokens, bytes], 6 and 7 weights
// [bytes / 4, rows, 4]. (GCC 12's own functions for these instructions don't say what they read and write.)
struct TileRegisters {
    TileRegisters(uint8_t tokens, uint8_t bytes)
        : TileRegisters({tokens, tokens, tokens, tokens, tokens, tokens, uint8_t(bytes / 4), uint8_t(bytes / 4)},
                        {64, 64, 64, 64, bytes, bytes, 64, 64}) {}
    // Of register i rows[i] with so many bytes each.
    TileRegisters(const uint8_t (&rows)[8], const uint8_t (&bytes)[8]) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        std::copy(bytes, bytes + 8, shapes.row_bytes), std::copy(rows, rows + 8, shapes.rows);
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~TileRegisters() { asm volatile("tilerelease"); }
};
template <int TO>
inline void zero_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(TO)); }
template <int TO>
inline void load_tile(const char* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TO) : "memory");
}
template <int FROM>
inline void store_tile(void* to, int64_t stride = 64) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(FROM) : "memory");
}
template <int SUM, int ACTIVATIONS, int WEIGHTS>  // signed bytes
inline void multiply_tiles() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(ACTIVATIONS), "i"(WEIGHTS));
}
template <int SUM, int A, int B>  // pairs of bfloat16
inline void multiply_pairs() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

// 64 bytes from `at` on of each of 16 rows, transposed to [16, rows, 4]; behind `end` zeros. A row that there isn't is the last.
inline void transposed(const Rows& w, int64_t first, int64_t rows, int64_t at, int64_t end, Unsigned v[16]) {
    for (int64_t r = 0; r < SIDE; r++) {
        const char* from = w.weight + std::min(first + r, rows - 1) * w.row_bytes + at;
        const __mmask64 inside = end - at >= 64 ? ~__mmask64(0) : (__mmask64(1) << (end - at)) - 1;
        __builtin_prefetch(from + 256);
        v[r] = (Unsigned)_mm512_maskz_loadu_epi8(inside, from);
    }
    transpose(v);
}

// The activations of some tokens at equal distances: where they are, or copied.
struct Spaced {
    const char* first;
    int64_t stride;

    Spaced(const char* const* x, int64_t count, int64_t bytes, char* copy) : first(x[0]), stride(count > 1 ? x[1] - x[0] : bytes) {
        bool equal = true;
        for (int64_t i = 2; i < count; i++) equal = equal && x[i] - x[i - 1] == stride;
        if (equal) return;
        for (int64_t i = 0; i < count; i++) std::memcpy(copy + i * bytes, x[i], bytes);
        first = copy, stride = bytes;
    }
};

// The products of up to 16 tokens with 16 rows whose scales are those of groups of columns: [16 tokens], lanes are rows.
//
//     weights [groups, BYTES / 4, 16 rows, 4]; activations in a token's high bytes, BYTES to a group; `low`: from these to
//     the low bytes; group_of(lane): of a block of 16 groups, in vectors' own order
//     meet(group, token, sum, total): `total` with the group's whole number in it
//
// The tiles' registers are those of TileRegisters(tokens, BYTES). While vectors take in one group's sums, the tiles are
// at work on the next group.
template <int64_t BYTES, class GroupOf, class Meet>
__attribute__((always_inline)) inline void by_groups(const Spaced& x, int64_t low, const char* weights, int64_t groups,
                                                     GroupOf group_of, Meet meet, Vector (&total)[SIDE]) {
    alignas(64) Integers sums[2][2][SIDE];
    Vector waiting[4][SIDE];  // for their neighbours: lanes are added up as in sum(Vector)
    auto lane_of = [](int i) { return (i & 1) << 3 | (i & 2) << 1 | (i & 4) >> 1 | (i & 8) >> 3; };
    int next_lane = 0;  // the lane_of … and the group that the tiles are at
    int64_t next = group_of(0);
    auto start = [&](auto turn) __attribute__((always_inline)) {
        constexpr int ABOVE = 2 * turn, BELOW = ABOVE + 1;
        for (; next >= groups; next = group_of(lane_of(next_lane)))
            if (++next_lane == LANES) return;
        zero_tile<ABOVE>(), zero_tile<BELOW>();
        const char* high = x.first + next * BYTES;
        load_tile<6>(weights + next * BYTES * SIDE, 64), load_tile<4>(high, x.stride), load_tile<5>(high + low, x.stride);
        multiply_tiles<ABOVE, 4, 6>(), multiply_tiles<BELOW, 5, 6>();
        store_tile<ABOVE>(sums[turn][0]), store_tile<BELOW>(sums[turn][1]);
        next += LANES;
    };
    bool odd = false;
    start(std::integral_constant<int, 0>());
    for (int i = 0; i < LANES; i++) {
        for (auto& some : total) some = Vector{};
        auto take = [&](int64_t g, auto turn) __attribute__((always_inline)) {
            if (next_lane < LANES) start(std::integral_constant<int, 1 - turn>());
#pragma GCC unroll 16
            for (int k = 0; k < SIDE; k++) total[k] = meet(g, k, (sums[turn][0][k] << 8) + sums[turn][1][k], total[k]);
        };
        for (int64_t g = group_of(lane_of(i)); g < groups; g += LANES, odd = !odd)
            odd ? take(g, std::integral_constant<int, 1>()) : take(g, std::integral_constant<int, 0>());
        int level = 0;
        for (; i >> level & 1; level++)
            for (int k = 0; k < SIDE; k++) total[k] = waiting[level][k] + total[k];
        for (int k = 0; k < SIDE && i < LANES - 1; k++) waiting[level][k] = total[k];
    }
}
#else
#define AMX 0
#endif
