"""Muon's arithmetic: Nesterov momentum, Newton-Schulz orthogonalisation, decayed update. No gradients flow here.

One quintic iteration is X <- a X + (b G + c G^2) X with G = X X^T (Keller Jordan, Muon, 2024). Here it is P X with
P = a I + b G + c G^2: two of its three products are on the smaller side only, and nothing is added to X afterwards.
The iterations differ: each is the minimax quintic for the interval the one before leaves (Polar Express, Amsel et al.,
arXiv 2505.16932, theorem 3.1), so that three do what five equal ones do.
A matrix with more rows than columns is multiplied from the right (G = X^T X, X P) instead of being transposed.

Shapes: B matrices of a batch, A rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shenhong.numerics.cpu.native import call, fast

# For singular values in [SMALLEST, LARGEST], which come out within 0.094 of one; rounding may leave the largest a
# little above one. Smaller ones are mostly noise of the batch and stay below one.
SMALLEST, LARGEST = 0.0204, 1.02
COEFFICIENTS = (
    (7.5598, -20.8383, 14.7170),
    (3.2153, -2.4112, 0.5013),
    (2.2183, -1.5940, 0.4107),
)


def _whole(*tensors: Tensor) -> bool:
    return all(t.is_contiguous() for t in tensors)


@torch.no_grad()
def nesterov_(momentum: Tensor, grad: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """momentum <- beta momentum + grad, in place; returns grad + beta momentum in `dtype`. Both inputs fp32."""
    if fast(momentum, grad) and momentum.dtype == torch.float32 and _whole(momentum, grad):
        update = torch.empty(grad.shape, dtype=dtype)
        args = (grad, momentum, update, grad.numel(), beta, torch.get_num_threads())
        call("shenhong_nesterov", dtype, *args)
        return update
    momentum.mul_(beta).add_(grad)
    return grad.add(momentum, alpha=beta).to(dtype)


@torch.no_grad()
def decayed_add_(weight: Tensor, update: Tensor, decay: float, rate: float) -> None:
    """weight <- (1 - decay) weight - rate update, in place; weight fp32, update in any dtype."""
    if fast(weight) and fast(update) and weight.dtype == torch.float32 and _whole(weight, update):
        args = (weight, update, weight.numel(), 1 - decay, rate, torch.get_num_threads())
        call("shenhong_decayed_add", update.dtype, *args)
        return
    weight.mul_(1 - decay).add_(update.to(weight.dtype), alpha=-rate)


def _normalise(g_BAC: Tensor) -> Tensor:
    if fast(g_BAC):
        out = torch.empty_like(g_BAC)
        size = g_BAC[0].numel()
        call(
            "shenhong_normalise", g_BAC.dtype, g_BAC, out, len(g_BAC), size, torch.get_num_threads()
        )
        return out
    return g_BAC / (g_BAC.flatten(1).float().norm(dim=1) + 1e-7).to(g_BAC.dtype)[:, None, None]


def _polynomial_(gram: Tensor, square: Tensor, a: float, b: float, c: float) -> None:
    """square <- a I + b gram + c square."""
    if fast(gram):
        args = (gram, square, len(gram), gram.shape[1], a, b, c, torch.get_num_threads())
        call("shenhong_polynomial", gram.dtype, *args)
        return
    square.mul_(c).add_(gram, alpha=b).diagonal(dim1=1, dim2=2).add_(a)


@torch.no_grad()
def newton_schulz(g_BAC: Tensor, scale: float = 1.0) -> Tensor:
    """`scale` times the approximate orthogonal factor of each matrix: singular values pushed to within 0.1 of one.

    Computes in g's dtype; bfloat16 is enough. g is left as it was.
    """
    x, spare = _normalise(g_BAC.contiguous()), torch.empty_like(g_BAC)
    tall = g_BAC.shape[1] > g_BAC.shape[2]
    side = min(g_BAC.shape[1:])
    gram, square = g_BAC.new_empty(2, len(g_BAC), side, side)
    for step, coefficients in enumerate(COEFFICIENTS):
        torch.bmm(x.mT if tall else x, x if tall else x.mT, out=gram)
        torch.bmm(gram, gram, out=square)
        factor = scale if step == len(COEFFICIENTS) - 1 else 1.0
        a, b, c = (factor * value for value in coefficients)
        _polynomial_(gram, square, a, b, c)
        torch.bmm(x if tall else square, square if tall else x, out=spare)
        x, spare = spare, x
    return x
