"""One optimizer step, and nothing of files or clocks: what loop.py repeats and budget.py times.

Legend: E experts, N tokens of a micro-batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shenhong.model import Decoder, ModelConfig, Observe, RouterStats, sum_stats
from shenhong.model.decoder import Hidden
from shenhong.numerics import Documents, documents
from shenhong.parallel import Mesh
from shenhong.train.data import Batch, Rows, Source
from shenhong.train.objectives import NextToken, Objective, next_targets, token_loss
from shenhong.train.optimizer import Optimizer, clip_
from shenhong.train.schedule import rate
from shenhong.train.settings import TrainSettings


@dataclass
class StepResult:
    """``losses``: each term of the objective by its name, per target; ``load``: each expert's share of a layer's
    assignments."""

    losses: dict[str, float]
    grad_norm: float
    lr: float
    load: list[list[float]]

    @property
    def loss(self) -> float:
        return self.losses["loss"]


class Trainer:
    """A model, its optimizer, its objective and its data, on one process of a mesh."""

    def __init__(
        self,
        settings: TrainSettings,
        config: ModelConfig,
        source: Source,
        mesh: Mesh,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        objective: Objective | None = None,
    ) -> None:
        self.settings, self.config, self.source = settings, config, source
        self.mesh, self.device = mesh, device
        self.objective = objective or NextToken(config, settings, source.bos_id)
        self.model = Decoder(config, seed, dtype).to(device)
        self.observe = Observe(
            balance_loss=settings.sequence_balance > 0, margins=settings.balance == "quantile"
        )
        self.optimizer = Optimizer(
            dict(self.model.named_parameters()),
            config,
            muon=settings.optimizer == "muon",
            momentum=settings.momentum,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            compute=dtype,
        )

    def _gradients(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Those clipped together: all but those that the objective has clipped alone, and these."""
        trunk: list[torch.Tensor] = []
        own: list[torch.Tensor] = []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                (own if name.startswith(self.objective.alone) else trunk).append(parameter.grad)
        return trunk, own

    def step(self, step: int, steps: int, part: int = 1) -> StepResult:
        """Forward, backward and update. The result is the same on every process. ``part``: see Source.batches."""
        objective = self.objective
        late = step >= objective.later * steps
        batches = [b.to(self.device) for b in self.source.batches(step, self.mesh, part)]
        each = [objective.counts(batch, late) for batch in batches]
        tokens = torch.tensor(float(sum(len(b.tokens_N) for b in batches)), device=self.device)
        counts = torch.stack(
            [*(torch.stack(column).sum() for column in zip(*each, strict=True)), tokens]
        )
        self.mesh.sum_([counts])
        counts.clamp_(min=1)  # a step of nothing but padding has loss 0, not NaN
        counts, tokens_a_step = counts[:-1], float(counts[-1])
        sums = torch.zeros(len(counts), device=self.device)
        passes: list[list[RouterStats]] = []
        for batch in batches:
            docs = documents(batch.tokens_N.view(-1, batch.row_length), self.source.bos_id)
            hidden = self.model(batch.tokens_N, docs, self.observe)
            head_VD = self.model.head_weight.to(hidden.states_ND.dtype)
            routing = list(hidden.routing)

            def draft(
                alone: bool = False,
                batch: Batch = batch,
                docs: Documents = docs,
                hidden: Hidden = hidden,
                routing: list[RouterStats] = routing,
            ) -> Hidden:
                found = self.model.draft(
                    hidden.states_ND, batch.tokens_N, docs, self.observe, alone
                )
                routing += found.routing
                return found

            terms = objective.terms(batch, hidden, head_VD, draft, late)
            loss = sum(
                w * term / count
                for w, term, count in zip(objective.weights, terms, counts, strict=False)
            )
            if self.settings.sequence_balance:
                # Each pass gives a mean over its tokens; its weight is its part of the whole step.
                share = self.settings.sequence_balance * len(batch.tokens_N) / tokens_a_step
                loss = loss + share * sum(
                    (s.balance_loss for s in routing if s.balance_loss is not None),
                    torch.zeros((), device=self.device),
                )
            loss.backward()
            sums += torch.stack([term.detach() for term in terms])
            passes.append([layer._replace(balance_loss=None) for layer in routing])
        trunk, apart = self._gradients()
        self.mesh.sum_([sums, *trunk, *apart])
        norm = clip_(trunk, self.settings.clip)
        if apart:
            clip_(apart, self.settings.clip)
        factor = rate(step, steps, self.settings.warmup)
        self.optimizer.step(self.settings.lr * factor, self.settings.vector_lr * factor)
        self.model.zero_grad(set_to_none=True)
        load = self.balance(passes)
        losses = dict(zip(objective.names, (sums / counts).tolist(), strict=False))
        return StepResult(losses, norm, self.settings.lr * factor, load)

    def balance(self, passes: list[list[RouterStats]]) -> list[list[float]]:
        """Sum the routing of all passes and processes, move the selection biases, return the loads."""
        layers = sum_stats(passes)
        self.mesh.sum_(
            [t for layer in layers for t in (layer.counts_E, layer.margins_EQ) if t is not None]
        )
        self.model.update_balance(layers, self.settings.balance, self.settings.balance_rate)
        return [(layer.counts_E / layer.counts_E.sum()).tolist() for layer in layers]


@torch.no_grad()
def score_rows(
    model: Decoder, rows: Rows, numbers: torch.Tensor, micro_tokens: int = 8192
) -> tuple[float, int]:
    """Summed nats and number of the counted tokens of some rows of held-out text."""
    nats, counted = 0.0, 0
    device = model.head_weight.device
    for part in numbers.split(max(1, micro_tokens // rows.row_length)):
        batch = rows.batch(part).to(device)
        docs = documents(batch.tokens_N.view(-1, batch.row_length), rows.bos_id)
        states_ND = model(batch.tokens_N, docs).states_ND
        targets_N, weights_N = next_targets(batch)
        nats += float(
            token_loss(states_ND, model.head_weight.to(states_ND.dtype), targets_N, weights_N)
        )
        counted += int(weights_N.sum())
    return nats, counted
