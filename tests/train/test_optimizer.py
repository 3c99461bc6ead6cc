"""Muon and AdamW against their formulas."""

import math

import pytest
import torch

from shenhong.model import Decoder, ModelConfig
from shenhong.numerics.muon import newton_schulz
from shenhong.train.optimizer import Optimizer, clip_, matrix_views

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_nextn_predict_layers=1,
)


# As in SmolLM2-135M and Llama 3: fewer heads of keys and values than of queries, or fewer by a factor that divides all.
GROUPED = [(9, 3, {}), (32, 8, {"qkv_bias": True}), (32, 8, {"qk_norm": True})]


def grouped(heads: int, shared: int, more: dict) -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        num_attention_heads=heads,
        attention="gqa",
        num_key_value_heads=shared,
        head_dim=6,
        **more,
    )


def optimizer(model: Decoder, **changes) -> Optimizer:
    settings = {
        "muon": True,
        "momentum": 0.9,
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
        "compute": torch.float32,
    }
    return Optimizer(dict(model.named_parameters()), model.config, **{**settings, **changes})


@pytest.mark.parametrize("config", [CONFIG, *(grouped(*shape) for shape in GROUPED)])
def test_matrix_views_cover_each_entry_of_a_matrix_once(config):
    for name, parameter in Decoder(config).named_parameters():
        marks = torch.zeros_like(parameter, requires_grad=False)
        for piece in matrix_views(name, marks, config):
            assert piece.ndim == 3 and piece.numel()
            piece.add_(1)  # a view: marks the entries of the parameter itself
        is_matrix = parameter.ndim > 1 and not any(
            p in name for p in ("embed", "lm_head", "gate.weight")
        )
        assert marks.eq(1 if is_matrix else 0).all(), name


@pytest.mark.parametrize(("heads", "shared", "more"), GROUPED)
@pytest.mark.parametrize("muon", [True, False])
def test_each_head_of_grouped_queries_is_one_matrix(heads, shared, more, muon):
    """A head's step is what it would be if there were no other."""
    model = Decoder(grouped(heads, shared, more))
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for seed, parameter in enumerate(parameters.values()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    optimizer(model, muon=muon, weight_decay=0.0).step(0.02, 0.001)
    for part, count in (("q", heads), ("k", shared), ("v", shared)):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        moved = (before[name] - parameters[name].detach()).view(count, 6, 48)
        gradient = parameters[name].grad.view(count, 6, 48)
        if muon:
            wanted = 0.02 * 0.2 * math.sqrt(48) * newton_schulz(1.9 * gradient)
        else:  # AdamW's first step, at the rate of matrices
            wanted = 0.02 * gradient.sign()
        torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-5)


def test_a_muon_step_is_the_formula():
    model = Decoder(CONFIG)
    opt = optimizer(model)
    name = "model.layers.1.mlp.experts.down_proj"
    weight = dict(model.named_parameters())[name]
    before = weight.detach().clone()
    gradients = [
        torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    ]
    for g in gradients:
        weight.grad = g.clone()
        opt.step(0.02, 0.001)
    expected, momentum = before, torch.zeros_like(before)
    for g in gradients:
        momentum = 0.9 * momentum + g
        ortho = newton_schulz((g + 0.9 * momentum).mT).mT
        expected = expected - 0.02 * (0.2 * math.sqrt(32) * ortho + 0.1 * expected)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_adamw_is_torchs():
    ours, theirs = Decoder(CONFIG), Decoder(CONFIG)
    opt = optimizer(ours, muon=False)
    decayed = [p for n, p in theirs.named_parameters() if matrix_views(n, p.detach(), CONFIG)]
    others = [p for n, p in theirs.named_parameters() if not matrix_views(n, p.detach(), CONFIG)]
    reference = torch.optim.AdamW(
        [
            {"params": decayed, "lr": 0.01, "weight_decay": 0.1},
            {"params": others, "lr": 0.002, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-10,
    )
    for seed in range(3):
        stream = torch.Generator().manual_seed(seed)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=stream)
            b.grad = a.grad.clone()
        opt.step(0.01, 0.002)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_clipping_bounds_the_joint_norm():
    gradients = [torch.full((4,), 3.0), torch.full((2, 2), 4.0)]
    assert clip_(gradients, 5.0) == pytest.approx(10.0)
    assert math.sqrt(sum(float(g.square().sum()) for g in gradients)) == pytest.approx(5.0)
    assert clip_(gradients, 50.0) == pytest.approx(5.0)


def test_state_round_trip_continues_the_same():
    a, b = Decoder(CONFIG), Decoder(CONFIG)
    oa, ob = optimizer(a), optimizer(b)

    def step(model, opt, seed):
        stream = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=stream)
        opt.step(0.01, 0.002)

    step(a, oa, 1)
    b.load_state_dict(a.state_dict())
    ob.load({k: v.clone() for k, v in oa.state()})
    step(a, oa, 2)
    step(b, ob, 2)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
