"""The GGUF file in llama.cpp itself: what it says, and what it makes of text. Skipped where it is not installed.

The same comparison on a trained model, with perplexity on held-out poems, is benchmarks/llama_cpp_parity.py.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
import torch

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: GGUF files are not run")

from benchmarks.llama_cpp_parity import (
    first_gaps,
    measure,
    open_llama,
    our_logits,
    perplexity,
    their_greedy,
    their_logits,
    tokenized_otherwise,
)

from shenhong.engine import Engine, Sampling
from shenhong.export import load_model, save_gguf
from shenhong.model import Yarn
from shenhong.tokenizer import Tokenizer
from tests.export.families import FAMILIES, family
from tests.export.folders import small_config, small_folder, small_tokenizer
from tests.export.test_source import ROPES, YARN
from tests.model.random_configs import random_tokens

SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
MTP = {"num_nextn_predict_layers": 1, "first_k_dense_replace": 0}
GROUPS = {"n_group": 4, "topk_group": 2, "n_routed_experts": 8, "num_experts_per_tok": 3}
SHAPES = {
    "experts and MTP": MTP | {"q_lora_rank": 32},
    "no query rank": MTP | {"q_lora_rank": None},
    "groups": GROUPS | {"first_k_dense_replace": 0},
    "all groups": GROUPS | {"topk_group": 4, "first_k_dense_replace": 0},
    "DeepSeek-V2's router": SOFTMAX | {"first_k_dense_replace": 0},
    "dense": {"num_hidden_layers": 2, "first_k_dense_replace": 2},
    "dense first layer": {"num_hidden_layers": 2, "first_k_dense_replace": 1},
    "YaRN": {"rope_scaling": Yarn(8.0, 16, mscale=0.7, mscale_all_dim=0.7), "qk_rope_head_dim": 8},
    "two shared experts, tied": {"n_shared_experts": 2, "tie_word_embeddings": True} | MTP,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = small_config(
        7, **SHAPES["experts and MTP"], num_hidden_layers=2, num_attention_heads=4
    )
    return small_folder(tmp_path_factory.mktemp("llama") / "model", config)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("multitoken", [True, False])
def test_logits_are_equal(tmp_path, name, multitoken):
    config = small_config(len(name), **SHAPES[name])
    folder, decoder = small_folder(tmp_path / "m", config)
    llama = open_llama(save_gguf(folder, tmp_path / "m.gguf", 32, multitoken=multitoken).path)
    tokens = random_tokens(config, 1, 40).tolist()
    ours, theirs = our_logits(decoder, tokens), torch.from_numpy(their_logits(llama, tokens))
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()


@pytest.mark.parametrize(("kind", "rope"), [(k, r) for k in ROPES for r in ROPES[k]])
def test_logits_of_grouped_queries_are_equal(kind, rope, tmp_path):
    yarn = YARN if rope and rope["rope_type"] == "yarn" else {}
    family(kind, tmp_path / "m", **({"rope_parameters": rope | yarn} if rope else {}))
    llama = open_llama(save_gguf(tmp_path / "m", tmp_path / "m.gguf", 32).path)
    decoder = load_model(tmp_path / "m")
    tokens = random_tokens(decoder.config, 1, 100).tolist()
    ours, theirs = our_logits(decoder, tokens), torch.from_numpy(their_logits(llama, tokens))
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()


@pytest.mark.parametrize("kind", FAMILIES)
def test_their_tokens_are_those_of_the_folder(kind, tmp_path):
    family(kind, tmp_path / "m")
    path = save_gguf(tmp_path / "m", tmp_path / "m.gguf", 32).path
    other = tokenized_otherwise(path, Tokenizer.load(tmp_path / "m"), 1000)
    # llama.cpp composes no characters, in Qwen's own files neither.
    assert not [text for text in other if unicodedata.is_normalized("NFC", text)]
    assert kind != "llama" or not other


def test_the_multi_token_layer_is_loaded_when_asked_for(tmp_path, model):
    folder, decoder = model
    path = save_gguf(folder, tmp_path / "m.gguf", 32).path
    llama = open_llama(path, load_mtp=True)
    assert llama.metadata["deepseek2.nextn_predict_layers"] == "1"
    tokens = random_tokens(decoder.config, 1, 20).tolist()
    ours, theirs = our_logits(decoder, tokens), torch.from_numpy(their_logits(llama, tokens))
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()


def test_greedy_texts_are_equal_at_16_bits(tmp_path, model):
    folder, decoder = model
    path = save_gguf(folder, tmp_path / "m.gguf", 16).path
    engine, llama = Engine(decoder, small_tokenizer()), open_llama(path)
    prompts = random_tokens(decoder.config, 2, 50, 7).tolist()
    done = engine.generate(prompts, 20, sampling=Sampling(temperature=0), seed=0)
    ours = [[token for token in one.tokens if token != 1] for one in done]
    theirs = [their_greedy(llama, prompt, 20, 1) for prompt in prompts]
    gaps = first_gaps(decoder, prompts, ours, theirs)
    # Random weights are more sensitive to 16 bits than trained ones, where 1e-3 is the measure.
    assert len(gaps) <= 5 and max(gaps, default=0) < 0.02, gaps


def test_tokens_are_equal(tmp_path, model):
    path = save_gguf(model[0], tmp_path / "m.gguf", 16).path
    assert tokenized_otherwise(path, small_tokenizer(), 5000) == []


def test_perplexity_hardly_changes(tmp_path, model):
    """On the model's own texts; random weights bear rounding worse than trained ones."""
    folder, decoder = model
    prompts = random_tokens(decoder.config, 3, 20, 3).tolist()
    engine = Engine(decoder, small_tokenizer())
    texts = [list(one.tokens) for one in engine.generate(prompts, 40, sampling=Sampling(), seed=0)]
    full = perplexity(lambda tokens: our_logits(decoder, tokens), prompts, texts)
    for bits, most in ((16, 0.001), (8, 0.03), (4, 0.5)):
        llama = open_llama(save_gguf(folder, tmp_path / "m.gguf", bits).path)
        there = perplexity(lambda tokens, on=llama: their_logits(on, tokens), prompts, texts)
        assert abs(there / full - 1) < most, bits


