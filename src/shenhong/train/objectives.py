"""Objectives: from a batch, the model's final states and its head to the terms of a loss.

A training loop knows nothing of what is learnt. It is given an `Objective`: pretraining's `NextToken` here, those of
tuning, distilling and reinforcement beside the steps that need them. Each term is a sum over its own targets and is
normalised by its own count over the *whole* step (all micro-batches, all processes); counts come from the data before
any forward pass, so gradients need no correction afterwards.

Legend: N tokens of a batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from shenhong.model import ModelConfig
from shenhong.model.decoder import Hidden
from shenhong.numerics import cross_entropy
from shenhong.train.data import Batch
from shenhong.train.settings import TrainSettings


class Objective(Protocol):
    """What a training minimises: the weighted sum of its terms, each divided by its count.

    names     of the terms, as events call them; the first is "loss"
    weights   of the terms
    alone     beginnings of names of parameters whose gradients are clipped among themselves
    later     share of the steps after which a step does more and costs more; 1: never
    """

    names: Sequence[str]
    weights: Sequence[float]
    alone: tuple[str, ...]
    later: float

    def counts(self, batch: Batch, late: bool) -> list[torch.Tensor]:
        """Of each term that this batch has, how many targets it counts (scalars); known from the data alone.

        ``late``: whether the share `later` of the steps is done.
        """
        ...

    def terms(
        self, batch: Batch, hidden: Hidden, head_VD: torch.Tensor, draft: Draft, late: bool
    ) -> list[torch.Tensor]:
        """The same terms as scalars, each the sum over its targets, in nats where they are log-likelihoods.

        ``hidden``: the final states behind each token; ``draft``: runs the multi-token-prediction layer over them.
        """
        ...


class Draft(Protocol):
    def __call__(self, alone: bool = False) -> Hidden:
        """The layer's states, from which the head predicts the token after next; ``alone``: it learns by itself."""
        ...


class NextToken:
    """Next-token prediction, and multi-token prediction where the model has the layer for it (V3, eq. 21-25).

    A draft layer that starts late learns to draft and nothing else: the gradients of an untrained layer would undo in
    the trunk what the last, smallest steps give.
    """

    names = ("loss", "mtp_loss")

    def __init__(self, config: ModelConfig, settings: TrainSettings, bos_id: int) -> None:
        self.bos_id = bos_id
        self.weights = (1.0, settings.mtp_weight)
        wanted = config.num_nextn_predict_layers and settings.mtp_weight
        self.later = settings.mtp_start if wanted else 1.0
        self.drafts_alone = 0 < self.later < 1
        self.alone = (f"model.layers.{config.num_hidden_layers}.",) if self.drafts_alone else ()

    def counts(self, batch: Batch, late: bool) -> list[torch.Tensor]:
        return [weights_N.sum() for _, weights_N in self._targets(batch, late)]

    def terms(
        self, batch: Batch, hidden: Hidden, head_VD: torch.Tensor, draft: Draft, late: bool
    ) -> list[torch.Tensor]:
        first, *second = self._targets(batch, late)
        terms = [token_loss(hidden.states_ND, head_VD, *first)]
        for targets in second:
            head = head_VD.detach() if self.drafts_alone else head_VD
            terms.append(token_loss(draft(self.drafts_alone).states_ND, head, *targets))
        return terms

    def _targets(self, batch: Batch, late: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
        first = next_targets(batch)
        return [first, second_targets(batch, self.bos_id)] if late else [first]


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
