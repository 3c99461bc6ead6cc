"""Rotary tables against transformers' own, for every extension that opens here."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig, LlamaForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shenhong.export import load_model, save_model
from shenhong.model.config import Yarn
from shenhong.model.hf_config import from_hf, to_hf
from shenhong.model.rope import rope_tables
from tests.export.test_grouped_queries import close, logits_of

LENGTH = {"original_max_position_embeddings": 32}
YARNS = [
    {"factor": 4.0},
    {"factor": 1.0},
    {"factor": 4.0, "attention_factor": 1.37},
    {"factor": 4.0, "attention_factor": 0.5, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"factor": 4.0, "attention_factor": None, "truncate": False},
    {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    {"factor": 8.0, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": True},
    {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"factor": 4.0, "mscale": 1.3, "mscale_all_dim": 0.6},
    {"factor": 4.0, "mscale": 0.7},
    {"factor": 4.0, "mscale_all_dim": 0.7},
    {"factor": 4.0, "attn_factor": 1.5},
]
OTHERS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | LENGTH,
]
ROPES = [*({"rope_type": "yarn"} | LENGTH | yarn for yarn in YARNS), *OTHERS]
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 32,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 0,
}


def shape(rope: dict, **more) -> dict:
    return {
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_theta": 10000.0} | rope,
        "attn_implementation": "eager",
    } | more


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_the_tables_are_those_of_transformers(rope):
    config = LlamaConfig(**shape(rope))
    made = from_hf({"model_type": "llama"} | shape(rope))
    places = torch.arange(256)[None]
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), places)
    for ours, wanted in zip(rope_tables(made), theirs, strict=True):
        assert (ours - wanted[0, :, :16]).abs().max() <= 1e-6
    assert from_hf(to_hf(made)) == made
    if rope["rope_type"] != "yarn":
        return
    latent = DeepseekV3Config(**shape(rope, **LATENT))
    made = from_hf({"model_type": "deepseek_v3"} | shape(rope, **LATENT))
    theirs = DeepseekV3RotaryEmbedding(latent)(torch.zeros(1), places)
    for ours, wanted in zip(rope_tables(made), theirs, strict=True):
        assert (ours - wanted[0, :, :16]).abs().max() <= 1e-6


@pytest.mark.parametrize("rope", [ROPES[3], ROPES[4], ROPES[8]], ids=str)
def test_logits_are_those_of_transformers(rope, tmp_path):
    """The scale of attention too: DeepSeek's mscale_all_dim is for latent attention alone."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape(rope))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
        model.model.embed_tokens.weight.mul_(8)
        model.save_pretrained(tmp_path)
        tokens_BT = torch.randint(50, (2, 200))
        wanted = model(tokens_BT).logits
    decoder = load_model(tmp_path)
    close(logits_of(decoder, tokens_BT), wanted)
    again = load_model(save_model(decoder, tmp_path / "again"))
    assert again.config == decoder.config


def test_attn_factor_is_left_out_aloud(caplog):
    with caplog.at_level(logging.WARNING, "shenhong.model"):
        made = from_hf({"model_type": "llama"} | shape(ROPES[11]))
    assert made.rope_scaling == Yarn(4.0, 32, mscale=0.0, mscale_all_dim=0.0)
    assert "attn_factor is not read" in caplog.text
