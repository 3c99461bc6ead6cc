// Where the compiler put the fields of the structs that Python fills; structs.py compares them whenever it loads us.
#include <cstddef>
#include <cstring>

#include "attention.h"
#include "common.h"
#include "decode.h"
#include "sampling.h"

struct Place {
    const char *name, *field;  // no field: the struct itself
    int64_t offset, size;
};

#define WHOLE(S) {#S, "", 0, int64_t(sizeof(S))}
#define FIELD(S, F) {#S, #F, int64_t(offsetof(S, F)), int64_t(sizeof(S::F))}

static const Place places[] = {
    WHOLE(Attention),
    FIELD(Attention, dtype),
    FIELD(Attention, threads),
    FIELD(Attention, documents),
    FIELD(Attention, tokens),
    FIELD(Attention, heads),
    FIELD(Attention, plain),
    FIELD(Attention, rope),
    FIELD(Attention, value),
    FIELD(Attention, scale),
    FIELD(Attention, starts),
    FIELD(Attention, cosine),
    FIELD(Attention, sine),
    FIELD(Attention, q),
    FIELD(Attention, k),
    FIELD(Attention, k_rope),
    FIELD(Attention, v),
    FIELD(Attention, q_token),
    FIELD(Attention, q_head),
    FIELD(Attention, k_token),
    FIELD(Attention, k_head),
    FIELD(Attention, kr_token),
    FIELD(Attention, kr_head),
    FIELD(Attention, v_token),
    FIELD(Attention, v_head),
    FIELD(Attention, o),
    FIELD(Attention, lse),
    FIELD(Attention, d_o),
    FIELD(Attention, dq),
    FIELD(Attention, dk),
    FIELD(Attention, dk_rope),
    FIELD(Attention, dv),
    FIELD(Attention, dk_token),
    FIELD(Attention, dk_head),
    FIELD(Attention, dkr_token),
    FIELD(Attention, dkr_head),
    FIELD(Attention, dv_token),
    FIELD(Attention, dv_head),
    FIELD(Attention, dk_rope_heads),
    WHOLE(DecodeLayer),
    FIELD(DecodeLayer, norm),
    FIELD(DecodeLayer, down),
    FIELD(DecodeLayer, q_norm),
    FIELD(DecodeLayer, q_b),
    FIELD(DecodeLayer, kv_norm),
    FIELD(DecodeLayer, k_norm),
    FIELD(DecodeLayer, qkv_bias),
    FIELD(DecodeLayer, uk),
    FIELD(DecodeLayer, uv),
    FIELD(DecodeLayer, out),
    FIELD(DecodeLayer, mlp_norm),
    FIELD(DecodeLayer, dense_gate_up),
    FIELD(DecodeLayer, dense_down),
    FIELD(DecodeLayer, router),
    FIELD(DecodeLayer, bias),
    FIELD(DecodeLayer, gate_up),
    FIELD(DecodeLayer, expert_down),
    FIELD(DecodeLayer, pool),
    FIELD(DecodeLayer, dense_inner),
    WHOLE(DecodeModel),
    FIELD(DecodeModel, dtype),
    FIELD(DecodeModel, hidden),
    FIELD(DecodeModel, heads),
    FIELD(DecodeModel, rank),
    FIELD(DecodeModel, nope),
    FIELD(DecodeModel, rope),
    FIELD(DecodeModel, value),
    FIELD(DecodeModel, q_rank),
    FIELD(DecodeModel, experts),
    FIELD(DecodeModel, chosen),
    FIELD(DecodeModel, inner),
    FIELD(DecodeModel, groups),
    FIELD(DecodeModel, kept_groups),
    FIELD(DecodeModel, normalise),
    FIELD(DecodeModel, softmax),
    FIELD(DecodeModel, page),
    FIELD(DecodeModel, key_heads),
    FIELD(DecodeModel, scaling),
    FIELD(DecodeModel, eps),
    FIELD(DecodeModel, latent_eps),
    FIELD(DecodeModel, scale),
    FIELD(DecodeModel, cosine),
    FIELD(DecodeModel, sine),
    FIELD(DecodeModel, layers),
    WHOLE(DecodeBatch),
    FIELD(DecodeBatch, threads),
    FIELD(DecodeBatch, first_layer),
    FIELD(DecodeBatch, last_layer),
    FIELD(DecodeBatch, sequences),
    FIELD(DecodeBatch, table_width),
    FIELD(DecodeBatch, starts),
    FIELD(DecodeBatch, positions),
    FIELD(DecodeBatch, tables),
    FIELD(DecodeBatch, tokens),
    FIELD(DecodeBatch, embedding),
    FIELD(DecodeBatch, last_norm),
    FIELD(DecodeBatch, x),
    FIELD(DecodeBatch, head),
    FIELD(DecodeBatch, vocab),
    FIELD(DecodeBatch, most),
    FIELD(DecodeBatch, max_new_tokens),
    FIELD(DecodeBatch, samplings),
    FIELD(DecodeBatch, stops),
    FIELD(DecodeBatch, stop_starts),
    FIELD(DecodeBatch, written),
    FIELD(DecodeBatch, counts),
    WHOLE(Sampling),
    FIELD(Sampling, temperature),
    FIELD(Sampling, top_p),
    FIELD(Sampling, min_p),
    FIELD(Sampling, top_k),
    FIELD(Sampling, uniform),
};

// place: offset and size in bytes. 0 where there is no such struct or field.
EXPORT int shenhong_layout(const char* name, const char* field, int64_t* place) {
    for (const Place& p : places)
        if (!std::strcmp(p.name, name) && !std::strcmp(p.field, field)) {
            place[0] = p.offset, place[1] = p.size;
            return 1;
        }
    return 0;
}
