"""The GGUF writer: every tensor under its name and within its precision, whole or not at all."""

from __future__ import annotations

import json
import os
import signal

import gguf
import numpy as np
import pytest

from shenhong.cli.main import main
from shenhong.errors import ModelError, RunError
from shenhong.export import deepseek2, open_gguf, save_gguf, save_model
from shenhong.model import Yarn
from tests.conftest import state
from tests.export.folders import small_config, small_folder, small_tokenizer

# Largest error of a number, as a share of the largest in its block of 32 (F16: of itself).
STEP = {"F32": 0.0, "F16": 2**-11, "Q8_0": 0.5 / 127 + 2**-10, "Q4_0": 1 / 8 + 2**-10}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = small_config(
        1,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        num_nextn_predict_layers=1,
        num_attention_heads=2,
        q_lora_rank=32,
        tie_word_embeddings=False,
        norm_topk_prob=True,
    )
    return small_folder(tmp_path_factory.mktemp("gguf") / "model", config)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_every_tensor_reads_back_within_its_precision(tmp_path, model, bits):
    folder, decoder = model
    written = save_gguf(folder, tmp_path / "m.gguf", bits)
    file = open_gguf(written.path)
    assert written.nbytes == written.path.stat().st_size and not written.notes
    wanted = {entry.name: entry for entry in deepseek2.entries(decoder)}
    assert list(wanted) == list(file.tensors)
    exact = {name for name, info in file.tensors.items() if info.kind == "F32"}
    assert {"blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias", "output_norm.weight"} <= exact
    assert bits == 32 or "blk.0.attn_k_b.weight" not in exact
    for name, entry in wanted.items():
        ours, kind = file.read(name), file.tensors[name].kind
        assert ours.shape == entry.view.shape
        error, values = (ours - entry.view).abs(), entry.view.abs()
        if kind.startswith("Q"):
            error, values = error.unflatten(-1, (-1, 32)), values.unflatten(-1, (-1, 32))
            values = values.amax(-1, keepdim=True)
        assert (error <= STEP[kind] * values + 1e-7).all(), name


def test_the_package_of_llama_cpp_reads_the_same(tmp_path, model):
    path = save_gguf(model[0], tmp_path / "m.gguf", 8).path
    file, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert {tensor.name for tensor in theirs.tensors} == set(file.tensors)
    for tensor in theirs.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(
            file.read(tensor.name).numpy(), values.reshape(file.tensors[tensor.name].shape)
        )
    assert theirs.get_field("deepseek2.block_count").contents() == 3
    tokens = theirs.get_field("tokenizer.ggml.tokens").contents()
    backend = small_tokenizer().backend
    assert tokens == [backend.id_to_token(number) for number in range(320)]
    assert theirs.get_field("tokenizer.ggml.pre").contents() == "deepseek-v3"
    assert "<｜Assistant｜>" in theirs.get_field("tokenizer.chat_template").contents()


def test_metadata_says_what_llama_cpp_would_guess_wrongly(model):
    config = model[1].config
    values = deepseek2.metadata(config)
    assert values["deepseek2.expert_gating_func"] == 2  # it takes softmax where nothing is said
    assert values["deepseek2.attention.head_count_kv"] == 1
    assert values["deepseek2.attention.key_length"] == config.kv_lora_rank + config.qk_rope_head_dim
    assert values["deepseek2.attention.key_length_mla"] == config.qk_head_dim
    assert values["deepseek2.nextn_predict_layers"] == 1
    plain = deepseek2.metadata(config, multitoken=False)
    assert plain["deepseek2.block_count"] == 2 and "deepseek2.nextn_predict_layers" not in plain
    softmax = small_config(
        2,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        first_k_dense_replace=0,
    )
    assert deepseek2.metadata(softmax)["deepseek2.expert_gating_func"] == 1


def test_the_multi_token_layer_can_be_left_out(tmp_path, model):
    with_it = set(open_gguf(save_gguf(model[0], tmp_path / "a.gguf").path).tensors)
    without = set(
        open_gguf(save_gguf(model[0], tmp_path / "b.gguf", multitoken=False).path).tensors
    )
    assert {name for name in with_it - without if not name.startswith("blk.2.")} == set()
    assert {"blk.2.nextn.eh_proj.weight", "blk.2.attn_k_b.weight"} <= with_it - without


def test_a_dense_model_has_no_multi_token_layer_there(tmp_path):
    config = small_config(
        3, num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=1
    )
    folder, _ = small_folder(tmp_path / "dense", config)
    written = save_gguf(folder, tmp_path / "m.gguf")
    assert "multi-token-prediction layer is left out" in written.notes[0]
    assert not any(name.startswith("blk.1.") for name in open_gguf(written.path).tensors)


