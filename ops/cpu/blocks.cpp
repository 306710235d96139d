// Products of the block types of GGUF where they lie in the file: formats/gguf/kquants.py explains each one's layout.
//
// Weights become whole numbers of 16 bits, a chunk of 256 columns at a time, and meet activations that are whole numbers
// of 16 bits too, with a scale for each chunk. A product is then vpdpwssd or vpmaddwd, and exact. The K-types put the
// scale of a group, itself a whole number, into the weights, so that 256 products need one conversion to float; the
// other types need one for two blocks of 32. What is rounded is the activations, to 1/65,534 of the chunk's largest
// number, where llama.cpp rounds them to 1/254.
//
// A few tokens unpack a chunk when they meet it, many unpack some rows once: the same numbers in the same order.
#include <cfloat>
#include <utility>

#include "tiles.h"

namespace {

constexpr int CHUNK = 256, GROUP = 32, GROUPS = CHUNK / GROUP;

// Twice as many whole numbers of 16 bits as there are lanes.
constexpr int WORDS = 2 * LANES;
typedef int16_t Words __attribute__((vector_size(4 * LANES)));
typedef uint8_t Codes8 __attribute__((vector_size(2 * LANES)));
typedef int8_t Signed8 __attribute__((vector_size(2 * LANES)));

inline float half_at(const char* p) { return to_float(read<float16>(p)); }
inline Words widened(const char* p) { return __builtin_convertvector(read<Codes8>(p), Words); }
inline Words all(int x) { return Words{} + int16_t(x); }

// Calls work(i) for i = 0 .. COUNT, each i a compile-time constant.
template <int COUNT, class Work>
__attribute__((always_inline)) inline void each(Work work) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        (work(std::integral_constant<int, I>()), ...);
    }(std::make_integer_sequence<int, COUNT>());
}

// Two products to a lane, added to `sum`.
inline Integers add_products(Integers sum, Words a, Words b) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    return (Integers)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    return (Integers)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16((__m512i)a, (__m512i)b));
#elif defined(__AVX2__)
    return (Integers)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#else
    for (int lane = 0; lane < LANES; lane++) sum[lane] += a[2 * lane] * b[2 * lane] + a[2 * lane + 1] * b[2 * lane + 1];
    return sum;
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// 256 weights of a row: weight · scale + minimum, the latter two those of the group of 32; the K-types have one scale.

// Where there is a scale for each group, the halves of a vector belong to two of them, so that 64 products need one
// conversion: `place` is where a column is, for weights and activations.
struct Chunk {
    Words weight[CHUNK / WORDS];
    alignas(64) float scale[16], minimum[16];  // the second half of both is 0
};
constexpr int place(bool one, int column) {
    const int group = column / GROUP, i = column % GROUP;
    return one ? column : group / 2 * 64 + i / LANES * WORDS + group % 2 * LANES + i % LANES;
}
static_assert(sizeof(Chunk) <= CHUNK * sizeof(float));  // as scratch_size expects

// LANES bytes from a, then as many from b.
template <class Bytes>
inline Words widened(const char* a, const char* b) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(read<__m128i>(a)), read<__m128i>(b), 1);
    return __builtin_convertvector((Bytes)both, Words);
#else
    char both[WORDS];
    std::memcpy(both, a, LANES), std::memcpy(both + LANES, b, LANES);
    return __builtin_convertvector(read<Bytes>(both), Words);
#endif
}

// Of two blocks with 16 bytes of codes the columns from the I-th on: lower four bits first, then the upper ones.
template <int I>
inline Words nibbles(const char* a, const char* b) {
    const Words bytes = widened<Codes8>(a + I % 16, b + I % 16);
    return I < 16 ? bytes & 15 : bytes >> 4;
}

// 16 where a fifth bit is set.
template <int I>
inline Words fifth_bits(const char* a, const char* b) {
    constexpr uint32_t SOME = (1ull << LANES) - 1;
    const uint32_t bits = (read<uint32_t>(a) >> I & SOME) | (read<uint32_t>(b) >> I & SOME) << LANES;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    return (Words)_mm512_maskz_set1_epi16(bits, 16);
#else
    Words words;
    for (int j = 0; j < WORDS; j++) words[j] = (bits >> j & 1) << 4;
    return words;
#endif
}

