"""Targets and weights, against loops over documents written the obvious way."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from shenhong.train.data import Batch
from shenhong.train.objectives import next_targets, second_targets

BOS = 0


@st.composite
def batches(draw):
    documents = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    tokens, weights = [], []
    for length in documents:
        tokens += [
            BOS,
            *draw(st.lists(st.integers(1, 9), min_size=length - 1, max_size=length - 1)),
        ]
        weights += [
            0.0,
            *draw(
                st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=length - 1, max_size=length - 1)
            ),
        ]
    starts = torch.tensor(tokens) == BOS
    return documents, Batch(torch.tensor(tokens), torch.tensor(weights), starts, len(tokens))


@given(batches())
def test_next_and_second_targets_stay_inside_documents(case):
    documents, batch = case
    n = len(batch.tokens_N)
    wanted = {1: torch.zeros(n), 2: torch.zeros(n)}
    start = 0
    for length in documents:
        for i in range(start, start + length):
            for ahead in (1, 2):
                if i + ahead < start + length:
                    wanted[ahead][i] = batch.weights_N[i + ahead]
        start += length
    for ahead, (targets, weights) in ((1, next_targets(batch)), (2, second_targets(batch))):
        assert torch.equal(weights, wanted[ahead])
        for i in range(n - ahead):
            assert targets[i] == batch.tokens_N[i + ahead]
