// Tiles: how the products of a kind of weights are computed for some rows and some tokens together.
//
// A kind is a class, made once for some rows, with
//
//     ROWS, TOKENS                of the largest tile: what the registers hold
//     bytes(n), prepare(x, …)     see Products
//     multiply(w, x, ahead, total)  the accumulators of R rows and N tokens
//     finish(w, r, y)             what a whole row's sum still needs
//
// or, instead of the last two, with `tile`, which is what the function of this name does below. `ahead` is one of the next
// two classes.
#pragma once
#include <bit>
#include <utility>

#include "products.h"

// Bytes in front of a row that are fetched into the first-level cache, and a second time, further ahead, into the second
// one: the first has so few lines under way that alone it does not keep the memory busy. 0: not at all.
struct Ahead {
    int64_t first = 0, second = 0;
    template <int R>  // a line of each of R rows; inline, as GCC drops a call that computes nothing
    __attribute__((always_inline)) void fetch(const char* line, int64_t row_bytes) const {
        for (int r = 0; r < R; r++) {
            if (first) __builtin_prefetch(line + r * row_bytes + first);
            if (second) __builtin_prefetch(line + r * row_bytes + second, 0, 2);
        }
    }
    bool scales() const { return first; }  // whether they are fetched as well
};

// Some of `all` rows at hand, from `row` on, and as many behind them, fetched into the second-level cache while tokens meet
// these: evenly, in so many steps. In a burst they would take all the lines that may be under way, and what is computed would
// wait for them.
class Following {
    const char *due, *next;
    int64_t each;

  public:
    int64_t near = 0;  // bytes: what is so far ahead of the rows at hand is fetched as well

    Following(const Rows& w, int64_t all, int64_t row, int64_t rows, int64_t steps)
        : due(w.weight + (row + rows) * w.row_bytes), next(due), each((rows * w.row_bytes + steps - 1) / steps) {
        if (w.last && row + rows >= all) each = 0;
    }

    template <int R = 1>  // R steps
    __attribute__((always_inline)) void fetch(const char* line = nullptr, int64_t row_bytes = 0) {
        for (int r = 0; r < R && near; r++) __builtin_prefetch(line + r * row_bytes + near);
        for (due += R * each; next < due; next += 64) __builtin_prefetch(next, 0, 2);
    }
    bool scales() const { return false; }
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
inline void tile(const Kind& kind, const Rows& w, const char* const* x, auto& ahead, float* y) {
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

template <int MOST>
inline int64_t tiles_of(int64_t n) { return n / MOST + std::popcount(uint64_t(n % MOST)); }

// Calls work(i) for i = 0 .. COUNT, each i a compile-time constant.
template <int COUNT, class Work>
__attribute__((always_inline)) inline void each(Work work) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        (work(std::integral_constant<int, I>()), ...);
    }(std::make_integer_sequence<int, COUNT>());
}

constexpr int64_t BY_LANE = 48;  // tokens whose sums of some lanes wait for the others' in the cache

// y[count, COUNT · LANES] of a [count, ROWS] array, where a lane is a row and what few tokens add up in one lane of their
// accumulator is added up by itself: of_lane(lane, first, total) adds it to totals [N, COUNT] of tokens from `first` on. They
// are added to each other as in sum(Vector), so the bits are the same. One lane for all tokens, then the next: the weights of a
// lane stay in the first-level cache. count <= BY_LANE.
template <int MOST, int COUNT, class OfLane>
inline void by_lane(int64_t count, float* y, OfLane of_lane) {
    constexpr int LEVELS = std::bit_width(unsigned(LANES)) - 1;
    alignas(64) Vector waiting[LEVELS][BY_LANE][COUNT];
    for (int i = 0; i < LANES; i++)
        in_tiles<MOST>(count, [&](int64_t first, auto n) {
            Vector total[n][COUNT];
            each<n>([&](auto k) __attribute__((always_inline)) { for (auto& some : total[k]) some = Vector{}; });
            of_lane(lane_in_order(i), first, total);
            auto at = [&](int level) { return waiting[level] + first; };
            int level = 0;
            for (; i >> level & 1; level++)
                each<n>([&](auto k) __attribute__((always_inline)) {
                    for (int p = 0; p < COUNT; p++) total[k][p] = at(level)[k][p] + total[k][p];
                });
            each<n>([&](auto k) __attribute__((always_inline)) {
                for (int p = 0; p < COUNT; p++)
                    level < LEVELS ? void(at(level)[k][p] = total[k][p]) : store(y + (first + k) * ROWS + p * LANES, total[k][p]);
            });
        });
}

