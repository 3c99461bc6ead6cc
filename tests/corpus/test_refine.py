import json
import random

import pyarrow.parquet as pq
import pytest

from shenhong.corpus import refine as stage
from shenhong.corpus.refine import refine
from shenhong.corpus.settings import CorpusSettings
from shenhong.domains import domain
from shenhong.errors import DataError

CHARACTERS = [chr(c) for c in range(0x4E00, 0x4E00 + 1500)]


def poem(rng, characters, lines):
    return "\n".join(
        "".join(rng.choices(CHARACTERS, k=characters))
        + "，"
        + "".join(rng.choices(CHARACTERS, k=characters))
        + "。"
        for _ in range(lines // 2)
    )


def records(count=900):
    rng = random.Random(0)
    rows = []
    for n in range(count):
        shape = rng.choice([(5, 4), (7, 4), (5, 8), (7, 8)])
        rows.append(
            {"id": f"p{n:05}", "paragraphs": poem(rng, *shape), "title": f"題{n}", "author": "誰"}
        )
    rows[10]["paragraphs"] = rows[9]["paragraphs"]  # exact
    changed = list(rows[11]["paragraphs"])
    changed[2] = "龍"
    rows.append({**rows[11], "id": "the near", "paragraphs": "".join(changed)})
    rows.append({**rows[0], "id": "ci", "paragraphs": "昨夜雨疏风骤，浓睡不消残酒。"})
    rows.append(
        {
            **rows[0],
            "id": "damaged",
            "paragraphs": "白日依山盡，黃河入海流。欲窮千里□，更上一層樓。",
        }
    )
    rows.append({**rows[0], "id": "empty", "paragraphs": ""})
    rows.append(
        {
            **rows[0],
            "id": "trad",
            "paragraphs": "白日依山盡，黃河入海流。\n欲窮千里目，更上一層樓。",
        }
    )
    return rows


def write(path, rows):
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )


def run(folder, rows, out="out", log=lambda line: None, **more):
    write(folder / "poems.jsonl", rows)
    kind = domain(more.get("kind", "verse"))
    settings = kind.Settings(
        **{"kind": "verse", "paths": ["poems.jsonl"], "held_out": 0.05, **more}
    )
    return refine(settings, kind, folder, folder / out, 0, log)


def read(folder):
    return {
        name: pq.read_table(folder / f"{name}.parquet").to_pylist()
        for name in ("train", "valid", "test")
    }


def test_verse_end_to_end(tmp_path):
    rows = records()
    report = run(tmp_path, rows)
    parts = read(tmp_path / "out")
    everything = {row["id"]: row for part in parts.values() for row in part}
    assert len(everything) == sum(map(len, parts.values()))
    assert {row["id"] for row in rows} - set(everything) == {
        "p00010",
        "the near",
        "ci",
        "damaged",
        "empty",
    }
    assert all([r["id"] for r in part] == sorted(r["id"] for r in part) for part in parts.values())
    trad = everything["trad"]
    assert trad["text"] == "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
    assert trad["prosody_text"] == "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。"
    assert trad["form"] == "五绝" and trad["title"] == "题0" and trad["author"] == "谁"
    for row in everything.values():
        assert len(row["text"]) == len(row["prosody_text"])
        asked, _, rhyme = row["prompt"].partition(" 押")
        assert asked in (row["title"], f"{row['form']} {row['title']}")
        assert not rhyme or row in parts["train"]
    formless = sum(row["prompt"].startswith(row["title"]) for row in everything.values())
    assert 0.05 < formless / len(everything) < 0.16
    assert not list((tmp_path / "out").glob(".*"))
    steps = {step["step"]: step for step in report["steps"]}
    assert steps["shape"]["dropped"] == {
        "not of a regulated form": 1,
        "damaged or annotated": 1,
        "empty": 1,
    }
    assert steps["exact duplicates"]["kept"] == steps["near duplicates"]["records"] == 901
    example = steps["near duplicates"]["examples"]["almost the same as another"][0]
    assert {example["id"], example["other_id"]} == {"the near", "p00011"}
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == report


def test_half_of_the_training_poems_are_asked_for_with_their_rhyme(tmp_path):
    rhyming = poem(random.Random(3), 5, 4)
    rows = [
        {**row, "title": "题"} for row in records(2000) if len(row["paragraphs"]) == len(rhyming)
    ]
    for row in rows:
        text = row["paragraphs"]
        row["paragraphs"] = f"{text[:10]}流{text[11:-2]}樓。"
    run(tmp_path, rows, near_duplicate=1.0, leak_overlap=1.0)
    parts = read(tmp_path / "out")
    named = [row["prompt"].endswith(" 押尤韵") for row in parts["train"]]
    assert len(named) > 300 and 0.4 < sum(named) / len(named) < 0.6
    assert not any("押" in row["prompt"] for row in parts["valid"] + parts["test"])


def test_the_result_does_not_depend_on_the_order_of_reading(tmp_path, monkeypatch):
    rows = records()
    run(tmp_path, rows, "a")
    random.Random(1).shuffle(rows)
    monkeypatch.setattr("shenhong.corpus.read.BATCH", 100)
    monkeypatch.setattr(stage, "_SORTED_AT_ONCE", 20_000)  # several ranges of ids
    run(tmp_path, rows, "b")
    assert read(tmp_path / "a") == read(tmp_path / "b")


