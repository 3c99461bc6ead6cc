"""Pages: names mean text, nothing is lost, the longest unused goes first."""

from __future__ import annotations

import random

from shenhong.engine.cache import Pages, chain


def test_a_name_means_the_whole_text_before_it():
    a = chain(b"", [1, 2])
    assert a == chain(b"", [1, 2]) != chain(b"", [2, 1])
    assert chain(a, [3, 4]) != chain(chain(b"", [9, 9]), [3, 4])


def test_random_use_loses_nothing():
    pick, pages = random.Random(1), Pages(12)
    held: list[int] = []
    for step in range(5000):
        kind = pick.random()
        if kind < 0.4 and pages.free:
            held.append(pages.take())
        elif kind < 0.55 and held:
            pages.name(pick.choice(held), bytes([pick.randrange(20)]))
        elif kind < 0.7:
            found = pages.find(bytes([pick.randrange(20)]))
            if found is not None:
                pages.hold(found)
                held.append(found)
        elif held:
            pages.release(held.pop(pick.randrange(len(held))))
        assert [held.count(page) for page in range(12)] == pages.holders, step
        assert pages.free == 12 - len(set(held))
        assert {pages.page_of[name]: name for name in pages.page_of} == pages.name_of
        assert set(pages.idle) <= set(pages.name_of) and not set(pages.blank) & set(pages.name_of)


def test_the_longest_unused_goes_first_and_blank_pages_before_it():
    pages = Pages(3)
    a, b = pages.take(), pages.take()
    pages.name(a, b"a")
    pages.name(b, b"b")
    pages.release(a)
    pages.release(b)
    c = pages.take()
    assert c not in (a, b) and pages.find(b"a") == a
    pages.hold(a)
    pages.release(a)
    assert pages.take() == b and pages.find(b"b") is None and pages.find(b"a") == a
