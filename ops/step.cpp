// The token step of model.py in C++: one token id and the cache in, the logits of the next token out.
//
// Read it beside model.py: the same names in the same order, and here the arithmetic that PyTorch does there. What it
// is for is speed. A token at batch 1 reads every weight once, so memory bandwidth is its limit, and everything else
// must stay out of the way: each thread reads its share of a matrix row by row as one sequential stream, activations
// stay in float32 and in the cache, and five barriers a layer are all the threads ever wait for each other.
//
// The interface is plain C over pointers into the model's own tensors; ops/step.py fills the structs and checks them.
//
// Letters for sizes as in model.py:  C hidden size   H query heads   K key/value heads   G = H / K   D head dim
//                                    S cached positions with this one   V vocabulary
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else  // one thread
inline int omp_get_num_threads() { return 1; }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Vectors: the compiler's own, as wide as the machine that it compiles for has them.

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint64_t Pairs __attribute__((vector_size(4 * LANES)));
typedef uint32_t HalfUnsigned __attribute__((vector_size(2 * LANES)));
typedef uint16_t Quarters __attribute__((vector_size(LANES)));
typedef float Quad __attribute__((vector_size(16)));

struct bfloat16 {
    uint16_t bits;
};
struct int8 {
    uint8_t code;  // the number + 128
};

template <class Result>
inline Result read(const void* address) {  // from any alignment: a safetensors file promises none
    Result result;
    std::memcpy(&result, address, sizeof result);
    return result;
}

inline Vector load(const float* p) { return read<Vector>(p); }
inline Vector load(const bfloat16* p) {
#if defined(__AVX512F__)  // one instruction, of which GCC 12 makes five
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(p)), 16);
#else
    return (Vector)(__builtin_convertvector(read<Halves>(p), Integers) << 16);
#endif
}
inline Vector load(const int8* p) {
    Integers codes = __builtin_convertvector(read<Bytes>(p) ^ int8_t(-128), Integers);
    return __builtin_convertvector(codes, Vector);
}
inline void store(float* p, Vector x) { std::memcpy(p, &x, sizeof x); }

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    return read<float>(&bits);
}

inline float to_float(int8 x) { return float(x.code) - 128; }

inline void assign(float& to, float x) { to = x; }
inline void assign(bfloat16& to, float x) {  // to the nearest, ties to even
    uint32_t bits = read<uint32_t>(&x);
    to.bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float sum(Vector x) {
    Quad quads[LANES / 4], total = {};
    std::memcpy(quads, &x, sizeof x);
    for (Quad quad : quads) total += quad;
    return (total[0] + total[2]) + (total[1] + total[3]);
}

constexpr float ROUND = 12582912;  // 1.5 · 2^23: what is added to it is rounded to a whole number, in its low bits

// exp(x) = 2^n · exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, where a Taylor polynomial is exact to a bit or two.
inline Vector exp(Vector x) {
    x = x < -87.f ? Vector{} - 87.f : x;
    x = x > 88.f ? Vector{} + 88.f : x;
    Vector rounded = x * 1.44269504f + ROUND, n = rounded - ROUND;
    Vector r = x - n * 0.693145752f - n * 1.42860677e-6f;  // ln 2 in two parts
    Vector p = r * (1.f / 720) + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    return (Vector)((Integers)p + ((Integers)rounded << 23));
}

// ---------------------------------------------------------------------------------------------------------------------
// What ops/step.py hands over. `void*` is a tensor of the model's dtype; nullptr where the model has none.

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
    void *const *keys, *const *values;  // over layers: [K, max_len, D]
    int64_t max_len, length;
};
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic on rows of any length: whole vectors, then what is left.

constexpr int64_t PREFETCH = 4096;  // bytes ahead: far enough to hide the memory's latency, near enough to stay in L1
constexpr int64_t SHORTEST = 1 << 15;  // bytes that a thread takes on at a time at least
constexpr int64_t BLOCK = 256;  // positions that one thread attends to at a time

template <class T>
inline float dot(const T* w, const float* x, int64_t n) {
    constexpr int STEP = 4 * LANES;
    Vector sums[4] = {};
    int64_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        for (int line = 0; line < int(STEP * sizeof(T)); line += 64)
            __builtin_prefetch((const char*)(w + i) + PREFETCH + line);
        for (int j = 0; j < 4; j++) sums[j] += load(w + i + j * LANES) * load(x + i + j * LANES);
    }
    for (; i + LANES <= n; i += LANES) sums[0] += load(w + i) * load(x + i);
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; i++) total += to_float(w[i]) * x[i];
    return total;
}