@pytest.mark.skipif("SHENHONG_RUN" not in os.environ, reason="SHENHONG_RUN names no finished run")
def test_a_trained_model(capsys):
    """50 held-out prompts and poems, 5,000 strings."""
    seen = measure(Path(os.environ["SHENHONG_RUN"]))
    files = {row["file"]: row for row in seen["files"]}
    for name in ("32 bits", "16 bits", "16 bits no MTP"):
        assert files[name]["largest_gap"] <= 1e-3, files[name]
    assert abs(files["8 bits"]["change_percent"]) < 0.2
    assert abs(files["4 bits"]["change_percent"]) < 5
    assert not seen["other_tokens"]


def test_a_chat_is_asked_through_the_files_own_template(tmp_path, model):
    folder, decoder = model
    llama = open_llama(save_gguf(folder, tmp_path / "m.gguf", 32).path)
    asked = [{"role": "user", "content": "春眠 quick 13"}]
    said = llama.create_chat_completion(asked, temperature=0, max_tokens=12, repeat_penalty=1.0)
    prompt = small_tokenizer().encode_prompt("春眠 quick 13")
    assert said["usage"]["prompt_tokens"] == len(prompt)
    done = Engine(decoder, small_tokenizer()).generate(
        [prompt], 12, sampling=Sampling(temperature=0)
    )
    ours = small_tokenizer().decode(done[0].tokens)
    theirs = said["choices"][0]["message"]["content"]
    assert theirs.replace("\ufffd", "") == ours.replace("\ufffd", "")
