// The token step of model.py in C++: token ids and the cache in, the logits of the next tokens out.
//
// Read it beside model.py: the same names in the same order, and here the arithmetic that PyTorch does there. What it
// is for is speed. A few tokens read every weight once, so memory bandwidth is their limit, and everything else must
// stay out of the way: each thread reads its share of a matrix row by row as one sequential stream, activations stay in
// float32 and in the cache, and five barriers a layer are all the threads ever wait for each other. Many tokens, a
// prompt, are held by arithmetic instead, and go through matmul.h.
//
// A token's logits are the same bits whether it comes alone or as one of a few, so that a guess that is checked by one
// step together with others is judged as if the tokens had come one by one.
//
// The interface is plain C over pointers into the model's own tensors; ops/cpu/step.py fills the structs and checks them.
//
// Letters for sizes as in model.py:  B batch   T tokens   N = B * T   C hidden size   H query heads   K key/value heads
//                                    G = H / K   D head dim   S cached positions with the new ones   V vocabulary
#include <atomic>

#include "matmul.h"
#include "vectors.h"

#ifdef _OPENMP
#include <omp.h>
#else  // one thread
inline int omp_get_num_threads() { return 1; }
#endif

constexpr int64_t FEW = 16;            // tokens that a step takes row by row; ops/cpu/step.py knows it too
constexpr int64_t AT_ONCE = 512;       // tokens of a prompt: bounds the memory of a long one
constexpr int64_t SHORTEST = 1 << 15;  // bytes that a thread takes on at a time at least

// ---------------------------------------------------------------------------------------------------------------------
// What ops/cpu/step.py hands over. `void*` is a tensor of the model's dtype; nullptr where the model has none.

extern "C" {
struct Linear {
    const void* weight;  // [rows, columns]; with scales as ops/quant.py packs them
    const void* bias;
    const void* scale;  // [rows, groups] of bfloat16
    int64_t rows, columns, row_bytes, bits, groups;
};
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
    int64_t hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim, widest_mlp;
    int64_t num_experts, num_experts_per_tok, norm_topk_prob;
    float rms_norm_eps, rope_factor;
    const float* rope_frequencies;  // [D/2]
    const void* embed_tokens;       // [V, C]
    const Block* layers;
    const void* norm;
    Linear lm_head;
};
struct KVCache {
    void *const *keys, *const *values;  // over layers: [B, K, max_len, D]
    int64_t max_len;
    const int64_t* lengths;  // [B] positions before these tokens
};
struct Tokens {
    const int64_t* ids;     // [B, T]
    int64_t B, T, outputs;  // logits are wanted for the last `outputs` of T
    void* logits;           // [B, outputs, V]
};
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads.

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until all threads are here. Spins only briefly: where other programs share the cores, the thread that is waited
// for may need this very core to get here, and OpenMP's own barrier, which spins on, made a token take five times as long.
class Barrier {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};

  public:
    void wait(int threads) {
        int now = round.load();
        if (arrived.fetch_add(1) + 1 == threads) {
            arrived.store(0);
            round.store(now + 1);
            round.notify_all();
            return;
        }
        for (int spins = 0; spins < 1000; spins++) {
            if (round.load() != now) return;
            relax();
        }
        round.wait(now);
    }
};

// Some tokens of each row of a batch, and where they stand.
struct Span {
    int64_t B, first, T, N = B * T;  // T of each row, from its `first` new one on
    int64_t row(int64_t n) const { return n / T; }
    int64_t token(int64_t n) const { return first + n % T; }
};

// Blocks of positions of row b, up to the last new one of the span.
inline int64_t blocks(const KVCache& cache, const Span& span, int64_t b) {
    return (cache.lengths[b] + span.first + span.T + BLOCK - 1) / BLOCK;
}

// What all threads share.
struct Shared {
    std::vector<float> x;         // [N, C] the residual stream
    std::vector<float> cos, sin;  // [N, D/2]
    std::vector<float> q, k, v;   // [N, H, D], [N, K, D], [N, K, D]
    std::vector<float> partial;   // a few tokens: attention over a part of the positions, [B, K, blocks, T, G, D + 2]
    std::vector<float> router;    // [N, num_experts]
    std::vector<float> gate, up;  // a few tokens: [N, num_experts_per_tok, widest_mlp]
    Tiles normed, attended, hidden;  // many tokens: what goes into linear layers, [N, C], [N, H, D], [N, widest_mlp]
    std::vector<std::atomic<int64_t>> taken;  // of each piece of work between barriers, what somebody is at or has done
    Barrier barrier;

