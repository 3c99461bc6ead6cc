"""What each verb does with its options; libraries are loaded where they are used, so that a help is quick."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from shenhong.errors import UsageError

POET = "recipes/poet.toml"


def _print_json(value: Any) -> None:
    """One line; in ASCII where the terminal is not said to show more."""
    print(json.dumps(value, ensure_ascii=sys.stdout.encoding != "utf-8"))


def quickstart(options: argparse.Namespace) -> None:
    from shenhong import pipeline
    from shenhong.llm import LLM
    from shenhong.recipe import load
    from shenhong.stages.describe import summary

    changes = [f"minutes={options.minutes}"]
    if options.seed is not None:
        changes.append(f"seed={options.seed}")
    run_path = options.run
    if not pipeline.run(load(pipeline.bundled(POET), changes), run_path, started=options.started):
        return
    titles = ["七绝 长城", "五绝 春夜", "七律 江上", "五律 明月"]
    for title, poem in zip(titles, LLM(run_path).generate(titles), strict=True):
        print(f"\n{title}\n{poem}")
    print()
    print(summary(run_path))

    if options.no_serve or not sys.stdout.isatty():
        print(f"chat with it: shenhong serve {run_path}")
    else:
        _serve([run_path], options.parse(["serve", str(run_path)]))


def _dtype(options: argparse.Namespace) -> Any:
    import torch

    return "auto" if options.dtype == "auto" else getattr(torch, options.dtype)


def serve(options: argparse.Namespace) -> None:
    _serve(options.models, options)


def _serve(models: list[Path], options: argparse.Namespace) -> None:
    from shenhong.serve import Limits, Settings
    from shenhong.serve.http.guard import read_keys
    from shenhong.serve.server import serve

    if options.runs and not options.runs.is_dir():
        raise UsageError(f"--runs {options.runs}: no such folder; give the one that holds the runs")
    runs = options.runs or (Path("runs") if Path("runs").is_dir() else None)
    settings = Settings(
        host=options.host,
        port=options.port,
        keys=read_keys(options.api_key_file) if options.api_key_file else (),
        data=options.data,
        runs=runs,
        drain_seconds=options.drain_seconds,
        allow_hosts=tuple(options.allow_host),
        behind_proxy=options.behind_proxy,
        dtype=_dtype(options),
        draft=None if options.draft == "measured" else int(options.draft),
        limits=Limits(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Limits)}),
    )
    serve(models, settings)


def train(options: argparse.Namespace) -> None:
    from shenhong import pipeline
    from shenhong.errors import RecipeError
    from shenhong.runs.run import Run
    from shenhong.stages.describe import summary
    from shenhong.stages.own_code import load_frozen, load_recipe

    source = options.source
    if source.is_dir():
        if options.changes or options.run:
            raise RecipeError(
                f"{source} is a run folder with its recipe frozen; --set and --run go with a recipe file"
            )
        Run(source, write=False)  # says first whether this is a run, and of this version
        recipe, run_path = load_frozen(source, options.allow_code), source
    else:
        path = pipeline.found(source)
        recipe, run_path = load_recipe(path, options.changes, options.run, options.allow_code)
    if pipeline.run(recipe, run_path, options.until, options.started):
        print(summary(run_path))


def recipe(options: argparse.Namespace) -> None:
    from shenhong import explain, pipeline
    from shenhong.recipe import load

    # Looked at, not run: a Python file that it names is left alone.
    found = load(pipeline.found(options.source)) if options.source else None
    if options.json:
        _print_json(explain.as_json(explain.reference(found)))
    elif found and not options.explain:
        print(found.dump(options.source.resolve().parent), end="")
    else:
        print(explain.as_text(explain.reference(found)))


def _composed(options: argparse.Namespace) -> str:
    """The prompt, as the domain puts it whose options were given. Error: UsageError for a model of another kind."""
    from shenhong import domains

    for name in domains.names():
        domain = domains.domain(name)
        chosen = {option.name: getattr(options, option.name) for option in domain.options}
        given = [f"--{option}" for option, value in chosen.items() if value is not None]
        if given:
            prompt = domain.compose(options.prompt, **chosen)
            _check_kind(options, name, given[0])
            return prompt
    return options.prompt


def _check_kind(options: argparse.Namespace, kind: str, flag: str) -> None:
    """Error: UsageError where the model cannot be one of this kind. An export no longer says of what kind it is."""
    from shenhong import domains
    from shenhong.models import open_source, run_of

    place, _, tokenizer = open_source(options.model)
    known = domains.kind_of(run_of(place))
    if tokenizer.special.template is None:
        is_what = f"{options.model} goes on with plain text"
    elif known is not None and known != kind:
        is_what = f"{options.model} is a model of {known}"
    elif not tokenizer.own:
        is_what = f"{options.model} is a chat model from elsewhere"
    else:
        return
    raise UsageError(f"{flag} is for models of {kind}, and {is_what}; leave {flag} out")


def generate(options: argparse.Namespace) -> None:
    from shenhong.engine import Sampling
    from shenhong.llm import LLM

    prompt = _composed(options)
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    with LLM(options.model, _dtype(options)) as llm:
        prompts = [prompt] * options.n
        seed, plain = options.seed, options.plain
        answers = llm.generate(prompts, options.max_tokens, sampling, seed=seed, plain=plain)
    if options.json:
        _print_json({"prompt": prompt, "answers": answers})
    else:
        print("\n\n".join(answers))


def evaluate(options: argparse.Namespace) -> None:
    from shenhong.stages.describe import evaluate_again, summary

    measures = evaluate_again(options.model, options.allow_code)
    if options.json:
        _print_json(measures)
    else:
        print(summary(options.model))


def export(options: argparse.Namespace) -> None:
    from shenhong.export import save_folder, save_gguf
    from shenhong.models import folder_of

    model = folder_of(options.model)
    if options.out.exists() and options.out.resolve() != model.resolve():
        _check_target(options.out, options.to, options.force)
    if options.to == "gguf":
        done = save_gguf(model, options.out, options.bits, multitoken=not options.no_mtp)
    elif options.no_mtp:
        raise UsageError("--no-mtp goes with --to gguf; a folder keeps every tensor")
    else:
        done = save_folder(model, options.out, options.bits)
    if options.json:
        _print_json({**done._asdict(), "path": str(done.path)})
    else:
        kinds = ", ".join(f"{size / 1e6:.1f} MB {kind}" for kind, size in done.kinds.items())
        print(f"{done.path}: {done.nbytes / 1e6:.1f} MB ({kinds})")
        for note in done.notes:
            print(note)


def _check_target(out: Path, to: str, force: bool) -> None:
    """Error: UsageError where something lies there that is no model, or a model that nobody asked to replace."""
    from shenhong.export.gguf_file import begins_as_gguf

    model = (out / "config.json").is_file() if to == "hf" else begins_as_gguf(out)
    if not model:
        what = "model folder" if to == "hf" else "GGUF file"
        raise UsageError(f"--out {out} exists and is no {what}; choose another name")
    if not force:
        raise UsageError(f"--out {out} exists; choose another name, or replace it with --force")


def info(options: argparse.Namespace) -> None:
    from shenhong.stages.describe import describe

    facts = describe(options.model)
    if options.json:
        _print_json(facts)
    else:
        width = max(len(key) for key in facts)
        for key, value in facts.items():
            print(f"{key:{width}}  {value}")
