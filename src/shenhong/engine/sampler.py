"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, and one uniform number per token drawn.

Each request has its own stream of uniforms, named by its seed, and token t of a request uses number t of that
stream: what is drawn does not depend on which other requests share the batch.

Legend: B rows, V vocabulary, C candidates kept by top-k (all of V without it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shenhong.engine.request import Sampling, TokenLogprob
from shenhong.numerics.cpu.decode import SAMPLING, sample_tokens
from shenhong.numerics.cpu.native import fast

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


class Penalties:
    """What a request's settings do to the logits, given what stands in its prompt and answer."""

    def __init__(self, how: Sampling, prompt: Sequence[int], vocabulary: int) -> None:
        self.how = how
        self.seen_V = torch.zeros(vocabulary, dtype=torch.bool)
        self.seen_V[torch.tensor(prompt)] = True
        self.counts_V = torch.zeros(vocabulary)
        self.bias_V = torch.zeros(vocabulary)
        for token, bias in how.logit_bias.items():
            self.bias_V[token] = bias

    def wrote(self, token: int) -> None:
        self.seen_V[token] = True
        self.counts_V[token] += 1

    def apply(self, logits_V: Tensor) -> Tensor:
        how, factor = self.how, self.how.repetition_penalty
        if factor != 1:
            weaker = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
            logits_V = torch.where(self.seen_V, weaker, logits_V)
        logits_V = logits_V - how.frequency_penalty * self.counts_V
        return logits_V - how.presence_penalty * (self.counts_V > 0) + self.bias_V


def log_probabilities(logits_V: Tensor, token: int, count: int) -> TokenLogprob:
    """Of the token and of the ``count`` likeliest, from the model's own logits."""
    logprobs_V = logits_V.log_softmax(dim=0)
    best = logprobs_V.topk(count)
    top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, logprobs_V[token].item(), top)


def samplings(how: Sampling, uniforms: Tensor) -> np.ndarray:
    """SAMPLING: how tokens are drawn, one for each of the numbers."""
    rows = np.empty(len(uniforms), SAMPLING)
    # Kept in fp32 and int32, so what lies beyond is as good as their ends.
    rows["temperature"] = min(how.temperature, 1e38) if how.temperature >= COLD else 0.0
    rows["top_p"], rows["min_p"] = how.top_p, how.min_p
    rows["top_k"] = min(how.top_k, 2**31 - 1)
    rows["uniform"] = uniforms
    return rows


def sample(logits_BV: Tensor, samplings_B: np.ndarray) -> list[int | None]:
    """One token per row, each by its own SAMPLING; None where the logits are no numbers."""
    if fast(logits_BV) and logits_BV.dtype == torch.float32:
        chosen = sample_tokens(logits_BV, samplings_B).tolist()
        return [token if token >= 0 else None for token in chosen]
    peaks_B = logits_BV.amax(dim=1)
    logits_BV = logits_BV.nan_to_num(nan=0.0, neginf=float("-inf"))
    uniform_B = torch.tensor(samplings_B["uniform"], device=logits_BV.device)
    tokens: list[int | None] = [None] * len(samplings_B)
    # Rows of equal settings are drawn together.
    groups: dict[tuple[float, int, float, float], list[int]] = {}
    settings = samplings_B[["temperature", "top_k", "top_p", "min_p"]].tolist()
    for row, (how, sound) in enumerate(zip(settings, peaks_B.isfinite().tolist(), strict=True)):
        if sound:
            groups.setdefault(how, []).append(row)
    for how, rows in groups.items():
        index = torch.tensor(rows, device=logits_BV.device)
        some = sample_alike(logits_BV[index], uniform_B[index], Sampling(*how))
        for row, token in zip(rows, some.tolist(), strict=True):
            tokens[row] = token
    return tokens


def sample_alike(logits_BV: Tensor, uniform_B: Tensor, how: Sampling) -> Tensor:
    """[B] tokens by inverting the cumulative distribution at ``uniform_B``: what the kernel does, in PyTorch."""
    if how.temperature < COLD:
        return logits_BV.argmax(dim=1)
    candidates = None
    if 0 < how.top_k < logits_BV.shape[1]:
        logits_BV, candidates = logits_BV.topk(how.top_k, dim=1)
    elif how.top_p < 1:
        logits_BV, candidates = logits_BV.sort(dim=1, descending=True, stable=True)
    probabilities_BC = (logits_BV * (1 / how.temperature)).softmax(dim=1)
    if how.top_p < 1:
        before_BC = probabilities_BC.cumsum(dim=1) - probabilities_BC
        probabilities_BC = probabilities_BC.masked_fill(before_BC >= how.top_p, 0.0)
    if how.min_p > 0:
        least_B1 = how.min_p * probabilities_BC.amax(dim=1, keepdim=True)
        probabilities_BC = probabilities_BC.masked_fill(probabilities_BC < least_B1, 0.0)
    place_B = invert(probabilities_BC, uniform_B)
    return place_B if candidates is None else candidates.gather(1, place_B[:, None]).squeeze(1)


def invert(probabilities_BC: Tensor, uniform_B: Tensor) -> Tensor:
    """[B] the place where the running sum of the probabilities (they need not sum to one) passes uniform * total.

    First the block is found, then the place in it: a running sum over the whole vocabulary is slow.
    """
    rows, width = probabilities_BC.shape
    blocks = -(-width // BLOCK)
    probabilities_BbC = F.pad(probabilities_BC, (0, blocks * BLOCK - width)).view(
        rows, blocks, BLOCK
    )
    block_Bb = probabilities_BbC.sum(dim=2).double().cumsum(dim=1)
    point_B1 = below(uniform_B[:, None] * block_Bb[:, -1:], block_Bb[:, -1:])
    block_B1 = torch.searchsorted(block_Bb, point_B1, right=True)
    before_B1 = F.pad(block_Bb, (1, 0)).gather(1, block_B1)
    inside_BC = probabilities_BbC[
        torch.arange(rows, device=probabilities_BC.device), block_B1.squeeze(1)
    ].double()
    inside_BC = inside_BC.cumsum(dim=1)
    rest_B1 = below(point_B1 - before_B1, inside_BC[:, -1:])
    place_B1 = torch.searchsorted(inside_BC, rest_B1, right=True)
    return (block_B1 * BLOCK + place_B1).squeeze(1)


def below(point: Tensor, total: Tensor) -> Tensor:
    """The point kept in [0, total): rounding must not reach the total, behind which there is no token."""
    return torch.minimum(point, total.nextafter(torch.zeros_like(total))).clamp_(min=0)
