"""Which weights become the finished model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch

from shenhong.cli.main import main
from shenhong.export import load_model
from shenhong.train import best, checkpoint
from tests.conftest import Captured


def published_again(run: Path) -> torch.Tensor:
    shutil.rmtree(run / "model")
    assert main(["train", str(run), "--until", "model"]) == 0
    return load_model(run / "model").model.norm.weight.detach()


def test_it_is_the_best_where_the_last_look_was_clearly_worse(copy: Path, capfd: Captured) -> None:
    root = copy / "checkpoints"
    found = checkpoint.load_newest(root)
    assert found is not None
    progress, weights, optimizer = found
    earlier = {name: tensor.clone() for name, tensor in weights.items()}
    earlier["model.norm.weight"] += 1
    best.save(root, best.Best(7, torch.ones(4, dtype=torch.float64)), earlier)
    assert published_again(copy).equal(weights["model.norm.weight"])  # the last look was not worse
    checkpoint.save(root, dataclasses.replace(progress, worse=1), weights, optimizer)
    assert published_again(copy).equal(earlier["model.norm.weight"])
    assert "the finished model is the one of step 7" in capfd.readouterr().err
    outputs = json.loads((copy / "manifest.json").read_text())["stages"]["model"]["outputs"]
    assert (outputs["step"], outputs["last_step"]) == (7, 16)
