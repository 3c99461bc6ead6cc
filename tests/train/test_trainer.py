"""One step of training: what the plan counts on is what a step does."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shenhong.model import ModelConfig
from shenhong.parallel import Mesh
from shenhong.train import budget
from shenhong.train.data import PackedRows, Rows
from shenhong.train.objectives import next_targets, token_loss
from shenhong.train.settings import TrainSettings
from shenhong.train.trainer import Trainer

STEPS = 8


V2 = {
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "n_group": 2,
    "norm_topk_prob": False,
}


def make(
    folder: Path, layers: int = 1, shape: dict[str, Any] | None = None, **settings: float | str
) -> Trainer:
    tokens = torch.arange(3, 67).view(4, 16) % 32
    tokens[:, 0] = 0
    file = folder / "t.safetensors"
    rows = {"tokens": tokens.to(torch.uint16), "counted": (tokens != 0).to(torch.uint8)}
    save_file(rows, file)
    config = ModelConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        num_nextn_predict_layers=layers,
        **(shape or {}),
    )
    chosen = TrainSettings(steps=STEPS, batch_tokens=32, sequence_length=16, **settings)
    device = torch.device("cpu")
    source = PackedRows(Rows(file, 0, 2), chosen, 1)
    return Trainer(chosen, config, source, Mesh(), 1, torch.float32, device)


@pytest.mark.parametrize(
    ("layers", "settings", "share"),
    [
        (1, {}, 1.0),
        (1, {"mtp_start": 0.75}, 0.25),
        (1, {"mtp_weight": 0.0}, 0.0),
        (0, {"mtp_start": 0.25}, 0.0),
    ],
)
def test_the_draft_layer_trains_in_the_share_of_steps_that_is_planned(
    layers, settings, share, tmp_path
):
    trainer = make(tmp_path, layers, **settings)
    trained = ["mtp_loss" in trainer.step(step, STEPS).losses for step in range(STEPS)]
    assert budget.late_share(trainer) == share
    assert trained == [step >= STEPS * (1 - share) for step in range(STEPS)]


def weights_after_two_steps(
    folder: Path, layers: int, **settings: float
) -> dict[str, torch.Tensor]:
    trainer = make(folder, layers, **settings)
    for step in (STEPS - 2, STEPS - 1):
        trainer.step(step, STEPS)
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def test_a_draft_layer_that_starts_late_leaves_the_trunk_as_it_would_be_without(tmp_path):
    without = weights_after_two_steps(tmp_path, 0)
    late = weights_after_two_steps(tmp_path, 1, mtp_start=0.5)
    always = weights_after_two_steps(tmp_path, 1)
    assert all(late[name].equal(weight) for name, weight in without.items())
    assert not all(always[name].equal(weight) for name, weight in without.items())
    fresh = dict(make(tmp_path, 1).model.named_parameters())
    assert not late["model.layers.1.eh_proj.weight"].equal(fresh["model.layers.1.eh_proj.weight"])


def test_a_softmax_router_learns_and_is_balanced_by_its_loss_alone(tmp_path):
    plain = make(tmp_path, 0, V2, balance="none", sequence_balance=0.0)
    pulled = make(tmp_path, 0, V2, balance="none", sequence_balance=0.1)
    before = pulled.model.routers[0].weight.detach().clone()
    losses = [[t.step(step, STEPS).loss for step in range(STEPS)] for t in (plain, pulled)]
    assert all(run[-1] < run[0] for run in losses)
    routers = [t.model.routers[0] for t in (plain, pulled)]
    assert not any(router.e_score_correction_bias.any() for router in routers)
    assert not routers[1].weight.equal(before) and not routers[1].weight.equal(routers[0].weight)


class Shouting:
    """A toy objective: the second term wishes every token to be number 7, and counts every token."""

    names, weights, alone, later = ("loss", "shouting"), (1.0, 0.5), (), 1.0

    def counts(self, batch, late):
        return [batch.weights_N.sum(), torch.tensor(float(len(batch.tokens_N)))]

    def terms(self, batch, hidden, head_VD, draft, late):
        logprobs_NV = (hidden.states_ND @ head_VD.T).log_softmax(-1)
        targets_N, weights_N = next_targets(batch)
        return [
            token_loss(hidden.states_ND, head_VD, targets_N, weights_N),
            -logprobs_NV[:, 7].sum(),
        ]


def test_an_objective_of_ones_own(tmp_path):
    trainer = make(tmp_path, 0)
    trainer.objective = Shouting()
    first, *_, last = [trainer.step(step, STEPS).losses for step in range(STEPS)]
    assert set(first) == {"loss", "shouting"} and last["shouting"] < first["shouting"]


@pytest.mark.parametrize("objective", [None, Shouting()])
def test_how_a_step_is_cut_into_passes_changes_no_loss(objective, tmp_path):
    results = []
    for micro in (16, 32):
        trainer = make(tmp_path, 1, micro_tokens=micro)
        trainer.objective = objective or trainer.objective
        results.append([trainer.step(step, STEPS) for step in range(3)])
    for cut, whole in zip(*results, strict=True):
        assert cut.losses == pytest.approx(whole.losses, rel=1e-5)
        assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)


def test_the_terms_are_normalised_by_their_own_counts(tmp_path):
    trainer = make(tmp_path, 1)
    objective, (batch,) = trainer.objective, trainer.source.batches(0, Mesh())
    next_count, second_count = objective.counts(batch, True)
    # Two rows of 16 that begin with BOS, one of which has another inside: BOS is no target, and no pair spans it.
    assert (float(next_count), float(second_count)) == (29.0, 26.0)
    assert [float(c) for c in objective.counts(batch, False)] == [29.0]
    result = trainer.step(0, STEPS)
    assert result.losses["loss"] == pytest.approx(math.log(32), rel=0.05)
    assert result.losses["mtp_loss"] == pytest.approx(math.log(32), rel=0.05)