    Shared(const Qwen3& m, int64_t N, bool many, int64_t parts)
        : x(N * m.hidden_size), cos(N * m.head_dim / 2), sin(cos), q(N * m.num_attention_heads * m.head_dim),
          k(N * m.num_key_value_heads * m.head_dim), v(k), partial(parts * (m.head_dim + 2)),
          router(N * m.num_experts), gate(many ? 0 : N * m.num_experts_per_tok * m.widest_mlp), up(gate),
          taken(m.num_hidden_layers * (10 + (many ? 0 : N * (m.num_experts_per_tok + 1))) + 4) {
        if (!many) return;
        normed.set(N, m.hidden_size);
        attended.set(N, m.num_attention_heads * m.head_dim);
        hidden.set(N, m.widest_mlp);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// The layers. A `Step` is one thread's part of the work on one span.

template <class T>
struct Step {
    const Qwen3& model;
    const KVCache& cache;
    const Span span;
    Shared& shared;
    const int threads;
    const int64_t C = model.hidden_size, D = model.head_dim, H = model.num_attention_heads;
    const int64_t K = model.num_key_value_heads, G = H / K, N = span.N, QUERIES = span.T * G;
    const bool many = N > FEW;
    // Of a few tokens each thread computes for itself what is small, rather than wait for another.
    std::vector<float> normed = std::vector<float>(many ? 0 : N * C);
    std::vector<float> attended = std::vector<float>(many ? 0 : N * H * D);
    std::vector<float> queries = std::vector<float>((many ? TILE : QUERIES) * D);
    std::vector<float> scores;
    std::vector<Input> inputs = std::vector<Input>(many ? 1 : N * model.num_experts_per_tok);
    std::vector<int64_t> chosen = std::vector<int64_t>(many ? 1 : inputs.size());  // experts, [N, per token]
    std::vector<float> weights = std::vector<float>(chosen.size());
    std::vector<Line> packed, packed_keys, packed_values;
    Tiles tile_queries, tile_weights;
    int64_t works = 0;

    void wait_for_all() { shared.barrier.wait(threads); }

    // Splits n equal pieces of work, each of so many bytes to read, between the threads: calls work(begin, end) for
    // ranges. They are long at first, to be one sequential stream, and shorter towards the end, so that all threads end
    // together however fast each of them is.
    template <class Work>
    void share(int64_t n, int64_t bytes, Work work) {
        std::atomic<int64_t>& taken = shared.taken[works++];
        int64_t least = std::max(int64_t(1), SHORTEST / bytes), begin = taken.load();
        while (begin < n) {
            int64_t end = std::min(n, begin + std::max(least, (n - begin) / (2 * threads)));
            if (!taken.compare_exchange_weak(begin, end)) continue;
            work(begin, end);
            begin = taken.load();
        }
    }

    // Rows begin .. end of weight·x + bias for N tokens: y [rows, N].
    template <int N>
    static void some_rows(const Linear& w, const Scales& scales, int64_t begin, int64_t end,
                          const void* const* prepared, const float* const* x, float* y) {
        const char* weight = (const char*)w.weight + begin * w.row_bytes;
        const auto* scale = (const bfloat16*)w.scale + begin * w.groups;
        for (int64_t row = begin; row < end; row++, weight += w.row_bytes, scale += w.groups, y += N) {
            if (!w.scale)
                dot<N>((const T*)weight, x, w.columns, y);
            else if (w.bits == 4)
                dot_packed<4, N>((const uint8_t*)weight, scale, scales, prepared, x, w.columns, y);
            else
                dot_packed<8, N>((const uint8_t*)weight, scale, scales, prepared, x, w.columns, y);
            for (int i = 0; i < N && w.bias; i++) y[i] += to_float(((const T*)w.bias)[row]);
        }
    }

    // Rows begin .. end for `count` tokens: put(token, row, y). A few rows at a time, which stay in the cache for all.
    template <class Put>
    static void rows(const Linear& w, int64_t begin, int64_t end, Input* inputs, int64_t count, Put put) {
        constexpr int64_t SOME = 16;
        const Scales scales(w.columns, std::max(w.groups, int64_t(1)), w.bits == 4 ? 4 : 8);
        const float* x[FEW];
        const void* prepared[FEW];
        for (int64_t i = 0; i < count; i++) {
            x[i] = inputs[i].x;
            prepared[i] = w.scale ? inputs[i].prepared(w.bits) : nullptr;
        }
        for (; begin < end; begin += SOME) {
            const int64_t last = std::min(end, begin + SOME);
            by_fours(count, [&](int64_t token, auto at_once) {
                float y[SOME * at_once];
                some_rows<at_once>(w, scales, begin, last, prepared + token, x + token, y);
                for (int64_t i = begin; i < last; i++)
                    for (int k = 0; k < at_once; k++) put(token + k, i, y[(i - begin) * at_once + k]);
            });
        }
    }

    // weight·x + bias of `count` tokens: put(token, row, y, n) takes n results from `row` on. A few tokens come in
    // `inputs`, many in `x`.
    template <class Put>
    void linear(const Linear& w, int64_t count, Tiles& x, Put put) {
        if (count > FEW)
            return many_tokens(w, w, ROWS, count, x, [&](int64_t token, int64_t row, Vector* y) {
                for (int64_t i = 0; i < 2 && row + 16 * i < w.rows; i++)
                    put(token, row + 16 * i, (float*)(y + i), std::min(int64_t(16), w.rows - row - 16 * i));
            });
        share(w.rows, w.row_bytes, [&](int64_t begin, int64_t end) {
            rows(w, begin, end, inputs.data(), count, [&](int64_t n, int64_t i, float y) { put(n, i, &y, 1); });
        });
    }

    // The same for many tokens, 32 rows at a time: 16 of w and the next 16 (step 32), or 16 of w and of v (step 16).
    template <class Put>
    void many_tokens(const Linear& w, const Linear& v, int64_t step, int64_t count, Tiles& x, Put put) {
        packed.resize(x.columns);
        share((w.rows + step - 1) / step, step * w.row_bytes, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin * step; row < end * step; row += step) {
                Vector factor[2], bias[2];
                pack_rows(w, row, &packed[0], factor[0], bias[0]);
                pack_rows(v, row + step - 16, &packed[1], factor[1], bias[1]);
                for (int64_t token = 0; token < count; token += TILE) {
                    Vector sums[TILE][2];
                    multiply(packed.data(), x.tile(token), x.columns, sums);
                    for (int64_t i = 0; i < std::min(int64_t(TILE), count - token); i++) {
                        Vector y[2] = {sums[i][0] * factor[0] + bias[0], sums[i][1] * factor[1] + bias[1]};
                        put(token + i, row, y);
                    }
                    if (row + step < end * step)  // the next rows, in the order in which they lie in memory
                        prefetch(w, v, row + step, step, token, count);
                }
            }
        });
    }

