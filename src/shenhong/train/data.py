"""Where batches come from: packed rows of tokens, and the order in which training sees them.

Legend: R rows in the file, T tokens a row, B rows of one batch, N = B*T.

The order is a pure function of (seed, position): epoch e visits the rows by its own permutation. The
position is a step's number times its rows, so a checkpoint needs no other cursor than its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from shenhong.errors import DataError, RecipeError
from shenhong.model import Decoder
from shenhong.parallel import Mesh
from shenhong.train.settings import TrainSettings


class Batch(NamedTuple):
    """One forward pass of one process: rows of equal length, flattened. A document starts where it says, and with every row.

    ``weights_N[i]`` is what token i counts as a target (0: prompt, padding, the first token of a document). ``extra``: what
    else an objective needs of each token, first dimension N: advantages, log-probabilities under another model, a
    teacher's states.
    """

    tokens_N: torch.Tensor  # int64
    weights_N: torch.Tensor  # float32
    starts_N: torch.Tensor  # bool
    row_length: int
    extra: Mapping[str, torch.Tensor] = {}

    def to(self, device: torch.device) -> Batch:
        extra = {name: tensor.to(device) for name, tensor in self.extra.items()}
        tokens_N, weights_N, starts_N = (t.to(device) for t in self[:3])
        return Batch(tokens_N, weights_N, starts_N, self.row_length, extra)


class Source(Protocol):
    """Where batches come from: packed rows, or what is made as training goes, such as rollouts."""

    def batches(self, step: int, model: Decoder, mesh: Mesh, part: int = 1) -> list[Batch]:
        """This process's share of a step, cut into forward passes: at least one.

        Everything follows from the step's number and ``model``, the weights as they are when the step starts (rollouts
        are written with them), so that a run that was stopped goes on as if it had not been. ``part`` above 1 asks for
        about 1/part of the step, for timing.
        """
        ...

    def mean_context(self) -> float:
        """Mean number of keys a token sees, itself included: what a step costs depends on it."""
        ...


class Rows:
    """The packed rows of one split, read-only.

    Error: DataError when the file is missing, damaged or empty.
    """

    def __init__(self, path: Path, bos_id: int, pad_id: int, prompt_weight: float = 0.0) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                self.metadata = dict(file.metadata() or {})
                self.tokens_RT = file.get_tensor("tokens")
                self.counted_RT = file.get_tensor("counted")
                own = "starts" in file.keys()  # noqa: SIM118 (it is no dictionary)
                self.starts_RT = file.get_tensor("starts").bool() if own else None
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(
                f"{path} is missing or damaged ({error}); delete the folder {path.parent} to pack the corpus again"
            ) from None
        if not len(self.tokens_RT):
            raise DataError(
                f"{path} holds no rows: the corpus is too small for this split; add text"
            )
        self.bos_id, self.pad_id, self.prompt_weight = bos_id, pad_id, prompt_weight

    def __len__(self) -> int:
        return len(self.tokens_RT)

    @property
    def row_length(self) -> int:
        return self.tokens_RT.shape[1]

    def mean_context(self) -> float:
        """Mean number of keys a query sees, itself included, for documents of the mean length."""
        documents = int(self._starts(torch.arange(len(self))).sum())
        return (self.tokens_RT.numel() / max(1, documents) + 1) / 2

    @property
    def characters(self) -> int:
        """Characters of all counted text, as the packer counted them."""
        return int(self.metadata["characters"])

    def answers(self, numbers: torch.Tensor) -> list[list[int]]:
        """The counted tokens of each document in some rows, ends included."""
        tokens, counted = self.tokens_RT[numbers].reshape(-1), self.counted_RT[numbers].reshape(-1)
        kept = counted.bool()
        document = self._starts(numbers).reshape(-1).cumsum(0)[kept]
        lengths = torch.unique_consecutive(document, return_counts=True)[1].tolist()
        return [part.tolist() for part in tokens[kept].long().split(lengths)]

    def batch(self, rows: torch.Tensor) -> Batch:
        tokens, starts = self.tokens_RT[rows].reshape(-1).long(), self._starts(rows).reshape(-1)
        counted = self.counted_RT[rows].reshape(-1).float()
        if self.prompt_weight:
            # A prompt token is neither an answer nor the first of a document nor padding. EOS may serve as padding,
            # and is then counted where it ends an answer, so the order of the two tests does not matter.
            prompt = (counted == 0) & ~starts & (tokens != self.pad_id)
            counted = counted + self.prompt_weight * prompt
        return Batch(tokens, counted, starts, self.row_length)

    def _starts(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, T] where documents begin: as the file says, else at every BOS, and with every row."""
        starts_BT = (
            self.tokens_RT[rows] == self.bos_id if self.starts_RT is None else self.starts_RT[rows]
        )
        starts_BT[:, 0] = True
        return starts_BT


class PackedRows:
    """Rows of a file in their shuffled order, cut into forward passes of at most ``micro_tokens``."""

    def __init__(self, rows: Rows, settings: TrainSettings, seed: int) -> None:
        self.rows, self.settings, self.seed = rows, settings, seed

    def batches(self, step: int, model: Decoder, mesh: Mesh, part: int = 1) -> list[Batch]:
        count = self.settings.rows_a_step
        if count % mesh.size:
            raise RecipeError(
                f"train.batch_tokens {self.settings.batch_tokens} are {count} rows, not divisible by {mesh.size} processes"
            )
        if part > 1:
            count = max(1, count // (part * mesh.size)) * mesh.size
        mine = order(len(self.rows), self.seed, step * count, count).chunk(mesh.size)[mesh.rank]
        size = max(1, self.settings.micro_tokens // self.settings.sequence_length)
        return [self.rows.batch(numbers) for numbers in mine.split(size)]

    def mean_context(self) -> float:
        return self.rows.mean_context()


def order(rows: int, seed: int, start: int, count: int) -> torch.Tensor:
    """Row numbers at positions start..start+count of the endless shuffled sequence."""
    taken: list[torch.Tensor] = []
    while count > 0:
        epoch, offset = divmod(start, rows)
        part = _permutation(rows, seed, epoch)[offset : offset + count]
        taken.append(part)
        start += len(part)
        count -= len(part)
    return torch.cat(taken)


@lru_cache(maxsize=2)  # the steps of an epoch share it
def _permutation(rows: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator)


def seen_rows(rows: int, seed: int, count: int) -> torch.Tensor:
    """Row numbers, ascending, among the first ``count`` positions of the sequence."""
    return torch.arange(rows) if count >= rows else order(rows, seed, 0, count).sort().values
