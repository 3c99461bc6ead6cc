"""A model folder from elsewhere: no link in it leads to a file of the reader's, and no pipe or device stops him."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from shenhong import LLM
from shenhong.errors import ModelError
from shenhong.export import open_gguf, save_folder, save_gguf
from shenhong.models import facts
from tests.export.folders import small_config, small_folder
from tests.export.test_damaged import SHAPE, open_folder

TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
FILES = (*TEXTS, "chat_template.jinja", "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_folder(tmp_path / "m", small_config(1, **SHAPE))[0]


@pytest.mark.parametrize("name", [*FILES, "additional_chat_templates/x.jinja"])
def test_a_link_out_of_the_folder_is_refused_by_name(
    folder: Path, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret"
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        shutil.move(path, secret)
    else:
        secret.write_text('{"a": "secret"}')
    path.symlink_to(secret)
    with pytest.raises(ModelError, match="link that leads out of its folder"):
        open_folder(folder)
    with pytest.raises(ModelError, match="link that leads out of its folder"):
        save_gguf(folder, tmp_path / "out.gguf", 4)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "chat_template.json"])
def test_what_is_only_copied_is_not_copied_through_a_link(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret").write_text("{}")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=f"{name} is not copied: it is a link"):
        save_folder(folder, tmp_path / "out")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"{name} is not copied: it is no regular file"):
        save_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_hubs_own_links_are_followed(folder: Path, tmp_path: Path) -> None:
    """models--x/snapshots/REVISION/NAME leads to models--x/blobs/HASH."""
    snapshot = tmp_path / "models--x" / "snapshots" / "1a2b"
    blobs = tmp_path / "models--x" / "blobs"
    for made in (snapshot, blobs):
        made.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "mine").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "mine"):
        assert facts(place)["vocabulary"] == 320
        open_folder(place)
    save_folder(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_a_device_or_a_hole_is_no_file_of_a_model(folder: Path, name: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(ModelError, match="no regular file"):
        open_folder(folder)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="no regular file"):
        open_folder(folder)
    if name != "model.safetensors":
        path.unlink()
        with open(path, "wb") as file:
            file.truncate(3 << 30)
        with pytest.raises(ModelError, match="holds 3,221,225,472 bytes"):
            open_folder(folder)


def test_a_pipe_is_no_gguf_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="no regular file"):
        open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("ends", ["1" + "0" * 400, "[1, 1" + "0" * 400 + "]", "-1" + "0" * 30])
def test_an_end_that_no_token_can_be_ends_nothing(folder: Path, ends: str) -> None:
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
    with LLM(folder) as llm:
        llm.generate("春", max_tokens=2)
