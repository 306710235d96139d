// Tiles: how the products of a kind of weights are computed for some rows and some tokens together.
//
// A kind is a class, made once for some rows, with
//
//     ROWS, TOKENS                of the largest tile: what the registers hold
//     bytes(n), prepare(x, …)     see Products
//     multiply(w, x, ahead, total)  the accumulators of R rows and N tokens
//     finish(w, r, y)             what a whole row's sum still needs
//
// or, instead of the last two, with `tile`, which is what the function of this name does below.
//
#pragma once
#include "products.h"

// Bytes in front of a row that are fetched into the first-level cache, and a second time, further ahead, into the second
// one: the first has so few lines under way that alone it does not keep the memory busy. 0: not at all.
struct Ahead {
    int64_t first = 0, second = 0;
    __attribute__((always_inline)) void fetch(const char* line) const {  // inline: GCC drops a call that computes nothing
        if (first) __builtin_prefetch(line + first);
        if (second) __builtin_prefetch(line + second, 0, 2);
    }
};

// y[N, R] of a [N, ROWS] array = the sums of the accumulators' lanes.
template <int R, int N, class Lanes, class Number>
inline void put_sums(const Lanes (&total)[N][R], Number* y) {
    if constexpr (N > 1) {
        for (int first = 0; first < N * R; first += LANES) {
            Lanes some[LANES] = {};
            for (int i = 0; i < LANES && first + i < N * R; i++) some[i] = total[(first + i) / R][(first + i) % R];
            const Lanes out = sums(some);
            for (int i = 0; i < LANES && first + i < N * R; i += R)
                std::memcpy(y + (first + i) / R * ROWS, (const char*)&out + i * sizeof(Number), R * sizeof(Number));
        }
    } else {
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++) y[k * ROWS + r] = sum(total[k][r]);
    }
}

// y[N, R] of a [N, ROWS] array = the products of R rows with N tokens.
template <class Kind, int R, int N>
inline void tile(const Kind& kind, const Rows& w, const char* const* x, Ahead ahead, float* y) {
    if constexpr (requires { kind.template tile<R, N>(w, x, ahead, y); }) {
        kind.template tile<R, N>(w, x, ahead, y);
    } else {
        Vector total[N][R] = {};
        kind.template multiply<R, N>(w, x, ahead, total);
        put_sums<R, N>(total, y);
        for (int k = 0; k < N; k++)
            for (int r = 0; r < R; r++) y[k * ROWS + r] = Kind::finish(w, r, y[k * ROWS + r]);
    }
}

// Vectors whose addresses differ by 4096 bytes share the sets of a cache: a line between them keeps them apart.
constexpr int64_t LINE_BYTES = 64;

// Activations as they are, filled up with zeros.
struct AsTheyAre {
    static int64_t bytes(int64_t n) { return rounded_up(4 * n, 64) + LINE_BYTES; }
    static void prepare(const float* x, int64_t n, char* out) {
        std::memcpy(out, x, 4 * n);
        std::memset(out + 4 * n, 0, bytes(n) - 4 * n);
    }
};

// Calls work(i, count) for i = 0 .. n, MOST at a time, then four, two and one; count is a compile-time constant.
template <int MOST, class Work>
inline void in_tiles(int64_t n, Work work) {
    int64_t i = 0;
    for (; i + MOST <= n; i += MOST) work(i, std::integral_constant<int, MOST>());
    if constexpr (MOST > 4)
        for (; i + 4 <= n; i += 4) work(i, std::integral_constant<int, 4>());
    if constexpr (MOST > 2)
        for (; i + 2 <= n; i += 2) work(i, std::integral_constant<int, 2>());
    for (; i < n; i++) work(i, std::integral_constant<int, 1>());
}

// Products of `rows` rows, in panels of LANES that panel(first row, memory) makes and of which two stand side by side, with
// `count` tokens, MOST at a time.
template <int MOST, class Make>
inline void in_panels(int64_t rows, const char* const* x, int64_t count, float* y, char* memory, Make panel) {
    for (int64_t row = 0; row < rows; row += 2 * LANES) {
        const auto first = panel(row, memory);
        if (row + LANES >= rows) {
            in_tiles<MOST>(count, [&](int64_t i, auto n) { first.template multiply<1, n>(&first, x + i, y + i * ROWS + row); });
            continue;
        }
        const decltype(panel(row, memory)) both[] = {first, panel(row + LANES, first.end)};
        in_tiles<MOST>(count, [&](int64_t i, auto n) { first.template multiply<2, n>(both, x + i, y + i * ROWS + row); });
    }
}

inline Rows from_row(const Rows& w, int64_t r) {
    return {w.weight + r * w.row_bytes, w.scale + r * w.groups, w.row_bytes, w.columns, w.groups, w.tuning};
}

template <class Kind>
void multiply(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y) {
    const Kind kind(w);
    auto some = [&](int64_t i, auto tokens, auto most, Ahead ahead) __attribute__((always_inline)) {
        int64_t r = 0;
        for (; r + most <= rows; r += most) tile<Kind, most, tokens>(kind, from_row(w, r), x + i, ahead, y + i * ROWS + r);
        for (; r < rows; r++) tile<Kind, 1, tokens>(kind, from_row(w, r), x + i, ahead, y + i * ROWS + r);
    };
    if (count == 1) {
        const std::integral_constant<int, 1> one;
        const int together = std::min(w.tuning.together, Kind::ROWS);
        const Ahead ahead = {w.tuning.ahead < 0 ? together * w.row_bytes : w.tuning.ahead, w.tuning.further};
        if (together == 4)
            some(0, one, std::integral_constant<int, Kind::ROWS>(), ahead);
        else if (together == 2)
            some(0, one, std::integral_constant<int, 2>(), ahead);
        else
            some(0, one, one, ahead);
        return;
    }
    in_tiles<Kind::TOKENS>(count, [&](int64_t i, auto tokens) {
        const std::integral_constant<int, Kind::ROWS> most;
        some(i, tokens, most, {i ? 0 : most * w.row_bytes});  // after the first tokens the rows are in the cache
    });
}

template <class Kind>
constexpr Products products_of(decltype(Products::numbers) numbers = nullptr) {
    return {Kind::bytes, Kind::prepare,
            [](const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float*) {
                multiply<Kind>(w, rows, x, count, y);
            },
            numbers};
}
