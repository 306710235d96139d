// The blocks of a GGUF tensor from its values: what formats/gguf/kquants.py does in PyTorch, and explains.
//
// The bytes are those of quantize_row_*_ref in llama.cpp's ggml/src/ggml-quants.c. So every product and every sum is
// rounded by itself, and sums run from a group's first value to its last, as there. A vector's lanes are therefore not
// the values of one group but the same value of several groups, and whole groups lie side by side in a tile.
#include <utility>

#include "products.h"

namespace {

constexpr int GROUPS = 32;               // of a tile
constexpr int VECTORS = GROUPS / LANES;  // across its groups
constexpr int SIDE = 2;                  // vectors searched together: one waits for its sums while the other computes
constexpr float SMALLEST = 1e-15f;       // GROUP_MAX_EPS: a group of Q6_K below it is all zero

struct Tile {
    Vector x[32][VECTORS];                           // value i of each group
    Integers q[32][VECTORS];                         // its code
    alignas(64) float step[GROUPS], offset[GROUPS];  // what is stored stands for step · (q - middle) + offset
    alignas(64) float scale[GROUPS], minimum[GROUPS];
    uint8_t codes[GROUPS][32];                       // as q, by group
    bool finite = true;
};

inline Vector filled(float x) { return Vector{} + x; }
inline Vector absolute(Vector x) { return (Vector)((Integers)x & 0x7fffffff); }
inline Vector ratio(float number, Vector x) { return filled(number) / x; }
inline Vector inverse(Vector x) { return x == 0.f ? Vector{} : ratio(1, x); }
inline Vector to_vector(Integers q) { return __builtin_convertvector(q, Vector); }

// Towards zero. What does not fit, as times the infinite reciprocal of a subnormal step, is what x86 makes of it.
inline Integers truncated(Vector x) {
    const Integers fits = absolute(x) < 0x1p31f;
    return fits ? __builtin_convertvector(x, Integers) : Integers{} + INT32_MIN;
}
inline Integers clamped(Integers q, int low, int high) {
    q = q < low ? Integers{} + low : q;
    return q > high ? Integers{} + high : q;
}

// To the nearest whole number, ties to even; also what is beyond 2^22 becomes what llama.cpp makes of it.
inline Integers nearest(Vector x) { return ((Integers)(x + ROUND) & 0x007fffff) - 0x00400000; }
inline int nearest(float x) {
    x += ROUND;
    return (read<int32_t>(&x) & 0x007fffff) - 0x00400000;
}

inline float16 to_half(float x) {  // to the nearest, ties to even
    const uint32_t bits = read<uint32_t>(&x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    float magnitude = std::fabs(x);
    if (!(magnitude < 65520)) return {uint16_t(sign | (x == x ? 0x7c00 : 0x7e00))};
    if (magnitude >= 0x1p-14f) return {uint16_t(sign | (((rest + 0xfff + (rest >> 13 & 1)) >> 13) - (112 << 10)))};
    magnitude += 0.5f;  // whose lowest bit is 2^-24, as that of a subnormal float16
    return {uint16_t(sign | (read<uint32_t>(&magnitude) & 0xffff))};
}

// Stores a scale as float16 and returns what was stored.
inline float put_half(uint8_t* to, float x, bool& finite) {
    const float16 half = to_half(x);
    finite &= (half.bits & 0x7c00) != 0x7c00;
    std::memcpy(to, &half, sizeof half);
    return to_float(half);
}

// Work on SIDE vectors of a tile at a time: `work` has the number of the first.
template <class Work>
inline void by_sides(Work work) {
    for (int v = 0; v < VECTORS; v += SIDE) work(v);
}

// f(side) for each of the vectors that are side by side.
#define EACH _Pragma("GCC unroll 2") for (int s = 0; s < SIDE; s++)

// ---- 32 values and one scale: Q8_0, Q4_0, Q5_0; with an offset: Q4_1, Q5_1 -------------------------------------------

inline Vector largest_of(const Tile& t, int v) {  // with its sign; the first of equal magnitudes
    Vector largest = {}, magnitude = {};
    for (int i = 0; i < 32; i++) {
        const Vector x = t.x[i][v], a = absolute(x);
        largest = a > magnitude ? x : largest;
        magnitude = a > magnitude ? a : magnitude;
    }
    return largest;
}

// The upper half of 32 codes beside the lower one, and the fifth bits of all.
inline void put_nibbles(const uint8_t* codes, uint8_t* to) {
    for (int i = 0; i < 16; i++) to[i] = (codes[i] & 15) | codes[i + 16] << 4;
}
inline void put_fifths(const uint8_t* codes, uint8_t* to) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= uint32_t(codes[i] >> 4) << i;
    std::memcpy(to, &bits, sizeof bits);
}

struct Bytes8 {  // Q8_0
    static constexpr int VALUES = 32, GROUPS_OF_BLOCK = 1, SIZE = 34, MIDDLE = 0;
    static void fit(Tile& t, uint8_t* out) {
        for (int v = 0; v < VECTORS; v++) {
            const Vector d = absolute(largest_of(t, v)) / 127.f, id = inverse(d);
            store(&t.scale[v * LANES], d);
            for (int i = 0; i < 32; i++) {  // halves are rounded away from zero
                const Vector scaled = t.x[i][v] * id;
                const Integers whole = truncated(scaled);
                const Integers half = truncated((scaled - to_vector(whole)) * 2.f);
                t.q[i][v] = (Integers)((Unsigned)whole + (Unsigned)half);  // both may be the lowest number
            }
        }
        for (int g = 0; g < GROUPS; g++) t.step[g] = put_half(out + g * SIZE, t.scale[g], t.finite), t.offset[g] = 0;
    }
    static void put(const uint8_t (*codes)[32], uint8_t* block) { std::memcpy(block + 2, codes, 32); }
};

template <int BITS>
struct Symmetric {  // Q4_0, Q5_0
    static constexpr int VALUES = 32, GROUPS_OF_BLOCK = 1, SIZE = BITS == 5 ? 22 : 18, MIDDLE = 1 << (BITS - 1);
    static void fit(Tile& t, uint8_t* out) {
        for (int v = 0; v < VECTORS; v++) {
            const Vector d = largest_of(t, v) / float(-MIDDLE), id = inverse(d);
            store(&t.scale[v * LANES], d);
            for (int i = 0; i < 32; i++)
                t.q[i][v] = clamped(truncated(t.x[i][v] * id + (MIDDLE + 0.5f)) & 255, 0, 2 * MIDDLE - 1);
        }
        for (int g = 0; g < GROUPS; g++) t.step[g] = put_half(out + g * SIZE, t.scale[g], t.finite), t.offset[g] = 0;
    }
    static void put(const uint8_t (*codes)[32], uint8_t* block) {
        if (BITS == 5) put_fifths(*codes, block + 2);
        put_nibbles(*codes, block + SIZE - 16);
    }
};

template <int BITS>
struct Offset {  // Q4_1, Q5_1
    static constexpr int VALUES = 32, GROUPS_OF_BLOCK = 1, SIZE = BITS == 5 ? 24 : 20, MIDDLE = 0;
    static void fit(Tile& t, uint8_t* out) {
        constexpr int TOP = (1 << BITS) - 1;
        for (int v = 0; v < VECTORS; v++) {
            Vector low = t.x[0][v], high = low;
            for (int i = 1; i < 32; i++) {
                const Vector x = t.x[i][v];
                low = x < low ? x : low, high = x > high ? x : high;
            }
            const Vector d = (high - low) / float(TOP), id = inverse(d);
            store(&t.scale[v * LANES], d), store(&t.minimum[v * LANES], low);
            for (int i = 0; i < 32; i++)
                t.q[i][v] = clamped(truncated((t.x[i][v] - low) * id + 0.5f) & 255, 0, TOP);
        }
        for (int g = 0; g < GROUPS; g++) {
            t.step[g] = put_half(out + g * SIZE, t.scale[g], t.finite);
            t.offset[g] = put_half(out + g * SIZE + 2, t.minimum[g], t.finite);
        }
    }
    static void put(const uint8_t (*codes)[32], uint8_t* block) {
        if (BITS == 5) put_fifths(*codes, block + 4);
        put_nibbles(*codes, block + SIZE - 16);
    }
};

// ---- 256 values in 8 groups, each with a scale and a minimum of 6 bits: Q4_K, Q5_K -----------------------------------

// make_qkx2_quants for the groups of vectors v to v + SIDE: see fit_scale_and_minimum in kquants.py.
template <int TOP>
void fit_scale_and_minimum(Tile& t, int v, float first, int steps) {
    Vector weights[32][SIDE], codes[32][SIDE];
    Vector low[SIDE], high[SIDE], sum_w[SIDE], sum_x[SIDE], average[SIDE] = {};
    for (int i = 0; i < 32; i++) EACH average[s] += t.x[i][v + s] * t.x[i][v + s];
    EACH {
        average[s] /= 32.f;
        for (int lane = 0; lane < LANES; lane++) average[s][lane] = std::sqrt(average[s][lane]);
        low[s] = high[s] = t.x[0][v + s];
    }
    for (int i = 0; i < 32; i++) EACH {
        const Vector x = t.x[i][v + s], w = average[s] + absolute(x);
        weights[i][s] = w;
        low[s] = x < low[s] ? x : low[s], high[s] = x > high[s] ? x : high[s];
        sum_w[s] = i ? sum_w[s] + w : w;
        sum_x[s] = i ? sum_x[s] + w * x : w * x;
    }
    Vector minimum[SIDE], start[SIDE], inverse_step[SIDE], scale[SIDE], best[SIDE];
    EACH {
        low[s] = low[s] > 0.f ? Vector{} : low[s];
        minimum[s] = start[s] = low[s];
        inverse_step[s] = ratio(TOP, high[s] - low[s]);
        scale[s] = ratio(1, inverse_step[s]);
    }
    auto rounded = [&](int i, int s, Vector from, Vector inverse) {
        return clamped(nearest(inverse * (t.x[i][v + s] - from)), 0, TOP);
    };
    auto squared_error = [&](const Vector* scale, const Vector* minimum, Vector* total) {
        for (int i = 0; i < 32; i++) EACH {
            const Vector difference = scale[s] * codes[i][s] + minimum[s] - t.x[i][v + s];
            const Vector term = weights[i][s] * (difference * difference);
            total[s] = i ? total[s] + term : term;
        }
    };
    for (int i = 0; i < 32; i++) EACH codes[i][s] = to_vector(rounded(i, s, low[s], inverse_step[s]));
    squared_error(scale, minimum, best);
    for (int step = 0; step <= steps; step++) {
        Vector this_inverse[SIDE], sum_q[SIDE] = {}, sum_qq[SIDE] = {}, sum_qx[SIDE] = {};
        EACH this_inverse[s] = ratio(first + 0.1f * step + TOP, high[s] - minimum[s]);
        for (int i = 0; i < 32; i++) EACH {
            const Vector q = to_vector(rounded(i, s, minimum[s], this_inverse[s])), wq = weights[i][s] * q;
            codes[i][s] = q;
            sum_q[s] += wq, sum_qq[s] += wq * q, sum_qx[s] += wq * t.x[i][v + s];
        }
        Vector determinant[SIDE], this_scale[SIDE], this_minimum[SIDE], error[SIDE];
        EACH {
            determinant[s] = sum_w[s] * sum_qq[s] - sum_q[s] * sum_q[s];
            this_scale[s] = (sum_w[s] * sum_qx[s] - sum_x[s] * sum_q[s]) / determinant[s];
            this_minimum[s] = (sum_qq[s] * sum_x[s] - sum_q[s] * sum_qx[s]) / determinant[s];
            this_scale[s] = this_minimum[s] > 0.f ? sum_qx[s] / sum_qq[s] : this_scale[s];
            this_minimum[s] = this_minimum[s] > 0.f ? Vector{} : this_minimum[s];
        }
        squared_error(this_scale, this_minimum, error);
        EACH {
            const Integers better = (determinant[s] > 0.f) & (error[s] < best[s]);
            best[s] = better ? error[s] : best[s];
            start[s] = better ? minimum[s] : start[s];
            inverse_step[s] = better ? this_inverse[s] : inverse_step[s];
            scale[s] = better ? this_scale[s] : scale[s];
            minimum[s] = better ? this_minimum[s] : minimum[s];
        }
    }
    EACH {
        const Integers flat = low[s] == high[s];
        store(&t.scale[(v + s) * LANES], flat ? Vector{} : scale[s]);
        store(&t.minimum[(v + s) * LANES], -(flat ? low[s] : minimum[s]));
        for (int i = 0; i < 32; i++) t.q[i][v + s] = flat ? Integers{} : rounded(i, s, start[s], inverse_step[s]);
    }
}

// Eight numbers as d · q, q <= 63. Returns d.
inline float six_bits(const float* numbers, uint8_t* q) {
    float largest = 0;
    for (int g = 0; g < 8; g++) largest = numbers[g] > largest ? numbers[g] : largest;
    const float factor = largest > 0 ? 63.f / largest : 0;
    for (int g = 0; g < 8; g++) q[g] = std::min(uint8_t(63), uint8_t(nearest(factor * numbers[g])));
    return largest / 63.f;
}

template <int BITS>
struct OffsetK {  // Q4_K, Q5_K
    static constexpr int VALUES = 32, GROUPS_OF_BLOCK = 8, SIZE = BITS == 5 ? 176 : 144, MIDDLE = 0;
    static constexpr int TOP = (1 << BITS) - 1;
    static void fit(Tile& t, uint8_t* out) {
        by_sides([&](int v) { fit_scale_and_minimum<TOP>(t, v, BITS == 5 ? -0.5f : -1.f, BITS == 5 ? 15 : 20); });
        for (int g = 0; g < GROUPS; g += 8, out += SIZE) {
            uint8_t scales[8], minima[8], *packed = out + 4;
            const float d = put_half(out, six_bits(&t.scale[g], scales), t.finite);
            const float dmin = put_half(out + 2, six_bits(&t.minimum[g], minima), t.finite);
            for (int i = 0; i < 4; i++) {
                packed[i] = scales[i] | scales[i + 4] >> 4 << 6;
                packed[i + 4] = minima[i] | minima[i + 4] >> 4 << 6;
                packed[i + 8] = (scales[i + 4] & 15) | minima[i + 4] << 4;
            }
            for (int i = 0; i < 8; i++) t.step[g + i] = d * scales[i], t.offset[g + i] = -(dmin * minima[i]);
        }
        // The 6-bit scales have moved the grid: round once more. Where the scale has become 0, the search's codes stay.
        for (int v = 0; v < VECTORS; v++) {
            const Vector step = load(&t.step[v * LANES]), offset = load(&t.offset[v * LANES]);
            for (int i = 0; i < 32; i++) {
                const Integers q = clamped(nearest((t.x[i][v] - offset) / step), 0, TOP);
                t.q[i][v] = step == 0.f ? t.q[i][v] : q;
            }
        }
    }
    static void put(const uint8_t (*codes)[32], uint8_t* block) {
        if (BITS == 5)  // bit g of byte i: the fifth bit of value i of group g
            for (int i = 0; i < 32; i++) {
                uint8_t bits = 0;
                for (int g = 0; g < 8; g++) bits |= codes[g][i] >> 4 << g;
                block[16 + i] = bits;
            }
        for (int g = 0; g < 8; g += 2)
            for (int i = 0; i < 32; i++) block[SIZE - 128 + 16 * g + i] = (codes[g][i] & 15) | codes[g + 1][i] << 4;
    }
};

// ---- 256 values in 16 groups, each with a scale of 8 bits: Q6_K ------------------------------------------------------

// make_qx_quants for the groups of vectors v to v + SIDE: see fit_scale in kquants.py.
void fit_scale(Tile& t, int v) {
    constexpr int TOP = 32;
    Vector largest[SIDE] = {}, magnitude[SIDE] = {}, weights[16][SIDE];
    for (int i = 0; i < 16; i++) EACH {
        const Vector x = t.x[i][v + s], a = absolute(x);
        largest[s] = a > magnitude[s] ? x : largest[s];
        magnitude[s] = a > magnitude[s] ? a : magnitude[s];
        weights[i][s] = x * x;
    }
    auto rounded = [&](int i, int s, Vector inverse) { return clamped(nearest(inverse * t.x[i][v + s]), -TOP, TOP - 1); };
    auto sums = [&](const Vector* inverse, Vector* sum_qx, Vector* sum_qq) {
        EACH sum_qx[s] = sum_qq[s] = Vector{};
        for (int i = 0; i < 16; i++) EACH {
            const Vector q = to_vector(rounded(i, s, inverse[s])), w = weights[i][s];
            sum_qx[s] += w * t.x[i][v + s] * q, sum_qq[s] += w * q * q;
        }
    };
    Vector best_inverse[SIDE], scale[SIDE], best[SIDE], sum_qx[SIDE], sum_qq[SIDE];
    EACH best_inverse[s] = ratio(-TOP, largest[s]);
    sums(best_inverse, sum_qx, sum_qq);
    EACH {
        scale[s] = sum_qq[s] != 0.f ? sum_qx[s] / sum_qq[s] : Vector{};
        best[s] = scale[s] * sum_qx[s];
    }
    for (int step = -9; step <= 9; step++) {
        if (step == 0) continue;
        Vector this_inverse[SIDE];
        EACH this_inverse[s] = ratio(-(TOP + 0.1f * step), largest[s]);
        sums(this_inverse, sum_qx, sum_qq);
        EACH {
            const Integers better = (sum_qq[s] > 0.f) & (sum_qx[s] * sum_qx[s] > best[s] * sum_qq[s]);
            scale[s] = better ? sum_qx[s] / sum_qq[s] : scale[s];
            best[s] = better ? scale[s] * sum_qx[s] : best[s];
            best_inverse[s] = better ? this_inverse[s] : best_inverse[s];
        }
    }
    EACH {
        const Integers zero = magnitude[s] < SMALLEST;
        store(&t.scale[(v + s) * LANES], zero ? Vector{} : scale[s]);
        for (int i = 0; i < 16; i++) t.q[i][v + s] = zero ? Integers{} : rounded(i, s, best_inverse[s]) + TOP;
    }
}

struct SymmetricK {  // Q6_K
    static constexpr int VALUES = 16, GROUPS_OF_BLOCK = 16, SIZE = 210, MIDDLE = 32;
    static void fit(Tile& t, uint8_t* out) {
        by_sides([&](int v) { fit_scale(t, v); });
        for (int g = 0; g < GROUPS; g += 16, out += SIZE) {
            float largest = 0;
            for (int i = g; i < g + 16; i++) {
                t.finite &= std::isfinite(t.scale[i]);
                if (std::fabs(t.scale[i]) > std::fabs(largest)) largest = t.scale[i];
            }
            const bool zero = std::fabs(largest) < SMALLEST;
            const float factor = zero ? 0 : -128.f / largest, d = put_half(out + 208, zero ? 0 : 1 / factor, t.finite);
            for (int i = 0; i < 16; i++) {
                const int8_t scale = std::min(127, nearest(factor * t.scale[g + i]));
                out[192 + i] = scale;
                // A block of zeros is all zero bytes: no step, and below, the code that 0 stands for.
                t.step[g + i] = d * scale, t.offset[g + i] = 0, t.scale[g + i] = zero;
            }
        }
        for (int v = 0; v < VECTORS; v++) {
            const Vector step = load(&t.step[v * LANES]), zero = load(&t.scale[v * LANES]);
            for (int i = 0; i < 16; i++) {
                const Integers q = clamped(nearest(t.x[i][v] / step), -32, 31) + 32;
                t.q[i][v] = zero != 0.f ? Integers{} : step == 0.f ? t.q[i][v] : q;
            }
        }
    }
    static void put(const uint8_t (*codes)[32], uint8_t* block) {
        for (int half = 0; half < 2; half++, codes += 8)
            for (int i = 0; i < 32; i++) {  // of four runs of 32 values, which are two groups each
                auto q = [&](int run) { return codes[2 * run + i / 16][i % 16]; };
                block[64 * half + i] = (q(0) & 15) | q(2) << 4;
                block[64 * half + 32 + i] = (q(1) & 15) | q(3) << 4;
                block[128 + 32 * half + i] = q(0) >> 4 | q(1) >> 4 << 2 | q(2) >> 4 << 4 | q(3) >> 4 << 6;
            }
    }
};

// ---- all of them -----------------------------------------------------------------------------------------------------

// x [blocks · values of a block] -> out [blocks, SIZE]; error: the largest and the sum of |stored - x|.
template <class Format, class T>
bool pack(const T* x, int64_t blocks, uint8_t* out, double* error) {
    constexpr int N = Format::VALUES, BLOCKS = GROUPS / Format::GROUPS_OF_BLOCK, EACH_BLOCK = N * Format::GROUPS_OF_BLOCK;
    Tile t;
    alignas(64) float values[GROUPS * N];
    float(*across)[GROUPS] = (float(*)[GROUPS])t.x;
    uint8_t last[BLOCKS * Format::SIZE];
    for (int64_t block = 0; block < blocks; block += BLOCKS) {
        const int count = std::min(int64_t(BLOCKS), blocks - block), groups = count * Format::GROUPS_OF_BLOCK;
        const T* from = x + block * EACH_BLOCK;
        for (int i = 0; i < groups * N; i += LANES) store(values + i, load(from + i));
        std::fill(values + groups * N, values + GROUPS * N, 0.f);
        for (int i = 0; i < N; i++)
            for (int g = 0; g < GROUPS; g++) across[i][g] = values[g * N + i];
        uint8_t* to = count == BLOCKS ? out + block * Format::SIZE : last;
        Format::fit(t, to);
        Vector largest = {}, total = {};
        for (int v = 0; v < VECTORS; v++) {
            const Vector step = load(&t.step[v * LANES]), offset = load(&t.offset[v * LANES]);
            for (int i = 0; i < N; i++) {
                const Vector stored = step * to_vector(t.q[i][v] - Format::MIDDLE) + offset;
                const Vector off = absolute(stored - t.x[i][v]);
                largest = off > largest ? off : largest, total += off;
                const Bytes bytes = __builtin_convertvector(t.q[i][v], Bytes);
                for (int lane = 0; lane < LANES; lane++) t.codes[v * LANES + lane][i] = bytes[lane];
            }
        }
        for (int lane = 0; lane < LANES; lane++) error[0] = std::max(error[0], double(largest[lane]));
        const float sum_of_errors = sum(total);
        t.finite &= std::isfinite(sum_of_errors);
        if (!t.finite) return false;
        error[1] += sum_of_errors;
        for (int i = 0; i < count; i++) Format::put(t.codes + i * Format::GROUPS_OF_BLOCK, to + i * Format::SIZE);
        if (to == last) std::memcpy(out + block * Format::SIZE, last, count * Format::SIZE);
    }
    return true;
}

template <class T>
int pack_as(int form, const T* x, int64_t blocks, uint8_t* out, double* error) {
    switch (form) {
        case Q8_0: return pack<Bytes8>(x, blocks, out, error);
        case Q4_0: return pack<Symmetric<4>>(x, blocks, out, error);
        case Q5_0: return pack<Symmetric<5>>(x, blocks, out, error);
        case Q4_1: return pack<Offset<4>>(x, blocks, out, error);
        case Q5_1: return pack<Offset<5>>(x, blocks, out, error);
        case Q4_K: return pack<OffsetK<4>>(x, blocks, out, error);
        case Q5_K: return pack<OffsetK<5>>(x, blocks, out, error);
        case Q6_K: return pack<SymmetricK>(x, blocks, out, error);
    }
    return false;
}

}  // namespace

extern "C" {
// 1; 0 where a value is not finite or too large for the scale of a block.
int pack_float32(int form, const float* x, int64_t blocks, uint8_t* out, double* error) {
    return pack_as(form, x, blocks, out, error);
}
int pack_bfloat16(int form, const bfloat16* x, int64_t blocks, uint8_t* out, double* error) {
    return pack_as(form, x, blocks, out, error);
}
int pack_float16(int form, const float16* x, int64_t blocks, uint8_t* out, double* error) {
    return pack_as(form, x, blocks, out, error);
}
}