// A type of BLOCK weights in BYTES. ONE: a chunk has one scale. `unpack` reads the blocks that begin at p.
//
// Those of 32 weights: values<I>(a, b) are LANES numbers of block a from the I-th on, then those of b.
template <class Type, int BYTES_, bool MINIMA_>
struct Simple {
    static constexpr int64_t BLOCK = 32, BYTES = BYTES_;
    static constexpr bool ONE = false, MINIMA = MINIMA_;

    __attribute__((always_inline)) static void unpack(const char* p, int64_t blocks, Chunk& to) {
        alignas(64) char last[GROUPS * BYTES_];
        if (blocks < GROUPS) {
            std::memset(last, 0, sizeof last);
            p = (const char*)std::memcpy(last, p, blocks * BYTES);
        }
        each<GROUPS>([&](auto i) __attribute__((always_inline)) {
            to.scale[i] = half_at(p + i * BYTES);
            if (MINIMA) to.minimum[i] = half_at(p + i * BYTES + 2);
        });
        each<GROUPS / 2>([&](auto pair) __attribute__((always_inline)) {
            const char *a = p + 2 * pair * BYTES, *b = a + BYTES;
            each<GROUP / LANES>([&](auto i) __attribute__((always_inline)) {
                to.weight[pair * (GROUP / LANES) + i] = Type::template values<i * LANES>(a, b);
            });
        });
    }
};

struct Q8_0Blocks : Simple<Q8_0Blocks, 34, false> {
    template <int I>
    static Words values(const char* a, const char* b) { return widened<Signed8>(a + 2 + I, b + 2 + I); }
};
struct Q4_0Blocks : Simple<Q4_0Blocks, 18, false> {
    template <int I>
    static Words values(const char* a, const char* b) { return nibbles<I>(a + 2, b + 2) - 8; }
};
struct Q4_1Blocks : Simple<Q4_1Blocks, 20, true> {
    template <int I>
    static Words values(const char* a, const char* b) { return nibbles<I>(a + 4, b + 4); }
};
struct Q5_0Blocks : Simple<Q5_0Blocks, 22, false> {
    template <int I>
    static Words values(const char* a, const char* b) {
        return (nibbles<I>(a + 6, b + 6) | fifth_bits<I>(a + 2, b + 2)) - 16;
    }
};
struct Q5_1Blocks : Simple<Q5_1Blocks, 24, true> {
    template <int I>
    static Words values(const char* a, const char* b) {
        return nibbles<I>(a + 8, b + 8) | fifth_bits<I>(a + 4, b + 4);
    }
};

// Eight groups of 32, each with a scale and a minimum of 6 bits.
template <int BITS>
struct WithMinima {
    static constexpr int64_t BLOCK = 256, BYTES = BITS == 4 ? 144 : 176;
    static constexpr bool ONE = true, MINIMA = true;

