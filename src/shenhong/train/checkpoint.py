"""Checkpoints: everything a run needs to go on as if it had never stopped.

    checkpoints/step-000400/
        model.safetensors       weights and balancing biases
        optimizer.safetensors   momenta, moments, step count
        state.json              step, loss mean, random state, SHA-256 of everything

A checkpoint is built under a temporary name, synced and renamed; the one before it is removed only
afterwards, so a kill at any byte leaves at least one whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shenhong.errors import CheckpointError
from shenhong.runs.files import atomic_folder, digest

KEPT = 2


@dataclass
class Progress:
    """Where training stands: the scalar part of a checkpoint."""

    step: int = 0  # also the data cursor: a step's data follow from its number
    loss_mean: float | None = None  # running mean that the spike guard compares with
    seconds: float = 0.0  # of training so far, for display only
    tokens: int = 0  # trained on so far
    worse: int = 0  # looks in a row at which held-out text was clearly worse than at the best one


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def _fingerprint(state: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def saved(root: Path) -> list[Path]:
    """Whole checkpoints, oldest first (unfinished ones carry a dot in front)."""
    found = (path for path in root.glob("step-*") if path.name[5:].isdecimal())
    return sorted(found, key=lambda path: int(path.name[5:]))


def last_step(root: Path) -> int:
    """Of the newest whole checkpoint; 0 where there is none."""
    found = saved(root)
    return int(found[-1].name[5:]) if found else 0


def save(
    root: Path,
    progress: Progress,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
) -> Path:
    """Write a checkpoint; returns its folder. Error: RunError when the disk is full."""
    final = folder_of(root, progress.step)
    with atomic_folder(final) as folder:
        hashes = {}
        for name, tensors in (("model.safetensors", model), ("optimizer.safetensors", optimizer)):
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / name)
            hashes[name] = digest(folder / name)
        state = {
            "progress": asdict(progress),
            "random": torch.get_rng_state().numpy().tobytes().hex(),
            "files": hashes,
        }
        (folder / "state.json").write_text(json.dumps({**state, "sha256": _fingerprint(state)}))
    for old in saved(root)[:-KEPT]:
        shutil.rmtree(old)
    return final


def load_newest(
    root: Path,
) -> tuple[Progress, dict[str, torch.Tensor], dict[str, torch.Tensor]] | None:
    """The newest checkpoint, verified; None where there is none. Restores torch's random state.

    Error: CheckpointError when it is damaged. It is not skipped silently: going on from an older one
    is the user's choice, made by removing the damaged folder.
    """
    found = saved(root)
    if not found:
        return None
    folder = found[-1]
    remedy = f"remove {folder} to go on from " + (
        f"{found[-2].name}" if len(found) > 1 else "the start of training"
    )
    try:
        state = json.loads((folder / "state.json").read_bytes())
        if _fingerprint({k: v for k, v in state.items() if k != "sha256"}) != state["sha256"]:
            raise ValueError("its SHA-256 is not the one recorded")
        progress, random = Progress(**state["progress"]), bytes.fromhex(state["random"])
        tensors = []
        for name in ("model.safetensors", "optimizer.safetensors"):
            if digest(folder / name) != state["files"][name]:
                raise CheckpointError(
                    f"{folder / name} is damaged (its SHA-256 is not the one recorded); {remedy}"
                )
            tensors.append(load_file(folder / name))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is damaged ({type(error).__name__}: {error}); {remedy}"
        ) from None
    torch.set_rng_state(torch.frombuffer(bytearray(random), dtype=torch.uint8))
    return progress, tensors[0], tensors[1]
