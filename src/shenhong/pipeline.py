"""From recipe to report: the stages of a run, in order, each skipped once it is done.

corpus      refine raw text into held-out and training text        corpus/
tokenizer   learn the vocabulary                                   tokenizer/
tokens      render, encode and pack documents into rows            tokens/
train       optimise                                               checkpoints/
model       the finished Hugging Face folder                       model/
evaluate    measure                                                evaluation.json
report      show                                                   report.html, report.md
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shenhong import LONGEST_ANSWER, __version__
from shenhong.errors import RecipeError, RequestError, RunError, ShenhongError
from shenhong.model import Decoder, ModelConfig
from shenhong.parallel import Mesh, join, leave
from shenhong.recipe import Recipe, load
from shenhong.runs.events import read_events
from shenhong.runs.files import atomic_folder, atomic_write, digest
from shenhong.runs.memory import give_back
from shenhong.runs.run import Run

SAMPLES, SAMPLE_TOKENS = 4, 80  # written at every look at held-out text


@dataclass
class Context:
    """What every stage is given. ``run`` is None on processes that do not lead."""

    recipe: Recipe
    path: Path
    mesh: Mesh
    run: Run | None
    begun: float | None = None  # when the command began (monotonic), until that is booked

    def say(self, text: str) -> None:
        if self.mesh.leads:
            print(text, file=sys.stderr, flush=True)


def run(recipe: Recipe, path: Path, until: str | None = None, begun: float | None = None) -> bool:
    """Run every stage of ``recipe`` in the folder ``path`` that is not done; ``until`` is the last one.

    ``begun`` is when the command began (time.monotonic): loading libraries takes of the minutes too.
    Returns whether this process leads: of several, it alone speaks of the result.
    """
    mesh = join()
    opened = None
    try:
        with _together(mesh):
            opened = Run(path, create=True) if mesh.leads else None
            context = Context(recipe, Path(path), mesh, opened, begun)
            if opened:
                _freeze_recipe(opened, recipe)
                _heed_sources(context, opened)
        for name, stage in STAGES.items():
            done = mesh.share(_done(opened, name) if opened else None)
            with _together(mesh):
                if not done and (mesh.leads or name == "train"):
                    _perform(context, name, stage)
            if name == until:
                break
    finally:
        if opened:
            opened.close()
        leave()
    return mesh.leads


@contextlib.contextmanager
def _together(mesh: Mesh) -> Iterator[None]:
    """All processes wait for each other at the end; an error of the leader ends them all, told once."""
    failure: ShenhongError | None = None
    try:
        yield
    except ShenhongError as error:
        failure = error
    failed = mesh.share(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise SystemExit(2)


def _perform(context: Context, name: str, stage: Callable[[Context], dict[str, Any]]) -> None:
    if context.run is None:
        stage(context)
        return
    if context.begun is not None:
        context.run.book("start", time.monotonic() - context.begun)
        context.begun = None
    context.say(f"[{list(STAGES).index(name) + 1}/{len(STAGES)}] {name}")
    with context.run.stage(name) as outputs:
        outputs.update(stage(context))
    give_back()


def _done(run: Run, name: str) -> bool:
    """Whether a stage is finished and its output still there: messages advise to remove what is damaged."""
    if not run.done(name):
        return False
    if name == "train" and not (run.path / "model").exists():  # checkpoints are needed until then
        from shenhong.train import checkpoint

        last = run.manifest["train"]["steps"]
        return checkpoint.folder_of(run.path / "checkpoints", last).exists()
    return name == "train" or (run.path / OUTPUTS[name]).exists()


def _freeze_recipe(run: Run, recipe: Recipe) -> None:
    """The run keeps its own copy; another recipe for the same folder is refused, naming what differs."""
    file = run.path / "recipe.toml"
    if not file.exists():
        # The manifest first: it is what makes the folder a run, so a kill in between is mended here.
        run.manifest.update(name=recipe.name, seed=recipe.seed, shenhong=__version__)
        run.save()
        atomic_write(file, recipe.dump(run.path))
        return
    frozen = load_frozen(run.path)
    ours, theirs = _flat(recipe.model_dump(mode="json")), _flat(frozen.model_dump(mode="json"))
    differing = [
        f"{key} is {theirs.get(key)} there, {ours.get(key)} here"
        for key in ours
        if ours[key] != theirs.get(key)
    ]
    if differing:
        raise RunError(
            f"{run.path} was begun with another recipe ({differing[0]}{f' and {len(differing) - 1} more' if len(differing) > 1 else ''}); choose another --run folder, or continue it with 'shenhong train {run.path}'"
        )


def _heed_sources(context: Context, run: Run) -> None:
    """Another text is another run; before training it only means to refine again. Error: RunError."""
    from shenhong.corpus import sources

    stages = run.manifest["stages"]
    recorded = stages.get("corpus", {}).get("outputs", {}).get("sources")
    what = recorded and sources.changed(recorded, context.recipe.corpus, run.path)
    if not what:
        return
    if "train" in stages:
        raise RunError(
            f"{what} after {run.path} began to train on it; put it back as it was, or choose another --run folder"
        )
    context.say(f"{what} since it was refined: this is done again")
    for name in ("corpus", "tokenizer", "tokens"):
        if name in stages:
            stages[name]["state"] = "begun"
    run.save()


def load_frozen(path: Path) -> Recipe:
    """The recipe a run was begun with. Error: RecipeError when the copy was damaged."""
    return load(path / "recipe.toml")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


# ------------------------------------------------------------------------------------------ stages


def _corpus(context: Context) -> dict[str, Any]:
    from shenhong.corpus import sources
    from shenhong.corpus.refine import refine

    # Before they are read: a file that changes meanwhile then shows when the run goes on.
    found = sources.record(context.recipe.corpus, context.path)
    with atomic_folder(context.path / "corpus") as folder:
        report = refine(context.recipe.corpus, Path("."), folder, context.recipe.seed, context.say)
    return {
        "kept": report.get("kept"),
        "sources": found,
        "train_sha256": digest(context.path / "corpus" / "train.parquet"),
    }


def _tokenizer(context: Context) -> dict[str, Any]:
    from shenhong.stages.init_from import take_over
    from shenhong.tokenizer.tokenizer import build

    with atomic_folder(context.path / "tokenizer") as folder:
        recipe = context.recipe
        if recipe.init:
            return take_over(recipe, folder)
        return build(
            context.path / "corpus", folder, recipe.tokenizer, context.say, recipe.corpus.simplify
        )


def _tokens(context: Context) -> dict[str, Any]:
    from shenhong.corpus.pack import pack
    from shenhong.stages.init_from import check_prompts
    from shenhong.tokenizer import Tokenizer

    check_prompts(context.path / "corpus", Tokenizer.load(context.path / "tokenizer"))
    with atomic_folder(context.path / "tokens") as folder:
        return pack(
            context.path / "corpus",
            context.path / "tokenizer",
            folder,
            context.recipe.train.sequence_length,
            context.say,
        )


def _architecture(context: Context) -> ModelConfig:
    """The recipe's model with this run's tokenizer, or the shape of the model that training began from."""
    from shenhong.stages.init_from import architecture
    from shenhong.tokenizer import Tokenizer

    if context.recipe.init:
        return architecture(context.path)
    tokenizer = Tokenizer.load(context.path / "tokenizer")
    return context.recipe.architecture(
        tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )


def _train(context: Context) -> dict[str, Any]:
    from shenhong.stages.init_from import weights
    from shenhong.train import train

    recipe, config = context.recipe, _architecture(context)
    begun = time.monotonic()
    spent = _seconds_spent(context.run.manifest) if context.run else 0.0

    def seconds_left() -> float:
        """Read when the steps are counted, so that what choosing the machine took is paid for too."""
        used = spent + recipe.reserve_seconds + time.monotonic() - begun
        return max(1.0, (recipe.minutes or 0) * 60 - used)

    def first() -> dict[str, Any] | None:
        """The weights training begins with; None for random ones."""
        if not recipe.init:
            return None
        stage = json.loads((context.path / "manifest.json").read_text())["stages"]["tokenizer"]
        return weights(recipe, stage["outputs"]["init_sha256"])

    train(
        context.run,
        context.path,
        recipe.train,
        config,
        recipe.seed,
        context.mesh,
        seconds_left,
        _sampler(context),
        first,
    )
    return {}


def _sampler(context: Context) -> Callable[[Decoder], list[tuple[str, str]]]:
    """What the model writes of some held-out prompts, always the same, for those who watch it learn."""
    import pyarrow.parquet

    from shenhong.engine import Engine
    from shenhong.tokenizer import Tokenizer

    valid = pyarrow.parquet.read_table(
        context.path / "corpus" / "valid.parquet", columns=["prompt"]
    )
    prompts = valid.slice(0, SAMPLES)["prompt"].to_pylist()
    tokenizer = Tokenizer.load(context.path / "tokenizer")
    ids = [tokenizer.encode_prompt(p) if p else [tokenizer.bos_id] for p in prompts]

    def write(model: Decoder) -> list[tuple[str, str]]:
        try:
            done = Engine(model).generate(ids, SAMPLE_TOKENS, seed=context.recipe.seed)
        except RequestError:  # a weight is no number: training itself says so, and where
            return []
        texts = [tokenizer.decode(completion.tokens) for completion in done]
        return list(zip(prompts, texts, strict=True))

    return write


def _seconds_spent(manifest: dict[str, Any]) -> float:
    return sum(stage.get("seconds", 0.0) for stage in manifest["stages"].values())


def _model(context: Context) -> dict[str, Any]:
    import torch

    from shenhong.errors import CheckpointError
    from shenhong.export import save_model
    from shenhong.train import checkpoint

    found = checkpoint.load_newest(context.path / "checkpoints")
    if found is None:
        raise CheckpointError(
            f"{context.path / 'checkpoints'} is empty; remove the run folder and train again"
        )
    progress, weights, _ = found
    decoder = Decoder(_architecture(context))
    decoder.load_state_dict(weights)
    folder = context.path / "model"
    save_model(decoder, folder, context.path / "tokenizer")
    return {
        "step": progress.step,
        "sha256": digest(folder / "model.safetensors"),
        "torch": torch.__version__,
    }


def _evaluate(context: Context) -> dict[str, Any]:
    assert context.run is not None
    return measure(context.recipe, context.run, context.say)


def measure(recipe: Recipe, run: Run, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the finished model of a run on held-out text; writes evaluation.json."""
    import torch

    from shenhong.engine import Sampling
    from shenhong.evaluate.evaluate import evaluate
    from shenhong.evaluate.metrics import ScoredText
    from shenhong.export import load_model
    from shenhong.models import open_writer
    from shenhong.train import budget
    from shenhong.train.data import Rows, seen_rows
    from shenhong.train.trainer import score_rows

    dtype = budget.apply(run.manifest["machine"])
    writer = open_writer(run.path)
    tokenizer = writer.tokenizer
    ids = (tokenizer.bos_id, tokenizer.pad_id)
    test = Rows(run.path / "tokens" / "test.safetensors", *ids)
    decoder = load_model(run.path / "model", dtype)
    scored = ScoredText(*score_rows(decoder, test, torch.arange(len(test))), test.characters)
    train = Rows(run.path / "tokens" / "train.safetensors", *ids)
    seen = seen_rows(
        len(train), recipe.seed, run.manifest["train"]["steps"] * recipe.train.rows_a_step
    )
    sampling = Sampling(temperature=recipe.evaluate.temperature)
    measures = evaluate(
        run.path / "corpus",
        recipe.corpus.kind,
        scored,
        lambda prompts: writer.answer(prompts, LONGEST_ANSWER, sampling, recipe.seed),
        tokenizer.backend.decode_batch(train.answers(seen)),
        recipe.evaluate,
        recipe.seed,
        say,
    )
    atomic_write(run.path / "evaluation.json", json.dumps(measures, ensure_ascii=False, indent=1))
    return {}


