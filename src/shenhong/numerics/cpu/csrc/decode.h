// What Python tells generation: a model's layers, a model, and a batch of tokens. Field for field as in structs.py.
//
// Legend: N tokens, S sequences, K most tokens a call writes, D hidden, V vocabulary, H heads, R latent rank, n nope
// dims, r rope dims, v value dims, e = R + r, G groups of heads with one key, d width of a query, E experts.
#pragma once
#include <cstdint>

#include "sampling.h"

struct DecodeLayer {
    const float* norm;               // [D]
    const void* down;                // packed [q + row, D]; q: the queries' rank, or all queries; grouped: q, k, v
    const float* q_norm;             // [rank] or null; grouped: [d] of each head, or null, and k_norm likewise
    const void* q_b;                 // packed [H (n + r), rank] or null
    const float* kv_norm;            // [R]
    const float *k_norm, *qkv_bias;  // grouped only, or null: [d], [(H + 2G) d]
    const void *uk, *uv, *out;       // packed per head [R, n] and [v, R]; packed [D, H v]
    const float* mlp_norm;           // [D]
    const void *dense_gate_up, *dense_down;  // the dense block or the shared expert, or null; gate and up interleaved
    const float *router, *bias;              // packed [E, D] and [E], or null
    const void *gate_up, *expert_down;       // packed per expert
    void* pool;                              // [pages, page, row]; row: e, or 2Gd
    int64_t dense_inner;
};
struct DecodeModel {
    int64_t dtype, hidden, heads, rank, nope, rope, value, q_rank;
    int64_t experts, chosen, inner, groups, kept_groups, normalise;
    int64_t softmax;          // DeepSeek-V2's router: softmax gates, a group counted by its best expert
    int64_t page, key_heads;  // key_heads: G of grouped queries, 0 for latent attention
    double scaling, eps, latent_eps, scale;
    const float *cosine, *sine;  // [positions, r / 2]
    const DecodeLayer* layers;
};
struct DecodeBatch {
    int64_t threads, first_layer, last_layer, sequences, table_width;
    const int32_t* starts;     // [S + 1]: tokens of sequence s are starts[s] .. starts[s + 1] - 1
    const int32_t* positions;  // [N], consecutive within a sequence
    const int32_t* tables;     // [S, table_width] pages
    const int64_t* tokens;     // [N] or null: x begins as their embeddings
    const void* embedding;     // [V, D]
    const float* last_norm;    // [D]: x ends normed by it
    float* x;                  // [N, D] residual stream, in and out, if only states are wanted
    // To go on and write: the head, and of every sequence how much and how. No head: states.
    const void* head;               // packed [V, D]
    int64_t vocab, most;            // most: K, the largest max_new_tokens
    const int32_t* max_new_tokens;  // [S] tokens to write; 0 while the prompt goes on
    const Sampling* samplings;      // [S, K]
    const int64_t* stops;        // tokens that end sequence s: stops[stop_starts[s]] .. stops[stop_starts[s + 1] - 1]
    const int32_t* stop_starts;  // [S + 1]
    int64_t* written;            // [S, K], out: its tokens, the last perhaps a stop, or -1 where logits are not numbers
    int32_t* counts;             // [S], out: how many
};
