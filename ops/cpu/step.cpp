// The token step of model.py in C++: token ids and the cache in, the logits of the next tokens out.
//
// Read it beside model.py: the same names in the same order, and here the arithmetic that PyTorch does there. What it
// is for is speed. A few tokens read every weight once, so memory bandwidth is their limit, and everything else must
// stay out of the way: each thread reads its share of a matrix row by row as one sequential stream, activations stay in
// the cache, and five barriers a layer are all the threads ever wait for each other. Many tokens, a prompt, are
// compute-bound: blocks of rows stay in the cache for all of them.
//
// The rows of a batch may bring different numbers of tokens: a piece of a prompt beside replies that go on. A token's
// logits are the same bits whether it comes alone, as one of a few guesses, in a prompt or in a batch: see products.h and
// attention.h. What is different for few and many is only who computes what.
//
// One file, longer than others here, as model.py is one: a layer is read from top to bottom.
//
// The interface is plain C over pointers into the model's own tensors; ops/cpu/step.py fills the structs and checks them.
//
// Letters for sizes as in model.py:  B batch   N tokens of all rows   C hidden size   H query heads   K key/value heads
//                                    G = H / K   D head dim   V vocabulary
#include <cstddef>
#include <deque>
#include <vector>

#include "attention.h"
#include "quantize.h"
#include "row.h"
#include "threads.h"

constexpr int64_t FEW = 16;       // tokens: so few each thread prepares for itself, rather than wait for another
constexpr int64_t AT_ONCE = 512;  // tokens: bounds the memory of a long prompt
constexpr int64_t QUERIES = 48;   // of a prompt, that go through a block of positions together

// ---------------------------------------------------------------------------------------------------------------------
// What ops/cpu/step.py hands over. `void*` is a tensor of the model's dtype; nullptr where the model has none.

extern "C" {
struct Attention {
    Linear q_proj, k_proj, v_proj, o_proj;
    const void *q_norm, *k_norm;
};
struct MLP {
    Linear gate_proj, up_proj, down_proj;
};
struct Block {
    const void* input_layernorm;
    Attention self_attn;
    const void* post_attention_layernorm;
    Linear gate;         // the router of a mixture of experts; without rows where the MLP is a single dense one
    const MLP* experts;  // [num_experts], or that one
};
struct Qwen3 {
    int64_t hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim;
    int64_t num_experts, num_experts_per_tok, norm_topk_prob;
    float rms_norm_eps, rope_factor;
    const float* rope_frequencies;  // [D/2]
    Linear embed_tokens;            // [V, C]
    const Block* layers;
    const void* norm;
    Linear lm_head;
};
// Blocks of BLOCK positions lie wherever they may, so that rows can share and grow without being copied.
struct KVCache {
    void *const *keys, *const *values;  // [layers, blocks]: the block's positions of the first head, [BLOCK, D]
    // The same for the scales of numbers of 8 bits, bfloat16 [BLOCK]; else nullptr.
    void *const *key_scales, *const *value_scales;
    int64_t half;                       // whether numbers are float16; else, without scales, of the model's dtype
    int64_t blocks;                     // of all rows
    const int64_t* first;               // [B] the first block of each row
    const int64_t* strides;             // [B] numbers from a head's positions to those of the next one
    const int64_t* lengths;             // [B] positions before these tokens
};
struct Tokens {
    const int64_t* ids;      // those of the first row, of the second, …
    const int64_t* starts;   // [B + 1] where each row's begin, and the number of all
    const int64_t* outputs;  // [B] logits are wanted for so many of each row's last tokens
    int64_t B;
    void* logits;            // [all outputs, V]
};
}

// Consecutive tokens of a batch: what each row has of them, and the positions.
struct Span {
    struct Piece {
        int64_t row, from, count;  // tokens from .. from + count of the span
    };
    const KVCache& cache;
    int64_t first, N;                  // tokens of the batch
    std::vector<Piece> pieces;
    std::vector<int64_t> piece_of, position;  // of each token, [N]
    std::vector<int64_t> wanted, places;      // tokens of the span whose logits are wanted; which of all logits they are

