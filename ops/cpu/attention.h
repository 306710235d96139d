// Attention of a few queries to a block of positions, and of the blocks to each other. Blocks begin at multiples of
// BLOCK, so that a query's sums are the same whatever is computed beside it.
#pragma once
#include "tiles.h"

constexpr int64_t BLOCK = 256;  // positions

// Lets memory come into the second-level cache. Always inline, as GCC drops a call that computes nothing.
__attribute__((always_inline)) inline void fetch(const char* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// out[g] += the values of `count` positions, weighted, for N queries. weights [N, BLOCK], values [count, D], out [N, D].
template <class T, int N>
inline void add_weighted(const float* weights, const T* values, int64_t count, int64_t D, float* out) {
    constexpr int WIDTH = (LANES == 16 ? 16 : 12) / std::max(N, 2);  // vectors at a time, as many sums as there are registers for
    auto part = [&](int64_t d, auto width, auto load_values) __attribute__((always_inline)) {
        Vector total[N][width] = {};
        for (int64_t s = 0; s < count; s++) {
            Vector v[width];
            for (int i = 0; i < width; i++) v[i] = load_values(values + s * D + d + i * LANES);
            for (int g = 0; g < N; g++)
                for (int i = 0; i < width; i++)
                    total[g][i] = fma(load_to_all(weights + g * BLOCK + s), v[i], total[g][i]);
        }
        for (int g = 0; g < N; g++)
            for (int i = 0; i < width; i++) {
                const int64_t at = d + i * LANES;
                std::memcpy(out + g * D + at, &total[g][i], std::min(int64_t(LANES), D - at) * sizeof(float));
            }
    };
    auto all = [](const T* p) { return load(p); };
    int64_t d = 0;
    for (; d + WIDTH * LANES <= D; d += WIDTH * LANES) part(d, std::integral_constant<int, WIDTH>(), all);
    for (; d + 2 * LANES <= D; d += 2 * LANES) part(d, std::integral_constant<int, 2>(), all);
    for (; d + LANES <= D; d += LANES) part(d, std::integral_constant<int, 1>(), all);
    if (d < D) part(d, std::integral_constant<int, 1>(), [&](const T* p) { return load_some(p, D - d); });
}

// What a block of positions gives some queries: [queries] largest scores, [queries] sums of exponentials, [queries, D]
// the values weighted by the exponentials.
struct Partial {
    float *largest, *total, *out;

    static int64_t size(int64_t queries, int64_t D) { return queries * (D + 2); }
    Partial(float* p, int64_t queries) : largest(p), total(p + queries), out(p + 2 * queries) {}
};

// [D] numbers as codes of 8 bits with one scale: what KVCache of model.py does in PyTorch.
inline void in_eight_bits(const float* x, int64_t D, int8* codes, bfloat16& scale) {
    float largest = 0;
    for (int64_t d = 0; d < D; d++) largest = std::max(largest, std::abs(x[d]));
    assign(scale, largest / 127);
    const float inverse = to_float(scale) > 0 ? 1 / to_float(scale) : 0;
    for (int64_t d = 0; d < D; d++)
        codes[d].code = uint8_t(128 + int(std::nearbyint(std::clamp(x[d] * inverse, -127.f, 127.f))));
}

// From scores [queries, BLOCK] of `count` positions, of which query g sees the first seen(g). Overwrites the scores.
// `scales` [count] are those of the values, or nullptr.
template <class T, class Seen>
inline void weigh(float* scores, int64_t queries, int64_t count, int64_t D, const T* values, const bfloat16* scales,
                  Seen seen, Partial to) {
    for (int64_t g = 0; g < queries; g++) {
        float* p = scores + g * BLOCK;
        to.largest[g] = largest(p, seen(g));
        to.total[g] = exponentials(p, to.largest[g], seen(g));
        std::fill(p + seen(g), p + count, 0.f);
        for (int64_t s = 0; scales && s < seen(g); s++) p[s] *= to_float(scales[s]);
    }
    in_tiles<LANES == 16 ? 4 : 6>(queries, [&](int64_t g, auto at_once) {
        add_weighted<T, at_once>(scores + g * BLOCK, values, count, D, to.out + g * D);
    });
}

// The softmax over all blocks from those within each: query g of `queries`, part(block) for each of so many blocks.
template <class Part>
inline void put_together(int64_t g, int64_t queries, int64_t blocks, int64_t D, Part part, float* out) {
    float largest = -INFINITY, total = 0;
    for (int64_t block = 0; block < blocks; block++)
        largest = std::max(largest, Partial(part(block), queries).largest[g]);
    std::fill(out, out + D, 0.f);
    for (int64_t block = 0; block < blocks; block++) {
        Partial from(part(block), queries);
        const float weight = std::exp(from.largest[g] - largest);
        total += weight * from.total[g];
        for (int64_t d = 0; d < D; d++) out[d] += weight * from.out[g * D + d];
    }
    for (int64_t d = 0; d < D; d++) out[d] /= total;
}
