"""The library: what it writes, scores and embeds is what the engine and transformers say, alone or among others."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shenhong
from shenhong import LLM, Sampling, train_recipe
from shenhong.cli.main import main
from shenhong.errors import ModelError, RecipeError, RequestError, ServeError
from shenhong.export import load_model
from shenhong.model import PreparedDecoder, serving
from shenhong.numerics import kernels_in_use
from shenhong.runs.files import digest
from tests.conftest import Captured, Tiny, state
from tests.serve.running import with_template
from tests.test_extending import example

HOT = Sampling(temperature=0.9)
TITLES = ["五绝 长城", "七绝 春夜", "江上"]


@pytest.fixture(scope="module")
def llm(tiny: Tiny) -> Any:
    with LLM(tiny.run) as opened:
        yield opened


@pytest.fixture(scope="module")
def precise(tiny: Tiny) -> Any:
    with LLM(tiny.run, torch.float32) as opened:
        yield opened


@pytest.fixture(scope="module")
def theirs(tiny: Tiny) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.run / "model", dtype=torch.float32)


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, shenhong; print([n for n in ('torch', 'numpy', 'pydantic') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    assert set(shenhong.__all__) <= {name for name in shenhong.__all__ if getattr(shenhong, name)}
    with pytest.raises(AttributeError, match="no attribute 'open'"):
        shenhong.open  # noqa: B018


def test_an_answer_does_not_depend_on_the_others(llm: LLM) -> None:
    together = llm.generate(TITLES, 30, HOT, seed=5)
    assert (
        llm.generate(TITLES, 30, HOT, seed=5) == together != llm.generate(TITLES, 30, HOT, seed=6)
    )
    assert llm.generate(TITLES[0], 30, HOT, seed=5) == together[0]
    assert llm.generate([TITLES[0], "别的"], 30, HOT, seed=5)[0] == together[0]
    assert llm.generate([]) == []


def test_a_message_begins_an_answer_and_plain_text_is_gone_on_with(llm: LLM) -> None:
    tokenizer = llm.tokenizer
    message = tokenizer.encode_prompt("长城")
    bare = [*tokenizer.begin, *tokenizer.encode("长城")]
    assert len(message) > len(bare) > 0
    wanted = []
    for ids in (message, bare):
        (done,) = llm.engine.generate([ids], 30, sampling=Sampling(), seed=0)
        wanted.append(tokenizer.decode(done.tokens))
    assert wanted[0] != wanted[1]
    assert [llm.generate("长城", 30, plain=plain) for plain in (False, True)] == wanted


def test_a_stream_is_the_answer_in_pieces(llm: LLM) -> None:
    pieces = list(llm.stream("长城", 40, HOT, seed=3))
    assert len(pieces) > 1 and all(pieces)
    assert "".join(pieces) == llm.generate("长城", 40, HOT, seed=3)


def test_a_stream_that_is_left_gives_its_place_up(llm: LLM) -> None:
    stream = llm.stream("长城", 100, HOT)
    next(stream)
    stream.close()
    assert not llm.engine.running and llm.engine.pages.free == llm.engine.pages.count


def test_a_stop_string_ends_an_answer_before_it(llm: LLM) -> None:
    whole = llm.generate("长城", 60, HOT, seed=4)
    cut = whole[len(whole) // 2]
    assert llm.generate("长城", 60, HOT, seed=4, stop=[cut]) == whole.partition(cut)[0]


def test_a_chat_goes_through_the_template(llm: LLM, tiny: Tiny) -> None:
    messages = [
        {"role": "user", "content": "长城"},
        {"role": "assistant", "content": "好"},
        {"role": "user", "content": "再来"},
    ]
    ids = AutoTokenizer.from_pretrained(tiny.run / "model").apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    (done,) = llm.engine.generate([ids], 20, sampling=HOT, seed=[shenhong_seed(2)])
    assert llm.chat(messages, 20, HOT, seed=2) == llm.tokenizer.decode(done.tokens)
    one = [{"role": "user", "content": "长城"}]
    assert llm.chat(one, 20, HOT, seed=2) == llm.generate("长城", 20, HOT, seed=2)


def shenhong_seed(seed: int) -> int:
    from shenhong.engine import request_seed

    return request_seed(seed, 0)


def test_a_template_that_refuses_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    refusing = "{{ raise_exception('no') }}"
    folder = with_template(tiny.run / "model", tmp_path / "refusing", refusing)
    with LLM(folder) as llm, pytest.raises(RequestError, match="refuses these messages: no"):
        llm.chat([{"role": "user", "content": "x"}])
    folder = with_template(tiny.run / "model", tmp_path / "broken", "{% for %}")
    with LLM(folder) as llm, pytest.raises(ServeError, match="chat_template"):
        llm.chat([{"role": "user", "content": "x"}])


def test_scores_are_those_of_transformers(precise: LLM, theirs: Any) -> None:
    text, llm = "白日依山尽，黄河入海流。", precise
    for prompt in (None, "五绝 登鹳雀楼"):
        score = llm.score(text, prompt)
        before = llm.tokenizer.begin if prompt is None else llm.tokenizer.encode_prompt(prompt)
        assert score.tokens == llm.tokenizer.encode(text)
        ids = torch.tensor([[*before, *score.tokens]])
        with torch.no_grad():
            logits = theirs(ids).logits[0].log_softmax(-1)
        wanted = [float(logits[len(before) + i - 1, t]) for i, t in enumerate(score.tokens)]
        assert score.logprobs == pytest.approx(wanted, abs=2e-4)
        assert score.total == pytest.approx(sum(wanted), abs=1e-3)
        assert score.perplexity == pytest.approx(math.exp(-sum(wanted) / len(wanted)), rel=1e-3)
    assert llm.score("") == ([], []) and math.isnan(llm.score("").perplexity)


def test_a_score_does_not_depend_on_the_others(llm: LLM) -> None:
    texts = ["白日依山尽。", "黄河入海流。欲穷千里目。", ""]
    alone = [llm.score(text) for text in texts]
    assert llm.score(texts) == alone
    llm.generate(TITLES, 20, HOT)  # nor on what the cache holds
    assert llm.score(texts[::-1]) == alone[::-1]
    waiting = llm.stream("长城", 40, HOT)
    next(waiting)
    assert llm.score(texts) == alone
    waiting.close()


def test_embeddings_are_the_mean_of_the_last_states(precise: LLM, theirs: Any) -> None:
    texts, llm = ["白日依山尽，黄河入海流。", "欲穷"], precise
    found = llm.embed(texts)
    assert found.shape == (2, 32) and found.dtype == torch.float32
    for row, text in zip(found, texts, strict=True):
        ids = torch.tensor([[*llm.tokenizer.begin, *llm.tokenizer.encode(text)]])
        with torch.no_grad():
            states = theirs.model(ids).last_hidden_state[0]
        torch.testing.assert_close(row, states.mean(0), atol=1e-4, rtol=1e-3)
    assert llm.embed(texts[1:]).equal(found[1:]) and llm.embed(texts[0]).equal(found[0])
    assert llm.embed([]).shape == (0, 32)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.generate("长" * 500), "reads 1 to 128"),
        (lambda m: m.score("长" * 500), "the text has"),
        (lambda m: m.embed(["长" * 500]), "the text has"),
        (lambda m: m.embed(3), "a text or a list of texts"),
        (lambda m: m.generate("x", stop="abc"), "a list of strings"),
        (lambda m: m.generate("x", stop=[""]), "a stop string is empty"),
        (lambda m: m.generate("x", 0), "ask for at least 1"),
        (lambda m: m.generate("\ud800"), "surrogate"),
        (lambda m: m.generate(["长城", "长" * 500]), "reads 1 to 128"),
        (lambda m: m.generate(3), "a text or a list of texts"),
        (lambda m: m.generate(["a", None]), "a text or a list of texts"),
        (lambda m: list(m.stream(["a"])), "a prompt is a text"),
        (lambda m: m.chat("hi"), "messages take a list"),
        (lambda m: m.chat([]), "messages take a list"),
        (lambda m: m.chat([{"role": "user"}]), "messages take a list"),
        (lambda m: m.chat([{"role": "user", "content": b"x"}]), "messages take a list"),
        (lambda m: m.score([1]), "a text or a list of texts"),
        (lambda m: m.score("a", 3), "a prompt is a text"),
        (lambda m: m.engine.score([1, 2], 0), "first is 0"),
    ],
)
def test_what_cannot_be_is_one_line(llm: LLM, call: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says) as error:
        call(llm)
    assert "\n" not in str(error.value)
    assert not llm.engine.busy and llm.engine.pages.free == llm.engine.pages.count
    llm.engine.reload(load_model(llm.path))  # nothing is under way


def test_it_works_in_the_middle_of_an_event_loop(llm: LLM, tiny: Tiny, tmp_path: Path) -> None:
    """As in a notebook."""
    messages = [{"role": "user", "content": "长城"}]
    wanted = llm.chat(messages, 8, HOT)

    async def inside() -> str:
        return llm.chat(messages, 8, HOT)

    assert asyncio.run(inside()) == wanted


def test_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        LLM(tmp_path / "none")


def test_a_recipe_is_trained_as_the_verb_does(tiny: Tiny, tmp_path: Path) -> None:
    run = train_recipe(tiny.recipe, tmp_path / "run", until="model")
    weights = Path("model/model.safetensors")
    assert run == tmp_path / "run" and digest(run / weights) == digest(tiny.run / weights)
    before = state(run / "model")
    assert train_recipe(run, until="model") == run and state(run / "model") == before
    other = train_recipe(tiny.recipe, tmp_path / "two", ["train.steps=2"], "model")
    assert digest(other / weights) != digest(tiny.run / weights)
    with pytest.raises(RecipeError, match="give nothing else"):
        train_recipe(run, changes=["train.steps=2"])
    with pytest.raises(RecipeError, match="paths"):
        train_recipe({"name": "x", "minutes": 1, "corpus": {}})


def test_a_recipe_may_be_a_dictionary_with_paths_and_code_beside_the_program(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny.recipe.parent / "poems.jsonl", tmp_path)
    (tmp_path / "haiku.py").write_text(example("haiku.py"))
    recipe = tomllib.loads(tiny.recipe.read_text())
    run = train_recipe(recipe, "verse", until="model")
    assert digest(run / "model/model.safetensors") == digest(tiny.run / "model/model.safetensors")
    recipe["corpus"] |= {"kind": "haiku.py", "text_field": "paragraphs", "least": 24}
    run = train_recipe(recipe, "haiku", until="corpus")
    assert train_recipe(run, until="tokenizer") == run
    (tmp_path / "haiku.py").write_text(example("haiku.py") + "# another\n")
    with pytest.raises(RecipeError, match="is not the file it was begun with"):
        train_recipe(run)
    train_recipe(run, until="tokenizer", allow_code="haiku.py")


EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run(example: Path, tiny: Tiny, tmp_path: Path) -> None:
    given = tiny.recipe if example.stem == "train" else tiny.run
    done = subprocess.run(
        [sys.executable, str(example), str(given)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=200,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


# ------------------------------------------------------------------------ what serves


@pytest.fixture
def multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bfloat16, and kernels."""
    if not kernels_in_use():
        pytest.skip("no compiler here")
    monkeypatch.setattr(serving, "multiplies_bfloat16", lambda: True)


