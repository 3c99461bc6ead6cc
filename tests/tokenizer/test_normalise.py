import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shenhong.tokenizer.normalise import normalise, simplify, unify
from shenhong.tokenizer.variants import VARIANTS
from tests.growth import LINEAR, growth

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
chinese = st.text(st.characters(min_codepoint=0x3400, max_codepoint=0x9FFF), max_size=60)


@given(any_text | chinese)
def test_normalise_is_idempotent_and_nfc(text):
    once = unify(text)
    assert unify(once) == once
    assert unicodedata.is_normalized("NFC", once)


# OpenCC simplifies 薴 to 苧 and 苧 (another plant) to 苎; and 颮 to 飑, a variant of 飙 in old texts.
settled = st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF, exclude_characters="薴颮")


@given(st.text(settled, max_size=60))
def test_simplified_text_stays_as_it_is(text):
    once = normalise(text)
    assert normalise(once) == once


@given(any_text | chinese)
def test_simplified_text_is_as_long_as_its_original(text):
    assert len(simplify(text)) == len(text)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("\uf92c\uf9dc", "郎隆"),  # compatibility ideographs
        ("e\u0301", "é"),
        ("白日，依山！？（盡）。", "白日，依山！？（尽）。"),  # full-width marks stay
        ("乾坤", "乾坤"),  # by phrase
        ("乾燥", "干燥"),
        ("烟却羣爲", "烟却群为"),
        ("隠髙逺", "隐高远"),  # variants that OpenCC does not know
        ("a\r\nb\rc\x00\ufeff \n\n\n\nd  ", "a\nb\nc\n\nd"),
        ("plain English", "plain English"),
    ],
)
def test_examples(raw, expected):
    assert normalise(raw) == expected


def test_variants_are_pairs_of_different_characters_without_chains():
    assert len(VARIANTS) > 300
    for variant, standard in VARIANTS.items():
        assert len(variant) == len(standard) == 1 and variant != standard
        assert standard not in VARIANTS, (variant, standard)


MARKS = "".join(chr(c) for c in range(0x110000) if unicodedata.combining(chr(c)))


@given(st.text(st.sampled_from(MARKS + "\u0f73\u0f75\u0f81\u0344ǘ≠e漢…"), min_size=32))
def test_long_runs_of_marks_are_put_into_the_order_of_nfc(text):
    assert unify(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "piece",
    [" ", "\u3000", "\t ", "\u0301\u0316", "\u0f73", "e\u0301\u0316\u0301", "\n", " \n", "…—"],
)
def test_hostile_runs_take_time_as_their_length(piece):
    assert growth(normalise, lambda n: "a" + piece * n + "b", 1500) < LINEAR
