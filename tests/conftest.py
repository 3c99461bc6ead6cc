"""What all tests share: quiet threads, one tiny run of the whole pipeline on real poems, and verbs that must refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from shenhong.cli.main import main
from shenhong.runs.files import digest

Captured = pytest.CaptureFixture[str]

# Child processes inherit these: no telemetry, and threads that wait do not spin on a busy machine.
os.environ["DO_NOT_TRACK"] = "true"
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="shenhong-state-")  # of nobody
os.environ["GOMP_SPINCOUNT"] = "100"
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

DATA = Path(__file__).parents[1] / "data"
POEMS = DATA / "poetry" / "poems.parquet"
ENGLISH = next((DATA / "english").glob("*.parquet"))

STAGES = ("corpus", "tokenizer", "tokens", "train", "model", "evaluate", "report")

RECIPE = """
name = "tiny"
seed = 3
[corpus]
kind = "verse"
paths = ["poems.jsonl"]
held_out = 0.1
[tokenizer]
vocab_size = 1024
isolate_ideographs = true
[model]
hidden_size = 32
num_hidden_layers = 2
intermediate_size = 64
num_attention_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
n_routed_experts = 4
moe_intermediate_size = 16
max_position_embeddings = 128
[train]
steps = 16
batch_tokens = 512
micro_tokens = 256
sequence_length = 128
mtp_start = 0.5
dtype = "float32"
threads = 1
kernels = true
valid_rows = 2
checkpoint_seconds = 1e-6
[evaluate]
titles = 4
"""


def shenhong(*arguments: object) -> list[str]:
    """The command line of a real process."""
    return [sys.executable, "-m", "shenhong.cli", *map(str, arguments)]


@dataclass(frozen=True)
class Tiny:
    """A recipe small enough for tests, and a finished run of it that no test may change."""

    recipe: Path
    run: Path
    printed: str
    said: str


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of every stage: some hundred real poems, raw as they are, and a model of a second."""
    folder = tmp_path_factory.mktemp("tiny")
    poems = next(pq.ParquetFile(POEMS).iter_batches(batch_size=500)).to_pylist()
    lines = (json.dumps(poem, ensure_ascii=False) + "\n" for poem in poems)
    (folder / "poems.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "tiny.toml").write_text(RECIPE, encoding="utf-8")
    return folder / "tiny.toml"


@pytest.fixture(scope="session")
def tiny(recipe: Path) -> Tiny:
    """The run that nothing interrupted."""
    run = recipe.parent / "whole"
    command = shenhong("train", recipe, "--run", run)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return Tiny(recipe, run, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on plain English documents, which have no prompts."""
    folder = tmp_path_factory.mktemp("prose")
    texts = pq.read_table(ENGLISH, columns=["text"]).slice(0, 300)["text"].to_pylist()
    lines = (json.dumps({"text": text[:400]}) + "\n" for text in texts)
    (folder / "english.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe = RECIPE.replace('"verse"', '"text"').replace("poems.jsonl", "english.jsonl")
    recipe = recipe.replace("isolate_ideographs = true\n", "").replace("steps = 16", "steps = 4")
    (folder / "prose.toml").write_text(recipe, encoding="utf-8")
    command = shenhong("train", folder / "prose.toml", "--run", folder / "prose")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "prose"


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A finished run of one's own, as near to its corpus as the original."""
    return Path(shutil.copytree(tiny.run, tiny.run.with_name(f"{tmp_path.name}-run")))


def state(folder: Path) -> dict[str, str]:
    """Every file and its hash; the lock names whoever came last."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): digest(path) for path in files}


@pytest.fixture
def refused(capfd: Captured) -> Callable[..., str]:
    """Run a verb that must be refused; returns the one line. Progress before it is no part of it."""

    def refuse(*arguments: object, says: tuple[object, ...]) -> str:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert (code, out) == (2, ""), (code, out, err)
        lines = [line for line in err.splitlines() if line.startswith("shenhong: ")]
        assert [*lines] == err.splitlines()[-1:] and "Traceback" not in err, err
        for part in says:
            assert str(part) in lines[0], lines[0]
        return lines[0]

    return refuse


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few long tests first, so that at the end no process waits for the other's."""
    first = ("test_wheel.py", "test_registry.py", "test_kill.py", "test_process.py")
    items.sort(key=lambda item: item.path.name not in first)  # stable