// Weights of 4 bits: 8 to a 32-bit lane, lowest bits first, each its number + 8. Where the mantissa of 1.0 begins, the
// bits of a number q make 1.5 + q / 16 without a conversion, and those of its neighbour, four places lower,
// 1 + (q + 8) / 256. x must come as `arrange` leaves it.
constexpr int64_t CHUNK = 8 * LANES;

// The scale of each lane's weights. Groups of 32 or 16 are two pairs of lanes or one.
inline Vector lane_scales(const bfloat16* scale, int64_t column, int64_t group_size) {
    Pairs high;  // the scale of a pair of lanes in its highest bits
    if (group_size == 32) {
        uint64_t scales = 0;
        std::memcpy(&scales, scale + column / 32, LANES / 2);
        Pairs shift;
        for (int pair = 0; pair < LANES / 2; pair++) shift[pair] = 48 - 16 * (pair / 2);
        high = (scales << shift) & 0xffff000000000000;
    } else if (group_size == 16) {
        // By way of 32 bits, or GCC 12 converts one number at a time.
        auto scales = __builtin_convertvector(read<Quarters>(scale + column / 16), HalfUnsigned);
        high = __builtin_convertvector(scales, Pairs) << 48;
    } else {
        float lanes[LANES];
        for (int lane = 0; lane < LANES; lane++) lanes[lane] = to_float(scale[(column + 8 * lane) / group_size]);
        return load(lanes);
    }
    return (Vector)(high | high >> 32);
}

inline float dot_int4(const uint8_t* w, const float* x, const bfloat16* scale, int64_t n, int64_t group_size) {
    Vector total = {};
    int64_t column = 0;
    for (; column + CHUNK <= n; column += CHUNK, x += CHUNK + LANES) {
        __builtin_prefetch(w + column / 2 + PREFETCH);
        auto bits = read<Unsigned>(w + column / 2);
        Vector sum = load(x);
        for (int i = 0; i < 8; i += 2) {
            Unsigned two = i < 4 ? bits << (15 - 4 * i) : bits >> (4 * i - 15);
            sum += (Vector)((two & 0x078000) | 0x3f800000) * load(x + (1 + i) * LANES);
            sum += (Vector)((two & 0x780000) | 0x3f800000) * load(x + (2 + i) * LANES);
        }
        total += sum * lane_scales(scale, column, group_size);
    }
    float rest = 16 * sum(total);
    for (; column < n; column++, x++)
        rest += *x * (float(w[column / 2] >> 4 * (column % 2) & 15) - 8) * to_float(scale[column / group_size]);
    return rest;
}

// x [n] as dot_int4 wants it: for each chunk what meets the first weight of each lane, the second, ..., and before them
// what takes away the sums of all that is too much in the weights. What is left of x follows as it is.
inline void arrange(const float* x, int64_t n, float* out) {
    int64_t column = 0;
    for (; column + CHUNK <= n; column += CHUNK, out += CHUNK + LANES)
        for (int lane = 0; lane < LANES; lane++) {
            float even = 0, odd = 0;
            for (int i = 0; i < 8; i += 2) {
                even += out[(1 + i) * LANES + lane] = 16 * x[column + 8 * lane + i];
                odd += out[(2 + i) * LANES + lane] = x[column + 8 * lane + i + 1];
            }
            out[lane] = -1.5f * odd - (1 + 8 / 256.f) * even;
        }
    std::copy(x + column, x + n, out);
}

// Weights x [n] as whole numbers q of so many bits, x ≈ q · scale: see ops/quant.py. Returns the squared error.
inline float quantize(const float* x, int64_t n, int bits, float scale, int32_t* q) {
    const float low = -(1 << (bits - 1)), high = -low - 1, inverse = scale == 0 ? 0 : 1 / scale;
    float error = 0;
#pragma omp simd reduction(+ : error)
    for (int64_t i = 0; i < n; i++) {
        float rounded = std::min(std::max(x[i] * inverse + ROUND - ROUND, low), high);
        q[i] = rounded;
        error += (rounded * scale - x[i]) * (rounded * scale - x[i]);
    }
    return error;
}