    Span(const KVCache& cache, const Tokens& tokens, int64_t first, int64_t N) : cache(cache), first(first), N(N) {
        int64_t outputs = 0;  // of the rows before
        for (int64_t b = 0; b < tokens.B; outputs += tokens.outputs[b++]) {
            const int64_t start = tokens.starts[b], end = tokens.starts[b + 1];
            const int64_t from = std::max(start, first), to = std::min(end, first + N);
            if (from >= to) continue;
            for (int64_t n = from; n < to; n++) {
                piece_of.push_back(pieces.size()), position.push_back(cache.lengths[b] + n - start);
                if (n < end - tokens.outputs[b]) continue;
                wanted.push_back(n - first), places.push_back(outputs + n - (end - tokens.outputs[b]));
            }
            pieces.push_back({b, from - first, to - from});
        }
    }
    const Piece& piece(int64_t n) const { return pieces[piece_of[n]]; }
    int64_t blocks(const Piece& piece) const { return position[piece.from + piece.count - 1] / BLOCK + 1; }
};

// Every size of scratch memory that is not plainly [N, …]: computed here and nowhere else.
struct Sizes {
    int64_t experts = 1;            // that a token has: 1 for a dense MLP
    int64_t widest = 0, mlp = 0;    // columns of a linear layer, rows of an MLP's up_proj
    bool forms[FORMS] = {};         // of activations that some linear layer wants
    int64_t queries, blocks = 0;    // of one key head at once; of the longest row
    std::vector<int64_t> partials;  // the first of each piece, with their number at the end; only of few tokens
    struct Part {
        int64_t head, from, count;  // a key head, and the tokens whose queries meet it together
    };
    std::vector<Part> parts;        // of the attention of many tokens

    Sizes(const Qwen3& m, const Span& span, bool many) {
        auto see = [&](const Linear& w) {
            if (w.rows) widest = std::max(widest, w.columns), forms[activations_of(w)] = true;
        };
        for (int64_t layer = 0; layer < m.num_hidden_layers; layer++) {
            const Block& block = m.layers[layer];
            for (auto w : {&block.self_attn.q_proj, &block.self_attn.k_proj, &block.self_attn.v_proj}) see(*w);
            see(block.self_attn.o_proj), see(block.gate);
            if (block.gate.rows) experts = m.num_experts_per_tok;
            for (int64_t e = 0; e < (block.gate.rows ? m.num_experts : 1); e++) {
                const MLP& mlp = block.experts[e];
                see(mlp.gate_proj), see(mlp.up_proj), see(mlp.down_proj);
                this->mlp = std::max(this->mlp, mlp.up_proj.rows);
            }
        }
        see(m.lm_head);
        const int64_t G = m.num_attention_heads / m.num_key_value_heads;
        const int64_t most = many ? std::max(int64_t(1), QUERIES / G) : span.N;
        int64_t tokens = 0;
        partials.push_back(0);
        for (auto& piece : span.pieces) {
            tokens = std::max(tokens, std::min(most, piece.count));
            blocks = std::max(blocks, span.blocks(piece));
            partials.push_back(partials.back() + (many ? 0 : m.num_key_value_heads * span.blocks(piece)));
            for (int64_t head = 0; many && head < m.num_key_value_heads; head++)
                for (int64_t i = 0; i < piece.count; i += most)
                    parts.push_back({head, piece.from + i, std::min(most, piece.count - i)});
        }
        queries = G * tokens;
    }
};

// What all threads share.
template <class T>
struct Shared {
    const Sizes sizes;
    Buffer<float> x;             // [N, C] the residual stream
    Buffer<float> cos, sin;      // [N, D/2]
    Buffer<float> q, k, v;       // [N, H, D], [N, K, D], [N, K, D]
    Buffer<float> partial;       // few tokens: attention over each block of positions, [pieces, K, blocks, …] (Partial)
    Buffer<float> attended;      // many tokens: [N, H, D]
    Buffer<float> router;        // [N, num_experts]
    Buffer<float> gate, up;      // [N * experts, mlp]
    Inputs inputs;               // many: what goes into linear layers
    Works works;

