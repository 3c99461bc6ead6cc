"""tune: a model learns from conversations to answer, and answers so in the finished folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shenhong import LLM, pipeline
from shenhong.engine import Sampling
from shenhong.errors import RecipeError
from shenhong.recipe import load
from shenhong.runs.events import read_events
from tests.conftest import RECIPE, Tiny

NUMBERS = "一二三四五六七八九"
TUNE = """
name = "tuned"
seed = 3
init = "{init}"
[corpus]
kind = "chat"
paths = ["talks.jsonl"]
simplify = true
held_out = 0.1
[train]
steps = 60
batch_tokens = 1024
sequence_length = 128
lr = 0.01
vector_lr = 0.01
mtp_weight = 0.0
dtype = "float32"
threads = 1
valid_every = 0.5
checkpoint_seconds = 1e-6
[[steps]]
kind = "tune"
[evaluate]
titles = 20
temperature = 0
"""


def talks(folder: Path) -> Path:
    """After a number its own name comes again: something that a small model can learn to the letter."""
    lines = [
        {
            "id": f"{a}{b}{form}",
            "messages": [
                {"role": "user", "content": form.format(a + b)},
                {"role": "assistant", "content": a * 2},
            ],
        }
        for a in NUMBERS
        for b in NUMBERS
        for form in ("问{}", "{}是何数", "请说{}")
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "talks.jsonl").write_text(text, encoding="utf-8")
    return folder / "talks.jsonl"


def recipe(folder: Path, init: Path) -> Path:
    talks(folder)
    (folder / "tune.toml").write_text(TUNE.format(init=init), encoding="utf-8")
    return folder / "tune.toml"


@pytest.fixture(scope="module")
def tuned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    pipeline.run(load(recipe(folder, tiny.run)), folder / "run")
    return folder / "run"


def test_held_out_loss_falls_and_answers_are_measured_before_and_after(tuned: Path) -> None:
    valid = [e["nats_per_token"] for e in read_events(tuned) if e["kind"] == "valid"]
    assert valid[-1] < valid[0] - 1
    measures = json.loads((tuned / "evaluation.json").read_text())["chat"]
    assert measures["model"]["exact_match"] > measures["before"]["exact_match"]
    assert "answers exactly right" in (tuned / "report.md").read_text(encoding="utf-8")


def test_the_finished_model_answers_in_a_conversation(tuned: Path) -> None:
    with LLM(tuned) as llm:
        greedy = Sampling(temperature=0)
        talk = [{"role": "user", "content": "问三四"}]
        (one,) = llm.chats([talk], sampling=greedy)
        assert one == llm.chat(talk, sampling=greedy)
        assert 0 < len(one) < 10  # it has learnt to stop


def test_a_stop_in_the_middle_goes_on_to_the_same_bits(
    tiny: Tiny, tuned: Path, tmp_path: Path
) -> None:
    from shenhong.train import loop

    made = load(recipe(tmp_path, tiny.run))
    honest = loop.Stop.__enter__

    class Stopped(loop.Stop):
        def __enter__(self) -> loop.Stop:
            stop = honest(self)
            stop.wanted = True  # after the first step
            return stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Stop", Stopped)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                pipeline.run(
                    made,
                    tmp_path / "run",
                )
    pipeline.run(made, tmp_path / "run")
    name = "model/model.safetensors"
    ours, theirs = load_file(tmp_path / "run" / name), load_file(tuned / name)
    assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_a_recipe_that_pretrains_and_then_tunes(tiny: Tiny, tmp_path: Path) -> None:
    """Each has its own rates; [train] is the pretraining's."""
    talks(tmp_path)
    text = RECIPE.replace("poems.jsonl", str(tiny.recipe.parent / "poems.jsonl"))
    text += """
[[steps]]
kind = "pretrain"
[[steps]]
kind = "tune"
corpus = {kind = "chat", paths = ["talks.jsonl"], held_out = 0.1, simplify = true}
train = {steps = 3, mtp_weight = 0.0}
"""
    (tmp_path / "both.toml").write_text(text, encoding="utf-8")
    made = load(tmp_path / "both.toml")
    first, second = made.train, made.steps[1].train  # type: ignore[attr-defined]
    assert (first.optimizer, second.optimizer) == ("muon", "adamw")
    assert second.lr == 1e-4 and second.sequence_length == 128
    pipeline.run(made, tmp_path / "run")
    with LLM(tmp_path / "run") as llm:
        assert llm.tokenizer.special.template is not None
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["kind"] == "chat" and evaluation["chat"]["before"]["answers"] > 0


def test_text_is_no_conversation(tiny: Tiny, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = recipe(tmp_path, tiny.run)
    path.write_text(path.read_text().replace('kind = "chat"', 'kind = "text"'))
    with pytest.raises(RecipeError, match="learns from conversations"):
        pipeline.run(load(path), tmp_path / "run")
    path.write_text(TUNE.format(init=tiny.run).replace("init = ", "# "))
    refused("train", path, says=("a tune takes a model", "or with init"))


def test_bad_conversations_are_named_by_file_and_line(
    tiny: Tiny, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = recipe(tmp_path, tiny.run)
    lines = (tmp_path / "talks.jsonl").read_text().splitlines()
    lines[4] = (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}'
    )
    lines[6] = '{"messages": [{"content": "a"}]}'
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    said = refused(
        "train",
        path,
        "--run",
        tmp_path / "run",
        "--set",
        "corpus.max_unreadable=0",
        says=(
            "line 5: message 2: the assistant's answer is empty",
            "line 7: message 1 has no role",
        ),
    )
    assert "2 of 243 records" in said
