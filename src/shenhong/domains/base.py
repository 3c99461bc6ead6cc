"""What a domain is: everything that is particular to one kind of text.

A domain is one file (or folder) here, or one Python file of a person's own that a recipe names. It subclasses `Domain`,
sets a name, overrides what differs from plain documents, and offers itself as ``DOMAIN``:

    settings     what a recipe's [corpus] table may say besides               Settings
    corpus       which records are kept, as what text and prompt, and why not  keep
    prompts      one writer of the prompt, from a person's words and options   compose, options
    measures     what is asked of a finished model, and how answers are judged questions, reference, measure, reward
    report       the sections, tiles and rows of a run's report                blocks, tiles, headline
    page         hints for the composer, and the part an answer is shown as    hints, part

Everything has a default that suits plain documents, so the smallest domain is a name and a `keep`. Rooms below
(corpus, evaluate, serve) are handed a domain and know none by name. Loading one must be quick: what is heavy is
imported where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel

from shenhong.corpus.records import Kept, Record
from shenhong.corpus.settings import CorpusSettings
from shenhong.errors import RecipeError

if TYPE_CHECKING:
    from shenhong.evaluate.page import Block
    from shenhong.evaluate.settings import EvaluateSettings

__all__ = ["CorpusSettings", "Domain", "Kept", "Option", "Questions", "Record"]

Columns = Mapping[str, Sequence[str]]

_OPENING_CHARACTERS = 60  # of a held-out document that a model goes on with


class Option(NamedTuple):
    """Something a person may choose beside their words: a flag of `generate`, a choice on the page."""

    name: str
    help: str
    choices: tuple[str, ...] = ()  # empty: any text
    metavar: str | None = None


class Questions(NamedTuple):
    """What a finished model is asked, what people answered, and the held-out records both come from."""

    prompts: list[str]
    references: list[str]
    rows: dict[str, list[str]]


class Domain:
    """Plain documents, and the base of every other kind."""

    name: ClassVar[str]  # as a recipe's corpus.kind says it
    Settings: ClassVar[type[CorpusSettings]] = CorpusSettings

    # ---------------------------------------------------------------- corpus

    fields: ClassVar[tuple[str, ...]] = ()  # of a raw record, to read besides id and text
    columns: ClassVar[tuple[str, ...]] = ()  # of a refined record, besides id, prompt and text
    step: ClassVar[tuple[str, str]] = (
        "rules",
        "what the domain keeps",
    )  # its name, and what it does
    rewrites: ClassVar[bool] = False  # whether `keep` may change a text
    divisible: ClassVar[bool] = False  # whether a piece of a text is a text: it may be held out

    def keep(self, record: Record, settings: Any) -> Kept | str:
        """What is learnt of a record, or the reason why it is dropped. ``settings`` is of the class `Settings`."""
        return Kept(record.text) if record.text else "empty"

    # ---------------------------------------------------------------- prompts

    options: ClassVar[tuple[Option, ...]] = ()
    single_turn: ClassVar[bool] = (
        False  # learnt from single prompts: earlier turns would spoil an answer
    )

    def compose(self, text: str, **options: str | None) -> str:
        """The prompt for a person's words and what they chose. Error: RequestError for an impossible choice."""
        return text

    # ---------------------------------------------------------------- measures

    def questions(
        self, held_out: dict[str, list[str]], settings: EvaluateSettings, seed: int
    ) -> Questions:
        """At most ``settings.titles`` prompts; here the records' own, else the first words of their texts."""
        import numpy as np

        count = min(settings.titles, settings.samples)  # nothing is measured on them: a few to read
        texts = held_out["text"]
        chosen = np.random.default_rng(seed).permutation(len(texts))[:count].tolist()
        prompts, references = [], []
        for i in chosen:
            prompt, text = held_out.get("prompt", [""] * len(texts))[i] or "", texts[i]
            if not prompt:
                cut = text.rfind(" ", 1, _OPENING_CHARACTERS)
                prompt = text[: cut if cut > 0 else min(_OPENING_CHARACTERS, len(text) // 2)]
                text = text[len(prompt) :]
            prompts.append(prompt)
            references.append(text)
        rows = {name: [column[i] for i in chosen] for name, column in held_out.items()}
        return Questions(prompts, references, rows)

    def learnt(self, rows: Columns) -> Sequence[str]:
        """What of each record counts in the loss, as text."""
        return rows["text"]

    def asked(self, prompt: str) -> Any:
        """What a model is asked by one of the `questions`: a prompt, or the messages of a conversation."""
        return prompt

    answers_again: ClassVar[bool] = (
        False  # whether the model that training began with is measured too
    )

    def reference(self, held_out: dict[str, list[str]], seed: int) -> dict[str, Any]:
        """Measures of the human texts, for those of the model to stand beside. JSON-able; empty: nothing to measure."""
        return {}

    def measure(self, answers: Sequence[str], questions: Questions) -> dict[str, Any]:
        """Measures of a model's answers. JSON-able."""
        return {}

    def samples(
        self, questions: Questions, answers: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        """The first answers, picked by nobody, as the report shows them."""
        pairs = zip(questions.prompts, answers, strict=True)
        return [{"prompt": prompt, "text": answer} for prompt, answer in pairs][:count]

    def reward(self, prompt: str, answer: str) -> float:
        """How good an answer is, from 0 to 1, by its outcome alone. Error: RecipeError where nobody can say."""
        raise RecipeError(f"texts of kind {self.name} have no reward: nothing says which is better")

    # ---------------------------------------------------------------- report

    def tiles(self, evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        """(measure, value, what it stands beside) of the few numbers to see first."""
        return []

    def headline(self, evaluation: Mapping[str, Any]) -> list[list[str]]:
        """Rows (measure, model, human, shuffled)."""
        return []

    def blocks(self, evaluation: Mapping[str, Any]) -> list[Block]:
        """The domain's sections, its samples first."""
        from shenhong.evaluate.page import Heading, Verbatim

        samples = evaluation.get("samples") or []
        shown: list[Block] = [
            Verbatim(f"{s.get('prompt', '')} …", str(s.get("text", ""))) for s in samples
        ]
        return [Heading("Samples"), *shown] if shown else []

    # ---------------------------------------------------------------- page

    Part: ClassVar[type[BaseModel] | None] = None  # what `part` gives, to check an imported chat by

    def hints(self) -> dict[str, Any]:
        """What the page needs to know to ask well. JSON-able."""
        return {
            "name": self.name,
            "options": [
                {"name": option.name, "choices": list(option.choices)} for option in self.options
            ],
        }

    def part(self, answer: str, prompt: str) -> dict[str, Any] | None:
        """An answer as the page sets it, ``{"type": self.name, ...}``; None: as the text it is."""
        return None

    def part_text(self, part: Mapping[str, Any]) -> str:
        """The text of such a part, for searching and for the next turn."""
        return str(part.get("text", ""))
