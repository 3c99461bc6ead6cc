"""argparse in plain words: a mistake is one line with the nearest that is right, a help shows defaults that say something."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

from shenhong.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest that is right, and no usage block above it."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.register("type", int, _whole)  # argparse's own errors name Python's types
        self.register("type", float, _number)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see '{self.prog} --help'")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Each verb's parser comes through here, so that it speaks of its own flags.
        options, rest = super().parse_known_args(args, namespace)
        if rest:
            kind = "flag" if rest[0].startswith("-") else "argument"
            self.error(f"unknown {kind} {rest[0]}{_nearest(rest[0], self._option_string_actions)}")
        return options, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            known = f"choose from {', '.join(choices)}"
            near = _nearest(value, choices) if isinstance(value, str) else ""
            raise argparse.ArgumentError(action, f"{value} is not known{near}, {known}")


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.split("=")[0], known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number") from None


def positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def count(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below one")
    return value
