"""Which model of a training is the finished one, and when more of it would only make it worse."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from shenhong.errors import CheckpointError
from shenhong.model import Decoder
from shenhong.parallel import Mesh
from shenhong.runs.events import read_events
from shenhong.runs.run import Run
from shenhong.train import TrainSettings, best, checkpoint, train
from shenhong.train.validate import Look
from tests.train.tiny_model import CONFIG, Alignment, Texts

PIECES = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 100


def look(above: float, noise: int) -> Look:
    """Of text whose loss is ``above`` a piece higher than 100, with chance of its own."""
    chance = torch.randn(64, generator=torch.Generator().manual_seed(noise), dtype=torch.float64)
    return Look({"nats_per_token": 100 + above}, PIECES + above + 0.1 * chance)


def trained(folder: Path, heights: list[float], planned: bool = True) -> Path:
    """A training whose looks find these losses, one after the other; its checkpoints."""
    settings = TrainSettings(
        steps=None if planned else len(heights),
        dtype="float32",
        threads=1,
        valid_every=1 / len(heights),
        checkpoint_seconds=1e-6,
    )
    config = dataclasses.replace(CONFIG, bos_token_id=0, pad_token_id=2)
    number = 0

    def validate(model: Decoder) -> Look:
        nonlocal number
        number += 1
        return look(heights[min(number, len(heights)) - 1], number)

    with Run(folder, create=True) as run:
        if planned:  # as if so many steps had been counted
            run.freeze("train", lambda: {"steps": len(heights), "tokens_per_step": 8192})
        args = (settings, config, 1, Mesh(), lambda seconds_a_token: 1.0)
        train(run, folder, *args, objective=Alignment(), source=Texts(), validate=validate)
    return folder / "checkpoints"


def last(root: Path) -> checkpoint.Progress:
    found = checkpoint.load_newest(root)
    assert found is not None
    return found[0]


def test_the_best_look_is_kept_where_the_last_is_clearly_above_it(tmp_path: Path) -> None:
    root = trained(tmp_path, [5.0, 1.0, 1.5], planned=False)
    assert last(root).worse == 1 and last(root).step == 3
    step, weights = best.weights(root)
    assert step == 2
    found = checkpoint.load_newest(root)
    assert found and any(not weights[name].equal(found[1][name]) for name in weights)


def test_noise_takes_no_place(tmp_path: Path) -> None:
    root = trained(tmp_path, [5.0, 1.0, 1.01], planned=False)
    assert best.weights(root)[0] == 2  # the least, and yet nobody can say that it is better
    assert last(root).worse == 0


def test_a_planned_training_ends_where_two_looks_of_its_second_half_are_worse(
    tmp_path: Path,
) -> None:
    root = trained(tmp_path / "ends", [5.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    assert (last(root).step, last(root).worse) == (4, 2)
    given = trained(tmp_path / "given", [5.0, 1.0, 2.0, 2.0, 2.0, 2.0], planned=False)
    assert last(given).step == 6  # who asks for six steps gets six
    recovers = trained(tmp_path / "recovers", [1.0, 2.0, 2.0, 0.5, 0.5, 0.5])
    assert (last(recovers).step, last(recovers).worse) == (6, 0)


def test_what_ended_early_does_not_go_on(tmp_path: Path) -> None:
    root = trained(tmp_path, [5.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    before = len(list(read_events(tmp_path)))
    trained(tmp_path, [5.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    assert last(root).step == 4
    assert len(list(read_events(tmp_path))) == before


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b'{"step": 1}', b'{"step": "x", "nats": [], "sha256": ""}']
)
def test_a_damaged_one_is_named(damage: bytes, tmp_path: Path) -> None:
    root = trained(tmp_path, [5.0, 1.0, 2.0], planned=False)
    (root / "best" / "state.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"best/state\.json is damaged"):
        best.load(root)


def test_weights_that_changed_are_refused(tmp_path: Path) -> None:
    root = trained(tmp_path, [5.0, 1.0, 2.0], planned=False)
    file = root / "best" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        best.weights(root)