// Products of `rows` rows, in panels of LANES that panel(first row, memory) makes and of which two stand side by side.
template <class Make>
inline void in_panels(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, char* memory, Make panel) {
    for (int64_t row = 0; row < rows; row += 2 * LANES) {
        const auto first = panel(row, memory);
        typedef std::remove_const_t<decltype(first)> Panel;
        Following following(w, rows, row, 2 * LANES, tiles_of<Panel::MOST>(count) * first.steps());
        auto meet = [&](const Panel* panels, auto number) {
            for (int64_t i = 0; i < count; i += BY_LANE)
                Panel::template multiply<number>(panels, x + i, std::min(BY_LANE, count - i), y + i * ROWS + row, following);
        };
        if (row + LANES >= rows) {
            meet(&first, std::integral_constant<int, 1>());
            continue;
        }
        const Panel both[] = {first, panel(row + LANES, first.end)};
        meet(both, std::integral_constant<int, 2>());
    }
}

inline Rows from_row(const Rows& w, int64_t r) {
    return {w.weight + r * w.row_bytes, w.scale + r * w.groups, w.row_bytes, w.columns, w.groups, w.tuning};
}

template <class Kind>
void multiply(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y) {
    const Kind kind(w);
    auto some = [&](int64_t i, auto tokens, auto most, auto& ahead) __attribute__((always_inline)) {
        int64_t r = 0;
        for (; r + most <= rows; r += most) tile<Kind, most, tokens>(kind, from_row(w, r), x + i, ahead, y + i * ROWS + r);
        for (; r < rows; r++) tile<Kind, 1, tokens>(kind, from_row(w, r), x + i, ahead, y + i * ROWS + r);
    };
    if (count == 1) {
        const std::integral_constant<int, 1> one;
        const int together = w.tuning.together;
        const Ahead ahead = {w.tuning.ahead < 0 ? together * w.row_bytes : w.tuning.ahead, w.tuning.further};
        if (together == Kind::ROWS)
            some(0, one, std::integral_constant<int, Kind::ROWS>(), ahead);
        else if (together == 2)
            some(0, one, std::integral_constant<int, std::min(Kind::ROWS, 2)>(), ahead);
        else
            some(0, one, one, ahead);
        return;
    }
    // Where one tile takes all tokens, or nothing has fetched these rows: the next tile's are.
    const int64_t tiles = tiles_of<Kind::TOKENS>(count), steps = tiles * rows * ((w.row_bytes + 63) / 64);
    Following following(w, rows, 0, tiles > 1 ? rows : 0, steps);
    in_tiles<Kind::TOKENS>(count, [&](int64_t i, auto tokens) {
        following.near = tiles == 1 || (w.first && !i) ? Kind::ROWS * w.row_bytes : 0;
        some(i, tokens, std::integral_constant<int, Kind::ROWS>(), following);
    });
}

template <class Kind>
constexpr Products products_of(decltype(Products::numbers) numbers = nullptr) {
    return {Kind::bytes, Kind::prepare,
            [](const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float*) {
                multiply<Kind>(w, rows, x, count, y);
            },
            numbers, nullptr, nullptr, Kind::ROWS};
}
