"""Tiny random shapes and weights, shared by the tests of the model, its export and the engine."""

from __future__ import annotations

import random

import torch

from shenhong.model import Decoder, ModelConfig, Yarn


def random_config(seed: int, **fixed) -> ModelConfig:
    """A valid tiny configuration in which everything that can vary does."""
    pick = random.Random(seed)
    groups = pick.choice([1, 1, 2, 4])
    experts = groups * pick.choice([2, 3, 4]) if groups > 1 else pick.choice([3, 4, 8])
    topk_group = pick.randint(1, groups)
    chosen = pick.randint(1, min(4, topk_group * (experts // groups)))
    layers = pick.choice([1, 2, 3])
    yarn = None
    if pick.random() < 0.4:
        mscale, all_dim = pick.choice([(1.0, 1.0), (0.7, 1.0), (1.0, 0.0)])
        yarn = Yarn(pick.choice([2.0, 8.0]), 16, mscale=mscale, mscale_all_dim=all_dim)
    values = {
        "vocab_size": pick.choice([50, 97]),
        "hidden_size": pick.choice([16, 24, 32]),
        "intermediate_size": pick.choice([20, 48]),
        "num_hidden_layers": layers,
        "num_attention_heads": pick.choice([1, 2, 4]),
        "kv_lora_rank": pick.choice([8, 12]),
        "qk_nope_head_dim": pick.choice([4, 8]),
        "qk_rope_head_dim": pick.choice([2, 4, 8]),
        "v_head_dim": pick.choice([4, 6, 8]),
        "q_lora_rank": pick.choice([None, 12, 16]),
        "moe_intermediate_size": pick.choice([8, 12]),
        "n_routed_experts": experts,
        "num_experts_per_tok": chosen,
        "n_shared_experts": pick.choice([0, 1, 2]),
        "first_k_dense_replace": pick.randint(0, layers),
        "n_group": groups,
        "topk_group": topk_group,
        "norm_topk_prob": pick.random() < 0.7,
        "routed_scaling_factor": pick.choice([1.0, 2.5, "auto"]),
        "max_position_embeddings": 64,
        "rope_theta": pick.choice([100.0, 10000.0]),
        "rope_scaling": yarn,
        "rms_norm_eps": pick.choice([1e-6, 1e-5]),
        "tie_word_embeddings": pick.random() < 0.5,
    }
    return ModelConfig(**(values | fixed))


def random_v2_config(seed: int, **fixed) -> ModelConfig:
    """The same with DeepSeek-V2's router, its choice limited to groups wherever there are several."""
    groups = fixed.get("n_group", random_config(seed).n_group)
    v2 = {
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
        "norm_topk_prob": False,
    }
    return random_config(seed, **(v2 | fixed))


@torch.no_grad()
def random_decoder(config: ModelConfig, seed: int) -> Decoder:
    """A decoder with weights large enough to matter, random norms and random selection biases."""
    decoder = Decoder(config, seed=seed)
    stream = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        if parameter.ndim == 1:
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=stream))
        else:
            parameter.mul_(parameter.shape[-1] ** -0.5 / config.initializer_range)
    decoder.model.embed_tokens.weight.mul_(3)
    for router in decoder.routers:
        bias = router.e_score_correction_bias
        if not config.has_selection_bias:
            continue
        bias.copy_(0.2 * torch.randn(bias.shape, generator=stream))
    return decoder


def random_tokens(config: ModelConfig, seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
