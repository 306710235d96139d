// Products of weights [rows, columns] with the activations of some tokens: one arithmetic for one token and for many.
//
// A row is read as one sequential stream, and an output is the sum of one accumulator's lanes. How many rows and tokens
// are computed together, a tile, only changes how often a number is loaded, never the order of additions that round.
// Sums of whole numbers don't: those of a row or of a group of columns may be formed by any instruction, AMX's for many
// tokens. So a token's logits have the same bits alone, as one of a few guesses, in a prompt and in any batch.
//
//     weights              activations, prepared once for all rows                   instruction           file
//     float32, float16     as they are                                               fma                   floats.cpp
//     bfloat16             as they are, even and odd columns apart                   fma                   floats.cpp
//       … many tokens      the same, those of one lane together (and of float32)     fma                   floats.cpp
//     bfloat16             rounded to bfloat16                                       vdpbf16ps             floats.cpp
//     bfloat16             a sum of two bfloat16                                     tdpbf16ps             floats.cpp
//     8 bits, scaled rows  whole numbers of 16 bits, a scale for each token          vpdpbusd, vpmaddwd    bytes.cpp
//       … some tokens      the same                                                  tdpbusd               bytes.cpp
//       … many tokens      the same                                                  tdpbssd               bytes.cpp
//       … without AVX2     as they are                                               fma                   bytes.cpp
//     8 or 4 bits, groups  whole numbers of 16 bits, a scale for each group          vpdpbusd, vpmaddwd    groups.h
//       … 4 to 6 bits      the same, with AVX2 alone                                 vpmaddubsw            groups.h
//     blocks of a GGUF     the same                                                  the same              groups.h
//       … many tokens      the same                                                  vpdpwssd, tdpbssd     panels.h
//
// Codes are packed as in formats/compressed_tensors.py: one (the number + 128) to a byte, or two (the number + 8), the
// lower four bits first. A group of columns, or the whole row, shares a scale.
//
// This file is what step.cpp sees of it. The kinds are translation units of their own, made with tiles.h.
#pragma once
#include <algorithm>
#include <cassert>
#include <cstdint>
#include <memory>
#include <new>

#include "vectors.h"

extern "C" struct Linear {
    const void* weight;  // [rows, columns] of the model's dtype; with scales as ops/quant.py packs them
    const void* bias;    // [rows] or nullptr
    const void* scale;   // [rows, groups] of bfloat16, or nullptr
    int64_t rows, columns, row_bytes, bits, groups;
    int64_t blocks;      // a Form, where the weights are a tensor of a GGUF; else 0
};

// Memory that is not written before it is used, in whole cache lines.
template <class T>
class Buffer {
    struct Free {
        void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    std::unique_ptr<T[], Free> numbers;
    int64_t size = 0;

