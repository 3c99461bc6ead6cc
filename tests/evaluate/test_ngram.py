import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong.evaluate.ngram import NGram, _sort, discounts

small_texts = st.lists(st.text(alphabet="abc山水，", max_size=12), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(small_texts, st.integers(1, 5), st.text(alphabet="abc山水，未z", max_size=7))
def test_probabilities_sum_to_one_after_any_context(texts, order, context):
    model = NGram(texts, order)
    outcomes, probabilities = model.distribution(context)
    assert len(outcomes) == model.outcomes == len(set("".join(texts))) + 2
    assert probabilities.min() > 0
    assert probabilities.sum() == pytest.approx(1, abs=2e-6)


def test_probabilities_sum_to_one_with_measured_discounts():
    """A text large enough that the discounts are not the fallback."""
    rng = np.random.default_rng(0)
    letters = [chr(0x4E00 + i) for i in range(300)]
    texts = ["".join(letters[int(300 * u**4)] for u in rng.random(40)) for _ in range(400)]
    model = NGram(texts, 5)
    for context in ("", texts[0][:1], texts[0][:2], texts[1][:6], texts[2], "未" + texts[3][:3]):
        assert model.distribution(context)[1].sum() == pytest.approx(1, abs=2e-6)


class Plain:
    """The same model in dictionaries, straight from the equations."""

    def __init__(self, texts, order):
        self.order = order
        raw = Counter()
        left = defaultdict(set)
        for text in texts:
            symbols = ["<s>", *text, "</s>"]
            for n in range(1, order + 1):
                for i in range(len(symbols) - n + 1):
                    gram = tuple(symbols[i : i + n])
                    if gram == ("<s>",):
                        continue
                    raw[gram] += 1
                    if i > 0:
                        left[gram].add(symbols[i - 1])
        self.counts = [
            {
                gram: count if n == order or gram[0] == "<s>" else len(left[gram])
                for gram, count in raw.items()
                if len(gram) == n
            }
            for n in range(1, order + 1)
        ]
        self.discounts = [discounts(np.array(list(c.values()))) for c in self.counts]
        self.vocabulary = len(set("".join(texts))) + 2

    def probability(self, context, symbol):
        if not context and self.order < 1:
            return 1 / self.vocabulary
        return self._level(tuple(context[max(0, len(context) - self.order + 1) :]), symbol)

    def _level(self, context, symbol):
        lower = self._level(context[1:], symbol) if context else 1 / self.vocabulary
        counts = self.counts[len(context)]
        followers = {g: c for g, c in counts.items() if g[:-1] == context}
        total = sum(followers.values())
        if not total:
            return lower
        d = (0.0, *self.discounts[len(context)])
        held = sum(d[min(c, 3)] for c in followers.values())
        count = followers.get((*context, symbol), 0)
        return (count - d[min(count, 3)]) / total + held / total * lower


@settings(max_examples=40, deadline=None)
@given(
    small_texts, st.integers(1, 4), st.lists(st.text("abc山未", max_size=8), min_size=1, max_size=3)
)
def test_equals_the_equations(texts, order, held_out):
    model, plain = NGram(texts, order), Plain(texts, order)
    known = set("".join(texts))
    expected = []
    for text in held_out:
        symbols = ["<s>", *(c if c in known else "<unk>" for c in text), "</s>"]
        expected.append(
            -sum(math.log2(plain.probability(symbols[:i], symbols[i])) for i in range(1, len(symbols)))
        )  # fmt: skip
    assert model.bits(held_out) == pytest.approx(expected, rel=1e-5)


def test_a_unigram_by_hand():
    # Counts a, b and end 1 each, fallback D1 = 1/2: (1 - 1/2) / 3 + 1/2 * 1/4 for each of them.
    outcomes, probabilities = NGram(["ab"], 1).distribution("")
    assert dict(zip(outcomes, probabilities, strict=True)) == pytest.approx(
        {"a": 7 / 24, "b": 7 / 24, "": 7 / 24, "\uffff": 3 / 24}
    )


def test_discounts_of_chen_and_goodman():
    counts = np.repeat([1, 2, 3, 4], [40, 20, 10, 6])
    y = 40 / 80
    assert discounts(counts) == pytest.approx(
        (1 - 2 * y * 20 / 40, 2 - 3 * y * 10 / 20, 3 - 4 * y * 6 / 10)
    )


def test_bits_per_character_counts_the_end_in_the_bits_alone():
    model = NGram(["ab", "ba"], 3)
    texts = ["ab", "a"]
    log2, lengths = model.log2_probabilities(texts)
    assert lengths.tolist() == [3, 2]
    assert model.bits(texts).sum() == pytest.approx(-log2.sum())
    assert model.bits_per_character(texts) == pytest.approx(-log2.sum() / 3)


def test_context_helps_and_does_not_cross_texts():
    texts = ["abcabc"] * 5 + ["cab"]
    assert NGram(texts, 5).bits_per_character(texts) < NGram(texts, 1).bits_per_character(texts)
    # The same texts in another order are the same model.
    one, two = NGram(texts, 4), NGram(texts[::-1], 4)
    assert one.bits(["abca", "b"]) == pytest.approx(two.bits(["abca", "b"]))


def test_unknown_characters_are_counted():
    assert NGram(["ab"], 2).unknown_share(["az", "zz"]) == 0.75
    with pytest.raises(ValueError):
        NGram([], 2)


def test_both_ways_of_sorting_agree():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 1000, 5000).astype(np.uint64)
    for bound in (1000, 2**63):
        ordered, order = _sort(keys.copy(), bound)
        assert ordered.tolist() == sorted(keys.tolist())
        assert keys[order].tolist() == ordered.tolist()
        assert sorted(order.tolist()) == list(range(5000))
