// Attention over the pages of a cache, and the description of a model that it and decode.cpp share.
//
// Legend: N tokens, S sequences, D hidden, H heads, R latent rank, n nope dims, r rope dims, v value dims, e = R + r,
// G groups of heads with one key (latent attention: 1), J heads of a group, d width of a query, E experts.
#pragma once
#include "panels.h"

constexpr int KEYS = 8, LANES = 4;  // register tiles of attention: keys of a score tile, columns of an output tile

// Field for field as in fused_decode.py.
struct DecodeLayer {
    const float* norm;            // [D]
    const void* down;             // packed [q + row, D]; q: the queries' rank, or all queries; grouped: q, k, v
    const float* q_norm;          // [rank] or null; grouped: [d] of each head, or null, and k_norm likewise
    const void* q_b;              // packed [H (n + r), rank] or null
    const float* kv_norm;         // [R]
    const float *k_norm, *qkv_bias;  // grouped only, or null: [d], [(H + 2G) d]
    const void *uk, *uv, *out;    // packed per head [R, n] and [v, R]; packed [D, H v]
    const float* mlp_norm;        // [D]
    const void *dense_gate_up, *dense_down;  // the dense block or the shared expert, or null; gate and up interleaved
    const float *router, *bias;   // packed [E, D] and [E], or null
    const void *gate_up, *expert_down;  // packed per expert
    void* pool;                   // [pages, page, row]; row: e, or 2Gd
    int64_t dense_inner;
};
struct DecodeModel {
    int64_t dtype, hidden, heads, rank, nope, rope, value, q_rank;
    int64_t experts, chosen, inner, groups, kept_groups, normalise;
    int64_t softmax;              // DeepSeek-V2's router: softmax gates, a group counted by its best expert
    int64_t page, key_heads;      // key_heads: G of grouped queries, 0 for latent attention
    double scaling, eps, latent_eps, scale;
    const float *cosine, *sine;   // [positions, r / 2]
    const DecodeLayer* layers;
};
struct DecodeBatch {
    int64_t threads, first_layer, last_layer, sequences, table_width;
    const int32_t* starts;        // [S + 1]: tokens of sequence s are starts[s] .. starts[s + 1] - 1
    const int32_t* positions;     // [N], consecutive within a sequence
    const int32_t* tables;        // [S, table_width] pages
    const int64_t* tokens;        // [N] or null: x begins as their embeddings
    const void* embedding;        // [V, D]
    const float* last_norm;       // [D]: x ends normed by it
    float* x;                     // [N, D] residual stream, in and out
};

template <int M, class T>
static inline void weigh(int64_t keys, const float* share, const T* rows, int64_t stride, vf (&acc)[LANES][NV]) {
    vf sums[M][NV];
    for (int m = 0; m < M; m++)
        for (int i = 0; i < NV; i++) sums[m][i] = acc[m][i];
    for (int64_t k = 0; k < keys; k++) {
        vf row[NV];
        for (int i = 0; i < NV; i++) row[i] = load(rows + k * stride + i * W);
        for (int m = 0; m < M; m++) {
            const vf left = splat(share[k * W + m]);
            for (int i = 0; i < NV; i++) sums[m][i] += left * row[i];
        }
    }
    for (int m = 0; m < M; m++)
        for (int i = 0; i < NV; i++) acc[m][i] = sums[m][i];
}

