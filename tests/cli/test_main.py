"""The verbs: what they show, and what they say to a person who made a mistake: one line, exit code 2."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shenhong.cli.main import main
from shenhong.runs.run import Run
from tests.conftest import STAGES, Captured, Tiny, shenhong

POET = Path(__file__).parents[2] / "recipes" / "poet.toml"

VERBS = {  # and what the shortest call of each has to name
    "quickstart": [],
    "train": ["x.toml"],
    "recipe": ["x.toml"],
    "generate": ["x", "y"],
    "evaluate": ["x"],
    "serve": ["x"],
    "export": ["x", "--to", "hf", "--out", "y"],
    "info": ["x"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_shows_an_example(verb: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"example: shenhong {verb}" in shown and "None" not in shown


def test_help_lists_the_verbs_and_loads_nothing_heavy() -> None:
    code = "import sys; from shenhong.cli.parser import parser; parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x", "y", "--n", "0"], "argument --n: 0 is below one"),
        (["generate", "x", "y", "--n", "few"], "argument --n: few is not a whole number"),
        (["generate", "x", "y", "--n", "1.5"], "argument --n: 1.5 is not a whole number"),
        (["generate", "x", "y", "--seed", "one"], "argument --seed: one is not a whole number"),
        (["generate", "x", "y", "--top-p", "most"], "argument --top-p: most is not a number"),
        (["serve", "x", "--port", "http"], "argument --port: http is not a whole number"),
        (["serve", "x", "--max", "9"], "ambiguous option: --max could match --max-body-bytes"),
        (["serve", "x", "--runs", "/absent"], "--runs /absent: no such folder; give the one"),
        (["serve"], "required: MODEL; see 'shenhong serve --help'"),
        (["info"], "required: MODEL|RUN; see 'shenhong info --help'"),
        (["export", "x", "--to", "hf"], "required: --out; see 'shenhong export --help'"),
        (
            ["export", "x", "--to", "hf", "--out", "y", "--bits", "3"],
            "--bits: 3 is not known, choose",
        ),
        (["generate", "x", "y", "--form", "五绝诗"], "did you mean 五绝?"),
        (["generate", "x", "y", "--rhyme", "阴"], "--rhyme 阴: no rhyme of the 平水韵"),
        (["generate", "x", "y", "--tempreture", "1"], "did you mean --temperature?"),
        (["generate", "x", "y", "z"], "unknown argument z"),
        (["generate", "x"], "required: prompt; see 'shenhong generate --help'"),
        (["quickstart", "--minutes", "0"], "argument --minutes: 0 is not above zero"),
        (["quickstart", "--minutes", "nan"], "argument --minutes: nan is not above zero"),
        (["quickstart", "--minuets=3"], "did you mean --minutes?"),
        (["train", str(POET), "--until", "trian"], "did you mean train?"),
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


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_flag_of_any_verb_is_one_line_that_names_it(
    verb: str, refused: Callable[..., str]
) -> None:
    remedy = f"see 'shenhong {verb} --help'"
    refused(verb, *VERBS[verb], "--lout", says=("unknown flag --lout", remedy))
    refused(verb, *VERBS[verb], "--help=3", says=("--help: ignored explicit argument '3'", remedy))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "shenhong: stopped; the same command goes on from here"),
        (["serve", "x", "--api-key-file"], "shenhong: stopped"),
    ],
    ids=["train", "serve"],
)
def test_a_stop_promises_to_go_on_only_where_the_verb_does(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"  # whoever reads it waits
    os.mkfifo(pipe)
    process = subprocess.Popen(shenhong(*arguments, pipe), stderr=subprocess.PIPE, text=True)
    writer = None
    while writer is None and process.poll() is None:
        time.sleep(0.01)
        with contextlib.suppress(OSError):  # nobody reads yet
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    process.send_signal(signal.SIGTERM)
    # A signal that comes between Python's last look for one and the read is heard when the read ends.
    assert writer is not None
    os.close(writer)
    shown = process.communicate(timeout=60)[1]
    assert process.returncode == 130, shown
    assert shown.split("\n")[1:] == [said, ""]


def test_a_terminal_that_shows_only_ascii_gets_escapes_and_whole_json(tiny: Tiny) -> None:
    def generate(encoding: str, *more: str) -> bytes:
        command = shenhong("generate", tiny.run, "é长🙂", "--max-tokens", 4, *more)
        done = subprocess.run(
            command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout

    shown, wanted = generate("ascii", "--json"), generate("utf-8", "--json")
    assert shown.isascii() and "é长🙂".encode() in wanted
    assert json.loads(shown) == json.loads(wanted)
    (text,) = json.loads(wanted)["answers"]
    assert generate("ascii") == text.encode("ascii", "backslashreplace") + b"\n"


def test_a_run_says_what_it_did_and_where_its_report_is(tiny: Tiny) -> None:
    for number, stage in enumerate(STAGES, 1):
        assert f"[{number}/7] {stage}" in tiny.said
    assert "bits per character" in tiny.printed
    assert tiny.printed.splitlines()[-1] == f"report: {tiny.run / 'report.html'}"


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


def test_a_model_of_plain_text_goes_on_with_the_prompt(prose: Path, capfd: Captured) -> None:
    command = ["generate", str(prose), "The climate", "--max-tokens", "12"]
    shown = []
    for more in ([], ["--plain"]):
        assert main([*command, *more]) == 0
        shown.append(capfd.readouterr().out)
    assert shown[0] == shown[1] != "\n"


def test_a_form_is_for_models_of_verse(
    prose: Path, tiny: Tiny, tmp_path: Path, refused: Callable[..., str], capfd: Captured
) -> None:
    form = ("--form", "五绝")
    refused("generate", prose, "x", *form, says=("--form", "verse", prose, "plain text"))
    for to, out in (("hf", "poet"), ("gguf", "poet.gguf")):  # which say no longer what they are
        command = ["export", str(tiny.run), "--to", to, "--out", str(tmp_path / out)]
        assert main(command) == 0
        assert main(["generate", str(tmp_path / out), "长城", *form, "--max-tokens", "4"]) == 0
    manifest = tiny.run / "manifest.json"
    other = tmp_path / "other"
    shutil.copytree(tiny.run / "model", other / "model")
    named = manifest.read_text().replace('"domain": "verse"', '"domain": "haiku"')
    (other / "manifest.json").write_text(named)
    refused("generate", other, "长城", *form, says=("a model of haiku",))


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


def test_a_stop_while_a_library_loads_ends_at_once(tmp_path: Path) -> None:
    """numpy half loaded swallows a KeyboardInterrupt, and then fails or goes on."""
    swallows = """
