"""From logits to tokens: temperature, top-k, top-p, min-p, and one uniform number per token drawn.

Each request has its own stream of uniforms, named by its seed, and token t of a request uses number t of that
stream: what is drawn does not depend on which other requests share the batch.

Legend: B rows, V vocabulary, C candidates kept by top-k (all of V without it).
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from shenhong.engine.request import Sampling

# Below this temperature the likeliest token is taken: the quotient would leave fp32's range.
COLD = 1e-5

# Tokens per block of the two-level search.
BLOCK = 64


def request_seed(seed: int, number: int) -> int:
    """The seed of request ``number`` of a call with one seed for all."""
    digest = hashlib.sha256(f"request {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def uniforms(seeds: list[int], count: int) -> Tensor:
    """[len(seeds), count] numbers in [0, 1); a longer stream begins with the shorter one."""
    stream = torch.Generator()
    rows = [torch.rand(count, generator=stream.manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.stack(rows)


def sample(logits_BV: Tensor, uniform_B: Tensor, how: Sampling) -> Tensor:
    """[B] tokens by inverting the cumulative distribution at ``uniform_B``."""
    if how.temperature < COLD:
        return logits_BV.argmax(dim=1)
    candidates = None
    if 0 < how.top_k < logits_BV.shape[1]:
        logits_BV, candidates = logits_BV.topk(how.top_k, dim=1)
    elif how.top_p < 1:
        logits_BV, candidates = logits_BV.sort(dim=1, descending=True, stable=True)
    share_BC = (logits_BV * (1 / how.temperature)).softmax(dim=1)
    if how.top_p < 1:
        before_BC = share_BC.cumsum(dim=1) - share_BC
        share_BC = share_BC.masked_fill(before_BC >= how.top_p, 0.0)
    if how.min_p > 0:
        least_B1 = how.min_p * share_BC.amax(dim=1, keepdim=True)
        share_BC = share_BC.masked_fill(share_BC < least_B1, 0.0)
    place_B = invert(share_BC, uniform_B)
    return place_B if candidates is None else candidates.gather(1, place_B[:, None]).squeeze(1)


def invert(share_BC: Tensor, uniform_B: Tensor) -> Tensor:
    """[B] the place where the running sum of the shares (they need not sum to one) passes uniform * total.

    First the block is found, then the place in it: a running sum over the whole vocabulary is slow.
    """
    rows, width = share_BC.shape
    blocks = -(-width // BLOCK)
    share_BbC = F.pad(share_BC, (0, blocks * BLOCK - width)).view(rows, blocks, BLOCK)
    block_Bb = share_BbC.sum(dim=2).double().cumsum(dim=1)
    point_B1 = below(uniform_B[:, None] * block_Bb[:, -1:], block_Bb[:, -1:])
    block_B1 = torch.searchsorted(block_Bb, point_B1, right=True)
    before_B1 = F.pad(block_Bb, (1, 0)).gather(1, block_B1)
    inside_BC = share_BbC[torch.arange(rows, device=share_BC.device), block_B1.squeeze(1)].double()
    inside_BC = inside_BC.cumsum(dim=1)
    rest_B1 = below(point_B1 - before_B1, inside_BC[:, -1:])
    place_B1 = torch.searchsorted(inside_BC, rest_B1, right=True)
    return (block_B1 * BLOCK + place_B1).squeeze(1)


def below(point: Tensor, total: Tensor) -> Tensor:
    """The point kept in [0, total): rounding must not reach the total, behind which there is no token."""
    return torch.minimum(point, total.nextafter(torch.zeros_like(total))).clamp_(min=0)
