"""The command line: the verbs and their flags, and nothing else."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

# Before torch loads: with another busy process on the machine, barriers that spin make two-thread
# operations 10-50 times slower, so waiting threads sleep after a short spin. Telemetry stays off.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("DO_NOT_TRACK", "true")

from shenhong import LONGEST_ANSWER, __version__
from shenhong.cli.arguments import Help, Parser, count, positive
from shenhong.errors import ShenhongError, UsageError

if TYPE_CHECKING:
    from shenhong.domains.base import Option

POET = "recipes/poet.toml"


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, 2 for an error a person can mend, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what it cannot show is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    remedy = ""

    def stop(_: int, frame: FrameType | None) -> None:
        if _loads(frame):  # libraries half loaded swallow the exception or fail on it
            print(f"\nshenhong: stopped{remedy}", file=sys.stderr, flush=True)
            os._exit(130)
        raise KeyboardInterrupt

    try:
        for asked in (signal.SIGINT, signal.SIGTERM):  # both ask for an orderly stop
            signal.signal(asked, stop)
        started = time.monotonic()  # before torch is loaded, which takes seconds
        options = parser().parse_args(arguments)
        options.started = started
        if options.verb in (quickstart, train):
            remedy = "; the same command goes on from here"
        options.verb(options)
        sys.stdout.flush()  # a reader who left shows here, and not at exit
        return 0
    except ShenhongError as error:
        print(f"shenhong: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        where = f" {stopped}" if str(stopped) else ""
        print(f"\nshenhong: stopped{where}{remedy}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a file that no stage speaks for
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"shenhong: {where}{error.strerror or error}; check its permissions and the disk",
            file=sys.stderr,
        )
        return 2
    except Exception as error:  # of a person's own file, or a fault of ours
        from shenhong.domains.registry import fault_of

        if (fault := fault_of(error)) is None:
            raise
        print(f"shenhong: {' '.join(fault.splitlines())}", file=sys.stderr)
        return 2


def _loads(frame: FrameType | None) -> bool:
    """Whether a module is being loaded there."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="shenhong",
        description="Turn text into a language model people can talk to, on the hardware at hand.",
        epilog="Start with: shenhong quickstart",
    )
    top.add_argument("--version", action="version", version=f"shenhong {__version__}")
    verbs = top.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, function: Any, summary: str, example: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example: {example}",
            formatter_class=Help,
        )
        sub.set_defaults(verb=function)
        return sub

    quick = verb(
        "quickstart",
        quickstart,
        "train the poet from raw verse and print poems",
        "shenhong quickstart --minutes 10",
    )
    quick.add_argument(
        "--minutes", type=positive, default=10.0, help="wall-clock for all stages together"
    )
    quick.add_argument(
        "--run",
        type=Path,
        default=Path("runs/poet"),
        help="folder of the run; an unfinished one is continued",
    )
    quick.add_argument(
        "--seed", type=int, default=None, help="seed of everything random (default: the recipe's)"
    )
    quick.add_argument(
        "--no-serve", action="store_true", help="end with the poems and open no chat page"
    )

    trainer = verb(
        "train",
        train,
        "run every stage of a recipe that is not done yet",
        "shenhong train recipes/text.toml --set train.steps=200",
    )
    trainer.add_argument(
        "source", metavar="RECIPE|RUN", type=Path, help="a recipe file, or a run folder to continue"
    )
    trainer.add_argument(
        "--run", type=Path, default=None, help="folder of the run (default: runs/NAME)"
    )
    trainer.add_argument(
        "--until",
        metavar="STAGE",
        default=None,
        help="stop after this stage: corpus, tokenizer, tokens, train, model, evaluate or report, with STEP/ before those of a step of a list",
    )
    _add_allow_code(trainer)
    trainer.add_argument(
        "--set",
        dest="changes",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a setting, as in train.steps=200 (may be repeated)",
    )

    about = verb(
        "recipe",
        recipe,
        "say what a recipe may hold, or what one comes to",
        "shenhong recipe recipes/poet.toml --explain",
    )
    about.add_argument(
        "source",
        metavar="RECIPE",
        type=Path,
        nargs="?",
        help="a recipe file; absent: every setting",
    )
    about.add_argument(
        "--explain", action="store_true", help="type, bounds and meaning of each setting, not TOML"
    )
    about.add_argument("--json", action="store_true", help="the explanation as JSON")

    gen = verb(
        "generate",
        generate,
        "write with a trained model",
        'shenhong generate runs/poet "长城" --n 4',
    )
    gen.add_argument(
        "model", metavar="MODEL", type=Path, help="a run folder, a model folder or a GGUF file"
    )
    gen.add_argument(
        "prompt", help="what to say to the model; for the poet a title, or form and title"
    )
    for option in _options():
        gen.add_argument(
            f"--{option.name}",
            choices=option.choices or None,
            metavar=option.metavar,
            default=None,
            help=option.help,
        )
    gen.add_argument(
        "--plain",
        action="store_true",
        help="continue the prompt as bare text, asked by no template",
    )
    gen.add_argument("--n", type=count, default=1, help="number of answers")
    gen.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token each time"
    )
    gen.add_argument(
        "--top-k", type=int, default=0, help="sample among the k likeliest tokens; 0 means all"
    )
    gen.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample among the likeliest tokens of this total probability",
    )
    gen.add_argument(
        "--max-tokens", type=count, default=LONGEST_ANSWER, help="longest answer, in tokens"
    )
    gen.add_argument("--seed", type=int, default=0, help="same seed, same text")
    gen.add_argument("--json", action="store_true", help="one JSON object instead of text")

    ev = verb(
        "evaluate",
        evaluate,
        "measure a run again and rewrite its report",
        "shenhong evaluate runs/poet",
    )
    ev.add_argument("model", metavar="RUN", type=Path, help="a run folder")
    ev.add_argument("--json", action="store_true", help="print the measures as JSON")
    _add_allow_code(ev)

    server = verb(
        "serve",
        serve,
        "open the chat page and an OpenAI-compatible API",
        "shenhong serve runs/poet --port 8000",
    )
    server.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        type=Path,
        help="run folders, model folders or GGUF files",
    )
    _add_serving(server)

    out = verb(
        "export",
        export,
        "write a finished model for other engines",
        "shenhong export runs/poet --to gguf --bits 8 --out poet.gguf",
    )
    out.add_argument("model", metavar="MODEL", type=Path, help="a run folder or a model folder")
    out.add_argument(
        "--to",
        choices=("hf", "gguf"),
        required=True,
        help="hf: a folder for transformers, vLLM, SGLang; gguf: a file for llama.cpp, Ollama, LM Studio",
    )
    out.add_argument("--out", type=Path, required=True, help="the folder or file to write")
    out.add_argument(
        "--bits",
        type=int,
        choices=(32, 16, 8, 4),
        default=16,
        help="size of a stored number (4 for gguf only)",
    )
    out.add_argument(
        "--no-mtp",
        action="store_true",
        help="leave the multi-token-prediction layer out of a gguf file",
    )
    out.add_argument("--json", action="store_true", help="one JSON object instead of text")

    about = verb("info", info, "say what a run or a model folder holds", "shenhong info runs/poet")
    about.add_argument(
        "model",
        metavar="MODEL|RUN",
        type=Path,
        help="a run folder, finished or not, a model folder or a GGUF file",
    )
    about.add_argument("--json", action="store_true", help="machine-readable")

    return top