  public:
    void allocate(int64_t count) {
        size = count;
        numbers.reset((T*)::operator new(std::max(count, int64_t(1)) * sizeof(T), std::align_val_t(64)));
    }
    T* at(int64_t i, int64_t count = 1) const {  // the place of `count` numbers from i on
        assert(0 <= i && i + count <= size);
        return numbers.get() + i;
    }
};

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

constexpr int SIDE = 16;   // rows and columns of a tile of AMX
constexpr int64_t ROWS = 32;  // of weights that stay in the cache for all tokens
constexpr int64_t CACHED = 1 << 21;  // bytes of activations that stay in the second-level cache, where kinds read half of them
constexpr int32_t MANY = 33;  // tokens that are many for every kind: Tiled has no room to arrange so many as few

// How one token reads its rows. It changes no bit of a result: library.py measures which is fastest on a machine.
extern "C" struct Tuning {
    int32_t together;  // rows that are read side by side: 1, 2 or 4
    int32_t ahead;     // bytes that are fetched ahead of a row; 0: none, -1: the rows that come next
    int32_t further;   // the same for a second time, into the second-level cache; 0: not at all
};

// Rows of one matrix.
struct Rows {
    const char* weight;
    const bfloat16* scale;
    int64_t row_bytes, columns, groups;
    Tuning tuning;
    bool many = false;  // so many tokens meet them that they are worth unpacking once for all, or AMX: see Choice
    bool first = true, last = true;  // of those that a thread reads one after another
};

// One kind of weights, and the form of activations that they meet.
struct Products {
    int64_t (*bytes)(int64_t n);                            // of n activations in their form
    void (*prepare)(const float* x, int64_t n, char* out);  // n activations into that form, filled up with zeros
    // y[i, r] = row r times the activations of token i; rows <= ROWS, y [count, ROWS], scratch [scratch_size(columns)]
    void (*multiply)(const Rows& w, int64_t rows, const char* const* x, int64_t count, float* y, float* scratch);
    void (*numbers)(const char* row, int64_t columns, float* out) = nullptr;  // a row's weights, as of an embedding
    // What `multiply` wants to find in its scratch memory, the same for all rows; many: as in Rows.
    void (*arrange)(const char* const* x, int64_t count, int64_t columns, bool many, float* scratch) = nullptr;
    // Puts up to SIDE prepared vectors that lie one after another side by side, in the memory of SIDE.
    void (*put_beside)(char* x, int64_t n, int64_t count) = nullptr;
    int32_t together = 1;  // rows that one token may read side by side
    int32_t many = MANY;  // tokens from which rows are unpacked once for all, where that was not measured
};
// float32 numbers that take as much as Tiled with 32 tokens, or with 16 copies beside 32 rows; or a Panel of panels.h for
// each row, or what AMX needs for codes: rows, their scales and 16 tokens.
inline int64_t scratch_size(int64_t columns) {
    return std::max(ROWS * (rounded_up(columns, 32) + 16), 20 * rounded_up(columns, 512) + 2048);
}

enum Form { FLOAT32, BFLOAT16, BFLOAT16_PAIRS, BFLOAT16_TILES, BYTES, GROUPED_BYTES, NIBBLES,
            FLOAT16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K,
            GROUPED_BYTES_16, NIBBLES_16, FORMS };  // groups whose size is no multiple of 32
extern const Products float32_products, bfloat16_products, pair_products, tile_products;  // floats.cpp
extern const Products byte_products;                                            // bytes.cpp
extern const Products grouped_byte_products, nibble_products, grouped_byte_16_products,
    nibble_16_products;                                                         // codes.cpp
extern const Products float16_products, q8_0_products, q4_0_products, q4_1_products, q5_0_products, q5_1_products,
    q4_k_products, q5_k_products, q6_k_products;                                    // blocks.cpp
extern const bool has_pairs, has_tiles;  // whether pair_products and, where AMX is granted, tile_products may be used
inline const Products* const PRODUCTS[FORMS] = {
    &float32_products, &bfloat16_products, &pair_products, &tile_products, &byte_products, &grouped_byte_products,
    &nibble_products,  &float16_products,  &q8_0_products, &q4_0_products, &q4_1_products, &q5_0_products,
    &q5_1_products,    &q4_k_products,     &q5_k_products, &q6_k_products,
    &grouped_byte_16_products, &nibble_16_products};

// What was chosen for this machine: see library.py.
struct Choice {
    Tuning tuning[FORMS];
    int32_t many[FORMS];  // tokens from which rows are unpacked once for all, or meet AMX: with the same bits, only faster
    Form bfloat16;  // of the three for bfloat16 weights
    bool amx;       // many tokens meet codes in tiles of AMX: with the same bits, only faster
};
extern Choice choice;

inline Form form_of(const Linear& w) {
    if (w.blocks) return Form(w.blocks);
    if (!w.scale) return w.bits == 32 ? FLOAT32 : choice.bfloat16;
    if (w.bits == 8 && w.groups == 1) return BYTES;
    const bool small = w.columns / w.groups % 32;
    return w.bits == 4 ? (small ? NIBBLES_16 : NIBBLES) : (small ? GROUPED_BYTES_16 : GROUPED_BYTES);
}

// Groups of 16 columns are multiplied as those of 32 are.
inline Form measured_as(Form form) { return form == NIBBLES_16 ? NIBBLES : form == GROUPED_BYTES_16 ? GROUPED_BYTES : form; }

// How some rows are read, which may be the last of those that are. Tiles fetch the next ones.
inline Tuning tuning_of(Form form, bool last) {
    if (form == BFLOAT16_TILES) return {ROWS, last ? 0 : -1, 0};
    return choice.tuning[measured_as(form)];
}
inline bool are_many(int64_t tokens, Form form) { return tokens >= choice.many[measured_as(form)]; }

// Rows begin .. end of weight · x for `count` tokens, ROWS at a time, for as many tokens as stay in the second-level cache, then for
// the next ones: put(i, tokens, row, n) after each, when y [tokens, ROWS] holds the results of n rows from `row` on for tokens
// from the i-th on. x as the kind prepares it, scratch [scratch_size(columns)].
template <class Put>
void multiply_rows(const Linear& w, int64_t begin, int64_t end, const char* const* x, int64_t count, float* y, float* scratch,
                   Put put) {
    const Form form = form_of(w);
    const bool many = are_many(count, form);
    const int64_t most = std::max(CACHED / PRODUCTS[form]->bytes(w.columns), int64_t(3 * SIDE)), parts = (count + most - 1) / most;
    const int64_t each = parts > 1 ? rounded_up((count + parts - 1) / parts, SIDE) : count;
    for (int64_t i = 0; i < count; i += each) {
        const int64_t tokens = std::min(count - i, each);
        if (PRODUCTS[form]->arrange) PRODUCTS[form]->arrange(x + i, tokens, w.columns, many, scratch);
        for (int64_t row = begin; row < end; row += ROWS) {
            const int64_t n = std::min(end - row, ROWS);
            const bool first = row == begin, last = row + n == end;
            const Rows some = {(const char*)w.weight + row * w.row_bytes, (const bfloat16*)w.scale + row * w.groups,
                               w.row_bytes, w.columns, w.groups, tuning_of(form, last), many, first, last};
            PRODUCTS[form]->multiply(some, n, x + i, tokens, y, scratch);
            put(i, tokens, row, n);
        }
    }
}

// The form of the activations that a kind of weights meets: several kinds take those of the first of them.
inline Form activations_of(Form form) {
    return form == FLOAT16 ? FLOAT32 : form > Q4_0 && form < Q6_K ? Q4_0 : form;
}
inline Form activations_of(const Linear& w) { return activations_of(form_of(w)); }

// From so many tokens on some of the kinds that take these activations want them side by side.
inline int32_t fewest_of_many(Form activations) {
    int32_t fewest = MANY;
    for (int form = 0; form < FORMS; form++)
        if (activations_of(Form(form)) == activations) fewest = std::min(fewest, choice.many[measured_as(Form(form))]);
    return fewest;
}

// Vectors of activations in the forms that the weights want.
class Inputs {
    Buffer<char> memory[FORMS];

  public:
    // Room for `count` vectors of at most `widest` numbers, in each of the forms.
    void allocate(int64_t count, int64_t widest, const bool (&forms)[FORMS]) {
        for (int form = 0; form < FORMS; form++)
            if (forms[form]) memory[form].allocate(rounded_up(count, SIDE) * PRODUCTS[form]->bytes(widest));
    }
    void put(int64_t i, const float* x, int64_t n, Form form) {
        const int64_t size = PRODUCTS[form]->bytes(n);
        PRODUCTS[form]->prepare(x, n, memory[form].at(i * size, size));
    }
    // After `put` of vectors i .. i + count, at most SIDE, of many: see fewest_of_many.
    void put_beside(int64_t i, int64_t count, int64_t n, Form form) {
        const int64_t size = PRODUCTS[form]->bytes(n);
        if (PRODUCTS[form]->put_beside) PRODUCTS[form]->put_beside(memory[form].at(i * size, SIDE * size), n, count);
    }
    const char* at(int64_t i, int64_t n, Form form) const {
        const int64_t size = PRODUCTS[form]->bytes(n);
        return memory[form].at(i * size, size);
    }
};