    Shared(const Qwen3& m, const Span& span, bool many) : sizes(m, span, many) {
        const int64_t N = span.N, D = m.head_dim, hidden = N * m.num_attention_heads * D;
        x.allocate(N * m.hidden_size), cos.allocate(N * (D / 2)), sin.allocate(N * (D / 2));
        q.allocate(hidden), k.allocate(N * m.num_key_value_heads * D), v.allocate(N * m.num_key_value_heads * D);
        partial.allocate(sizes.partials.back() * Partial::size(sizes.queries, D));
        attended.allocate(many ? hidden : 0), router.allocate(N * m.num_experts);
        gate.allocate(N * sizes.experts * sizes.mlp), up.allocate(N * sizes.experts * sizes.mlp);
        const int64_t count = N * sizes.experts;
        inputs.allocate(count > FEW ? count : 0, sizes.widest, sizes.forms);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// The layers: one thread's part of the work on one span. Allocates nothing once it is made.

template <class T>
class Step {
    const Qwen3& model;
    const KVCache& cache;
    const Span& span;
    Shared<T>& shared;
    const Sizes& sizes = shared.sizes;
    Sharing sharing{shared.works};
    const int64_t C = model.hidden_size, D = model.head_dim, H = model.num_attention_heads;
    const int64_t K = model.num_key_value_heads, G = H / K, N = span.N;
    const bool many;
    Inputs own, queries;         // few: what goes into linear layers; heads of q on their way to the keys
    Buffer<float> scratch;       // one vector
    Buffer<float> results;       // of some rows, [tokens, ROWS]
    Buffer<float> unpacked;      // rows of weights as float, where many tokens meet them so
    std::vector<const char*> inputs_of;  // each token
    Buffer<float> scores;        // [queries, BLOCK]
    Buffer<float> partials;      // many: of the queries, over blocks
    std::vector<int64_t> first;  // experts: the first of each one's pairs, [num_experts + 1]
    std::vector<int64_t> chosen, pair_token;      // of each token, [N, experts]; of each pair of token and expert
    std::vector<float> weights, pair_weight;

  public:
    Step(const Qwen3& model, const KVCache& cache, const Span& span, Shared<T>& shared, bool many)
        : model(model), cache(cache), span(span), shared(shared), many(many),
          first(std::max(model.num_experts, int64_t(1)) + 1), chosen(N * sizes.experts), pair_token(chosen.size()),
          weights(chosen.size()), pair_weight(chosen.size()) {
        bool keys[FORMS] = {};
        keys[KEYS] = true;
        own.allocate(FEW, sizes.widest, sizes.forms), queries.allocate(sizes.queries, D, keys);
        const int64_t most = std::max({N * sizes.experts, sizes.queries, FEW});
        results.allocate(most * ROWS), inputs_of.resize(most);
        scratch.allocate(std::max(sizes.widest, D)), scores.allocate(sizes.queries * BLOCK);
        unpacked.allocate(scratch_size(std::max(sizes.widest, D)));
        partials.allocate(many ? sizes.blocks * Partial::size(sizes.queries, D) : 0);
    }

    void run(const Tokens& tokens, int threads) {
        sharing.threads = threads;
        for (int64_t layer = 0; layer < model.num_hidden_layers; layer++) block(model.layers[layer], layer);
        const int64_t V = model.lm_head.rows, count = span.wanted.size();
        if (!count) return;
        auto& x = prepared(count, C, {&model.lm_head}, [&](int64_t i, float* out) {
            rms_norm(shared.x.at(span.wanted[i] * C, C), model.norm, C, out);
        });
        linear(model.lm_head, x, count, [&](int64_t i, int64_t row, const float* y, int64_t n) {
            T* logits = (T*)tokens.logits + span.places[i] * V + row;
            for (int64_t j = 0; j < n; j++) assign(logits[j], y[j]);
        });
        sharing.wait_for_all();  // here, as OpenMP would spin
    }

  private:
    const int64_t KEY_BYTES = cache.key_scales ? 1 : cache.half ? sizeof(float16) : sizeof(T);  // of a number
    const Form KEYS = cache.key_scales ? BYTES : cache.half ? FLOAT32 : form_of({.bits = 8 * sizeof(T)});

    // `count` vectors of n numbers in the forms that some linear layers want; make(i, out) makes one.
    template <class Make>
    const Inputs& prepared(int64_t count, int64_t n, std::initializer_list<const Linear*> to, Make make) {
        bool forms[FORMS] = {};
        for (auto w : to) forms[activations_of(*w)] = true;
        return prepared(count, n, forms, make);
    }
    template <class Make>
    const Inputs& prepared(int64_t count, int64_t n, const bool (&forms)[FORMS], Make make) {
        Inputs& inputs = count > FEW ? shared.inputs : own;
        auto some = [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                float* x = scratch.at(0, n);
                make(i, x);
                for (int form = 0; form < FORMS; form++)
                    if (forms[form]) inputs.put(i, x, n, Form(form));
            }
            for (int form = 0; form < FORMS; form++)
                if (forms[form] && count >= fewest_of_many(Form(form))) inputs.put_beside(begin, end - begin, n, Form(form));
        };
        if (count <= FEW) return some(0, count), inputs;
        sharing.share((count + SIDE - 1) / SIDE, Works::SHORTEST, [&](int64_t begin, int64_t end) {
            for (; begin < end; begin++) some(begin * SIDE, std::min((begin + 1) * SIDE, count));
        });
        sharing.wait_for_all();
        return inputs;
    }

    // Rows begin .. end of weight·x + bias for `count` tokens: put(i, row, y, n) takes n results of the i-th from `row`
    // on, at most ROWS. at(i) is its place in `x`.
    template <class At, class Put>
    void rows(const Linear& w, int64_t begin, int64_t end, const Inputs& x, int64_t count, At at, Put put) {
        for (int64_t i = 0; i < count; i++) inputs_of[i] = x.at(at(i), w.columns, activations_of(w));
        float *all = results.at(0, count * ROWS), *scratch = unpacked.at(0, scratch_size(w.columns));
        multiply_rows(w, begin, end, inputs_of.data(), count, all, scratch, [&](int64_t first, int64_t tokens, int64_t row, int64_t n) {
            for (int64_t i = 0; i < tokens; i++) {
                float* y = all + i * ROWS;
                for (int64_t r = 0; w.bias && r < n; r++) y[r] += to_float(((const T*)w.bias)[row + r]);
                put(first + i, row, (const float*)y, n);
            }
        });
    }

    // Rows that are read together, of which a thread claims whole units.
    static int64_t unit_of(const Linear& w, int64_t count) {
        return count > FEW ? ROWS : are_many(count, form_of(w)) || form_of(w) == BFLOAT16_TILES ? SIDE : 4;
    }

    // weight·x + bias of `count` tokens.
    template <class Put>
    void linear(const Linear& w, const Inputs& x, int64_t count, Put put) {
        const int64_t unit = unit_of(w, count);
        sharing.share((w.rows + unit - 1) / unit, unit * w.row_bytes, [&](int64_t begin, int64_t end) {
            rows(w, begin * unit, std::min(end * unit, w.rows), x, count, [](int64_t i) { return i; }, put);
        });
    }

    void rms_norm(const float* x, const void* weight, int64_t n, float* out) const {
        Vector squares = {};
        for (int64_t i = 0; i < n; i += LANES) {
            Vector some = i + LANES <= n ? load(x + i) : load_some(x + i, n - i);
            squares = fma(some, some, squares);
        }
        const float scale = 1 / std::sqrt(sum(squares) / n + model.rms_norm_eps);
        for (int64_t i = 0; i < n; i++) out[i] = to_float(((const T*)weight)[i]) * (x[i] * scale);
    }

    // A head of q or k, normed where the model does that, and turned by its token's position: [D] → [D].
    void norm_and_rotate(const float* x, int64_t n, const void* weight, float* out) const {
        if (weight)
            rms_norm(x, weight, D, out);
        else
            std::copy(x, x + D, out);
        const float *cos = shared.cos.at(n * (D / 2), D / 2), *sin = shared.sin.at(n * (D / 2), D / 2);
        for (int64_t i = 0; i < D / 2; i++) {
            float a = out[i], b = out[i + D / 2];
            out[i] = a * cos[i] - b * sin[i];
            out[i + D / 2] = b * cos[i] + a * sin[i];
        }
    }

    // The keys or the values of a layer, and what they are for one head in one block.
    struct Cached {
        void *const *numbers, *const *scales;
    };
    struct Positions {
        char* numbers;     // [BLOCK, D] of T, of float16, or of int8 where there are scales
        bfloat16* scales;  // [BLOCK]
    };
    Cached layer_of(void* const* numbers, void* const* scales, int64_t layer) const {
        return {numbers + layer * cache.blocks, scales ? scales + layer * cache.blocks : nullptr};
    }
    Positions block_of(const Cached& cached, int64_t row, int64_t head, int64_t block) const {
        const int64_t at = cache.first[row] + block, numbers = head * cache.strides[row];
        return {(char*)cached.numbers[at] + numbers * KEY_BYTES,
                cached.scales ? (bfloat16*)cached.scales[at] + numbers / D : nullptr};
    }
    void remember(const float* x, const Positions& in, int64_t slot) const {
        if (in.scales) return in_eight_bits(x, D, (int8*)in.numbers + slot * D, in.scales[slot]);
        for (int64_t d = 0; d < D; d++)
            cache.half ? assign(((float16*)in.numbers)[slot * D + d], x[d]) : assign(((T*)in.numbers)[slot * D + d], x[d]);
    }

    // The new key and value of token n in one head, into the cache.
    void remember(const Attention& attn, int64_t n, int64_t head, const Cached& keys, const Cached& values) {
        const float *k = shared.k.at((n * K + head) * D, D), *v = shared.v.at((n * K + head) * D, D);
        const int64_t row = span.piece(n).row, block = span.position[n] / BLOCK, slot = span.position[n] % BLOCK;
        float* turned = scratch.at(0, D);
        norm_and_rotate(k, n, attn.k_norm, turned);
        remember(turned, block_of(keys, row, head, block), slot);
        remember(v, block_of(values, row, head, block), slot);
    }

    // Query g of a key head, of those that begin with token `from` of the span.
    void query(const Attention& attn, int64_t from, int64_t head, int64_t g) {
        const int64_t n = from + g / G;
        float* out = scratch.at(0, D);
        norm_and_rotate(shared.q.at((n * H + head * G + g % G) * D, D), n, attn.q_norm, out);
        for (int64_t d = 0; d < D; d++) out[d] /= std::sqrt(float(D));
        queries.put(g, out, D, KEYS);
    }

    void queries_of(const Attention& attn, int64_t from, int64_t head, int64_t count) {
        for (int64_t g = 0; g < count; g++) query(attn, from, head, g);
        if (count < fewest_of_many(KEYS)) return;
        for (int64_t g = 0; g < count; g += SIDE) queries.put_beside(g, std::min<int64_t>(count - g, SIDE), D, KEYS);
    }

    // The queries that `queries_of` prepared over one block of positions.
    void attend(int64_t from, int64_t count, int64_t block, const Positions& keys, const Positions& values,
                float* partial) {
        const int64_t start = block * BLOCK, last = span.position[from + (count - 1) / G];
        const int64_t positions = std::min(BLOCK, last + 1 - start);
        const Linear matrix = {keys.numbers, nullptr, keys.scales, positions, D, D * KEY_BYTES, 8 * KEY_BYTES,
                               keys.scales ? 1 : 0, cache.half ? FLOAT16 : 0};
        for (int64_t s = 0; s < positions; s += ROWS) {  // meanwhile the values come, which are needed then
            const int64_t n = std::min(positions - s, ROWS);
            fetch(values.numbers + s * D * KEY_BYTES, n * D * KEY_BYTES);
            rows(matrix, s, s + n, queries, count, [](int64_t i) { return i; },
                 [&](int64_t g, int64_t s, const float* y, int64_t n) { std::copy(y, y + n, scores.at(g * BLOCK + s, n)); });
        }
        auto seen = [&](int64_t g) { return std::clamp(span.position[from + g / G] + 1 - start, int64_t(0), positions); };
        float* all = scores.at(0, count * BLOCK);
        if (values.scales)
            weigh(all, count, positions, D, (const int8*)values.numbers, values.scales, seen, {partial, count});
        else if (cache.half)
            weigh(all, count, positions, D, (const float16*)values.numbers, nullptr, seen, {partial, count});
        else
            weigh(all, count, positions, D, (const T*)values.numbers, nullptr, seen, {partial, count});
    }

    void attention(const Attention& attn, const Inputs& x, const Cached& keys, const Cached& values) {
        auto into = [&](Buffer<float>& out, int64_t width) {
            return [&out, width](int64_t n, int64_t row, const float* y, int64_t count) {
                std::copy(y, y + count, out.at(n * width + row, count));
            };
        };
        linear(attn.q_proj, x, N, into(shared.q, H * D));
        linear(attn.k_proj, x, N, into(shared.k, K * D));
        linear(attn.v_proj, x, N, into(shared.v, K * D));
        sharing.wait_for_all();
        many ? attend_many(attn, keys, values) : attend_few(attn, keys, values);
        auto& out = prepared(N, H * D, {&attn.o_proj}, [&](int64_t n, float* out) {
            if (many) return (void)std::copy(shared.attended.at(n * H * D), shared.attended.at(n * H * D) + H * D, out);
            const auto& piece = span.piece(n);
            for (int64_t head = 0; head < H; head++) {
                const int64_t first = sizes.partials[span.piece_of[n]] + head / G * span.blocks(piece);
                put_together((n - piece.from) * G + head % G, piece.count * G, span.position[n] / BLOCK + 1, D,
                             [&](int64_t block) { return few_partial(first + block); }, out + head * D);
            }
        });
        add_to_residual(attn.o_proj, out);
    }

    float* few_partial(int64_t i) {
        const int64_t size = Partial::size(sizes.queries, D);
        return shared.partial.at(i * size, size);
    }

    // Each block of positions is a piece of work; each key and value is read from memory once for all queries.
    void attend_few(const Attention& attn, const Cached& keys, const Cached& values) {
        sharing.share(sizes.partials.back(), 2 * BLOCK * D * KEY_BYTES, [&](int64_t begin, int64_t end) {
            for (int64_t work = begin; work < end; work++) {
                const auto after = std::upper_bound(sizes.partials.begin(), sizes.partials.end(), work);
                const int64_t index = after - sizes.partials.begin() - 1, i = work - sizes.partials[index];
                const auto& piece = span.pieces[index];
                const int64_t head = i / span.blocks(piece), block = i % span.blocks(piece), count = piece.count * G;
                const int64_t positions = std::min(BLOCK, span.position[piece.from + piece.count - 1] + 1 - block * BLOCK);
                fetch(block_of(keys, piece.row, head, block).numbers, positions * D * KEY_BYTES);
                for (int64_t n = piece.from; n < piece.from + piece.count; n++)
                    if (span.position[n] / BLOCK == block) remember(attn, n, head, keys, values);
                queries_of(attn, piece.from, head, count);
                attend(piece.from, count, block, block_of(keys, piece.row, head, block),
                       block_of(values, piece.row, head, block), few_partial(work));
            }
        });
        sharing.wait_for_all();
    }

    // Some tokens of a row and a key head are a piece of work, over all blocks.
    void attend_many(const Attention& attn, const Cached& keys, const Cached& values) {
        sharing.share(N * K, Works::SHORTEST / 8, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) remember(attn, i / K, i % K, keys, values);
        });
        sharing.wait_for_all();
        sharing.share(sizes.parts.size(), Works::SHORTEST, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                const auto [head, from, tokens] = sizes.parts[i];
                const int64_t row = span.piece(from).row, count = tokens * G, size = Partial::size(count, D);
                auto part = [&](int64_t block) { return partials.at(block * size, size); };
                queries_of(attn, from, head, count);
                const int64_t blocks = span.position[from + tokens - 1] / BLOCK + 1;
                for (int64_t block = 0; block < blocks; block++)
                    attend(from, count, block, block_of(keys, row, head, block), block_of(values, row, head, block),
                           part(block));
                for (int64_t g = 0; g < count; g++) {
                    const int64_t n = from + g / G;
                    float* out = shared.attended.at((n * H + head * G + g % G) * D, D);
                    put_together(g, count, span.position[n] / BLOCK + 1, D, part, out);
                }
            }
        });
        sharing.wait_for_all();
    }

    void add_to_residual(const Linear& w, const Inputs& x) {
        linear(w, x, N, [&](int64_t n, int64_t row, const float* y, int64_t count) {
            float* to = shared.x.at(n * C + row, count);
            for (int64_t i = 0; i < count; i++) to[i] += y[i];
        });
        sharing.wait_for_all();
    }

    // A dense MLP is a single expert, which every token has. Experts are used in their own order, whatever their
    // probabilities, so that a token's sum does not depend on which other tokens share an expert.
    void mlp(const Block& block, const Inputs& x) {
        const int64_t experts = block.gate.rows ? model.num_experts : 1;
        if (block.gate.rows)
            route(block.gate, x);
        else
            alone();
        const int64_t pairs = first[experts], width = block.experts[0].up_proj.rows;
        const int64_t unit = unit_of(block.experts[0].up_proj, pairs), units = (width + unit - 1) / unit;
        sharing.share(experts * units, 2 * unit * block.experts[0].up_proj.row_bytes, [&](int64_t begin, int64_t end) {
            for (int64_t e = begin / units; e * units < end; e++)
                up(block.experts[e], e, std::max(begin - e * units, int64_t(0)) * unit,
                   std::min(std::min(end - e * units, units) * unit, width), x);
        });
        sharing.wait_for_all();
        bool forms[FORMS] = {};
        for (int64_t e = 0; e < experts; e++) forms[activations_of(block.experts[e].down_proj)] = true;
        auto& hidden = prepared(pairs, width, forms, [&](int64_t pair, float* out) {
            std::memcpy(out, shared.gate.at(pair * width, width), width * sizeof(float));
        });
        const int64_t piece = unit_of(block.experts[0].down_proj, pairs);
        sharing.share((C + piece - 1) / piece, piece * sizes.experts * block.experts[0].down_proj.row_bytes,
                      [&](int64_t begin, int64_t end) {
                          for (int64_t e = 0; e < experts; e++)
                              down(block.experts[e].down_proj, e, begin * piece, std::min(end * piece, C), hidden);
                      });
        sharing.wait_for_all();
    }

    void up(const MLP& expert, int64_t e, int64_t begin, int64_t end, const Inputs& x) {
        const int64_t count = first[e + 1] - first[e], width = expert.up_proj.rows;
        auto token = [&](int64_t i) { return pair_token[first[e] + i]; };
        auto into = [&](Buffer<float>& out) {
            return [&, e](int64_t i, int64_t row, const float* y, int64_t n) {
                std::copy(y, y + n, out.at((first[e] + i) * width + row, n));
            };
        };
        if (!count) return;
        rows(expert.gate_proj, begin, end, x, count, token, into(shared.gate));
        rows(expert.up_proj, begin, end, x, count, token, into(shared.up));
        for (int64_t i = 0, n = end - begin; i < count; i++) {
            const int64_t at = (first[e] + i) * width + begin;
            const float* up = shared.up.at(at, n);
            by_vectors(shared.gate.at(at, n), n, [&](int64_t j, Vector gate) {
                return silu(gate) * (j + LANES <= n ? load(up + j) : load_some(up + j, n - j));
            });
        }
    }

    void down(const Linear& w, int64_t e, int64_t begin, int64_t end, const Inputs& hidden) {
        const int64_t count = first[e + 1] - first[e];
        if (count)
            rows(w, begin, end, hidden, count, [&](int64_t i) { return first[e] + i; },
                 [&](int64_t i, int64_t row, const float* y, int64_t n) {
                     const int64_t pair = first[e] + i;
                     float* to = shared.x.at(pair_token[pair] * C + row, n);
                     for (int64_t j = 0; j < n; j++) to[j] += pair_weight[pair] * y[j];
                 });
    }

    void alone() {
        first[0] = 0, first[1] = N;
        for (int64_t n = 0; n < N; n++) pair_token[n] = n, pair_weight[n] = 1;
    }

    // The most probable experts of each token and their weights, then the tokens of each expert. Each thread for itself.
    void route(const Linear& router, const Inputs& x) {
        const int64_t experts = model.num_experts, count = sizes.experts;
        linear(router, x, N, [&](int64_t n, int64_t row, const float* y, int64_t rows) {
            std::copy(y, y + rows, shared.router.at(n * experts + row, rows));
        });
        sharing.wait_for_all();
        std::fill(first.begin(), first.end(), 0);
        for (int64_t n = 0; n < N; n++) {
            const float* p = shared.router.at(n * experts, experts);
            int64_t* best = &chosen[n * count];
            float largest = *std::max_element(p, p + experts), total = 0, of_chosen = 0;
            for (int64_t e = 0; e < experts; e++) total += std::exp(p[e] - largest);
            for (int64_t i = 0; i < count; i++) {
                best[i] = -1;
                for (int64_t e = 0; e < experts; e++)
                    if (std::find(best, best + i, e) == best + i && (best[i] < 0 || p[e] > p[best[i]])) best[i] = e;
                weights[n * count + i] = std::exp(p[best[i]] - largest) / total;
                of_chosen += weights[n * count + i];
                first[best[i] + 1]++;
            }
            for (int64_t i = 0; i < count && model.norm_topk_prob; i++) weights[n * count + i] /= of_chosen;
        }
        for (int64_t e = 0; e < experts; e++) first[e + 1] += first[e];
        for (int64_t i = 0; i < N * count; i++) {
            const int64_t pair = first[chosen[i]]++;
            pair_token[pair] = i / count, pair_weight[pair] = weights[i];
        }
        std::copy_backward(first.begin(), first.end() - 1, first.end());  // each is now where the next one begins
        first[0] = 0;
    }

    void block(const Block& block, int64_t layer) {
        const Attention& attn = block.self_attn;
        auto& x = prepared(N, C, {&attn.q_proj, &attn.k_proj, &attn.v_proj}, normed(block.input_layernorm));
        attention(attn, x, layer_of(cache.keys, cache.key_scales, layer), layer_of(cache.values, cache.value_scales, layer));
        bool forms[FORMS] = {};
        if (block.gate.rows) forms[activations_of(block.gate)] = true;
        for (int64_t e = 0; e < (block.gate.rows ? model.num_experts : 1); e++)
            forms[activations_of(block.experts[e].gate_proj)] = forms[activations_of(block.experts[e].up_proj)] = true;
        mlp(block, prepared(N, C, forms, normed(block.post_attention_layernorm)));
    }

    auto normed(const void* weight) {
        return [this, weight](int64_t n, float* out) { rms_norm(shared.x.at(n * C, C), weight, C, out); };
    }
};

