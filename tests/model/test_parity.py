"""The decoder against transformers' DeepSeek-V3 and DeepSeek-V2: logits and every gradient, fp32.

Weights and biases are random everywhere. A draw in which some token's choice of experts hangs on less than 1e-5 is
drawn again: there two correct programs may choose differently.
"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)

from shenhong.model import Decoder, ModelConfig
from shenhong.model.hf_config import to_hf
from shenhong.numerics import Documents
from tests.model.random_configs import (
    random_config,
    random_decoder,
    random_tokens,
    random_v2_config,
)

ROWS, LENGTH = 3, 13
TOLERANCE = 1e-4
MARGIN = 1e-5


THEIRS = {
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
}


def reference_model(decoder: Decoder) -> PreTrainedModel:
    values = to_hf(decoder.config)
    for name in ("architectures", "rope_theta", "rope_scaling", "torch_dtype", "dtype"):
        values.pop(name)
    their_config, their_model = THEIRS[values.pop("model_type")]
    model = their_model(their_config(**values, attn_implementation="eager"))
    ours = {name: tensor for name, tensor in decoder.state_dict().items()}
    if decoder.config.tie_word_embeddings:
        ours["lm_head.weight"] = ours["model.embed_tokens.weight"]
    missing, extra = model.load_state_dict(ours, strict=False)
    # Without shared experts transformers keeps matrices without rows.
    assert not extra and all("shared_experts" in name for name in missing)
    return model.train()


def rows_as_documents() -> Documents:
    starts = torch.arange(0, (ROWS + 1) * LENGTH, LENGTH, dtype=torch.int32)
    return Documents(starts, torch.arange(LENGTH, dtype=torch.int32).repeat(ROWS))


def choice_margin(decoder: Decoder, tokens_N: torch.Tensor, docs: Documents) -> float:
    """The smallest gap, over tokens and layers, between a score that was chosen and one that was not."""
    gaps: list[float] = []
    config = decoder.config

    def gap_of(ranked: torch.Tensor, chosen: int) -> None:
        if chosen < ranked.shape[1]:
            best = ranked.sort(dim=1, descending=True).values
            gaps.append(float((best[:, chosen - 1] - best[:, chosen]).min()))

    def note(router, inputs, outputs) -> None:
        biased = outputs[0] + router.e_score_correction_bias
        if config.n_group > 1:
            grouped = biased.unflatten(1, (config.n_group, -1))
            best = 2 if config.has_selection_bias else 1
            group_scores = grouped.topk(best, dim=-1).values.sum(-1)
            gap_of(group_scores, config.topk_group)
            kept = group_scores.topk(config.topk_group, dim=1).indices
            biased = grouped.gather(1, kept[..., None].expand(-1, -1, grouped.shape[2])).flatten(1)
        gap_of(biased, config.num_experts_per_tok)

    hooks = [router.register_forward_hook(note) for router in decoder.routers]
    with torch.no_grad():
        decoder(tokens_N, docs)
    for hook in hooks:
        hook.remove()
    return min(gaps, default=1.0)


def assert_close(name: str, ours: torch.Tensor, reference: torch.Tensor) -> None:
    error = (ours - reference).detach().abs().max().item()
    allowed = TOLERANCE * reference.detach().abs().max().item()
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check(config: ModelConfig, seed: int) -> None:
    docs = rows_as_documents()
    for draw in range(20):
        decoder = random_decoder(config, seed + 1000 * draw)
        tokens_BT = random_tokens(config, seed + 1000 * draw, ROWS, LENGTH)
        if choice_margin(decoder, tokens_BT.flatten(), docs) >= MARGIN:
            break
    else:
        raise AssertionError("no draw with a clear choice of experts")
    reference = reference_model(decoder)
    logits = decoder.logits(decoder(tokens_BT.flatten(), docs).states_ND)
    expected = reference(tokens_BT).logits.flatten(0, 1)
    assert_close("logits", logits, expected)
    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    (logits * pull).sum().backward()
    (expected * pull).sum().backward()
    gradients = dict(reference.named_parameters())
    # One gate normalised by itself is 1: the router's gradient is 0 and what is computed is rounding.
    constant_gate = config.num_experts_per_tok == 1 and config.norm_topk_prob
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and gradients[name].grad is not None, name
        if constant_gate and name.endswith("mlp.gate.weight"):
            assert parameter.grad.abs().max() < 1e-4
            continue
        assert_close(name, parameter.grad, gradients[name].grad)


@pytest.mark.parametrize("seed", range(40))
def test_logits_and_gradients(seed):
    check(random_config(seed), seed)


@pytest.mark.parametrize("seed", range(24))
def test_logits_and_gradients_of_deepseek_v2(seed):
    check(random_v2_config(seed), seed)


def test_the_draws_cover_every_choice():
    configs = [random_config(seed) for seed in range(40)]
    for name in ("q_lora_rank", "n_group", "n_shared_experts", "rope_scaling", "norm_topk_prob"):
        assert len({getattr(c, name) for c in configs}) > 1, name
    assert len({c.tie_word_embeddings for c in configs}) == 2
    assert any(not c.expert_layers for c in configs) and any(c.expert_layers for c in configs)
    assert any(c.n_group > c.topk_group for c in configs)
    older = [c for c in map(random_v2_config, range(24)) if c.expert_layers]
    assert {c.topk_method for c in older} == {"greedy", "group_limited_greedy"}
    assert any(c.n_group > c.topk_group for c in older)


def test_a_wrong_selection_bias_is_noticed():
    """The comparison can fail: without the biases the logits differ."""
    config = random_config(0, first_k_dense_replace=0)
    decoder = random_decoder(config, 0)
    reference = reference_model(decoder)
    for router in decoder.routers:
        router.e_score_correction_bias.add_(torch.randn_like(router.e_score_correction_bias))
    tokens_BT = random_tokens(config, 0, ROWS, LENGTH)
    logits = decoder.logits(decoder(tokens_BT.flatten(), rows_as_documents()).states_ND)
    with pytest.raises(AssertionError):
        assert_close("logits", logits, reference(tokens_BT).logits.flatten(0, 1))
