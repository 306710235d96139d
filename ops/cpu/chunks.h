// Codes in groups as one token meets them, lanes that are groups, and the activations that they meet: see groups.h.
#pragma once
#include <array>
#include <cfloat>
#include <utility>

#include "amx.h"
#include "integers.h"

// Which group of a chunk a lane holds after `transpose`. PACKED: two codes of 4 bits to a byte, of which the lower ones are
// the first half of a group.
constexpr int group_of(int lane, int group_size, bool packed = false) {
    const int quarter = lane / 4, i = lane % 4;
    if (LANES == 4) return lane;
    if (group_size == 16 && packed) return i / 2 * LANES / 2 + 2 * quarter + i % 2;
    if (group_size == 16 || packed || LANES == 8) return LANES / 4 * i + quarter;
    return quarter / 2 * 8 + 2 * i + quarter % 2;
}
template <int GROUP, bool PACKED>
constexpr auto LANE_OF = [] {  // of each group
    std::array<int, LANES> lanes = {};
    for (int lane = 0; lane < LANES; lane++) lanes[group_of(lane, GROUP, PACKED)] = lane;
    return lanes;
}();

// A vector whose lanes are of(group) of their groups.
template <class Result, int GROUP, bool PACKED = false, class Of>
__attribute__((always_inline)) inline Result by_group(Of of) {
    return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        return Result{of(std::integral_constant<int, group_of(I, GROUP, PACKED)>())...};
    }(std::make_integer_sequence<int, LANES>());
}

inline Unsigned lower_nibbles(Unsigned bytes) { return bytes & 0x0f0f0f0f; }
inline Unsigned upper_nibbles(Unsigned bytes) {
#if LANES_OF_INTEGERS == 16 && defined(__GFNI__)
    return (Unsigned)_mm512_gf2p8affine_epi64_epi8((__m512i)bytes, _mm512_set1_epi64(0x1020408000000000), 0);
#else
    return bytes >> 4 & 0x0f0f0f0f;
#endif
}

// GROUP / 4 vectors of codes, column by column (PACKED: half as many, of bytes), into as many whose lanes are groups, four
// columns of each.
template <int GROUP, bool PACKED>
__attribute__((always_inline)) inline void transpose(Unsigned* codes) {
    constexpr int VECTORS = GROUP / (PACKED ? 8 : 4);
#if defined(__AVX2__)
    if (VECTORS == 2) {
#if LANES_OF_INTEGERS == 16
        const __m512 a = (__m512)codes[0], b = (__m512)codes[1];
        codes[0] = (Unsigned)_mm512_shuffle_ps(a, b, 0x88), codes[1] = (Unsigned)_mm512_shuffle_ps(a, b, 0xdd);
#else
        const __m256 a = (__m256)codes[0], b = (__m256)codes[1];
        codes[0] = (Unsigned)_mm256_shuffle_ps(a, b, 0x88), codes[1] = (Unsigned)_mm256_shuffle_ps(a, b, 0xdd);
#endif
    }
    if (VECTORS == 8 && LANES == 8) {  // of the even groups, then of the odd ones
        const Unsigned v[] = {codes[0], codes[2], codes[4], codes[6], codes[1], codes[3], codes[5], codes[7]};
        std::copy(v, v + 8, codes);
    }
    for (int i = 0; i + 4 <= VECTORS; i += 4) transpose_quarters(codes + i);
    for (int i = 0; VECTORS == 8 && i < 4; i++) {
        const Unsigned a = codes[i], b = codes[i + 4];
#if LANES_OF_INTEGERS == 16
        codes[i] = (Unsigned)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0x88);
        codes[i + 4] = (Unsigned)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0xdd);
#else
        codes[i] = (Unsigned)_mm256_permute2x128_si256((__m256i)a, (__m256i)b, 0x20);
        codes[i + 4] = (Unsigned)_mm256_permute2x128_si256((__m256i)a, (__m256i)b, 0x31);
#endif
    }
#else
    uint32_t words[LANES * VECTORS];
    std::memcpy(words, codes, sizeof words);
    for (int i = 0; i < VECTORS; i++)
        codes[i] = by_group<Unsigned, GROUP, PACKED>([&](auto group) { return words[group * VECTORS + i]; });
#endif
    for (int i = 0; PACKED && i < VECTORS; i++)
        codes[VECTORS + i] = upper_nibbles(codes[i]), codes[i] = lower_nibbles(codes[i]);
}

