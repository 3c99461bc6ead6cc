"""docs/extending.md as a newcomer would follow it: its examples are taken from the page and run; every path named in docs exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def example(name: str) -> str:
    """The code block of docs/extending.md that follows the name of its file."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    _, found, rest = page.partition(f"`{name}`:\n\n```python\n")
    assert found, f"docs/extending.md shows no {name}"
    return rest.partition("\n```\n")[0] + "\n"


@pytest.mark.parametrize("page", [p for p in PAGES if p.exists()], ids=lambda p: p.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    for link in links:
        assert (page.parent / link).exists(), link


def test_every_path_of_the_tree_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.partition("## The tree\n\n```\n")[2].partition("```")[0]
    base = ROOT / "src" / "shenhong"
    found = 0
    for line in tree.splitlines():
        for name in re.findall(r"(?:^|\s)([a-z_]+(?:/|\.py)(?:[a-z_]+/)?)(?=[\s();]|$)", line):
            assert any((place / name).exists() for place in (base, ROOT, *base.iterdir())), name
            found += 1
    assert found > 25
