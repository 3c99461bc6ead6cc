"""FP8 with block scales: within half a step of the weights, and a fixed point once it was rounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong.numerics.formats import fp8

SIDES = st.one_of(st.integers(1, 20), st.sampled_from([127, 128, 129, 256, 300]))


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Blocks of very different sizes, one of them all zeros."""
    stream = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=stream)
    w *= 10.0 ** torch.randint(-6, 3, (rows, 1), generator=stream)
    w[:128, 128:] = 0
    return w


@given(SIDES, SIDES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_reads_back_within_half_a_step_and_then_stays_the_same(rows, columns, seed):
    w = weights(rows, columns, seed)
    q, scale = fp8.quantise(w)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert scale.shape == (-(-rows // 128), -(-columns // 128))
    back = fp8.dequantise(q, scale)
    # Steps of e4m3: 2^-3 of the number's power of two, and no finer than 2^-9, times the scale.
    s = fp8.spread(scale, rows, columns)
    step = torch.maximum(
        2.0 ** ((w / s).abs().clamp(min=1e-30).log2().floor() - 3), torch.tensor(2.0**-9)
    )
    assert ((back - w).abs() <= step * s * 0.5001).all()
    again, same = fp8.quantise(back)
    assert torch.equal(again.view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(fp8.dequantise(again, same), back)
    assert torch.equal(same, scale)


def test_the_largest_of_every_block_is_448_steps():
    w = weights(256, 200, 1)[:, :128]
    q, scale = fp8.quantise(w)
    assert q.float().abs().view(2, 128, 128).amax((1, 2)).tolist() == [448.0, 448.0]
    assert (scale * 448 >= w.abs().view(2, 128, 128).amax((1, 2))[:, None]).all()


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16])
def test_dequantise_multiplies_each_block_by_its_own_scale(scale):
    q = torch.ones(130, 260).to(torch.float8_e4m3fn)
    scales = torch.arange(1.0, 7).view(2, 3).to(scale)
    w = fp8.dequantise(q, scales)
    assert w[0, 0] == 1 and w[127, 255] == 2 and w[128, 128] == 5 and w[129, 259] == 6
