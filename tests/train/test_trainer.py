"""One step of training: what the plan counts on is what a step does."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shenhong.model import ModelConfig
from shenhong.parallel import Mesh
from shenhong.train import budget
from shenhong.train.data import PackedRows, Rows
from shenhong.train.objectives import NextToken, Pass
from shenhong.train.settings import TrainSettings
from shenhong.train.trainer import Trainer
from tests.train.tiny_model import CONFIG, Alignment, Texts

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
    objective = NextToken(config, chosen)
    return Trainer(chosen, config, objective, source, Mesh(), 1, torch.float32, device)


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


def aligned(together: int = 1, texts: int = 12, **settings: Any) -> Trainer:
    """A training of the toy objective on texts of different lengths."""
    chosen = TrainSettings(steps=STEPS, sequence_balance=0.01, **settings)
    source, device = Texts(together, texts), torch.device("cpu")
    return Trainer(chosen, CONFIG, Alignment(), source, Mesh(), 1, torch.float32, device)


def test_an_objective_and_a_source_of_ones_own():
    trainer = aligned(vector_lr=0.05)
    results = [trainer.step(step, STEPS) for step in range(STEPS)]
    assert all(list(result.losses) == ["loss", "distance", "size"] for result in results)
    distances = [result.losses["distance"] for result in results]
    assert distances[-1] < 0.8 * distances[0], distances
    assert results[0].tokens == sum(3 + 2 * number for number in range(12))


def test_each_term_is_divided_by_its_own_count_over_the_whole_step():
    trainer = aligned()
    batches, terms, counts = trainer.source.batches(0, trainer.model, Mesh()), [], []
    for batch in batches:
        forward = Pass(trainer.model, batch, trainer.observe)
        terms.append([t.item() for t in trainer.objective.terms(batch, forward, False)])
        counts.append([c.item() for c in trainer.objective.counts(batch, False)])
    expected = torch.tensor(terms).sum(0) / torch.tensor(counts).sum(0)
    assert list(trainer.step(0, STEPS).losses.values()) == pytest.approx(expected.tolist())


def test_a_term_of_weight_zero_moves_nothing():
    weighted, plain = aligned(), aligned()
    plain.objective.names, plain.objective.weights = ("loss", "distance"), (1.0, 0.5)
    plain.objective.counts = lambda batch, late: Alignment().counts(batch, late)[:2]
    plain.objective.terms = lambda *given: Alignment().terms(*given)[:2]
    for trainer in (weighted, plain):
        trainer.step(0, STEPS)
    pairs = zip(weighted.model.parameters(), plain.model.parameters(), strict=True)
    assert all(a.equal(b) for a, b in pairs)


def test_a_source_is_handed_the_weights_as_they_are_at_the_start_of_each_step():
    trainer = aligned()
    after = []
    for step in range(3):
        trainer.step(step, STEPS)
        after.append(trainer.model.model.norm.weight.detach().clone())
    first, *later = trainer.source.seen
    assert first.eq(1).all() and not later[0].equal(first)
    assert all(seen.equal(weight) for seen, weight in zip(later, after[:-1], strict=True))


def test_gradients_that_an_objective_sets_apart_are_clipped_apart():
    norms = []
    for apart in ((), ("model.embed_tokens.",)):
        trainer = aligned(clip=1e-3)
        trainer.objective.clipped_apart = apart
        norms.append(trainer.step(0, STEPS).grad_norm)
    assert norms[1] < norms[0]


@given(together=st.integers(2, 12), texts=st.integers(1, 12))
@settings(max_examples=12, deadline=None)
def test_how_a_step_is_cut_into_passes_changes_no_loss(together, texts):
    whole, cut = (
        [trainer.step(step, STEPS) for step in range(2)]
        for trainer in (aligned(1, texts), aligned(together, texts))
    )
    for a, b in zip(whole, cut, strict=True):
        assert b.losses == pytest.approx(a.losses, rel=1e-4, abs=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3)


def test_how_rows_are_cut_into_passes_changes_no_loss(tmp_path):
    runs = []
    for micro in (16, 32):
        trainer = make(tmp_path, 1, micro_tokens=micro)
        runs.append([trainer.step(step, STEPS) for step in range(3)])
    for cut, whole in zip(*runs, strict=True):
        assert cut.losses == pytest.approx(whole.losses, rel=1e-5)
        assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)


def test_the_terms_are_normalised_by_their_own_counts(tmp_path):
    trainer = make(tmp_path, 1)
    objective, (batch,) = trainer.objective, trainer.source.batches(0, trainer.model, Mesh())
    next_count, second_count = objective.counts(batch, True)
    # Two rows of 16 that begin with BOS, one of which has another inside: BOS is no target, and no pair spans it.
    assert (float(next_count), float(second_count)) == (29.0, 26.0)
    assert [float(c) for c in objective.counts(batch, False)] == [29.0]
    result = trainer.step(0, STEPS)
    assert result.losses["loss"] == pytest.approx(math.log(32), rel=0.05)
    assert result.losses["mtp_loss"] == pytest.approx(math.log(32), rel=0.05)