    static void prefetch(const Linear& w, const Linear& v, int64_t row, int64_t step, int64_t token, int64_t count) {
        const int64_t parts = (count + TILE - 1) / TILE, bytes = step * w.row_bytes;
        for (int64_t at = token / TILE * bytes / parts / 64 * 64; at < (token / TILE + 1) * bytes / parts; at += 64) {
            __builtin_prefetch((const char*)w.weight + row * w.row_bytes + at, 0, 2);
            if (step == 16) __builtin_prefetch((const char*)v.weight + row * v.row_bytes + at, 0, 2);
        }
    }

    static void pack_rows(const Linear& w, int64_t row, Line* out, Vector& factor, Vector& bias) {
        const int64_t rows = std::clamp(w.rows - row, int64_t(0), int64_t(16));
        const char* weight = (const char*)w.weight + row * w.row_bytes;
        const bfloat16* scale = (const bfloat16*)w.scale + row * w.groups;
        if (w.scale)
            pack((const uint8_t*)weight, w.row_bytes, rows, w.columns, out, scale, w.groups, w.bits);
        else
            pack((const bfloat16*)weight, w.row_bytes, rows, w.columns, out);
        factor = Vector{} + 1.f, bias = Vector{};
        for (int64_t i = 0; i < std::min(rows, int64_t(LANES)); i++) {
            if (w.scale && w.groups == 1) factor[i] = to_float(scale[i]);
            if (w.bias) bias[i] = to_float(((const T*)w.bias)[row + i]);
        }
    }

