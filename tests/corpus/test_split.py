import numpy as np

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
