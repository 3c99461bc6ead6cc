"""A recipe as a list of steps: each makes a model out of the one before it, or out of one that it names."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from shenhong import pipeline
from shenhong.domains import of_run
from shenhong.errors import RecipeError, RunError, UsageError
from shenhong.export import load_model
from shenhong.recipe import load
from shenhong.runs.events import read_events
from shenhong.runs.files import digest
from shenhong.runs.run import Run, plan_of
from shenhong.stages import registry
from shenhong.stages.describe import describe, evaluate_again, summary
from shenhong.stages.plan import plan
from shenhong.tokenizer import Tokenizer
from shenhong.tokenizer.tokenizer import CHAT_TEMPLATE
from tests.conftest import RECIPE, STAGES, Tiny, state
from tests.test_extending import example

WEIGHTS = Path("model/model.safetensors")

STEPS = """
[[steps]]
kind = "pretrain"
name = "base"
[[steps]]
kind = "pretrain"
name = "english"
[steps.train]
steps = 6
batch_tokens = 512
micro_tokens = 256
sequence_length = 128
dtype = "float32"
threads = 1
valid_rows = 2
[steps.corpus]
kind = "text"
paths = ["english.txt"]
held_out = 0.1
min_characters = 20
"""


def written(tiny: Tiny, folder: Path, steps: str) -> Path:
    shutil.copy(tiny.recipe.parent / "poems.jsonl", folder)
    lines = (
        f"Sentence number {n} says something of its own about {n * n}.\n\n" for n in range(600)
    )
    (folder / "english.txt").write_text("".join(lines))
    path = folder / "steps.toml"
    path.write_text(RECIPE + steps)
    return path


@pytest.fixture
def soften(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy step as one new file beside the others."""
    import shenhong.stages

    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "soften.py").write_text(example("stages/soften.py"))
    monkeypatch.setattr(
        shenhong.stages, "__path__", [*shenhong.stages.__path__, str(tmp_path / "stages")]
    )
    registry._offered.cache_clear()
    yield
    registry._offered.cache_clear()
    sys.modules.pop("shenhong.stages.soften", None)