    void rms_norm(const float* x, const void* weight, int64_t n, float* out) const {
        float scale = 1 / std::sqrt(dot(x, x, n) / n + model.rms_norm_eps);
        for (int64_t i = 0; i < n; i++) out[i] = to_float(((const T*)weight)[i]) * (x[i] * scale);
    }

    // The residual stream of `count` tokens, normed, on its way into linear layers; at(i) is which token comes i-th.
    template <class At>
    void norm(const void* weight, int64_t count, At at) {
        if (count <= FEW) {
            normed.resize(std::max(int64_t(normed.size()), count * C));
            inputs.resize(std::max(int64_t(inputs.size()), count));
            for (int64_t i = 0; i < count; i++) {
                rms_norm(&shared.x[at(i) * C], weight, C, &normed[i * C]);
                inputs[i].set(&normed[i * C], C);
            }
            return;
        }
        share(count, SHORTEST / 8, [&](int64_t begin, int64_t end) {
            std::vector<float> out(C);
            for (int64_t i = begin; i < end; i++) {
                rms_norm(&shared.x[at(i) * C], weight, C, out.data());
                shared.normed.put(i, 0, out.data(), C);
            }
        });
        wait_for_all();
    }

    // A head of q or k, normed where the model does that, and turned by its token's position: [D] → [D].
    void norm_and_rotate(const float* x, int64_t n, const void* weight, float* out) const {
        if (weight)
            rms_norm(x, weight, D, out);
        else
            std::copy(x, x + D, out);
        const float *cos = &shared.cos[n * (D / 2)], *sin = &shared.sin[n * (D / 2)];
        for (int64_t i = 0; i < D / 2; i++) {
            float a = out[i], b = out[i + D / 2];
            out[i] = a * cos[i] - b * sin[i];
            out[i + D / 2] = b * cos[i] + a * sin[i];
        }
    }

    T* head_of(void* cached, int64_t b, int64_t head) const { return (T*)cached + (b * K + head) * cache.max_len * D; }

    int64_t position(int64_t n) const { return cache.lengths[span.row(n)] + span.token(n); }

    // The new key and value of token n in one head, into the cache.
    void remember(const Attention& attn, int64_t n, int64_t head, T* keys, T* values) {
        float *k = &shared.k[(n * K + head) * D], *v = &shared.v[(n * K + head) * D];
        norm_and_rotate(k, n, attn.k_norm, k);
        for (int64_t d = 0; d < D; d++) assign(keys[position(n) * D + d], k[d]);
        for (int64_t d = 0; d < D; d++) assign(values[position(n) * D + d], v[d]);
    }

    void query(const Attention& attn, int64_t n, int64_t head, float* out) const {
        norm_and_rotate(&shared.q[(n * H + head) * D], n, attn.q_norm, out);
        for (int64_t d = 0; d < D; d++) out[d] /= std::sqrt(float(D));
    }

    void attention(const Attention& attn, void* keys, void* values) {
        auto into = [&](std::vector<float>& out, int64_t width) {
            return [&out, width](int64_t n, int64_t row, const float* y, int64_t count) {
                std::copy(y, y + count, &out[n * width + row]);
            };
        };
        linear(attn.q_proj, N, shared.normed, into(shared.q, H * D));
        linear(attn.k_proj, N, shared.normed, into(shared.k, K * D));
        linear(attn.v_proj, N, shared.normed, into(shared.v, K * D));
        wait_for_all();
        many ? attend_many(attn, keys, values) : attend_few(attn, keys, values);
        add_to_residual(attn.o_proj, shared.attended);
    }

    void add_to_residual(const Linear& w, Tiles& x) {
        linear(w, N, x, [&](int64_t n, int64_t row, const float* y, int64_t count) {
            for (int64_t i = 0; i < count; i++) shared.x[n * C + row + i] += y[i];
        });
        wait_for_all();
    }

    int64_t blocks(int64_t b) const { return ::blocks(cache, span, b); }

