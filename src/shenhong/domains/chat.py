"""Conversations: what a person wants a model to answer, shown by example."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from shenhong.domains.base import CorpusSettings, Domain, Kept, Questions, Record

# Of an answer that is compared: as people read it, whatever stands around it.
_AROUND = " \t\n.。"


class ChatSettings(CorpusSettings):
    default_field: ClassVar[str] = "messages"
    conversations: ClassVar[bool] = True

    near_duplicate: float = Field(
        1.0,
        ge=0.3,
        le=1,
        description="as for all text; questions of one form are alike and not the same, so 1: only exact duplicates go",
    )
    leak_overlap: float = Field(
        1.0, gt=0, le=1, description="as for all text; 1: only what a held-out conversation holds"
    )


class Chat(Domain):
    name = "chat"
    Settings = ChatSettings
    columns = ("conversation",)
    step = ("conversations", "roles and answers")
    answers_again = True

    def keep(self, record: Record, settings: Any) -> Kept | str:
        try:
            messages = json.loads(record.text)["messages"]
        except (ValueError, TypeError, KeyError):
            return "no longer a conversation after its characters were normalised"
        said = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        return Kept(said, columns={"conversation": record.text})

    def learnt(self, rows: Mapping[str, Sequence[str]]) -> list[str]:
        return [
            "".join(m["content"] for m in _messages(one) if m["role"] == "assistant")
            for one in rows["conversation"]
        ]

    def questions(self, held_out: dict[str, list[str]], settings: Any, seed: int) -> Questions:
        """Held-out conversations up to their last answer."""
        import numpy as np

        talks = [_messages(one) for one in held_out["conversation"]]
        ends = [max(i for i, m in enumerate(talk) if m["role"] == "assistant") for talk in talks]
        order = np.random.default_rng(seed).permutation(len(talks)).tolist()
        # One that begins with its answer asks nothing.
        chosen = [i for i in order if ends[i]][: settings.titles]
        prompts = [json.dumps(talks[i][: ends[i]], ensure_ascii=False) for i in chosen]
        references = [talks[i][ends[i]]["content"] for i in chosen]
        rows = {name: [column[i] for i in chosen] for name, column in held_out.items()}
        return Questions(prompts, references, rows)

    def asked(self, prompt: str) -> Any:
        return json.loads(prompt)

    def measure(self, answers: Sequence[str], questions: Questions) -> dict[str, Any]:
        """How many answers are what the person had written, to the letter but for the white space and stop around them."""
        pairs = list(zip(answers, questions.references, strict=True))
        same = sum(ours.strip(_AROUND) == theirs.strip(_AROUND) for ours, theirs in pairs)
        return {"exact_match": same / len(pairs) if pairs else None, "answers": len(pairs)}

    def samples(
        self, questions: Questions, answers: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        return [
            {"prompt": json.loads(prompt)[-1]["content"], "text": answer, "reference": reference}
            for prompt, answer, reference in zip(
                questions.prompts[:count], answers, questions.references, strict=False
            )
        ]

    def tiles(self, evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        found = evaluation.get(self.name) or {}
        now, before = (_share(found.get(which)) for which in ("model", "before"))
        if now is None:
            return []
        beside = "" if before is None else f"before: {before:.1%}"
        return [("answers exactly right", f"{now:.1%}", beside)]


def _share(measures: Any) -> float | None:
    found = measures.get("exact_match") if isinstance(measures, Mapping) else None
    return found if isinstance(found, float) else None


def _messages(conversation: str) -> list[dict[str, Any]]:
    return json.loads(conversation)["messages"]


DOMAIN = Chat()
