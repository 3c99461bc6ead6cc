"""The process: starting, draining, ending, and its mistakes told in one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from shenhong.cli.main import main
from tests.conftest import Tiny, shenhong

LOAD = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


# The same process, but for a step of the model that takes so long: an answer of 100 tokens takes five seconds.
SLOWLY = """
import sys, time
from shenhong.cli.main import main
from shenhong.engine import Engine

step = Engine.step

def slowly(self):
    time.sleep(0.05)
    return step(self)

Engine.step, Engine._plain = slowly, lambda *_: False
sys.exit(main())
"""


@contextmanager
def process(tiny: Tiny, tmp_path: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    verb = shenhong("serve", tiny.run, "--port", "0", "--data", tmp_path / "data", *flags)
    command = [sys.executable, "-c", SLOWLY, *verb[3:]]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        assert " at http://127.0.0.1:" in line, started.communicate()[1]
        yield started, line.split(" at ")[1].split()[0]
    finally:
        started.kill()
        started.wait()


def ask(url: str, found: list[Any], **more: Any) -> threading.Thread:
    body = {"model": "whole", "prompt": "长城", "max_tokens": 100, "logit_bias": {"1": -100}} | more

    def post() -> None:
        found.append(httpx.post(f"{url}/v1/completions", json=body, timeout=120))

    thread = threading.Thread(target=post)
    thread.start()
    return thread


def answering(url: str, some: int) -> None:
    until = time.monotonic() + 60
    while httpx.get(f"{url}/health").json()["answering"] < some:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_running_answers_finish_and_new_ones_get_a_503(
    sign: int, tiny: Tiny, tmp_path: Path
) -> None:
    with process(tiny, tmp_path, "--drain-seconds", "100", "--max-n", "64") as (started, url):
        found: list[httpx.Response] = []
        with httpx.Client(base_url=url) as kept:
            kept.get("/health")
            thread = ask(url, found, n=60)
            answering(url, 60)
            started.send_signal(sign)
            until = time.monotonic() + 60
            while kept.get("/health").status_code == 200 and time.monotonic() < until:
                time.sleep(0.01)
            late = kept.post("/v1/completions", json={"model": "whole", "prompt": "x"})
            assert late.status_code == 503 and late.json()["error"]["code"] == "server_stopping"
            assert int(late.headers["retry-after"]) >= 1
        thread.join(120)
        assert found[0].status_code == 200 and len(found[0].json()["choices"]) == 60
        assert all(c["finish_reason"] == "length" for c in found[0].json()["choices"])
        assert started.wait(60) == 0
        assert "Traceback" not in (started.stderr.read() if started.stderr else "")


def test_a_stop_is_said_when_it_is_asked_for_and_when_it_is_done(
    tiny: Tiny, tmp_path: Path
) -> None:
    with process(tiny, tmp_path) as (started, url):
        httpx.get(f"{url}/health")
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
        assert started.stderr is not None
        assert started.stderr.read() == "stopping: no answer is under way\nstopped\n"


def test_a_second_signal_ends_it_at_once(tiny: Tiny, tmp_path: Path) -> None:
    with process(tiny, tmp_path, "--drain-seconds", "100", "--max-n", "64") as (started, url):
        body = {"model": "whole", "prompt": "长城", "max_tokens": 100, "n": 60}
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            started.send_signal(signal.SIGINT)
            assert started.stderr is not None
            said = started.stderr.readline()
            started.send_signal(signal.SIGINT)
            assert started.wait(60) == 130
    assert said.startswith("stopping: ") and "1 answers" not in said
    assert not started.stderr.read()


def test_what_does_not_finish_in_time_gets_a_503(tiny: Tiny, tmp_path: Path) -> None:
    flags = ("--drain-seconds", "0.05", "--max-n", "200")
    with process(tiny, tmp_path, *flags) as (started, url):
        found: list[httpx.Response] = []
        thread = ask(url, found, n=200)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        stream = client.completions.create(model="whole", prompt="x", max_tokens=100, stream=True, logit_bias={"1": -100})  # fmt: skip
        next(iter(stream))
        answering(url, 201)
        started.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
        thread.join(120)
        assert found[0].status_code == 503 and found[0].json()["error"]["code"] == "server_stopping"
        assert started.wait(60) == 0


def test_mistakes_are_one_line(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    run = str(tiny.run)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, says in (
            ([run, "--host", "0.0.0.0"], "--api-key-file"), ([run, "--port", port], "--port"),
            ([run, "--port", "99999"], "65535"), ([str(tmp_path)], "config.json"),
            ([str(tmp_path / "broken")], "broken/"), ([run, "--api-key-file", str(tmp_path / "no")], "key file"),
            ([run, "--port", "0", "--data", str(tmp_path / "file")], "--data"), ([run, "--max-n", "0"], "below one"), ([run, "--draft", "9"], "--draft"),
        ):  # fmt: skip
            assert main(["serve", *arguments]) == 2
            said = capfd.readouterr().err
            assert said.count("\n") == 1 and says in said and "Traceback" not in said, said


def test_help_of_serve_shows_limits_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from shenhong.cli import main\n"
        "try: main(['serve', '--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr
    assert "--max-body-bytes" in done.stdout and "example: shenhong serve" in done.stdout


def test_many_streams_with_cancels_and_kills(tiny: Tiny) -> None:
    """The load test of a minute, five seconds long."""
    command = [
        sys.executable,
        str(LOAD),
        str(tiny.run),
        "--seconds",
        "5",
        "--streams",
        "64",
        "--questions",
        "16",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["answers"] > 30 and result["left"] > 5 and result["reset"] > 5


@pytest.mark.parametrize("terminal, flags", [(False, ()), (True, ("--no-serve",)), (True, ())])
def test_quickstart_ends_with_the_page_or_says_how_to_open_it(
    terminal: bool,
    flags: tuple[str, ...],
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served: list[Any] = []
    monkeypatch.setattr("shenhong.pipeline.run", lambda *_, **__: True)
    monkeypatch.setattr("shenhong.serve.server.serve", lambda *given: served.append(given))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert main(["quickstart", "--run", str(tiny.run), *flags]) == 0
    if terminal and not flags:
        assert served[0][0] == [tiny.run] and not served[0][1].keys
    else:
        assert not served and f"shenhong serve {tiny.run}" in capsys.readouterr().out
