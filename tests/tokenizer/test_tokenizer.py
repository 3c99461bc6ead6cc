"""The tokenizer on 20,000 real poems, under both pre-tokenizers, and in transformers."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong.errors import DataError, ModelError, RequestError
from shenhong.tokenizer import Tokenizer, TokenizerSettings
from shenhong.tokenizer.normalise import normalise
from shenhong.tokenizer.tokenizer import (
    _ONE_IDEOGRAPH,
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    USER,
    byte_alphabet,
    deepseek_v3_splits,
    train,
)

POEMS = Path(__file__).parents[2] / "data/poetry/poems.parquet"


@pytest.fixture(scope="module")
def lines():
    table = next(pq.ParquetFile(POEMS).iter_batches(20_000, columns=["title", "paragraphs"]))
    titles, texts = (table.column(name).to_pylist() for name in ("title", "paragraphs"))
    pairs = zip(titles, texts, strict=True)
    return [normalise(f"{title} {text[:30]}") for title, text in pairs]


@pytest.fixture(scope="module")
def poet(lines):
    return train(lines, TokenizerSettings(vocab_size=4096, isolate_ideographs=True))


@pytest.fixture(scope="module")
def english():
    table = pq.read_table(POEMS.parents[1] / "english/factbook.parquet", columns=["text"])
    return train(table["text"].to_pylist()[:200], TokenizerSettings(vocab_size=2048))


def test_ids_are_the_same_with_ideographs_isolated(poet, lines):
    saved = poet.backend.encode_batch_fast(lines, add_special_tokens=False)
    poet.backend.pre_tokenizer = deepseek_v3_splits(_ONE_IDEOGRAPH)
    isolated = poet.backend.encode_batch_fast(lines, add_special_tokens=False)
    poet.backend.pre_tokenizer = deepseek_v3_splits()
    assert sum(a.ids != b.ids for a, b in zip(saved, isolated, strict=True)) == 0
    # and the fast path is the library
    ids, offsets = poet.encode_many(lines)
    for n, item in enumerate(saved):
        assert ids[offsets[n] : offsets[n + 1]].tolist() == item.ids


def test_common_characters_are_one_token(poet, lines):
    assert (poet._characters() >= 0).sum() > 3400
    ids, _ = poet.encode_many(lines)
    assert len(ids) / sum(map(len, lines)) < 1.03
    for character in "长城月，。？":
        assert len(poet.encode(character)) == 1


def test_the_pre_tokenizer_is_that_of_deepseek_v3(poet):
    saved = json.loads(poet.backend.to_str())["pre_tokenizer"]
    assert saved["type"] == "Sequence"
    digits, ideographs, pieces, byte_level = saved["pretokenizers"]
    assert digits["pattern"] == {"Regex": r"\p{N}{1,3}"}
    assert ideographs["pattern"] == {"Regex": "[一-龥\u3040-ゟ゠-ヿ]+"}
    assert pieces["pattern"]["Regex"].startswith(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|"
    )
    assert pieces["pattern"]["Regex"].endswith(r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    assert {s["behavior"] for s in (digits, ideographs, pieces)} == {"Isolated"}
    assert not any(s["invert"] for s in (digits, ideographs, pieces))
    assert byte_level["type"] == "ByteLevel"
    assert not byte_level["add_prefix_space"] and not byte_level["use_regex"]


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    "长城 hello，。𠀀鿍🙂<｜User>12345\n", max_size=40
)


@given(st.lists(text, max_size=8))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(poet, english, texts):
    for tokenizer in (poet, english):
        ids, offsets = tokenizer.encode_many(texts)
        for n, text in enumerate(texts):
            own = ids[offsets[n] : offsets[n + 1]].tolist()
            assert tokenizer.decode(own) == text
            assert own == tokenizer.encode(text)
            assert all(5 <= i < tokenizer.vocab_size for i in own)


def test_names_of_special_tokens_in_a_message_are_text(poet):
    message = f"长城{ASSISTANT}{EOS}"
    ids = poet.encode_prompt(message)
    assert ids[:2] == [poet.bos_id, poet.user_id] and ids[-1] == poet.assistant_id
    assert not set(ids[2:-1]) & {0, 1, 2, 3, 4}
    assert poet.decode(ids[2:-1]) == message


def test_bytes_are_written_as_the_library_does():
    from tokenizers import pre_tokenizers

    assert set(byte_alphabet().values()) == set(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    every = "".join(map(chr, range(0x20, 0x800)))
    written = split.pre_tokenize_str(every)[0][0]
    assert written == "".join(byte_alphabet()[byte] for byte in every.encode())


@pytest.mark.parametrize("config", [None, {"model_type": "deepseek_v3"}])
def test_transformers_opens_it(poet, lines, tmp_path, config):
    from transformers import AutoTokenizer

    poet.save(tmp_path)
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (BOS, EOS, PAD)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    for line in [*lines[:200], "hello, World 123456 龥鿍𠀀"]:
        assert theirs(line)["input_ids"] == [0, *poet.encode(line)]
    user = [{"role": "user", "content": "五绝 长城"}]
    both = [*user, {"role": "assistant", "content": "白日依山尽，黄河入海流。"}]
    asked = theirs.apply_chat_template(user, add_generation_prompt=True, return_dict=False)
    assert asked == poet.encode_prompt("五绝 长城")
    answered = theirs.apply_chat_template(both, return_dict=False)
    assert answered == [*asked, *poet.encode(both[1]["content"]), poet.eos_id]
    assert theirs.apply_chat_template(both, tokenize=False) == (
        f"{BOS}{USER}五绝 长城{ASSISTANT}白日依山尽，黄河入海流。{EOS}"
    )
    system = [{"role": "system", "content": "诗"}, *user]
    assert theirs.apply_chat_template(system, tokenize=False) == f"{BOS}诗{USER}五绝 长城"
    assert (tmp_path / "chat_template.jinja").read_text() == theirs.chat_template


def test_saved_and_loaded_is_the_same(poet, lines, tmp_path):
    poet.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab_size == poet.vocab_size == 4096
    assert loaded.encode(lines[0]) == poet.encode(lines[0])
    assert not list(tmp_path.glob(".*"))
    again = train(lines, TokenizerSettings(vocab_size=4096, isolate_ideographs=True))
    assert again.backend.to_str() == poet.backend.to_str()  # deterministic


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"version": "1.0"', b"\xff\xfe"])
def test_damaged_files_are_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer_config.json", b"{"), ("tokenizer_config.json", b"[]"), ("tokenizer_config.json", b'{"added_tokens_decoder": {"a": 1}}'),
        ("generation_config.json", b"\xff"),
        ("generation_config.json", b"5"), ("chat_template.jinja", b"\xff"), ("tokenizer.json", b"{"),
    ],
)  # fmt: skip
def test_the_damaged_file_and_what_helps_are_named(poet, tmp_path, name, content):
    poet.save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name} is damaged|cannot read .*{name}") as caught:
        Tokenizer.load(tmp_path)
    assert "run the tokenizer stage again" in str(caught.value)
    (tmp_path / "config.json").write_text("{}")  # a whole model, which may have been downloaded
    with pytest.raises(ModelError, match="copy, download or export"):
        Tokenizer.load(tmp_path)


def test_truncated_file_is_named(poet, tmp_path):
    poet.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="is damaged"):
        Tokenizer.load(tmp_path)


def test_too_little_text():
    with pytest.raises(DataError, match="fewer than the 320 of the smallest vocabulary; add text"):
        train(["short"], TokenizerSettings(vocab_size=8192))
    words = ["walk", "talk", "sail", "read", "paint", "mend", "river", "harbour", "hill", "bridge"]
    few = train([" ".join(f"{w} {w}ing {w}s {w}er" for w in words)] * 3, TokenizerSettings())
    assert few.vocab_size == 320
    assert few.decode(few.encode("walking over the hills")) == "walking over the hills"
    with pytest.raises(ValueError, match="multiple of 64"):
        TokenizerSettings(vocab_size=6000)


def test_half_a_surrogate_pair_is_refused(poet):
    with pytest.raises(RequestError, match="character 2 is half of a surrogate pair"):
        poet.encode("长\ud800")


def test_a_model_of_simplified_text_understands_traditional_messages(tmp_path):
    texts = [chr(c) * 20 for c in range(0x4E00, 0x4E00 + 80)] + ["长城" * 20]
    tokenizer = train(texts, TokenizerSettings(vocab_size=320, isolate_ideographs=True))
    assert tokenizer.encode_prompt("長城") != tokenizer.encode_prompt("长城")
    tokenizer.simplify = True
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode_prompt("長城") == loaded.encode_prompt("长城")
