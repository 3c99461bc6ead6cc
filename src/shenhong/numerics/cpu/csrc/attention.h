// What Python tells attention: sizes, strides and addresses of one call. Field for field as in structs.py.
#pragma once
#include <cstdint>

struct Attention {
    int64_t dtype, threads, documents, tokens, heads, plain, rope, value;
    double scale;
    const int32_t* starts;           // [documents + 1]
    const float *cosine, *sine;      // [T_max, rope / 2]
    const void *q, *k, *k_rope, *v;  // strides below, in elements; innermost 1
    int64_t q_token, q_head, k_token, k_head, kr_token, kr_head, v_token, v_head;
    void* o;                       // [tokens, heads, value]
    float* lse;                    // [tokens, heads]
    const void* d_o;               // [tokens, heads, value]
    void *dq, *dk, *dk_rope, *dv;  // dq [tokens, heads, d]; dk_rope [tokens, rope] if shared
    int64_t dk_token, dk_head, dkr_token, dkr_head, dv_token, dv_head;
    float* dk_rope_heads;  // [tokens, heads, rope] scratch if k_rope is shared
};
