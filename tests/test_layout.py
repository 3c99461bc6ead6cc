"""Rooms: who may import whom, read from the source. A room knows those above it in this list, and none below."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "shenhong"

ORDER = (
    *("errors", "runs", "tokenizer", "corpus", "numerics", "parallel", "model", "engine", "train"),
    *("export", "evaluate", "chat", "domains", "models", "llm"),
    "steps",  # stages/base and stages/registry: what a step is; a recipe is checked by its steps' settings
    *("recipe", "stages", "pipeline", "explain", "serve", "cli"),
)
STEPS = ("stages.base", "stages.registry")


def room_of(module: str) -> str:
    """Of a dotted name below the package."""
    return "steps" if module in STEPS else module.split(".")[0]


def modules() -> dict[str, ast.Module]:
    found = {}
    for file in SOURCE.rglob("*.py"):
        name = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.Module) -> set[str]:
    """Names of ours that a module imports, wherever in it, but for those that only a type checker reads."""
    found = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        pending += ast.iter_child_nodes(node)
    return {name.removeprefix("shenhong.") for name in found if name.startswith("shenhong.")}


def test_every_room_knows_only_those_below_it() -> None:
    known = modules()
    for name, tree in known.items():
        if name == "__init__":  # the library's names, loaded when they are asked for
            continue
        room = room_of(name)
        for imported in imports(tree):
            module = imported if imported in known else imported.rpartition(".")[0]
            if module:
                other = room_of(module)
                assert ORDER.index(other) <= ORDER.index(room), f"{name} imports {imported}"


def test_no_room_names_a_domain() -> None:
    """They are handed one, so that a new kind of text is a new folder and nothing else."""
    for name, tree in modules().items():
        if not name.startswith("domains."):
            bad = [i for i in imports(tree) if i.startswith(("domains.verse", "domains.text"))]
            words = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
            assert not bad and "verse" not in words, name


def test_importing_the_package_is_light() -> None:
    imported = imports(modules()["__init__"])
    assert not {name for name in imported if not name.startswith("llm")}