    // What a block of positions gives the queries of a key head: [T, G] largest scores, [T, G] sums of exponentials,
    // [T, G, D] the values weighted by the exponentials.
    float* partial(int64_t b, int64_t head, int64_t block) {
        int64_t before = 0;
        for (int64_t i = 0; i < b; i++) before += K * blocks(i);
        return &shared.partial[(before + head * blocks(b) + block) * QUERIES * (D + 2)];
    }

    void attend_few(const Attention& attn, void* keys, void* values) {
        for (int64_t b = 0; b < span.B; b++)
            share(K * blocks(b), 2 * BLOCK * D * sizeof(T), [&](int64_t begin, int64_t end) {
                for (int64_t work = begin; work < end; work++) {
                    int64_t head = work / blocks(b), block = work % blocks(b), start = block * BLOCK;
                    T *head_keys = head_of(keys, b, head), *head_values = head_of(values, b, head);
                    for (int64_t n = b * span.T; n < (b + 1) * span.T; n++) {
                        if (position(n) / BLOCK == block) remember(attn, n, head, head_keys, head_values);
                        for (int64_t g = 0; g < G; g++)
                            query(attn, n, head * G + g, &queries[(n % span.T * G + g) * D]);
                    }
                    attend(b, start, head_keys + start * D, head_values + start * D, partial(b, head, block));
                }
            });
        wait_for_all();
        for (int64_t n = 0; n < N; n++) {
            for (int64_t head = 0; head < H; head++) put_together(n, head, &attended[(n * H + head) * D]);
            inputs[n].set(&attended[n * H * D], H * D);
        }
    }

    // All queries of a key head over a block of positions; each key and value is read from memory once for all.
    void attend(int64_t b, int64_t start, const T* keys, const T* values, float* partial) {
        float *largest = partial, *total = largest + QUERIES, *out = total + QUERIES;
        scores.resize(QUERIES * BLOCK);
        const int64_t end = position((b + 1) * span.T - 1) + 1, count = std::min(BLOCK, end - start);
        for (int64_t s = 0; s < count; s++)
            by_fours(QUERIES, [&](int64_t g, auto queries_at_once) {
                score<T, queries_at_once>(&queries[g * D], keys + s * D, D, &scores[g * BLOCK + s]);
            });
        for (int64_t g = 0; g < QUERIES; g++) {
            float* p = &scores[g * BLOCK];
            int64_t seen = std::clamp(position(b * span.T + g / G) + 1 - start, int64_t(0), count);
            largest[g] = seen ? *std::max_element(p, p + seen) : -INFINITY;
            total[g] = exponentials(p, largest[g], seen);
            std::fill(p + seen, p + count, 0);
        }
        std::fill(out, out + QUERIES * D, 0);
        by_fours(count, [&](int64_t s, auto rows) {
            by_fours(QUERIES, [&](int64_t g, auto queries_at_once) {
                add_weighted<T, queries_at_once, rows>(&scores[g * BLOCK + s], values + s * D, D, out + g * D);
            });
        });
    }

    // The softmax over all blocks from those within each.
    void put_together(int64_t n, int64_t head, float* out) {
        float largest = -INFINITY, total = 0;
        int64_t b = span.row(n), g = n % span.T * G + head % G, seen = position(n) / BLOCK + 1;
        for (int64_t block = 0; block < seen; block++)
            largest = std::max(largest, partial(b, head / G, block)[g]);
        std::fill(out, out + D, 0);
        for (int64_t block = 0; block < seen; block++) {
            const float* part = partial(b, head / G, block);
            float weight = std::exp(part[g] - largest);
            total += weight * part[QUERIES + g];
            for (int64_t d = 0; d < D; d++) out[d] += weight * part[2 * QUERIES + g * D + d];
        }
        for (int64_t d = 0; d < D; d++) out[d] /= total;
    }

