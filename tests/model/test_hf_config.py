"""Published configurations are read as what they are: by the number of parameters their authors name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shenhong.errors import ModelError
from shenhong.model.counts import parameters
from shenhong.model.hf_config import from_hf, model_type, to_hf

LATENT = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "ep_size": 1,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "use_cache": True,
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
DEEPSEEK_V3 = LATENT | {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "quantization_config": FP8,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
}
MOONLIGHT = KIMI_K2 | {
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
    "routed_scaling_factor": 2.446,
    "max_position_embeddings": 8192,
    "rope_scaling": None,
    "quantization_config": None,
}
V2_ROUTER = {
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
V2_LITE = (
    LATENT
    | V2_ROUTER
    | {
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    }
)
V2 = (
    LATENT
    | V2_ROUTER
    | {
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 160,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
    }
)
LLAMA_31_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "eos_token_id": [128001, 128008, 128009],
}
QWEN_25_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
}
QWEN_3_8B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
PUBLISHED = {
    "DeepSeek-V3": (DEEPSEEK_V3, 671.0e9, 0.001),
    "Kimi-K2": (KIMI_K2, 1.03e12, 0.01),
    "Moonlight-16B-A3B": (MOONLIGHT, 15.96e9, 0.001),
    "DeepSeek-V2-Lite": (V2_LITE, 15.7e9, 0.001),
    "DeepSeek-V2": (V2, 235.7e9, 0.001),
    "Llama-3.1-8B": (LLAMA_31_8B, 8_030_261_248, 0),
    "Qwen2.5-7B": (QWEN_25_7B, 7_615_616_512, 0),
    "Qwen3-8B": (QWEN_3_8B, 8_190_735_360, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read_as_what_it_is(name):
    values, size, tolerance = PUBLISHED[name]
    config = from_hf(values)
    assert abs(parameters(config).total - size) <= tolerance * size
    assert model_type(config) == values["model_type"].replace("kimi_k2", "deepseek_v3")
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    ("values", "change", "says"),
    [
        (V2, {"norm_topk_prob": True}, "norm_topk_prob is True; only False"),
        (V2, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; only 'softmax'"),
        (V2, {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1"),
        (V2, {"topk_method": "noaux_tc"}, "does not go with topk_method noaux_tc"),
        (DEEPSEEK_V3, {"rope_scaling": LLAMA_31_8B["rope_scaling"]}, "no other rope scaling"),
        (DEEPSEEK_V3, {"quantization_config": FP8 | {"weight_block_size": [1, 32]}}, "128"),
        (DEEPSEEK_V3, {"max_position_embeddings": 2**22 + 1}, "max_position_embeddings"),
        (LLAMA_31_8B, {"mlp_bias": True}, "mlp_bias is True; only False"),
        (LLAMA_31_8B, {"num_key_value_heads": 5}, "must divide num_attention_heads"),
        (LLAMA_31_8B, {"head_dim": 7}, "head_dim is 7"),
        (QWEN_25_7B, {"use_sliding_window": True}, "a sliding window is not computed"),
        (QWEN_3_8B, {"layer_types": ["sliding_attention"] * 36}, "only full_attention"),
        (
            QWEN_3_8B,
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic'",
        ),
        (QWEN_3_8B, {"model_type": "qwen3_moe"}, "those that open here are deepseek_v3"),
    ],
)
def test_what_is_computed_otherwise_is_refused_with_the_reason(values, change, says):
    with pytest.raises(ModelError) as error:
        from_hf(values | change, "config.json")
    assert says in str(error.value) and str(error.value).startswith("config.json: ")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(st.sampled_from(sorted(PUBLISHED)), st.data())
def test_whatever_a_file_of_any_type_says_it_is_read_or_refused_in_one_line(name, data):
    values = PUBLISHED[name][0]
    field = data.draw(st.sampled_from([*values, "layer_types", "head_dim", "rope_parameters"]))
    try:
        from_hf(values | {field: data.draw(anything)}, "c.json")
    except ModelError as error:
        assert str(error).startswith("c.json: ") and len(str(error).splitlines()) == 1


def test_plain_yarn_has_the_temperature_of_its_paper():
    """Qwen's files give a factor and a length and nothing of DeepSeek's two scales."""
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    scaling = from_hf(QWEN_25_7B | {"rope_scaling": rope}).rope_scaling
    assert (scaling.mscale, scaling.mscale_all_dim) == (0.0, 0.0)
