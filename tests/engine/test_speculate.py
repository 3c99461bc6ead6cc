"""Drafting by the model's own layer: what is sampled has the distribution of plain decoding, by counting whole texts.

Texts of four tokens of a vocabulary of four are counted against their probabilities, which come from the training
forward and know nothing of the engine. An engine that trusts its guesses shows that the measure can fail.

Legend: B texts, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from shenhong.engine import Engine, EngineSettings, Sampling
from shenhong.numerics import documents
from tests.engine.test_engine import make

PROMPT, LENGTH, TEXTS, VOCABULARY = [3, 0, 2], 4, 4000, 4
HOW = Sampling(1.5)
Z = 3.719  # of a normal distribution: once in 10,000 a true one lies above
DECODER = make(3, num_nextn_predict_layers=1, vocab_size=VOCABULARY)


def probabilities() -> dict[tuple[int, ...], float]:
    """Of every text that may be written, by plain decoding without an engine."""
    shares = {(): 1.0}
    for _ in range(LENGTH):
        texts = list(shares)
        tokens = torch.tensor([[*PROMPT, *text] for text in texts])
        with torch.no_grad():
            states = DECODER(tokens.flatten(), documents(tokens, -1)).states_ND
        logits_BV = DECODER.logits(states.view(*tokens.shape, -1)[:, -1])
        next_BV = (logits_BV.double() / HOW.temperature).softmax(1).tolist()
        shares = {
            (*text, token): shares[text] * share
            for text, next_V in zip(texts, next_BV, strict=True)
            for token, share in enumerate(next_V)
        }
    return shares


def excess(engine: Engine, first_seed: int) -> float:
    """Chi-square of what the engine wrote, over the value that a true distribution passes once in 10,000."""
    seeds = range(first_seed, first_seed + TEXTS)
    done = engine.generate([PROMPT] * TEXTS, LENGTH, sampling=HOW, seed=seeds, stop=[])
    found = Counter(tuple(one.tokens) for one in done)
    wanted = {text: TEXTS * share for text, share in probabilities().items()}
    assert math.isclose(sum(wanted.values()), TEXTS) and len(wanted) == VOCABULARY**LENGTH
    # Rare texts are counted together, so that every cell expects at least ten.
    cells, rare = [], [0.0, 0.0]
    for text, want in wanted.items():
        if want >= 10:
            cells.append((found[text], want))
        else:
            rare = [rare[0] + found[text], rare[1] + want]
    if rare[1] >= 10:
        cells.append((rare[0], rare[1]))
    freedom = len(cells) - 1
    assert freedom >= 20
    chi = sum((got - want) ** 2 / want for got, want in cells)
    # Wilson and Hilferty 1931: the cube root of chi-square over its freedom is nearly normal.
    part = 2 / (9 * freedom)
    return chi / (freedom * (1 - part + Z * math.sqrt(part)) ** 3)


class Trusting(Engine):
    """Keeps every guess, as it must not."""

    def _continue(self, whole, states_ND, rows):
        self.guesses = {id(live): guesses for live, guesses in whole}
        return super()._continue(whole, states_ND, rows)

    def _sample(self, logits_BV, places):
        drawn = super()._sample(logits_BV, places)
        guesses = [self.guesses[id(live)][i : i + 1] for live, i in places]
        return [*itertools.chain(*(g or [d] for g, d in zip(guesses, drawn, strict=True)))]


def with_draft(kind: type[Engine], depth: int) -> Engine:
    return kind(DECODER, settings=EngineSettings(most_running=64, draft=depth, most_drafting=64))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_sampled_texts_have_the_distribution_of_plain_decoding(depth):
    engine = with_draft(Engine, depth)
    assert excess(engine, 10_000 * depth) < 1
    acceptance = engine.stats().acceptance
    assert acceptance is None if depth == 0 else 0.1 < acceptance < 0.95  # both ways were gone


def test_the_measure_sees_an_engine_that_trusts_its_guesses():
    for depth in (1, 3):
        assert excess(with_draft(Trusting, depth), 0) > 1.5
