"""The verbs, and what they say to a person who made a mistake: one line, exit code 2, nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shenhong import pipeline
from shenhong.cli import STAGES, main
from shenhong.run import Run, digest
from shenhong.train import checkpoint
from shenhong.train.trainer import StepResult, Trainer
from tests.conftest import Tiny, shenhong

Captured = pytest.CaptureFixture[str]


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


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A finished run of one's own, as near to its corpus as the original."""
    return Path(shutil.copytree(tiny.run, tiny.run.with_name(f"{tmp_path.name}-run")))


def state(folder: Path) -> dict[str, str]:
    """Every file and its hash; the lock names whoever came last."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): digest(path) for path in files}


def written(recipe: Path, text: str) -> Path:
    """A recipe beside the tiny one, so that it finds the same poems."""
    other = recipe.with_name("other.toml")
    other.write_text(text)
    return other


# --------------------------------------------------------------------------- what works


@pytest.mark.parametrize("verb", ["quickstart", "train", "generate", "evaluate", "export", "info"])
def test_help_of_every_verb_shows_an_example(verb: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"example: shenhong {verb}" in shown and "None" not in shown


def test_help_lists_the_verbs_and_loads_nothing_heavy() -> None:
    code = "import sys; from shenhong.cli import parser; parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    assert tuple(pipeline.STAGES) == STAGES == tuple(n for n in STAGES if n in pipeline.OUTPUTS)


def test_a_run_says_what_it_did_and_where_its_report_is(tiny: Tiny) -> None:
    for number, stage in enumerate(STAGES, 1):
        assert f"[{number}/7] {stage}" in tiny.said
    assert "bits per character" in tiny.printed
    assert tiny.printed.splitlines()[-1] == f"report: {tiny.run / 'report.html'}"


def test_the_start_of_the_command_takes_of_the_minutes(tiny: Tiny) -> None:
    stages = json.loads((tiny.run / "manifest.json").read_text())["stages"]
    assert list(stages) == ["start", *STAGES]
    assert 0.2 < stages["start"]["seconds"] < 60  # torch alone takes that
    assert pipeline._seconds_spent({"stages": stages}) == sum(s["seconds"] for s in stages.values())


def test_a_finished_run_does_nothing_again(copy: Path, capfd: Captured) -> None:
    before = state(copy)
    assert main(["train", str(copy)]) == 0
    assert state(copy) == before
    assert "[1/7]" not in capfd.readouterr().err


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


def test_generate_repeats_itself_and_n_begins_with_the_same(tiny: Tiny, capfd: Captured) -> None:
    def answers(*more: str) -> list[str]:
        command = ["generate", str(tiny.run), "长城", "--max-tokens", "12", "--json", *more]
        assert main(command) == 0
        shown = json.loads(capfd.readouterr().out)
        assert shown["prompt"] == ("五绝 长城" if "--form" in more else "长城")
        return shown["answers"]

    three = answers("--n", "3")
    assert len(three) == 3 and answers("--n", "3") == three
    assert answers() == three[:1]
    assert answers("--n", "3", "--seed", "1") != three
    assert len(answers("--form", "五绝")) == 1
    assert main(["generate", str(tiny.run / "model"), "长城", "--max-tokens", "12"]) == 0
    assert capfd.readouterr().out == three[0] + "\n"


def test_info_tells_of_runs_and_model_folders(tiny: Tiny, capfd: Captured) -> None:
    assert main(["info", str(tiny.run), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["vocabulary"] == 1024 and facts["parameters"] > facts["active parameters"]
    assert main(["info", str(tiny.run / "model")]) == 0
    assert f"{facts['parameters']}" in capfd.readouterr().out


def test_info_tells_how_far_an_unfinished_run_has_come(
    copy: Path, tiny: Tiny, capfd: Captured
) -> None:
    def info(path: Path) -> dict:
        capfd.readouterr()
        assert main(["info", str(path), "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    young = copy.with_name(f"{copy.name}-young")
    assert main(["train", str(tiny.recipe), "--run", str(young), "--until", "tokenizer"]) == 0
    known = info(young)
    assert (known["recipe"], known["kind"], known["seed"]) == ("tiny", "verse", 3)
    assert [known[f"stage {name}"] for name in STAGES] == ["done"] * 2 + ["to do"] * 5
    assert "step" not in known

    shutil.rmtree(copy / "model")
    for step in (15, 16):
        shutil.rmtree(copy / "checkpoints" / f"step-{step:06}")
    with Run(copy):  # a run at work may be asked
        known = info(copy)
    assert (known["stage tokens"], known["stage train"]) == ("done", "unfinished")
    assert (known["step"], known["steps"]) == (16, 16)
    assert 0 < known["held-out nats per token"] < 10
    assert known["to go on"] == f"shenhong train {copy}"
    assert main(["info", str(copy)]) == 0
    assert "held-out nats per token" in capfd.readouterr().out


def test_evaluate_again_gives_the_same_measures(copy: Path, capfd: Captured) -> None:
    before = json.loads((copy / "evaluation.json").read_text())
    (copy / "report.html").unlink()
    assert main(["evaluate", str(copy), "--json"]) == 0
    after = json.loads(capfd.readouterr().out)
    assert after["bits_per_character"]["model"] == before["bits_per_character"]["model"]
    assert after["samples"] == before["samples"]
    assert (copy / "report.html").exists()


def test_a_reader_who_leaves_ends_it_silently(tiny: Tiny) -> None:
    writer = subprocess.Popen(
        shenhong("generate", tiny.run, "长城", "--n", 2, "--max-tokens", 8),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
    )
    assert writer.stdout and writer.stderr
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait(60) == 141


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


# --------------------------------------------------------------------------- corpus


RECORD = json.dumps({"id": "a", "title": "x", "author": "y", "paragraphs": "白日依山尽"})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no corpus file at"),
        (b"", "is empty; remove it from corpus.paths"),
        (b"\n\n", "holds no text"),
        (b'{"paragraphs": "\xff\xfe"}\n', "byte 17 is not UTF-8; convert the file to UTF-8"),
        (RECORD.encode() + b'\n{"id": "b", "title": "z"}\n', "line 2"),
        (RECORD.encode() + b'\n{"id": "b", "paragraphs": 7}\n', "holds no text; mend the record"),
        (b'{"paragraphs": "abc"', "is not JSON"),
        (RECORD.encode(), "no record of"),
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


# --------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("train.stepz=3", "unknown key train.stepz; did you mean steps?"),
        ("speed=3", "unknown key speed"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("corpus.paths=7", "corpus.paths"),
        ("model.num_experts_per_tok=5", "experts"),
        ("model.n_group=3", "group"),
        ("model.topk_group=2", "group"),
        ("model.qk_rope_head_dim=9", "even"),
        ("train.batch_tokens=500", "multiple of train.sequence_length"),
        ("train.sequence_length=256", "max_position_embeddings"),
        ("tokenizer.vocab_size=1000", "64"),
        ("train.steps", "write it as section.key=value"),
        ("name.x=3", "name is a value, not a section"),
        ("seed=-1", "seed"),
    ],
)
def test_a_bad_setting(
    change: str, says: str, recipe: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    refused("train", recipe, "--run", tmp_path / "run", "--set", change, says=(says,))
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_none(recipe: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    absent, broken, binary = (tmp_path / f"{name}.toml" for name in ("absent", "broken", "binary"))
    refused("train", absent, says=(absent, "does not exist; give a recipe"))
    broken.write_text("name = ")
    refused("train", broken, says=(broken, "not valid TOML"))
    binary.write_bytes(b"\xff\xfe\x00")
    refused("train", binary, says=(binary, "a recipe is a TOML file"))
    timeless = written(recipe, recipe.read_text().replace("steps = 16\n", ""))
    refused("train", timeless, says=(timeless, "give either minutes"))
    nameless = written(recipe, recipe.read_text().replace('name = "tiny"', ""))
    refused("train", nameless, says=(nameless, "name is missing"))


def test_a_vocabulary_that_the_corpus_cannot_fill(
    recipe: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    change = ("--set", "tokenizer.vocab_size=64000")
    refused("train", recipe, "--run", tmp_path / "run", *change, says=("vocab_size", "lower it to"))
    assert (tmp_path / "run" / "corpus" / "train.parquet").exists()


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
    (copy / "manifest.json").write_text('{"format": 1, "sta')
    refused("train", copy, says=(copy / "manifest.json", "damaged"))

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


# --------------------------------------------------------------------------- models


def test_models_that_are_missing_unfinished_or_damaged(
    copy: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    absent, model = tmp_path / "absent", copy / "model"
    for verb in (["generate", absent, "长城"], ["info", absent]):
        refused(*verb, says=(absent, "does not exist; give a run folder"))
    refused("info", tmp_path, says=(tmp_path, "has no config.json"))
    for name, bad in (
        ("model.safetensors", b"short"),
        ("config.json", b'{"model_type"'),
        ("config.json", b"[]"),
        ("tokenizer.json", b"{}"),
    ):
        good = (model / name).read_bytes()
        (model / name).write_bytes(bad)
        refused("generate", copy, "长城", says=(model / name,))
        (model / name).write_bytes(good)
    (model / "model.safetensors").unlink()
    refused("generate", copy, "长城", says=(model, "model.safetensors"))
    shutil.rmtree(model)
    for verb in (["generate", copy, "长城"], ["evaluate", copy]):
        refused(*verb, says=(copy, "has no finished model yet; 'shenhong train"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["长城", "--temperature", "-1"], "temperature"),
        (["长城", "--temperature", "nan"], "temperature"),
        (["长城", "--top-p", "0"], "top_p"),
        (["长城", "--top-p", "1.5"], "top_p"),
        (["长城", "--top-k", "-1"], "top_k"),
        (["长" * 200], "tokens; this model reads"),
        (["\udcff"], "surrogate"),
    ],
)
def test_impossible_requests(
    arguments: list[str], says: str, tiny: Tiny, refused: Callable[..., str]
) -> None:
    refused("generate", tiny.run, *arguments, says=(says,))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x", "y", "--n", "0"], "argument --n: 0 is below one"),
        (["generate", "x", "y", "--n", "few"], "argument --n: few is not a number"),
        (["generate", "x", "y", "--form", "五绝诗"], "did you mean 五绝?"),
        (["generate", "x", "y", "--rhyme", "阴"], "--rhyme 阴: no rhyme of the 平水韵"),
        (["generate", "x", "y", "--tempreture", "1"], "did you mean --temperature?"),
        (["generate", "x", "y", "z"], "unknown argument z"),
        (["generate", "x"], "required: prompt; see 'shenhong generate --help'"),
        (["quickstart", "--minutes", "0"], "argument --minutes: 0 is not above zero"),
        (["quickstart", "--minutes", "nan"], "argument --minutes: nan is not above zero"),
        (["quickstart", "--minuets=3"], "did you mean --minutes?"),
        (["train", "x", "--until", "trian"], "did you mean train?"),
        (["train", "x", "--set"], "argument --set: expected one argument"),
        (["trian", "x"], "argument VERB: trian is not known (did you mean train?)"),
        (["cook"], "argument VERB: cook is not known, choose from quickstart, train"),
        (["--loud"], "required: VERB; see 'shenhong --help'"),
        ([], "required: VERB; see 'shenhong --help'"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], says: str, capsys: Captured) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    assert err.startswith("shenhong: ") and says in err


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

    def step(self: Trainer, number: int, steps: int) -> StepResult:
        result = honest(self, number, steps)
        if number != 4:
            return result
        if what == "loss":
            return replace(result, loss=float("nan"))
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