    // Scores and their sums over the values are two products of matrices for each key head: q·keys, then p·values.
    void attend_many(const Attention& attn, void* keys, void* values) {
        share(N * K, SHORTEST / 8, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                int64_t n = i / K, head = i % K, b = span.row(n);
                remember(attn, n, head, head_of(keys, b, head), head_of(values, b, head));
            }
        });
        wait_for_all();
        constexpr int64_t TOKENS = 128;  // that share the packing of keys and values
        const int64_t parts = (span.T + TOKENS - 1) / TOKENS;
        share(span.B * K * parts, SHORTEST, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                int64_t b = i / (K * parts), head = i / parts % K, first = i % parts * TOKENS;
                attend_many(attn, b, head, first, std::min(first + TOKENS, span.T), head_of(keys, b, head),
                            head_of(values, b, head));
            }
        });
        wait_for_all();
    }

    // Tokens first .. last of row b and the queries of one key head.
    void attend_many(const Attention& attn, int64_t b, int64_t head, int64_t first, int64_t last, const T* keys,
                     const T* values) {
        const int64_t S = position(b * span.T + last - 1) + 1, padded = rounded_up(S, STRIDE), begin = first * G;
        tile_queries.set(TILE, D), tile_weights.set(TILE, S), scores.resize(TILE * padded);
        const int64_t width = rounded_up(D, STRIDE);
        packed_keys.resize(padded / ROWS * width), packed_values.resize(width / ROWS * padded);
        for (int64_t s = 0; s < padded; s += 16)
            pack((const bfloat16*)keys + s * D, 2 * D, std::clamp(S - s, int64_t(0), int64_t(16)), D,
                 &packed_keys[s / ROWS * width + s / 16 % 2]);
        for (int64_t d = 0; d < width; d += ROWS)
            pack_columns((const bfloat16*)values, S, D, d, &packed_values[d / ROWS * padded]);
        for (int64_t query_index = begin; query_index < last * G; query_index += TILE) {
            const int64_t count = std::min(int64_t(TILE), last * G - query_index);
            auto token = [&](int64_t i) { return b * span.T + (query_index + i) / G; };
            for (int64_t i = 0; i < count; i++) {
                query(attn, token(i), head * G + (query_index + i) % G, &queries[i * D]);
                tile_queries.put(i, 0, &queries[i * D], D);
            }
            const int64_t seen = rounded_up(position(token(count - 1)) + 1, STRIDE);
            Vector sums[TILE][2];
            for (int64_t s = 0; s < seen; s += ROWS) {
                multiply(&packed_keys[s / ROWS * width], tile_queries.tile(0), width, sums);
                for (int64_t i = 0; i < count; i++)
                    for (int half = 0; half < 2; half++) store(&scores[i * padded + s + 16 * half], sums[i][half]);
            }
            float total[TILE];
            for (int64_t i = 0; i < count; i++) {
                float* p = &scores[i * padded];
                int64_t own = position(token(i)) + 1;
                total[i] = exponentials(p, *std::max_element(p, p + own), own);
                std::fill(p + own, p + seen, 0);
                tile_weights.put(i, 0, p, seen);
            }
            for (int64_t d = 0; d < D; d += ROWS) {
                multiply(&packed_values[d / ROWS * padded], tile_weights.tile(0), seen, sums);
                for (int64_t i = 0; i < count; i++)
                    for (int half = 0; half < 2; half++) {
                        Vector out = sums[i][half] / total[i];
                        int64_t at = d + 16 * half, rest = std::clamp(D - at, int64_t(0), int64_t(16));
                        int64_t column = (head * G + (query_index + i) % G) * D + at;
                        shared.attended.put(token(i), column, (float*)&out, rest);
                    }
            }
        }
    }

    void mlp(const Block& block) {
        if (many) return mlp_many(block.experts[0]);
        const bool sparse = block.gate.rows;
        const int64_t count = sparse ? model.num_experts_per_tok : 1, width = model.widest_mlp;
        std::fill(chosen.begin(), chosen.end(), 0), std::fill(weights.begin(), weights.end(), 1);
        if (sparse) route(block.gate);
        for (int64_t n = 0; n < (sparse ? N : 1); n++)  // a dense MLP takes all tokens at once
            for (int64_t i = 0; i < count; i++)
                up(block.experts[chosen[n * count + i]], n, sparse ? n + 1 : N, i, count);
        wait_for_all();
        for (int64_t i = 0; i < N * count; i++)
            inputs[i].set(&shared.gate[i * width], block.experts[chosen[i]].up_proj.rows);
        for (int64_t first = 0; first < N; first += sparse ? 1 : N) {
            const Linear& down = block.experts[chosen[first * count]].down_proj;
            share(down.rows, count * down.row_bytes, [&](int64_t begin, int64_t end) {
                for (int64_t k = first * count; k < (first + 1) * count; k++)
                    rows(block.experts[chosen[k]].down_proj, begin, end, &inputs[k], sparse ? 1 : N,
                         [&](int64_t n, int64_t i, float y) { shared.x[(first + n) * C + i] += weights[k] * y; });
            });
        }
        wait_for_all();
    }

    // silu(gate(x)) · up(x) of tokens first .. last in one expert, the i-th of `count` for each of them.
    void up(const MLP& expert, int64_t first, int64_t last, int64_t i, int64_t count) {
        share(expert.up_proj.rows, 2 * expert.up_proj.row_bytes, [&](int64_t begin, int64_t end) {
            const int64_t stride = count * model.widest_mlp, start = first * stride + i * model.widest_mlp;
            float *gate = &shared.gate[start], *up = &shared.up[start];
            Input* x = &inputs[first];
            auto into = [&](float* out) { return [=](int64_t n, int64_t j, float y) { out[n * stride + j] = y; }; };
            rows(expert.gate_proj, begin, end, x, last - first, into(gate));
            rows(expert.up_proj, begin, end, x, last - first, into(up));
            for (int64_t n = 0; n < last - first; n++)
                silu_and_multiply(gate + n * stride + begin, up + n * stride + begin, end - begin);
        });
    }

    void mlp_many(const MLP& mlp) {
        const int64_t width = mlp.up_proj.rows;
        many_tokens(mlp.gate_proj, mlp.up_proj, 16, N, shared.normed, [&](int64_t n, int64_t row, Vector* y) {
            Vector hidden = silu(y[0]) * y[1];
            shared.hidden.put(n, row, (float*)&hidden, std::min(int64_t(16), width - row));
        });
        wait_for_all();
        add_to_residual(mlp.down_proj, shared.hidden);
    }

    // The most probable experts of each token and their weights.
    void route(const Linear& router) {
        const int64_t experts = model.num_experts, count = model.num_experts_per_tok;
        linear(router, N, shared.normed, [&](int64_t n, int64_t row, const float* y, int64_t rows) {
            std::copy(y, y + rows, &shared.router[n * experts + row]);
        });
        wait_for_all();
        for (int64_t n = 0; n < N; n++) {
            const float* p = &shared.router[n * experts];
            int64_t* best = &chosen[n * count];
            float largest = *std::max_element(p, p + experts), total = 0, of_chosen = 0;
            for (int64_t e = 0; e < experts; e++) total += std::exp(p[e] - largest);
            for (int64_t i = 0; i < count; i++) {
                best[i] = -1;
                for (int64_t e = 0; e < experts; e++)
                    if (std::find(best, best + i, e) == best + i && (best[i] < 0 || p[e] > p[best[i]])) best[i] = e;
                weights[n * count + i] = std::exp(p[best[i]] - largest) / total;
                of_chosen += weights[n * count + i];
            }
            for (int64_t i = 0; i < count && model.norm_topk_prob; i++) weights[n * count + i] /= of_chosen;
        }
    }

    void block(const Block& block, int64_t layer) {
        auto all = [](int64_t n) { return n; };
        norm(block.input_layernorm, N, all);
        attention(block.self_attn, cache.keys[layer], cache.values[layer]);
        norm(block.post_attention_layernorm, N, all);
        mlp(block);
    }

    void step(const Tokens& tokens) {
        for (int64_t layer = 0; layer < model.num_hidden_layers; layer++) block(model.layers[layer], layer);
        // Of each row the last `wanted` tokens of this span; the first of them is `from` in the span, `to` in the logits.
        const int64_t before = tokens.T - tokens.outputs, V = model.lm_head.rows;
        const int64_t wanted = std::clamp(span.first + span.T - before, int64_t(0), span.T);
        const int64_t from = span.T - wanted, to = span.first + from - before, count = span.B * wanted;
        if (!wanted) return;
        norm(model.norm, count, [&](int64_t i) { return i / wanted * span.T + from + i % wanted; });
        linear(model.lm_head, count, shared.normed, [&](int64_t i, int64_t row, const float* y, int64_t n) {
            T* logits = (T*)tokens.logits + (i / wanted * tokens.outputs + to + i % wanted) * V + row;
            for (int64_t j = 0; j < n; j++) assign(logits[j], y[j]);
        });
        wait_for_all();  // here, as OpenMP would spin
    }
};