import os, time
try:
    os.kill(os.getpid(), {})
    time.sleep(5)
except BaseException:
    pass
raise AttributeError
"""
    for asked in (signal.SIGINT, signal.SIGTERM):
        (tmp_path / "numpy.py").write_text(swallows.format(int(asked)))
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            shenhong("info", tmp_path),
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert (done.returncode, done.stderr.strip()) == (130, "shenhong: stopped")


def test_a_recipe_may_come_through_a_pipe(tiny: Tiny, tmp_path: Path) -> None:
    """As in train <(sed ... recipe.toml): it is read once."""
    pipe, text = tmp_path / "pipe", tiny.recipe.read_text()
    (tmp_path / "poems.jsonl").symlink_to(tiny.recipe.parent / "poems.jsonl")
    os.mkfifo(pipe)
    command = shenhong("train", pipe, "--run", tmp_path / "run", "--until", "corpus")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        pipe.write_text(text)
        assert process.wait(120) == 0, process.stderr and process.stderr.read()


def test_generate_loads_nothing_of_a_server(tiny: Tiny) -> None:
    code = f"""
import sys
from shenhong.cli.main import main
assert main(["generate", {str(tiny.run)!r}, "长城"]) == 0
print([name for name in ("fastapi", "starlette", "uvicorn", "daft") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
