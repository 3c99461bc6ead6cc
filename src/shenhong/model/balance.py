"""Keeping experts evenly loaded: what a forward pass observes, and the rules that move the selection bias.

Auxiliary-loss-free balancing (Wang et al., arXiv 2408.15664; DeepSeek-V3, section 2.1.2) adds a bias b to the
scores for *choosing* experts only. Once per optimizer step, from the load of the whole batch:

    sign      b += rate * sign(mean load - load)                                  DeepSeek-V3
    centred   b += rate * (sign(e) - mean sign(e)),  e = mean load - load         Moonlight; b cannot drift
    quantile  b_j = -quantile_{1-K/E} of (s_tj - alpha_t), then centred           no rate: one dual step of the
              alpha_t = the (K+1)-th best of s_t + b                              balanced assignment problem

Everything observed is a sum of integers over tokens, so micro-batches and processes add up exactly.

Legend: N tokens, E experts, K chosen, Q histogram bins.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shenhong.errors import ModelError
from shenhong.numerics import ops

Rule = Literal["sign", "centred", "quantile", "none"]

# Margins s - alpha lie within (-LIMIT, LIMIT): s in (0, 1), and alpha is a score plus a centred bias.
LIMIT, BINS = 2.0, 8192


class RouterStats(NamedTuple):
    """What one expert layer observed; the tensors it holds can be summed over micro-batches and processes."""

    counts_E: Tensor  # int64, tokens that chose each expert
    margins_EQ: Tensor | None  # int64 histogram of s - alpha, for the quantile rule
    balance_loss: Tensor | None  # scalar fp32 with gradient, mean over this pass's tokens


def sum_stats(passes: list[list[RouterStats]]) -> list[RouterStats]:
    """Adds the observations of several passes, layer by layer (balance losses are dropped)."""
    total = []
    for layer in zip(*passes, strict=True):
        counts = torch.stack([s.counts_E for s in layer]).sum(0)
        margins = [s.margins_EQ for s in layer if s.margins_EQ is not None]
        total.append(RouterStats(counts, torch.stack(margins).sum(0) if margins else None, None))
    return total


@torch.no_grad()
def margin_histogram(scores_NE: Tensor, bias_E: Tensor, chosen: int) -> Tensor:
    """[E, Q] int64 histogram of s_tj - alpha_t, alpha_t the (chosen+1)-th best biased score of token t."""
    experts = scores_NE.shape[1]
    biased_NE = scores_NE + bias_E
    alpha_N = biased_NE.topk(min(chosen + 1, experts), dim=1).values[:, -1:]
    bins_NE = ((scores_NE - alpha_N + LIMIT) * (BINS / (2 * LIMIT))).long().clamp_(0, BINS - 1)
    bins_NE += torch.arange(experts, device=bins_NE.device) * BINS
    return torch.bincount(bins_NE.flatten(), minlength=experts * BINS).view(experts, BINS)


@torch.no_grad()
def next_bias(bias_E: Tensor, stats: RouterStats, rule: Rule, rate: float, chosen: int) -> Tensor:
    """The bias for the next step. ``stats`` must be those of the whole batch."""
    if rule == "none":
        return bias_E
    if rule in ("sign", "centred"):
        load_E = stats.counts_E.to(torch.float64)
        direction_E = torch.sign(load_E.mean() - load_E)
        if rule == "centred":
            direction_E = direction_E - direction_E.mean()
        return bias_E + (rate * direction_E).to(bias_E.dtype)
    if rule != "quantile":
        raise ModelError(f'balance rule {rule!r}; choose "sign", "centred", "quantile" or "none"')
    assert stats.margins_EQ is not None, "the quantile rule needs Observe(margins=True)"
    bias = -quantile(stats.margins_EQ, 1 - chosen / len(bias_E))
    return (bias - bias.mean()).to(bias_E.dtype)


def quantile(histogram_EQ: Tensor, share: float) -> Tensor:
    """[E] fp64 value below which ``share`` of each histogram lies, linear inside a bin."""
    cumulative_EQ = histogram_EQ.cumsum(1).to(torch.float64)
    wanted_E1 = share * cumulative_EQ[:, -1:]
    bin_E1 = torch.searchsorted(cumulative_EQ, wanted_E1).clamp_(max=BINS - 1)
    inside = histogram_EQ.gather(1, bin_E1).to(torch.float64)
    before = cumulative_EQ.gather(1, bin_E1) - inside
    position = bin_E1 + (wanted_E1 - before) / inside.clamp(min=1)
    return (position * (2 * LIMIT / BINS) - LIMIT).squeeze(1)


def sequence_balance(
    scores_NE: Tensor, chosen_NK: Tensor, document_N: Tensor, documents: int
) -> Tensor:
    """Sequence-wise balance loss (DeepSeek-V3, eq. 17-20) without its factor alpha; 1 when even. Scalar.

    A document is a sequence, weighted by its tokens:  sum_i f_i P_i  with  f_i = E/(K T) count_i  and  P_i the
    mean share of expert i, is the mean over tokens of  sum_i f_i(document) share_i(token);  f has no gradient.
    """
    experts, chosen = scores_NE.shape[1], chosen_NK.shape[1]
    with torch.no_grad():
        cell_NK = document_N[:, None] * experts + chosen_NK
        counts = torch.bincount(cell_NK.flatten(), minlength=documents * experts)
        tokens_S1 = torch.bincount(document_N, minlength=documents)[:, None]
        f_SE = counts.view(documents, experts) * (experts / chosen) / tokens_S1
        f_NE = f_SE.to(scores_NE.dtype)[document_N]
    share_NE = scores_NE / scores_NE.sum(dim=1, keepdim=True)
    return (f_NE * share_NE).sum() / len(scores_NE)


def document_of_token(docs: ops.Documents) -> tuple[Tensor, int]:
    """([N] number of each token's document, how many documents)."""
    lengths_S = docs.starts.diff().long()
    count = len(lengths_S)
    numbers = torch.arange(count, device=lengths_S.device)
    return numbers.repeat_interleave(lengths_S), count
