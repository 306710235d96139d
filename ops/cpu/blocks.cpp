// Products of the block types of GGUF where they lie in the file: formats/gguf/kquants.py explains each one's layout,
// groups.h how their codes are multiplied. Here is what a type is: codes, scales and minima of some groups.
#include "groups.h"

namespace {

inline float half_at(const char* p) { return to_float(read<float16>(p)); }

// Vector I of a chunk: of(run) is where the 32 bytes of a run of 32 columns lie.
template <int I, class Of>
__attribute__((always_inline)) inline Unsigned runs(Of of) {
#if LANES_OF_INTEGERS == 16
    return (Unsigned)_mm512_inserti64x4(_mm512_castsi256_si512(read<__m256i>(of(2 * I))), read<__m256i>(of(2 * I + 1)), 1);
#else
    return read<Unsigned>(of(I * LANES / 8) + I * sizeof(Unsigned) % 32);
#endif
}

// For vector I: of(run) in each of a run's lanes.
template <int I, class Of>
__attribute__((always_inline)) inline Pairs for_runs(Of of) {
    Pairs result;
    for (int pair = 0; pair < LANES / 2; pair++) result[pair] = of((I * LANES + 2 * pair) / 8);
    return result;
}

// Vector I, of runs of 16 bytes: the lower four bits of all, then the upper ones.
template <int I, class Of>
__attribute__((always_inline)) inline Unsigned nibbles(Of of) {
    Pairs bytes, shift;
    for (int pair = 0; pair < LANES / 2; pair++) shift[pair] = (I * LANES / 4 + pair / 2) % 2 * 4;
#if LANES_OF_INTEGERS == 16
    const __m512i first = _mm512_broadcast_i32x4(read<__m128i>(of(2 * I)));
    bytes = (Pairs)_mm512_mask_broadcast_i32x4(first, 0xff00, read<__m128i>(of(2 * I + 1)));
#elif LANES_OF_INTEGERS == 8
    bytes = (Pairs)_mm256_broadcastsi128_si256(read<__m128i>(of(I)));
#else
    for (int piece = 0; piece < LANES / 4; piece++)
        std::memcpy((char*)&bytes + 16 * piece, of((I * LANES / 4 + piece) / 2), 16);
#endif
    return (Unsigned)(bytes >> shift) & 0x0f0f0f0f;
}

// Vector I: 16 where a bit is set of the 32 that lie at of(run).
template <int I, class Of>
__attribute__((always_inline)) inline Unsigned fifth_bits(Of of) {
#if LANES_OF_INTEGERS == 16
    const uint64_t bits = read<uint32_t>(of(2 * I)) | uint64_t(read<uint32_t>(of(2 * I + 1))) << 32;
    return (Unsigned)_mm512_maskz_set1_epi8(bits, 16);
#elif LANES_OF_INTEGERS == 8
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(read<int32_t>(of(I))), _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i bit = _mm256_set1_epi64x(0x8040201008040201);
    return (Unsigned)_mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit) & 0x10101010;
#else
    uint8_t bytes[sizeof(Unsigned)];
    const uint32_t bits = read<uint32_t>(of(I * LANES / 8)) >> I * sizeof(Unsigned) % 32;
    for (unsigned i = 0; i < sizeof bytes; i++) bytes[i] = (bits >> i & 1) << 4;
    return read<Unsigned>(bytes);
#endif
}

