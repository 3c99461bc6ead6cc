"""Every setting of a recipe in words: its type, bounds, default and meaning, read from the settings themselves.

The same text is docs/recipe.md, `shenhong recipe --explain`, and, with a recipe given, what that recipe comes to.
"""

from __future__ import annotations

import json
import types
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from shenhong import domains
from shenhong.corpus.settings import CorpusSettings
from shenhong.recipe import Recipe
from shenhong.stages import registry
from shenhong.stages.base import StepSettings

_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_BOUNDS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))


_HEAD = """# The recipe: every setting

A recipe is one TOML file that says everything about a model, from raw text to evaluation. Written by
`python -m shenhong.explain` from the settings' own descriptions; `shenhong recipe --explain` prints the same, and
`shenhong recipe RECIPE --explain` what a recipe of yours comes to. `--set train.steps=200` changes one for one run.
In `[corpus]` a setting of another of our kinds of text is accepted and says nothing.

"""


class Setting(NamedTuple):
    key: str
    type: str  # with its bounds
    value: str  # the default, or what a recipe says; "" where it must be given
    meaning: str


class Section(NamedTuple):
    title: str  # as TOML writes the table
    about: str
    settings: list[Setting]


def reference(recipe: Recipe | None = None) -> list[Section]:
    """All tables of a recipe: of any recipe with the defaults, or of this one with its values."""
    if recipe is not None:
        return _of(recipe)
    tables = {name: field.annotation for name, field in Recipe.model_fields.items()}
    sections = [Section("", "above all tables", _settings(Recipe))]
    sections.append(Section("[corpus]", "for every kind of text", _settings(CorpusSettings)))
    for name in domains.names():
        own = _settings(domains.domain(name).Settings, without=CorpusSettings)
        sections.append(Section("[corpus]", f'besides, where kind = "{name}"', own))
    for name in ("tokenizer", "model", "train", "evaluate"):
        kind = tables[name]
        assert isinstance(kind, type) and issubclass(kind, BaseModel)
        sections.append(Section(f"[{name}]", _about(kind), _settings(kind)))
    sections.append(Section("[[steps]]", "for every kind of step", _settings(StepSettings)))
    for name in registry.kinds():
        step = registry.step_of(name)
        own = _settings(step.Settings, without=StepSettings)
        sections.append(Section("[[steps]]", f'besides, where kind = "{name}"', own))
    return [section for section in sections if section.settings]


def _of(recipe: Recipe) -> list[Section]:
    tables = [("", recipe), ("[corpus]", recipe.corpus)]
    brought = () if recipe.init else (("[tokenizer]", recipe.tokenizer), ("[model]", recipe.model))
    tables += [*brought, ("[train]", recipe.train), ("[evaluate]", recipe.evaluate)]
    for step in recipe.steps:
        tables.append(("[[steps]]", step))
        tables += [
            (f"[steps.{name}]", table)
            for name in type(step).model_fields
            if isinstance(table := getattr(step, name), BaseModel)
        ]
    return [Section(title, "", _settings(type(table), table)) for title, table in tables]


def as_text(sections: list[Section]) -> str:
    """For a terminal."""
    lines: list[str] = []
    for title, about, settings in sections:
        lines += ["", f"{title or 'recipe'}{f'  ({about})' if about else ''}"]
        for key, kind, value, meaning in settings:
            lines.append(f"  {key} = {value or '…'}   {kind}{'' if value else ', must be given'}")
            if meaning:
                lines.append(f"      {meaning}")
    return "\n".join(lines[1:])


def as_markdown(sections: list[Section]) -> str:
    """For docs/recipe.md."""
    lines: list[str] = []
    for title, about, settings in sections:
        lines += [
            "",
            f"## {f'`{title}`' if title else 'At the top'}: {about}" if about else title,
            "",
        ]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, kind, value, meaning in settings:
            cells = (f"`{key}`", kind, f"`{value}`" if value else "must be given", meaning)
            escaped = [cell.replace("|", "\\|") for cell in cells]
            lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines[1:]) + "\n"


def document() -> str:
    """docs/recipe.md, whole."""
    return f"{_HEAD}{as_markdown(reference())}"


def as_json(sections: list[Section]) -> list[dict[str, Any]]:
    return [s._asdict() | {"settings": [x._asdict() for x in s.settings]} for s in sections]


def _about(kind: type[BaseModel]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0].rstrip(".") if kind.__doc__ else ""


def _settings(
    kind: type[BaseModel],
    values: BaseModel | None = None,
    without: type[BaseModel] | None = None,
) -> list[Setting]:
    """The settings of a table; tables of a recipe are sections of their own, and of a step are only named."""
    known = without.model_fields if without else {}
    found = []
    for key, field in kind.model_fields.items():
        meaning = field.description or ""
        if _is_table(field.annotation):
            if values is None and not issubclass(kind, Recipe) and key not in known:
                found.append(Setting(key, f"a table as [{key}]", "absent", meaning))
        elif key not in known:
            value = getattr(values, key) if values is not None else field.get_default()
            found.append(Setting(key, _type(field), _toml(value), meaning))
    return found


def _is_table(annotation: Any) -> bool:
    parts = [annotation, *get_args(annotation)]
    return any(isinstance(part, type) and issubclass(part, BaseModel) for part in parts)


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(m, name):,}"
        for kind, name, sign in _BOUNDS
        for m in field.metadata
        if isinstance(m, kind)
    ]
    bounds += [
        f"a multiple of {m.multiple_of}" for m in field.metadata if isinstance(m, MultipleOf)
    ]
    if any(isinstance(m, MinLen) and m.min_length for m in field.metadata):
        bounds.append("not empty")
    bounds += [f"at most {m.max_length} long" for m in field.metadata if isinstance(m, MaxLen)]
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(json.dumps(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in arguments if part is not type(None))
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if hasattr(annotation, "__metadata__"):
        return _words(annotation.__origin__)
    return getattr(annotation, "__name__", str(annotation))


def _toml(value: Any) -> str:
    """A value as a recipe writes it; absent ones in words."""
    if value is PydanticUndefined:
        return ""
    if value is None:
        return "absent"
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":  # python -m shenhong.explain > docs/recipe.md
    print(document(), end="")
