"""What the training benchmarks share: a machine line, and training one arm on a prepared run's tokens."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shenhong import numerics
from shenhong.model import ModelConfig
from shenhong.parallel import Mesh
from shenhong.recipe import Recipe, load
from shenhong.tokenizer import Tokenizer
from shenhong.train import budget, machine
from shenhong.train.data import PackedRows, Rows
from shenhong.train.objectives import NextToken
from shenhong.train.settings import TrainSettings
from shenhong.train.trainer import Trainer
from shenhong.train.validate import score_rows


def conditions(threads: int, dtype: torch.dtype) -> str:
    here = machine.describe()
    units = ", ".join(here["units"])
    return (
        f"{here['cpu']} ({units}), {here['cores']} cores, {threads} threads, {dtype}, "
        f"kernels {'on' if numerics.kernels_in_use() else 'off'}, torch {here['torch']}, load {os.getloadavg()[0]:.2f}"
    )


def usual_machine(threads: int | None = None) -> torch.dtype:
    """All cores unless told, kernels, and bfloat16 where the CPU is made for it; prints the conditions."""
    dtype = "bfloat16" if machine.fast_bfloat16() else "float32"
    chosen = budget.apply({"threads": threads or machine.cores(), "kernels": True, "dtype": dtype})
    print(conditions(torch.get_num_threads(), chosen))
    return chosen


@dataclass
class Bench:
    """A run prepared up to its tokens: recipe, tokenizer ids and packed rows."""

    path: Path
    recipe: Recipe
    rows: Rows
    valid: Rows
    ids: dict[str, int]
    vocabulary: int

    @classmethod
    def open(cls, path: Path) -> Bench:
        tokenizer = Tokenizer.load(path / "tokenizer")
        bos, pad = tokenizer.bos_id, tokenizer.pad_id
        return cls(
            path,
            load(path / "recipe.toml"),
            Rows(path / "tokens" / "train.safetensors", bos, pad),
            Rows(path / "tokens" / "valid.safetensors", bos, pad),
            {"bos_token_id": bos, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad},
            tokenizer.vocab_size,
        )

    def config(self, recipe: Recipe, **changes: Any) -> ModelConfig:
        model = recipe.model.model_copy(update=changes)
        return recipe.model_copy(update={"model": model}).architecture(self.vocabulary, **self.ids)

    def trainer(
        self, config: ModelConfig, settings: TrainSettings, dtype: torch.dtype, seed: int
    ) -> Trainer:
        """Of next tokens of this run's rows, on one process."""
        objective = NextToken(config, settings)
        source, device = PackedRows(self.rows, settings, seed), torch.device("cpu")
        return Trainer(settings, config, objective, source, Mesh(), seed, dtype, device)

    def nats_per_character(self, model: Any) -> float:
        """Over the whole validation split, so that tokens and characters are of the same text."""
        nats, _ = score_rows(model, self.valid, torch.arange(len(self.valid)))
        return float(nats.sum()) / self.valid.characters


@dataclass
class Curve:
    """Held-out nats per character of one training run, by training seconds and tokens."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    load_max: float = 0.0  # busiest expert over the mean, last tenth of the run

    @property
    def final(self) -> float:
        return self.nats[-1]


def step_seconds(
    bench: Bench, config: ModelConfig, settings: TrainSettings, dtype: torch.dtype
) -> float:
    """Seconds of one optimizer step, averaged over the schedule's parts with and without the draft layer."""
    trial = bench.trainer(config, settings, dtype, 0)
    share = budget.late_share(trial)
    total = 0.0
    for first, part in ((0, 1 - share), (999_990, share)):
        if not part:
            continue
        times = []
        for i in range(5):
            begin = time.perf_counter()
            trial.step(first + i, 1_000_000)
            times.append(time.perf_counter() - begin)
        total += part * sorted(times[1:])[1]
    return total


def train_arm(
    bench: Bench,
    config: ModelConfig,
    settings: TrainSettings,
    dtype: torch.dtype,
    seed: int,
    steps: int,
    looks: int = 1,
) -> Curve:
    """Train for ``steps`` and look at the validation split ``looks`` times (looks are not on the clock)."""
    trainer = bench.trainer(config, settings, dtype, seed)
    curve, seconds, busiest = Curve(), 0.0, []
    at = {round(steps * (i + 1) / looks) for i in range(looks)}
    for step in range(steps):
        begin = time.perf_counter()
        result = trainer.step(step, steps)
        seconds += time.perf_counter() - begin
        if result.load and step >= 0.9 * steps:
            busiest.append(max(max(layer) * len(layer) for layer in result.load))
        if step + 1 in at:
            curve.seconds.append(round(seconds, 2))
            curve.tokens.append((step + 1) * settings.batch_tokens)
            curve.nats.append(bench.nats_per_character(trainer.model))
    curve.load_max = sum(busiest) / len(busiest) if busiest else 0.0
    return curve