// LANES numbers of 8 bits, those of `low` and then of `high`, as those of their groups.
template <int GROUP, bool SIGNED>
__attribute__((always_inline)) inline Vector spread(uint64_t low, uint64_t high) {
#ifdef __AVX2__
    alignas(16) static constexpr auto ORDER = [] {
        std::array<int8_t, 16> order = {};
        for (int lane = 0; lane < 16; lane++) order[lane] = group_of(lane % LANES, GROUP);
        return order;
    }();
    const __m128i bytes = _mm_shuffle_epi8(_mm_set_epi64x(high, low), _mm_load_si128((const __m128i*)ORDER.data()));
#if LANES_OF_INTEGERS == 16
    return (Vector)_mm512_cvtepi32_ps(SIGNED ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#else
    return (Vector)_mm256_cvtepi32_ps(SIGNED ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#endif
#else
    return by_group<Vector, GROUP>([&](auto group) {
        const uint8_t byte = (group < 8 ? low : high) >> group % 8 * 8;
        return float(SIGNED ? int8_t(byte) : byte);
    });
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks of 32 weights in BYTES, the scale first and then, where there is one, the minimum.

template <int BITS_, int BYTES_, int OFFSET_, bool MINIMA_ = false>
struct Simple {
    static constexpr int BITS = BITS_, GROUP = 32, OFFSET = OFFSET_;
    static constexpr int64_t BLOCK = 32, BYTES = BYTES_;
    static constexpr bool MINIMA = MINIMA_;

    static Vector halves(const char* p) {
        const auto all = by_group<Halves, GROUP>([&](auto group) { return read<uint16_t>(p + group * BYTES); });
        return load((const float16*)&all);
    }
    static Vector scales(const char* p, int) { return halves(p); }
    static Vector minima(const char* p, int) { return halves(p + 2); }
};

struct Q8_0Blocks : Simple<8, 34, 128> {
    template <int I>
    static Unsigned codes(const char* p, int) {
        return runs<I>([&](int run) { return p + run * BYTES + 2; }) ^ 0x80808080;
    }
};

template <int BYTES_, int OFFSET_, bool MINIMA_ = false>
struct FourBits : Simple<4, BYTES_, OFFSET_, MINIMA_> {
    static const char* nibbles_of(const char* p, int run) { return p + run * BYTES_ + (MINIMA_ ? 4 : 2); }
    template <int I>
    static Unsigned codes(const char* p, int) {
        return nibbles<I>([&](int run) { return nibbles_of(p, run); });
    }
#if LANES_OF_INTEGERS == 8
    static void codes_by_group(const char* p, Unsigned* codes) {  // both halves of a byte are transposed together
        for (int i = 0; i < 4; i++) {
            const __m128i even = read<__m128i>(nibbles_of(p, 2 * i)), odd = read<__m128i>(nibbles_of(p, 2 * i + 1));
            codes[i] = (Unsigned)_mm256_inserti128_si256(_mm256_castsi128_si256(even), odd, 1);
        }
        transpose<32, true>(codes);
    }
#endif
};

template <int BYTES_, int OFFSET_, bool MINIMA_ = false>
struct FiveBits : Simple<5, BYTES_, OFFSET_, MINIMA_> {
    template <int I>
    static Unsigned codes(const char* p, int) {
        auto bits = [&](int run) { return p + run * BYTES_ + (MINIMA_ ? 4 : 2); };
        return nibbles<I>([&](int run) { return bits(run) + 4; }) | fifth_bits<I>(bits);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Blocks of 256: eight groups of 32, each with a scale and a minimum of 6 bits.

template <int BITS_>
struct WithMinima {
    static constexpr int BITS = BITS_, GROUP = 32, OFFSET = 0;
    static constexpr int64_t BLOCK = 256, BYTES = BITS == 4 ? 144 : 176;
    static constexpr bool MINIMA = true;

    template <int I>
    static Unsigned codes(const char* p, int first) {
        auto block = [&](int run) { return p + (first + run) / 8 * BYTES; };
        const Unsigned two = runs<I>([&](int run) { return block(run) + BYTES - 128 + (first + run) % 8 / 2 * 32; });
        Unsigned codes = (Unsigned)((Pairs)two >> for_runs<I>([&](int run) { return run % 2 * 4; })) & 0x0f0f0f0f;
        if constexpr (BITS == 5) {
            const Pairs fifths = (Pairs)runs<I>([&](int run) { return block(run) + 16; });
            const Pairs left = for_runs<I>([&](int run) { return std::max(4 - (first + run) % 8, 0); });
            const Pairs right = for_runs<I>([&](int run) { return std::max((first + run) % 8 - 4, 0); });
            codes |= (Unsigned)(fifths << left >> right) & 0x10101010;
        }
        return codes;
    }

#if LANES_OF_INTEGERS == 8
    static void codes_by_group(const char* p, Unsigned* codes) {  // the even groups are lower halves of bytes, the odd ones upper ones
        for (int i = 0; i < 4; i++) codes[i] = read<Unsigned>(p + BYTES - 128 + 32 * i);
        transpose_quarters(codes);
        for (int i = 0; i < 4; i++) {
            const auto even = (__m256i)lower_nibbles(codes[i]), odd = (__m256i)upper_nibbles(codes[i]);
            codes[i] = (Unsigned)_mm256_permute2x128_si256(even, odd, 0x20), codes[4 + i] = (Unsigned)_mm256_permute2x128_si256(even, odd, 0x31);
        }
        if constexpr (BITS == 5) {
            const auto left = by_group<Unsigned, GROUP>([](int group) { return std::max(4 - group, 0); });
            const auto right = by_group<Unsigned, GROUP>([](int group) { return std::max(group - 4, 0); });
            for (int i = 0; i < 8; i++) codes[i] |= (Unsigned{} + read<uint32_t>(p + 16 + 4 * i)) << left >> right & 0x10101010;
        }
    }
#endif

    // The d or dmin of each lane's block.
    static Vector of_blocks(const char* p) {
        Vector all = Vector{} + half_at(p);
#if LANES_OF_INTEGERS == 16
        all = (Vector)_mm512_mask_broadcastss_ps((__m512)all, 0xff00, _mm_set_ss(half_at(p + BYTES)));
#endif
        return all;
    }
    static uint64_t packed_scales(const char* p) {
        const uint32_t first = read<uint32_t>(p + 4), third = read<uint32_t>(p + 12);
        return (first & 0x3f3f3f3f) | uint64_t((third & 0x0f0f0f0f) | (first >> 2 & 0x30303030)) << 32;
    }
    static uint64_t packed_minima(const char* p) {
        const uint32_t second = read<uint32_t>(p + 8), third = read<uint32_t>(p + 12);
        return (second & 0x3f3f3f3f) | uint64_t((third >> 4 & 0x0f0f0f0f) | (second >> 2 & 0x30303030)) << 32;
    }
    static Vector scales(const char* p, int first) {
        return spread<GROUP, false>(packed_scales(p) >> 8 * first, LANES == 16 ? packed_scales(p + BYTES) : 0) *
               of_blocks(p);
    }
    static Vector minima(const char* p, int first) {
        return spread<GROUP, false>(packed_minima(p) >> 8 * first, LANES == 16 ? packed_minima(p + BYTES) : 0) *
               -of_blocks(p + 2);
    }
};

// 16 groups of 16, each with a scale of 8 bits. In each half four runs of 32: see pack_q6_k.
struct Q6_KBlocks {
    static constexpr int BITS = 6, GROUP = 16, OFFSET = 32;
    static constexpr int64_t BLOCK = 256, BYTES = 210;
    static constexpr bool MINIMA = false;

    template <int I>
    static Unsigned codes(const char* p, int first) {
        const int begin = LANES == 4 ? first / 2 % 4 : 0;  // else known here: a chunk is a half or a whole block
        auto half = [&](int run) { return LANES == 16 ? run / 4 : first / 8; };
        auto quarter = [&](int run) { return (begin + run) % 4; };
        const Pairs lower = (Pairs)runs<I>([&](int run) { return p + 64 * half(run) + 32 * (quarter(run) % 2); });
        const Pairs upper = (Pairs)runs<I>([&](int run) { return p + 128 + 32 * half(run); });
        const Pairs shift = for_runs<I>([&](int run) { return quarter(run) / 2 * 4; });
        const Pairs left = for_runs<I>([&](int run) { return std::max(4 - 2 * quarter(run), 0); });
        const Pairs right = for_runs<I>([&](int run) { return std::max(2 * quarter(run) - 4, 0); });
        return ((Unsigned)(lower >> shift) & 0x0f0f0f0f) | ((Unsigned)(upper << left >> right) & 0x30303030);
    }
    static Vector scales(const char* p, int first) {
        const char* scales = p + 192 + first;
        const uint64_t low = LANES == 4 ? read<uint32_t>(scales) : read<uint64_t>(scales);
        return spread<GROUP, true>(low, LANES == 16 ? read<uint64_t>(scales + 8) : 0) * (Vector{} + half_at(p + 208));
    }
};

}  // namespace

const Products q8_0_products = blocks_of<Q8_0Blocks>();
const Products q4_0_products = blocks_of<FourBits<18, 8>>();
const Products q4_1_products = blocks_of<FourBits<20, 0, true>>();
const Products q5_0_products = blocks_of<FiveBits<22, 16>>();
const Products q5_1_products = blocks_of<FiveBits<24, 0, true>>();
const Products q4_k_products = blocks_of<WithMinima<4>>();
const Products q5_k_products = blocks_of<WithMinima<5>>();
const Products q6_k_products = blocks_of<Q6_KBlocks>();
