"""GGUF files as models: our own exports read back, Llama and Qwen shapes, tokenizers by the name of their splits."""

from __future__ import annotations

import dataclasses
import json
import random

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from shenhong.engine import Engine, Sampling
from shenhong.errors import ModelError
from shenhong.export import open_gguf, save_gguf
from shenhong.export.gguf_model import gguf_config, load_gguf
from shenhong.export.gguf_tokenizer import gguf_tokenizer
from shenhong.llm import LLM
from tests.export.folders import small_config, small_folder
from tests.export.test_grouped_queries import close, logits_of, theirs

GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize("seed", range(12))
def test_our_own_export_reads_back_as_the_same_model(seed, tmp_path):
    """Every variant of deepseek2 that is written: shapes, weights and text are the same."""
    softmax = seed % 4 == 3
    config = small_config(seed, num_nextn_predict_layers=0 if softmax else seed % 2)
    if softmax:
        groups = {"topk_method": "group_limited_greedy" if config.n_group > 1 else "greedy"}
        config = dataclasses.replace(config, scoring_func="softmax", norm_topk_prob=False, **groups)
    if config.rope_scaling:
        same = dataclasses.replace(config.rope_scaling, mscale=1.0, mscale_all_dim=1.0)
        config = dataclasses.replace(config, rope_scaling=same)
    folder, decoder = small_folder(tmp_path / "model", config)
    path = save_gguf(folder, tmp_path / "m.gguf", 32).path
    again = load_gguf(path)
    prompts = [[5, 9, 2], [3]]
    ours = Engine(decoder).generate(prompts, 12, sampling=GREEDY, stop=[])
    assert Engine(again).generate(prompts, 12, sampling=GREEDY, stop=[]) == ours
    if again.config.num_nextn_predict_layers == config.num_nextn_predict_layers:
        before, after = decoder.state_dict(), again.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def write(path, architecture, values, tensors, tokenizer=None):
    """A GGUF file by the package: metadata, fp32 tensors, and perhaps a tokenizer's fields."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().contiguous().float().numpy())
    if tokenizer:
        tokenizer(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def as_gguf(path, kind, model, extra=()):
    """As llama.cpp's converter writes transformers' models: rotated rows of llama in pairs, of Qwen in halves."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.layers."):
            number, part = name.removeprefix("model.layers.").split(".", 1)
            ours, suffix = part.rsplit(".", 1)
            if kind == "llama" and ours in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = tensor.shape[0] // width
                rows = tensor.reshape(heads, 2, width // 2, *tensor.shape[1:])
                tensor = rows.swapaxes(1, 2).reshape(tensor.shape)
            tensors[f"blk.{number}.{NAMES[ours]}.{suffix}"] = tensor
    tensors["token_embd.weight"] = model.model.embed_tokens.weight
    tensors["output_norm.weight"] = model.model.norm.weight
    if not config.tie_word_embeddings:
        tensors["output.weight"] = model.lm_head.weight
    values = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": width,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    rope = config.rope_parameters
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        key = "original_max_position_embeddings"
        values["rope.scaling.original_context_length"] = rope[key]
    return write(path, kind, values | dict(extra), tensors)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5, 9, 10, 11])
def test_llama_and_qwen_files_give_the_logits_of_their_folders(seed, tmp_path):
    kind, model = theirs(seed)
    decoder = load_gguf(as_gguf(tmp_path / "m.gguf", kind, model))
    tokens_BT = torch.randint(model.config.vocab_size, (2, 17))
    with torch.no_grad():
        close(logits_of(decoder, tokens_BT), model(tokens_BT).logits)


