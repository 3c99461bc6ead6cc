"""How far rounding alone may carry a result: Monte Carlo arithmetic (Parker 1997), by disturbing PyTorch's own.

A kernel and its reference never agree to the bit, and how much they may differ follows from the arithmetic: the unit
roundoff of what products read, the length of the sums, and what the function makes of both (a softmax between two keys
that are nearly alike makes much of it). So the reference is computed once exactly, in float64, and then a few times
with every result off by at most what rounding could have done to it; how far those lie apart is the measure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
POINTWISE = {aten.add, aten.sub, aten.mul, aten.div, aten.pow, aten.mean, aten.sum}
POINTWISE |= {aten.rsqrt, aten.sigmoid, aten.silu, aten._softmax}

PART = 1 << 18  # numbers of a matrix that are widened at a time
SINGLE = torch.finfo(torch.float32).eps / 2  # unit roundoff of sums and of what is between products
DRAWS = 8  # so many disturbed results tell the spread well enough
SAFE = 8.0  # times the spread: even of a single number (Student's t of so many draws) beyond it once in twenty thousand


class Exact(TorchDispatchMode):
    """Inside of it float64 is multiplied with weights as they are stored, widened a part at a time: a whole layer in
    float64 would be many times the model's own size."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is aten.mm and args[0].dtype == torch.float64 != args[1].dtype:
            x, y = args
            return _by_columns(x, y, lambda x, part: x @ part.double())
        return func(*args, **(kwargs or {}))


class Rounding(Exact):
    """Inside of it results of floating point are disturbed as kernels round: products read numbers of ``dtype`` and sum
    in float32, everything between them is float32. Where the reference itself goes to float32, so do kernels."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        self.unit = torch.finfo(dtype).eps / 2
        self.stream = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
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
        walk = _by_columns(x.float().square(), y, lambda a, b: a @ b.float().square()).sqrt_()
        return walk.mul_(2**0.5 * read + summed).add_(result.abs() * summed)

    def _disturb(self, result: Tensor, most: Tensor) -> None:
        noise = torch.empty(result.shape).uniform_(-1, 1, generator=self.stream)
        result.add_(noise.mul_(most))


def _by_columns(x: Tensor, y: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The product of x with all of y, of which a part is worked on at a time."""
    columns = max(1, PART // y.shape[-2])
    whole = x.new_empty(
        (*x.shape[:-1], y.shape[-1])
    )  # before the parts, so that their memory is in one piece
    for start in range(0, y.shape[-1], columns):
        part = y[..., start : start + columns]
        whole[..., start : start + columns] = product(x, part)
    return whole


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
