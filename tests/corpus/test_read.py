import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong.corpus.read import read
from shenhong.corpus.settings import CorpusSettings
from shenhong.errors import DataError


def rows(base, *paths, extra=(), **more):
    found = []
    for batch in read(CorpusSettings(paths=list(paths), **more), base, extra):
        assert len({len(column) for column in batch.values()}) == 1
        found += list(zip(*batch.values(), strict=True))
    return found


def test_the_three_formats_give_the_same_records(tmp_path):
    records = [{"id": f"r{i}", "text": f"text {i} 字", "title": "t"} for i in range(20_000)]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=3000)
    expected = [(r["id"], r["text"], "t") for r in records]
    assert rows(tmp_path, "a.jsonl", extra=("title",)) == expected
    assert rows(tmp_path, "a.parquet", extra=("title",)) == expected  # in the file's order


def test_folders_and_globs(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "deep" / "b.txt").write_text("two\n")
    (tmp_path / "other.bin").write_text("x")
    assert {text for _, text in rows(tmp_path, ".")} == {"one\n", "two\n"}
    assert {text for _, text in rows(tmp_path, "*.txt")} == {"one\n"}
    assert len(rows(tmp_path, "**/*.txt", "a.txt")) == 2  # each file once


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=200))
@settings(max_examples=30, deadline=None)
def test_plain_text_is_cut_but_nothing_is_lost(tmp_path_factory, lines):
    text = "\n".join(lines) + "\n\n" + "字" * 70_000 + "\n" + "x" * 9_000
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode("utf-8"))
    found = rows(path.parent, "a.txt")
    assert "".join(part for _, part in found).rstrip() == text.removeprefix("\ufeff").rstrip()
    assert len({name for name, _ in found}) == len(found)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\n \n", "holds no text"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: byte 11 is not UTF-8"),
        ("a.txt", b"one\ntwo \xe4\xb8\n", r"line 2: byte 9 of the file is not UTF-8"),
        ("a.txt", b"x" * 65_535 + b"\xe4\xb8", r"line 1: byte 65536 of the file is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', "line 3: field 'text' holds no text"),
        ("a.jsonl", b'{"text": null}\n', "line 1: field 'text' holds no text"),
        ("a.jsonl", b'["text"]\n', "line 1: field 'text' holds no text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: half of a surrogate"),
        ("a.parquet", b"PAR1 no parquet file PAR1", "is damaged"),
        ("a.csv", b"text\n", "cannot read"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        rows(tmp_path, name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_bad_parquet_and_missing_files(tmp_path):
    with pytest.raises(DataError, match=r"no corpus file at .*nowhere\.jsonl"):
        rows(tmp_path, "nowhere.jsonl")
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["x", None]}), tmp_path / "null.parquet")
    with pytest.raises(DataError, match=r"null\.parquet, row 2: field 'text'"):
        rows(tmp_path, "null.parquet")
    with pytest.raises(DataError, match=r"no field 'body' \(it has id, text\)"):
        rows(tmp_path, "null.parquet", text_field="body")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="holds no records"):
        rows(tmp_path, "none.parquet")
    whole = (tmp_path / "null.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is damaged"):
        rows(tmp_path, "cut.parquet")


def test_memory_is_one_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("shenhong.corpus.read.BATCH", 64)
    with open(tmp_path / "a.txt", "w") as file:
        for line in range(200_000):
            file.write(f"line {line} of a long file, which is read a piece at a time\n\n")
    tracemalloc.start()
    count = sum(len(batch["text"]) for batch in read(CorpusSettings(paths=["a.txt"]), tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 5_000 and peak < 2e6