// LANES groups of a row. The numbers are (code - offset) · scale + minimum.
template <int GROUP>
struct Chunk {
    Unsigned codes[GROUP / 4];
    Vector scale, minimum;

    static constexpr int64_t COLUMNS = LANES * GROUP;
    static int64_t count(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; }
};

// Activations. Of n, in whole chunks: for AMX their high bytes group by group, then their low ones; for each chunk a vector of
// the groups' scales, of their sums, and of their sums as whole numbers times -8; then all as words of 16 bits, of each four
// columns 0, 2, 1, 3; then [chunks, GROUP / 4] vectors `a` and `b` (see in_bytes), arranged as the codes of a chunk are.
template <int GROUP, bool PACKED, bool IN_BYTES>
struct GroupedInputs {
    static constexpr int64_t BYTES = 4 * LANES, CHUNK_BYTES = GROUP / 4 * BYTES;
    static constexpr float MOST = 32639;  // 127 · 256 + 127

    struct Places {
        int64_t chunks, scale, sum, whole, words, a, b, end;
        explicit Places(int64_t n)
            : chunks(Chunk<GROUP>::count(n)), scale(side_by_side(chunks)), sum(scale + chunks * BYTES),
              whole(sum + chunks * BYTES), words(whole + chunks * BYTES), a(words + 2 * chunks * CHUNK_BYTES),
              b(a + chunks * CHUNK_BYTES), end(rounded_up(b + chunks * CHUNK_BYTES, LINE_BYTES) + LINE_BYTES) {}
        static int64_t side_by_side(int64_t chunks) {
#if AMX
            return SideBySide<GROUP>(chunks).bytes;
#endif
            return 0;
        }
    };
    static int64_t bytes(int64_t n) { return Places(n).end; }

    static void prepare(const float* x, int64_t n, char* out) {
        const Places places(n);
        for (int64_t group = 0; group < places.chunks * LANES; group++) {
            const int64_t column = group * GROUP, at = group / LANES, lane = LANE_OF<GROUP, PACKED>[group % LANES];
            alignas(64) float padded[GROUP];
            const float* from = x + column;
            if (column + GROUP > n) {
                std::memset(padded, 0, sizeof padded);
                if (column < n) std::memcpy(padded, from, (n - column) * sizeof(float));
                from = padded;
            }
            Integers most = {};  // as bits, so that what is not finite is larger than all else
            for (int i = 0; i < GROUP; i += LANES) {
                const Integers size = (Integers)load(from + i) & 0x7fffffff;
                most = size > most ? size : most;
            }
            const int32_t bits = largest(most);
            const float scale = read<float>(&bits) / MOST, inverse = scale >= FLT_MIN && scale < INFINITY ? 1 / scale : 0;
            alignas(64) int32_t whole[GROUP];
            Integers total = {};
            for (int i = 0; i < GROUP; i += LANES) {
                const Vector rounded = load(from + i) * inverse + ROUND;
                const Integers q = (Integers)rounded - (Integers)(Vector{} + ROUND);
                std::memcpy(whole + i, &q, sizeof q);
                total += q;
            }
            alignas(64) int16_t placed[GROUP];
            for (int i = 0; i < GROUP / 2 && PACKED; i++) placed[i] = whole[2 * i], placed[GROUP / 2 + i] = whole[2 * i + 1];
            for (int i = 0; i < GROUP && !PACKED; i++) placed[i] = whole[i];
            alignas(64) char a[GROUP], b[GROUP];
            place<IN_BYTES, GROUP>(placed, a, b);
            uint64_t fours[GROUP / 4];
            std::memcpy(fours, placed, sizeof fours);
            for (auto& four : fours)
                four = (four & 0xffff00000000ffff) | (four & 0xffff0000) << 16 | (four >> 16 & 0xffff0000);
            std::memcpy(out + places.words + 2 * column, fours, sizeof fours);
            char* to = out + at * CHUNK_BYTES + 4 * lane;
            for (int i = 0; i < GROUP / 4; i++) {
                std::memcpy(to + i * BYTES + places.a, a + 4 * i, 4);
                std::memcpy(to + i * BYTES + places.b, b + 4 * i, 4);
            }
            const int64_t place = at * LANES + lane;
            const int32_t sum_of_whole = ::sum(total);
            ((float*)(out + places.scale))[place] = scale;
            ((int32_t*)(out + places.whole))[place] = -8 * sum_of_whole;
            ((float*)(out + places.sum))[place] = float(sum_of_whole) * scale;
        }
    }

#if AMX
    // What `prepare` made of `count` consecutive tokens, at most SIDE, side by side.
    static void put_beside(char* x, int64_t n, int64_t count) {
        if (!choice.amx) return;
        const Places places(n);
        const SideBySide<GROUP> lines(places.chunks);
        for (int64_t at = 0; at < places.chunks; at++) {
            auto put = [&](int64_t from, auto line) {
                Unsigned v[SIDE];  // behind `count` whatever is there
                for (int64_t k = 0; k < SIDE; k++) v[k] = read<Unsigned>(x + k * places.end + from);
                transpose(v);
                for (int lane = 0; lane < LANES; lane++) std::memcpy(x + line(lane), v + lane, sizeof *v);
            };
            for (int64_t i = 0; i < GROUP / 2; i++) {  // high bytes, then low ones
                const int64_t from = i < GROUP / 4 ? places.a + i * BYTES : places.b + (i - GROUP / 4) * BYTES;
                put(from + at * CHUNK_BYTES, [&](int lane) { return lines.high(lane, at, places.end) + i * places.end; });
            }
            put(places.scale + at * BYTES, [&](int lane) { return lines.scale(lane, at, places.end); });
            put(places.sum + at * BYTES, [&](int lane) { return lines.sum(lane, at, places.end); });
        }
        for (int64_t k = 0; k < count; k++) ((int32_t*)(x + (k + 1) * places.end))[-1] = k;
    }
    // Whether such neighbours begin here.
    static bool side_by_side(const char* const* x, int64_t count, int64_t n) {
        const Places places(n);
        bool found = ((const int32_t*)(x[0] + places.end))[-1] == 0;
        for (int64_t i = 1; i < count; i++) found = found && x[i] - x[i - 1] == places.end;
        return found;
    }
#endif