inline void silu_and_multiply(float* gate, const float* up, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vector x = load(gate + i);
        store(gate + i, x / (1.f + exp(-x)) * load(up + i));
    }
    for (; i < n; i++) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

// p[i] = exp(p[i] - largest); returns their sum.
inline float exponentials(float* p, float largest, int64_t n) {
    Vector sums = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vector e = exp(load(p + i) - largest);
        store(p + i, e);
        sums += e;
    }
    float total = sum(sums);
    for (; i < n; i++) total += p[i] = std::exp(p[i] - largest);
    return total;
}

// Calls work(i, count) for i = 0 .. n, four at a time, then two, then one; count is a compile-time constant.
template <class Work>
inline void by_fours(int64_t n, Work work) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) work(i, std::integral_constant<int, 4>());
    for (; i + 2 <= n; i += 2) work(i, std::integral_constant<int, 2>());
    for (; i < n; i++) work(i, std::integral_constant<int, 1>());
}

// scores[g, 0] = q[g]·key for N queries. q [N, D], key [D], scores [N, BLOCK].
template <class T, int N>
inline void score(const float* q, const T* key, int64_t D, float* scores) {
    Vector sums[N] = {};
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES) {
        __builtin_prefetch((const char*)(key + d) + PREFETCH);
        Vector k = load(key + d);
        for (int g = 0; g < N; g++) sums[g] += k * load(q + g * D + d);
    }
    for (int g = 0; g < N; g++) {
        scores[g * BLOCK] = sum(sums[g]);
        for (int64_t rest = d; rest < D; rest++) scores[g * BLOCK] += to_float(key[rest]) * q[g * D + rest];
    }
}

// out[g] += weights[g]·values for N queries and ROWS positions. weights [N, BLOCK], values [ROWS, D], out [N, D].
template <class T, int N, int ROWS>
inline void add_weighted(const float* weights, const T* values, int64_t D, float* out) {
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES) {
        Vector totals[N];
        for (int g = 0; g < N; g++) totals[g] = load(out + g * D + d);
        for (int row = 0; row < ROWS; row++) {
            __builtin_prefetch((const char*)(values + row * D + d) + PREFETCH);
            Vector v = load(values + row * D + d);
            for (int g = 0; g < N; g++) totals[g] += weights[g * BLOCK + row] * v;
        }
        for (int g = 0; g < N; g++) store(out + g * D + d, totals[g]);
    }
    for (; d < D; d++)
        for (int g = 0; g < N; g++)
            for (int row = 0; row < ROWS; row++)
                out[g * D + d] += weights[g * BLOCK + row] * to_float(values[row * D + d]);
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

// What all threads share for one token.
struct Shared {
    std::vector<float> x;         // [C] the residual stream
    std::vector<float> cos, sin;  // [D/2]
    std::vector<float> q, k, v;   // [H, D], [K, D], [K, D]
    std::vector<float> partial;   // [K, blocks of S, G, D + 2] attention over a part of the positions
    std::vector<float> router;    // [num_experts]
    std::vector<float> gate, up;  // [num_experts_per_tok, widest_mlp]
    std::vector<std::atomic<int64_t>> taken;  // of each piece of work between barriers, what somebody is at or has done
    Barrier barrier;

    Shared(const Qwen3& m, int64_t blocks)
        : x(m.hidden_size), cos(m.head_dim / 2), sin(m.head_dim / 2), q(m.num_attention_heads * m.head_dim),
          k(m.num_key_value_heads * m.head_dim), v(m.num_key_value_heads * m.head_dim),
          partial(m.num_attention_heads * blocks * (m.head_dim + 2)), router(m.num_experts),
          gate(m.num_experts_per_tok * m.widest_mlp), up(m.num_experts_per_tok * m.widest_mlp),
          taken(m.num_hidden_layers * (7 + m.num_experts_per_tok) + 1) {}
};

// ---------------------------------------------------------------------------------------------------------------------
// The layers. A `Step` is one thread's part of the work on one token.

