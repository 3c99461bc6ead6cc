"""Measures a model on the held-out part of its corpus, beside n-grams and beside the human texts.

`evaluate` never sees the model: what only the model can say comes in as the summed loss over the test split
and as a function that answers prompts. Everything else is computed here, from the corpus alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from shenhong.errors import DataError
from shenhong.evaluate.copying import copies, summarise
from shenhong.evaluate.metrics import ScoredText, distinct, mean, ratio
from shenhong.evaluate.ngram import NGram
from shenhong.evaluate.settings import EvaluateSettings

if TYPE_CHECKING:
    from shenhong.domains.base import Domain

FORMAT = 1
Generate = Callable[[list[str]], list[str]]
Log = Callable[[str], None]

_COLUMNS = ("id", "prompt", "text")


def evaluate(
    corpus_dir: Path,
    domain: Domain,
    scored: ScoredText | None,
    generate: Generate | None,
    seen_texts: Iterable[str] | None,
    settings: EvaluateSettings,
    seed: int,
    log: Log = lambda line: None,
    before: Generate | None = None,
) -> dict:
    """All measures of one model, as JSON-able values.

    corpus_dir   has train.parquet and test.parquet (columns id, prompt, text and those of the domain)
    domain       what is asked, and what is measured besides that which holds for all text
    scored       the model's loss over the whole test split, in its order if one number a text; or None
    generate     answers prompts in order, one answer each; None leaves out everything that needs answers
    before       the same for the model that training began with, where it is measured too
    seen_texts   the training texts that the model saw; None: not known, only the whole split is used
    Errors: DataError (a corpus file is missing or empty); ValueError when scored is of other text.
    """
    held_out = read_split(corpus_dir, "test", (*_COLUMNS, *domain.columns))
    columns = ("text", *(domain.columns if domain.answers_again else ()))
    training = domain.learnt(read_split(corpus_dir, "train", columns))
    texts = domain.learnt(held_out)
    result: dict = {
        "format": FORMAT,
        "kind": domain.name,
        "seed": seed,
        "settings": settings.model_dump(mode="json"),
        "held_out": {"texts": len(texts), "characters": sum(map(len, texts))},
        "bits_per_character": _bits(texts, training, scored, seen_texts, settings, log),
    }
    measures = domain.reference(held_out, seed)
    if generate is not None and settings.titles:
        start = time.monotonic()
        questions = domain.questions(held_out, settings, seed)
        answers = generate(questions.prompts)
        if len(answers) != len(questions.prompts):
            raise ValueError(
                f"generate answered {len(answers)} of {len(questions.prompts)} prompts"
            )
        seconds = time.monotonic() - start
        log(f"{len(answers)} answers in {seconds:.1f} s")
        result["generation"] = _answers(answers, questions.references, training, settings, seconds)
        if found := domain.measure(answers, questions):
            measures["model"] = found
            if before is not None:
                measures["before"] = domain.measure(before(questions.prompts), questions)
        result["samples"] = domain.samples(questions, answers, settings.samples)
    if measures:
        result[domain.name] = measures
    return result


def read_split(
    corpus_dir: Path, split: str, columns: Sequence[str] = _COLUMNS
) -> dict[str, list[str]]:
    """Columns of one split of a refined corpus, those of them that it has. Errors: DataError."""
    path = Path(corpus_dir) / f"{split}.parquet"
    try:
        names = set(pq.read_schema(path).names)
        table = pq.read_table(path, columns=[name for name in columns if name in names])
    except FileNotFoundError:
        raise DataError(f"no {split} split at {path}; run the corpus stage again") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; run the corpus stage again") from error
    if not table.num_rows:
        raise DataError(f"{path} holds no texts; use a larger corpus or milder rules")
    return {name: table[name].to_pylist() for name in table.column_names}


def _bits(
    texts: Sequence[str],
    training: Sequence[str],
    scored: ScoredText | None,
    seen_texts: Iterable[str] | None,
    settings: EvaluateSettings,
    log: Log,
) -> dict:
    """Bits per character of the held-out texts: the model, and n-grams of the text it saw and of all."""
    characters = np.array([len(text) for text in texts])
    sources: list[tuple[str, Sequence[str]]] = [("all", training)]
    if seen_texts is not None and (seen := list(seen_texts)):
        sources.insert(0, ("seen", seen))
    sources = [(name, _evenly(texts, settings.ngram_characters)) for name, texts in sources]
    result: dict = {"ngrams": []}
    bits: dict[tuple[str, int], np.ndarray] = {}
    for source, source_texts in sources:
        for order in sorted({1, settings.ngram_order}):
            start = time.monotonic()
            ngram = NGram(source_texts, order)
            bits[source, order] = ngram.bits(texts)
            estimate = ratio(bits[source, order], characters)
            result["ngrams"].append(
                {
                    "order": order,
                    "source": source,
                    "texts": len(source_texts),
                    "characters": sum(map(len, source_texts)),
                    "vocabulary": ngram.outcomes,
                    "unknown": ngram.unknown_share(texts),
                    "bits_per_character": estimate.to_json(),
                    "seconds": round(time.monotonic() - start, 3),
                }
            )
            del ngram
            log(f"{order}-gram of {source} text: {estimate.value:.3f} bits per character")
    if scored is None:
        return result
    counted = int(np.sum(scored.characters))
    if counted != characters.sum():
        raise ValueError(
            f"the model was scored on {counted} characters, the test split has {characters.sum()}"
        )
    model = scored.bits_per_character()
    log(f"model: {model.value:.3f} bits per character")
    result["model"] = {
        "bits_per_character": model.to_json(),
        "nats_per_character": scored.nats_per_character().to_json(),
        "nats_per_token": scored.nats_per_token().to_json(),
        "tokens": int(np.sum(scored.tokens)),
        "characters_per_token": counted / int(np.sum(scored.tokens)),
    }
    model_bits = np.atleast_1d(np.asarray(scored.nats, dtype=np.float64)) / math.log(2)
    for entry in result["ngrams"]:
        other = bits[entry["source"], entry["order"]]
        value = 1 - float(model_bits.sum() / other.sum())
        # With one number a text the two are paired, and the error of the ratio is that of the pairs.
        error = ratio(model_bits, other).error if len(model_bits) == len(other) else None
        entry["model_below"] = {"value": value, "error": error, "count": len(model_bits)}
    return result


def _evenly(texts: Sequence[str], characters: int) -> Sequence[str]:
    """Texts in even distances, of about so many characters together; all of them where they are no more."""
    every = sum(map(len, texts)) / characters
    return texts if every <= 1 else [texts[int(i * every)] for i in range(int(len(texts) / every))]


def _answers(
    answers: Sequence[str],
    human: Sequence[str],
    training: Sequence[str],
    settings: EvaluateSettings,
    seconds: float,
) -> dict:
    """Variety and copying of the answers, beside the human texts of the same prompts."""
    found = copies([*answers, *human], training)
    copying = {"model": summarise(found[: len(answers)]), "human": summarise(found[len(answers) :])}
    return {
        "prompts": len(answers),
        "temperature": settings.temperature,
        "seconds": round(seconds, 3),
        "mean_characters": mean([len(a) for a in answers]).to_json(),
        "distinct": {
            str(n): {"model": distinct(answers, n), "human": distinct(human, n)}
            for n in (1, 2, 3, 4)
        },
        "copying": copying,
    }