def test_what_is_held_out_is_not_learnt_by_heart(tmp_path):
    rows = records()
    report = run(tmp_path, rows)
    held = [r for name in ("valid", "test") for r in read(tmp_path / "out")[name]]
    # A training poem that quotes half of a held-out one must go; with another id it is in training.
    quoted = [
        {**rows[0], "id": f"quote{n}", "paragraphs": r["text"][:24] + poem(random.Random(n), 5, 4)}
        for n, r in enumerate(held)
        if r["form"] == "五律"
    ]
    assert len(quoted) > 5
    again = run(tmp_path, rows + quoted, "again")
    train = {r["id"] for r in read(tmp_path / "again")["train"]}
    assert not any(row["id"] in train for row in quoted)
    steps = {s["step"]: s for s in again["steps"]}
    assert steps["leaks"]["dropped"]["known from a held-out record"] >= len(quoted) - 3
    assert report["splits"]["train"]["records"] > 700


def test_clean_text_is_no_cause_for_warnings(tmp_path):
    lines: list[str] = []
    rng = random.Random(2)
    words = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(2000)]
    rows = [{"id": str(n), "text": " ".join(rng.choices(words, k=60))} for n in range(300)]
    report = run(tmp_path, rows, log=lines.append, kind="text")
    assert lines[0].startswith("files: 1 .jsonl") and not [s for s in lines if "WARNING" in s]
    assert {s["step"] for s in report["steps"] if s["changed_nothing"]} >= {
        "rules",
        "exact duplicates",
    }
    assert read(tmp_path / "out")["train"][0]["prompt"] == ""
    assert set(read(tmp_path / "out")["train"][0]) == {"id", "prompt", "text"}


def test_most_of_the_text_gone_is_a_warning(tmp_path):
    lines: list[str] = []
    rows = [{"id": str(n), "text": "short" if n % 3 else f"{n} " * 40} for n in range(300)]
    with pytest.raises(DataError, match="nothing is left"):
        run(tmp_path, rows, log=lines.append, kind="text", held_out=0.001)
    (warning,) = [line for line in lines if "WARNING" in line]
    assert warning.startswith("WARNING: rules dropped most of the text")


def test_text_keeps_its_script_unless_the_recipe_asks(tmp_path):
    rng = random.Random(4)
    rows = [
        {"id": str(n), "text": "".join(rng.choices(CHARACTERS, k=80)) + "龍門飛甲"}
        for n in range(300)
    ]
    report = run(tmp_path, rows, kind="text")
    assert all(
        "龍門飛甲" in row["text"] for part in read(tmp_path / "out").values() for row in part
    )
    assert "simplified" not in report["steps"][0]["what"]
    report = run(tmp_path, rows, kind="text", simplify=True)
    assert all(
        "龙门飞甲" in row["text"] for part in read(tmp_path / "out").values() for row in part
    )
    assert "simplified" in report["steps"][0]["what"]


def test_files_of_one_name_in_two_folders(tmp_path):
    rng = random.Random(5)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(
            tmp_path / folder / "a.jsonl",
            [{"text": " ".join(rng.choices("abcdefgh", k=200))} for _ in range(200)],
        )
    run(tmp_path, [], kind="text", paths=["one", "two"])
    assert {row["id"][:3] for row in read(tmp_path / "out")["train"]} == {"one", "two"}


def test_ids_that_repeat_give_way_to_file_and_line(tmp_path):
    """Where the recipe names the field, it is an error: that is its word that the field names records."""
    rows = records(300)
    repeated = [*rows, {**rows[3], "paragraphs": poem(random.Random(9), 7, 8)}]
    report = run(tmp_path, repeated)
    ids = [row["id"] for part in read(tmp_path / "out").values() for row in part]
    assert len(ids) == len(set(ids)) and all(":" in name for name in ids)
    assert report["settings"]["id_field"] == ""
    named = [{**row, "key": row["id"]} for row in repeated]
    with pytest.raises(DataError, match="two records have the id 'p00003'"):
        run(tmp_path, named, id_field="key")


def test_faults_have_names(tmp_path):
    rows = records(300)
    with pytest.raises(
        DataError, match=r"none of the 1 records .* passed .*: 1 not of a regulated"
    ):
        run(tmp_path, [{**rows[0], "paragraphs": "散文"}])
    with pytest.raises(DataError, match=r"nothing is left for (valid|test)\.parquet"):
        run(tmp_path, rows[:5], held_out=0.001)


def test_a_full_disk_is_an_error_with_a_name(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left on device"):
        run(tmp_path, records(50))
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_settings_refuse_what_is_unknown():
    with pytest.raises(ValueError, match="pathz"):
        CorpusSettings(paths=["a"], pathz=["b"])


def test_one_short_text_is_enough_to_measure_on(tmp_path):
    lines = [f"line {n}: {' '.join(str(n * k) for k in range(3, 12))}\n" for n in range(60)]
    (tmp_path / "a.txt").write_text("".join(lines))
    text = domain("text")
    chosen = text.Settings(paths=["a.txt"], near_duplicate=1, leak_overlap=1)
    report = refine(chosen, text, tmp_path, tmp_path / "out", 1, lambda line: None)
    assert min(part["records"] for part in report["splits"].values()) > 0