template <class T>
void step(const Qwen3& model, const KVCache& cache, const Tokens& tokens, Span span, int threads) {
    const bool many = span.N > FEW;
    int64_t parts = 0, D = model.head_dim;
    for (int64_t b = 0; b < span.B && !many; b++)
        parts += blocks(cache, span, b) * model.num_attention_heads * span.T;
    Shared shared(model, span.N, many, parts);
    for (int64_t n = 0; n < span.N; n++) {
        int64_t id = tokens.ids[span.row(n) * tokens.T + span.token(n)];
        const T* embedding = (const T*)model.embed_tokens + id * model.hidden_size;
        for (int64_t i = 0; i < model.hidden_size; i++) shared.x[n * model.hidden_size + i] = to_float(embedding[i]);
        for (int64_t i = 0; i < D / 2; i++) {
            float angle = float(cache.lengths[span.row(n)] + span.token(n)) * model.rope_frequencies[i];
            shared.cos[n * (D / 2) + i] = std::cos(angle) * model.rope_factor;
            shared.sin[n * (D / 2) + i] = std::sin(angle) * model.rope_factor;
        }
    }
#pragma omp parallel num_threads(threads)
    Step<T>{model, cache, span, shared, omp_get_num_threads()}.step(tokens);
}

template <class T>
void step(const Qwen3& model, const KVCache& cache, const Tokens& tokens, int threads) {
    const int64_t at_once = std::max(int64_t(1), AT_ONCE / tokens.B);
    for (int64_t first = 0; first < tokens.T; first += at_once)
        step<T>(model, cache, tokens, {tokens.B, first, std::min(at_once, tokens.T - first)}, threads);
}

