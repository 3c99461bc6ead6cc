"""The three smallest parts: a matrix, RMSNorm, and the SwiGLU feed-forward block.

Parameters are fp32 masters; a part casts its matrix to the dtype of what it is given, so that the same
module computes in fp32 or bf16. Legend: N tokens, D hidden, I inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shenhong.numerics import ops


class Matrix(nn.Module):
    """y = x W^T with W [rows, columns]; no bias, but where Qwen2 has one."""

    def __init__(self, columns: int, rows: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Norm(nn.Module):
    """RMSNorm, fp32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_ND: Tensor) -> Tensor:
        return ops.rms_norm(x_ND, self.weight, self.eps)


class FeedForward(nn.Module):
    """down(activation(gate x) * up x); gate and up run as one product."""

    def __init__(self, hidden: int, inner: int, act: str = "silu") -> None:
        super().__init__()
        self.act = act
        self.gate_proj = Matrix(hidden, inner)
        self.up_proj = Matrix(hidden, inner)
        self.down_proj = Matrix(inner, hidden)

    def forward(self, x_ND: Tensor) -> Tensor:
        gate_up_2ID = torch.cat((self.gate_proj.weight, self.up_proj.weight)).to(x_ND.dtype)
        return self.down_proj(ops.gated(F.linear(x_ND, gate_up_2ID), self.act))
