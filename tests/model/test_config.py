"""Impossible shapes are refused with the field's name; costs are counted right."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from shenhong.errors import ModelError
from shenhong.model import Decoder, ModelConfig, Yarn
from shenhong.model.config import auto_scaling_factor
from shenhong.model.counts import cache_numbers, forward_flops, parameters
from shenhong.model.hf_config import from_hf, read_config, to_hf
from shenhong.numerics import documents, kernels_in_use, use_kernels
from tests.model.random_configs import random_config, random_decoder, random_tokens


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"num_experts_per_tok": 9, "n_routed_experts": 8, "n_group": 1, "topk_group": 1},
            "per_tok",
        ),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"n_routed_experts": 8, "n_group": 3}, "n_group"),
        ({"n_routed_experts": 8, "n_group": 8, "num_experts_per_tok": 2}, "at least 2 experts"),
        ({"n_routed_experts": 8, "n_group": 2, "topk_group": 3}, "topk_group"),
        (
            {"n_routed_experts": 8, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
            "raise topk_group",
        ),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 16.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"routed_scaling_factor": "big"}, "routed_scaling_factor"),
        ({"attention": "gqa"}, "num_key_value_heads"),
        ({"attention": "other"}, "mla"),
        ({"head_dim": 8}, "head_dim"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"scoring_func": "softmax"}, "noaux_tc"),
        ({"topk_method": "greedy"}, "sigmoid with noaux_tc"),
        ({"scoring_func": "softmax", "topk_method": "greedy"}, "norm_topk_prob"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"n_shared_experts": -1}, "n_shared_experts"),
        ({"eos_token_id": 5000}, "eos_token_id"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
    ],
)
def test_impossible_shapes_are_refused(change, words):
    with pytest.raises(ModelError, match=words):
        random_config(0, **({"first_k_dense_replace": 0} | change))


def test_impossible_yarn_is_refused():
    for values in ({"factor": 0.5}, {"beta_fast": 1.0}, {"original_max_position_embeddings": 0}):
        with pytest.raises(ModelError):
            Yarn(**({"factor": 2.0, "original_max_position_embeddings": 16} | values))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"routed_scaling_factor": "2,5"}, "routed_scaling_factor is '2,5'; expected float"),
        ({"routed_scaling_factor": "auto"}, "routed_scaling_factor is 'auto'; expected float"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'; expected float"),
        ({"rope_parameters": "yarn"}, "rope_parameters is 'yarn'; expected an object"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": "4",
                    "original_max_position_embeddings": 16,
                }
            },
            "factor is '4'; expected float",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope type yarn needs original_max",
        ),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"eos_token_id": []}, "eos_token_id is []; expected int"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected float"),
    ],
)
def test_a_config_file_with_a_wrong_value_is_refused_by_file_and_field(change, says, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_hf(random_config(0)) | change))
    with pytest.raises(ModelError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: ") and says in str(error.value)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
HF = to_hf(random_config(0))
ROPE = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "mscale")


@given(st.sampled_from(sorted(HF)), anything | st.dictionaries(st.sampled_from(ROPE), anything))
def test_whatever_a_config_file_says_it_is_read_or_refused_in_one_line(name, value):
    try:
        from_hf(HF | {name: value}, "c.json")
    except ModelError as error:
        assert str(error).startswith("c.json: ") and len(str(error).splitlines()) == 1


def test_a_number_that_no_float_holds_is_refused(tmp_path):
    path = tmp_path / "config.json"
    for digits in (400, 5000):
        text = json.dumps(HF | {"routed_scaling_factor": 0})
        path.write_text(text.replace('factor": 0', 'factor": ' + "9" * digits))
        with pytest.raises(ModelError, match=r"is 9+; expected|not JSON"):
            read_config(path)


def test_a_dense_model_needs_no_expert_settings():
    config = random_config(
        0,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        n_routed_experts=0,
        num_experts_per_tok=0,
        num_nextn_predict_layers=1,
    )
    assert not Decoder(config).routers


@given(st.integers(1, 8), st.integers(8, 64))
@settings(max_examples=15, deadline=None)
def test_auto_scaling_gives_the_mixture_the_size_of_one_expert(chosen, experts):
    factor = auto_scaling_factor(chosen, experts)
    gates = torch.randn(4096, experts, generator=torch.Generator().manual_seed(1)).sigmoid()
    share = gates.topk(chosen, dim=1).values
    share = share / share.sum(dim=1, keepdim=True)
    # Independent unit-variance outputs of the experts, mixed.
    size = (factor * share).norm(dim=1).mean()
    assert abs(size - 1) < 0.02
    assert 1 <= factor <= chosen**0.5 + 0.01


@pytest.mark.parametrize("attention", ["mla", "mha"])
@pytest.mark.parametrize("seed", range(12))
def test_parameters_are_counted_right(seed, attention):
    config = random_config(seed, num_nextn_predict_layers=seed % 2, attention=attention)
    decoder = Decoder(config)
    mtp = f"layers.{config.num_hidden_layers}."
    numbers = {name: p.numel() for name, p in decoder.named_parameters()}
    counted = parameters(config)
    assert counted.multitoken == sum(n for name, n in numbers.items() if mtp in name)
    assert counted.total == sum(numbers.values()) - counted.multitoken
    routed = sum(n for name, n in numbers.items() if ".experts." in name and mtp not in name)
    idle = 0
    if routed:
        idle = routed - routed * config.num_experts_per_tok // config.n_routed_experts
    assert counted.active == counted.total - idle
    assert counted.embeddings == config.vocab_size * config.hidden_size * (
        1 if config.tie_word_embeddings else 2
    )
    assert counted.total_without_embeddings == counted.total - counted.embeddings


@pytest.mark.parametrize("attention", ["mla", "mha"])
@pytest.mark.parametrize("seed", range(4))
def test_flops_are_those_of_the_products_run(seed, attention):
    """Against torch's counter on the reference path. Attention there multiplies whole squares, so one document of T
    tokens has a mean context of T."""
    config = random_config(seed, num_nextn_predict_layers=1, attention=attention)
    decoder, T = random_decoder(config, seed), 16
    tokens_BT = random_tokens(config, seed, 1, T)
    docs = documents(tokens_BT, -1)
    before = kernels_in_use()
    use_kernels(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            hidden = decoder(tokens_BT.flatten(), docs)
            decoder.logits(hidden.states_ND)
            trunk = counter.get_total_flops()
            draft = decoder.draft(hidden.states_ND, tokens_BT.flatten(), docs)
            decoder.logits(draft.states_ND)
            both = counter.get_total_flops()
    finally:
        use_kernels(before)
    assert forward_flops(config, T) * T == trunk
    assert forward_flops(config, T, multitoken=True) * T == both


def test_cache_numbers_of_deepseek_v3():
    """70,272 bytes a token in bf16 over 61 layers, against 3,997,696 for multi-head attention (V2, table 1)."""
    v3 = ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
    )
    # The published 3,997,696 counts 128-wide keys: without RoPE dims.
    assert cache_numbers(v3).kept * 61 * 2 == 70_272
    assert (cache_numbers(v3).mha - 128 * 64) * 61 * 2 == 3_997_696
    counted = parameters(v3)
    assert round(counted.total / 1e9) == 671
    assert round(counted.active / 1e9, 1) == 37.6