def _report(context: Context) -> dict[str, Any]:
    from shenhong.evaluate.report import write_report

    write_report(context.path)
    return {}


STAGES: dict[str, Callable[[Context], dict[str, Any]]] = {
    "corpus": _corpus,
    "tokenizer": _tokenizer,
    "tokens": _tokens,
    "train": _train,
    "model": _model,
    "evaluate": _evaluate,
    "report": _report,
}

OUTPUTS = {
    **{name: name for name in ("corpus", "tokenizer", "tokens", "model")},
    "train": "checkpoints",
    "evaluate": "evaluation.json",
    "report": "report.html",
}


# ------------------------------------------------------------------------------------------ for the verbs


def evaluate_again(path: Path) -> dict[str, Any]:
    """Measure a finished run anew and rewrite its report; returns the measures."""
    with Run(path) as run:
        if not run.done("model"):
            raise RunError(
                f"{path} has no finished model yet; 'shenhong train {path}' goes on with it"
            )
        recipe = load_frozen(run.path)
        measure(recipe, run, lambda line: print(line, file=sys.stderr))
        _report(Context(recipe, run.path, Mesh(), run))
    return json.loads((Path(path) / "evaluation.json").read_text())


def describe(path: Path) -> dict[str, Any]:
    """What a model is and costs; of a run without a model yet, how far it has come. Error: ShenhongError."""
    from shenhong import models

    path = Path(path)
    if (path / "manifest.json").is_file() and not (path / "model" / "config.json").is_file():
        return _so_far(Run(path, write=False))
    return models.facts(path)


