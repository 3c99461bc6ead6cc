"""One optimizer step, and nothing of files or clocks: what loop.py repeats and budget.py times.

Legend: E experts, N tokens of a micro-batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shenhong.errors import RecipeError
from shenhong.model import Decoder, ModelConfig, Observe, RouterStats, sum_stats
from shenhong.numerics import documents
from shenhong.parallel import Mesh
from shenhong.train.data import Batch, Rows, order
from shenhong.train.objectives import next_targets, second_targets, token_loss
from shenhong.train.optimizer import Optimizer, clip_
from shenhong.train.schedule import rate
from shenhong.train.settings import TrainSettings


@dataclass
class StepResult:
    """Losses in nats per counted token; loads as each expert's share of a layer's assignments."""

    loss: float
    mtp_loss: float | None
    grad_norm: float
    lr: float
    load: list[list[float]]


class Trainer:
    """A model, its optimizer and its data, on one process of a mesh."""

    def __init__(
        self,
        settings: TrainSettings,
        config: ModelConfig,
        rows: Rows,
        mesh: Mesh,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.settings, self.config, self.rows = settings, config, rows
        self.mesh, self.seed, self.device = mesh, seed, device
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
        self.rows_a_step = settings.rows_a_step
        if self.rows_a_step % mesh.size:
            raise RecipeError(
                f"train.batch_tokens {settings.batch_tokens} are {self.rows_a_step} rows, not divisible by {mesh.size} processes"
            )

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's share of a step, cut into forward passes of at most micro_tokens."""
        mine = order(len(self.rows), self.seed, step * self.rows_a_step, self.rows_a_step)
        mine = mine.chunk(self.mesh.size)[self.mesh.rank]
        size = max(1, self.settings.micro_tokens // self.settings.sequence_length)
        return [self.rows.batch(part).to(self.device) for part in mine.split(size)]

    @property
    def draft_start(self) -> float:
        """Share of the steps after which multi-token prediction trains; 1 where it never does."""
        wanted = self.config.num_nextn_predict_layers and self.settings.mtp_weight
        return self.settings.mtp_start if wanted else 1.0

    @property
    def drafts_alone(self) -> bool:
        """A draft layer that starts late learns to draft and nothing else.

        The gradients of an untrained layer would undo in the trunk what the last, smallest steps give.
        """
        return 0 < self.draft_start < 1

    def _gradients(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Those clipped together: all, or the trunk's and those of a draft layer that learns alone."""
        draft = (f"model.layers.{self.config.num_hidden_layers}.",) if self.drafts_alone else ()
        trunk: list[torch.Tensor] = []
        own: list[torch.Tensor] = []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                (own if name.startswith(draft) else trunk).append(parameter.grad)
        return trunk, own

    def step(self, step: int, steps: int) -> StepResult:
        """Forward, backward and update. The result is the same on every process."""
        two = step >= self.draft_start * steps
        batches = self.micro_batches(step)
        first = [next_targets(batch) for batch in batches]
        second = [second_targets(batch, self.rows.bos_id) for batch in batches] if two else []
        counts = torch.stack(
            [
                sum((w.sum() for _, w in part), torch.zeros((), device=self.device))
                for part in (first, second)
            ]
        )
        self.mesh.sum_([counts])
        counts.clamp_(min=1)  # a step of nothing but padding has loss 0, not NaN
        sums = torch.zeros(2, device=self.device)
        passes: list[list[RouterStats]] = []
        for i, batch in enumerate(batches):
            docs = documents(batch.tokens_N.view(-1, batch.row_length), self.rows.bos_id)
            hidden = self.model(batch.tokens_N, docs, self.observe)
            head_VD = self.model.head_weight.to(hidden.states_ND.dtype)
            terms = [token_loss(hidden.states_ND, head_VD, *first[i])]
            routing = list(hidden.routing)
            if two:
                alone = self.drafts_alone
                draft = self.model.draft(
                    hidden.states_ND, batch.tokens_N, docs, self.observe, alone
                )
                routing += draft.routing
                head = head_VD.detach() if alone else head_VD
                terms.append(token_loss(draft.states_ND, head, *second[i]))
            weights = (1.0, self.settings.mtp_weight)
            loss = sum(
                w * term / count for w, term, count in zip(weights, terms, counts, strict=False)
            )
            if self.settings.sequence_balance:
                # Each pass gives a mean over its tokens; its weight is its part of the whole step.
                tokens = self.rows_a_step * batch.row_length
                share = self.settings.sequence_balance * len(batch.tokens_N) / tokens
                loss = loss + share * sum(
                    (s.balance_loss for s in routing if s.balance_loss is not None),
                    torch.zeros((), device=self.device),
                )
            loss.backward()
            sums[: len(terms)] += torch.stack([term.detach() for term in terms])
            passes.append([layer._replace(balance_loss=None) for layer in routing])
        trunk, drafting = self._gradients()
        self.mesh.sum_([sums, *trunk, *drafting])
        norm = clip_(trunk, self.settings.clip)
        if drafting:
            clip_(drafting, self.settings.clip)
        factor = rate(step, steps, self.settings.warmup)
        self.optimizer.step(self.settings.lr * factor, self.settings.vector_lr * factor)
        self.model.zero_grad(set_to_none=True)
        load = self.balance(passes)
        losses = (sums / counts).tolist()
        return StepResult(
            losses[0], losses[1] if two else None, norm, self.settings.lr * factor, load
        )

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
