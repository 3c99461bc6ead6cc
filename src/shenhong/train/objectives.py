"""Loss functions: from a batch, the model's final states and its head to weighted loss terms.

Each term is a sum over its own targets and is normalised by its own count over the *whole* step (all
micro-batches, all processes); the count is known from the data before any forward pass, so gradients
need no correction afterwards.

Legend: N tokens of a batch, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch

from shenhong.numerics import cross_entropy
from shenhong.train.data import Batch


def next_targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets and weights of predicting token i+1 from token i: (targets_N, weights_N).

    A document begins with BOS, which never counts, so no weight reaches across documents.
    """
    targets_N = batch.tokens_N.roll(-1)
    weights_N = batch.weights_N.roll(-1)
    weights_N[-1] = 0
    return targets_N, weights_N


def second_targets(batch: Batch, bos_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for token i+2, the target of multi-token prediction (V3, eq. 24).

    Where token i+1 opens another document, the pair (i, i+1) is not one text: no weight.
    """
    targets_N = batch.tokens_N.roll(-2)
    weights_N = batch.weights_N.roll(-2) * (batch.tokens_N.roll(-1) != bos_id)
    weights_N[-2:] = 0
    return targets_N, weights_N


def token_loss(
    states_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
) -> torch.Tensor:
    """Sum of weighted negative log-likelihoods, in nats."""
    loss, _ = cross_entropy(states_ND, head_VD, targets_N, weights_N)
    return loss
