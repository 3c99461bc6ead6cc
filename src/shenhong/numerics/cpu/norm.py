"""RMSNorm and SwiGLU through the kernels, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from shenhong.numerics.cpu.native import call, rows_last_contiguous


class RmsNorm(Function):
    """Keeps x and one number a row for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND = rows_last_contiguous(x)
        weight_D = weight_D.contiguous()
        rows, dim = x_ND.shape
        y = torch.empty(x.shape, dtype=x.dtype)
        rstd = torch.empty(rows)
        threads = torch.get_num_threads()
        args = (x_ND, x_ND.stride(0), weight_D, y, rstd, rows, dim, eps, threads)
        call("shenhong_rms_forward", x.dtype, *args)
        ctx.save_for_backward(x_ND, weight_D, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_D, rstd = ctx.saved_tensors
        rows, dim = x_ND.shape
        threads = torch.get_num_threads()
        dx = torch.empty(dy.shape, dtype=x_ND.dtype)
        partial = torch.zeros(threads, dim)
        args = (x_ND, x_ND.stride(0), weight_D, rstd, dy.contiguous(), dx, partial)
        call("shenhong_rms_backward", x_ND.dtype, *args, rows, dim, threads)
        return dx, partial.sum(0), None


class SwiGlu(Function):
    """Keeps its input for backward."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        x_N2I = rows_last_contiguous(gate_up)
        rows, width = x_N2I.shape[0], x_N2I.shape[1] // 2
        y = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype)
        args = (x_N2I, x_N2I.stride(0), y, rows, width, torch.get_num_threads())
        call("shenhong_swiglu_forward", gate_up.dtype, *args)
        ctx.save_for_backward(x_N2I)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x_N2I,) = ctx.saved_tensors
        rows, width = x_N2I.shape[0], x_N2I.shape[1] // 2
        dx = torch.empty(*dy.shape[:-1], 2 * width, dtype=dy.dtype)
        args = (x_N2I, x_N2I.stride(0), dy.contiguous(), dx, rows, width)
        call("shenhong_swiglu_backward", dy.dtype, *args, torch.get_num_threads())
        return dx
