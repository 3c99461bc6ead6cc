"""The self-check: a tiny call of every kernel, forward and backward, against the reference on this machine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shenhong.numerics import muon, ops, reference
from shenhong.numerics.cpu import decode as fused_decode


def _compare(name: str, op: Callable, plain: Callable, inputs: list[Tensor], bound: float) -> None:
    """Outputs and gradients of `op` and `plain` on the same inputs; the largest difference against the largest value."""
    results = []
    for function in (op, plain):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        y.float().square().sum().backward()
        results.append([y.detach(), *(x.grad for x in leaves if x.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        difference = (ours.float() - theirs.float()).abs().max()
        if not difference <= bound * theirs.float().abs().max():
            raise ArithmeticError(f"kernel {name} differs from its reference by {difference:.2g}")


@torch.inference_mode(False)
@torch.enable_grad()
def check() -> None:
    """Raises ArithmeticError naming the first kernel that differs. Leaves the random state as it was."""
    generator = torch.Generator().manual_seed(0)
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        tokens, heads, plain, rope, value, dim = 21, 2, 20, 8, 24, 24
        wide = torch.float32
        weight = normal(dim, dtype=wide)
        _compare(
            "rms_norm",
            lambda x, w: ops.rms_norm(x, w, 1e-6),
            lambda x, w: reference.rms_norm(x, w, 1e-6),
            [normal(tokens, dim), weight],
            bound,
        )
        _compare("swiglu", ops.swiglu, reference.swiglu, [normal(tokens, 2 * dim)], bound)

        batch = torch.zeros(1, tokens, dtype=torch.long)
        batch[0, 4] = 1
        docs = ops.documents(batch, 1)
        angle = torch.rand(tokens, rope // 2, generator=generator)
        tables = docs, angle.cos(), angle.sin()
        size = plain + rope
        _compare(
            "attention",
            lambda q, k, v, t=tables: ops.attention(q, k, v, t[0], t[1], t[2], 8, 0.2),
            lambda q, k, v, t=tables: reference.attention(q, k, v, t[0], t[1], t[2], 8, 0.2),
            [normal(tokens, heads, n) for n in (size, size, value)],
            bound,
        )

        scores = torch.rand(tokens, 4, generator=generator)
        bias = normal(4, dtype=wide)
        for by_best in (False, True):
            chosen = ops.select_experts(scores, bias, 2, 2, 1, by_best)
            if not chosen.equal(reference.select_experts(scores, bias, 2, 2, 1, by_best)):
                raise ArithmeticError("kernel select_experts differs from its reference")
        plan = ops.moe_plan(chosen, 4)
        if not all(
            torch.as_tensor(a).equal(torch.as_tensor(b))
            for a, b in zip(plan, reference.moe_plan(chosen, 4), strict=True)
        ):
            raise ArithmeticError("kernel moe_plan differs from its reference")
        _compare(
            "moe_experts",
            lambda x, g, u, d, p=plan: ops.moe_experts(x, g, p, u, d),
            lambda x, g, u, d, p=plan: reference.moe_experts(x, g, p, u, d),
            [normal(tokens, dim), scores[:, :2], normal(4, 40, dim), normal(4, dim, 20)],
            bound,
        )

        targets = torch.randint(0, 50, (tokens,), generator=generator)
        counted = scores[:, 0]
        _compare(
            "cross_entropy",
            lambda h, w, t=targets, c=counted: ops.cross_entropy(h, w, t, c)[0],
            lambda h, w, t=targets, c=counted: reference.cross_entropy(h, w, t, c)[0],
            [normal(tokens, dim), normal(50, dim)],
            bound,
        )

        x, matrix = normal(tokens, dim).float(), normal(70, dim)
        expected = x @ matrix.float().T
        found = fused_decode.project(x, fused_decode.pack(matrix), 70)
        if not (found - expected).abs().max() <= 1e-4 * expected.abs().max():
            raise ArithmeticError("kernel project differs from its reference")

        matrices = normal(2, 18, 21)
        ortho = muon.newton_schulz(matrices, scale=2.0).float()
        x = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True)
        for a, b, c in muon.COEFFICIENTS:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        if not (ortho / 2 - x).abs().max() <= 20 * bound * x.abs().max():
            raise ArithmeticError("kernel newton_schulz differs from its reference")
        momentum, grad = normal(37, dtype=wide), normal(37, dtype=wide)
        weight = momentum.clone()
        update = muon.nesterov_(momentum, grad, 0.9, dtype)
        muon.decayed_add_(weight, update, 0.1, 0.5)
        expected = 0.9 * momentum.sub(grad).div(0.9) - 0.5 * (grad + 0.9 * momentum)
        if not (weight - expected).abs().max() <= bound * expected.abs().max():
            raise ArithmeticError("kernels of the momentum step differ from their reference")
