"""Folders of others: FP8 weights, shards, layers and copies that may be absent, and the memory that loading takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shenhong.errors import ModelError
from shenhong.export import huggingface, load_model, save_model
from shenhong.model import ModelConfig
from shenhong.numerics import documents
from shenhong.numerics.formats import fp8
from tests.export.folders import rewrite, tensors_of
from tests.model.random_configs import random_config, random_decoder, random_tokens

MATRIX = "model.layers.0.self_attn.o_proj.weight"
SCALE = MATRIX + "_scale_inv"


def wide_config(seed: int, **fixed) -> ModelConfig:
    """Matrices of more than one block, and one kind (144 wide) that does not divide into blocks."""
    wide = {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "kv_lora_rank": 64,
        "q_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 144,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
    }
    return random_config(seed, **(wide | fixed))


@pytest.fixture(scope="module")
def decoder():
    return random_decoder(wide_config(3), 3).eval()


@pytest.fixture
def eight(decoder, tmp_path):
    return save_model(decoder, tmp_path / "eight", dtype="float8")


def test_fp8_reads_back_within_half_a_step(decoder, eight):
    tensors = tensors_of(eight)
    assert tensors[MATRIX].dtype == torch.float8_e4m3fn and tensors[SCALE].shape == (2, 2)
    again = {entry.name: entry.view for entry in huggingface.entries(load_model(eight))}
    eighths = 0
    for entry in huggingface.entries(decoder):
        found, wanted = again[entry.name], entry.view
        if entry.name + "_scale_inv" not in tensors:
            assert torch.equal(found, wanted if entry.exact else wanted.bfloat16().float())
            continue
        eighths += 1
        scale = fp8.spread(tensors[entry.name + "_scale_inv"], *wanted.shape)
        step = 2.0 ** ((wanted / scale).abs().clamp(min=2.0**-6).log2().floor() - 3) * scale
        assert ((found - wanted).abs() <= step / 2 * 1.001).all(), entry.name
    assert eighths > 10
    said = json.loads((eight / "config.json").read_text())["quantization_config"]
    assert said["weight_block_size"] == [128, 128]
    # Not routers, embeddings or the joining matrix; not what does not divide, which config.json names.
    whole = said["modules_to_not_convert"]
    assert "model.layers.1.mlp.experts.0.up_proj" in whole
    kinds = {name: t.dtype for name, t in tensors.items() if t.ndim == 2}
    for name in ("layers.1.mlp.gate.weight", "layers.2.eh_proj.weight", "embed_tokens.weight"):
        assert kinds[f"model.{name}"] == torch.bfloat16


def test_transformers_opens_fp8(decoder, eight):
    pytest.importorskip("accelerate", reason="transformers opens FP8 only beside accelerate")
    model = AutoModelForCausalLM.from_pretrained(eight, attn_implementation="eager")
    ours = load_model(eight)
    tokens_BT = random_tokens(decoder.config, 1, 2, 11)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.bfloat16())  # what transformers makes of the weights
        docs = documents(tokens_BT.clone(), -1)
        logits = ours.logits(ours(tokens_BT.flatten(), docs).states_ND)
        theirs = model.float().eval()(tokens_BT).logits.flatten(0, 1)
    assert (logits - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_scales_may_lie_in_another_shard_and_blocks_be_ragged(decoder, eight):
    """As in DeepSeek-V3 itself, whose 576 rows make five rows of scales."""
    tensors = tensors_of(eight)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    tensors[name], scale = fp8.quantise(tensors[name])
    assert scale.shape == (2, 2) and tensors[name].shape[0] == 144
    tensors[name + "_scale_inv"] = scale
    scales = {n: tensors.pop(n) for n in list(tensors) if n.endswith("_scale_inv")}
    parts = {
        "model-00001-of-00002.safetensors": tensors,
        "model-00002-of-00002.safetensors": scales,
    }
    for file, part in parts.items():
        save_file(part, eight / file, metadata={"format": "pt"})
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (eight / "model.safetensors.index.json").write_text(json.dumps(index))
    before = load_model(eight)
    for file in ("model.safetensors", "mtp.safetensors"):
        (eight / file).unlink()
    after = {entry.name: entry.view for entry in huggingface.entries(load_model(eight))}
    assert torch.equal(after[name], fp8.dequantise(tensors[name], scale))
    for entry in huggingface.entries(before):
        assert entry.name == name or torch.equal(entry.view, after[entry.name]), entry.name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(SCALE), rf"{MATRIX} is F8_E4M3; expected"),
        (lambda t: t.update({SCALE: torch.ones(1, 2)}), rf"{SCALE} is \[1, 2\]"),
        (lambda t: t.update({SCALE: torch.ones(2, 2).int()}), rf"{SCALE} is I32"),
        (lambda t: t.update({MATRIX: t[MATRIX].float()}), "is F32; expected|does not belong"),
        (lambda t: t.update({"x.weight_scale_inv": torch.ones(2, 2)}), "x.weight_scale_inv does"),
    ],
)
def test_fp8_that_does_not_fit_is_named(eight, change, words):
    rewrite(eight, change)
    with pytest.raises(ModelError, match=words):
        load_model(eight)


def test_a_multi_token_layer_that_is_only_promised_is_left_out(decoder, tmp_path, caplog):
    folder = save_model(decoder, tmp_path / "model")
    own = f"model.layers.{decoder.config.num_hidden_layers}."
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith(own)])
    opened = load_model(folder)
    assert opened.config.num_nextn_predict_layers == 0 and "without" in caplog.text
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, decoder.state_dict()[name]), name


def test_half_a_multi_token_layer_is_refused(decoder, tmp_path):
    folder = save_model(decoder, tmp_path / "model")
    rewrite(
        folder, lambda t: t.pop(f"model.layers.{decoder.config.num_hidden_layers}.eh_proj.weight")
    )
    with pytest.raises(ModelError, match=r"eh_proj\.weight missing"):
        load_model(folder)


def test_copies_may_be_absent_and_a_tied_head_be_there(tmp_path):
    config = wide_config(3, tie_word_embeddings=True)
    folder = save_model(random_decoder(config, 3), tmp_path / "model")
    own = f"model.layers.{config.num_hidden_layers}."

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        del tensors[own + "embed_tokens.weight"], tensors[own + "shared_head.head.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(folder, change)
    load_model(folder)
    rewrite(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ModelError, match=r"lm_head\.weight differs"):
        load_model(folder)


def test_a_tensor_in_two_shards_is_refused(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 1_000_000)
    folder = save_model(decoder, tmp_path / "model")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(second) | load_file(first), second, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="is also in"):
        load_model(folder)


def test_an_untrue_config_is_refused_before_memory_is_taken(decoder, tmp_path):
    """A petabyte of experts is refused by the names that are missing; nothing of that size is made."""
    folder = save_model(decoder, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    values |= {"moe_intermediate_size": 2**20, "n_routed_experts": 4096, "num_hidden_layers": 1024}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"mlp\.experts\.\d+\.gate_proj\.weight missing"):
        load_model(folder)


PEAK = """
import re, sys, torch
from shenhong.engine import Engine
from shenhong.export import load_model

def peak_bytes():  # of this program alone: getrusage would count its parent's before it began
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])

def open_model(path):
    decoder = load_model(path)
    own = sum(p.numel() * 4 for p in decoder.parameters())
    if sys.argv[1] == "write":
        Engine(decoder, dtype=torch.bfloat16, take=True)
    return own

open_model(sys.argv[2])  # a small one first, so that libraries are not counted
before = peak_bytes()
own = open_model(sys.argv[3])
print(peak_bytes() - before, own)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("use", "dtype"), [("load", "float32"), ("load", "float8"), ("write", "bfloat16")]
)
def test_peak_memory_is_near_the_model_s_own_size(decoder, tmp_path, use, dtype):
    small = save_model(decoder, tmp_path / "small", dtype=dtype)
    config = wide_config(3, vocab_size=4000, intermediate_size=8192, hidden_size=1024)
    large = save_model(random_decoder(config, 3), tmp_path / "large", dtype=dtype)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, use, str(small), str(large)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, own = map(int, done.stdout.split())
    assert own > 150_000_000
    # One piece of the file, and one matrix on its way.
    assert peak < own + 100_000_000, (peak / own, peak, own)
