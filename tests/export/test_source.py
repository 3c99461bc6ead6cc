"""Llama, Qwen2 and Qwen3 between folder and GGUF, all ways round: weights, logits, ids, template, ends."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shenhong.cli.main import main
from shenhong.engine import Sampling
from shenhong.export import load_model, save_folder, save_gguf
from shenhong.export.source import open_source
from shenhong.serve.sampling import defaults_of
from tests.export.families import ENDS, FAMILIES, TEXT, family, generation
from tests.export.test_grouped_queries import close, logits_of

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPES = {
    "llama": [None, LLAMA3, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}],
    "qwen2": [None, {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}],
    "qwen3": [None, {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}],
}
YARN = {"original_max_position_embeddings": 32}


def tokens_of(model):
    return torch.randint(2, model.config.vocab_size, (2, 19), generator=torch.manual_seed(1))


@pytest.mark.parametrize(("kind", "rope"), [(k, r) for k in ROPES for r in ROPES[k]])
def test_from_a_folder_to_gguf_and_back_nothing_changes(kind, rope, tmp_path):
    yarn = YARN if rope and rope["rope_type"] == "yarn" else {}
    changes = {"rope_parameters": rope | yarn} if rope else {}
    model = family(kind, tmp_path / "theirs", **changes)
    tokens_BT = tokens_of(model)
    with torch.no_grad():
        wanted = model(tokens_BT).logits
    file = save_gguf(tmp_path / "theirs", tmp_path / "m.gguf", 32).path
    close(logits_of(open_source(file).decoder(), tokens_BT), wanted)
    again = save_folder(file, tmp_path / "again", 32).path
    before, after = load_model(tmp_path / "theirs"), load_model(again)
    assert before.config == after.config
    weights = after.state_dict()
    assert all(torch.equal(weights[name], there) for name, there in before.state_dict().items())
    theirs = AutoModelForCausalLM.from_pretrained(again, attn_implementation="eager").eval()
    assert theirs.config.model_type == kind and theirs.generation_config.eos_token_id == sorted(
        ENDS
    )
    with torch.no_grad():
        close(theirs(tokens_BT).logits, wanted)


@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_reads_the_file_as_the_folder(kind, tmp_path):
    # Of a Qwen3 file transformers reads no width of a head: it takes all for 128.
    wide = {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = family(kind, tmp_path / "theirs", **(wide if kind == "qwen3" else {}))
    save_gguf(tmp_path / "theirs", tmp_path / "m.gguf", 32)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", attn_implementation="eager"
    ).eval()
    assert read.config.model_type == kind
    tokens_BT = tokens_of(model)
    with torch.no_grad():
        close(read(tokens_BT).logits, model(tokens_BT).logits)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("begins", [False, True])
def test_the_tokenizer_of_a_file_is_a_tokenizer_of_a_folder(kind, begins, tmp_path):
    """Ids with and without a beginning, the template and the ends, as transformers reads them."""
    family(kind, tmp_path / "theirs")
    first = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    if begins:
        config = tmp_path / "theirs" / "tokenizer_config.json"
        config.write_text(config.read_text().replace("{", '{"add_bos_token": true,', 1))
    file = save_gguf(tmp_path / "theirs", tmp_path / "m.gguf").path
    again = save_folder(file, tmp_path / "again").path
    second = AutoTokenizer.from_pretrained(again)
    for text in (TEXT, "fox Cafe\u0301 12345", "a<|im_end|>\n"):
        ids = first(text, add_special_tokens=False)["input_ids"]
        assert second(text)["input_ids"] == [1] * begins + ids
    message = [{"role": "user", "content": TEXT}]
    asked = [t.apply_chat_template(message, tokenize=False) for t in (first, second)]
    assert asked[0] == asked[1]
    assert (second.bos_token, second.eos_token) == ("<|im_start|>", "<|im_end|>")
    ours = open_source(tmp_path / "theirs").tokenizer
    for there in (open_source(file).tokenizer, open_source(again).tokenizer):
        assert there.ends == ours.ends == set(ENDS)
        assert (there.begin, there.special.template) == (ours.begin, ours.special.template)
    assert save_gguf(again, tmp_path / "twice.gguf").path.exists()


def test_the_verb_takes_a_file_as_it_takes_a_folder(tmp_path, capsys):
    family("llama", tmp_path / "theirs")
    file, folder = tmp_path / "m.gguf", tmp_path / "m"
    assert main(["export", str(tmp_path / "theirs"), "--to", "gguf", "--out", str(file)]) == 0
    assert main(["export", str(file), "--to", "hf", "--out", str(folder)]) == 0
    small = tmp_path / "small.gguf"
    assert main(["export", str(file), "--to", "gguf", "--bits", "8", "--out", str(small)]) == 0
    assert main(["generate", str(folder), "The fox", "--max-tokens", "4"]) == 0
    capsys.readouterr()
    assert main(["info", str(folder), "--json"]) == 0
    assert '"in llama.cpp": "opens it' in capsys.readouterr().out


def test_a_folder_written_again_keeps_its_defaults(tmp_path):
    family("qwen2", tmp_path / "theirs")
    save_folder(tmp_path / "theirs", tmp_path / "again")
    assert generation(tmp_path / "again") == generation(tmp_path / "theirs")
    file = save_gguf(tmp_path / "theirs", tmp_path / "m.gguf").path
    save_folder(file, tmp_path / "from file")
    said = generation(tmp_path / "theirs")
    assert generation(tmp_path / "from file") == said | {"eos_token_id": sorted(ENDS)}
    assert defaults_of(file) == defaults_of(tmp_path / "theirs") == Sampling(0.6, 20, 0.95)
    (tmp_path / "theirs" / "generation_config.json").write_text('{"do_sample": false}')
    assert defaults_of(save_gguf(tmp_path / "theirs", file).path) == Sampling(0)
