"""Which model of a training is the finished one: the last, or an earlier one that held-out text clearly prefers.

    checkpoints/best/   model.safetensors, and state.json with its step and its loss on each piece of held-out text

Two looks at the same text differ by chance too. The pieces are compared in pairs, so the noise of their difference is
known, and an earlier model takes the last one's place only where it is better by more than that.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shenhong.errors import CheckpointError
from shenhong.runs.files import atomic_folder, digest

CLEARLY = 2.0  # standard errors


@dataclass
class Best:
    """The least held-out loss so far, and where its model rests."""

    step: int
    nats_P: torch.Tensor

    def above(self, nats_P: torch.Tensor) -> float:
        """By how many standard errors of the paired difference a look is above this one; 0 where nobody can say."""
        difference_P = nats_P - self.nats_P
        if len(difference_P) < 2:
            return 0.0
        error = float(difference_P.std()) * math.sqrt(len(difference_P))
        return float(difference_P.sum()) / error if error else 0.0


def folder_of(root: Path) -> Path:
    return root / "best"


def save(root: Path, best: Best, model: dict[str, torch.Tensor]) -> None:
    """Keep this model in place of the one before. Error: RunError when the disk is full."""
    with atomic_folder(folder_of(root)) as folder:
        weights = folder / "model.safetensors"
        save_file({k: v.detach().contiguous() for k, v in model.items()}, weights)
        state = {"step": best.step, "nats": best.nats_P.tolist(), "sha256": digest(weights)}
        (folder / "state.json").write_text(json.dumps(state))


def load(root: Path) -> Best | None:
    """What is kept, without its weights; None where nothing is. Error: CheckpointError."""
    if not folder_of(root).exists():
        return None
    state = _state(root)
    return Best(state["step"], torch.tensor(state["nats"], dtype=torch.float64))


def weights(root: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and weights of the model that is kept. Error: CheckpointError."""
    state, file = _state(root), folder_of(root) / "model.safetensors"
    try:
        if digest(file) != state["sha256"]:
            raise ValueError("its SHA-256 is not the one recorded")
        return state["step"], load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(file, error) from None


def _state(root: Path) -> dict:
    file = folder_of(root) / "state.json"
    try:
        state = json.loads(file.read_bytes())
        good = (
            isinstance(state["step"], int)
            and isinstance(state["sha256"], str)
            and all(isinstance(nats, float) for nats in state["nats"])
        )
        if not good:
            raise ValueError("not as it was written")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(file, error) from None
    return state


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file} is damaged ({error}); remove the folder {file.parent} to go on without it"
    )
