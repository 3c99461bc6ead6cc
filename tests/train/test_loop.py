"""The loop around the steps, with something else to learn than next tokens of packed rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from shenhong.model import Decoder
from shenhong.parallel import Mesh
from shenhong.runs.events import read_events
from shenhong.runs.run import Run
from shenhong.train import TrainSettings, checkpoint, train
from shenhong.train.data import Batch
from shenhong.train.validate import Look
from tests.train.tiny_model import CONFIG, Alignment, Texts

STAGE = "align/train"
SETTINGS = TrainSettings(
    steps=6, dtype="float32", threads=1, kernels=True, checkpoint_seconds=1e-6, valid_every=0.5
)


class Interrupted(Texts):
    def batches(self, step: int, model: Decoder, mesh: Mesh, part: int = 1) -> list[Batch]:
        if step == 4:
            raise KeyboardInterrupt
        return super().batches(step, model, mesh, part)


def aligned(path: Path, source: Texts) -> Decoder:
    """A stage of a run that trains with an objective, a source and a validation of its own; its folder is in the run."""
    config = dataclasses.replace(CONFIG, bos_token_id=0, pad_token_id=2)

    def validate(model: Decoder) -> Look:
        return Look({"largest": float(model.head_weight.detach().abs().max())})

    with Run(path, create=True) as run:
        return train(
            run,
            path / "steps" / "align",
            SETTINGS,
            config,
            1,
            Mesh(),
            lambda seconds_a_token: 1.0,
            stage=STAGE,
            objective=Alignment(),
            source=source,
            validate=validate,
        )


def test_a_stage_keeps_its_plan_and_its_checkpoints_and_its_events_name_it(tmp_path):
    aligned(tmp_path, Texts())
    plan = Run(tmp_path, write=False).manifest
    assert plan[STAGE]["steps"] == 6 and "train" not in plan and plan["machine"]["threads"] == 1
    assert checkpoint.saved(tmp_path / "steps" / "align" / "checkpoints")[-1].name == "step-000006"
    events = [e for e in read_events(tmp_path) if e["kind"] in ("train", "valid")]
    assert all(event["stage"] == STAGE for event in events)
    steps = [event for event in events if event["kind"] == "train"]
    assert [event["tokens"] for event in steps] == [168 * (i + 1) for i in range(6)]
    assert {"loss", "distance", "size"} <= steps[0].keys()
    validations = [event for event in events if event["kind"] == "valid"]
    assert [event["step"] for event in validations] == [3, 6]
    assert all(event["largest"] > 0 for event in validations)


def test_a_stopped_stage_goes_on_as_if_it_had_not_been(tmp_path):
    whole = aligned(tmp_path / "whole", Texts())
    with pytest.raises(KeyboardInterrupt):
        aligned(tmp_path / "stopped", Interrupted())
    source = Texts()
    resumed = aligned(tmp_path / "stopped", source)
    assert (
        len(source.seen) == 2
    )  # steps 4 and 5, whose data were made with the weights of the checkpoint
    assert not source.seen[0].equal(torch.ones_like(source.seen[0]))
    assert all(a.equal(b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    tokens = [e["tokens"] for e in read_events(tmp_path / "stopped") if e["kind"] == "train"]
    assert tokens[-1] == 6 * 168


def test_tokens_of_a_checkpoint_that_did_not_count_them_follow_from_its_steps(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        aligned(tmp_path, Interrupted())
    root = tmp_path / "steps" / "align" / "checkpoints"
    progress, weights, optimizer = checkpoint.load_newest(root) or pytest.fail("none")
    checkpoint.save(root, dataclasses.replace(progress, tokens=0), weights, optimizer)
    aligned(tmp_path, Texts())
    tokens = [e["tokens"] for e in read_events(tmp_path) if e["kind"] == "train"]
    assert tokens[-1] == 4 * SETTINGS.batch_tokens + 2 * 168