template <class T>
void step(const Qwen3& model, const KVCache& cache, const Tokens& tokens, const Span& span, int threads) {
    const bool many = span.N > FEW;
    const int64_t C = model.hidden_size, half = model.head_dim / 2;
    Shared<T> shared(model, span, many);
    for (int64_t n = 0; n < span.N; n++) {
        const int64_t id = tokens.ids[span.first + n];
        const Linear& embedding = model.embed_tokens;
        PRODUCTS[form_of(embedding)]->numbers((const char*)embedding.weight + id * embedding.row_bytes, C,
                                              shared.x.at(n * C, C));
        for (int64_t i = 0; i < half; i++) {
            float angle = float(span.position[n]) * model.rope_frequencies[i];
            *shared.cos.at(n * half + i) = std::cos(angle) * model.rope_factor;
            *shared.sin.at(n * half + i) = std::sin(angle) * model.rope_factor;
        }
    }
    std::deque<Step<T>> steps;  // made here, so that a lack of memory is an exception outside of the threads
    for (int i = 0; i < threads; i++) steps.emplace_back(model, cache, span, shared, many);
#pragma omp parallel num_threads(threads)
    steps[omp_get_thread_num()].run(tokens, omp_get_num_threads());
}

// 0; 1 where there is not enough memory.
template <class T>
int step(const Qwen3& model, const KVCache& cache, const Tokens& tokens, int threads) {
    const int64_t all = tokens.starts[tokens.B];
    try {
        for (int64_t first = 0; first < all; first += AT_ONCE)
            step<T>(model, cache, tokens, Span(cache, tokens, first, std::min(AT_ONCE, all - first)), threads);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

#define FIELD(type, name) offsetof(type, name)
extern "C" {
// Sizes of the structs and offsets of their fields, which ops/cpu/step.py compares with its mirrors of them.
extern const int64_t layout[];
const int64_t layout[] = {
    sizeof(Linear), FIELD(Linear, weight), FIELD(Linear, bias), FIELD(Linear, scale), FIELD(Linear, rows),
    FIELD(Linear, columns), FIELD(Linear, row_bytes), FIELD(Linear, bits), FIELD(Linear, groups),
    FIELD(Linear, blocks),
    sizeof(Attention), FIELD(Attention, q_proj), FIELD(Attention, k_proj), FIELD(Attention, v_proj),
    FIELD(Attention, o_proj), FIELD(Attention, q_norm), FIELD(Attention, k_norm),
    sizeof(MLP), FIELD(MLP, gate_proj), FIELD(MLP, up_proj), FIELD(MLP, down_proj),
    sizeof(Block), FIELD(Block, input_layernorm), FIELD(Block, self_attn), FIELD(Block, post_attention_layernorm),
    FIELD(Block, gate), FIELD(Block, experts),
    sizeof(Qwen3), FIELD(Qwen3, hidden_size), FIELD(Qwen3, num_hidden_layers), FIELD(Qwen3, num_attention_heads),
    FIELD(Qwen3, num_key_value_heads), FIELD(Qwen3, head_dim), FIELD(Qwen3, num_experts),
    FIELD(Qwen3, num_experts_per_tok), FIELD(Qwen3, norm_topk_prob), FIELD(Qwen3, rms_norm_eps),
    FIELD(Qwen3, rope_factor), FIELD(Qwen3, rope_frequencies), FIELD(Qwen3, embed_tokens), FIELD(Qwen3, layers),
    FIELD(Qwen3, norm), FIELD(Qwen3, lm_head),
    sizeof(KVCache), FIELD(KVCache, keys), FIELD(KVCache, values), FIELD(KVCache, key_scales),
    FIELD(KVCache, value_scales), FIELD(KVCache, half), FIELD(KVCache, blocks), FIELD(KVCache, first), FIELD(KVCache, strides),
    FIELD(KVCache, lengths),
    sizeof(Tokens), FIELD(Tokens, ids), FIELD(Tokens, starts), FIELD(Tokens, outputs), FIELD(Tokens, B),
    FIELD(Tokens, logits),
    sizeof(Logits), FIELD(Logits, x), FIELD(Logits, bits), FIELD(Logits, size), FIELD(Logits, ids), FIELD(Logits, times),
    FIELD(Logits, count), FIELD(Logits, repetition), FIELD(Logits, presence), FIELD(Logits, frequency), BLOCK, -1};

int step_float32(const Qwen3* model, const KVCache* cache, const Tokens* tokens, int threads) {
    return step<float>(*model, *cache, *tokens, threads);
}
int step_bfloat16(const Qwen3* model, const KVCache* cache, const Tokens* tokens, int threads) {
    return step<bfloat16>(*model, *cache, *tokens, threads);
}
int quantize_float32(const float* weight, const Linear* w, int threads) { return quantize_rows(weight, *w, threads); }
int quantize_bfloat16(const bfloat16* weight, const Linear* w, int threads) {
    return quantize_rows(weight, *w, threads);
}
}