// Rows of weights in the form that ops/quant.py stores: for the head, which a quantised checkpoint keeps as it was.
template <class T>
void quantize_rows(const T* weight, Linear w, int threads) {
    std::vector<float> ranges = {1};
    if (w.bits == 4) ranges = {0.86, 0.93, 1, 1.06, 1.13, 1.2};
    const float low = -(1 << (w.bits - 1));
    const int64_t columns = w.columns, size = columns / w.groups;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> x(columns);
        std::vector<int32_t> q(columns);
#pragma omp for
        for (int64_t row = 0; row < w.rows; row++) {
            for (int64_t i = 0; i < columns; i++) x[i] = to_float(weight[row * columns + i]);
            for (int64_t group = 0; group < w.groups; group++) {
                const float *part = &x[group * size], largest = largest_of(part, size);
                bfloat16 scale, best = {};
                float least = INFINITY;
                for (float range : ranges) {
                    assign(scale, largest / (low * range));
                    float error = quantize(part, size, w.bits, to_float(scale), &q[group * size]);
                    if (error < least) least = error, best = scale;
                }
                if (best.bits != scale.bits) quantize(part, size, w.bits, to_float(best), &q[group * size]);
                ((bfloat16*)w.scale)[row * w.groups + group] = best;
            }
            uint8_t* packed = (uint8_t*)w.weight + row * w.row_bytes;
            for (int64_t i = 0; i < columns && w.bits == 8; i++) packed[i] = q[i] + 128;
            for (int64_t i = 0; i < columns / 2 && w.bits == 4; i++) packed[i] = (q[2 * i] + 8) | (q[2 * i + 1] + 8) << 4;
        }
    }
}

extern "C" {
int serves_many_tokens() { return MANY_TOKENS; }
void quantize_float32(const float* weight, const Linear* w, int threads) { quantize_rows(weight, *w, threads); }
void quantize_bfloat16(const bfloat16* weight, const Linear* w, int threads) { quantize_rows(weight, *w, threads); }
void step_float32(const Qwen3* model, const KVCache* cache, const Tokens* tokens, int threads) {
    step<float>(*model, *cache, *tokens, threads);
}
void step_bfloat16(const Qwen3* model, const KVCache* cache, const Tokens* tokens, int threads) {
    step<bfloat16>(*model, *cache, *tokens, threads);
}
}