@pytest.fixture(scope="module")
def two(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that nothing interrupted; no test may change it."""
    folder = tmp_path_factory.mktemp("two")
    pipeline.run(load(written(tiny, folder, STEPS)), folder / "run")
    return folder / "run"


def test_each_step_has_its_folder_and_the_last_makes_the_model(two: Path, tiny: Tiny) -> None:
    names = json.loads((two / "manifest.json").read_text())["plan"]
    assert names == [
        *("corpus", "tokenizer", "base/tokens", "base/train", "base/model"),
        *("english/corpus", "english/tokens", "english/train", "english/model"),
        *("evaluate", "report"),
    ]
    for place in ("steps/base/checkpoints", "steps/base/model/config.json", "model/config.json"):
        assert (two / place).exists()
    assert (two / "steps/english/corpus/train.parquet").exists()
    # The first of the steps is what a recipe of one pretraining does.
    assert digest(two / "steps/base" / WEIGHTS) == digest(tiny.run / WEIGHTS)
    assert digest(two / WEIGHTS) != digest(tiny.run / WEIGHTS)


def test_a_step_goes_on_from_the_model_before_it(two: Path) -> None:
    base, english = (load_model(two / place) for place in ("steps/base/model", "model"))
    ours, theirs = base.head_weight.flatten(), english.head_weight.flatten()
    assert ours @ theirs / (ours.norm() * theirs.norm()) > 0.9


def test_a_model_has_a_chat_template_once_it_has_learnt_to_answer(
    two: Path, tiny: Tiny, prose: Path, tmp_path: Path
) -> None:
    def template(model: Path) -> str | None:
        theirs = AutoTokenizer.from_pretrained(model).chat_template
        assert Tokenizer.load(model).special.template == theirs
        return theirs

    assert template(prose / "model") is None and not list(prose.glob("model/*.jinja"))
    for place in ("steps/base/model", "model"):  # what was learnt is not forgotten
        assert template(two / place) == CHAT_TEMPLATE
    poems = RECIPE.replace("poems.jsonl", str(tiny.recipe.parent / "poems.jsonl"))
    recipe = poems.split("[tokenizer]")[0] + "[train]" + poems.split("[train]")[1]
    path = tmp_path / "on.toml"
    path.write_text(recipe.replace("steps = 16", "steps = 1"))
    changes = [f"init={prose}", "corpus.simplify=false"]  # as the model learnt
    pipeline.run(load(path, changes), tmp_path / "run", "model")
    assert template(tmp_path / "run" / "model") == CHAT_TEMPLATE


def test_events_of_different_steps_do_not_hide_each_other(two: Path) -> None:
    trained = [e for e in read_events(two) if e["kind"] == "train"]
    counts = {
        name: sum(e.get("stage") == name for e in trained)
        for name in ("base/train", "english/train")
    }
    assert counts == {"base/train": 16, "english/train": 6}


def test_the_run_is_measured_on_the_data_of_its_last_step(two: Path) -> None:
    found = json.loads((two / "evaluation.json").read_text())
    assert found["kind"] == "text" and "verse" not in found
    assert "report:" in summary(two) and describe(two)["layers"] == 2
    assert "to go on" not in describe(two)


def test_the_page_and_the_report_take_a_run_for_what_its_last_step_was_measured_on(
    two: Path, tiny: Tiny, tmp_path: Path
) -> None:
    """A step with documents of its own, then one on the run's poems: what comes out is a poet."""
    _, first, second = STEPS.replace("steps = 6", "steps = 2").split("[[steps]]")
    recipe = load(written(tiny, tmp_path, f"[[steps]]{second}[[steps]]{first}"))
    pipeline.run(recipe, tmp_path / "run")
    assert (of_run(tmp_path / "run").name, of_run(two).name, of_run(tiny.run).name) == (
        *("verse", "text", "verse"),
    )
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["kind"] == "verse"
    assert "exact form" in summary(tmp_path / "run")


def test_the_report_tells_the_trainings_apart_and_adds_up_what_they_cost(two: Path) -> None:
    report = (two / "report.md").read_text()
    for part in ("## Training: base", "## Training: english", "## Experts: english"):
        assert part in report
    assert "optimizer steps, base | 16 of" in report and "optimizer steps, english | 6 of" in report
    assert f"tokens trained on | {22 * 512:,}" in report


def test_a_stop_in_the_second_step_changes_no_bit(two: Path, tiny: Tiny, tmp_path: Path) -> None:
    recipe = load(written(tiny, tmp_path, STEPS))
    for until in ("base/train", "english/corpus", "english/train"):
        pipeline.run(recipe, tmp_path / "run", until=until)
    known = describe(tmp_path / "run")
    assert known["parameters"] > 0 and known["steps"] == 6
    assert known["stage english/train"] == "done" and known["stage english/model"] == "to do"
    pipeline.run(recipe, tmp_path / "run")
    assert digest(tmp_path / "run" / WEIGHTS) == digest(two / WEIGHTS)


def test_what_a_kill_left_in_a_step_is_cleared_and_what_stepped_aside_comes_back(
    two: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(two, two.parent / tmp_path.name))
    base = copy / "steps" / "base"
    (base / "checkpoints" / ".step-000099.tmp").mkdir()
    (base / "model").rename(base / ".model.old")
    Run(copy).close()
    assert not (base / "checkpoints" / ".step-000099.tmp").exists()
    assert state(base / "model") == state(two / "steps" / "base" / "model")


def test_what_was_removed_is_made_again(two: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(two, two.parent / tmp_path.name))
    shutil.rmtree(copy / "model")
    pipeline.run(load(copy / "recipe.toml"), copy)
    assert state(copy / "model") == state(two / "model")


def test_a_toy_step_is_one_file(soften: None, tiny: Tiny, tmp_path: Path) -> None:
    steps = '[[steps]]\nkind = "pretrain"\n[[steps]]\nkind = "soften"\nfactor = 0.25\n'
    recipe = load(written(tiny, tmp_path, steps))
    run = tmp_path / "run"
    pipeline.run(recipe, run)
    assert plan_of(Run(run, write=False).manifest)[2:] == [
        *("pretrain/tokens", "pretrain/train", "pretrain/model", "soften", "evaluate", "report")
    ]
    before, after = (load_model(run / place) for place in ("steps/pretrain/model", "model"))
    assert (before.head_weight * 0.25).equal(after.head_weight)
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert stages["soften"]["outputs"] == {"factor": 0.25}
    evaluate_again(run)


def test_a_step_may_take_another_model_than_the_one_before(
    soften: None, tiny: Tiny, tmp_path: Path
) -> None:
    steps = "".join(
        f'[[steps]]\nkind = "{kind}"\n{more}\n'
        for kind, more in (
            ("pretrain", 'name = "base"'),
            ("soften", 'name = "a"\nfactor = 0.5'),
            ("soften", 'name = "b"\nfactor = 0.25\ninput = "base"'),
        )
    )
    run = tmp_path / "run"
    pipeline.run(load(written(tiny, tmp_path, steps)), run, until="b")
    base, b = (load_model(run / place) for place in ("steps/base/model", "model"))
    assert (base.head_weight * 0.25).equal(b.head_weight)


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ('[[steps]]\nkind = "pretrian"', r'no step of kind "pretrian"; did you mean pretrain\?'),
        ('[[steps]]\nkind = "base"', "no step of kind"),
        ("[[steps]]\nname = 'a'", "steps.0.kind is missing"),
        ("steps = 3", "steps is a list of tables"),
        (
            '[[steps]]\nkind = "pretrain"\nsahre = 2',
            "unknown key steps.0.sahre; did you mean share",
        ),
        (
            '[[steps]]\nkind = "pretrain"\n[steps.train]\nstesp = 2',
            "unknown key steps.0.train.stesp; did you mean steps",
        ),
        (
            '[[steps]]\nkind = "pretrain"\n[steps.corpus]\npaths = ["a"]\nrhymed = "x"',
            "",
        ),
        (
            '[[steps]]\nkind = "pretrain"\n[[steps]]\nkind = "pretrain"',
            "two steps are called pretrain",
        ),
        (
            '[[steps]]\nkind = "pretrain"\ninput = "next"',
            r'input "next" is not a step before this one \(none\)',
        ),
        ('[[steps]]\nkind = "pretrain"\nname = "../a"', "steps.0.name"),
        ('[[steps]]\nkind = "pretrain"\nname = "report"', "report is a stage of every run"),
        (
            '[[steps]]\nkind = "pretrain"\nname = "a"\n[[steps]]\nkind = "pretrain"\nname = "A"',
            "two steps are called A",
        ),
        ("[steps]\nkind = 'pretrain'", r"write \[\[steps\]\] above each"),
        ('[[steps]]\nkind = "soften"', "takes a model, and there is none before it"),
    ],
)
def test_a_list_that_cannot_be_run_is_said(
    soften: None, tiny: Tiny, tmp_path: Path, steps: str, says: str
) -> None:
    path = written(tiny, tmp_path, "")
    text = path.read_text()
    path.write_text(f"{steps}\n{text}" if steps.startswith("steps") else f"{text}\n{steps}\n")
    if not says:
        load(path)  # a setting of another kind says nothing, as ever
        return
    with pytest.raises(RecipeError, match=says):
        load(path)


