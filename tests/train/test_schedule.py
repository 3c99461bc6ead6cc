from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shenhong.train.schedule import rate


@given(steps=st.integers(1, 5000), warmup=st.floats(0, 0.9))
def test_rises_once_then_falls_to_just_above_zero(steps, warmup):
    rates = [rate(step, steps, warmup) for step in range(steps)]
    peak = rates.index(max(rates))
    assert max(rates) <= 1 + 1e-12 and min(rates) > 0
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a > b for a, b in pairwise(rates[peak + 1 :]))
    if steps > 10 * max(1, warmup * steps):
        assert rates[-1] < 2 / steps + 0.12
