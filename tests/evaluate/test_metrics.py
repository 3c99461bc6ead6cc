import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shenhong.evaluate.copying import copies, summarise
from shenhong.evaluate.metrics import ScoredText, distinct, mean, ratio, shuffled


def test_bits_per_character_and_per_token_are_kept_apart():
    scored = ScoredText(nats=[8 * math.log(2), 4 * math.log(2)], tokens=[2, 1], characters=[4, 4])
    assert scored.bits_per_character().value == pytest.approx(1.5)
    assert scored.nats_per_character().value == pytest.approx(1.5 * math.log(2))
    assert scored.nats_per_token().value == pytest.approx(4 * math.log(2))
    assert ScoredText(12.0, 3, 8).bits_per_character().error is None


def test_errors_shrink_with_the_square_root():
    rng = np.random.default_rng(0)
    values = rng.normal(size=4000)
    assert mean(values).error == pytest.approx(1 / math.sqrt(4000), rel=0.1)
    weights = rng.uniform(5, 15, 4000)
    repeated = [ratio(rng.normal(2 * weights[:200], 1), weights[:200]).value for _ in range(400)]
    assert ratio(rng.normal(2 * weights[:200], 1), weights[:200]).error == pytest.approx(
        float(np.std(repeated)), rel=0.3
    )


def test_nothing_measured_is_no_number():
    assert mean([]).to_json() == {"value": None, "error": None, "count": 0}
    assert distinct(["a"], 2) is None


def test_distinct():
    assert distinct(["aab", "aab"], 1) == pytest.approx(2 / 6)
    assert distinct(["aab", "aab"], 2) == pytest.approx(2 / 4)


@given(st.lists(st.text(alphabet="ab，c", max_size=20), max_size=5), st.integers(0, 9))
def test_shuffling_keeps_characters_and_marks(texts, seed):
    for before, after in zip(texts, shuffled(texts, seed, keep="，"), strict=True):
        assert sorted(before) == sorted(after)
        assert [i for i, c in enumerate(before) if c == "，"] == [
            i for i, c in enumerate(after) if c == "，"
        ]
    assert list(shuffled(texts, seed, "，")) == list(shuffled(texts, seed, "，"))


def longest_common(text, training):
    best = 0
    for i in range(len(text)):
        while any(text[i : i + best + 1] in other for other in training) and i + best < len(text):
            best += 1
    return best


@given(
    st.lists(st.text(alphabet="ab\0，", max_size=14), min_size=1, max_size=5),
    st.lists(st.text(alphabet="ab\0，", max_size=14), max_size=5),
)
def test_longest_runs_equal_brute_force(texts, training):
    # A zero character is a text end to the search, so none may run across one.
    found = copies(texts, training)
    for text, copy in zip(texts, found, strict=True):
        parts = [part for other in training for part in other.split("\0")]
        assert len(copy.run) == max(longest_common(part, parts) for part in text.split("\0"))
        assert copy.run in text and (not copy.run or any(copy.run in part for part in parts))


def test_copied_lines():
    training = ["白日依山尽，黄河入海流。", "two words here. and more of it"]
    found = copies(["黄河入海流，白日依山近。", "so, two words here! ab, ab"], training)
    assert found[0].copied == [True, False] and found[1].copied == [True]
    summary = summarise(found)
    assert summary["lines_copied"]["value"] == pytest.approx(2 / 3)
    assert (
        summary["longest_run"] == len("two words here")
        and summary["longest_run_text"] == "two words here"
    )
    assert summary["examples"] == ["黄河入海流", "two words here"]


def test_copying_of_nothing():
    assert summarise(copies([], ["a"]))["longest_run"] == 0
    assert summarise(copies([""], []))["lines_copied"]["value"] is None
