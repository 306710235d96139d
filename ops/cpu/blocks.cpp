// Products of the block types of GGUF where they lie in the file: formats/gguf/kquants.py explains each one's layout.
//
// Weights become whole numbers of 16 bits, a chunk of 256 columns at a time, and meet activations that are whole numbers
// of 16 bits too, with a scale for each chunk. A product is then vpdpwssd or vpmaddwd, and exact. The K-types put the
// scale of a group, itself a whole number, into the weights, so that 256 products need one conversion to float; the
// other types need one for each block of 32. What is rounded is the activations, to 1/65,534 of the chunk's largest
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

struct Chunk {
    Words weight[CHUNK / WORDS];
    alignas(64) float scale[16], minimum[16];  // the second half of both is 0
};
static_assert(sizeof(Chunk) <= CHUNK * sizeof(float));  // as scratch_size expects

// A type of BLOCK weights in BYTES. ONE: a chunk has one scale. `unpack` reads the blocks that begin at p.
//
// Those of 32 weights: values<I>(p) are the WORDS from the I-th on.
template <class Type, int BYTES_, bool MINIMA_>
struct Simple {
    static constexpr int64_t BLOCK = 32, BYTES = BYTES_;
    static constexpr bool ONE = false, MINIMA = MINIMA_;

    __attribute__((always_inline)) static void unpack(const char* p, int64_t blocks, Chunk& to) {
        if (blocks < GROUPS) to = {};
        each<GROUPS>([&](auto i) __attribute__((always_inline)) {
            if (i >= blocks) return;
            const char* block = p + i * BYTES;
            to.scale[i] = half_at(block);
            if (MINIMA) to.minimum[i] = half_at(block + 2);
            each<GROUP / WORDS>([&](auto part) __attribute__((always_inline)) {
                to.weight[i * (GROUP / WORDS) + part] = Type::template values<part * WORDS>(block);
            });
        });
    }
};

// The lower four bits of 16 bytes, then the upper ones: the WORDS from the I-th on.
template <int I>
inline Words nibbles(const char* p) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m128i bytes = read<__m128i>(p);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes), _mm_srli_epi16(bytes, 4), 1);
    return (Words)_mm512_cvtepu8_epi16(_mm256_and_si256(both, _mm256_set1_epi8(15)));
#else
    const Words bytes = widened(p + I % 16);
    return I < 16 ? bytes & 15 : bytes >> 4;
#endif
}

// 16 where the I-th and following bits are set.
template <int I>
inline Words fifth_bits(const char* p) {
    const uint32_t bits = read<uint32_t>(p) >> I;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    return (Words)_mm512_maskz_set1_epi16(bits, 16);
#else
    Words words;
    for (int j = 0; j < WORDS; j++) words[j] = (bits >> j & 1) << 4;
    return words;
#endif
}

struct Q8_0Blocks : Simple<Q8_0Blocks, 34, false> {
    template <int I>
    static Words values(const char* p) { return __builtin_convertvector(read<Signed8>(p + 2 + I), Words); }
};
struct Q4_0Blocks : Simple<Q4_0Blocks, 18, false> {
    template <int I>
    static Words values(const char* p) { return nibbles<I>(p + 2) - 8; }
};
struct Q4_1Blocks : Simple<Q4_1Blocks, 20, true> {
    template <int I>
    static Words values(const char* p) { return nibbles<I>(p + 4); }
};
struct Q5_0Blocks : Simple<Q5_0Blocks, 22, false> {
    template <int I>
    static Words values(const char* p) { return (nibbles<I>(p + 6) | fifth_bits<I>(p + 2)) - 16; }
};
struct Q5_1Blocks : Simple<Q5_1Blocks, 24, true> {
    template <int I>
    static Words values(const char* p) { return nibbles<I>(p + 8) | fifth_bits<I>(p + 4); }
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
struct Wholes {
    static constexpr float MOST = 32767;  // 16 products with the largest weight of Q6_K, 32 · 128, are below 2^31
    static constexpr int TOKENS = 4;

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
                    std::memcpy(whole + i, &narrow, sizeof narrow);
                    total += q;
                }
                int32_t sum = 0;
                for (int lane = 0; lane < LANES; lane++) sum += total[lane];
                sums[group] = float(sum) * scale;
            }
            ((float*)(out + scales_at(n)))[at] = scale + sum(nothing);
        }
    }

    // What R rows and N tokens add to their accumulators in chunk `at`.
    template <bool ONE, bool MINIMA, int R, int N>
    __attribute__((always_inline)) static void meet(const Chunk* const* w, const char* const* x, int64_t at, int64_t n,
                                                    Vector total[N][R]) {
        constexpr int RUN = (ONE ? std::min(CHUNK, 16 * LANES) : GROUP) / WORDS;  // whose products fit, or share a scale
        Vector products[N][R] = {};
        each<CHUNK / WORDS / RUN>([&](auto run) __attribute__((always_inline)) {
            Integers whole[N][R] = {};
            each<RUN>([&](auto i) __attribute__((always_inline)) {
                for (int k = 0; k < N; k++) {
                    const Words some = read<Words>(x[k] + 2 * at * CHUNK + (run * RUN + i) * sizeof(Words));
                    for (int r = 0; r < R; r++) whole[k][r] = add_products(whole[k][r], w[r]->weight[run * RUN + i], some);
                }
            });
            for (int k = 0; k < N; k++)
                for (int r = 0; r < R; r++) {
                    const Vector numbers = __builtin_convertvector(whole[k][r], Vector);
                    if constexpr (ONE)
                        products[k][r] += numbers;
                    else
                        products[k][r] = fma(numbers, Vector{} + w[r]->scale[run * RUN * WORDS / GROUP], products[k][r]);
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
struct Unpacked : Wholes {
    explicit Unpacked(const Rows&) {}
    static constexpr int ROWS = LANES == 16 ? 4 : 2;

    template <int R, int N>
    __attribute__((always_inline)) void multiply(const Rows& w, const char* const* x, int64_t, Vector total[N][R]) const {
        for (int64_t at = 0; at < chunks(w.columns); at++) {
            const Chunk* here[R];
            for (int r = 0; r < R; r++) here[r] = (const Chunk*)(w.weight + r * w.row_bytes) + at;
            meet<ONE, MINIMA, R, N>(here, x, at, w.columns, total);
        }
    }
    static float finish(const Rows&, int, float y) { return y; }
};

// Blocks where they lie.
template <class Type>
struct InPlace : Wholes {
    explicit InPlace(const Rows&) {}
    static constexpr int ROWS = 1;
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
            meet<Type::ONE, Type::MINIMA, R, N>(here, x, at, w.columns, total);
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
            out[i] = ((const int16_t*)chunk.weight)[j] * chunk.scale[Type::ONE ? 0 : group] +
                     (Type::MINIMA ? chunk.minimum[group] : 0.f);
        }
    }
};

template <class Type>
constexpr Products blocks_of() {
    return {Wholes::bytes, Wholes::prepare, InPlace<Type>::multiply_all, InPlace<Type>::numbers};
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
