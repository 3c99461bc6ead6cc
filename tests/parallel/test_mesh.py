"""Two processes and one give the same losses: global normalisers, gradients and balancing included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shenhong.runs.events import read_events

ROOT = Path(__file__).parents[2]


def losses(data: Path | str, settings: dict, processes: int) -> dict:
    command = [sys.executable]
    if processes > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
    command += ["-m", "tests.parallel.losses", str(data), json.dumps(settings)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("rule", ["quantile", "centred"])
def test_two_processes_equal_one(tmp_path, rule):
    stream = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 32, (24, 32), generator=stream)
    tokens[:, 0] = 0
    tokens[torch.rand(tokens.shape, generator=stream) < 0.08] = 0
    # Rows differ much in how many tokens count, so a mean of means would show.
    counted = (
        torch.rand(tokens.shape, generator=stream) < torch.linspace(0.1, 0.9, 24)[:, None]
    ) & (tokens != 0)
    path = tmp_path / "train.safetensors"
    save_file(
        {"tokens": tokens.to(torch.uint16), "counted": counted.to(torch.uint8)},
        path,
        {"characters": "1"},
    )
    settings = {
        "batch_tokens": 256,
        "sequence_length": 32,
        "micro_tokens": 64,
        "balance": rule,
        "balance_rate": 0.01,
    }
    one, two = losses(path, settings, 1), losses(path, settings, 2)
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(two["load"], one["load"], atol=1e-9)
    np.testing.assert_allclose(two["biases"], one["biases"], atol=1e-5)
    # Whole batches in one forward pass are the same again: accumulation changes nothing.
    whole = losses(path, {**settings, "micro_tokens": 256}, 1)
    np.testing.assert_allclose(whole["losses"], one["losses"], rtol=1e-5)


def test_an_objective_and_data_of_ones_own_are_the_same_on_any_number_of_processes():
    settings = {"sequence_balance": 0.01, "lr": 0.005}
    one, *more = (losses("texts", settings, processes) for processes in (1, 2, 3))
    for several in more:
        np.testing.assert_allclose(several["losses"], one["losses"], rtol=1e-4, atol=1e-5)


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    # "--" keeps torchrun from taking --run for an abbreviation of its own --run-path.
    command += ["-m", "--", "shenhong.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


def test_the_command_line_under_torchrun(tiny, tmp_path):
    done = torchrun("train", tiny.recipe, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("bits per character, held out") == 1  # one process speaks for both

    def events(run: Path) -> list[float]:
        return [e["loss"] for e in read_events(run) if e["kind"] == "train"]

    np.testing.assert_allclose(events(tmp_path / "run"), events(tiny.run), rtol=1e-4)
    # What the leader refuses ends all processes, and is said once.
    refused = torchrun("train", tiny.recipe, "--run", tmp_path / "run", "--set", "seed=9")
    assert refused.returncode != 0
    assert refused.stderr.count("another recipe") == 1
    assert "RuntimeError" not in refused.stderr
