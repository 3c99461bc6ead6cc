"""evaluate: the finished model measured on held-out text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shenhong import LONGEST_ANSWER
from shenhong.recipe import Recipe
from shenhong.runs.files import atomic_write
from shenhong.runs.run import Run
from shenhong.stages.base import Context, Stage, Step
from shenhong.stages.training import Training


class Evaluate(Stage):
    follows = ("evaluate", "seed", "steps")

    def __init__(self, last: Step) -> None:
        super().__init__("evaluate", Path("evaluation.json"), (last.made_by,))
        self.last = last

    def run(self, context: Context) -> dict[str, Any]:
        assert context.run is not None
        measure(context.recipe, self.last, context.run, context.say)
        return {}


def measure(recipe: Recipe, last: Step, run: Run, say: Callable[[str], None]) -> None:
    """Measure the finished model of a run, made by the step ``last``, on held-out text; writes evaluation.json."""
    import torch

    from shenhong.corpus.pack import has_prompts
    from shenhong.engine import Sampling
    from shenhong.evaluate.evaluate import evaluate, read_split
    from shenhong.evaluate.metrics import ScoredText
    from shenhong.export import load_model
    from shenhong.llm import LLM
    from shenhong.train import budget
    from shenhong.train.data import Rows, seen_rows
    from shenhong.train.validate import score_rows

    step = last.measured_on
    assert isinstance(step, Training)
    dtype = budget.apply(run.manifest["machine"])
    domain = step.domain
    llm = LLM(run.path, torch.float32)  # the measures of a run do not follow from the CPU
    tokenizer = llm.tokenizer
    ids = (tokenizer.bos_id, tokenizer.pad_id)
    corpus, tokens = run.path / step.corpus_folder, run.path / step.folder / "tokens"
    test = Rows(tokens / "test.safetensors", *ids)
    decoder = load_model(run.path / last.model, dtype)
    nats, counted = score_rows(decoder, test, torch.arange(len(test)))
    scored = ScoredText(float(nats.sum()), int(counted.sum()), test.characters)
    train = Rows(tokens / "train.safetensors", *ids)
    trained = run.manifest[step.named("train")]["steps"] * step.train.rows_a_step
    seen = seen_rows(len(train), recipe.seed, trained)
    sampling = Sampling(temperature=recipe.evaluate.temperature)
    held_out = domain.learnt(read_split(corpus, "test", ("text", *domain.columns)))
    whole = test.characters == sum(map(len, held_out))
    if not whole:
        say("bits per character are left out: some held-out conversations do not fit into a row")

    def write(llm: LLM, prompts: list[str]) -> list[str]:
        if step.corpus.conversations:
            talks = [domain.asked(prompt) for prompt in prompts]
            return llm.chats(talks, LONGEST_ANSWER, sampling, seed=recipe.seed)
        # Without prompts the model went on with bare text here, and is asked for that.
        plain = not has_prompts(corpus)
        return llm.generate(prompts, LONGEST_ANSWER, sampling, seed=recipe.seed, plain=plain)

    def write_before(prompts: list[str]) -> list[str]:
        assert before is not None
        say(f"the same questions to {before}, which training began with")
        with LLM(before, torch.float32) as first:
            return write(first, prompts)

    before = _before(step, recipe, run) if domain.answers_again else None
    measures = evaluate(
        corpus,
        domain,
        scored if whole else None,
        lambda prompts: write(llm, prompts),
        tokenizer.backend.decode_batch(train.answers(seen)),
        recipe.evaluate,
        recipe.seed,
        say,
        write_before if before else None,
    )
    llm.close()
    atomic_write(run.path / "evaluation.json", json.dumps(measures, ensure_ascii=False, indent=1))


def _before(step: Training, recipe: Recipe, run: Run) -> Path | None:
    """The finished model that the step began with, where it can still be asked."""
    found = run.path / step.before.model if step.before else Path(recipe.init or "")
    return found if (step.before or recipe.init) and found.exists() else None
