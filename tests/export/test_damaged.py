"""Whatever a model's files hold, opening it gives a whole model or one line for a person. See also tests/fuzz."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shenhong.errors import ModelError, ShenhongError
from shenhong.export import load_model, open_gguf, save_folder, save_gguf
from shenhong.export.gguf_model import load_gguf
from shenhong.export.gguf_tokenizer import gguf_tokenizer
from shenhong.models import facts
from shenhong.tokenizer import Tokenizer
from tests.export.folders import small_config, small_folder

SHAPE = {
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 1,
}
VALUES = st.one_of(
    st.sampled_from([0, 1, -1, 2, 1 << 31, 1 << 63, 1 << 70, 1e308, 0.5, "", "x", None, True]),
    st.integers(),
    st.floats(),
    st.just([]),
    st.just({}),
)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("damaged") / "m", small_config(1, **SHAPE))[0]


@pytest.fixture(scope="module")
def file(tmp_path_factory, folder):
    return save_gguf(folder, tmp_path_factory.mktemp("damaged") / "m.gguf", 4).path


def opens(open_it):
    """Whether it opened; anything but our own error of one line fails the test."""
    try:
        open_it()
    except ShenhongError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return False
    return True


@contextlib.contextmanager
def holding(path, content):
    """The file with another content, for a while."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


def open_folder(folder):
    Tokenizer.load(folder)
    load_model(folder)


def open_file(path):
    gguf_tokenizer(open_gguf(path))
    load_gguf(path)


def test_undamaged_they_open(folder, file):
    assert opens(lambda: open_folder(folder)) and opens(lambda: open_file(file))


@QUICK
@given(data=st.data())
def test_any_value_of_a_folders_json(folder, data):
    name = data.draw(st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json"]))
    path, values = folder / name, json.loads((folder / name).read_text())
    spot = values
    while True:
        key = data.draw(st.sampled_from(list(spot) if isinstance(spot, dict) else range(len(spot))))
        if (
            not isinstance(spot[key], dict | list)
            or not spot[key]
            or data.draw(st.integers(0, 3)) == 0
        ):
            break
        spot = spot[key]
    spot[key] = data.draw(VALUES)
    with holding(path, json.dumps(values).encode()):
        opens(lambda: open_folder(folder))


@QUICK
@given(data=st.data())
def test_any_bytes_of_a_folders_headers(folder, data):
    path = folder / data.draw(
        st.sampled_from(["model.safetensors", "config.json", "tokenizer.json"])
    )
    whole = path.read_bytes()
    changed = bytearray(whole)
    header = (
        8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else len(whole)
    )
    for at in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
        changed[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(whole))))
    with holding(path, changed[:cut]):
        opens(lambda: open_folder(folder))


@QUICK
@given(data=st.data())
def test_any_number_of_a_gguf_header(file, data):
    """After its name stand a value's type and value, a tensor's shape, kind and place."""
    whole = file.read_bytes()
    name = data.draw(
        st.sampled_from([b"deepseek2.", b"tokenizer.ggml.", b"general.", b"blk.0.", b"token_embd"])
    )
    spots = [at for at in range(len(whole) - 80) if whole.startswith(name, at)]
    at = data.draw(st.sampled_from(spots)) + data.draw(st.integers(-8, 70))
    width = data.draw(st.sampled_from([1, 4, 8]))
    number = data.draw(st.sampled_from([0, 1, 2, 8, 9, 255, 1 << 16, (1 << 31) - 1, 1 << 31, -1]))
    raw = (number % (1 << 8 * width)).to_bytes(width, "little")
    path = file.with_name("changed.gguf")
    path.write_bytes(whole[:at] + raw + whole[at + width :])
    opens(lambda: open_file(path))


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b'{"a":' * 100_000, b"null", b"[]", b"\xff", b""]
)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_json_that_is_none(tmp_path, folder, name, content):
    """Nesting deeper than the parser goes, other kinds of values, no UTF-8: on every way a file is read."""
    with holding(folder / name, content):
        opens(lambda: open_folder(folder))
        opens(lambda: facts(folder))
        opens(lambda: save_gguf(folder, tmp_path / "m.gguf"))
        opens(lambda: save_folder(folder, tmp_path / "again"))


# A template of a token that is not defined panics, and a panic is no Exception; a merge cut in mid-character makes an
# error message that is no text, and the library ends the process.
DEADLY = {
    "is damaged": lambda values: values["post_processor"]["processors"][-1].update(
        special_tokens={}
    ),
    "is not read": lambda values: values["model"].update(continuing_subword_prefix="x"),
}


@pytest.mark.parametrize("words", DEADLY)
def test_tokenizers_on_which_the_library_dies(folder, words):
    """Found by fuzzing."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_bytes())
    DEADLY[words](values)
    with (
        holding(path, json.dumps(values).encode()),
        pytest.raises(ModelError, match=words),
    ):
        Tokenizer.load(folder)