// Attention of up to W columns (token t, head h of a group: column t J + h) of one sequence over its pages, a lane a
// column. In a cache row the group's key has its first e numbers, its value those from value_at on.
template <class T> struct Columns {
    const DecodeModel& m;
    const T* pool;                // of the group: rows begin with its key
    const int32_t* table;
    const int64_t e, row, values, value_at;
    std::vector<float> query, scores, page;

    Columns(const DecodeModel& m)
        : m(m), pool(nullptr), table(nullptr), e(m.rank + m.rope), row(m.key_heads ? 2 * m.key_heads * m.value : e),
          values(m.key_heads ? m.value : m.rank), value_at(m.key_heads ? m.value : 0) {
        query.resize(e * W), page.resize(m.page * e);
    }

    const T* rows(int64_t number) const { return pool + int64_t(table[number]) * m.page * row; }
    // Keys as floats, and how far apart they are.
    std::pair<const float*, int64_t> floats(const float* in, int64_t) { return {in, row}; }
    std::pair<const float*, int64_t> floats(const bf16* in, int64_t keys) {
        for (int64_t k = 0; k < keys; k++)
            for (int64_t i = 0; i < e; i += W)
                store_up_to(&page[k * e + i], load_up_to(in + k * row + i, e - i), e - i);
        return {page.data(), e};
    }

    // queries(j): column j's [e]; out(j): where its values go; length[j]: keys it sees.
    template <class Q, class O> void run(int columns, const int32_t* length, Q queries, O out) {
        vi seen;
        int64_t longest = 0, shortest = length[0];
        for (int j = 0; j < W; j++) {
            seen[j] = j < columns ? length[j] : length[0];
            longest = std::max<int64_t>(longest, seen[j]), shortest = std::min<int64_t>(shortest, seen[j]);
            if (j < columns) {
                const float* in = queries(j);
                for (int64_t i = 0; i < e; i++) query[i * W + j] = in[i] * float(m.scale);
            } else {
                for (int64_t i = 0; i < e; i++) query[i * W + j] = 0;
            }
        }
        if (int64_t(scores.size()) < longest * W) scores.resize(longest * W * 3 / 2);
        vf top = splat(-INFINITY);
        for (int64_t s0 = 0; s0 < longest; s0 += m.page) {
            const int64_t keys = std::min(m.page, longest - s0);
            const auto [key, apart] = floats(rows(s0 / m.page), keys);
            for (int64_t k = 0; k < keys; k += KEYS) {
                const int64_t some = std::min<int64_t>(KEYS, keys - k);
                vf acc[KEYS];
                if (some == KEYS)
                    score<KEYS>(key + k * apart, apart, acc);
                else
                    for (int64_t i = 0; i < some; i++) score<1>(key + (k + i) * apart, apart, acc + i);
                for (int64_t i = 0; i < some; i++) {
                    if (s0 + k + i >= shortest) acc[i] = seen > int32_t(s0 + k + i) ? acc[i] : splat(-INFINITY);
                    top = max(top, acc[i]);
                    store(&scores[(s0 + k + i) * W], acc[i]);
                }
            }
        }
        vf total{};
        for (int64_t s = 0; s < longest; s++) {
            vf share = exp(load(&scores[s * W]) - top);
            if (s >= shortest) share = seen > int32_t(s) ? share : vf{};
            total += share;
            store(&scores[s * W], share);
        }
        const vf inverse = 1.f / total;
        for (int j = 0; j < columns; j += LANES)
            for (int64_t i = 0; i < values; i += NB) {
                const int some = std::min(LANES, columns - j);
                vf acc[LANES][NV] = {};
                for (int64_t s0 = 0; s0 < longest; s0 += m.page) {
                    const int64_t keys = std::min(m.page, longest - s0);
                    const T* value = rows(s0 / m.page) + value_at + i;
                    const float* share = &scores[s0 * W + j];
                    switch (some) {
                        case 1: weigh<1>(keys, share, value, row, acc); break;
                        case 2: weigh<2>(keys, share, value, row, acc); break;
                        case 3: weigh<3>(keys, share, value, row, acc); break;
                        case 4: weigh<4>(keys, share, value, row, acc); break;
                    }
                }
                for (int x = 0; x < some; x++) {
                    for (int y = 0; y < NV; y++) acc[x][y] *= inverse[j + x];
                    put<false>(out(j + x) + i, acc[x], values - i);
                }
            }
    }

    template <int M> void score(const float* key, int64_t apart, vf* acc) const {
        vf sums[M];
        for (int i = 0; i < M; i++) sums[i] = vf{};
        for (int64_t d = 0; d < e; d++) {
            const vf q = load(&query[d * W]);
            for (int i = 0; i < M; i++) sums[i] += splat(key[i * apart + d]) * q;
        }
        for (int i = 0; i < M; i++) acc[i] = sums[i];
    }
};
