"""DeepSeek-V3 and DeepSeek-V2 folders between here and transformers, both ways: equal logits, equal greedy text."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV2ForCausalLM

from shenhong.engine import Engine, Sampling
from shenhong.export import load_model, save_model
from shenhong.numerics import documents
from tests.model.random_configs import (
    random_config,
    random_decoder,
    random_tokens,
    random_v2_config,
)

PROMPTS, ANSWER = 2, 12


def logits_of(decoder, tokens_BT):
    with torch.no_grad():
        hidden = decoder(tokens_BT.flatten(), documents(tokens_BT.clone(), -1))
        return decoder.logits(hidden.states_ND).view(*tokens_BT.shape, -1)


def agree(decoder, model, seed):
    """Logits within 1e-4 of the largest, and the same greedy continuations."""
    tokens_BT = random_tokens(decoder.config, seed, PROMPTS, 9)
    with torch.no_grad():
        theirs = model(tokens_BT).logits
    assert (logits_of(decoder, tokens_BT) - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    done = Engine(decoder).generate(
        tokens_BT.tolist(), ANSWER, sampling=Sampling(temperature=0), stop=()
    )
    said = model.generate(
        tokens_BT,
        attention_mask=torch.ones_like(tokens_BT),
        max_new_tokens=ANSWER,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert said[:, tokens_BT.shape[1] :].tolist() == [answer.tokens for answer in done]


@pytest.mark.parametrize("seed", range(40))
def test_a_folder_opens_there_and_comes_back(tmp_path, seed):
    v2 = seed % 3 == 2
    config = (
        random_v2_config(seed) if v2 else random_config(seed, num_nextn_predict_layers=seed % 2)
    )
    decoder = random_decoder(config, seed).eval()
    save_model(decoder, tmp_path / "ours")
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    mtp = f"model.layers.{config.num_hidden_layers}."
    assert all("shared_experts" in name for name in report["missing_keys"])
    assert all(name.startswith(mtp) for name in report["unexpected_keys"])
    agree(decoder, model.eval(), seed)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if seed % 2 else "1GB")
    agree(load_model(tmp_path / "theirs"), model, seed)
    again = save_model(load_model(tmp_path / "ours"), tmp_path / "again")
    for path in again.iterdir():
        assert path.read_bytes() == (tmp_path / "ours" / path.name).read_bytes(), path.name


def test_what_transformers_makes_of_deepseek_v2_by_itself_opens(tmp_path):
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=16.0,
        attn_implementation="eager",
    )
    model = DeepseekV2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # transformers leaves its expert matrices as memory was.
            parameter.normal_(1 if parameter.ndim == 1 else 0, 0.3)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "deepseek_v2"
    agree(load_model(tmp_path), model, 0)
