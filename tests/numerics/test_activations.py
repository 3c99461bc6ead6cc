"""An activation is one file: used in training, in the experts and in generation, and never mistaken for silu."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import shenhong.numerics.activations as folder
from shenhong.engine import Engine
from shenhong.errors import ModelError, RecipeError
from shenhong.export import load_model, save_folder, save_gguf, save_model
from shenhong.numerics import documents, ops, reference
from shenhong.recipe import load
from tests.conftest import Tiny
from tests.model.random_configs import random_config, random_decoder
from tests.test_extending import example


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The toy activation of docs/extending.md as one new file beside the others."""
    (tmp_path / "squared_relu.py").write_text(example("numerics/activations/squared_relu.py"))
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    yield
    sys.modules.pop("shenhong.numerics.activations.squared_relu", None)


def test_each_has_a_function_of_one_shape_and_dtype(toy: None) -> None:
    assert folder.activations() == ["gelu_pytorch_tanh", "silu", "squared_relu"]
    for name in folder.activations():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.linspace(-3, 3, 12, dtype=dtype).view(3, 4)
            found = folder.activation(name)(x)
            assert found.shape == x.shape and found.dtype == dtype
    assert folder.activation("squared_relu")(torch.tensor([-1.0, 3.0])).tolist() == [0.0, 9.0]


def test_silu_is_what_the_kernel_computes_and_another_is_not() -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ops.gated(x), reference.swiglu(x), atol=1e-6, rtol=1e-5)
    gelu = torch.nn.functional.gelu(x[:, :6], approximate="tanh") * x[:, 6:]
    torch.testing.assert_close(ops.gated(x, "gelu_pytorch_tanh"), gelu)


@pytest.mark.parametrize("seed", range(4))
def test_a_model_of_another_activation_is_what_transformers_computes(
    seed: int, tmp_path: Path
) -> None:
    config = random_config(
        seed, hidden_act="gelu_pytorch_tanh", num_nextn_predict_layers=0, eos_token_id=1
    )
    decoder = random_decoder(config, seed)
    save_model(decoder, tmp_path / "model", None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = torch.arange(2, 26)
    with torch.no_grad():
        wanted = theirs.model(tokens[None]).last_hidden_state[0]
        ours = decoder(tokens, documents(tokens[None].clone(), 0)).states_ND
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4)
    # Generation computes the same, with nothing of the kernel that knows silu alone.
    engine = Engine(load_model(tmp_path / "model"))
    assert engine.model.fused is None
    torch.testing.assert_close(engine.states(tokens.tolist()), wanted, atol=1e-4, rtol=1e-3)


def test_a_toy_activation_trains_and_writes(toy: None, tiny: Tiny, tmp_path: Path) -> None:
    from shenhong import LLM, train_recipe

    changes = ['model.hidden_act="squared_relu"', "train.steps=4"]
    run = train_recipe(tiny.recipe, tmp_path / "run", changes, until="model")
    with LLM(run) as llm:
        assert llm.engine.config.hidden_act == "squared_relu" and llm.generate("长城", 8)
    with pytest.raises(ModelError, match="silu alone, here squared_relu"):
        save_gguf(run / "model", tmp_path / "x.gguf")
    with pytest.raises(ModelError, match="it has no activation called squared_relu"):
        save_folder(run / "model", tmp_path / "x")


def test_an_unknown_one_is_said_with_those_there_are(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match="hidden_act is 'selu'; there are gelu_pytorch_tanh, silu"):
        random_config(1, hidden_act="selu")
    with pytest.raises(RecipeError, match="hidden_act is 'selu'"):
        load(tiny.recipe, ["model.hidden_act=selu"])
