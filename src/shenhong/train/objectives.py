"""Objectives: from a batch and the model's pass over it to the terms of a loss.

The training loop knows nothing of what is learnt. It is given an `Objective`: `NextToken` for pretraining, and those of
tuning, distillation and reinforcement with the steps that need them. Each term is a sum over its own targets and is
normalised by its own count over the *whole* step (all micro-batches, all processes); counts come from the data before
any forward pass, so gradients need no correction afterwards.

Legend: N tokens of a batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shenhong.model import Decoder, ModelConfig, Observe
from shenhong.numerics import boundaries, cross_entropy
from shenhong.train.data import Batch
from shenhong.train.settings import TrainSettings


class Pass:
    """The model's forward pass over a batch.

    states_ND   final states behind each token, after the last norm, in the compute dtype
    head_VD     the head that turns them into logits, in the same dtype
    routing     what each expert layer observed
    """

    def __init__(self, model: Decoder, batch: Batch, observe: Observe) -> None:
        self._model, self._tokens_N, self._observe = model, batch.tokens_N, observe
        self._docs = boundaries(batch.starts_N)
        self.states_ND, routing = model(batch.tokens_N, self._docs, observe)
        self.head_VD = model.head_weight.to(self.states_ND.dtype)
        self.routing = list(routing)

    def draft(self, detached: bool = False) -> torch.Tensor:
        """[N, D] states of the multi-token-prediction layer, from which the head predicts the token after next.

        ``detached``: the trunk gets no gradient from it. Once a pass.
        """
        states_ND, routing = self._model.draft(
            self.states_ND, self._tokens_N, self._docs, self._observe, detached
        )
        self.routing += routing
        return states_ND


class Objective:
    """What training minimises: the weighted sum of terms, each divided by its count.

    names           of the terms in events; the first is always "loss", which the spike guard and the display follow
    weights         of the terms; a term of weight 0 is only reported
    clipped_apart   prefixes of the names of parameters whose gradients are clipped together, apart from all others
    late_start      share of the steps after which a step is *late*: it does more and costs more; 1: never
    """

    names: Sequence[str] = ("loss",)
    weights: Sequence[float] = (1.0,)
    clipped_apart: tuple[str, ...] = ()
    late_start: float = 1.0

    def counts(self, batch: Batch, late: bool) -> list[torch.Tensor]:
        """How many targets each term has in this batch: one scalar a term, from the data alone.

        There may be fewer terms than names (the last ones are then not there), but equally many in every batch of a step.
        """
        raise NotImplementedError

    def terms(self, batch: Batch, forward: Pass, late: bool) -> list[torch.Tensor]:
        """The same terms as scalars with gradient, each a sum over its targets (in nats if they are likelihoods)."""
        raise NotImplementedError


class NextToken(Objective):
    """Next-token prediction, and multi-token prediction where the model has the layer for it (V3, eq. 21-25).

    A draft layer that starts late learns to draft and nothing else: the gradients of an untrained layer would undo in
    the trunk what the last, smallest steps give.
    """

    names = ("loss", "mtp_loss")

    def __init__(self, config: ModelConfig, settings: TrainSettings) -> None:
        self.weights = (1.0, settings.mtp_weight)
        drafts = config.num_nextn_predict_layers and settings.mtp_weight
        self.late_start = settings.mtp_start if drafts else 1.0
        self.detached = 0 < self.late_start < 1
        if self.detached:
            self.clipped_apart = (f"model.layers.{config.num_hidden_layers}.",)

    def counts(self, batch: Batch, late: bool) -> list[torch.Tensor]:
        return [weights_N.sum() for _, weights_N in self._targets(batch, late)]

    def terms(self, batch: Batch, forward: Pass, late: bool) -> list[torch.Tensor]:
        first, *second = self._targets(batch, late)
        terms = [token_loss(forward.states_ND, forward.head_VD, *first)]
        for targets in second:
            head_VD = forward.head_VD.detach() if self.detached else forward.head_VD
            terms.append(token_loss(forward.draft(self.detached), head_VD, *targets))
        return terms

    def _targets(self, batch: Batch, late: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
        first = next_targets(batch)
        return [first, second_targets(batch)] if late else [first]


def next_targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets and weights of predicting token i+1 from token i: (targets_N, weights_N).

    The first token of a document never counts, so no weight reaches across documents.
    """
    targets_N = batch.tokens_N.roll(-1)
    weights_N = batch.weights_N.roll(-1)
    weights_N[-1] = 0
    return targets_N, weights_N


def second_targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for token i+2, the target of multi-token prediction (V3, eq. 24).

    Where token i+1 opens another document, the pair (i, i+1) is not one text: no weight.
    """
    targets_N = batch.tokens_N.roll(-2)
    weights_N = batch.weights_N.roll(-2) * (~batch.starts_N.roll(-1))
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
