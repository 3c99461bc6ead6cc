"""Recipes: the three that ship are valid; every mistake is one line that names the key and the remedy."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shenhong.errors import RecipeError
from shenhong.recipe import load, parse

RECIPES = Path(__file__).parents[1] / "recipes"
MINIMAL = 'name = "m"\nminutes = 1\n[corpus]\nkind = "text"\npaths = ["t.txt"]\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "r.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_the_recipes_that_ship_are_valid_and_survive_freezing(path, tmp_path):
    recipe = load(path)
    assert load(written(tmp_path, recipe.dump(tmp_path))) == recipe
    assert all(Path(p).is_absolute() for p in recipe.corpus.paths)


def test_a_corpus_in_the_same_tree_is_frozen_relative_to_the_run(tmp_path):
    path = written(tmp_path, MINIMAL.replace('["t.txt"]', '["t.txt", "/elsewhere/t.txt"]'))
    (tmp_path / "runs" / "m").mkdir(parents=True)
    frozen = tmp_path / "runs" / "m" / "recipe.toml"
    frozen.write_text(load(path).dump(frozen.parent))
    assert '"../../t.txt"' in frozen.read_text() and '"/elsewhere/t.txt"' in frozen.read_text()
    assert load(frozen) == load(path)


def test_where_paths_begin(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    paths = '["t.txt", "~/notes", "~nobody-here/x", "/else/where"]'
    path = written(tmp_path, 'init = "~/model"\n' + MINIMAL.replace('["t.txt"]', paths))
    recipe = load(path)
    assert recipe.init == str(tmp_path / "home" / "model")
    assert recipe.corpus.paths == [
        *(str(tmp_path / name) for name in ("t.txt", "home/notes", "~nobody-here/x")),
        "/else/where",
    ]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # what is given beside a recipe begins where one is
    changed = load(path, ['corpus.paths=["a.txt", "~/b"]', "init=model"])
    assert changed.corpus.paths == [str(tmp_path / "here" / "a.txt"), str(tmp_path / "home" / "b")]
    assert changed.init == str(tmp_path / "here" / "model")


def test_characters_are_simplified_only_where_a_recipe_asks(tmp_path):
    assert not load(written(tmp_path, MINIMAL)).corpus.simplify
    verse = MINIMAL.replace('"text"', '"verse"')
    assert load(written(tmp_path, verse)).corpus.simplify
    # As runs of 0.1.0 hold it: it was the default of every kind.
    assert load(written(tmp_path, MINIMAL + "simplify = true\n")).corpus.simplify


def test_a_recipe_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "bom.toml"
    path.write_text("\ufeff" + MINIMAL, encoding="utf-8")
    assert load(path).name == "m"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[train]\nlearning_rate = 1", "unknown key train.learning_rate"),
        ("[train]\nwarmpu = 0.1", "did you mean warmup?"),
        ("[modle]\nhidden_size = 64", "unknown key modle; did you mean model?"),
        ('[train]\nlr = "fast"', "train.lr"),
        ("[train]\nlr = -1", "train.lr: input should be greater than 0"),
        ("[train]\nsteps = 2.5", "train.steps"),
        ('[train]\noptimizer = "sgd"', "train.optimizer"),
        ("[model]\nnum_experts_per_tok = 99", "num_experts_per_tok"),
        ("[model]\nn_group = 4\ntopk_group = 8", "topk_group"),
        ("[model]\nn_group = 4\ntopk_group = 2", "knows no group limits (model.topk_group 2 of 4)"),
        ("[model]\nn_routed_experts = 10\nn_group = 4\ntopk_group = 2", "n_group"),
        ("[model]\nqk_rope_head_dim = 31", "even"),
        ('[model]\nscoring_func = "softmax"', "sigmoid with noaux_tc"),
        (
            '[model]\nscoring_func = "softmax"\ntopk_method = "greedy"\nnorm_topk_prob = false\n'
            "num_nextn_predict_layers = 0",
            'set it to "none" and balance by train.sequence_balance',
        ),
        ("[train]\nbatch_tokens = 1000", "multiple of train.sequence_length"),
        ("[train]\nsequence_length = 4096\nbatch_tokens = 4096", "max_position_embeddings"),
        ("[corpus2", "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, line, said):
    with pytest.raises(RecipeError) as error:
        load(written(tmp_path, f"{MINIMAL}{line}\n"))
    message = str(error.value)
    assert said in message and "r.toml" in message and "\n" not in message


@pytest.mark.parametrize("remedy", ['[train]\nbalance = "centred"', "topk_group = 4"])
def test_group_limits_go_with_the_rules_that_know_them(remedy, tmp_path):
    limited = "[model]\nn_group = 4\ntopk_group = 2\n"
    text = limited + remedy if "train" in remedy else limited.replace("topk_group = 2", remedy)
    assert load(written(tmp_path, MINIMAL + text)).model.n_group == 4


def test_neither_minutes_nor_steps_is_refused():
    tree = {"name": "x", "corpus": {"kind": "text", "paths": ["a"]}}
    with pytest.raises(RecipeError, match=r"either minutes .* or train.steps"):
        parse(tree, "x")
    assert parse({**tree, "train": {"steps": 3}}, "x").train.steps == 3


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        load(tmp_path / "none.toml")
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load(tmp_path / "r.toml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path)


def test_set_changes_values_of_every_type(tmp_path):
    path = written(tmp_path, MINIMAL)
    changes = [
        "train.steps=7",
        "train.lr=0.5",
        "train.optimizer=adamw",
        "seed=9",
        "train.kernels=false",
    ]
    recipe = load(path, changes)
    assert (recipe.train.steps, recipe.train.lr, recipe.train.optimizer) == (7, 0.5, "adamw")
    assert (recipe.seed, recipe.train.kernels) == (9, False)
    for wrong in ("train.steps", "=3", "name.x=1", "train.stepz=1"):
        with pytest.raises(RecipeError):
            load(path, [wrong])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("train.stepz=3", "unknown key train.stepz; did you mean steps?"),
        ("speed=3", "unknown key speed"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("corpus.paths=7", "corpus.paths"),
        ("model.num_experts_per_tok=5", "experts"),
        ("model.n_group=3", "group"),
        ("model.topk_group=2", "group"),
        ("model.qk_rope_head_dim=9", "even"),
        ("train.batch_tokens=500", "multiple of train.sequence_length"),
        ("train.sequence_length=256", "max_position_embeddings"),
        ("tokenizer.vocab_size=1000", "64"),
        ("train.steps", "write it as section.key=value"),
        ("name.x=3", "name is a value, not a section"),
        ("seed=-1", "seed"),
        ("seed=" + "[" * 9000, "seed: input should be a valid integer"),
        ("train=3", "train"),
    ],
    ids=lambda text: text[:30],
)
def test_a_bad_setting(
    change: str, says: str, recipe: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    refused("train", recipe, "--run", tmp_path / "run", "--set", change, says=(says,))
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_none(recipe: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    absent, broken, binary = (tmp_path / f"{name}.toml" for name in ("absent", "broken", "binary"))
    refused("train", absent, says=(absent, "does not exist; give a recipe"))
    broken.write_text("name = ")
    refused("train", broken, says=(broken, "not valid TOML"))
    binary.write_bytes(b"\xff\xfe\x00")
    refused("train", binary, says=(binary, "a recipe is a TOML file"))
    refused("train", written(tmp_path, "a = " + "[" * 9000), says=("r.toml", "nests too deeply"))
    refused("train", written(tmp_path, "a = " + "9" * 5000), says=("r.toml", "not valid TOML"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    os.mkfifo(tmp_path / "run" / "recipe.toml")  # in a folder that may come from anywhere
    refused("train", tmp_path / "run" / "recipe.toml", says=("recipe.toml", "no regular file"))
    binary.unlink()
    binary.mkdir()
    (binary / "text").touch()
    refused("train", binary, says=(binary, "is not a run folder"))
    timeless = written(tmp_path, recipe.read_text().replace("steps = 16\n", ""))
    refused("train", timeless, says=(timeless, "give either minutes"))
    nameless = written(tmp_path, recipe.read_text().replace('name = "tiny"', ""))
    refused("train", nameless, says=(nameless, "name is missing"))
