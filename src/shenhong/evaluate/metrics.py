"""Measures of text and of models of text that hold for every kind of corpus.

Bits per character is defined once, here, for the model and for the n-grams beside it: the bits of the
held-out texts, their punctuation and their ends included and their prompts not, divided by the number of
their characters, ends not counted. A model of tokens pays for every way its text is cut into tokens;
what it pays per token is a different number, reported beside it and never mixed with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Estimate(NamedTuple):
    """A measured number, its standard error (None where it has none) and how many it is a mean of."""

    value: float
    error: float | None
    number: int

    def to_json(self) -> dict[str, float | int | None]:
        value = self.value if math.isfinite(self.value) else None  # JSON has no NaN
        return {"value": value, "error": self.error, "count": self.number}


def mean(values: ArrayLike) -> Estimate:
    """Mean with the standard error of independent values; a share is the mean of 0s and 1s."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return Estimate(math.nan, None, 0)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return Estimate(float(array.mean()), error, len(array))


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """sum / sum over independent texts, with the standard error of the ratio estimator.

    Numbers for all texts together (one pair) have no error.
    """
    top = np.atleast_1d(np.asarray(numerators, dtype=np.float64))
    bottom = np.atleast_1d(np.asarray(denominators, dtype=np.float64))
    total = bottom.sum()
    if total <= 0:
        return Estimate(math.nan, None, 0)
    value = float(top.sum() / total)
    n = len(top)
    if n < 2 or bottom.shape != top.shape:
        return Estimate(value, None, n)
    residual = top - value * bottom
    return Estimate(value, float(math.sqrt(n / (n - 1) * (residual**2).sum()) / total), n)


@dataclass(frozen=True)
class ScoredText:
    """What the model's loss over held-out texts came to; each a total, or one number a text.

    nats        -log p of the counted tokens (text and end, no prompt), summed
    tokens      how many tokens were counted
    characters  characters of the texts, ends not counted
    """

    nats: float | Sequence[float] | NDArray[np.floating]
    tokens: int | Sequence[int] | NDArray[np.integer]
    characters: int | Sequence[int] | NDArray[np.integer]

    def bits_per_character(self) -> Estimate:
        return ratio(np.asarray(self.nats, dtype=np.float64) / math.log(2), self.characters)

    def nats_per_character(self) -> Estimate:
        return ratio(self.nats, self.characters)

    def nats_per_token(self) -> Estimate:
        return ratio(self.nats, self.tokens)


def distinct(texts: Iterable[str], n: int) -> float | None:
    """Different n-grams of characters over all n-grams, inside texts (Li et al. 2016).

    None when no text has n characters. Falls as the number of texts grows: compare only equal numbers
    of texts of equal lengths.
    """
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def shuffled(texts: Iterable[str], seed: int, keep: str) -> Iterator[str]:
    """Each text with its own characters in random order; those in `keep` (punctuation) stay put."""
    rng = np.random.default_rng(seed)
    for text in texts:
        places = [i for i, c in enumerate(text) if c not in keep]
        result = list(text)
        for place, source in zip(places, rng.permutation(places), strict=True):
            result[place] = text[source]
        yield "".join(result)