def _so_far(run: Run) -> dict[str, Any]:
    """Recipe, stages, step and held-out loss of an unfinished run, also of one that runs now."""
    known: dict[str, Any] = {"folder": str(run.path)}
    if (run.path / "recipe.toml").exists():
        recipe = load_frozen(run.path)
        known |= {"recipe": recipe.name, "kind": recipe.corpus.kind, "seed": recipe.seed}
        if recipe.minutes:
            known["minutes"] = recipe.minutes
    stages = run.manifest["stages"]
    for name in STAGES:
        begun = "unfinished" if name in stages else "to do"
        known[f"stage {name}"] = "done" if _done(run, name) else begun
    train = run.manifest.get("train", {})
    events = read_events(run.path)
    steps = [e for e in events if e["kind"] == "train" and {"step", "steps", "loss"} <= e.keys()]
    looks = [
        e for e in events if e["kind"] == "valid" and isinstance(e.get("nats_per_token"), float)
    ]
    if "parameters" in train:
        known |= {k.replace("_", " "): train[k] for k in ("parameters", "active_parameters")}
    if steps:
        known |= {key: steps[-1][key] for key in ("step", "steps")}
        known["training nats per token"] = steps[-1]["loss"]
    if looks:
        known["held-out nats per token"] = round(looks[-1]["nats_per_token"], 4)
    return known | {"to go on": f"shenhong train {run.path}"}


def summary(path: Path) -> str:
    """The headline measures of a run and where its report is, in a few lines."""
    path = Path(path)
    if not (path / "report.html").exists():
        opened = Run(path, write=False)
        done = [name for name in STAGES if _done(opened, name)]
        return (
            f"{path}: done so far: {', '.join(done) or 'nothing'}; 'shenhong train {path}' goes on"
        )
    from shenhong.evaluate.report import headline

    return "\n".join([*headline(path), f"report: {path / 'report.html'}"])


def bundled(name: str) -> Path:
    """A recipe that travels with the repository. Error: RecipeError when installed without it."""
    path = Path(__file__).resolve().parents[2] / name
    if not path.exists():
        raise RecipeError(
            f"{name} is not beside this installation; run from a checkout of the repository, or give a recipe to 'shenhong train'"
        )
    return path