    __attribute__((always_inline)) static void unpack(const char* p, int64_t, Chunk& to) {
        const uint32_t first = read<uint32_t>(p + 4), second = read<uint32_t>(p + 8), third = read<uint32_t>(p + 12);
        const uint32_t scales[2] = {first & 0x3f3f3f3f, (third & 0x0f0f0f0f) | (first >> 2 & 0x30303030)};
        const uint32_t minima[2] = {second & 0x3f3f3f3f, (third >> 4 & 0x0f0f0f0f) | (second >> 2 & 0x30303030)};
        const uint64_t all_scales = uint64_t(scales[1]) << 32 | scales[0];
        to.scale[0] = half_at(p);
        const float minimum = -half_at(p + 2);
        typedef uint8_t Eight __attribute__((vector_size(GROUPS)));
        typedef int32_t EightWhole __attribute__((vector_size(4 * GROUPS)));
        typedef float EightFloats __attribute__((vector_size(4 * GROUPS)));
        const auto whole = __builtin_convertvector(read<Eight>(minima), EightWhole);
        const EightFloats scaled = __builtin_convertvector(whole, EightFloats) * minimum;
        std::memcpy(to.minimum, &scaled, sizeof scaled);
        constexpr int PARTS = GROUP / WORDS;
        each<4>([&](auto pair) __attribute__((always_inline)) {
            each<PARTS>([&](auto part) __attribute__((always_inline)) {
                const Words codes = widened(p + BYTES - 128 + 32 * pair + part * WORDS);
                Words low = codes & 15, high = codes >> 4;
                if constexpr (BITS == 5) {
                    const Words fifths = widened(p + 16 + part * WORDS);
                    low |= fifths >> (2 * pair) << 4 & 16;
                    high |= fifths >> (2 * pair + 1) << 4 & 16;
                }
                to.weight[2 * pair * PARTS + part] = low * all(all_scales >> (16 * pair) & 255);
                to.weight[(2 * pair + 1) * PARTS + part] = high * all(all_scales >> (16 * pair + 8) & 255);
            });
        });
    }
};

// 16 groups of 16, each with a scale of 8 bits. In each half four runs of 32: see pack_q6_k.
struct Q6_KBlocks {
    static constexpr int64_t BLOCK = 256, BYTES = 210;
    static constexpr bool ONE = true, MINIMA = false;

