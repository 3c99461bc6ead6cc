"""The verbs and their flags."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shenhong import LONGEST_ANSWER, __version__
from shenhong.cli import verbs
from shenhong.cli.arguments import Help, Parser, count, positive

if TYPE_CHECKING:
    from shenhong.domains.base import Option


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="shenhong",
        description="Turn text into a language model people can talk to, on the hardware at hand.",
        epilog="Start with: shenhong quickstart",
    )
    top.add_argument("--version", action="version", version=f"shenhong {__version__}")
    listed = top.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, function: Any, summary: str, example: str) -> argparse.ArgumentParser:
        sub = listed.add_parser(
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
        verbs.quickstart,
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
        verbs.train,
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
        verbs.recipe,
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
        verbs.generate,
        "write with a trained model",
        'shenhong generate runs/poet "长城" --n 4',
    )
    gen.add_argument(
        "model", metavar="MODEL", type=Path, help="a run folder, a model folder or a GGUF file"
    )
    gen.add_argument(
        "prompt",
        help="what to say to the model; for the poet a title, or form and title; a model of plain text goes on with it",
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
    _add_dtype(gen)
    gen.add_argument("--json", action="store_true", help="one JSON object instead of text")

    ev = verb(
        "evaluate",
        verbs.evaluate,
        "measure a run again and rewrite its report",
        "shenhong evaluate runs/poet",
    )
    ev.add_argument("model", metavar="RUN", type=Path, help="a run folder")
    ev.add_argument("--json", action="store_true", help="print the measures as JSON")
    _add_allow_code(ev)

    server = verb(
        "serve",
        verbs.serve,
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
        verbs.export,
        "write a finished model for other engines",
        "shenhong export runs/poet --to gguf --bits 8 --out poet.gguf",
    )
    out.add_argument(
        "model", metavar="MODEL", type=Path, help="a run folder, a model folder or a GGUF file"
    )
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
    out.add_argument(
        "--force", action="store_true", help="replace the model that lies under that name already"
    )
    out.add_argument("--json", action="store_true", help="one JSON object instead of text")

    about = verb(
        "info", verbs.info, "say what a run or a model folder holds", "shenhong info runs/poet"
    )
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


def _add_allow_code(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--allow-code",
        metavar="FILE",
        type=Path,
        default=None,
        help="run this Python file, which the run's recipe names, although it is not the one the run was begun with",
    )


def _add_dtype(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of weights and cache; auto: bfloat16 (half the memory, twice the speed) where a kernel serves the model and the CPU multiplies it, else float32",
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
        "--behind-proxy",
        action="store_true",
        help="every request comes through a proxy near by that speaks TLS: its X-Forwarded-For and -Proto are believed, cookies are Secure",
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
    _add_dtype(server)
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
