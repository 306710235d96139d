// Random models through the token step, under the address and undefined-behaviour sanitizers: `fuzz FIRST COUNT`.
//
// Every tensor lies in memory of its own and of exactly its size, so that a read past one is seen. Each model is run
// row by row and token by token, then as a prompt, in pieces and in batches of ragged rows, whose caches are whole
// tensors or pages: all logits must be the same bits. Then the passes over a row of logits, from which a token is drawn.
#include "../../../ops/cpu/step.cpp"  // first: the others have names of their own that are also Forms

#include "../../../ops/cpu/blocks.cpp"
#include "../../../ops/cpu/choice.cpp"
#include "../../../ops/cpu/bytes.cpp"
#include "../../../ops/cpu/codes.cpp"
#include "../../../ops/cpu/floats.cpp"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>

namespace rows {  // it has a BLOCK of its own
#include "../../../ops/cpu/row.cpp"
}

std::mt19937_64 generator;
int64_t any(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
int64_t one_of(std::initializer_list<int64_t> values) { return *(values.begin() + any(0, values.size() - 1)); }
float normal() { return std::normal_distribution<float>()(generator); }

std::deque<std::vector<char>> memory;
void* bytes(int64_t count) {
    memory.emplace_back(count);
    return memory.back().data();
}
template <class T>
const T* numbers(int64_t count, float scale, float around = 0) {
    T* result = (T*)bytes(count * sizeof(T));
    for (int64_t i = 0; i < count; i++) assign(result[i], normal() * scale + around);
    return result;
}

constexpr int64_t MIXED = FORMS;
struct Kind {
    int64_t bits = 0, group = 0;  // 0: as the model; 0: a scale for each row
    int64_t blocks = 0;           // a Form, of a GGUF; or any of them
};

struct BlockType {
    int64_t form, block, size;
    std::vector<int64_t> scales;  // where in a block its float16 are
};
const BlockType BLOCK_TYPES[] = {{FLOAT16, 1, 2, {0}},     {Q8_0, 32, 34, {0}},      {Q4_0, 32, 18, {0}},
                                 {Q4_1, 32, 20, {0, 2}},   {Q5_0, 32, 22, {0}},      {Q5_1, 32, 24, {0, 2}},
                                 {Q4_K, 256, 144, {0, 2}}, {Q5_K, 256, 176, {0, 2}}, {Q6_K, 256, 210, {208}}};
const BlockType& block_type(int64_t form) {
    return *std::find_if(std::begin(BLOCK_TYPES), std::end(BLOCK_TYPES), [&](auto& type) { return type.form == form; });
}

template <class T>
Linear linear(int64_t rows, int64_t columns, Kind kind, bool has_bias) {
    Linear w = {};
    w.rows = rows, w.columns = columns;
    if (has_bias) w.bias = numbers<T>(rows, 1);
    if (!kind.bits) {
        w.weight = numbers<T>(rows * columns, 1 / std::sqrt(float(columns)));
        w.row_bytes = columns * sizeof(T), w.bits = 8 * sizeof(T);
        return w;
    }
    if (kind.blocks == MIXED)  // as Q4_K_M is; float32 and bfloat16 too, whatever the model's dtype is
        do kind.blocks = one_of({FLOAT32, BFLOAT16, FLOAT16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K});
        while (kind.blocks >= FLOAT16 && columns % block_type(kind.blocks).block);
    if (kind.blocks == BFLOAT16 || kind.blocks == FLOAT32) {
        const bool wide = kind.blocks == FLOAT32;
        w.blocks = kind.blocks, w.bits = 32, w.row_bytes = columns * (wide ? 4 : 2);
        const float scale = 1 / std::sqrt(float(columns));
        w.weight = wide ? (const void*)numbers<float>(rows * columns, scale) : numbers<bfloat16>(rows * columns, scale);
        return w;
    }
    if (kind.blocks) {
        const BlockType& type = block_type(kind.blocks);
        w.blocks = kind.blocks, w.row_bytes = columns / type.block * type.size;
        auto* blocks = (uint8_t*)bytes(rows * w.row_bytes);
        for (int64_t i = 0; i < rows * w.row_bytes; i++) blocks[i] = any(0, 255);
        for (int64_t i = 0; i < rows * w.row_bytes; i += type.size)
            for (int64_t at : type.scales)  // ± 2^-11 to 2^-8
                blocks[i + at] = any(0, 255), blocks[i + at + 1] = any(0x10, 0x1f) | any(0, 1) << 7;
        w.weight = blocks;
        return w;
    }
    w.bits = kind.bits, w.groups = kind.group ? columns / kind.group : 1;
    w.row_bytes = (columns * w.bits + 31) / 32 * 4;
    auto* codes = (uint8_t*)bytes(rows * w.row_bytes);
    for (int64_t i = 0; i < rows * w.row_bytes; i++) codes[i] = any(0, 255);
    w.weight = codes;
    w.scale = numbers<bfloat16>(rows * w.groups, 0.1f / std::sqrt(float(columns)), 0.01f);
    return w;
}

enum CacheType { MODELS, HALVES, CODES };  // what a cache holds: T, float16, or 8 bits with a scale for each head's [D]

// A head in the bits of quantised layers: ops/head.py.
template <class T>
Linear copied_head(const Linear& head) {
    Linear w = {.rows = head.rows, .columns = head.columns, .bits = 8, .groups = 1};
    if (w.columns % 16 == 0 && any(0, 3)) w.bits = 4, w.groups = w.columns / 16;
    w.row_bytes = (w.columns * w.bits + 31) / 32 * 4;
    w.weight = bytes(w.rows * w.row_bytes), w.scale = bytes(w.rows * w.groups * sizeof(bfloat16));
    if (quantize_rows((const T*)head.weight, w, any(1, 3))) std::abort();
    return w;
}

// Keys and values of one sequence: a tensor for each layer, or pages that each lie by themselves.
template <class T>
struct Cache {
    const Qwen3& m;
    int64_t length, max_len;
    bool paged;
    CacheType kind;
    int64_t size = kind == CODES ? 1 : kind == HALVES ? sizeof(float16) : sizeof(T);  // of a number
    // [layers, 2] of [K, max_len, D]; paged: [blocks] of [layers, 2, K, BLOCK, D]. Then the same of scales, without D.
    std::vector<std::vector<char>> numbers, scales;

    Cache(const Qwen3& m, int64_t length, int64_t max_len, bool paged, CacheType kind)
        : m(m), length(length), max_len(max_len), paged(paged), kind(kind),
          numbers(paged ? (max_len + BLOCK - 1) / BLOCK : 2 * m.num_hidden_layers), scales(numbers.size()) {
        const int64_t count = m.num_key_value_heads * (paged ? 2 * m.num_hidden_layers * BLOCK : max_len);
        for (auto& tensor : numbers) tensor.resize(size * count * m.head_dim);
        for (auto& tensor : scales) tensor.resize(kind == CODES ? sizeof(bfloat16) * count : 0);
    }
    int64_t stride() const { return (paged ? BLOCK : max_len) * m.head_dim; }
    // Where a block begins, of numbers or of scales with so many bytes to a position.
    char* block(std::vector<std::vector<char>>& of, int64_t bytes, int64_t layer, int64_t value, int64_t block) {
        if (!paged) return of[2 * layer + value].data() + bytes * block * BLOCK;
        return of[block].data() + bytes * (2 * layer + value) * m.num_key_value_heads * BLOCK;
    }
    char* block(int64_t layer, int64_t value, int64_t i) { return block(numbers, size * m.head_dim, layer, value, i); }
    char* scale(int64_t layer, int64_t value, int64_t i) { return block(scales, sizeof(bfloat16), layer, value, i); }
    char* at(int64_t layer, int64_t value, int64_t head, int64_t position) {
        return block(layer, value, position / BLOCK) + size * (head * stride() + position % BLOCK * m.head_dim);
    }
    char* scale_at(int64_t layer, int64_t value, int64_t head, int64_t position) {
        return scale(layer, value, position / BLOCK) + sizeof(bfloat16) * (head * stride() / m.head_dim + position % BLOCK);
    }
    void fill() {
        for (auto& tensor : numbers)
            for (size_t i = 0; i < tensor.size() / size; i++)
                kind == CODES    ? void(tensor[i] = any(1, 255))
                : kind == HALVES ? assign(((float16*)tensor.data())[i], normal())
                                 : assign(((T*)tensor.data())[i], normal());
        for (auto& tensor : scales)
            for (size_t i = 0; i < tensor.size() / sizeof(bfloat16); i++)
                assign(((bfloat16*)tensor.data())[i], 0.01f + std::abs(normal()) / 100);
    }
    Cache copy(int64_t to_max_len, bool to_paged) {
        Cache result(m, length, to_max_len, to_paged, kind);
        for (int64_t layer = 0; layer < m.num_hidden_layers; layer++)
            for (int64_t value = 0; value < 2; value++)
                for (int64_t head = 0; head < m.num_key_value_heads; head++)
                    for (int64_t position = 0; position < length; position++) {
                        std::copy_n(at(layer, value, head, position), size * m.head_dim,
                                    result.at(layer, value, head, position));
                        if (kind == CODES)
                            std::copy_n(scale_at(layer, value, head, position), sizeof(bfloat16),
                                        result.scale_at(layer, value, head, position));
                    }
        return result;
    }
};

// What one sequence brings to a pass.
template <class T>
struct Row {
    Cache<T>* cache;
    std::vector<int64_t> ids;
    int64_t outputs;
};

// The logits of all rows' outputs, one row after another.
template <class T>
std::vector<T> run(const Qwen3& m, std::vector<Row<T>> rows) {
    std::vector<int64_t> ids, starts = {0}, outputs, first, strides, lengths, counts;
    int64_t blocks = 0, all = 0;
    for (auto& row : rows) {
        ids.insert(ids.end(), row.ids.begin(), row.ids.end());
        starts.push_back(ids.size()), outputs.push_back(row.outputs), all += row.outputs;
        first.push_back(blocks), strides.push_back(row.cache->stride()), lengths.push_back(row.cache->length);
        counts.push_back((row.cache->length + int64_t(row.ids.size()) - 1) / BLOCK + 1), blocks += counts.back();
    }
    std::vector<void*> places[4];  // of keys, values, and the scales of both
    for (int64_t value = 0; value < 2; value++)
        for (int64_t layer = 0; layer < m.num_hidden_layers; layer++)
            for (size_t b = 0; b < rows.size(); b++)
                for (int64_t i = 0; i < counts[b]; i++) {
                    places[value].push_back(rows[b].cache->block(layer, value, i));
                    places[2 + value].push_back(rows[b].cache->scale(layer, value, i));
                }
    std::vector<T> logits(all * m.lm_head.rows);
    const Tokens tokens = {ids.data(), starts.data(), outputs.data(), int64_t(rows.size()), logits.data()};
    const CacheType kind = rows[0].cache->kind;
    const bool scaled = kind == CODES;
    const KVCache cache = {places[0].data(), places[1].data(), scaled ? places[2].data() : nullptr,
                           scaled ? places[3].data() : nullptr, kind == HALVES, blocks, first.data(), strides.data(),
                           lengths.data()};
    for (int form = 0; form < FORMS; form++) {
        choose_tuning(form, one_of({1, 2, 4}), one_of({0, -1, 1024, 4096}), one_of({0, 512, 4096}));
        choose_many(form, one_of({0, 2, 7, 33}));
    }
    choose_amx(any(0, 1));
    if (step<T>(m, cache, tokens, any(1, 3))) std::abort();
    for (auto& row : rows) row.cache->length += row.ids.size();
    return logits;
}

#define CHECK(condition, ...) \
    if (!(condition)) { std::printf("FAILED: " __VA_ARGS__), std::puts(""); std::exit(1); }

template <class T>
void model(int64_t seed) {
    Qwen3 m = {};
    Kind kind = {one_of({0, 0, 8, 8, 4}), 0};
    int64_t unit = 1;
    if (kind.bits == 4) unit = kind.group = one_of({8, 16, 32, 32});
    if (kind.bits == 8) unit = kind.group = one_of({0, 0, 4, 8, 32}), unit = std::max(unit, int64_t(1));
    if (any(0, 2) == 0) {
        const BlockType& type = BLOCK_TYPES[any(0, 8)];
        kind = {8, 0, any(0, 2) ? type.form : MIXED}, unit = type.block;
    }
    auto size = [&](int64_t most) { return unit * any(1, std::max(most / unit, any(1, unit == 256 ? 3 : 1))); };
    const bool moe = any(0, 2) == 0, bias = any(0, 2) == 0, qk_norm = any(0, 2) > 0;
    const int64_t C = m.hidden_size = size(200);
    const int64_t D = m.head_dim = any(0, 2) ? one_of({2, 4, 6, 10, 16, 18, 64, 80, 128, 256}) : 2 * any(1, 128);
    const int64_t K = m.num_key_value_heads = any(1, 3), H = m.num_attention_heads = K * any(1, 5);
    const int64_t V = any(1, 400), layers = m.num_hidden_layers = any(1, 2), wide = size(150);
    const bool o_fits = H * D % unit == 0;
    m.num_experts = moe ? any(1, 9) : 0, m.num_experts_per_tok = moe ? any(1, m.num_experts) : 1;
    m.norm_topk_prob = any(0, 1), m.rms_norm_eps = 1e-6, m.rope_factor = one_of({1, 2});
    m.rope_frequencies = numbers<float>(D / 2, 0.1);
    m.embed_tokens = linear<T>(V, C, kind.blocks ? kind : Kind(), false), m.norm = numbers<T>(C, 0.3, 1);
    m.lm_head = linear<T>(V, C, any(0, 2) ? kind : Kind(), false);
    if (kind.bits && !m.lm_head.scale && !m.lm_head.blocks && any(0, 3)) m.lm_head = copied_head<T>(m.lm_head);
    std::vector<Block> blocks(layers);
    std::deque<std::vector<MLP>> experts;
    for (auto& block : blocks) {
        block.input_layernorm = numbers<T>(C, 0.3, 1), block.post_attention_layernorm = numbers<T>(C, 0.3, 1);
        block.self_attn = {linear<T>(H * D, C, kind, bias), linear<T>(K * D, C, kind, bias),
                           linear<T>(K * D, C, kind, bias), linear<T>(C, H * D, o_fits ? kind : Kind(), bias),
                           qk_norm ? numbers<T>(D, 0.3, 1) : nullptr, qk_norm ? numbers<T>(D, 0.3, 1) : nullptr};
        const bool sparse = moe && any(0, 3);
        block.gate = sparse ? linear<T>(m.num_experts, C, {}, false) : Linear{};
        experts.emplace_back(sparse ? m.num_experts : 1);
        for (auto& mlp : experts.back())
            mlp = {linear<T>(wide, C, kind, false), linear<T>(wide, C, kind, false), linear<T>(C, wide, kind, false)};
        block.experts = experts.back().data();
    }
    m.layers = blocks.data();

    // Token by token, each row alone.
    const int64_t B = one_of({1, 2, 3, 5, 17, 32});
    const bool is_long = B < 3 && C <= 64 && H * D <= 128 && wide <= 64;
    const int64_t total = is_long ? any(500, 600) : any(20, 48);  // more than AT_ONCE
    const CacheType numbers = CacheType(any(0, 2));
    std::vector<std::vector<int64_t>> ids(B);
    std::vector<std::vector<T>> expected(B);
    std::deque<Cache<T>> start;
    for (int64_t b = 0; b < B; b++) {
        const int64_t before = any(0, 3) || b > 3 ? any(0, 9) : any(240, 256) + BLOCK * any(0, 2);  // over a block's end
        start.emplace_back(m, before, before + total, false, numbers);
        start[b].fill();
        for (int64_t i = 0; i < total; i++) ids[b].push_back(any(0, V - 1));
    }
    auto part = [&](int64_t b, int64_t at, int64_t count) {
        return std::vector<int64_t>(ids[b].begin() + at, ids[b].begin() + at + count);
    };
    const int64_t compared = std::min(B, int64_t(5));
    for (int64_t b = 0; b < compared; b++) {
        Cache<T> cache = start[b].copy(start[b].max_len, false);
        for (int64_t id : ids[b])
            for (T x : run<T>(m, {{&cache, {id}, 1}})) expected[b].push_back(x);
        for (bool in_pieces : {false, true}) {
            Cache<T> other = start[b].copy(start[b].max_len + any(0, 9), any(0, 1));
            for (int64_t at = 0; at < total;) {
                const int64_t count = in_pieces ? any(1, total - at) : total, outputs = any(1, count);
                auto found = run<T>(m, {{&other, part(b, at, count), outputs}});
                at += count;
                CHECK(!std::memcmp(found.data(), expected[b].data() + (at - outputs) * V, found.size() * sizeof(T)),
                      "seed %ld row %ld: %ld tokens to %ld are other bits than one by one", seed, b, count, at);
            }
        }
    }

    // All rows together, of different lengths, with different numbers of tokens, some of them waiting.
    std::deque<Cache<T>> caches;
    for (auto& one : start) caches.push_back(one.copy(one.max_len + any(0, 300), any(0, 1)));
    std::vector<int64_t> done(B);
    while (*std::min_element(done.begin(), done.end()) < total) {
        std::vector<Row<T>> rows;
        std::vector<int64_t> who;
        const int64_t most = one_of({1, 1, 3, 12, total});
        for (int64_t b = 0; b < B; b++) {
            const int64_t count = std::min(total - done[b], any(0, most));
            if (!count) continue;
            rows.push_back({&caches[b], part(b, done[b], count), any(0, count)}), who.push_back(b);
            done[b] += count;
        }
        if (rows.empty()) continue;
        auto found = run<T>(m, rows);
        found.emplace_back();  // so that no outputs have an address too
        int64_t at = 0;
        for (size_t i = 0; i < rows.size(); i++) {
            const int64_t b = who[i], outputs = rows[i].outputs, count = rows[i].ids.size();
            CHECK(b >= compared || std::equal((char*)&found[at], (char*)(&found[at] + outputs * V),
                                              (char*)(expected[b].data() + (done[b] - outputs) * V)),
                  "seed %ld row %ld of %ld: %ld tokens to %ld are other bits than alone", seed, b, B, count, done[b]);
            at += outputs * V;
        }
    }
    memory.clear();
}

// Logits as a tensor has them, of exactly its size, through each pass; what is left is compared with plain loops.
template <class T>
void row(int64_t seed) {
    const int64_t n = one_of({1, 2, any(1, 511), 512, 513, any(514, 6000)}), blocks = (n + 511) / 512;
    const T* given = numbers<T>(n, one_of({0, 1, 30}));
    auto memory_of = [](int64_t count) { return (float*)bytes(count * sizeof(float)); };
    float *room = memory_of(512 * blocks), *tops = memory_of(blocks), *sums = memory_of(blocks);
    std::vector<float> plain(n);
    for (int64_t i = 0; i < n; i++) plain[i] = to_float(given[i]);
    Logits logits = {};
    logits.x = given, logits.bits = 8 * sizeof(T), logits.size = n;
    if (any(0, 1)) {  // penalties of what was said
        logits.repetition = 2, logits.presence = 0.5, logits.frequency = 0.25;
        int32_t said = 0, *tokens = (int32_t*)bytes(n * sizeof(int32_t)), *times = (int32_t*)bytes(n * sizeof(int32_t));
        for (int64_t i = 0, every = one_of({1, 7, 700}); i < n; i++) {
            if (any(0, every - 1)) continue;
            tokens[said] = i, times[said] = any(0, 3);
            plain[i] = plain[i] > 0 ? plain[i] / 2 : plain[i] * 2;
            plain[i] = plain[i] - 0.5f * (times[said] > 0);
            plain[i] = plain[i] - 0.25f * times[said++];
        }
        auto own = [&](const int32_t* all) {  // of exactly its size
            return std::copy_n(all, said, (int32_t*)bytes(said * sizeof(int32_t))) - said;
        };
        logits.count = said, logits.ids = own(tokens), logits.times = own(times);
    }
    const int64_t best = rows::row_largest(&logits, tops);
    CHECK(best == std::max_element(plain.begin(), plain.end()) - plain.begin(), "seed %ld: the largest of %ld", seed, n);

    const int64_t count = any(1, blocks);
    auto* ids = (int64_t*)bytes(n * sizeof(int64_t));
    const int64_t kept = rows::row_best(&logits, tops, count, ids, room);
    std::vector<float> ranked = plain;
    std::sort(ranked.begin(), ranked.end(), std::greater<float>());
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++)
        if (plain[i] >= ranked[count - 1]) {
            CHECK(at < kept && ids[at] == i && room[at] == plain[i], "seed %ld: the %ld best of %ld", seed, count, n);
            at++;
        }
    CHECK(at == kept, "seed %ld: %ld of the %ld best of %ld", seed, kept, count, n);

    rows::row_copy(&logits, room);
    CHECK(std::equal(plain.begin(), plain.end(), room), "seed %ld: a copy of %ld", seed, n);
    const int64_t likely = rows::row_likely(&logits, 1, plain[best], 0.25, any(0, n), ids, room);
    CHECK(likely < 0 || room[std::find(ids, ids + likely, best) - ids] == 1, "seed %ld: likely of %ld", seed, n);
    rows::row_weigh(&logits, 1, plain[best], room, sums);
    for (double share : {0.0, 0.5, 1.0})
        CHECK(room[rows::row_draw(room, sums, blocks, share)] > 0, "seed %ld: drawn of %ld", seed, n);
    CHECK(room[best] == 1 && !std::count_if(room + n, room + 512 * blocks, [](float x) { return x; }),
          "seed %ld: the weights of %ld", seed, n);
    const int64_t index = any(0, n - 1);
    const float weight = room[index];
    rows::row_below(room, blocks, weight, index, sums);
    if (any(0, 1)) {
        rows::row_cut(room, blocks, weight, index, sums);
        CHECK(room[index] == 0 && !std::count_if(room, room + n, [&](float x) { return x && x < weight; }),
              "seed %ld: %ld weights cut", seed, n);
    } else {
        rows::row_drop(room, n, one_of({0, 1}) * 0.7, one_of({0, 1}) * 0.5f);
        CHECK(room[best] == 1 || ranked[0] == ranked[std::min(n - 1, int64_t(1))], "seed %ld: dropped of %ld", seed, n);
    }
    memory.clear();
}

int main(int, char** arguments) {
    const int64_t first = std::atol(arguments[1]), count = std::atol(arguments[2]);
    for (int64_t seed = first; seed < first + count; seed++) {
        generator.seed(seed);
        choose_bfloat16(BFLOAT16), choose_bfloat16(one_of({BFLOAT16, BFLOAT16_PAIRS, BFLOAT16_TILES, BFLOAT16_TILES}));
        seed % 2 ? model<float>(seed) : model<bfloat16>(seed);
        for (int i = 0; i < 10; i++) seed % 2 ? row<float>(seed) : row<bfloat16>(seed);
    }
    std::printf("%ld models\n", count);
}
