// Passes over a row of logits; ops/cpu/row.py says what each is, and does the same in NumPy to the bit.
//
// So nothing here is fused, a sum has the same order whatever the width of vectors, and rows are whole blocks.
#include "row.h"

#include <functional>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 512;
constexpr int SUMS = 16;  // running sums of a block

// Blocks of logits as float32, one after another or some of them, with the penalties; behind the last logit -inf.
class Blocks {
   public:
    explicit Blocks(const Logits& logits, int64_t first = 0)
        : of(logits), said(std::lower_bound(of.ids, of.ids + of.count, first)) {}

    // The block from i on; i never falls. Overwritten by the next call.
    const float* operator()(int64_t i) {
        const int64_t count = std::min(BLOCK, of.size - i);
        const int32_t* const end = of.ids + of.count;
        while (said < end && *said < i) said++;
        const bool penalized = said < end && *said < i + count;
        if (of.bits == 32 && count == BLOCK && !penalized) return (const float*)of.x + i;
        int64_t k = 0;
        if (of.bits == 32)
            std::memcpy(room, (const float*)of.x + i, (k = count) * sizeof(float));
        for (; k + LANES <= count; k += LANES) store(room + k, load((const bfloat16*)of.x + i + k));
        for (; k < count; k++) room[k] = to_float(((const bfloat16*)of.x)[i + k]);
        std::fill(room + count, room + BLOCK, -INFINITY);
        for (; said < end && *said < i + count; said++) {
            const int32_t times = of.times[said - of.ids];
            float& x = room[*said - i];
            x = std::max(x, 0.f) / of.repetition + std::min(x, 0.f) * of.repetition;
            x -= of.presence * (times > 0);
            x -= of.frequency * times;
        }
        return room;
    }

   private:
    const Logits& of;
    const int32_t* said;  // the next one
    float room[BLOCK];
};

