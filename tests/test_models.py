"""What is called MODEL: found and opened, or named with what is wrong with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path


def test_models_that_are_missing_unfinished_or_damaged(
    copy: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    absent, model = tmp_path / "absent", copy / "model"
    for verb in (["generate", absent, "长城"], ["info", absent]):
        refused(*verb, says=(absent, "does not exist; give a run folder"))
    refused("info", tmp_path, says=(tmp_path, "has no config.json"))
    for name, bad in (
        ("model.safetensors", b"short"),
        ("config.json", b'{"model_type"'),
        ("config.json", b"[]"),
        ("tokenizer.json", b"{}"),
    ):
        good = (model / name).read_bytes()
        (model / name).write_bytes(bad)
        refused("generate", copy, "长城", says=(model / name,))
        (model / name).write_bytes(good)
    (model / "model.safetensors").unlink()
    refused("generate", copy, "长城", says=(model, "model.safetensors"))
    shutil.rmtree(model)
    for verb in (["generate", copy, "长城"], ["evaluate", copy]):
        refused(*verb, says=(copy, "has no finished model yet; 'shenhong train"))