def test_a_model_is_opened_in_what_serves_it_best(tiny: Tiny, multiplies: None) -> None:
    """This one is stored in float32."""
    with LLM(tiny.run) as llm:
        assert llm.engine.model.dtype == llm.engine.pools.layers[0].dtype == torch.bfloat16
        assert str(llm.serving) == "bfloat16, by the kernel: this CPU multiplies bfloat16"
        alone = llm.generate(TITLES[0], 20, HOT)
        assert llm.generate(TITLES, 20, HOT)[0] == alone
    with LLM(tiny.run, torch.float32) as llm:
        assert llm.engine.model.dtype == torch.float32 and llm.serving.why == "as asked for"


def test_where_the_kernel_is_not_believed_pytorch_writes_in_float32(
    tiny: Tiny, multiplies: None, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """With the weights as the file has them, not as bfloat16 left them."""
    honest = PreparedDecoder._packed

    def packed(self: PreparedDecoder, weights: Any) -> Any:
        found = honest(self, weights)
        return found | {"out": found["out"] * 2}

    want = LLM(tiny.run, torch.float32).engine.states([5, 6, 7])
    monkeypatch.setattr(PreparedDecoder, "_packed", packed)
    with LLM(tiny.run) as llm:
        assert llm.engine.model.fused is None and llm.engine.model.dtype == torch.float32
        assert str(llm.serving).startswith("float32, by PyTorch: its kernel differs from PyTorch")
        assert "attention of layer 0 is off by" in llm.serving.why
        torch.testing.assert_close(llm.engine.states([5, 6, 7]), want, atol=1e-5, rtol=1e-5)
        assert llm.generate("长城", 8)
    assert "half as fast" in caplog.text


def test_the_verbs_say_and_take_it(tiny: Tiny, multiplies: None, capfd: Captured) -> None:
    assert main(["info", str(tiny.run), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["served here in"] == "bfloat16, by the kernel: this CPU multiplies bfloat16"
    answers = {}
    for dtype in ("auto", "bfloat16", "float32"):
        call = ["generate", str(tiny.run), "长城", "--max-tokens", "30", "--dtype", dtype, "--json"]
        assert main(call) == 0
        answers[dtype] = json.loads(capfd.readouterr().out)["answers"]
        with LLM(tiny.run, dtype) as llm:
            assert answers[dtype] == llm.generate(["长城"], 30, Sampling(0.8))
    assert answers["auto"] == answers["bfloat16"]
