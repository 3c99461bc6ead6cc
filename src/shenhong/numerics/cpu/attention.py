"""Document attention through the kernel. Keeps its inputs and one number per token and head for backward.

Shapes: N tokens, H heads, n key dims without rotation, r rotary dims, v value dims.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from shenhong.numerics.cpu.native import DTYPES, call
from shenhong.numerics.cpu.structs import Attention
from shenhong.numerics.reference import Documents

Tables = tuple[Documents, Tensor, Tensor]  # documents, cos, sin


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _arguments(
    parts: tuple[Tensor, Tensor, Tensor, Tensor], tables: Tables, scale: float
) -> Attention:
    """The struct both passes share. q [N, H, n+r], k [N, H, n], k_rope [N, H, r] (head stride may be 0), v [N, H, v]."""
    q, k, k_rope, v = parts
    docs, cos, sin = tables
    rope = k_rope.shape[2]
    assert docs.starts.dtype == torch.int32 and cos.dtype == sin.dtype == torch.float32
    assert all(t.is_contiguous() for t in (docs.starts, cos, sin)) and cos.shape[1] * 2 == rope
    arguments = Attention(
        dtype=DTYPES[q.dtype],
        threads=torch.get_num_threads(),
        documents=docs.starts.numel() - 1,
        tokens=q.shape[0],
        heads=q.shape[1],
        plain=k.shape[2],
        rope=rope,
        value=v.shape[2],
        scale=scale,
        starts=docs.starts.data_ptr(),
        cosine=cos.data_ptr(),
        sine=sin.data_ptr(),
    )
    for name, short, tensor in (
        ("q", "q", q),
        ("k", "k", k),
        ("k_rope", "kr", k_rope),
        ("v", "v", v),
    ):
        setattr(arguments, name, tensor.data_ptr())
        setattr(arguments, f"{short}_token", tensor.stride(0))
        setattr(arguments, f"{short}_head", tensor.stride(1))
    return arguments


def _run(arguments: Attention, backward: bool) -> None:
    call("shenhong_attention", ctypes.addressof(arguments), backward)


def _forward(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], tables: Tables, scale: float
) -> Tensor:
    q, _, _, v = inputs
    arguments = _arguments(inputs, tables, scale)
    o = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    lse = torch.empty(q.shape[:2])
    arguments.o, arguments.lse = o.data_ptr(), lse.data_ptr()
    _run(arguments, False)
    ctx.tables, ctx.scale, ctx.lse = tables, scale, lse
    return o


def _backward(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    do: Tensor,
    dk: Tensor,
    dk_rope: Tensor,
    dv: Tensor,
) -> Tensor:
    """Fills dk, dk_rope ([N, r] if shared by the heads) and dv, returns dq."""
    do = do.contiguous()
    dq = torch.empty(inputs[0].shape, dtype=do.dtype)
    arguments = _arguments(inputs, ctx.tables, ctx.scale)
    arguments.lse, arguments.d_o, arguments.dq = ctx.lse.data_ptr(), do.data_ptr(), dq.data_ptr()
    arguments.dk, arguments.dv, arguments.dk_rope = dk.data_ptr(), dv.data_ptr(), dk_rope.data_ptr()
    arguments.dk_token, arguments.dk_head = dk.stride()[:2]
    arguments.dv_token, arguments.dv_head = dv.stride()[:2]
    if dk_rope.dim() == 2:
        per_head = torch.empty(*dq.shape[:2], dk_rope.shape[1])
        arguments.dk_rope_heads = per_head.data_ptr()
    else:
        arguments.dkr_token, arguments.dkr_head = dk_rope.stride()[:2]
    _run(arguments, True)
    return dq


class LatentAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        k_rope: Tensor,
        docs: Documents,
        cos: Tensor,
        sin: Tensor,
        scale: float,
    ) -> Tensor:
        q, kv, k_rope = (_inner_contiguous(t) for t in (q, kv, k_rope))
        ctx.save_for_backward(q, kv, k_rope)
        return _forward(ctx, LatentAttention.parts(q, kv, k_rope), (docs, cos, sin), scale)

    @staticmethod
    def parts(q: Tensor, kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        plain = q.shape[2] - k_rope.shape[1]
        shared = k_rope[:, None, :].expand(-1, q.shape[1], -1)
        return q, kv[..., :plain], shared, kv[..., plain:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, k_rope = ctx.saved_tensors
        dkv = torch.empty(kv.shape, dtype=kv.dtype)
        dk_rope = torch.empty(k_rope.shape, dtype=kv.dtype)
        plain = q.shape[2] - k_rope.shape[1]
        parts = LatentAttention.parts(q, kv, k_rope)
        dq = _backward(ctx, parts, do, dkv[..., :plain], dk_rope, dkv[..., plain:])
        return dq, dkv, dk_rope, None, None, None, None


class HeadAttention(Function):
    """Plain multi-head attention: every head has keys of its own, the last `rope` dims rotated."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        docs: Documents,
        cos: Tensor,
        sin: Tensor,
        rope: int,
        scale: float,
    ) -> Tensor:
        q, k, v = (_inner_contiguous(t) for t in (q, k, v))
        ctx.save_for_backward(q, k, v)
        ctx.plain = q.shape[2] - rope
        parts = q, k[..., : ctx.plain], k[..., ctx.plain :], v
        return _forward(ctx, parts, (docs, cos, sin), scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dk, dv = torch.empty(k.shape, dtype=k.dtype), torch.empty(v.shape, dtype=v.dtype)
        parts = q, k[..., : ctx.plain], k[..., ctx.plain :], v
        dq = _backward(ctx, parts, do, dk[..., : ctx.plain], dk[..., ctx.plain :], dv)
        return dq, dk, dv, None, None, None, None, None
