"""Muon's arithmetic against its formulas, with and without kernels. Shapes: B matrices, A rows, C columns."""

import pytest
import torch

from shenhong import numerics
from shenhong.numerics import muon


@pytest.fixture(params=[True, False], autouse=True)
def kernels(request):
    numerics.use_kernels(request.param)
    yield
    numerics.use_kernels(True)


@pytest.mark.parametrize("shape", [(3, 20, 33), (2, 40, 17), (1, 16, 16), (1, 1, 5)])
def test_newton_schulz_follows_the_quintic(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    before = g.clone()
    ours = muon.newton_schulz(g, scale=1.5)
    x = g.double() / g.double().norm(dim=(1, 2), keepdim=True)
    for a, b, c in muon.COEFFICIENTS:
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    torch.testing.assert_close(ours, (1.5 * x).float(), rtol=1e-3, atol=1e-4)
    assert g.equal(before)


def test_newton_schulz_in_bf16_is_nearly_orthogonal():
    torch.manual_seed(0)
    ours = muon.newton_schulz(torch.randn(4, 64, 96).bfloat16())
    values = torch.linalg.svdvals(ours.float())
    assert values.min() > 0.85 and values.max() < 1.15


def test_the_quintics_take_singular_values_to_one():
    x = torch.linspace(muon.SMALLEST, muon.LARGEST, 10_001, dtype=torch.float64)
    small = torch.linspace(0, muon.SMALLEST, 1001, dtype=torch.float64)
    for a, b, c in muon.COEFFICIENTS:
        x, small = (a * v + b * v**3 + c * v**5 for v in (x, small))
    assert (x - 1).abs().max() < 0.095
    assert small.min() >= 0 and small.max() < 1.01


def test_one_direction_alone_stays_bounded_in_bf16():
    torch.manual_seed(0)
    g = torch.randn(8, 128, 1) * torch.randn(8, 1, 256)
    values = torch.linalg.svdvals(muon.newton_schulz(g.bfloat16()).float())
    assert values[:, 0].sub(1).abs().max() < 0.15 and values[:, 1].max() < 0.7


def test_newton_schulz_takes_views():
    torch.manual_seed(0)
    wide = torch.randn(2, 10, 12)
    view = wide[:, 2:8]
    torch.testing.assert_close(muon.newton_schulz(view), muon.newton_schulz(view.clone()))


@pytest.mark.parametrize("size", [1, 16, 1003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_and_decay(size, dtype):
    torch.manual_seed(size)
    momentum, grad, weight = torch.randn(3, size)
    expected_momentum = 0.9 * momentum + grad
    expected_update = grad + 0.9 * expected_momentum
    expected_weight = 0.95 * weight - 0.3 * expected_update
    update = muon.nesterov_(momentum, grad, 0.9, dtype)
    muon.decayed_add_(weight, update, 0.05, 0.3)
    assert update.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(momentum, expected_momentum)
    torch.testing.assert_close(update.float(), expected_update, rtol=bound, atol=bound)
    torch.testing.assert_close(weight, expected_weight, rtol=bound, atol=bound)