def test_a_step_that_makes_no_model_is_not_done(
    soften: None, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = '[[steps]]\nkind = "pretrain"\n[[steps]]\nkind = "soften"\n'
    recipe = load(written(tiny, tmp_path, steps))
    with monkeypatch.context() as patch:
        patch.setattr(registry.step_of("soften"), "run", lambda self, context, input: {})
        for _ in range(2):
            with pytest.raises(RunError, match="the stage soften ended and there is no "):
                pipeline.run(recipe, tmp_path / "run")
    pipeline.run(recipe, tmp_path / "run", until="soften")
    assert (tmp_path / "run" / WEIGHTS).exists()
    known = describe(tmp_path / "run")  # a model, and more to do
    assert known["layers"] == 2 and known["stage evaluate"] == "to do" and "to go on" in known


def test_a_list_is_not_changed_from_outside(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the list steps is changed in the recipe itself"):
        load(written(tiny, tmp_path, STEPS), ["steps.0.share=2"])


def test_until_knows_the_stages_of_this_recipe(two: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean english/train\?"):
        pipeline.run(load(two / "recipe.toml"), two, until="english/trian")


def test_a_recipe_without_a_list_is_one_pretraining(tiny: Tiny) -> None:
    stages = plan(load(tiny.recipe))
    assert tuple(stage.name for stage in stages) == STAGES
    assert [str(stage.output) for stage in stages] == [
        *("corpus", "tokenizer", "tokens", "checkpoints", "model"),
        *("evaluation.json", "report.html"),
    ]


def test_a_run_of_the_first_version_still_opens_and_goes_on(copy: Path) -> None:
    """Its manifest names no plan, and its recipe holds the settings of every kind of text."""
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["plan"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    recipe = (copy / "recipe.toml").read_text()
    (copy / "recipe.toml").write_text(
        recipe.replace("[corpus]\n", "[corpus]\nmin_characters = 40\n")
    )
    weights = digest(copy / WEIGHTS)
    (copy / "report.html").unlink()
    pipeline.run(load(copy / "recipe.toml"), copy)
    assert (copy / "report.html").exists() and digest(copy / WEIGHTS) == weights
