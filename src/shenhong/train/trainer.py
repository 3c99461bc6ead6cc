"""One optimizer step, and nothing of files or clocks: what loop.py repeats and budget.py times.

Legend: E experts, N tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shenhong.model import Decoder, ModelConfig, Observe, RouterStats, sum_stats
from shenhong.parallel import Mesh
from shenhong.train.data import Batch, Source
from shenhong.train.objectives import Objective, Pass
from shenhong.train.optimizer import Optimizer, clip_
from shenhong.train.schedule import rate
from shenhong.train.settings import TrainSettings


@dataclass
class StepResult:
    losses: dict[str, float]  # each term of the objective, per target
    grad_norm: float
    lr: float
    load: list[list[float]]  # each expert's share of a layer's assignments
    tokens: int  # of the step, over all processes

    @property
    def loss(self) -> float:
        return self.losses["loss"]


class Trainer:
    """A model, its optimizer, its objective and its data, on one process of a mesh."""

    def __init__(
        self,
        settings: TrainSettings,
        config: ModelConfig,
        objective: Objective,
        source: Source,
        mesh: Mesh,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.settings, self.config = settings, config
        self.objective, self.source = objective, source
        self.mesh, self.device = mesh, device
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
        """The two groups that are clipped: all gradients but those the objective sets apart, and these."""
        together: list[torch.Tensor] = []
        apart: list[torch.Tensor] = []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                own = name.startswith(self.objective.clipped_apart)
                (apart if own else together).append(parameter.grad)
        return together, apart

    def step(self, step: int, steps: int, part: int = 1) -> StepResult:
        """Forward, backward and update. The result is the same on every process. ``part``: see `Source.batches`."""
        objective = self.objective
        late = step >= objective.late_start * steps
        batches = self.source.batches(step, self.model, self.mesh, part)
        assert batches, "a source has at least one batch for every process in every step"
        batches = [batch.to(self.device) for batch in batches]
        counts, tokens = self._counts(batches, late)
        sums = torch.zeros(len(counts), device=self.device)
        passes: list[list[RouterStats]] = []
        for batch in batches:
            forward = Pass(self.model, batch, self.observe)
            terms = objective.terms(batch, forward, late)
            loss = sum(
                weight * term / count
                for weight, term, count in zip(objective.weights, terms, counts, strict=False)
            )
            if self.settings.sequence_balance:
                # Each pass gives a mean over its tokens; its weight is its part of the whole step.
                weight = self.settings.sequence_balance * len(batch.tokens_N) / tokens
                loss = loss + weight * sum(
                    (s.balance_loss for s in forward.routing if s.balance_loss is not None),
                    torch.zeros((), device=self.device),
                )
            loss.backward()
            sums += torch.stack([term.detach() for term in terms])
            passes.append([layer._replace(balance_loss=None) for layer in forward.routing])
        together, apart = self._gradients()
        self.mesh.sum_([sums, *together, *apart])
        norm = clip_(together, self.settings.clip)
        if apart:
            clip_(apart, self.settings.clip)
        factor = rate(step, steps, self.settings.warmup)
        self.optimizer.step(self.settings.lr * factor, self.settings.vector_lr * factor)
        self.model.zero_grad(set_to_none=True)
        load = self.balance(passes)
        losses = dict(zip(objective.names, (sums / counts).tolist(), strict=False))
        return StepResult(losses, norm, self.settings.lr * factor, load, tokens)

    def _counts(self, batches: list[Batch], late: bool) -> tuple[torch.Tensor, int]:
        """Each term's count and the number of tokens, over the whole step and all processes."""
        zero = torch.zeros((), device=self.device)
        each = [self.objective.counts(batch, late) for batch in batches]
        counts = torch.stack([sum(column, zero) for column in zip(*each, strict=True)])
        tokens = torch.tensor([sum(len(batch.tokens_N) for batch in batches)], device=self.device)
        self.mesh.sum_([counts, tokens])
        return counts.clamp_(min=1), int(tokens)  # nothing but padding has loss 0, not NaN

    def balance(self, passes: list[list[RouterStats]]) -> list[list[float]]:
        """Sum the routing of all passes and processes, move the selection biases, return the loads."""
        layers = sum_stats(passes)
        self.mesh.sum_(
            [t for layer in layers for t in (layer.counts_E, layer.margins_EQ) if t is not None]
        )
        self.model.update_balance(layers, self.settings.balance, self.settings.balance_rate)
        return [(layer.counts_E / layer.counts_E.sum()).tolist() for layer in layers]
