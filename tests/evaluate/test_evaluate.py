import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from shenhong.domains import domain
from shenhong.domains.verse import DOMAIN as VERSE
from shenhong.errors import DataError
from shenhong.evaluate.evaluate import evaluate, read_split
from shenhong.evaluate.metrics import ScoredText
from shenhong.evaluate.ngram import NGram
from shenhong.evaluate.settings import EvaluateSettings
from tests.evaluate.run_folder import poem, write_corpus


def scored(texts, bits=2.0):
    characters = [len(text) for text in texts]
    return ScoredText([n * bits * math.log(2) for n in characters], characters, characters)


def test_verse_end_to_end(tmp_path):
    write_corpus(tmp_path)
    texts = read_split(tmp_path, "test")["text"]
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return [poem(3) if i % 2 else "不成诗" for i in range(len(prompts))]

    seen = [poem(n) for n in range(50)]
    settings = EvaluateSettings(titles=20, samples=3, ngram_order=3)
    result = evaluate(tmp_path, VERSE, scored(texts), generate, seen, settings, seed=7)
    assert json.loads(json.dumps(result, allow_nan=False)) == result

    bits = result["bits_per_character"]
    assert bits["model"]["bits_per_character"]["value"] == pytest.approx(2.0)
    order3 = next(e for e in bits["ngrams"] if (e["source"], e["order"]) == ("seen", 3))
    expected = NGram(seen, 3).bits_per_character(texts)
    assert order3["bits_per_character"]["value"] == pytest.approx(expected)
    assert order3["model_below"]["value"] == pytest.approx(1 - 2.0 / expected)
    assert {(e["source"], e["order"]) for e in bits["ngrams"]} == {
        (source, order) for source in ("seen", "all") for order in (1, 3)
    }

    assert len(asked) == 20 and all(prompt.startswith("五绝 题") for prompt in asked)
    assert result["verse"]["model"]["all"]["form_exact"]["value"] == 0.5
    assert result["verse"]["human"]["五绝"]["poems"] == 30
    assert result["verse"]["human"]["all"]["form_exact"]["value"] == 1.0
    assert result["generation"]["copying"]["model"]["longest_run"] == len(poem(3))
    assert len(result["samples"]) == 3
    assert result["samples"][1]["verse"]["lines"][0]["text"] == poem(3)[:5]

    again = evaluate(tmp_path, VERSE, None, lambda p: p, None, settings, seed=7)
    assert asked == [f"{s['form']} {s['title']}" for s in again["samples"]] + asked[3:]
    assert "model" not in again["bits_per_character"]


def test_plain_text(tmp_path):
    for split, count in (("train", 30), ("test", 6)):
        rows = [
            f"The {n} quick brown foxes jump over the lazy dog number {n}." for n in range(count)
        ]
        table = pa.table(
            {"id": [str(n) for n in range(count)], "prompt": [""] * count, "text": rows}
        )
        pq.write_table(table, tmp_path / f"{split}.parquet")
    texts = read_split(tmp_path, "test")["text"]
    settings = EvaluateSettings(samples=4, ngram_order=2)
    result = evaluate(
        tmp_path, domain("text"), scored(texts), lambda p: [" dog"] * len(p), None, settings, 1
    )
    assert "verse" not in result and len(result["samples"]) == 4
    assert all(text.startswith("The ") for text in (s["prompt"] for s in result["samples"]))


def test_another_text_was_scored(tmp_path):
    write_corpus(tmp_path, 20, 5)
    with pytest.raises(ValueError, match="characters"):
        evaluate(tmp_path, VERSE, ScoredText(1.0, 1, 1), None, None, EvaluateSettings(), 1)


def test_a_missing_or_damaged_split_is_named(tmp_path):
    with pytest.raises(DataError, match=r"test\.parquet"):
        read_split(tmp_path, "test")
    (tmp_path / "test.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"test\.parquet"):
        read_split(tmp_path, "test")


def test_settings_refuse_what_cannot_be():
    for wrong in ({"titles": -1}, {"temperature": -0.1}, {"ngram_order": 0}, {"tiles": 3}):
        with pytest.raises(ValidationError):
            EvaluateSettings.model_validate(wrong)