    // The scales of two groups of 16, for the WORDS from the I-th of 32 on.
    template <int I>
    static Words scales_of(const int8_t* scales) {
        if constexpr (WORDS == 32) {
            alignas(64) static constexpr int16_t FRONT[32] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                              -1, -1, -1, -1, -1, -1, -1, -1};
            const Words front = read<Words>(FRONT);
            return (all(scales[0]) & front) | (all(scales[1]) & ~front);
        } else {
            return all(scales[I / 16]);
        }
    }
    __attribute__((always_inline)) static void unpack(const char* p, int64_t, Chunk& to) {
        to.scale[0] = half_at(p + 208);
        constexpr int PARTS = GROUP / WORDS;
        each<2>([&](auto half) __attribute__((always_inline)) {
            each<PARTS>([&](auto part) __attribute__((always_inline)) {
                const Words upper = widened(p + 128 + 32 * half + part * WORDS);
                each<2>([&](auto run) __attribute__((always_inline)) {
                    const Words lower = widened(p + 64 * half + 32 * run + part * WORDS);
                    const Words one = (lower & 15) | (upper >> (2 * run) << 4 & 48);
                    const Words two = lower >> 4 | (upper >> (4 + 2 * run) << 4 & 48);
                    const int8_t* scales = (const int8_t*)p + 192 + 8 * half + 2 * run;
                    constexpr int I = part * WORDS;
                    to.weight[(4 * half + run) * PARTS + part] = (one - 32) * scales_of<I>(scales);
                    to.weight[(4 * half + 2 + run) * PARTS + part] = (two - 32) * scales_of<I>(scales + 4);
                });
            });
        });
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Their products.

int64_t chunks(int64_t n) { return (n + CHUNK - 1) / CHUNK; }

// Activations as whole numbers. Of n: [chunks, 256] numbers, filled up with zeros; [chunks, 16] sums of 32 of them, as
// floats; [chunks] scales. Each array is a stream of its own.
template <bool ONE>
struct Wholes {
    static constexpr float MOST = 32767;  // 16 products with the largest weight of Q6_K, 32 · 128, are below 2^31

    static int64_t sums_at(int64_t n) { return chunks(n) * CHUNK * 2; }
    static int64_t scales_at(int64_t n) { return sums_at(n) + chunks(n) * 64; }
    static int64_t bytes(int64_t n) { return rounded_up(scales_at(n) + chunks(n) * 4, 64); }

    static void prepare(const float* x, int64_t n, char* out) {
        for (int64_t at = 0; at < chunks(n); at++) {
            alignas(64) float padded[CHUNK] = {};
            std::memcpy(padded, x + at * CHUNK, std::min<int64_t>(CHUNK, n - at * CHUNK) * sizeof(float));
            Vector largest = {}, nothing = {};
            for (int i = 0; i < CHUNK; i += LANES) {
                const Vector v = load(padded + i), size = v < 0.f ? -v : v;
                largest = size > largest ? size : largest;
                nothing += v - v;  // NaN where something is not finite
            }
            float most = 0;
            for (int lane = 0; lane < LANES; lane++) most = std::max(most, largest[lane]);
            const float scale = most / MOST, inverse = scale >= FLT_MIN && scale < INFINITY ? 1 / scale : 0;
            int16_t* whole = (int16_t*)out + at * CHUNK;
            float* sums = (float*)(out + sums_at(n)) + at * 16;
            std::fill(sums, sums + 16, 0.f);
            for (int group = 0; group < GROUPS; group++) {
                Integers total = {};
                for (int i = group * GROUP; i < (group + 1) * GROUP; i += LANES) {
                    const Vector rounded = load(padded + i) * inverse + ROUND;
                    const Integers q = (Integers)rounded - (Integers)(Vector{} + ROUND);
                    typedef int16_t Narrow __attribute__((vector_size(2 * LANES)));
                    const Narrow narrow = __builtin_convertvector(q, Narrow);
                    std::memcpy(whole + place(ONE, i), &narrow, sizeof narrow);
                    total += q;
                }
                int32_t sum = 0;
                for (int lane = 0; lane < LANES; lane++) sum += total[lane];
                sums[group] = float(sum) * scale;
            }
            ((float*)(out + scales_at(n)))[at] = scale + sum(nothing);
        }
    }

    // The first of two numbers in the lower half of the lanes, the second in the upper one.
    static Vector halves(const float* two) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
        return (Vector)_mm512_mask_broadcastss_ps(_mm512_set1_ps(two[0]), 0xff00, _mm_load_ss(two + 1));
#else
        Vector lanes;
        for (int lane = 0; lane < LANES; lane++) lanes[lane] = two[lane >= LANES / 2];
        return lanes;
#endif
    }

    // What R rows and N tokens add to their accumulators in chunk `at`.
    template <bool MINIMA, int R, int N>
    __attribute__((always_inline)) static void meet(const Chunk* const* w, const char* const* x, int64_t at, int64_t n,
                                                    Vector total[N][R]) {
        constexpr int RUN = (ONE ? std::min(CHUNK, 16 * LANES) : 64) / WORDS;  // whose products fit, or share two scales
        Vector products[N][R] = {};
        each<CHUNK / WORDS / RUN>([&](auto run) __attribute__((always_inline)) {
            Integers whole[N][R] = {};
            each<RUN>([&](auto i) __attribute__((always_inline)) {
                for (int k = 0; k < N; k++) {
                    const Words some = read<Words>(x[k] + 2 * at * CHUNK + (run * RUN + i) * sizeof(Words));
                    for (int r = 0; r < R; r++) whole[k][r] = add_products(whole[k][r], w[r]->weight[run * RUN + i], some);
                }
            });
            for (int r = 0; r < R; r++) {
                const Vector scales = ONE ? Vector{} : halves(w[r]->scale + 2 * run);
                for (int k = 0; k < N; k++) {
                    const Vector numbers = __builtin_convertvector(whole[k][r], Vector);
                    products[k][r] = ONE ? run ? products[k][r] + numbers : numbers : fma(numbers, scales, products[k][r]);
                }
            }
        });
        for (int k = 0; k < N; k++) {
            const Vector scale = Vector{} + ((const float*)(x[k] + scales_at(n)))[at];
            const float* sums = (const float*)(x[k] + sums_at(n)) + at * 16;
            for (int r = 0; r < R; r++) {
                if (ONE) products[k][r] *= w[r]->scale[0];
                total[k][r] = fma(products[k][r], scale, total[k][r]);
                for (int i = 0; MINIMA && i < GROUPS; i += LANES)
                    total[k][r] = fma(load(w[r]->minimum + i), load(sums + i), total[k][r]);
            }
        }
    }
};

