"""Training that goes on from a finished model: its tokenizer, its shape, its weights; resumed to the last bit."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoModelForCausalLM

from shenhong import pipeline
from shenhong.errors import ModelError, RecipeError, RunError, ShenhongError
from shenhong.export import load_model, save_folder, save_gguf, save_model
from shenhong.export.source import open_source
from shenhong.model.hf_config import model_type
from shenhong.recipe import load
from shenhong.runs.events import read_events
from shenhong.runs.files import digest
from shenhong.stages.own_code import load_frozen
from shenhong.tokenizer import Tokenizer
from shenhong.train import checkpoint
from tests.conftest import RECIPE, Tiny
from tests.export.families import CHATML, ENDS, family, generation
from tests.export.test_grouped_queries import close, logits_of
from tests.model.random_configs import random_decoder, random_v2_config

ON = RECIPE[: RECIPE.index("[tokenizer]")] + RECIPE[RECIPE.index("[train]") :]
WEIGHTS = "model/model.safetensors"


def written(tiny: Tiny, folder: Path, text: str) -> Path:
    path = folder / "on.toml"
    path.write_text(
        text.replace('"poems.jsonl"', json.dumps(str(tiny.recipe.with_name("poems.jsonl"))))
    )
    return path


def go_on(tiny: Tiny, folder: Path, init: Path, *changes: str) -> Path:
    recipe = load(written(tiny, folder, ON), [f"init={init}", "train.steps=4", *changes])
    pipeline.run(recipe, folder / "run", until="model")
    return folder / "run"


@pytest.fixture(scope="module")
def on(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go_on(tiny, tmp_path_factory.mktemp("on"), tiny.run)


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_events(run) if event["kind"] == "train"]


def test_it_begins_where_the_model_was(tiny: Tiny, on: Path) -> None:
    first, before = losses(on), losses(tiny.run)
    assert len(first) == 4
    assert first[0] < before[0] - 0.3  # the same rows, met again
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (on / "model" / name).read_bytes() == (tiny.run / "model" / name).read_bytes()
    assert load_model(on / "model").config == load_model(tiny.run / "model").config
    assert digest(on / WEIGHTS) != digest(tiny.run / WEIGHTS)
    frozen = (on / "recipe.toml").read_text()
    assert "init = " in frozen and "[model]" not in frozen and "[tokenizer]" not in frozen


def test_a_stop_changes_no_bit_and_then_the_model_is_not_needed(
    tiny: Tiny, on: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny.run / "model", source)
    save, saved = checkpoint.save, []

    def stop(*arguments):
        saved.append(save(*arguments))
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        go_on(tiny, tmp_path, source)
    shutil.rmtree(source)
    run = tmp_path / "run"
    pipeline.run(load_frozen(run), run, until="model")
    assert digest(run / WEIGHTS) == digest(on / WEIGHTS)


def test_a_model_that_changed_before_training_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny.run / "model", source)
    recipe = load(written(tiny, tmp_path, ON), [f"init={source}", "train.steps=4"])
    pipeline.run(recipe, tmp_path / "run", until="tokens")
    decoder = load_model(source)
    with torch.no_grad():
        decoder.model.norm.weight.add_(1)
    save_model(decoder, source, source)
    with pytest.raises(RunError, match="has changed since"):
        pipeline.run(recipe, tmp_path / "run", until="model")


@pytest.mark.parametrize(
    ("text", "changes", "error", "says"),
    [
        (RECIPE, [], RecipeError, r"init brings its own tokenizer and shape: remove \[model\]"),
        (ON, ["init=no/where"], ModelError, "no/where does not exist"),
        (ON, ["train.sequence_length=256"], RecipeError, "above model.max_position_embeddings 128"),
        (ON, ["corpus.simplify=false"], RecipeError, "learnt with corpus.simplify = true"),
    ],
)
def test_what_does_not_go_together_is_said(tiny: Tiny, tmp_path, text, changes, error, says):
    with pytest.raises(error, match=says) as raised:
        recipe = load(written(tiny, tmp_path, text), [f"init={tiny.run}", *changes])
        pipeline.run(recipe, tmp_path / "run", until="model")
    assert issubclass(error, ShenhongError) and "\n" not in str(raised.value)


def foreign(folder: Path) -> Path:
    """A DeepSeek-V2 model of random weights whose tokenizer has one special token and splits at spaces."""
    letters = {"</s>": 0, "?": 1} | {c: i + 2 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz .")}
    config = random_v2_config(2, vocab_size=64, n_group=1, eos_token_id=0, n_shared_experts=1)
    backend = Backend(models.BPE(letters, [], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.add_special_tokens(["</s>"])
    names = folder / "names"
    names.mkdir()
    backend.save(str(names / "tokenizer.json"))
    (names / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return save_model(random_decoder(config, 2), folder / "foreign", names)


def plain(folder: Path) -> Path:
    """A recipe of plain documents that lie beside it."""
    pick = random.Random(0)
    words = ["".join(pick.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(400)]
    lines = (json.dumps({"text": " ".join(pick.choices(words, k=12)) + "."}) for _ in range(200))
    (folder / "t.jsonl").write_text("\n".join(lines))
    text = ON.replace('"verse"', '"text"').replace("poems.jsonl", "t.jsonl")
    path = folder / "plain.toml"
    path.write_text(text.replace("sequence_length = 128", "sequence_length = 64"))
    return path


def test_a_foreign_model_learns_plain_documents(tiny: Tiny, tmp_path: Path) -> None:
    changes = [f"init={foreign(tmp_path)}", "train.balance=none", "train.steps=12"]
    pipeline.run(load(plain(tmp_path), changes), tmp_path / "run", until="model")
    seen = losses(tmp_path / "run")
    assert seen[-1] < seen[0] - 0.1
    decoder = load_model(tmp_path / "run" / "model")
    assert decoder.config.scoring_func == "softmax" and decoder.config.vocab_size == 64


def test_a_foreign_tokenizer_has_no_tokens_for_prompts(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="plain documents"):
        go_on(tiny, tmp_path, foreign(tmp_path), "train.balance=none", "train.sequence_length=64")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]  # nothing had begun


@pytest.mark.parametrize(
    ("kind", "form"), [("llama", "gguf"), ("qwen2", "folder"), ("qwen3", "gguf")]
)
def test_a_known_family_goes_on_from_either_form_and_becomes_either(
    kind: str, form: str, tmp_path: Path
) -> None:
    """9 heads over 3 of keys (llama), 8 over 2, 32 over 8: trained, and in transformers' hands again."""
    family(kind, tmp_path / "theirs")
    source = tmp_path / "theirs"
    if form == "gguf":
        source = save_gguf(source, tmp_path / "theirs.gguf", 32).path
    run = tmp_path / "run"
    pipeline.run(load(plain(tmp_path), [f"init={source}", "train.steps=12"]), run, until="model")
    first = losses(run)
    assert first[-1] < first[0] - 0.05
    decoder, tokenizer = load_model(run / "model"), Tokenizer.load(run / "model")
    assert decoder.config.attention == "gqa" and model_type(decoder.config) == kind
    assert tokenizer.ends == set(ENDS) and tokenizer.special.template == CHATML
    theirs = AutoModelForCausalLM.from_pretrained(run / "model", attn_implementation="eager").eval()
    tokens_BT = torch.randint(400, (2, 13))
    with torch.no_grad():
        close(theirs(tokens_BT).logits, logits_of(decoder, tokens_BT))
    again = open_source(save_gguf(run / "model", tmp_path / "again.gguf", 32).path)
    assert again.tokenizer.ends == set(ENDS)
    assert again.tokenizer.special._replace(ends=()) == tokenizer.special._replace(ends=())
    close(logits_of(again.decoder(), tokens_BT), logits_of(decoder, tokens_BT))


