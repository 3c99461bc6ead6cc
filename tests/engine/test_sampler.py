"""Sampling draws from the right distribution and honours its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong.engine import Sampling, request_seed
from shenhong.engine.sampler import (
    Penalties,
    invert,
    log_probabilities,
    sample,
    sample_alike,
    samplings,
    uniforms,
)
from shenhong.errors import RequestError
from shenhong.numerics import kernels_in_use, use_kernels


def many(logits, how, count=20_000):
    """Draws from one row at evenly spaced uniforms: shares come out exact to 1/count."""
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return sample_alike(logits.expand(count, -1), even, how)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_shares_are_the_softmax(temperature):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    drawn = many(logits, Sampling(temperature))
    shares = torch.bincount(drawn, minlength=12) / len(drawn)
    assert (shares - (logits[0] / temperature).softmax(0)).abs().max() < 2e-4


def test_limits_keep_what_they_say():
    shares = torch.tensor([[0.05, 0.4, 0.2, 0.25, 0.1]])
    logits = shares.log()

    def kept(**limits):
        return set(many(logits, Sampling(1.0, **limits)).tolist())

    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=2) == {1, 3}
    assert kept(top_k=99) == {0, 1, 2, 3, 4}
    assert kept(top_p=0.39) == {1}
    assert kept(top_p=0.6) == {1, 3}
    assert kept(top_p=0.84) == {1, 3, 2}
    assert kept(min_p=0.3) == {1, 2, 3}
    assert kept(top_k=3, min_p=0.6) == {1, 3}
    assert kept(top_k=1) == kept(top_p=1e-6) == {1}


def test_a_limit_keeps_the_ratio_of_what_is_left():
    logits = torch.tensor([[0.05, 0.4, 0.2, 0.25, 0.1]]).log()
    drawn = many(logits, Sampling(1.0, top_p=0.6))
    assert abs((drawn == 1).double().mean() - 0.4 / 0.65) < 1e-3


@given(st.integers(0, 10_000), st.sampled_from([0.0, 1e-6, 1e-3, 0.8, 5.0]))
@settings(max_examples=60, deadline=None)
def test_extremes_give_a_possible_token(seed, temperature):
    stream = torch.Generator().manual_seed(seed)
    logits = 50 * torch.randn(4, 200, generator=stream)
    logits[:, 30:] = float("-inf")
    last = torch.tensor(1.0, dtype=torch.float64).nextafter(torch.tensor(0.0, dtype=torch.float64))
    for place in (0.0, last.item()):
        point = torch.full((4,), place, dtype=torch.float64)
        for how in (Sampling(temperature), Sampling(temperature, top_k=35, top_p=0.999)):
            tokens = sample_alike(logits, point, how)
            assert (tokens < 30).all()
            if temperature < 1e-5:
                assert torch.equal(tokens, logits.argmax(dim=1))


@given(st.integers(1, 400), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_inversion_is_that_of_the_running_sum(width, seed):
    stream = torch.Generator().manual_seed(seed)
    shares = torch.rand(9, width, generator=stream) ** 8
    shares[:, ::3] *= torch.rand(1, generator=stream).round()
    shares[:, -1] += 1e-3
    point = torch.rand(9, generator=stream, dtype=torch.float64)
    sums = shares.double().cumsum(dim=1)
    want = torch.searchsorted(sums, point[:, None] * sums[:, -1:], right=True).squeeze(1)
    got = invert(shares, point)
    assert (shares.gather(1, got[:, None]) > 0).all()
    # fp32 sums of blocks may differ where a point falls on a boundary.
    near = (
        sums.gather(1, torch.minimum(got, want)[:, None]).squeeze(1) / sums[:, -1] - point
    ).abs()
    assert ((got == want) | (near < 1e-6)).all()


def test_streams_have_names_and_prefixes():
    assert torch.equal(uniforms([5, 6], 20)[:, :7], uniforms([5, 6], 7))
    assert torch.equal(uniforms([6], 7)[0], uniforms([5, 6], 7)[1])
    seeds = {request_seed(seed, i) for seed in range(20) for i in range(20)}
    assert len(seeds) == 400


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"presence_penalty": 3},
        {"frequency_penalty": float("inf")},
        {"logit_bias": {3: 101}},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Sampling(**wrong)


@given(
    st.integers(0, 10_000),
    st.integers(2, 300),
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    st.sampled_from([0, 1, 5, 100]),
    st.sampled_from([1.0, 0.9, 0.3]),
    st.sampled_from([0.0, 0.02, 0.5]),
)
@settings(max_examples=200, deadline=None)
def test_the_kernel_draws_as_pytorch_does(seed, width, temperature, top_k, top_p, min_p):
    """The same token for the same number, but where the number falls on a boundary between two."""
    if not kernels_in_use():
        pytest.skip("no compiler here")
    stream = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(20, width, generator=stream)
    logits[:, width // 2] = float("-inf")
    how = Sampling(temperature, top_k, top_p, min_p)
    points = torch.rand(20, generator=stream, dtype=torch.float64)
    got = sample(logits, samplings(how, points))
    use_kernels(False)
    try:
        close = [sample(logits, samplings(how, (points + e).abs() % 1)) for e in (0, -1e-5, 1e-5)]
    finally:
        use_kernels(True)
    for row, token in enumerate(got):
        assert token in {tokens[row] for tokens in close}


@pytest.mark.parametrize("kernels", [True, False])
def test_no_numbers_give_no_token(kernels):
    use_kernels(kernels)
    try:
        logits = torch.randn(5, 70)
        logits[1, 66], logits[2, 3], logits[3] = float("nan"), float("inf"), float("-inf")
        for how in (Sampling(0.0), Sampling(1.0), Sampling(1.0, top_k=3, top_p=0.5)):
            got = sample(logits, samplings(how, torch.full((5,), 0.5)))
            assert [token is None for token in got] == [False, True, True, True, False]
    finally:
        use_kernels(True)


def test_penalties_follow_their_formulas():
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0, -2.0])
    how = Sampling(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: 7.0}
    )
    penalties = Penalties(how, [0, 1], 5)
    assert penalties.apply(logits).tolist() == [1.0, -2.0, 0.5, 3.0, 5.0]
    penalties.wrote(3)
    penalties.wrote(3)
    assert penalties.apply(logits).tolist() == [1.0, -2.0, 0.5, 1.5 - 0.5 - 0.5, 5.0]


def test_log_probabilities_name_the_likeliest():
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log() + 3
    entry = log_probabilities(logits, 3, 2)
    assert entry.token == 3 and entry.logprob == pytest.approx(math.log(0.2), abs=1e-5)
    assert [token for token, _ in entry.top] == [1, 2]
    assert log_probabilities(logits, 0, 0).top == []
