// Products of whole numbers by AMX, for many tokens at once.
//
// One instruction multiplies 16 tokens by 16 rows of up to 64 columns and adds to 16 x 16 sums. Sums of whole numbers are
// exact, so they are those that vectors give one token, and what follows them, in floating point, is done in the same
// order for both: no bit of a result depends on which of the two computed it.
#pragma once
#include "integers.h"
#include "tiles.h"

constexpr int64_t SUMS = 1024;    // bytes of a tile of sums, int32 [tokens, rows]

#if defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define AMX 1

inline thread_local int64_t tile_setups = 0;  // of this thread: whether tiles are used shows in nothing but this

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
        tile_setups++;
    }
    ~TileRegisters() { asm volatile("tilerelease"); }
};
template <int TO>
inline void zero_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(TO)); }
template <int TO>
inline void load_tile(const char* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TO), "m"(*(const char(*)[])from));
}
template <int FROM>
inline void store_tile(void* to, int64_t stride = 64) {
    asm volatile("tilestored %%tmm%c3, (%1,%2,1)" : "=m"(*(char(*)[])to) : "r"(to), "r"(stride), "i"(FROM));
}
template <int SUM, int ACTIVATIONS, int WEIGHTS>  // signed bytes
inline void multiply_tiles() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(ACTIVATIONS), "i"(WEIGHTS));
}
template <int SUM, int WEIGHTS, int ACTIVATIONS>  // unsigned bytes with signed ones
inline void multiply_unsigned() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(WEIGHTS), "i"(ACTIVATIONS));
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

// Activations of SIDE consecutive tokens side by side, as tiles meet them: lines of 64 bytes, four of each token. They lie in
// the tokens' own memory, from its beginning on: token i has the i-th line of every SIDE.
//
// GROUP / 4 lines are a group's high bytes, four columns each, and as many its low ones; groups come in the order in which
// their products are added up. Then lines of the groups' scales, and of their sums.
template <int GROUP>
struct SideBySide {
    static constexpr int PIECES = GROUP / 4, GROUPS = SIDE / (2 * PIECES);  // whose lines are one of each token's
    int64_t chunks, scales, sums, bytes;
    explicit SideBySide(int64_t chunks)
        : chunks(chunks), scales(chunks * SIDE / GROUPS * 64), sums(scales + chunks * 64), bytes(sums + chunks * 64) {}

    // The first line of the high bytes of the group that is in this lane of a chunk.
    int64_t high(int lane, int64_t chunk, int64_t token_bytes) const {
        const int64_t i = lane_in_order(lane) * chunks + chunk;
        return i % GROUPS * 2 * PIECES * token_bytes + i / GROUPS * 64;
    }
    int64_t scale(int lane, int64_t chunk, int64_t token_bytes) const { return lane * token_bytes + scales + chunk * 64; }
    int64_t sum(int lane, int64_t chunk, int64_t token_bytes) const { return lane * token_bytes + sums + chunk * 64; }
};
#else
#define AMX 0
#endif
