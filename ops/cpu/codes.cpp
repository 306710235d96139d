// Products of whole numbers of 8 or 4 bits with a scale for each group of columns (see products.h and groups.h).
#include <array>

#include "groups.h"

namespace {

constexpr int64_t SCALES_AHEAD = 512;  // bytes: a second stream, at an eighth of the speed

// SIZE: 32, or 16 for groups that are no multiple of 32, such as those of a head in 4 bits (ops/head.py).
template <int BITS_, int SIZE>
struct Codes {
    static constexpr int BITS = BITS_, GROUP = SIZE, OFFSET = 1 << (BITS - 1), ROWS = LANES == 16 ? 4 : 2;
    static constexpr bool PACKED = BITS == 4, MINIMA = false;
    static constexpr int64_t BYTES = LANES * GROUP * BITS / 8;  // of a chunk

    const int64_t repeats, step;  // groups with one scale; scales of a chunk, or 0 where it may be none or a part
    const uint64_t scales_of_chunk;  // times 2^32, rounded up: a division would take longer than all else
    // For each lane the place of its scale in the upper half, of the lower half's one that is taken for zero: of words or bytes.
    alignas(64) std::array<std::conditional_t<LANES == 16, uint16_t, int8_t>, 32> spread = {};

    explicit Codes(const Rows& w)
        : repeats(w.columns / w.groups / GROUP), step(LANES % repeats == 0 ? LANES / repeats : repeats % LANES == 0),
          scales_of_chunk(((uint64_t(LANES) << 32) + repeats - 1) / repeats) {
        for (int lane = 0; lane < LANES; lane++) {
            const int place = group_of(lane, GROUP, PACKED) * step / LANES;
            if (LANES == 16) spread[2 * lane + 1] = place;
            if (LANES == 8) spread[4 * lane] = spread[4 * lane + 1] = -1, spread[4 * lane + 2] = 2 * place, spread[4 * lane + 3] = 2 * place + 1;
        }
    }

    __attribute__((always_inline)) void unpack(const Rows& w, int64_t at, Chunk<GROUP>& to) const {
        const char* p = w.weight + at * BYTES;
        const int64_t left = w.columns * BITS / 8 - at * BYTES;
        alignas(64) char last[BYTES];
        if (left < BYTES) {
            std::memset(last, 0, sizeof last);
            p = (const char*)std::memcpy(last, p, left);
        }
        each<GROUP / (PACKED ? 8 : 4)>([&](auto i) __attribute__((always_inline)) { to.codes[i] = read<Unsigned>(p + i * sizeof(Unsigned)); });
        to.scale = scales(w, at);
    }
    __attribute__((always_inline)) void unpack_by_group(const Rows& w, int64_t at, Chunk<GROUP>& to) const {
        unpack(w, at, to), transpose<GROUP, PACKED>(to.codes);
    }

    __attribute__((always_inline)) int64_t first_scale(int64_t at) const { return at * scales_of_chunk >> 32; }  // of a chunk

    // Lanes behind the row have any scale of the row, or zero.
    __attribute__((always_inline)) Vector scales(const Rows& w, int64_t at) const {
        const int64_t first = first_scale(at), left = w.groups - first;
        const bfloat16* from = w.scale + first;
#if LANES_OF_INTEGERS == 16
        if (step) {
            const __m256i some = step == LANES && left >= LANES ? read<__m256i>(from)
                                 : _mm256_maskz_loadu_epi16((1 << std::min(step, left)) - 1, from);
            return (Vector)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_load_si512(spread.data()), _mm512_castsi256_si512(some));
        }
#elif LANES_OF_INTEGERS == 8
        if (step) {
            __m128i some = {};
            if (step == LANES && left >= LANES)
                some = read<__m128i>(from);
            else
                std::memcpy(&some, from, std::min(step, left) * sizeof *from);
            return (Vector)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(some), _mm256_load_si256((const __m256i*)spread.data()));
        }
#endif
        return by_group<Vector, GROUP, PACKED>([&](auto group) {
            return to_float(w.scale[std::min((at * LANES + group) / repeats, w.groups - 1)]);
        });
    }
    __attribute__((always_inline)) void fetch(const Rows& w, int64_t at, auto& ahead) const {
        for (int64_t line = 0; line < BYTES; line += 64) ahead.template fetch<1>(w.weight + at * BYTES + line, 0);
        if (ahead.scales() && at % 2 == 0) __builtin_prefetch((const char*)(w.scale + first_scale(at)) + SCALES_AHEAD);
    }

    static void multiply_all(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float* scratch) {
        if (w.columns / w.groups % GROUP) return as_floats(w, rows, x, count, y, scratch);
        Grouped<Codes>::multiply_all(w, rows, x, count, y, scratch);
    }

    // Groups of other sizes: some rows and a token as float32 numbers.
    static void as_floats(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float* scratch) {
        const int64_t width = rounded_up(w.columns, LANES), size = w.columns / w.groups;
        float* values = scratch + ::ROWS / 2 * width;
        for (int64_t first = 0; first < rows; first += ::ROWS / 2) {
            const int64_t some = std::min<int64_t>(rows - first, ::ROWS / 2);
            std::fill(scratch, values + width, 0.f);
            for (int64_t r = 0; r < some; r++) {
                const Rows row = from_row(w, first + r);
                for (int64_t i = 0; i < w.columns; i++) {
                    const int code = (uint8_t)row.weight[i * BITS / 8] >> i * BITS % 8 & ((1 << BITS) - 1);
                    scratch[r * width + i] = (code - OFFSET) * to_float(row.scale[i / size]);
                }
            }
            for (int64_t k = 0; k < count; k++) {
                Grouped<Codes>::values(x[k], w.columns, values);
                for (int64_t r = 0; r < some; r++) {
                    Vector total = {};
                    for (int64_t i = 0; i < width; i += LANES) total = fma(load(scratch + r * width + i), load(values + i), total);
                    y[k * ::ROWS + first + r] = sum(total);
                }
            }
        }
    }
};

template <class Type>
constexpr Products codes_of() {
    typedef Grouped<Type> Form;
    return {Form::bytes, Form::prepare, Type::multiply_all, nullptr, nullptr, beside<Form>(), Form::ROWS, Form::MANY};
}

}  // namespace

const Products grouped_byte_products = codes_of<Codes<8, 32>>();
const Products nibble_products = codes_of<Codes<4, 32>>();
const Products grouped_byte_16_products = codes_of<Codes<8, 16>>();
const Products nibble_16_products = codes_of<Codes<4, 16>>();
