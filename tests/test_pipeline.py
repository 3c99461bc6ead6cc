"""A run, whatever happens to its folder, its corpus and its disk: told in one line, and nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shenhong.cli.main import main
from shenhong.runs.files import digest
from shenhong.runs.run import Run
from shenhong.stages.training import _seconds_spent
from shenhong.tokenizer import Tokenizer
from shenhong.train import checkpoint
from shenhong.train.trainer import StepResult, Trainer
from tests.conftest import STAGES, Captured, Tiny, shenhong, state

# --------------------------------------------------------------------------- stages and what they leave


def test_the_start_of_the_command_takes_of_the_minutes(tiny: Tiny) -> None:
    stages = json.loads((tiny.run / "manifest.json").read_text())["stages"]
    assert list(stages) == ["start", *STAGES]
    assert 0.2 < stages["start"]["seconds"] < 60  # torch alone takes that
    assert _seconds_spent({"stages": stages}) == sum(s["seconds"] for s in stages.values())


def test_a_finished_run_does_nothing_again(copy: Path, capfd: Captured) -> None:
    before = state(copy)
    assert main(["train", str(copy)]) == 0
    assert state(copy) == before
    assert "[1/7]" not in capfd.readouterr().err


def test_what_is_removed_is_made_again(copy: Path, tiny: Tiny) -> None:
    """Messages advise to delete what is damaged."""
    for name in ("tokens", "model"):
        shutil.rmtree(copy / name)
    (copy / "report.html").unlink()
    assert main(["train", str(copy)]) == 0
    for name in ("tokens", "model"):
        assert state(copy / name) == state(tiny.run / name)
    assert (copy / "report.html").exists()


def test_what_a_kill_left_is_cleared_and_what_stepped_aside_comes_back(
    copy: Path, tiny: Tiny
) -> None:
    before = state(copy)
    (copy / "checkpoints" / "step-000016").rename(copy / "checkpoints" / ".step-000016.old")
    (copy / "checkpoints" / ".step-000017.tmp").mkdir()
    (copy / ".manifest.json.123.tmp").write_text('{"for')
    with Run(copy):
        pass
    assert state(copy) == before
    # Killed before there was a manifest: still a run that may begin.
    young = copy.with_name("young")
    young.mkdir()
    (young / ".lock").touch()
    (young / ".manifest.json.123.tmp").write_text('{"for')
    assert main(["train", str(tiny.recipe), "--run", str(young), "--until", "corpus"]) == 0
    assert [p.name for p in young.glob(".*")] == [".lock"]


def test_evaluate_again_gives_the_same_measures(copy: Path, capfd: Captured) -> None:
    before = json.loads((copy / "evaluation.json").read_text())
    (copy / "report.html").unlink()
    assert main(["evaluate", str(copy), "--json"]) == 0
    after = json.loads(capfd.readouterr().out)
    assert after["bits_per_character"]["model"] == before["bits_per_character"]["model"]
    assert after["samples"] == before["samples"]
    assert (copy / "report.html").exists()


def test_a_run_says_nothing_of_the_machine_and_moves_with_its_corpus(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "recipes").mkdir(parents=True)
    for file in (recipe, recipe.with_name("poems.jsonl")):
        shutil.copy(file, old / "recipes")
    monkeypatch.chdir(old)
    begin = ["train", "recipes/tiny.toml", "--run", "runs/a"]
    assert main([*begin, "--until", "corpus"]) == 0
    assert (
        'paths = [\n    "../../recipes/poems.jsonl",\n]' in (old / "runs/a/recipe.toml").read_text()
    )
    monkeypatch.chdir(tmp_path)
    old.rename(new)
    for name in ("corpus", "recipe.toml"):
        assert (new / "runs/a" / name).exists()
    shutil.rmtree(new / "runs/a/corpus")  # so that the poems are read again
    assert main(["train", "new/runs/a"]) == 0  # from another folder
    assert main(["train", "new/recipes/tiny.toml", "--run", "new/runs/a"]) == 0
    for path in (new / "runs/a").rglob("*"):
        assert path.is_dir() or bytes(tmp_path) not in path.read_bytes(), path
    # Without its corpus it says what it misses.
    (new / "runs/a").rename(tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone" / "corpus")
    missing = tmp_path.parent / "recipes" / "poems.jsonl"
    refused("train", tmp_path / "alone", says=(f"no corpus file at {missing}; correct corpus",))


# --------------------------------------------------------------------------- corpus


RECORD = json.dumps({"id": "a", "title": "x", "author": "y", "paragraphs": "白日依山尽"})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no corpus file at"),
        (b"", "is empty; remove it from corpus.paths"),
        (b"\n\n", "holds no text"),
        (b'{"paragraphs": "\xff\xfe"}\n', "line 1: byte 17 is not UTF-8; convert the file"),
        (RECORD.encode() + b'\n{"id": "b", "title": "z"}\n', "line 2"),
        (
            RECORD.encode() + b'\n{"id": "b", "paragraphs": 7}\n',
            "field 'paragraphs' holds 7, which is no text",
        ),
        (b'{"paragraphs": "abc"', "is not JSON"),
        (RECORD.encode(), "1 not of a regulated form"),
    ],
    ids=["missing", "empty", "blank", "invalid", "textless", "number", "torn", "unfit"],
)
def test_a_bad_corpus(
    content: bytes | None, says: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    corpus = tmp_path / "verse.jsonl"
    if content is not None:
        corpus.write_bytes(content)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'name = "r"\nminutes = 1\n[corpus]\nkind = "verse"\npaths = ["verse.jsonl"]\n'
    )
    run = tmp_path / "run"
    refused("train", recipe, "--run", run, says=(corpus, says))
    assert not (run / "corpus").exists()
    assert content is None or corpus.read_bytes() == content
    refused("train", run, says=(corpus, says))  # going on says the same


def test_a_small_text_lacks_what_is_held_out_and_gets_a_small_vocabulary(
    tmp_path: Path, refused: Callable[..., str], capfd: Captured
) -> None:
    """The default vocabulary is asked of a text that has not so many: what it has is taken, and said."""
    pick = random.Random(0)
    words = ["".join(pick.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(400)]
    lines = (" ".join(pick.choices(words, k=12)) + "." for _ in range(300))
    (tmp_path / "a.txt").write_text("\n\n".join(lines))
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "r"\nminutes = 1\n[corpus]\npaths = ["a.txt"]\n')
    run = tmp_path / "run"
    begin = ["train", str(recipe), "--run", str(run), "--until", "tokens"]
    few = ("--set", "corpus.held_out=0.0001")
    refused(*begin, *few, says=("nothing is left for valid.parquet and test.parquet",))
    assert main(begin) == 0
    size = Tokenizer.load(run / "tokenizer").vocab_size
    assert size % 64 == 0 and 320 <= size < 8192
    said = f"the vocabulary has {size:,} and not tokenizer.vocab_size 8,192"
    assert said in capfd.readouterr().err


def test_a_corpus_that_changes_under_a_run(
    recipe: Path, tmp_path: Path, capfd: Captured, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    poems = Path(shutil.copy(recipe.with_name("poems.jsonl"), folder))
    mine = tmp_path / "mine.toml"
    mine.write_text(recipe.read_text().replace('"poems.jsonl"', '"texts"'))
    run = tmp_path / "run"
    train = ["train", str(mine), "--run", str(run)]
    good = poems.read_bytes()

    assert main([*train, "--until", "tokens"]) == 0
    before = state(run)
    os.utime(poems, (1, 1))  # touched, and the same
    assert main([*train, "--until", "tokens"]) == 0
    assert state(run) == before
    poems.write_bytes(good[: good.rindex(b"\n", 0, -1) + 1])  # before training: refined again
    capfd.readouterr()
    assert main([*train, "--until", "tokens"]) == 0
    said = capfd.readouterr().err
    assert f"{poems} was changed" in said and "[1/7] corpus" in said and "[3/7] tokens" in said

    assert main([*train, "--until", "train"]) == 0
    kept = poems.read_bytes()
    for change, what in (
        (lambda: poems.write_bytes(good), f"{poems} was changed"),
        (lambda: (folder / "more.jsonl").write_bytes(good), f"{folder / 'more.jsonl'} was added"),
    ):
        change()
        trained = state(run)
        refused(*train, says=(what, run, "put it back as it was, or choose another --run folder"))
        refused("train", run, says=(what,))
        assert state(run) == trained
        poems.write_bytes(kept)  # the remedy
    (folder / "more.jsonl").unlink()
    assert main(train) == 0
    shutil.rmtree(folder)  # a run has what its corpus became
    assert main(train) == 0


# --------------------------------------------------------------------------- run folders


def test_run_folders_of_others(
    copy: Path, tiny: Tiny, tmp_path: Path, refused: Callable[..., str]
) -> None:
    before = state(copy)
    refused(
        "train",
        tiny.recipe,
        "--run",
        copy,
        "--set",
        "train.lr=0.5",
        says=(copy, "train.lr", "--run"),
    )
    refused("train", copy, "--set", "train.lr=0.5", says=(copy, "frozen"))
    with Run(copy):
        for verb in ("train", "evaluate"):
            refused(verb, copy, says=(copy, f"in use by process {os.getpid()}"))
    assert state(copy) == before
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    for arguments in (["train", copy], ["evaluate", copy], ["train", tiny.recipe, "--run", copy]):
        refused(*arguments, says=(copy, "format 99", "use the version that wrote it"))
    for damaged in (
        '{"format": 1, "sta',
        "[" * 99_999,
        "7",
        '{"format": 1}',
        '{"format": 1, "stages": [3]}',
        '{"format": 1, "stages": {"corpus": 3}}',
        '{"format": 1, "stages": {"corpus": {}}}',
    ):
        (copy / "manifest.json").write_text(damaged)
        for verb in ("train", "evaluate"):
            refused(verb, copy, says=(copy / "manifest.json", "damaged"))

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    refused("train", tiny.recipe, "--run", mine, says=(mine, "is not a run folder"))
    refused("train", mine, says=(mine, "is not a run folder"))
    refused("evaluate", tmp_path / "absent", says=(tmp_path / "absent", "is not a run folder"))
    refused("train", tiny.recipe, "--run", mine / "thesis.txt", says=(mine / "thesis.txt", "--run"))
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    copy: Path, tiny: Tiny, refused: Callable[..., str]
) -> None:
    newest = copy / "checkpoints" / "step-000016"
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        shutil.rmtree(copy / "model", ignore_errors=True)
        file = newest / name
        good = file.read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        for bad in (good[: len(good) // 2], bytes(flipped), b"[]", b""):
            file.write_bytes(bad)
            refused("train", copy, says=(newest, "damaged", "remove", "go on from step-000015"))
            assert file.read_bytes() == bad
        file.write_bytes(good)
    (newest / "optimizer.safetensors").unlink()
    refused("train", copy, says=(newest, "damaged", "remove"))
    shutil.rmtree(newest)  # the remedy
    assert main(["train", str(copy)]) == 0
    assert state(copy / "model") == state(tiny.run / "model")
    assert digest(newest / "optimizer.safetensors") == digest(
        tiny.run / "checkpoints" / "step-000016" / "optimizer.safetensors"
    )


def test_a_checkpoint_of_another_model(
    copy: Path, tiny: Tiny, tmp_path: Path, refused: Callable[..., str]
) -> None:
    other = tmp_path / "other"
    change = ("--set", "model.moe_intermediate_size=24")
    assert main(["train", str(tiny.recipe), "--run", str(other), "--until", "tokens", *change]) == 0
    shutil.copytree(copy / "checkpoints", other / "checkpoints")
    refused("train", other, says=(other / "checkpoints" / "step-000016", "another model", "remove"))


def test_damaged_tokens_are_packed_again(
    copy: Path, tiny: Tiny, refused: Callable[..., str]
) -> None:
    file = copy / "tokens" / "test.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    refused("evaluate", copy, says=(file, "delete the folder"))
    shutil.rmtree(copy / "tokens")
    assert main(["train", str(copy)]) == 0
    assert state(copy / "tokens") == state(tiny.run / "tokens")


def test_kernels_that_are_forbidden_are_off_and_said_to_differ(copy: Path, tiny: Tiny) -> None:
    def train(run: Path, **environment: str) -> tuple[bool, str]:
        done = subprocess.run(
            shenhong("train", tiny.recipe, "--run", run, "--until", "train"),
            capture_output=True,
            text=True,
            env=os.environ | environment,
        )
        assert done.returncode == 0, done.stderr
        return Run(run, write=False).manifest["machine"]["kernels"], done.stderr

    fresh = copy.with_name(f"{copy.name}-plain")
    kept, said = train(fresh, SHENHONG_KERNELS="0")
    assert not kept and "note: " not in said
    shutil.rmtree(fresh / "checkpoints" / "step-000016")
    kept, said = train(fresh)  # what was frozen holds
    assert not kept and "note: " not in said
    if not Run(copy, write=False).manifest["machine"]["kernels"]:
        pytest.skip("no kernels on this machine")
    for path in (copy / "model", copy / "checkpoints" / "step-000016"):
        shutil.rmtree(path)
    kept, said = train(copy, SHENHONG_KERNELS="0")
    assert kept and "other conditions (kernels was True, is False)" in said


# --------------------------------------------------------------------------- full disks, bad numbers


Squeeze = Callable[[int], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def small_files(room: int) -> Iterator[None]:
    """The kernel refuses to write a file beyond ``room`` bytes, with an error like that of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["limit", "file system"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Squeeze]]:
    """A folder, and a way to leave only so many bytes there for a while."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "limit":
        yield folder, small_files
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system; the limit on file size is tested")

    @contextlib.contextmanager
    def filled(room: int) -> Iterator[None]:
        free = shutil.disk_usage(folder).free
        (folder / "filler").write_bytes(bytes(free - room))
        yield
        (folder / "filler").unlink()

    try:
        yield folder, filled
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_in_any_stage_loses_nothing(
    disk: tuple[Path, Squeeze], tiny: Tiny, refused: Callable[..., str]
) -> None:
    folder, squeeze = disk
    run = folder / "run"
    train = ["train", str(tiny.recipe), "--run", str(run)]
    for before, stage, room in (
        (None, "corpus", 32_768),
        ("tokenizer", "tokens", 49_152),
        ("tokens", "checkpoints", 327_680),
    ):
        if before:
            assert main([*train, "--until", before]) == 0
        there = state(run)
        with squeeze(room):
            refused(*train, says=(run / stage, "cannot write", "free space"))
            now = state(run)
        changed = {name for name in there if now.get(name) != there[name]}
        assert changed <= {"manifest.json", "events.jsonl"}
        assert not (run / stage).exists() or not list((run / stage).iterdir())
    assert main(train) == 0  # after making room
    assert state(run / "model") == state(tiny.run / "model")


def test_a_full_disk_under_the_finished_model(
    copy: Path, tiny: Tiny, refused: Callable[..., str]
) -> None:
    shutil.rmtree(copy / "model")
    with small_files(100_000):
        refused("train", copy, says=(copy / "model", "cannot write", "free space"))
    (copy / "evaluation.json").unlink()
    assert main(["train", str(copy), "--until", "model"]) == 0
    with small_files((copy / "events.jsonl").stat().st_size + 2_000):
        refused("train", copy, says=(copy / "evaluation.json", "cannot write", "free space"))
    assert main(["train", str(copy)]) == 0
    assert state(copy / "model") == state(tiny.run / "model")


def test_training_that_explodes_stops_with_the_last_good_checkpoint(
    tiny: Tiny, tmp_path: Path, refused: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    hot = ["train.lr=0.99", "train.vector_lr=0.99", "train.steps=400", "train.spike=0.5"]
    changes = [word for change in hot for word in ("--set", change)]
    said = refused("train", tiny.recipe, "--run", run, *changes, says=("step ", "train.lr"))
    kept = sorted((run / "checkpoints").glob("step-*"))
    assert f"the last good checkpoint, {kept[-1]}, is kept" in said
    assert not Run(run, write=False).done("train")
    progress, weights, _ = checkpoint.load_newest(run / "checkpoints") or pytest.fail("none")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert f"step {progress.step + 1}:" in said
    refused("train", run, says=("the last good checkpoint",))  # and never goes on in silence


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_a_number_that_is_none_stops_the_run_before_it_is_saved(
    what: str,
    tiny: Tiny,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = Trainer.step

    def step(self: Trainer, number: int, steps: int, part: int = 1) -> StepResult:
        result = honest(self, number, steps, part)
        if number != 4:
            return result
        if what == "loss":
            return replace(result, losses={"loss": float("nan")})
        self.model.head_weight.data[3, 3] = float("inf")
        return result

    monkeypatch.setattr(Trainer, "step", step)
    run = tmp_path / "run"
    kept = run / "checkpoints" / "step-000004"
    says = ("step 5: ", f"the last good checkpoint, {kept}, is kept")
    refused("train", tiny.recipe, "--run", run, says=says)
    assert checkpoint.saved(run / "checkpoints")[-1] == kept
    monkeypatch.undo()
    assert main(["train", str(run), "--until", "model"]) == 0
    assert state(run / "model") == state(tiny.run / "model")


# --------------------------------------------------------------------------- a recipe that is corrected


def test_nothing_is_locked_before_a_stage_has_gone_by_it(
    recipe: Path, tmp_path: Path, refused: Callable[..., str], capfd: Captured
) -> None:
    run = tmp_path / "run"
    begin = ["train", str(recipe), "--run", str(run)]
    # A path that is wrong, and then right.
    refused(*begin, "--set", 'corpus.paths=["nowhere.jsonl"]', says=("no corpus file",))
    assert main([*begin, "--until", "corpus"]) == 0
    assert "goes on with the recipe as it is now (corpus.paths is" in capfd.readouterr().err
    refined = digest(run / "corpus" / "train.parquet")
    # A vocabulary that is too large for the text; what was refined stays.
    refused(*begin, "--set", "tokenizer.vocab_size=500000", says=("vocab",))
    assert main([*begin, "--until", "tokens"]) == 0
    assert digest(run / "corpus" / "train.parquet") == refined
    # A rate and a width, as long as nothing is trained with them.
    changes = ["--set", "train.lr=0.5", "--set", "model.hidden_size=16", "--set", "name=again"]
    assert main([*begin, *changes, "--until", "model"]) == 0
    manifest = Run(run, write=False).manifest
    assert manifest["name"] == "run"  # the folder's
    # What went by it is another run.
    refused(*begin, says=("model.hidden_size is 16 there, 32 here", "its stage train went by that"))
    refused(
        *begin,
        *changes,
        *("--set", "corpus.near_duplicate=1"),
        says=("corpus.near_duplicate is 0.6 there, 1.0 here", "its stage corpus"),
    )
    assert main([*begin, *changes, "--set", "evaluate.titles=2"]) == 0
    refused(*begin, *changes, says=("evaluate.titles is 2 there, 4 here", "its stage evaluate"))
