"""How far rounding alone may carry a result: Monte Carlo arithmetic (Parker 1997), by disturbing PyTorch's own.

A kernel and its reference never agree to the bit, and how much they may differ follows from the arithmetic: the unit
roundoff of what products read, the length of the sums, and what the function makes of both (a softmax between two keys
that are nearly alike makes much of it). So the reference is computed once exactly, in float64, and then a few times
with every result off by at most what rounding could have done to it; how far those lie apart is the measure.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
POINTWISE = {aten.add, aten.sub, aten.mul, aten.div, aten.pow, aten.mean, aten.sum}
POINTWISE |= {aten.rsqrt, aten.sigmoid, aten.silu, aten._softmax}

SINGLE = torch.finfo(torch.float32).eps / 2  # unit roundoff of sums and of what is between products
DRAWS = 8  # so many disturbed results tell the spread well enough
SAFE = 8.0  # times the spread: even of a single number (Student's t of so many draws) beyond it once in twenty thousand


class Rounding(TorchDispatchMode):
    """Inside of it results of floating point are disturbed as kernels round: products read numbers of ``dtype`` and sum
    in float32, everything between them is float32. Where the reference itself goes to float32, so do kernels."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        self.unit = torch.finfo(dtype).eps / 2
        self.stream = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = func.overloadpacket
        if isinstance(result, Tensor) and result.is_floating_point():
            if kind in PRODUCTS:
                self._disturb(result, self._product(args[-2], args[-1], result))
            elif kind in POINTWISE:
                self._disturb(result, result.abs() * SINGLE)
        return result

    def _product(self, x: Tensor, y: Tensor, result: Tensor) -> Tensor:
        """Both factors rounded, and a sum of so many terms: partial sums grow as a random walk, or with the result."""
        read = self.unit if result.dtype == torch.float64 else SINGLE
        summed = SINGLE * x.shape[-1] ** 0.5
        walk = (x.float().square() @ y.float().square()).sqrt_()
        return walk.mul_(2**0.5 * read + summed).add_(result.abs() * summed)

    def _disturb(self, result: Tensor, most: Tensor) -> None:
        noise = torch.empty(result.shape).uniform_(-1, 1, generator=self.stream)
        result.add_(noise.mul_(most))


def excess(found_ND: Tensor, exact_ND: Tensor, disturbed_MND: Tensor) -> tuple[float, float]:
    """Of the row that is furthest beyond what rounding explains: its distance from the exact one and the distance that
    is allowed, both as shares of the exact row's length. Rows that are not finite even exactly say nothing."""
    exact = exact_ND.double()
    size = exact.norm(dim=-1)
    spread = (disturbed_MND.double() - exact).square().sum(-1).mean(0).sqrt()
    off = (found_ND.double() - exact).norm(dim=-1).nan_to_num(nan=torch.inf)
    known = (size + spread).isfinite()
    if not known.any():
        return 0.0, 0.0
    off, allowed = off[known] / size[known], SAFE * spread[known] / size[known]
    worst = int((off - allowed).argmax())
    return off[worst].item(), allowed[worst].item()
