"""How long measuring a finished model will take, so that training can leave the time for it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from shenhong.evaluate.ngram import NGram
from shenhong.evaluate.settings import EvaluateSettings

_SAMPLE = 300_000  # characters of which an n-gram is built, to see how fast this machine is
# Beside a small n-gram of the same number of characters; sorting much takes longer than sorting little.
_LARGE_NGRAM, _COPIES = 1.6, 1.2
_ALWAYS = 4.0  # seconds: the finished folder, reading, the report


def seconds(
    settings: EvaluateSettings,
    sample: Sequence[str],
    training_characters: int,
    test_tokens: int,
    seconds_a_token: float,
    answers_seconds: float,
) -> float:
    """Estimated from the sizes and from what was measured here.

    sample            some texts of the corpus, which are timed with
    seconds_a_token   of the model on given text
    answers_seconds   of writing all the answers that are measured
    """
    timed: list[str] = []
    for text in sample:
        timed.append(text[:_SAMPLE])
        if sum(map(len, timed)) >= _SAMPLE:
            break
    begin = time.perf_counter()
    NGram(timed, settings.ngram_order)
    a_character = (time.perf_counter() - begin) / max(1, sum(map(len, timed)))
    # One of the text the model saw, at most as long as all of it; unigrams cost next to nothing.
    counted = 2 * min(training_characters, settings.ngram_characters)
    compared = training_characters if settings.titles else 0
    return (
        _ALWAYS
        + test_tokens * seconds_a_token
        + (_LARGE_NGRAM * counted + _COPIES * compared) * a_character
        + answers_seconds
    )