    // The numbers that they stand for.
    static void values(const char* x, int64_t n, float* out) {
        const Places places(n);
        for (int64_t group = 0; group * GROUP < n; group++)
            for (int i = 0; i < GROUP; i++) {
                const int placed = i / 4 * 4 + i % 2 * 2 + i / 2 % 2;
                const int in_group = !PACKED ? placed : placed < GROUP / 2 ? 2 * placed : 2 * placed - GROUP + 1;
                const int64_t column = group * GROUP + in_group;
                const int64_t place = group / LANES * LANES + LANE_OF<GROUP, PACKED>[group % LANES];
                const float word = ((const int16_t*)(x + places.words))[group * GROUP + i];
                if (column < n) out[column] = word * ((const float*)(x + places.scale))[place];
            }
    }

    // What R rows and N tokens add to their accumulators in chunk `at`.
    template <class Type, int R, int N, int ALL>
    __attribute__((always_inline)) static void meet(const Chunk<GROUP> (&w)[R], const char* const* x, int64_t at,
                                                    const Places& places, Vector (*total)[ALL], int first) {
        ExactSum<Type::BITS> sums[N][R];
        each<N>([&](auto k) __attribute__((always_inline)) {
            if (!Type::OFFSET) return;
            const Integers whole = read<Integers>(x[k] + at * BYTES + places.whole) * (Type::OFFSET / 8);
            for (auto& sum : sums[k]) sum.start(whole);
        });
        each<GROUP / 4>([&](auto i) __attribute__((always_inline)) {
            each<N>([&](auto k) __attribute__((always_inline)) {
                const char* from = x[k] + at * CHUNK_BYTES + i * BYTES;
                const Integers a = read<Integers>(from + places.a), b = read<Integers>(from + places.b);
                each<R>([&](auto r) __attribute__((always_inline)) { sums[k][r].add(w[r].codes[i], a, b, i); });
            });
        });
        each<N>([&](auto k) __attribute__((always_inline)) {
            const char* rest = x[k] + at * BYTES;
            const Vector scale = read<Vector>(rest + places.scale);
            each<R>([&](auto r) __attribute__((always_inline)) {
                Vector& to = total[k][first + r];
                to = fma(__builtin_convertvector(sums[k][r].whole(), Vector) * scale, w[r].scale, to);
                if (Type::MINIMA) to = fma(w[r].minimum, read<Vector>(rest + places.sum), to);
            });
        });
    }
};

template <class Type>
using InputsOf = GroupedInputs<Type::GROUP, Type::PACKED, in_bytes(Type::BITS)>;
