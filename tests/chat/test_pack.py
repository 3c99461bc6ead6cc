"""Conversations in rows: what the template writes, token for token, and only what the assistant says is learnt."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from shenhong.chat.pack import pack
from shenhong.errors import DataError, ModelError
from shenhong.tokenizer import Tokenizer
from shenhong.train.data import Rows
from tests.conftest import Tiny
from tests.serve.running import with_template

# Llama 3's kind: headers, an end of every turn, thinking left out of earlier turns, and turns that must take turns.
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
    "{% set last = loop.last %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + (m['content'] if last else m['content'].split('</think>')[-1]) + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def packed(
    folder: Path,
    model: Path,
    talks: list[list[dict[str, str]]],
    width: int = 64,
    allowed: float = 0.0,
) -> tuple[list[tuple[list[int], list[int]]], dict[str, Any], list[str]]:
    """Samples as (tokens, counted tokens), facts of the training split, what was said."""
    folder.mkdir()
    conversations = [json.dumps({"messages": talk}) for talk in talks]
    names = [f"t.jsonl:{i}" for i in range(1, len(talks) + 1)]
    for split in ("train", "valid", "test"):
        pq.write_table(
            pa.table({"id": names, "conversation": conversations}), folder / f"{split}.parquet"
        )
    lines: list[str] = []
    facts = pack(folder, model, folder, width, allowed, lines.append)
    tensors = load_file(folder / "train.safetensors")
    samples = []
    for tokens, counted, starts in zip(
        *(tensors[n] for n in ("tokens", "counted", "starts")), strict=True
    ):
        at = [*starts.nonzero().flatten().tolist(), width]
        for begin, end in itertools.pairwise(at):
            ids = tokens[begin:end].tolist()
            chosen = [i for i, c in zip(ids, counted[begin:end].tolist(), strict=True) if c]
            samples.append((ids, chosen))
    return samples, facts["train"], lines


def test_a_conversation_is_what_transformers_writes_and_answers_count(
    tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny.run / "model"
    talk = said("长城", "明月几时有", "月", "把酒问青天")
    samples, facts, _ = packed(tmp_path / "a", model, [talk])
    ((ids, counted),) = samples
    tokenizer = Tokenizer.load(model)
    wanted = AutoTokenizer.from_pretrained(model).apply_chat_template(talk, tokenize=True)
    wanted = wanted if isinstance(wanted, list) else wanted["input_ids"]
    assert ids[: len(wanted)] == wanted and set(ids[len(wanted) :]) <= {tokenizer.pad_id}
    answers = [[*tokenizer.encode(talk[i]["content"]), tokenizer.eos_id] for i in (1, 3)]
    assert counted == answers[0] + answers[1]
    assert facts["characters"] == 10 and facts["documents"] == 1


def test_turns_that_the_template_rewrites_are_samples_of_their_own(
    tiny: Tiny, tmp_path: Path
) -> None:
    model = with_template(tiny.run / "model", tmp_path / "model", STRICT)
    tokenizer = Tokenizer.load(model)
    talk = said("长城", "想</think>明月", "月", "思</think>青天")
    samples, _, _ = packed(tmp_path / "a", model, [talk])
    texts = {tokenizer.decode(counted) for _, counted in samples}
    assert texts == {"想</think>明月", "思</think>青天"}
    (long,) = [ids for ids, counted in samples if "青天" in tokenizer.decode(counted)]
    assert "想" not in tokenizer.decode(long)  # as the model will meet its earlier turn


def test_samples_never_see_each_other(tiny: Tiny, tmp_path: Path) -> None:
    """Documents start where the file says, not at a token that the template may write in the middle."""
    model = with_template(
        tiny.run / "model",
        tmp_path / "model",
        STRICT.replace("'<｜User｜>' +", "bos_token + '<｜User｜>' +"),
    )
    tokenizer = Tokenizer.load(model)
    packed(tmp_path / "a", model, [said("长城", "明月"), said("江", "水", "山", "石")])
    rows = Rows(tmp_path / "a" / "train.safetensors", tokenizer.bos_id, tokenizer.pad_id)
    batch = rows.batch(torch.arange(len(rows)))
    assert int(batch.starts_N.sum()) == 2
    assert int((batch.tokens_N == tokenizer.bos_id).sum()) > 2
    # Where the template begins with no BOS, the first token is no target of a prompt's weight either.
    bare = with_template(
        tiny.run / "model", tmp_path / "bare", STRICT.replace("{{ bos_token }}", "")
    )
    packed(tmp_path / "b", bare, [said("长城", "明月"), said("江", "水")])
    path = tmp_path / "b" / "train.safetensors"
    batch = Rows(path, tokenizer.bos_id, tokenizer.pad_id, prompt_weight=0.5).batch(torch.arange(1))
    assert int(batch.starts_N.sum()) == 2 and not batch.weights_N[batch.starts_N].any()


def test_what_is_left_out_is_counted_and_said(tiny: Tiny, tmp_path: Path) -> None:
    model = with_template(tiny.run / "model", tmp_path / "model", STRICT)
    good = [said("长城", "明月")] * 8
    refused = [{"role": "assistant", "content": "早"}, {"role": "user", "content": "？"}]
    long, longer = said("长城", "明月" * 90), said("长城", "明月", "月", "青天" * 90)
    talks = [*good, refused, long, longer]
    with pytest.raises(DataError, match=r"1 of 11 conversations of train are refused.*t.jsonl:9"):
        packed(tmp_path / "a", model, talks)
    samples, facts, lines = packed(tmp_path / "b", model, talks, allowed=0.2)
    assert len(samples) == 9
    assert (facts["refused"], facts["too_long"], facts["shortened"]) == (1, 1, 1)
    assert any("1 conversations of train whose first answer does not fit" in line for line in lines)


def test_a_model_without_a_template_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny.run / "model", tmp_path / "model"))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no chat template"):
        packed(tmp_path / "a", model, [said("长城", "明月")])