template <class T>
struct Step {
    const Qwen3& model;
    const KVCache& cache;
    Shared& shared;
    const int threads;
    const int64_t D = model.head_dim, K = model.num_key_value_heads, G = model.num_attention_heads / K;
    const int64_t S = cache.length + 1, blocks = (S + BLOCK - 1) / BLOCK;
    // Small enough that each thread computes it for itself rather than wait for another.
    std::vector<float> normed = std::vector<float>(model.hidden_size);
    std::vector<float> attended = std::vector<float>(K * G * D);
    std::vector<float> queries = std::vector<float>(G * D);
    std::vector<float> scores = std::vector<float>(G * BLOCK);
    std::vector<int64_t> chosen = std::vector<int64_t>(model.num_experts_per_tok);
    std::vector<float> weights = std::vector<float>(model.num_experts_per_tok);
    std::vector<const float*> hidden = std::vector<const float*>(model.num_experts_per_tok);
    const int64_t widest = std::max({model.hidden_size, K * G * D, model.widest_mlp});
    std::vector<float> arranged = std::vector<float>((model.num_experts_per_tok + 1) * (widest + widest / 8));
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

    // What `row` wants of x: x itself, or for weights of 4 bits its numbers in their order. `slot` of several at once.
    const float* prepare(const Linear& w, const float* x, int64_t slot = 0) {
        if (w.bits != 4) return x;
        float* out = &arranged[slot * (widest + widest / 8)];
        arrange(x, w.columns, out);
        return out;
    }

    // One row of weight·x + bias.
    static float row(const Linear& w, int64_t row, const float* x) {
        const char* weight = (const char*)w.weight + row * w.row_bytes;
        const bfloat16* scale = (const bfloat16*)w.scale + row * w.groups;
        float y = 0;
        if (w.bits == 4)
            y = dot_int4((const uint8_t*)weight, x, scale, w.columns, w.columns / w.groups);
        else if (w.bits == 8)
            for (int64_t group = 0, size = w.columns / w.groups; group < w.groups; group++)
                y += to_float(scale[group]) * dot((const int8*)weight + group * size, x + group * size, size);
        else
            y = dot((const T*)weight, x, w.columns);
        return w.bias ? y + to_float(((const T*)w.bias)[row]) : y;
    }

