"""Llama, Qwen2 and Qwen3 folders as transformers writes them: the same logits and the same greedy text, both ways."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shenhong.engine import Engine, EngineSettings, Sampling, request_seed
from shenhong.export import load_model, save_model
from shenhong.model.counts import forward_flops, parameters
from shenhong.numerics import documents, kernels_in_use, use_kernels

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
]


def theirs(seed):
    """A tiny random model of one of the three kinds, weights large enough to matter."""
    pick = random.Random(seed)
    kind = list(KINDS)[seed % 3]
    configuration, model = KINDS[kind]
    groups = pick.choice([1, 2, 3])
    heads = groups * pick.choice([1, 2, 4])
    width = pick.choice([4, 8, 16, 20])
    # Qwen2 knows no width of a head but this one.
    wide = (
        {"hidden_size": heads * width}
        if kind == "qwen2"
        else {"hidden_size": 24, "head_dim": width}
    )
    config = configuration(
        vocab_size=pick.choice([50, 97]),
        **wide,
        intermediate_size=pick.choice([20, 48]),
        num_hidden_layers=pick.choice([1, 2, 3]),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=64,
        rms_norm_eps=pick.choice([1e-6, 1e-5]),
        tie_word_embeddings=pick.random() < 0.5,
        rope_parameters={"rope_theta": pick.choice([100.0, 10000.0]), **ROPES[seed // 3 % 4]},
        eos_token_id=1,
        pad_token_id=0,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    made = model(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif parameter.ndim == 1:
                parameter.normal_(1, 0.3)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
        made.model.embed_tokens.weight.mul_(3 * config.hidden_size**0.5)
    return kind, made


def logits_of(decoder, tokens_BT):
    with torch.no_grad():
        hidden = decoder(tokens_BT.flatten(), documents(tokens_BT.clone(), -1))
        return decoder.logits(hidden.states_ND).view(*tokens_BT.shape, -1)


def close(ours, reference):
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


@pytest.mark.parametrize("seed", range(12))
def test_their_folder_gives_the_same_logits_and_text(seed, tmp_path):
    _, model = theirs(seed)
    model.save_pretrained(tmp_path, max_shard_size="5KB" if seed % 2 else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not seed % 2
    decoder = load_model(tmp_path)
    tokens_BT = torch.randint(model.config.vocab_size, (3, 17))
    with torch.no_grad():
        close(logits_of(decoder, tokens_BT), model(tokens_BT).logits)
    prompts = [row[:length].tolist() for row, length in zip(tokens_BT, (1, 6, 17), strict=True)]
    done = Engine(decoder).generate(prompts, 24, sampling=Sampling(temperature=0))
    for prompt, answer in zip(prompts, done, strict=True):
        ids = torch.tensor([prompt])
        every = torch.ones_like(ids)  # it would hide tokens that look like padding
        said = model.generate(ids, attention_mask=every, max_new_tokens=24, do_sample=False)
        said = said[0, len(prompt) :].tolist()
        assert answer.tokens == (said[: said.index(1)] if 1 in said else said)


@pytest.mark.parametrize("seed", range(0, 12, 5))
def test_our_folder_gives_them_the_same_weights_and_logits(seed, tmp_path):
    kind, model = theirs(seed)
    model.save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours")
    before = load_file(tmp_path / "theirs/model.safetensors")
    after = load_file(tmp_path / "ours/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert again.config.model_type == kind
    tokens_BT = torch.randint(model.config.vocab_size, (2, 11))
    with torch.no_grad():
        close(again(tokens_BT).logits, model(tokens_BT).logits)
    save_model(load_model(tmp_path / "ours"), tmp_path / "twice")
    for file in (tmp_path / "ours").iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_theirs(seed, tmp_path):
    """Continued training of such a model follows the same slope."""
    _, model = theirs(seed)
    model.save_pretrained(tmp_path)
    decoder = load_model(tmp_path)
    tokens_BT = torch.randint(model.config.vocab_size, (2, 9))
    pull = torch.randn(2, 9, model.config.vocab_size)
    (model(tokens_BT).logits * pull).sum().backward()
    hidden = decoder(tokens_BT.flatten(), documents(tokens_BT.clone(), -1))
    (decoder.logits(hidden.states_ND).view_as(pull) * pull).sum().backward()
    reference = dict(model.named_parameters())
    for name, parameter in decoder.named_parameters():
        if "q_" in name or "k_" in name:
            continue  # their rows stand in another order; what they change shows in all others
        close(parameter.grad, reference[name].grad)


def test_the_order_of_rows_matters(tmp_path, monkeypatch):
    """The comparison can fail."""
    _, model = theirs(2)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("shenhong.export.huggingface.interleaved", lambda rows, width: rows)
    tokens_BT = torch.randint(model.config.vocab_size, (2, 11))
    with torch.no_grad(), pytest.raises(AssertionError):
        close(logits_of(load_model(tmp_path), tokens_BT), model(tokens_BT).logits)


def test_plain_pytorch_says_the_same(tmp_path):
    _, model = theirs(1)
    model.save_pretrained(tmp_path)
    decoder = load_model(tmp_path)
    prompts = [[5, 3, 8], [7], list(range(2, 30))]
    fast = Engine(decoder).generate(prompts, 20, sampling=Sampling(temperature=0))
    use_kernels(False)
    try:
        plain = Engine(decoder).generate(prompts, 20, sampling=Sampling(temperature=0))
    finally:
        use_kernels(True)
    assert fast == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_a_text_is_the_same_to_the_bit_whatever_shares_its_batch(seed, dtype, tmp_path):
    _, model = theirs(seed)
    model.save_pretrained(tmp_path)
    decoder = load_model(tmp_path)
    engine = Engine(decoder, dtype=dtype, settings=EngineSettings(page=4, step_tokens=7))
    if not kernels_in_use():
        pytest.skip("only the kernels promise it")
    assert engine.model.fused is not None
    pick = random.Random(seed)
    prompts = [[pick.randrange(2, 50) for _ in range(pick.randint(1, 20))] for _ in range(5)]
    together = engine.generate(prompts, 16, sampling=Sampling(temperature=1.0), seed=7)
    seeds = [request_seed(7, i) for i in range(5)]
    for prompt, own, answer in zip(prompts, seeds, together, strict=True):
        alone = Engine(decoder, dtype=dtype)
        assert alone.generate([prompt], 16, sampling=Sampling(temperature=1.0), seed=[own]) == [
            answer
        ]


@pytest.mark.parametrize("seed", range(3))
def test_costs_are_counted_right(seed, tmp_path):
    """Parameters, and FLOPs against torch's counter on the reference path, which multiplies whole squares."""
    _, model = theirs(seed)
    model.save_pretrained(tmp_path)
    decoder, T = load_model(tmp_path), 16
    config = decoder.config
    assert parameters(config).total == sum(p.numel() for p in decoder.parameters())
    tokens_BT = torch.randint(config.vocab_size, (1, T))
    use_kernels(False)
    try:
        with FlopCounterMode(display=False) as counter:
            logits_of(decoder, tokens_BT)
    finally:
        use_kernels(True)
    assert forward_flops(config, T) * T == counter.get_total_flops()
