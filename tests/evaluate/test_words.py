"""What the numbers of a run mean, in words."""

from __future__ import annotations

import pytest

from shenhong.evaluate import words


def look(step: int, nats: float) -> dict[str, float]:
    return {"step": step, "nats_per_token": nats}


def test_a_model_that_training_made_better_and_one_that_it_did_not() -> None:
    better = words.continued([look(0, 2.738), look(5, 2.8), look(10, 2.6), look(15, 2.65)])
    assert better is not None and "3.950 bits per token before" in better and "3.751" in better
    assert "5.0% less" in better
    worse = words.continued([look(0, 2.738), look(10, 2.925)])
    assert worse is not None and "training made nothing better" in worse
    assert words.continued([look(10, 3.0), look(20, 2.0)]) is None  # it began with random weights
    assert words.continued([look(0, 3.0)]) is None
    assert words.continued([]) is None


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ({"epochs": 4.0, "steps_that_fit": 900}, "too little text"),
        ({"epochs": 0.12}, "has read only 12% of the text"),
        ({"epochs": 2.0}, "too few steps"),
        ({}, "too few steps"),
    ],
)
def test_why_an_ngram_foretells_better(plan: dict[str, float], why: str) -> None:
    rival = {"order": 5, "bits_per_character": {"value": 2.09}}
    said = words.beside_ngram(2.62, rival, plan)
    assert said is not None and why in said and "5-gram" in said and "2.090" in said
    assert words.beside_ngram(2.0, rival, plan) is None


def test_what_is_no_number_says_nothing() -> None:
    assert words.beside_ngram(2.0, {"order": 5}, {}) is None
    assert words.beside_ngram(float("nan"), {"bits_per_character": {"value": 1.0}}, {}) is None
    assert words.continued([look(0, float("nan")), look(1, 2.0)]) is None