def test_ends_and_sampling_of_the_model_are_carried_over(tmp_path: Path) -> None:
    """Through a second training and an export too; what the documents end with is an end."""
    family("llama", tmp_path / "theirs")
    for number, source in ((1, "theirs"), (2, "run1")):
        recipe = load(plain(tmp_path), [f"init={tmp_path / source}", "train.steps=2"])
        pipeline.run(recipe, tmp_path / f"run{number}", until="model")
    save_folder(tmp_path / "run2" / "model", tmp_path / "out")
    for folder in ("run1/model", "run2/model", "out"):
        assert generation(tmp_path / folder) == generation(tmp_path / "theirs")
    # One that ends nothing of what it was made for is still what a document ends with.
    path = tmp_path / "theirs" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [0], "temperature": 0.3}))
    recipe = load(plain(tmp_path), [f"init={tmp_path / 'theirs'}", "train.steps=2"])
    pipeline.run(recipe, tmp_path / "run3", until="model")
    said = generation(tmp_path / "run3" / "model")
    assert said == {"eos_token_id": [0, 2], "temperature": 0.3}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def renamed(path: Path) -> None:
    """Its splits have a name that nobody knows; the length stays."""
    path.write_bytes(path.read_bytes().replace(b"smollm", b"unkown"))


@pytest.mark.parametrize(
    ("spoil", "name", "says"),
    [
        (cut, "theirs/model.safetensors", "damaged"),
        (cut, "theirs.gguf", "ends at byte"),
        (renamed, "theirs.gguf", "splits 'unkown'; those known are"),
    ],
)
def test_what_cannot_go_on_is_refused_before_the_first_stage(
    spoil, name: str, says: str, tmp_path: Path
) -> None:
    family("llama", tmp_path / "theirs")
    save_gguf(tmp_path / "theirs", tmp_path / "theirs.gguf", 32)
    spoil(tmp_path / name)
    source = tmp_path / name.partition("/")[0]
    recipe = load(plain(tmp_path), [f"init={source}", "train.steps=2"])
    with pytest.raises(ModelError, match=says):
        pipeline.run(recipe, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
