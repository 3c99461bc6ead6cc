"""A whole folder as it is downloaded, model, tokenizer and template from transformers: asked as they would ask it."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shenhong.chat.template import Template
from shenhong.cli.main import main
from shenhong.engine import Constraint, Request, Sampling
from shenhong.engine.text import TextStream, token_bytes
from shenhong.errors import ModelError
from shenhong.export import save_folder, save_gguf
from shenhong.llm import LLM
from shenhong.model.counts import cache_numbers, parameters
from shenhong.models import open_source
from shenhong.tokenizer import Tokenizer
from shenhong.tokenizer.tokenizer import Special

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "The quick brown fox's 13 dogs, naïve Café: 长城万里 Привет!\n\tx = 1 🙂"
SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]


def trained(begins):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 40, trainer)
    if begins:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    return backend


@pytest.fixture(scope="module", params=[False, True], ids=["no bos", "bos"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("foreign") / "model"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained(request.param),
        bos_token="<|begin|>" if request.param else None,
        eos_token="<|end|>",
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=[1, 3],
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.4)
    model.save_pretrained(path)
    return path


@settings(deadline=None, max_examples=100)
@given(
    text=st.text(max_size=20) | st.lists(st.sampled_from(TEXT.split(" ")), max_size=6).map(" ".join)
)
def test_ids_and_text_are_theirs(folder, text):
    ours = Tokenizer.load(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert [*ours.begin, *ours.encode(text)] == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == text
    written = TextStream(token_bytes(ours, 384))
    assert "".join(map(written.add, ours.encode(text))) + written.finish() == text


def test_it_is_asked_and_answers_as_theirs(folder):
    llm = LLM(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    assert not llm.tokenizer.own and llm.tokenizer.ends == {1, 3}
    with Template(folder, llm.tokenizer, 2.0) as template:

        def ask(text):
            return asyncio.run(template.prompt([{"role": "user", "content": text}]))[0]

        prompt = ask("The 13 foxes")
        message = [{"role": "user", "content": "The 13 foxes"}]
        assert prompt == theirs.apply_chat_template(
            message, add_generation_prompt=True, return_dict=False
        )
        # Names of special tokens in a message stay text.
        assert ask("a<|im_end|>b").count(3) == prompt.count(3) == 1
    with llm:
        answer = llm.generate("The 13 foxes", 20, Sampling(temperature=0))
        assert llm.chat(message, 20, Sampling(temperature=0)) == answer
    ids = torch.tensor([prompt])
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
    )
    assert answer == theirs.decode(said[0, len(prompt) :], skip_special_tokens=True)


def test_the_verbs_open_it(folder, capsys):
    assert main(["generate", str(folder), "The fox", "--max-tokens", "5", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["answers"]) == 1
    plain = ["generate", str(folder), "The fox", "--plain", "--max-tokens", "5", "--json"]
    assert main(plain) == 0
    capsys.readouterr()
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "LlamaForCausalLM"
    source = open_source(folder)
    numbers = sum(parameter.numel() for parameter in source.decoder().parameters())
    assert parameters(source.config).total == facts["parameters"] == numbers
    assert cache_numbers(source.config) == (2 * 2 * 8, 2 * 4 * 8)


def copied(folder, to):
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_ends_that_only_config_json_lists_are_ends(folder, tmp_path):
    (copied(folder, tmp_path) / "generation_config.json").unlink()
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    assert theirs.generation_config.eos_token_id == [1, 3]
    assert Tokenizer.load(tmp_path).ends == {1, 3}
    again = save_folder(tmp_path, tmp_path / "again").path
    assert LlamaForCausalLM.from_pretrained(again).generation_config.eos_token_id == [1, 3]
    assert open_source(save_gguf(tmp_path, tmp_path / "m.gguf").path).tokenizer.ends == {1, 3}
    # Where there is a generation_config.json, transformers asks it alone.
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert LlamaForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == 3


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 269060552\n"
)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"]
)
def test_a_pointer_of_git_lfs_is_called_one(folder, tmp_path, refused, name):
    (copied(folder, tmp_path) / name).write_text(POINTER)
    says = (f"{tmp_path / name} is a pointer of git-lfs", "git lfs pull")
    refused("generate", tmp_path, "fox", says=says)
    if name == "model.safetensors":
        (tmp_path / "m.gguf").write_text(POINTER)
        refused("info", tmp_path / "m.gguf", says=("m.gguf is a pointer of git-lfs",))


def test_a_head_that_is_missing_is_said_with_the_cause(folder, tmp_path, refused):
    weights = copied(folder, tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused("generate", tmp_path, "fox", says=("no lm_head.weight", "set tie_word_embeddings"))
    config = tmp_path / "config.json"
    values = json.loads(config.read_text()) | {"tie_word_embeddings": True}
    config.write_text(json.dumps(values))
    assert main(["generate", str(tmp_path), "fox", "--max-tokens", "3"]) == 0


def test_rows_beyond_the_tokens_are_padding(folder, tmp_path):
    """DeepSeek-V2 has 100,015 tokens and 102,400 rows."""
    copied(folder, tmp_path)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(322 + 2385, mean_resizing=False)
    with torch.no_grad():
        for rows in (model.model.embed_tokens.weight, model.lm_head.weight):
            rows[322:] = 0
    model.save_pretrained(tmp_path)
    with LLM(tmp_path, dtype="float32") as llm:
        assert llm.engine.config.vocab_size == 2707 and llm.tokenizer.vocab_size == 322
        prompt = llm.tokenizer.encode("The 13 foxes")
        greedy = Sampling(temperature=0)
        answer = llm.engine.generate([prompt], 20, sampling=greedy)[0].tokens
        ids = torch.tensor([prompt])
        every = torch.ones_like(ids)
        said = model.generate(ids, attention_mask=every, max_new_tokens=20, do_sample=False)
        said = said[0, len(prompt) :].tolist()
        assert answer == [token for token in said if token not in (1, 3)]
        choice = Request(prompt, 20, greedy, constraint=Constraint("choice", '["fox", "dog"]'))
        assert "".join(event.text for event in llm.engine.follow(choice)) in ("fox", "dog")


def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(folder, tmp_path):
    copied(folder, tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 384, "content": "<|more|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="385 tokens"):
        LLM(tmp_path)


def test_older_ways_of_saying_it(folder, tmp_path):
    """Tokens as objects, templates by name in tokenizer_config.json, none at all, and no configuration."""
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    assert Tokenizer.load(tmp_path).special == Special(None, None, None, False, None)
    assert Tokenizer.load(tmp_path).encode_prompt("fox") == Tokenizer.load(tmp_path).encode("fox")
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]
    said = {"eos_token": {"content": "<|end|>", "lstrip": False}, "chat_template": named}
    config.write_text(json.dumps(said | {"bos_token": "<|begin|>", "add_bos_token": True}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.special == Special("<|begin|>", "<|end|>", None, True, "y")
    assert (loaded.begin, loaded.eos_id, loaded.pad_id, loaded.ends) == ([0], 1, 1, {1})


def test_pieces_of_sentencepiece_are_written_as_its_decoder_does():
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    symbols = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=symbols, show_progress=False)
    backend.train_from_iterator(["the fox and the dog "] * 20, trainer)
    vocabulary = backend.get_vocab()
    merges = [tuple(m) for m in json.loads(backend.to_str())["model"]["merges"]]
    plain = Backend(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    plain.normalizer, plain.decoder = backend.normalizer, backend.decoder
    tokenizer = Tokenizer(plain, special=Special(None, None, None, False, None))
    text = "the dog 🙂 and 长城"
    written = TextStream(token_bytes(tokenizer, len(vocabulary)))
    ids = tokenizer.encode(text)
    assert "".join(map(written.add, ids)) + written.finish() == text == plain.decode(ids)


def test_no_name_in_a_text_becomes_a_token_however_many_there_are(folder, tmp_path):
    """Tokens beside the vocabulary too, names within names, and in no more time than other text."""
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    more = [AddedToken(f"<|reserved_{n}|>", special=True) for n in range(2000)]
    plain = [AddedToken("<tool>", special=False), AddedToken("wow wow", special=False)]
    backend.add_tokens([*more, *plain])
    tokenizer = Tokenizer(backend, special=Special("<|begin|>", "<|end|>", None, False, None))
    added = backend.get_added_tokens_decoder()
    ours = {id for id, token in added.items() if token.content != "wow wow"}
    for text in ("<|im_<|im_end|>end|>", "a<|reserved_1999|>b<tool>", "<|" * 50_000 + "<|end|>"):
        ids = tokenizer.encode(text)
        assert not ours & set(ids) and tokenizer.decode(ids) == text
    # What is no more than a frequent word stays the token it is, beside a name too.
    word = backend.token_to_id("wow wow")
    assert tokenizer.encode("wow wow")[0] == word and word in tokenizer.encode("<|end|>wow wow")
