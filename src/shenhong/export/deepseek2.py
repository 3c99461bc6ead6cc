"""The architecture "deepseek2" of GGUF: what its tensors and metadata are called, and which part of ours they are.

The tensors of "llama", "qwen2" and "qwen3" bear the same names, so `entries` serves these too (``grouped.py``).

llama.cpp decodes with latent attention absorbed, so kv_b_proj is split in two there: k_b, transposed within each head,
which takes a query to the latent, and v_b, which takes the latent to a value. All experts of a layer are one tensor.
The multi-token-prediction layer is block number num_hidden_layers, its own parts under "nextn".

Legend: H heads, R latent rank, n nope dims, v value dims, E experts, I expert width, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

from shenhong.export.huggingface import HALVES, Entry
from shenhong.model import Decoder, ModelConfig, Yarn

ARCHITECTURE = "deepseek2"
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# Within a layer; ".weight" or ".bias" follows on both sides.
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "shared_head.norm": "nextn.shared_head_norm",
}


def entries(decoder: Decoder, multitoken: bool = True, in_halves: bool = False) -> Iterator[Entry]:
    """Every tensor of the file as a view into the decoder, in the file's shape: to be written, or to be filled.

    ``exact``: kept in fp32 whatever the file's precision (norms, routers, biases). Without ``multitoken`` the
    multi-token-prediction layer is left out. ``in_halves``: the pairs that are rotated are not neighbours in the file.
    """
    config = decoder.config
    for name, tensor in decoder.state_dict().items():
        if name in _TOP:
            yield Entry(_TOP[name], tensor, exact=tensor.ndim == 1)
            continue
        number, part = name.removeprefix("model.layers.").split(".", 1)
        if int(number) == config.num_hidden_layers and not multitoken:
            continue
        stem = f"blk.{number}."
        if part == "self_attn.kv_b_proj.weight":
            kv_HeR = tensor.unflatten(0, (config.num_attention_heads, -1))
            n = config.qk_nope_head_dim
            yield Entry(stem + "attn_k_b.weight", kv_HeR[:, :n].transpose(1, 2))  # [H, R, n]
            yield Entry(stem + "attn_v_b.weight", kv_HeR[:, n:])  # [H, v, R]
        elif part == "mlp.experts.gate_up_proj":
            width = config.moe_intermediate_size
            yield Entry(stem + "ffn_gate_exps.weight", tensor[:, :width])  # [E, I, D]
            yield Entry(stem + "ffn_up_exps.weight", tensor[:, width:])
        elif part == "mlp.experts.down_proj":
            yield Entry(stem + "ffn_down_exps.weight", tensor)  # [E, D, I]
        elif part == "mlp.gate.e_score_correction_bias":
            yield Entry(stem + "exp_probs_b.bias", tensor, exact=True)
        else:
            ours, kind = part.rsplit(".", 1)
            exact = tensor.ndim == 1 or part == "mlp.gate.weight"
            halves = config.head_dim if in_halves and HALVES.search(name) else 0
            yield Entry(f"{stem}{_LAYER[ours]}.{kind}", tensor, exact=exact, halves=halves)


def metadata(config: ModelConfig, multitoken: bool = True) -> dict[str, str | int | float | bool]:
    """The shape as llama.cpp reads it. Attention counts as one key head: the latent and its rotated key."""
    multitoken = multitoken and config.num_nextn_predict_layers == 1
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    values: dict[str, str | int | float | bool] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers + multitoken,
        "feed_forward_length": config.intermediate_size,
        "leading_dense_block_count": config.first_k_dense_replace,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.q_lora_rank": config.q_lora_rank or 0,
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rope,
        "attention.value_length": latent,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": rope,
        "rope.freq_base": float(config.rope_theta),
        # Both are required, with experts or without.
        "expert_feed_forward_length": config.moe_intermediate_size or config.intermediate_size,
        "expert_shared_count": config.n_shared_experts if config.expert_layers else 0,
    }
    if config.expert_layers:
        values |= {
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_weights_scale": config.scaling_factor,
            "expert_weights_norm": config.norm_topk_prob,
            "expert_gating_func": 1 if config.scoring_func == "softmax" else 2,
        }
        if config.topk_group < config.n_group:  # otherwise no group is ever left out
            values |= {
                "expert_group_count": config.n_group,
                "expert_group_used_count": config.topk_group,
            }
    if multitoken:
        values["nextn_predict_layers"] = 1
    yarn = config.rope_scaling
    if isinstance(yarn, Yarn):
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": yarn.factor,
            "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
            # The reader divides by 0.1 again: so these files have been from the first.
            "rope.scaling.yarn_log_multiplier": 0.1 * yarn.mscale_all_dim,
        }
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}
