"""The Hugging Face folder: its names and fields, the round trip to the byte, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from shenhong.errors import ModelError
from shenhong.export import huggingface, load_model, save_model
from shenhong.model import Yarn
from shenhong.model.hf_config import from_hf, to_hf
from tests.export.folders import rewrite, tensors_of
from tests.model.random_configs import random_config, random_decoder


def write_tokenizer(folder, size):
    folder.mkdir(exist_ok=True)
    vocab = {chr(0x4E00 + i): i for i in range(size - 1)}
    added = [{"id": size - 1, "content": "<x>"}]
    values = {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def saved(tmp_path):
    """A folder with experts, shared experts and an MTP layer, and its decoder."""
    config = random_config(
        3,
        first_k_dense_replace=0,
        num_nextn_predict_layers=1,
        n_shared_experts=1,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    decoder = random_decoder(config, 3)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", config.vocab_size)
    return save_model(decoder, tmp_path / "model", tokenizer), decoder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8"])
def test_save_load_save_gives_the_same_bytes(tmp_path, saved, dtype):
    _, decoder = saved
    tokenizer = tmp_path / "tokenizer"
    first = save_model(decoder, tmp_path / "first", tokenizer, dtype=dtype)
    again = load_model(first)
    second = save_model(again, tmp_path / "second", tokenizer, dtype=dtype)
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    assert {"config.json", "model.safetensors", "generation_config.json"} <= set(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    if dtype == "float32":
        for name, tensor in decoder.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name


def test_shards_hold_the_same_tensors(tmp_path, saved, monkeypatch):
    decoder = saved[1]
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    sharded = save_model(decoder, tmp_path / "sharded")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    again = load_model(sharded)
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    next(sharded.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match=r"model-00002.* is missing"):
        load_model(sharded)


def test_names_on_disk(saved):
    folder, decoder = saved
    config = decoder.config
    tensors = tensors_of(folder)
    names, bias = set(tensors), tensors["model.layers.0.mlp.gate.e_score_correction_bias"]
    L = config.num_hidden_layers
    expected = {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.0.mlp.gate.weight",
        f"model.layers.0.mlp.experts.{config.n_routed_experts - 1}.up_proj.weight",
        "model.layers.0.mlp.experts.0.down_proj.weight",
        "model.layers.0.mlp.shared_experts.gate_proj.weight",
        f"model.layers.{L}.enorm.weight",
        f"model.layers.{L}.hnorm.weight",
        f"model.layers.{L}.eh_proj.weight",
        f"model.layers.{L}.shared_head.norm.weight",
        f"model.layers.{L}.shared_head.head.weight",
        f"model.layers.{L}.embed_tokens.weight",
    }
    assert expected <= names
    # Transformers reads the trunk without a word: it knows no multi-token layer.
    trunk = load_file(folder / "model.safetensors")
    assert not any(name.startswith(f"model.layers.{L}.") for name in trunk)
    assert set(names) - set(trunk) == set(load_file(folder / "mtp.safetensors"))
    assert not any("experts.gate_up_proj" in name for name in names)
    assert bias.dtype == torch.float32


def test_config_says_what_engines_need(saved):
    folder, decoder = saved
    values = json.loads((folder / "config.json").read_text())
    config = decoder.config
    assert values["architectures"] == ["DeepseekV3ForCausalLM"]
    assert values["topk_method"] == "noaux_tc" and values["scoring_func"] == "sigmoid"
    assert values["moe_layer_freq"] == 1
    assert values["head_dim"] == config.qk_rope_head_dim
    assert values["qk_head_dim"] == config.qk_nope_head_dim + config.qk_rope_head_dim
    assert values["num_key_value_heads"] == config.num_attention_heads
    assert values["num_nextn_predict_layers"] == 1
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == config.rope_theta
    plain = to_hf(random_config(4))
    assert plain["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("seed", range(20))
def test_config_round_trip(seed):
    config = random_config(seed, eos_token_id=1)
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


def test_old_style_rope_is_read():
    values = to_hf(random_config(0, rope_scaling=Yarn(4.0, 16)))
    theta = values["rope_parameters"]["rope_theta"]
    del values["rope_parameters"]
    config = from_hf(values)
    assert config.rope_scaling == Yarn(4.0, 16) and config.rope_theta == theta


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scoring_func", "softmax"),
        ("attention_bias", True),
        ("quantization_config", {"quant_method": "fp8"}),
        ("model_type", "gpt2"),
        ("hidden_act", "gelu"),
        ("hidden_act", None),
        ("num_key_value_heads", 77),
        ("num_experts_per_tok", 99),
        ("hidden_size", "32"),
    ],
)
def test_what_would_compute_something_else_is_refused(field, value):
    values = to_hf(random_config(1, first_k_dense_replace=0)) | {field: value}
    with pytest.raises(ModelError, match=field):
        from_hf(values)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path, saved):
    folder, _ = saved
    norm = "model.norm.weight"
    for edit, words in [
        (lambda t: t.pop(norm), rf"{norm} missing"),
        (lambda t: t.update(stranger=torch.zeros(1)), "stranger does not belong"),
        (lambda t: t.update({norm: torch.zeros(3)}), rf"{norm} is \[3\]"),
        (lambda t: t.update({norm: t[norm].to(torch.float64)}), rf"{norm} is F64"),
        (lambda t: t["model.layers.0.mlp.experts.1.up_proj.weight"].add_(0), None),
    ]:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        rewrite(copy, edit)
        if words is None:
            load_model(copy)
            continue
        with pytest.raises(ModelError, match=words):
            load_model(copy)


def test_a_changed_copy_of_the_embedding_is_refused(saved):
    folder, decoder = saved
    name = f"model.layers.{decoder.config.num_hidden_layers}.embed_tokens.weight"
    rewrite(folder, lambda t: t[name].add_(1))
    with pytest.raises(ModelError, match="embed_tokens"):
        load_model(folder)


def test_damaged_files_are_refused(saved):
    folder, _ = saved
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for cut in (0, 5, 400, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError, match="damaged"):
            load_model(folder)
    path.write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load_model(folder)


def test_pickles_are_refused(saved):
    folder, decoder = saved
    (folder / "model.safetensors").unlink()
    torch.save(decoder.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        load_model(folder)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path, saved):
    folder, decoder = saved
    write_tokenizer(folder, decoder.config.vocab_size + 1)
    with pytest.raises(ModelError, match="different runs"):
        load_model(folder)
    with pytest.raises(ModelError, match="missing"):
        save_model(decoder, tmp_path / "x", tmp_path)


def test_a_failed_save_leaves_the_old_model(tmp_path, saved, monkeypatch):
    folder, decoder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(Exception, match="No space left"):
        save_model(decoder, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]


def test_the_ablation_attention_is_not_exportable(tmp_path):
    decoder = random_decoder(random_config(2, attention="mha"), 2)
    with pytest.raises(ModelError, match="mla"):
        save_model(decoder, tmp_path / "model")
