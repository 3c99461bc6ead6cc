"""The balance rules: what they count, where they move the bias, and that they even out a skewed load."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong.errors import ModelError
from shenhong.model import Observe, RouterStats, sum_stats
from shenhong.model.balance import BINS, margin_histogram, next_bias, quantile, sequence_balance
from shenhong.numerics import documents, select_experts
from tests.model.random_configs import random_config, random_decoder, random_tokens


def stats_of(counts):
    return RouterStats(torch.tensor(counts), None, None)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=16))
@settings(deadline=None)
def test_sign_rule_moves_each_bias_by_the_rate(counts):
    before = torch.zeros(len(counts))
    after = next_bias(before, stats_of(counts), "sign", 0.01, 1)
    mean = sum(counts) / len(counts)
    for count, bias in zip(counts, after.tolist(), strict=True):
        want = 0.01 if count < mean else -0.01 if count > mean else 0.0
        assert bias == pytest.approx(want)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=16))
@settings(deadline=None)
def test_centred_rule_keeps_the_mean_at_zero(counts):
    bias = torch.zeros(len(counts))
    for _ in range(50):
        bias = next_bias(bias, stats_of(counts), "centred", 0.01, 1)
    assert abs(bias.mean().item()) < 1e-5
    busiest, idlest = counts.index(max(counts)), counts.index(min(counts))
    assert bias[busiest] <= bias[idlest]


def test_sign_rule_drifts_where_the_centred_one_does_not():
    """One busy expert among eight: seven biases rise for one that falls."""
    stats = stats_of([100] + [10] * 7)
    assert next_bias(torch.zeros(8), stats, "sign", 0.1, 1).mean() > 0.05
    assert next_bias(torch.zeros(8), stats, "centred", 0.1, 1).mean().abs() < 1e-7


def skewed_scores(experts, tokens=4000, seed=0):
    """Sigmoid scores in which some experts please every token much more than others."""
    stream = torch.Generator().manual_seed(seed)
    taste = torch.linspace(-1.5, 1.5, experts)
    return (taste + 0.5 * torch.randn(tokens, experts, generator=stream)).sigmoid()


def busiest(scores, bias, chosen):
    load = torch.bincount(
        select_experts(scores, bias, chosen).long().flatten(), minlength=len(bias)
    ).double()
    return (load.max() / load.mean()).item()


@pytest.mark.parametrize(("experts", "chosen"), [(16, 2), (8, 1), (32, 6), (64, 6)])
def test_quantile_rule_evens_a_skewed_load(experts, chosen):
    scores, bias = skewed_scores(experts), torch.zeros(experts)
    assert busiest(scores, bias, chosen) > 3
    for _ in range(30):
        stats = RouterStats(torch.zeros(1), margin_histogram(scores, bias, chosen), None)
        bias = next_bias(bias, stats, "quantile", 0.0, chosen)
        assert bias.mean().abs() < 1e-5
    assert busiest(scores, bias, chosen) < 1.15
    # And for other tokens of the same kind.
    assert busiest(skewed_scores(experts, seed=1), bias, chosen) < 1.35


@pytest.mark.parametrize("rule", ["sign", "centred"])
def test_sign_rules_even_a_skewed_load_slowly(rule):
    scores, bias = skewed_scores(16), torch.zeros(16)
    for _ in range(300):
        counts = torch.bincount(select_experts(scores, bias, 2).long().flatten(), minlength=16)
        bias = next_bias(bias, RouterStats(counts, None, None), rule, 0.005, 2)
    assert busiest(scores, bias, 2) < 1.2


def test_quantile_of_a_histogram():
    values = torch.rand(3, 5000, generator=torch.Generator().manual_seed(0)) - 0.5
    histogram = torch.stack([torch.histc(row, BINS, -2, 2) for row in values]).long()
    for share in (0.1, 0.5, 0.875):
        exact = values.double().quantile(share, dim=1)
        assert (quantile(histogram, share) - exact).abs().max() < 4 / BINS


def test_other_rules():
    bias = torch.randn(4)
    assert torch.equal(next_bias(bias, stats_of([1, 2, 3, 4]), "none", 0.1, 1), bias)
    with pytest.raises(ModelError, match="quantile"):
        next_bias(bias, stats_of([1, 2, 3, 4]), "softly", 0.1, 1)


def test_observations_of_two_halves_add_up_to_the_whole():
    config = random_config(6, first_k_dense_replace=0, num_nextn_predict_layers=1)
    decoder = random_decoder(config, 6)
    tokens_BT = random_tokens(config, 6, 4, 12)
    observe = Observe(margins=True)

    def routing(tokens):
        docs = documents(tokens, -1)
        hidden = decoder(tokens.flatten(), docs, observe)
        return hidden.routing + decoder.draft(hidden.states_ND, tokens.flatten(), docs).routing

    with torch.no_grad():
        whole = routing(tokens_BT)
        halves = sum_stats([routing(tokens_BT[:2]), routing(tokens_BT[2:])])
    for a, b in zip(whole[:-1], halves[:-1], strict=True):
        assert torch.equal(a.counts_E, b.counts_E)
        assert torch.equal(a.margins_EQ, b.margins_EQ)
        assert a.counts_E.sum() == 48 * config.num_experts_per_tok


def test_update_reaches_every_router_and_only_the_choice():
    config = random_config(6, first_k_dense_replace=0, num_nextn_predict_layers=1)
    decoder = random_decoder(config, 6)
    tokens_BT = random_tokens(config, 6, 4, 12)
    docs = documents(tokens_BT, -1)
    before = [router.e_score_correction_bias.clone() for router in decoder.routers]
    hidden = decoder(tokens_BT.flatten(), docs)
    draft = decoder.draft(hidden.states_ND, tokens_BT.flatten(), docs)
    decoder.update_balance(hidden.routing + draft.routing, "centred", 0.1)
    assert len(before) == config.num_hidden_layers + 1
    for old, router in zip(before, decoder.routers, strict=True):
        assert not torch.equal(old, router.e_score_correction_bias)
    # A bias shared by all experts changes nothing: gates come from the scores alone.
    states = decoder(tokens_BT.flatten(), docs).states_ND
    for router in decoder.routers:
        router.e_score_correction_bias.add_(0.5)
    assert torch.allclose(decoder(tokens_BT.flatten(), docs).states_ND, states, atol=1e-6)


def test_sequence_balance_loss_is_the_papers():
    """Equations 17-20 of the V3 report, document by document, against the vectorised form."""
    stream = torch.Generator().manual_seed(0)
    lengths, E, K = [5, 1, 9], 6, 2
    scores = torch.rand(sum(lengths), E, generator=stream, requires_grad=True)
    chosen = scores.detach().topk(K, dim=1).indices
    document = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    want = torch.zeros(())
    for s, length in enumerate(lengths):
        rows = document == s
        f = torch.bincount(chosen[rows].flatten(), minlength=E) * E / (K * length)
        share = scores[rows] / scores[rows].sum(dim=1, keepdim=True)
        want = want + (f * share.mean(dim=0)).sum() * length / sum(lengths)
    got = sequence_balance(scores, chosen, document, 3)
    assert torch.allclose(got, want)
    assert torch.allclose(
        torch.autograd.grad(got, scores)[0], torch.autograd.grad(want, scores)[0], atol=1e-7
    )


def test_balance_loss_has_a_gradient_for_the_router_only_where_asked():
    config = random_config(6, first_k_dense_replace=0)
    decoder = random_decoder(config, 6)
    tokens_BT = random_tokens(config, 6, 2, 12)
    docs = documents(tokens_BT, -1)
    assert decoder(tokens_BT.flatten(), docs).routing[0].balance_loss is None
    loss = decoder(tokens_BT.flatten(), docs, Observe(balance_loss=True)).routing[-1].balance_loss
    loss.backward()
    assert decoder.routers[-1].weight.grad.abs().max() > 0