    // y = weight·x + bias, its rows shared by the threads.
    void linear(const Linear& w, const float* x, float* y) {
        x = prepare(w, x);
        share(w.rows, w.row_bytes, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) y[i] = row(w, i, x);
        });
    }

    void rms_norm(const float* x, const void* weight, int64_t n, float* out) const {
        float scale = 1 / std::sqrt(dot(x, x, n) / n + model.rms_norm_eps);
        for (int64_t i = 0; i < n; i++) out[i] = to_float(((const T*)weight)[i]) * (x[i] * scale);
    }

    // A head of q or k, normed where the model does that, and turned by its position: [D] → [D].
    void norm_and_rotate(const float* x, const void* weight, float* out) const {
        if (weight)
            rms_norm(x, weight, D, out);
        else
            std::copy(x, x + D, out);
        for (int64_t i = 0; i < D / 2; i++) {
            float a = out[i], b = out[i + D / 2], cos = shared.cos[i], sin = shared.sin[i];
            out[i] = a * cos - b * sin;
            out[i + D / 2] = b * cos + a * sin;
        }
    }

    // The G queries of one key head over a block of n positions; each key and value is read from memory once for all G.
    // partial: [G] largest scores, [G] sums of exponentials, [G, D] the values weighted by the exponentials.
    void attend(const T* keys, const T* values, int64_t n, float* partial) {
        float *largest = partial, *total = largest + G, *out = total + G;
        for (int64_t s = 0; s < n; s++)
            by_fours(G, [&](int64_t g, auto count) {
                score<T, count>(&queries[g * D], keys + s * D, D, &scores[g * BLOCK + s]);
            });
        for (int64_t g = 0; g < G; g++) {
            float* p = &scores[g * BLOCK];
            largest[g] = *std::max_element(p, p + n);
            total[g] = exponentials(p, largest[g], n);
        }
        std::fill(out, out + G * D, 0);
        by_fours(n, [&](int64_t s, auto rows) {
            by_fours(G, [&](int64_t g, auto count) {
                add_weighted<T, count, rows>(&scores[g * BLOCK + s], values + s * D, D, out + g * D);
            });
        });
    }

    float* partial(int64_t head, int64_t block) { return &shared.partial[(head * blocks + block) * G * (D + 2)]; }

    void attention(const Attention& attn, T* keys, T* values) {
        linear(attn.q_proj, normed.data(), shared.q.data());
        linear(attn.k_proj, normed.data(), shared.k.data());
        linear(attn.v_proj, normed.data(), shared.v.data());
        wait_for_all();
        share(K * blocks, 2 * BLOCK * D * sizeof(T), [&](int64_t begin, int64_t end) {
            for (int64_t work = begin; work < end; work++) {
                int64_t head = work / blocks, block = work % blocks;
                T *head_keys = keys + head * cache.max_len * D, *head_values = values + head * cache.max_len * D;
                if (block == blocks - 1) {  // the new position is in this one
                    float *k = &shared.k[head * D], *v = &shared.v[head * D];
                    norm_and_rotate(k, attn.k_norm, k);
                    for (int64_t d = 0; d < D; d++) assign(head_keys[cache.length * D + d], k[d]);
                    for (int64_t d = 0; d < D; d++) assign(head_values[cache.length * D + d], v[d]);
                }
                for (int64_t g = 0; g < G; g++)
                    norm_and_rotate(&shared.q[(head * G + g) * D], attn.q_norm, &queries[g * D]);
                for (float& q : queries) q /= std::sqrt(float(D));
                int64_t start = block * BLOCK, n = std::min(BLOCK, S - start);
                attend(head_keys + start * D, head_values + start * D, n, partial(head, block));
            }
        });
        wait_for_all();
        for (int64_t head = 0; head < K; head++)
            for (int64_t g = 0; g < G; g++) put_together(head, g, &attended[(head * G + g) * D]);
        const float* input = prepare(attn.o_proj, attended.data());
        share(attn.o_proj.rows, attn.o_proj.row_bytes, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) shared.x[i] += row(attn.o_proj, i, input);
        });
        wait_for_all();
    }

    // The softmax over all blocks from those within each.
    void put_together(int64_t head, int64_t g, float* out) {
        float largest = -INFINITY, total = 0;
        for (int64_t block = 0; block < blocks; block++) largest = std::max(largest, partial(head, block)[g]);
        std::fill(out, out + D, 0);
        for (int64_t block = 0; block < blocks; block++) {
            const float* part = partial(head, block);
            float weight = std::exp(part[g] - largest);
            total += weight * part[G + g];
            for (int64_t d = 0; d < D; d++) out[d] += weight * part[2 * G + g * D + d];
        }
        for (int64_t d = 0; d < D; d++) out[d] /= total;
    }

    void mlp(const Block& block) {
        bool sparse = block.gate.rows;
        int64_t count = sparse ? model.num_experts_per_tok : 1, width = model.widest_mlp;
        chosen[0] = 0, weights[0] = 1;
        if (sparse) route(block.gate);
        for (int64_t i = 0; i < count; i++) {
            const MLP& expert = block.experts[chosen[i]];
            const float* to_gate = prepare(expert.gate_proj, normed.data(), 0);
            const float* to_up = prepare(expert.up_proj, normed.data(), 1);
            float *gate = &shared.gate[i * width], *up = &shared.up[i * width];
            share(expert.up_proj.rows, 2 * expert.up_proj.row_bytes, [&](int64_t begin, int64_t end) {
                for (int64_t j = begin; j < end; j++) gate[j] = row(expert.gate_proj, j, to_gate);
                for (int64_t j = begin; j < end; j++) up[j] = row(expert.up_proj, j, to_up);
                silu_and_multiply(gate + begin, up + begin, end - begin);
            });
        }
        wait_for_all();
        for (int64_t i = 0; i < count; i++)
            hidden[i] = prepare(block.experts[chosen[i]].down_proj, &shared.gate[i * width], i);
        const Linear& down = block.experts[chosen[0]].down_proj;
        share(down.rows, count * down.row_bytes, [&](int64_t begin, int64_t end) {
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = begin; j < end; j++)
                    shared.x[j] += weights[i] * row(block.experts[chosen[i]].down_proj, j, hidden[i]);
        });
        wait_for_all();
    }

    // The most probable experts and their weights.
    void route(const Linear& router) {
        std::vector<float>& p = shared.router;
        linear(router, normed.data(), p.data());
        wait_for_all();
        float largest = *std::max_element(p.begin(), p.end()), total = 0, of_chosen = 0;
        for (float logit : p) total += std::exp(logit - largest);
        for (int64_t i = 0; i < model.num_experts_per_tok; i++) {
            chosen[i] = -1;
            for (int64_t e = 0; e < int64_t(p.size()); e++)
                if (std::find(chosen.begin(), chosen.begin() + i, e) == chosen.begin() + i)
                    if (chosen[i] < 0 || p[e] > p[chosen[i]]) chosen[i] = e;
            weights[i] = std::exp(p[chosen[i]] - largest) / total;
            of_chosen += weights[i];
        }
        if (model.norm_topk_prob)
            for (float& weight : weights) weight /= of_chosen;
    }

    void block(const Block& block, int64_t layer) {
        rms_norm(shared.x.data(), block.input_layernorm, model.hidden_size, normed.data());
        attention(block.self_attn, (T*)cache.keys[layer], (T*)cache.values[layer]);
        rms_norm(shared.x.data(), block.post_attention_layernorm, model.hidden_size, normed.data());
        mlp(block);
    }

    void step(T* logits) {
        for (int64_t layer = 0; layer < model.num_hidden_layers; layer++) block(model.layers[layer], layer);
        rms_norm(shared.x.data(), model.norm, model.hidden_size, normed.data());
        const float* input = prepare(model.lm_head, normed.data());
        share(model.lm_head.rows, model.lm_head.row_bytes, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) assign(logits[i], row(model.lm_head, i, input));
        });
        wait_for_all();  // here, as OpenMP would spin
    }
};

