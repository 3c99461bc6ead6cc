"""What rounding is said to explain, against what it really does: products and sums of float32 and bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shenhong.numerics.rounding import DRAWS, SAFE, Rounding, excess


def spread(function, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The exact result and the disturbed ones."""
    exact = function(x.double())
    with Rounding(dtype):
        disturbed = function(x.double().repeat(DRAWS, 1))
    return exact, disturbed.unflatten(0, (DRAWS, -1))


@pytest.mark.parametrize("length", [8, 300, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_as_it_is_rounded(length: int, dtype: torch.dtype) -> None:
    """Of the order of what really happens: neither a bound nobody could miss nor one that is met by chance."""
    stream = torch.Generator().manual_seed(length)
    weight = torch.randn(64, length, generator=stream).to(dtype)
    x = torch.randn(20, length, generator=stream)
    exact, disturbed = spread(lambda x: F.linear(x, weight.double()), x, dtype)
    total = torch.zeros(20, 64)  # one term after the other, as kernels do
    for column, row in zip(x.to(dtype).float().T, weight.float().T, strict=True):
        total += column[:, None] * row
    off, allowed = excess(total, exact, disturbed)
    assert allowed / 100 < off < allowed


def test_the_bound_grows_with_the_length_of_sums_and_the_unit_of_the_dtype() -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for length in (64, 6400):
            x = torch.randn(20, length, generator=torch.Generator().manual_seed(1))
            weight = torch.randn(64, length, generator=torch.Generator().manual_seed(2)).double()
            exact, disturbed = spread(lambda x, w=weight: F.linear(x, w), x, dtype)
            found[dtype, length] = excess(exact, exact, disturbed)[1] / SAFE
    assert found[torch.float32, 6400] == pytest.approx(10 * found[torch.float32, 64], rel=0.3)
    rounded = (
        2**0.5 * 2**-8 * 3**-0.5
    )  # two factors, evenly spread over the unit roundoff; sums add little
    for length in (64, 6400):
        assert found[torch.bfloat16, length] == pytest.approx(rounded, rel=0.25)


def test_what_moves_numbers_disturbs_none_and_a_softmax_between_near_keys_much() -> None:
    moved = spread(lambda x: x[:, [1, 0]].flip(1).repeat(1, 2), torch.randn(1, 8), torch.bfloat16)
    assert all(row.equal(moved[0]) for row in moved[1])
    keys = torch.tensor([[1.0, 1.0], [1.0, 1.01]]).double()
    for scale, low, high in ((40, 0.05, 10), (0.04, 1e-5, 1e-2)):
        exact, disturbed = spread(
            lambda x, s=scale: (x @ keys.T * s).softmax(-1), torch.ones(4, 2), torch.bfloat16
        )
        assert low < excess(exact, exact, disturbed)[1] < high


def test_numbers_that_are_none_are_off_but_not_where_they_are_due() -> None:
    one = torch.ones(2, 3)
    assert excess(one * torch.nan, one, one[None].repeat(DRAWS, 1, 1))[0] == torch.inf
    assert excess(one, one * torch.nan, one[None].repeat(DRAWS, 1, 1)) == (0.0, 0.0)
