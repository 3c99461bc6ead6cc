"""Verse as a domain: what each room of the house needs of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field

from shenhong.domains.base import CorpusSettings, Domain, Kept, Option, Questions, Record
from shenhong.domains.verse import page, prompts
from shenhong.domains.verse.prosody import FORMS

if TYPE_CHECKING:
    from shenhong.evaluate.page import Block
    from shenhong.evaluate.settings import EvaluateSettings


class VerseSettings(CorpusSettings):
    """How poems are asked for in training."""

    default_field: ClassVar[str] = "paragraphs"

    simplify: bool = Field(
        True, description="turn traditional Chinese characters into simplified ones"
    )
    formless: float = Field(
        0.1, ge=0, le=1, description="share of poems asked for without their form"
    )
    rhymed: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of training poems whose rhyme is asked for too, if they have one",
    )
    title_characters: int = Field(
        16, ge=1, le=64, description="longer titles are cut to this length"
    )


class Verse(Domain):
    name = "verse"
    Settings = VerseSettings
    fields = ("title", "author")
    columns = ("form", "title", "author", "prosody_text")
    step = ("shape", "clean poems of 5 or 7 characters and 4 or 8 lines")
    rewrites = True
    options = (
        Option("form", "verse form asked of the poet", tuple(FORMS)),
        Option("rhyme", "rhyme asked of the poet, as in 阳 or 尤", metavar="韵"),
    )
    single_turn = True
    Part: ClassVar[type[BaseModel] | None] = page.VersePart

    def keep(self, record: Record, settings: VerseSettings) -> Kept | str:
        from shenhong.domains.verse import corpus

        poem = corpus.shape(record.text, record.original)
        if isinstance(poem, str):
            return poem
        title = corpus.title(record.fields["title"], settings.title_characters)
        # Whoever asks for a poem need not name its rhyme, so what is measured is the poem without.
        named = not record.held_out and record.chance("rhyme") < settings.rhymed
        prompt = corpus.prompt(poem, title, record.chance("form") >= settings.formless, named)
        columns = (poem.form, title, record.fields["author"], poem.original)
        return Kept(poem.text, prompt, dict(zip(self.columns, columns, strict=True)))

    def compose(self, text: str, **options: str | None) -> str:
        return prompts.compose(text, **options)

    def questions(
        self, held_out: dict[str, list[str]], settings: EvaluateSettings, seed: int
    ) -> Questions:
        from shenhong.domains.verse import measures

        return measures.questions(held_out, settings.titles, seed)

    def reference(self, held_out: dict[str, list[str]], seed: int) -> dict[str, Any]:
        from shenhong.domains.verse import measures

        return measures.reference(held_out["text"], held_out["form"], seed)

    def measure(self, answers: Sequence[str], questions: Questions) -> dict[str, Any]:
        from shenhong.domains.verse import measures

        return measures.measure(answers, questions.rows["form"])

    def samples(
        self, questions: Questions, answers: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        from shenhong.domains.verse import measures

        return measures.samples(questions.rows, answers, count)

    def reward(self, prompt: str, answer: str) -> float:
        from shenhong.domains.verse import measures

        return measures.reward(prompts.parse(prompt), answer)

    def tiles(self, evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        from shenhong.domains.verse import report

        return report.tiles(evaluation)

    def headline(self, evaluation: Mapping[str, Any]) -> list[list[str]]:
        from shenhong.domains.verse import report

        return report.headline(evaluation)

    def blocks(self, evaluation: Mapping[str, Any]) -> list[Block]:
        from shenhong.domains.verse import report

        return report.blocks(evaluation)

    def part(self, answer: str, prompt: str) -> dict[str, Any] | None:
        return page.verse_part(answer, prompts.parse(prompt).title)

    def part_text(self, part: Mapping[str, Any]) -> str:
        return page.text_of(part)


DOMAIN = Verse()