// Chunks that were unpacked before, some rows of them.
template <bool ONE, bool MINIMA>
struct Unpacked : Wholes<ONE> {
    explicit Unpacked(const Rows&) {}
    static constexpr int ROWS = LANES == 16 ? 4 : 2, TOKENS = 4;

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, int64_t, Vector total[N][R]) const {
        for (int64_t at = 0; at < chunks(w.columns); at++) {
            const Chunk* here[R];
            for (int r = 0; r < R; r++) here[r] = (const Chunk*)(w.weight + r * w.row_bytes) + at;
            Wholes<ONE>::template meet<MINIMA, R, N>(here, x, at, w.columns, total);
        }
    }
    static float finish(const Rows&, int, float y) { return y; }
};

// Blocks where they lie.
template <class Type>
struct InPlace : Wholes<Type::ONE> {
    explicit InPlace(const Rows&) {}
    static constexpr int ROWS = 1, TOKENS = 4;
    static constexpr int64_t BYTES = CHUNK / Type::BLOCK * Type::BYTES;  // of a chunk

    __attribute__((always_inline)) static void unpack(const char* row, int64_t columns, int64_t at, Chunk& to) {
        Type::unpack(row + at * BYTES, (columns - at * CHUNK) / Type::BLOCK, to);
    }

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, int64_t ahead,
                                                 Vector total[N][R]) const {
        for (int64_t at = 0; at < chunks(w.columns); at++) {
            for (int64_t line = 0; line < BYTES && ahead; line += 64)
                __builtin_prefetch(w.weight + at * BYTES + line + ahead);
            Chunk chunk;
            if (LANES < 16 || Type::MINIMA) std::fill(chunk.minimum + GROUPS, chunk.minimum + 16, 0.f);
            unpack(w.weight, w.columns, at, chunk);
            const Chunk* here[R] = {&chunk};
            Wholes<Type::ONE>::template meet<Type::MINIMA, R, N>(here, x, at, w.columns, total);
        }
    }
    static float finish(const Rows&, int, float y) { return y; }

    static constexpr int MANY = 5;
    static void multiply_all(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y,
                             float* scratch) {
        if (count < MANY) return ::multiply<InPlace>(w, rows, x, count, y);
        const int64_t width = chunks(w.columns);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t at = 0; at < width; at++)
                unpack(w.weight + r * w.row_bytes, w.columns, at, ((Chunk*)scratch)[r * width + at] = {});
        const Rows once = {(const char*)scratch, nullptr, width * int64_t(sizeof(Chunk)), w.columns, 0, {}};
        ::multiply<Unpacked<Type::ONE, Type::MINIMA>>(once, rows, x, count, y);
    }

    static void numbers(const char* row, int64_t columns, float* out) {
        Chunk chunk = {};
        for (int64_t i = 0; i < columns; i++) {
            const int64_t j = i % CHUNK, group = j / GROUP;
            if (j == 0) unpack(row, columns, i / CHUNK, chunk);
            out[i] = ((const int16_t*)chunk.weight)[place(Type::ONE, j)] * chunk.scale[Type::ONE ? 0 : group] +
                     (Type::MINIMA ? chunk.minimum[group] : 0.f);
        }
    }
};

template <class Type>
constexpr Products blocks_of() {
    return {Wholes<Type::ONE>::bytes, Wholes<Type::ONE>::prepare, InPlace<Type>::multiply_all, InPlace<Type>::numbers};
}

}  // namespace

const Products q8_0_products = blocks_of<Q8_0Blocks>();
const Products q4_0_products = blocks_of<Q4_0Blocks>();
const Products q4_1_products = blocks_of<Q4_1Blocks>();
const Products q5_0_products = blocks_of<Q5_0Blocks>();
const Products q5_1_products = blocks_of<Q5_1Blocks>();
const Products q4_k_products = blocks_of<WithMinima<4>>();
const Products q5_k_products = blocks_of<WithMinima<5>>();
const Products q6_k_products = blocks_of<Q6_KBlocks>();