def test_rows_that_do_not_divide_and_large_numbers_are_said(tmp_path, model):
    config = small_config(4, q_lora_rank=16, num_hidden_layers=1, num_nextn_predict_layers=0)
    folder, decoder = small_folder(tmp_path / "odd", config)
    written = save_gguf(folder, tmp_path / "m.gguf", 4)
    assert any("attn_q_b.weight stays in 16 bits" in note for note in written.notes)
    assert open_gguf(written.path).tensors["blk.0.attn_q_b.weight"].kind == "F16"
    decoder.model.embed_tokens.weight.data[0, 0] = 1e6
    save_model(decoder, folder, folder)
    written = save_gguf(folder, tmp_path / "m.gguf", 16)
    assert open_gguf(written.path).tensors["token_embd.weight"].kind == "F32"
    assert "token_embd.weight stays in 32 bits" in written.notes[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 27, "q_lora_rank": 16}, "no q_lora_rank"),
        ({"n_shared_experts": 0, "first_k_dense_replace": 0}, "shared expert"),
        ({"rope_scaling": Yarn(4.0, 16, mscale=0.7)}, "YaRN"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, changes, words):
    config = small_config(5, num_experts_per_tok=1, **changes)
    folder, _ = small_folder(tmp_path / "m", config)
    with pytest.raises(ModelError, match=words):
        save_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_another_tokenizer_is_refused(tmp_path, model):
    folder, _ = small_folder(tmp_path / "m", model[1].config)
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["pre_tokenizer"] = values["pre_tokenizer"]["pretokenizers"][-1]
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="no name for"):
        save_gguf(folder, tmp_path / "m.gguf")
    path.unlink()
    with pytest.raises(ModelError, match="no tokenizer at"):
        save_gguf(folder, tmp_path / "m.gguf")


def test_tensors_kept_in_other_bits_are_one_line_a_reason(tmp_path):
    config = small_config(4, q_lora_rank=16, num_hidden_layers=3, num_nextn_predict_layers=0)
    folder, _ = small_folder(tmp_path / "odd", config)
    notes = save_gguf(folder, tmp_path / "m.gguf", 4).notes
    kinds = [tensor.kind for tensor in open_gguf(tmp_path / "m.gguf").tensors.values()]
    counts = [int(note.split()[0]) for note in notes if "16 bits" in note]
    assert sum(counts) == kinds.count("F16") > 2 and len(notes) < 3


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_model_is_replaced_only_where_that_is_asked_for(tmp_path, model, refused, to):
    out = tmp_path / "out"
    command = ["export", model[0], "--to", to, "--out", out]
    assert main([str(word) for word in command]) == 0
    before = state(tmp_path)
    refused(*command, "--bits", "8", says=(out, "exists", "--force"))
    assert state(tmp_path) == before
    assert main([str(word) for word in (*command, "--bits", "8", "--force")]) == 0
    assert state(tmp_path) != before


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_what_is_no_model_is_never_replaced(tmp_path, model, refused, to):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "novel.txt").write_text("years of work")
    file.write_text("years of work")
    before = state(tmp_path)
    for out in (folder, file):
        refused("export", model[0], "--to", to, "--out", out, "--force", says=(out, "is no"))
    assert state(tmp_path) == before


def test_an_interrupted_export_leaves_nothing(tmp_path, model, monkeypatch):
    target = tmp_path / "m.gguf"
    target.write_bytes(b"the old one")
    real, left, stops = gguf.quantize, [5], [BaseException()]

    def interrupted(*arguments):
        left[0] -= 1
        if not left[0]:
            raise stops[0]
        return real(*arguments)

    monkeypatch.setattr(gguf, "quantize", interrupted)
    for stop, seen in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "full"), RunError)):
        left[0], stops[0] = 5, stop
        with pytest.raises(seen):
            save_gguf(model[0], target)
        assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
        assert target.read_bytes() == b"the old one"


def test_a_killed_export_leaves_nothing_under_the_name(tmp_path, model, monkeypatch):
    real, left = gguf.quantize, [5]

    def dies(*arguments):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    monkeypatch.setattr(gguf, "quantize", dies)
    child = os.fork()
    if not child:
        save_gguf(model[0], tmp_path / "m.gguf")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "m.gguf").exists()


def test_the_verb(tmp_path, model, capsys):
    out = tmp_path / "m.gguf"
    assert (
        main(["export", str(model[0]), "--to", "gguf", "--bits", "8", "--out", str(out), "--json"])
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(out) and said["nbytes"] == out.stat().st_size
    assert set(said["kinds"]) == {"Q8_0", "F32"} and said["notes"] == []
    folder = tmp_path / "half"
    assert main(["export", str(model[0]), "--to", "hf", "--out", str(folder)]) == 0
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    again = ["export", str(out), "--to", "gguf", "--out", str(out)]
    assert main(again) == 2 and "is where the model lies" in capsys.readouterr().err
    for arguments, words in (
        (["--to", "hf", "--out", str(tmp_path)], "is no model folder"),
        (["--to", "hf", "--out", str(model[0])], "is where the model lies"),
        (["--to", "hf", "--bits", "4", "--out", str(folder), "--force"], "--bits 4"),
        (["--to", "hf", "--no-mtp", "--out", str(folder), "--force"], "--no-mtp"),
        (["--to", "gguf", "--out", str(out / "m.gguf")], "cannot write"),
    ):
        assert main(["export", str(model[0]), *arguments]) == 2
        assert words in capsys.readouterr().err