def test_llama_3_is_known_by_its_divisors(tmp_path):
    """The converter bakes Llama 3.1's extension into one tensor; any other tensor there is refused."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    path = as_gguf(tmp_path / "m.gguf", "llama", model)
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    divisors = plain / model.model.rotary_emb.inv_freq
    file = open_gguf(path)
    tensors = {name: file.read(name) for name in file.tensors}
    values = {k.removeprefix("llama."): v for k, v in file.metadata.items() if k[:6] == "llama."}
    path = write(tmp_path / "b.gguf", "llama", values, tensors | {"rope_freqs.weight": divisors})
    found = gguf_config(open_gguf(path)).rope_scaling
    assert dataclasses.asdict(found) == {k: v for k, v in rope.items() if k in vars(found)}
    tokens_BT = torch.randint(64, (1, 256))
    with torch.no_grad():
        close(logits_of(load_gguf(path), tokens_BT), model(tokens_BT).logits)
    other = tensors | {"rope_freqs.weight": divisors * torch.linspace(1, 2, 32)}
    with pytest.raises(ModelError, match="not Llama 3's extension"):
        load_gguf(write(tmp_path / "c.gguf", "llama", values, other))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"block_count": 7}, "tensor blk.3.attn_norm.weight missing|missing"),
        ({"block_count": 1000}, "missing"),
        ({"block_count": 2**31}, "at most"),
        ({"embedding_length": 2**19}, r"is \[.*make it"),
        ({"context_length": 2**22, "attention.key_length": 2**18}, "differs|lower it"),
        ({"attention.head_count": 0}, "at least 1"),
        ({"attention.head_count_kv": 5}, "must divide"),
        ({"expert_count": 8}, "experts"),
        ({"vocab_size": 3}, r"is \[.*make it"),
        ({"rope.dimension_count": 2}, "differs"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "longrope"),
        ({"rope.freq_base": float("nan")}, "rope"),
        ({"attention.sliding_window": 16}, "sliding_window is 16, which is not computed"),
        ({"attention.layer_norm_rms_epsilon": "small"}, "expected"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(extra, words, tmp_path):
    kind, model = theirs(0)
    path = as_gguf(tmp_path / "m.gguf", kind, model, extra)
    with pytest.raises(ModelError, match=words) as caught:
        load_gguf(path)
    assert "\n" not in str(caught.value) and "m.gguf" in str(caught.value)


def test_more_tokens_than_rows_are_refused_and_fewer_are_padding(tmp_path):
    kind, model = theirs(0)
    file = open_gguf(as_gguf(tmp_path / "m.gguf", kind, model))
    tensors = {name: file.read(name) for name in file.tensors}
    values = {k.partition(".")[2]: v for k, v in file.metadata.items() if k.startswith(kind)}
    for more, name in ((-9, "fewer.gguf"), (1, "more.gguf")):
        names = [f"t{number}" for number in range(model.config.vocab_size + more)]
        path = write(tmp_path / name, kind, values, tensors, lambda w, n=names: w.add_token_list(n))
        if more < 0:
            assert load_gguf(path).config.vocab_size == model.config.vocab_size
            continue
        with pytest.raises(ModelError, match=f"{len(names)} tokens, but .* only"):
            load_gguf(path)


def test_foreign_tensors_and_numbers_that_are_none_are_named(tmp_path):
    kind, model = theirs(0)
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(ModelError, match=r"output_norm\.weight holds numbers that are not finite"):
        load_gguf(as_gguf(tmp_path / "m.gguf", kind, model))
    path = write(tmp_path / "x.gguf", "mamba", {}, {"a": torch.zeros(4)})
    with pytest.raises(ModelError, match="architecture 'mamba'; those that open are llama"):
        load_gguf(path)


# ---------------------------------------------------------------- tokenizers

_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
]
TEXT = "The year 1987, 2,048 days: it's Caf\u00e9 or Cafe\u0301? 长城万里 ｶﾅ Привет, мир!\r\n\t  x = y_1 + 'Z'  \n\n🙂 "


def splits_of(pre):
    """As the published tokenizer.json of each kind has it, spelled out here a second time."""
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre in ("gpt-2", "smollm"):
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        return words if pre == "gpt-2" else pre_tokenizers.Sequence([digits, words])
    patterns = {
        "llama-bpe": [_LLAMA],
        "qwen2": [_LLAMA.replace("{1,3}", "")],
        "deepseek-v3": _DEEPSEEK,
    }[pre]
    split = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    return pre_tokenizers.Sequence([*split, byte])


@pytest.fixture(scope="module", params=["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-v3"])
def pair(request, tmp_path_factory):
    """(an original trained here, the tokenizer read back from a file that only names its splits)."""
    pre = request.param
    original = Backend(models.BPE(ignore_merges=pre == "llama-bpe"))
    original.pre_tokenizer = splits_of(pre)
    original.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        original.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pick = random.Random(5)
    words = TEXT.split(" ")
    lines = [" ".join(pick.choices(words, k=9)) for _ in range(300)]
    original.train_from_iterator(lines, trainer)
    original.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    vocabulary = original.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    special = {"<|end|>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<tool>": 4}

    merges = json.loads(original.to_str())["model"]["merges"]

    def fields(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([*tokens, "[PAD1]"])
        writer.add_token_types([*(special.get(token, 1) for token in tokens), 5])
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bos_token_id(vocabulary["<|im_start|>"])
        writer.add_eos_token_id(vocabulary["<|end|>"])
        writer.add_chat_template("{{ messages }}")

    path = tmp_path_factory.mktemp("pre") / "t.gguf"
    one = {"x": torch.zeros(32)}
    return original, gguf_tokenizer(open_gguf(write(path, "llama", {}, one, fields)))


def same(pair, text):
    original, read = pair
    assert read.backend.encode(text, add_special_tokens=False).ids == original.encode(text).ids
    return read


@settings(deadline=None, max_examples=150)
@given(
    text=st.text(max_size=30) | st.lists(st.sampled_from(TEXT.split(" ")), max_size=8).map(" ".join)
)
def test_ids_are_the_originals(pair, text):
    read = same(pair, text)
    if "<" not in text:
        assert read.encode(text) == pair[0].encode(text).ids


def test_what_a_file_says_of_its_tokens(pair):
    read = same(pair, TEXT * 20)
    same(pair, "a<tool>b<|im_end|>c")
    vocabulary = read.backend.get_vocab()
    assert read.bos_id == vocabulary["<|im_start|>"] and "[PAD1]" not in vocabulary
    assert read.ends == {vocabulary["<|end|>"], vocabulary["<|im_end|>"]}
    assert read.special.template == "{{ messages }}" and not read.own
    # In plain text the name of a special token is text.
    assert not set(read.encode("a<|im_end|><tool>")) & {
        vocabulary["<|im_end|>"],
        vocabulary["<tool>"],
    }
    assert read.decode(read.encode("a<|im_end|><tool>")) == "a<|im_end|><tool>"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "llama"}, "only byte-level BPE"),
        ({"pre": "tekken"}, "those known are gpt-2"),
        ({"tokens": ["a", "a"], "types": [1, 1]}, "are the same"),
        ({"types": [1]}, "do not fit together"),
        ({"merges": ["a b c"]}, "do not fit together"),
        ({"merges": ["a q"]}, "damaged"),
        ({"eos": 99}, "not one of its tokens"),
    ],
)
def test_a_tokenizer_that_contradicts_itself_is_refused(changes, words, tmp_path):
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b"], "types": [1, 1], "merges": []}
    values |= {"eos": 0} | changes

    def fields(writer):
        writer.add_tokenizer_model(values["model"])
        writer.add_tokenizer_pre(values["pre"])
        writer.add_token_list(values["tokens"])
        writer.add_token_types(values["types"])
        writer.add_array("tokenizer.ggml.merges", values["merges"] or ["a b"])
        writer.add_eos_token_id(values["eos"])

    if not values["merges"]:
        values["tokens"], values["types"] = (
            [*values["tokens"], "ab"],
            [*values["types"], *([1] * (len(values["types"]) > 1))],
        )
    path = write(tmp_path / "t.gguf", "llama", {}, {"x": torch.zeros(32)}, fields)
    with pytest.raises(ModelError, match=words) as caught:
        gguf_tokenizer(open_gguf(path))
    assert "\n" not in str(caught.value)


def test_a_run_s_export_writes_the_same_poems(tiny, tmp_path):
    path = save_gguf(tiny.run / "model", tmp_path / "poet.gguf", 32).path
    before, after = LLM(tiny.run), LLM(path)
    assert (
        after.tokenizer.own
        and after.tokenizer.special.template == before.tokenizer.special.template
    )
    titles = ["五绝 长城", "七律 <｜User｜> 江上"]
    how = Sampling(temperature=0.8)
    assert before.generate(titles, 20, how, seed=3) == after.generate(titles, 20, how, seed=3)
    assert np.array_equal(before.tokenizer.begin, after.tokenizer.begin)
