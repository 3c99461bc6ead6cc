"""Output head and cross-entropy in one, a chunk of tokens at a time: the logits never all exist.

The gradients of the hidden states and of the head are finished in the forward pass, while a chunk's logits are at
hand; backward only scales them (Liger-Kernel's fused linear cross-entropy, arXiv 2410.10989, section 3.2). The head's
gradient is summed over chunks in fp32.

Shapes: N tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from shenhong.numerics.cpu import native as kernels
from shenhong.numerics.reference import SEGMENT

CHUNK_NUMBERS = (
    6 << 20
)  # logits held at once; 1,024 tokens of a 6,000-word vocabulary fit the L3 cache


def _softmax_loss(logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, grad: bool) -> Tensor:
    """Log-probabilities of the targets; if `grad`, logits become weights * (softmax - onehot) in place."""
    logprob_C = torch.empty(len(targets_C), device=logits_CV.device)
    if kernels.fast(logits_CV):
        args = (logits_CV, targets_C, weights_C, logprob_C, *logits_CV.shape, grad)
        kernels.call("shenhong_softmax_loss", logits_CV.dtype, *args, torch.get_num_threads())
        return logprob_C
    wide_CV = logits_CV.float().log_softmax(-1)
    logprob_C = wide_CV.gather(1, targets_C[:, None])[:, 0]
    if grad:
        wide_CV.exp_().mul_(weights_C[:, None])
        wide_CV.scatter_add_(1, targets_C[:, None], -weights_C[:, None])
        logits_CV.copy_(wide_CV)
    return logprob_C


class CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor, grad: bool
    ) -> tuple[Tensor, Tensor]:
        tokens, dim = h_ND.shape
        counted = weights_N.nonzero().flatten()
        everything = len(counted) == tokens
        h = h_ND if everything else h_ND[counted]
        targets, weights = targets_N.long(), weights_N.float()
        if not everything:
            targets, weights = targets[counted], weights[counted]
        targets, weights = targets.contiguous(), weights.contiguous()
        vocabulary = weight_VD.shape[0]
        chunk = max(SEGMENT, CHUNK_NUMBERS // vocabulary // SEGMENT * SEGMENT)
        logprob = torch.empty(len(h), device=h.device)
        buffer = torch.empty(min(chunk, len(h)), vocabulary, dtype=h.dtype, device=h.device)
        dh = torch.empty_like(h) if grad else None
        dweight = torch.zeros(vocabulary, dim, device=h.device) if grad else None
        for begin in range(0, len(h), chunk):
            part = slice(begin, min(begin + chunk, len(h)))
            logits_CV = buffer[: part.stop - begin]
            torch.mm(h[part], weight_VD.t(), out=logits_CV)
            logprob[part] = _softmax_loss(logits_CV, targets[part], weights[part], grad)
            if dh is not None and dweight is not None:
                torch.mm(logits_CV, weight_VD, out=dh[part])
                if h.dtype == dweight.dtype:
                    dweight.addmm_(logits_CV.t(), h[part])
                else:
                    dweight += logits_CV.t() @ h[part]
        loss = -(weights * logprob).sum()
        if not everything:
            scattered = torch.zeros(tokens, device=h.device)
            scattered[counted] = logprob
            logprob = scattered
            if dh is not None:
                dh = torch.zeros_like(h_ND).index_copy_(0, counted, dh)
        if dh is not None and dweight is not None:
            ctx.save_for_backward(dh, dweight.to(weight_VD.dtype))
        ctx.mark_non_differentiable(logprob)
        return loss, logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dh, dweight = ctx.saved_tensors
        return dh * dloss.to(dh.dtype), dweight * dloss.to(dh.dtype), None, None, None