template <class T>
void step(const Qwen3& model, const KVCache& cache, int64_t id, T* logits, int threads) {
    Shared shared(model, cache.length / BLOCK + 1);
    const T* embedding = (const T*)model.embed_tokens + id * model.hidden_size;
    for (int64_t i = 0; i < model.hidden_size; i++) shared.x[i] = to_float(embedding[i]);
    for (int64_t i = 0; i < model.head_dim / 2; i++) {
        float angle = float(cache.length) * model.rope_frequencies[i];
        shared.cos[i] = std::cos(angle) * model.rope_factor;
        shared.sin[i] = std::sin(angle) * model.rope_factor;
    }
#pragma omp parallel num_threads(threads)
    Step<T>{model, cache, shared, omp_get_num_threads()}.step(logits);
}

// Rows of weights in the form that ops/quant.py stores: for the head, which a quantised checkpoint keeps as it was.
template <class T>
void quantize_rows(const T* weight, Linear w, int threads) {
    std::vector<float> ranges = {1};
    if (w.bits == 4) ranges = {0.86, 0.93, 1, 1.06, 1.13, 1.2};
    const float low = -(1 << (w.bits - 1));
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < w.rows; row++) {
        std::vector<float> x(w.columns);
        std::vector<int32_t> q(w.columns);
        for (int64_t i = 0; i < w.columns; i++) x[i] = to_float(weight[row * w.columns + i]);
        for (int64_t group = 0, size = w.columns / w.groups; group < w.groups; group++) {
            const float* part = &x[group * size];
            auto smaller = [](float a, float b) { return std::abs(a) < std::abs(b); };
            float largest = *std::max_element(part, part + size, smaller), least = INFINITY;
            bfloat16 scale, best = {};
            for (float range : ranges) {
                assign(scale, largest / (low * range));
                float error = quantize(part, size, w.bits, to_float(scale), &q[group * size]);
                if (error < least) least = error, best = scale;
            }
            quantize(part, size, w.bits, to_float(best), &q[group * size]);
            ((bfloat16*)w.scale)[row * w.groups + group] = best;
        }
        uint8_t* packed = (uint8_t*)w.weight + row * w.row_bytes;
        for (int64_t i = 0; i < w.columns; i++)
            if (w.bits == 8)
                packed[i] = q[i] + 128;
            else if (i % 2 == 0)
                packed[i / 2] = (q[i] + 8) | (q[i + 1] + 8) << 4;
    }
}

extern "C" {
void quantize_float32(const float* weight, const Linear* w, int threads) { quantize_rows(weight, *w, threads); }
void quantize_bfloat16(const bfloat16* weight, const Linear* w, int threads) { quantize_rows(weight, *w, threads); }
void step_float32(const Qwen3* model, const KVCache* cache, int64_t id, float* logits, int threads) {
    step(*model, *cache, id, logits, threads);
}
void step_bfloat16(const Qwen3* model, const KVCache* cache, int64_t id, bfloat16* logits, int threads) {
    step(*model, *cache, id, logits, threads);
}
}
