"""What the verdicts say of each engine's documented requirements; the engines that can run here have tests of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shenhong.cli.main import main
from shenhong.export import save_gguf
from shenhong.export.verdicts import (
    ENGINES,
    LLAMA_CPP,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    verdict,
    verdicts,
)
from shenhong.model import ModelConfig, Yarn
from shenhong.model.config import Llama3Rope
from shenhong.recipe import load
from tests.export.folders import small_config, small_folder

CLUSTER = Path(__file__).parents[2] / "recipes" / "cluster.toml"
LLAMA = {
    "attention": "gqa",
    "num_key_value_heads": 2,
    "head_dim": 64,
    "first_k_dense_replace": 2,
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_the_cluster_recipe_opens_everywhere_with_no_reserve():
    config = _of_recipe()
    assert config.kv_lora_rank + config.qk_rope_head_dim == 320
    said = verdicts(config)
    assert [one.engine for one in said] == list(ENGINES)
    assert all(one.opens for one in said)
    assert [one.reasons for one in said if one.engine != TRANSFORMERS] == [[], [], []]


def _of_recipe() -> ModelConfig:
    recipe = load(CLUSTER, [])
    return ModelConfig(vocab_size=recipe.tokenizer.vocab_size, **recipe.model.model_dump())


@pytest.mark.parametrize(
    ("engine", "changes", "opens", "words"),
    [
        (VLLM, {"kv_lora_rank": 96, "qk_rope_head_dim": 32}, False, "here 96 + 32"),
        (SGLANG, {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, True, None),
        (SGLANG, {"n_routed_experts": 24}, True, "here 24 in 1"),
        (SGLANG, {"n_routed_experts": 64}, True, "at most 32 in a group"),
        (VLLM, {"n_group": 4, "topk_group": 4}, False, "topk_group < n_group"),
        (TRANSFORMERS, {}, True, "number 61"),
        (TRANSFORMERS, {"num_nextn_predict_layers": 0}, True, None),
        (TRANSFORMERS, {"attention": "mha"}, False, "no config.json"),
        (LLAMA_CPP, {"num_hidden_layers": 26}, False, "q_lora_rank"),
        (LLAMA_CPP, {"num_hidden_layers": 26, "q_lora_rank": None}, True, None),
        (LLAMA_CPP, {"n_shared_experts": 0}, False, "shared expert"),
        (LLAMA_CPP, {"rope_scaling": Yarn(4.0, 64, beta_fast=16.0)}, False, "YaRN"),
        (LLAMA_CPP, {"rope_scaling": Yarn(4.0, 64)}, True, None),
        (LLAMA_CPP, {"rms_norm_eps": 1e-5}, True, "differ a little"),
    ],
)
def test_each_requirement_is_told_by_what_breaks_it(engine, changes, opens, words):
    values = load(CLUSTER, []).model.model_dump() | {"vocab_size": 8192, "qk_rope_head_dim": 64}
    said = verdict(engine, ModelConfig(**(values | changes)))
    assert said.opens == opens
    if words is None:
        assert not said.reasons
    else:
        assert len(said.reasons) == 1 and words in said.reasons[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"qk_norm": True, "rope_scaling": Yarn(4.0, 64, mscale=0.0, mscale_all_dim=0.0)}, None),
        ({"rope_scaling": Yarn(4.0, 64)}, "mscale"),
        ({"rope_scaling": Yarn(4.0, 64, mscale=0.0, attention_factor=1.2)}, "attention_factor"),
        ({"rope_scaling": Llama3Rope(8.0, 64, 1.0, 4.0)}, None),
        ({"rope_scaling": Llama3Rope(8.0, 64, 1.0, 4.0), "qk_norm": True}, "in llama alone"),
        ({"qkv_bias": True}, "here 4 of 64 in 64"),
        ({"qkv_bias": True, "head_dim": 16}, None),
    ],
)
def test_grouped_queries_in_llama_cpp(changes, words):
    said = verdict(LLAMA_CPP, ModelConfig(**(LLAMA | changes)))
    assert said.opens == (words is None)
    assert words is None or words in said.reasons[0]


def test_the_heads_of_a_llama_are_judged():
    config = ModelConfig(**LLAMA)
    assert verdict(VLLM, config).opens and not verdict(VLLM, config).reasons
    odd = verdict(VLLM, ModelConfig(**(LLAMA | {"head_dim": 24})))
    assert odd.opens and "here 24" in odd.reasons[0]


def test_info_says_all_of_it(tmp_path, capsys):
    config = small_config(1, num_hidden_layers=2, n_routed_experts=4, num_nextn_predict_layers=1)
    folder, _ = small_folder(tmp_path / "m", config)
    assert main(["info", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["stored as"] == "F32 100.0%"
    assert said["in vLLM"].startswith("refuses it") and "not run here" in said["in vLLM"]
    assert "not run here" in said["in SGLang"]
    assert said["in llama.cpp"].startswith("opens it")
    assert {"parameters", "active parameters", "cache bytes per token (bfloat16)"} <= set(said)
    file = save_gguf(folder, tmp_path / "m.gguf", 4).path
    assert main(["info", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["stored as"].startswith("Q") and "in vLLM" not in said
