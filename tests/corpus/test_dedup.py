import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong.corpus import dedup, shingles

texts_strategy = st.lists(
    st.text("白日依山尽黄河入海流，。 abc", max_size=24), min_size=1, max_size=20
)


def plain_shingles(text):
    """The definition, for one text, without arrays."""
    letters = [c for c in text.lower() if c.isalnum()]
    chinese = sum("\u3400" <= c <= "\u9fff" for c in letters)
    if chinese >= 0.3 * len(letters):
        units, size = letters, 3
    else:
        units, size = "".join(c if c.isalnum() else " " for c in text.lower()).split(), 5
    if not units:
        return set()
    return {tuple(units[i : i + size]) for i in range(max(1, len(units) - size + 1))}


@given(texts_strategy)
@settings(max_examples=150, deadline=None)
def test_shared_shingles_equal_the_definition(texts):
    flat, offsets = shingles.shingles(texts)
    keys = shingles.sets(flat, offsets, np.arange(len(texts)))
    expected = [plain_shingles(text) for text in texts]
    assert shingles.sizes(keys, len(texts)).tolist() == [len(s) for s in expected]
    left, right = np.divmod(np.arange(len(texts) ** 2), len(texts))
    if len(keys):
        common = shingles.shared(keys, left, right, len(texts))
        pairs = zip(left, right, strict=True)
        assert common.tolist() == [len(expected[a] & expected[b]) for a, b in pairs]


@given(st.text("ab 白日，。", max_size=20), st.text("ab 白日，。", max_size=20))
@settings(max_examples=200, deadline=None)
def test_digests_are_equal_exactly_for_equal_letters(a, b):
    first, second = shingles.digests([a, b])
    same = [c for c in a if c.isalnum()] == [c for c in b if c.isalnum()]
    assert (first == second) == same


def corpus(count=600, seed=0):
    """Poems over 300 characters; every third is a copy of an earlier one with 1 to 12 changes."""
    rng = np.random.default_rng(seed)
    poems = []
    for n in range(count):
        poem = rng.integers(0, 300, 56)
        if n % 3 == 2:
            poem = poems[rng.integers(n)].copy()
            poem[rng.choice(56, rng.integers(1, 13), replace=False)] = rng.integers(0, 300)
        poems.append(poem)
    return ["".join(chr(0x4E00 + c) for c in poem) for poem in poems]


def found(texts, order, threshold=0.6):
    texts = [texts[i] for i in order]
    keys = dedup.band_keys(*shingles.shingles(texts))
    rank = np.array(order)
    live = np.ones(len(texts), bool)
    near, _ = dedup.near(keys, rank, live, threshold, lambda r: [texts[i] for i in r])
    return {int(rank[i]): int(rank[near[i]]) for i in np.flatnonzero(near >= 0)}


def test_near_duplicates_are_those_of_the_definition_and_do_not_depend_on_order():
    texts = corpus()
    sets = [plain_shingles(text) for text in texts]
    expected: set[int] = set()
    for later in range(len(texts)):
        for earlier in range(later):
            common = len(sets[earlier] & sets[later])
            union = len(sets[earlier] | sets[later])
            if earlier not in expected and common >= 0.6 * union:
                expected.add(later)
                break
    straight = found(texts, np.arange(len(texts)))
    assert found(texts, np.random.default_rng(1).permutation(len(texts))) == straight
    assert len(expected) > 60
    assert len(expected - set(straight)) <= 0.02 * len(expected)  # MinHash may miss one
    for later, earlier in straight.items():
        assert earlier < later and earlier not in straight
        shared, union = sets[earlier] & sets[later], sets[earlier] | sets[later]
        assert len(shared) >= 0.6 * len(union)


def test_a_group_of_any_size_leaves_one():
    texts = ["白日依山尽黄河入海流欲穷千里目更上一层楼"] * 500
    assert set(found(texts, np.arange(500)).values()) == {0}
    assert len(found(texts, np.arange(500))) == 499


def test_exact_duplicates_keep_the_first_id():
    repeated = dedup.exact(np.array([7, 5, 7, 5, 7], np.uint64), np.array([2, 0, 1, 3, 4]))
    assert repeated.tolist() == [2, -1, -1, 1, 2]


def test_vowel_signs_belong_to_their_letters():
    assert len(set(shingles.digests(["किताब", "कुतब", "कताबी", "किताब।"]))) == 3
    _, offsets = shingles.shingles(["हिन्दी में लिखा हुआ एक छोटा वाक्य"])
    assert np.diff(offsets).tolist() == [3]  # runs of 5 among 7 words
