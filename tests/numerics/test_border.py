"""The border between Python and C++: what both sides mean by a struct is compared when kernels are loaded."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import re
import shutil
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import shenhong.numerics
from shenhong.numerics import kernels_in_use
from shenhong.numerics.cpu import build, native, structs

NUMERICS = Path(shenhong.numerics.__file__).parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here")


@needs_compiler
@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("sampling.h", ("int32_t top_k;", "int64_t top_k;"), "struct Sampling: field top_k"),
        (
            "decode.h",
            ("double scaling, eps,", "double eps, scaling,"),
            "struct DecodeModel: field scaling",
        ),
        (
            "attention.h",
            ("int64_t dtype, threads,", "int32_t dtype, threads,"),
            "struct Attention: field dtype",
        ),
        (
            "decode.h",
            ("int64_t dense_inner;", "int64_t dense_inner, more;"),
            "struct DecodeLayer: the size",
        ),
    ],
)
def test_a_struct_that_differs_is_not_loaded(
    file: str, change: tuple[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the file that says where fields lie is compiled: the others need not fit the changed struct."""
    source = tmp_path / "csrc"
    source.mkdir()
    for path in (*build.SOURCES.glob("*.h"), build.SOURCES / "layout.cpp"):
        shutil.copy(path, source)
    text = (source / file).read_text()
    assert change[0] in text
    (source / file).write_text(text.replace(*change))
    monkeypatch.setattr(build, "SOURCES", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SHENHONG_KERNEL_FLAGS", "-O0")
    library = ctypes.CDLL(str(build.build()))
    with pytest.raises(structs.LayoutError, match=says):
        structs.check(library)


def test_kernels_that_mean_another_struct_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def differ(library: ctypes.CDLL) -> None:
        raise structs.LayoutError("struct Sampling: field top_k is elsewhere")

    monkeypatch.setattr(native._State, "tried", False)
    monkeypatch.setattr(native._State, "library", None)
    monkeypatch.setattr(structs, "check", differ)
    if native._State.allowed:
        assert not kernels_in_use()
        assert "field top_k is elsewhere" in caplog.text or shutil.which("g++") is None


def test_signatures_are_those_of_the_sources() -> None:
    """What Python passes to a kernel, argument by argument, against the C++ declaration."""
    kinds = {"int64_t": "n", "int": "i", "float": "f"}
    found, returning = {}, set()
    for path in build.SOURCES.glob("*.cpp"):
        pattern = r"^EXPORT (\w+) (\w+)\(([^)]*)\)"
        for returned, name, arguments in re.findall(pattern, path.read_text(), re.MULTILINE):
            declared = [a.strip() for a in arguments.split(",") if a.strip()]
            found[name] = "".join("p" if "*" in a else kinds[a.split()[0]] for a in declared)
            returning |= {name} if returned == "int" else set()
    # structs.check declares the function that it calls before all others.
    assert found.pop("shenhong_layout") == "ppp"
    assert found == native.SIGNATURES
    assert returning - {"shenhong_layout"} == set(native.RETURNING)


def _imported(path: Path, package: str) -> set[str]:
    """Every module, and every name that may be one, that a file imports at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(module, package)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def _graph(root: Path) -> dict[str, set[str]]:
    """Of each module below shenhong.numerics those that it imports; a name of a module stands for the module."""
    modules = {}
    for path in root.rglob("*.py"):
        parts = ("shenhong.numerics", *path.relative_to(root).with_suffix("").parts)
        modules[".".join(parts).removesuffix(".__init__")] = path
    graph = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        wanted = _imported(path, package)
        graph[name] = {w if w in modules else w.rpartition(".")[0] for w in wanted} & modules.keys()
    return graph


def test_nothing_in_the_room_imports_itself_in_a_circle() -> None:
    """Function-level imports included: what checks the kernels is no part of them."""
    graph = _graph(NUMERICS)
    assert "shenhong.numerics.reference" in graph["shenhong.numerics.ops"]
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    "line",
    [
        "from shenhong.numerics.verify import check",
        "from shenhong.numerics import verify",
        "from shenhong.numerics import use_kernels",
        "import shenhong.numerics.verify",
        "from .. import verify",
        "from ..verify import check",
    ],
)
def test_a_circle_is_found_however_it_is_written(line: str, tmp_path: Path) -> None:
    room = shutil.copytree(NUMERICS, tmp_path / "numerics", ignore=shutil.ignore_patterns("csrc"))
    with (room / "cpu" / "native.py").open("a") as file:
        file.write(f"\n\ndef late():\n    {line}\n")
    with pytest.raises(CycleError):
        TopologicalSorter(_graph(room)).prepare()
