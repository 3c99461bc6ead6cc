import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong.corpus import split
from tests.corpus.test_dedup import corpus, plain_shingles


def test_parts_have_their_shares_and_depend_on_id_and_seed_alone():
    ids = [f"poem {n}" for n in range(50_000)]
    parts = split.parts(ids, 0, 0.01)
    assert abs((parts == split.VALID).mean() - 0.01) < 0.002
    assert abs((parts == split.TEST).mean() - 0.01) < 0.002
    assert (split.parts(ids[::-1], 0, 0.01)[::-1] == parts).all()
    assert (split.parts(ids, 1, 0.01) != parts).any()


def test_overlaps_equal_the_definition():
    texts = corpus(400, seed=3)
    held, others = texts[::5], [t for n, t in enumerate(texts) if n % 5]
    overlap, whose = split.HeldOut(held).overlaps(others)
    sets = [plain_shingles(text) for text in held]
    for n, text in enumerate(others):
        own = plain_shingles(text)
        expected = [len(own & s) / min(len(own), len(s)) for s in sets]
        assert np.isclose(overlap[n], max(expected))
        assert whose[n] < 0 if max(expected) == 0 else np.isclose(expected[whose[n]], overlap[n])


def test_a_quatrain_inside_a_longer_poem_is_found():
    poem = corpus(1)[0]
    overlap, _ = split.HeldOut([poem[:20]]).overlaps([poem])
    assert overlap[0] == 1


def test_what_is_held_out_of_corpora_of_all_sizes() -> None:
    large = split.share_of(split.SMALL, 0, 40_000_000, cut=True)
    assert large == split.Share(0.01)  # of all that are large enough, whatever they consist of
    assert split.share_of(split.SMALL, 0, 10**9, cut=True).of_all * 10**9 == split.MOST
    for characters in (20_000, 200_000, 1_000_000, 5_000_000):
        share = split.share_of(characters, 10**6, characters, cut=True)
        assert share.piece is None  # of many documents whole ones
        held = share.of_all * characters
        assert held >= min(split.ENOUGH, 0.05 * characters) * 0.999
        few = split.share_of(characters, 50, characters, cut=True)
        assert few.piece is not None and min(1000, characters // 24) <= few.piece <= 4000
        assert split.share_of(characters, 50, characters, cut=False).piece is None


@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=300).map(lambda t: t * 40), max_size=8),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=40)
def test_pieces_are_the_whole_text_in_its_order(texts: list[str], seed: int) -> None:
    share = split.Share(0.2, 1000)
    for text in texts:
        cut = list(split.pieces(text, 1000))
        assert "".join(cut) == text
        assert all(len(piece) <= 2000 for piece in cut)
        assert all(len(piece) >= 500 for piece in cut) or len(cut) == 1
    names = [f"n{i}" for i in range(len(texts))]
    found_names, found, rows = split.in_pieces(names, texts, seed, share)
    assert len(set(found_names)) == len(found_names)
    for row, text in enumerate(texts):
        assert "".join(t for t, r in zip(found, rows, strict=True) if r == row) == text
    # Neighbours of one part are one text: only where the part changes does another begin.
    part = split.parts(found_names, seed, 0.2)
    for i in range(1, len(rows)):
        assert rows[i] != rows[i - 1] or part[i] != part[i - 1]


def test_lines_stay_whole() -> None:
    text = "".join(f"line {number} of a text that has many of them\n" for number in range(300))
    assert all(piece.endswith("\n") for piece in split.pieces(text, 1000))


def test_of_a_tiny_corpus_something_is_held_out_for_either_purpose():
    for characters, records in ((2_500, 1), (12_000, 1), (22_000, 10), (60_000, 3)):
        share = split.share_of(characters, records, characters, cut=True)
        text = "x" * 79 + "\n"
        whole = text * (characters // records // 80)
        for seed in range(20):
            names = [n for r in range(records) for n in split.names_of_pieces(f"{r}", whole, share)]
            part = split.parts(names, seed, split.enough(share, names, seed).of_all)
            assert (part == split.VALID).any() and (part == split.TEST).any()
            assert (part == split.TRAIN).mean() > 0.2
