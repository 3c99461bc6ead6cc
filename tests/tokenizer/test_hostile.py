"""A tokenizer.json that means harm: it is refused in a line, or reads texts as if it meant none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shenhong.errors import ModelError, RequestError
from shenhong.tokenizer import Tokenizer
from tests.export.folders import small_tokenizer


def changed(folder: Path, **changes: Any) -> Path:
    small_tokenizer().save(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def replace(what: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": what}, "content": content}


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Sequence", "normalizers": [replace("a", "a" * 16)] * 8},
        replace("", "a" * 10_000_000),
        {"type": "Prepend", "prepend": "a" * 10_000_000},
    ],
)
def test_a_text_is_not_blown_up(normalizer: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: its normalizers write [\d,]+ char"):
        Tokenizer.load(changed(tmp_path, normalizer=normalizer))


def test_a_text_is_neither_cut_nor_filled_up(tmp_path: Path) -> None:
    """As transformers reads it, unless it is asked to."""
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 1 << 40},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    loaded = Tokenizer.load(changed(tmp_path, truncation=truncation, padding=padding))
    assert loaded.encode("hello there") == small_tokenizer().encode("hello there")


def test_an_expression_that_gives_up_ends_one_text_alone(tmp_path: Path) -> None:
    split = {
        "type": "Split",
        "pattern": {"Regex": "(?:a|aa)+c"},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    both = {"type": "Sequence", "pretokenizers": [split, level]}
    loaded = Tokenizer.load(changed(tmp_path, pre_tokenizer=both))
    for encode in (loaded.encode, loaded.encode_inside):
        with pytest.raises(RequestError, match="tokenizer cannot read this text"):
            encode("a" * 60)
        assert encode("b")