// The sum of value(i, x[i]) over the vectors of a block.
template <class Value>
inline float block_sum(const float* x, Value value) {
    Vector totals[SUMS / LANES] = {};
    for (int64_t i = 0; i < BLOCK; i += SUMS)
        for (int part = 0; part < SUMS / LANES; part++)
            totals[part] += value(i + part * LANES, load(x + i + part * LANES));
    float sums[SUMS];
    std::memcpy(sums, totals, sizeof sums);
    for (int half = SUMS / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

inline Vector power_of_two(Integers n) { return (Vector)((n + 127) << 23); }

// exp(x) for x <= 0; 0 below -104. In two steps, as the power of two may be below the smallest normal number.
inline Vector exponential(Vector x) {
    const Vector lowest = Vector{} - 104.f, one = Vector{} + 1.f;
    const Vector y = x > lowest ? x : lowest;
    const Vector rounded = y * 1.44269504f + ROUND, n = rounded - ROUND;
    const Vector r = y - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
    Vector p = one / 5040.f;
    for (float divisor : {720.f, 120.f, 24.f, 6.f, 2.f, 1.f, 1.f}) p = p * r + one / divisor;
    const Integers whole = (Integers)rounded - (Integers)(Vector{} + ROUND), least = Integers{} - 126;
    const Integers first = whole > least ? whole : least;
    const Vector result = p * power_of_two(first) * power_of_two(whole - first);
    return x > lowest ? result : Vector{};
}

}  // namespace

extern "C" {
void row_copy(const Logits* x, float* to) {
    Blocks block(*x);
    for (int64_t i = 0; i < x->size; i += BLOCK) std::memcpy(to + i, block(i), BLOCK * sizeof(float));
}

// The first index of the largest number, or one of NaN.
int64_t row_largest(const Logits* x, float* tops) {
    Blocks block(*x);
    int64_t best = 0, blocks = 0;
    for (int64_t i = 0; i < x->size; i += BLOCK, blocks++) {
        const float* some = block(i);
        Vector most = load(some);
        Integers bad = most != most;
        for (int64_t k = LANES; k < BLOCK; k += LANES) {
            const Vector v = load(some + k);
            most = v > most ? v : most, bad |= v != v;
        }
        float largest = most[0];
        int32_t any = bad[0];
        for (int lane = 1; lane < LANES; lane++) largest = std::max(largest, most[lane]), any |= bad[lane];
        tops[blocks] = any ? NAN : largest;
        if (!(tops[best] >= tops[blocks]) && tops[best] == tops[best]) best = blocks;
    }
    Blocks again(*x, best * BLOCK);
    const float* some = again(best * BLOCK);
    int64_t k = 0;
    while (some[k] == some[k] && some[k] != tops[best]) k++;
    return best * BLOCK + k;
}

void row_weigh(const Logits* x, float factor, float largest, float* weights, float* sums) {
    Blocks block(*x);
    for (int64_t i = 0; i < x->size; i += BLOCK)
        sums[i / BLOCK] = block_sum(block(i), [&](int64_t k, Vector some) {
            const Vector e = exponential(some * factor - largest);
            store(weights + i + k, e);
            return e;
        });
}

// Ascending indexes of the weights that are at least `least`, and those weights; returns how many. -1, with nothing
// written to `weights`, where they are more than `most`.
int64_t row_likely(const Logits* x, float factor, float largest, float least, int64_t most, int64_t* ids, float* weights) {
    Blocks block(*x);
    std::vector<float> likely;
    // In a block with nothing larger no exponential is asked for: it is right to 1e-6, above the smallest numbers.
    const float bound = least > 1e-30f ? std::log(least) - 1e-3f : -INFINITY;
    for (int64_t i = 0; i < x->size; i += BLOCK) {
        const float* some = block(i);
        Vector top = load(some) * factor - largest;
        for (int64_t k = LANES; k < BLOCK; k += LANES) {
            const Vector v = load(some + k) * factor - largest;
            top = v > top ? v : top;
        }
        float highest = top[0];
        for (int lane = 1; lane < LANES; lane++) highest = std::max(highest, top[lane]);
        if (!(highest >= bound)) continue;
        for (int64_t k = 0; k < BLOCK; k += LANES) {
            const Vector e = exponential(load(some + k) * factor - largest);
            for (int lane = 0; lane < LANES; lane++)
                if (e[lane] >= least && i + k + lane < x->size) {
                    if ((int64_t)likely.size() == most) return -1;
                    ids[likely.size()] = i + k + lane, likely.push_back(e[lane]);
                }
        }
    }
    std::copy(likely.begin(), likely.end(), weights);
    return likely.size();
}

// The index of the first weight up to which their sum is larger than this share of the whole; see row.py's `draw`.
int64_t row_draw(const float* weights, const float* sums, int64_t blocks, double share) {
    double whole = 0, before = 0, inside = 0;
    for (int64_t i = 0; i < blocks; i++) whole += sums[i];
    const double drawn = share * whole;
    int64_t block = 0;
    while (block < blocks && !(before + sums[block] > drawn)) before += sums[block++];
    const int64_t start = block * BLOCK, end = std::min(block + 1, blocks) * BLOCK;
    for (int64_t i = start; i < end; i++)
        if ((inside += weights[i]) + before > drawn) return i;
    for (int64_t i = end - 1; i > 0; i--)
        if (weights[i] != 0) return i;
    return 0;
}

int64_t row_below(const float* weights, int64_t blocks, float weight, int64_t index, float* sums) {
    for (int64_t block = 0; block < blocks; block++)
        sums[block] = block_sum(weights + block * BLOCK, [&](int64_t, Vector some) { return some < weight ? some : Vector{}; });
    int64_t equal = 0;
    for (int64_t i = 0; i <= index; i++) equal += weights[i] == weight;
    return equal;
}

void row_cut(float* weights, int64_t blocks, float weight, int64_t index, float* sums) {
    for (int64_t i = 0; i <= index; i++)
        if (weights[i] == weight) weights[i] = 0;
    for (int64_t block = 0; block < blocks; block++)
        sums[block] = block_sum(weights + block * BLOCK, [&](int64_t k, Vector some) {
            const Vector kept = some >= weight ? some : Vector{};
            store(weights + block * BLOCK + k, kept);
            return kept;
        });
}

// Ascending indexes of the numbers that are at least the count-th largest, and those numbers; returns how many.
// `count` is at most the number of blocks.
int64_t row_best(const Logits* x, const float* tops, int64_t count, int64_t* ids, float* best) {
    Blocks block(*x);
    std::vector<float> largest(tops, tops + (x->size + BLOCK - 1) / BLOCK);
    auto bound_of = [&](std::vector<float>& numbers) {
        std::nth_element(numbers.begin(), numbers.begin() + count - 1, numbers.end(), std::greater<float>());
        return numbers[count - 1];
    };
    float bound = bound_of(largest);  // at least `count` blocks have one of these
    int64_t found = 0;
    for (int64_t i = 0; i < x->size; i += BLOCK) {
        if (tops[i / BLOCK] < bound) continue;
        const float* some = block(i);
        for (int64_t k = 0; k < std::min(BLOCK, x->size - i); k++)
            if (some[k] >= bound) ids[found] = i + k, best[found++] = some[k];
    }
    std::vector<float> numbers(best, best + found);
    bound = bound_of(numbers);
    int64_t kept = 0;
    for (int64_t i = 0; i < found; i++)
        if (best[i] >= bound) ids[kept] = ids[i], best[kept++] = best[i];
    return kept;
}

void row_drop(float* weights, int64_t n, double share, float least) {
    int64_t equal = 0;  // that are dropped of the ones at the edge
    if (share > 0) {
        std::vector<float> ranked(weights, weights + n);
        std::sort(ranked.begin(), ranked.end());
        double whole = 0, running = 0;
        for (float weight : ranked) whole += weight;
        int64_t dropped = 0;
        while (dropped < n - 1 && (running += ranked[dropped]) <= share * whole) dropped++;
        const float edge = ranked[dropped];
        if (edge >= least) least = edge, equal = dropped - (std::lower_bound(ranked.begin(), ranked.end(), edge) - ranked.begin());
    }
    for (int64_t i = 0; i < n; i++)
        if (weights[i] < least || (weights[i] == least && equal-- > 0)) weights[i] = 0;
}
}
