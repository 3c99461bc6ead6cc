"""What a model's generation_config.json says holds where a caller says nothing."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from shenhong.engine import Sampling
from shenhong.serve.sampling import defaults_of
from tests.conftest import Tiny
from tests.serve.running import running

ASKED = [{"role": "user", "content": "五绝 长城"}]


@pytest.mark.parametrize(
    "said, wanted",
    [
        ({}, Sampling()),
        ({"bos_token_id": 0, "top_k": None, "max_length": 99}, Sampling()),
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05, "do_sample": True},
         Sampling(0.6, 20, 0.95, 0.1, 1.05)),
        ({"do_sample": False, "temperature": 0.6}, Sampling(temperature=0)),
    ],
)  # fmt: skip
def test_what_the_file_says(
    said: dict, wanted: Sampling, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert defaults_of(tmp_path) == wanted and not caplog.records
    assert defaults_of(tmp_path / "none") == Sampling()


@pytest.mark.parametrize(
    "text, word",
    [
        ('{"temperature": 9}', "temperature"),
        ('{"temperature": "hot"}', "temperature"),
        ('{"temperature": NaN}', "temperature"),
        ('{"temperature": 1' + "0" * 400 + "}", "temperature"),
        ('{"top_p": 0, "temperature": 0.5}', "top_p"),
        ('{"top_k": 1.5}', "top_k"),
        ('{"min_p": [1]}', "min_p"),
        ('{"repetition_penalty": -1}', "repetition_penalty"),
        ("[]", "object"),
        ("{", "read"),
        ("[" * 200_000, "read"),
        ("\xff", "read"),
    ],
)
def test_a_broken_file_is_one_warning(
    text: str, word: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "generation_config.json"
    path.write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "shenhong"):
        assert defaults_of(tmp_path) == Sampling()
    (record,) = caplog.records
    assert str(path) in record.getMessage() and word in record.getMessage()
    assert "\n" not in record.getMessage() and len(record.getMessage()) < 400


def test_a_server_draws_as_the_model_wants(tiny: Tiny, tmp_path: Path) -> None:
    greedy = Path(shutil.copytree(tiny.run / "model", tmp_path / "greedy"))
    path = greedy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": False}))
    plain = tiny.run / "model"
    with running([greedy, plain], tmp_path / "data") as server:
        client = server.openai()
        first, second = server.hub.models

        def said(model: str, seed: int, **more: float) -> set[str]:
            chat = client.chat.completions.create(
                model=model, messages=ASKED, seed=seed, max_tokens=12, **more
            )
            answer = client.responses.create(model=model, input=ASKED, max_output_tokens=12, **more)
            return {chat.choices[0].message.content, answer.output_text}

        likeliest = said(second, 0, temperature=0)
        assert len(likeliest) == 1
        assert said(first, 1) == said(first, 2) == likeliest  # nothing else was asked for
        assert len(said(second, 1) | said(second, 2) | likeliest) > 2
        assert len(said(first, 1, temperature=1) | said(first, 2, temperature=1)) > 2

        told = [model.sampling_defaults["temperature"] for model in client.models.list()]  # type: ignore[attr-defined]
        assert told == [0, Sampling().temperature]
        boot = server.http.get("/api/bootstrap").json()
        assert [model["defaults"]["temperature"] for model in boot["models"]] == told
