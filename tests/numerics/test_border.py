"""The border between Python and C++: what both sides mean by a struct is compared when kernels are loaded."""

from __future__ import annotations

import ast
import ctypes
import shutil
from graphlib import TopologicalSorter
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


def test_nothing_in_the_room_imports_itself_in_a_circle() -> None:
    """Function-level imports included: what checks the kernels is no part of them."""
    files = {
        ".".join(("numerics", *p.relative_to(NUMERICS).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): p
        for p in NUMERICS.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shenhong."):
                module = (node.module or "").removeprefix("shenhong.")
                wanted |= {
                    f"{module}.{a.name}" if f"{module}.{a.name}" in files else module
                    for a in node.names
                }
        graph[name] = {w for w in wanted & files.keys() if not name.startswith(f"{w}.")}
    TopologicalSorter(graph).prepare()  # raises CycleError