def _options() -> list[Option]:
    """What the domains let a person choose beside the words of a prompt."""
    from shenhong import domains

    found = [option for name in domains.names() for option in domains.domain(name).options]
    return list({option.name: option for option in found}.values())


def _composed(options: argparse.Namespace) -> str:
    """The prompt, as the domain puts it whose options were given."""
    from shenhong import domains

    for name in domains.names():
        domain = domains.domain(name)
        chosen = {option.name: getattr(options, option.name) for option in domain.options}
        if any(value is not None for value in chosen.values()):
            return domain.compose(options.prompt, **chosen)
    return options.prompt


def _add_allow_code(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--allow-code",
        metavar="FILE",
        type=Path,
        default=None,
        help="run this Python file, which the run's recipe names, although it is not the one the run was begun with",
    )


def _add_serving(server: argparse.ArgumentParser) -> None:
    """The flags of serve; each limit is one."""
    from shenhong.serve import Limits, Settings

    plain = Settings()
    server.add_argument("--host", default=plain.host, help="address to listen on")
    server.add_argument("--port", type=int, default=plain.port, help="0 takes a free one")
    server.add_argument(
        "--api-key-file", type=Path, default=None, help="who may ask: a file with one key a line"
    )
    server.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="another name the server is addressed by (may be repeated)",
    )
    server.add_argument(
        "--runs", type=Path, default=None, help="folder of runs to show (default: runs, if there)"
    )
    server.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        default=None,
        help="folder of the chats (default: shenhong in the user's data folder)",
    )
    server.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="arithmetic; in float32 an answer never depends on others in the batch",
    )
    server.add_argument(
        "--draft",
        choices=("measured", "0", "1", "2", "3"),
        default="measured",
        help="tokens guessed ahead by the model's multi-token-prediction layer; answers stay the same",
    )
    server.add_argument(
        "--drain-seconds",
        type=positive,
        default=plain.drain_seconds,
        help="how long running answers may go on after Ctrl-C",
    )
    for limit in dataclasses.fields(Limits):
        server.add_argument(
            f"--{limit.name.replace('_', '-')}",
            metavar="N",
            type=positive if isinstance(limit.default, float) else count,
            default=limit.default,
            help=limit.metadata["help"],
        )


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
        _serve([run_path], parser().parse_args(["serve", str(run_path)]))


def serve(options: argparse.Namespace) -> None:
    _serve(options.models, options)


def _serve(models: list[Path], options: argparse.Namespace) -> None:
    import torch

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
        draft=None if options.draft == "measured" else int(options.draft),
        limits=Limits(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Limits)}),
    )
    serve(models, settings, getattr(torch, options.dtype))


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


def generate(options: argparse.Namespace) -> None:
    from shenhong.engine import Sampling
    from shenhong.llm import LLM

    prompt = _composed(options)
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    with LLM(options.model) as llm:
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
    from shenhong.models import folder_of, is_gguf

    folder = folder_of(options.model)
    if is_gguf(folder):
        raise UsageError(f"{folder} is an export already; give the folder it was made from")
    if options.to == "gguf":
        done = save_gguf(folder, options.out, options.bits, multitoken=not options.no_mtp)
    elif options.no_mtp:
        raise UsageError("--no-mtp goes with --to gguf; a folder keeps every tensor")
    else:
        done = save_folder(folder, options.out, options.bits)
    if options.json:
        _print_json({**done._asdict(), "path": str(done.path)})
    else:
        kinds = ", ".join(f"{size / 1e6:.1f} MB {kind}" for kind, size in done.kinds.items())
        print(f"{done.path}: {done.nbytes / 1e6:.1f} MB ({kinds})")
        for note in done.notes:
            print(note)


def info(options: argparse.Namespace) -> None:
    from shenhong.stages.describe import describe

    facts = describe(options.model)
    if options.json:
        _print_json(facts)
    else:
        width = max(len(key) for key in facts)
        for key, value in facts.items():
            print(f"{key:{width}}  {value}")
