// Rows of weights in the form that ops/quant.py stores: for the head, which a quantised checkpoint keeps as it was.
#pragma once
#include <vector>

#include "products.h"
#include "threads.h"

// The number of x [n] that is furthest from zero, with its sign.
inline float largest_of(const float* x, int64_t n) {
    float low = 0, high = 0;
    for (int64_t i = 0; i < n; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
    return -low > high ? low : high;
}

// Weights x [n] as whole numbers q of so many bits, x ≈ q · scale: see ops/quant.py. Returns the squared error.
inline float quantize(const float* x, int64_t n, int bits, float scale, int32_t* q) {
    const float low = -(1 << (bits - 1)), high = -low - 1, inverse = scale == 0 ? 0 : 1 / scale;
    Vector errors = {};
    auto some = [&](Vector v, Integers& whole) {
        Vector rounded = v * inverse + ROUND - ROUND;
        rounded = rounded < low ? Vector{} + low : rounded;
        rounded = rounded > high ? Vector{} + high : rounded;
        Vector error = rounded * scale - v;
        errors += error * error;
        whole = __builtin_convertvector(rounded, Integers);
    };
    Integers whole;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        some(load(x + i), whole);
        std::memcpy(q + i, &whole, sizeof whole);
    }
    if (i < n) {
        some(load_some(x + i, n - i), whole);
        std::memcpy(q + i, &whole, (n - i) * sizeof(int32_t));
    }
    return sum(errors);
}

// 0; 1 where there is not enough memory.
template <class T>
int quantize_rows(const T* weight, Linear w, int threads) try {
    std::vector<float> ranges = {1};
    if (w.bits == 4) ranges = {0.86, 0.93, 1, 1.06, 1.13, 1.2};
    const float low = -(1 << (w.bits - 1));
    const int64_t columns = w.columns, size = columns / w.groups;
    std::vector<float> numbers(threads * columns);
    std::vector<int32_t> codes(threads * columns);
#pragma omp parallel num_threads(threads)
    {
        float* x = &numbers[omp_get_thread_num() * columns];
        int32_t* q = &codes[omp_get_thread_num() * columns];
#pragma omp for
        for (int64_t row = 0; row < w.rows; row++) {
            for (int64_t i = 0; i < columns; i++) x[i] = to_float(weight[row * columns + i]);
            for (int64_t group = 0; group < w.groups; group++) {
                const float *part = &x[group * size], largest = largest_of(part, size);
                bfloat16 scale = {}, best = {};
                float least = INFINITY;
                for (float range : ranges) {
                    assign(scale, largest / (low * range));
                    float error = quantize(part, size, w.bits, to_float(scale), &q[group * size]);
                    if (error < least) least = error, best = scale;
                }
                if (best.bits != scale.bits) quantize(part, size, w.bits, to_float(best), &q[group * size]);
                ((bfloat16*)w.scale)[row * w.groups + group] = best;
            }
            uint8_t* packed = (uint8_t*)w.weight + row * w.row_bytes;
            for (int64_t i = 0; i < columns && w.bits == 8; i++) packed[i] = q[i] + 128;
            for (int64_t i = 0; i < columns / 2 && w.bits == 4; i++) packed[i] = (q[2 * i] + 8) | (q[2 * i + 1] + 8) << 4;
        }
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
