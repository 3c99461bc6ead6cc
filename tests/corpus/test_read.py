import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shenhong.corpus.read import Reading
from shenhong.corpus.settings import CorpusSettings
from shenhong.errors import DataError


def rows(base, *paths, extra=(), **more):
    found = []
    for batch in Reading(CorpusSettings(paths=list(paths), **more), base, extra):
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


def test_records_without_an_id_are_named_by_file_and_place(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b", "id": 7}\n')
    found = [name for name, _ in rows(tmp_path, ".")]
    assert found == ["one/a.jsonl:1", "7", "two/a.jsonl:1", "7"]
    found = [name for name, _ in rows(tmp_path, "one/a.jsonl", "two/a.jsonl", id_field="")]
    assert found == [f"{folder}/a.jsonl:{line}" for folder in ("one", "two") for line in (1, 3)]


def test_texts_of_every_shape(tmp_path):
    records = [
        {"text": "a"},
        {"text": None},
        {"text": ["a", "b"]},
        {"text": {"en": "c"}, "text.en": "d"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert [t for _, t in rows(tmp_path, "a.jsonl", max_unreadable=0.5)] == ["a", "", "a\nb"]
    found = rows(tmp_path, "a.jsonl", max_unreadable=1, text_field="text.en")
    assert [text for _, text in found] == ["d"]
    columns = {
        "view": pa.array(["a", None], pa.string_view()),
        "listed": [["a", "b"], None],
        "struct": [{"en": "c"}, None],
        "raw": [b"d", None],
    }
    pq.write_table(pa.table(columns), tmp_path / "[b].parquet")
    for field, text in {"view": "a", "listed": "a\nb", "raw": "d"}.items():
        assert [t for _, t in rows(tmp_path, "[b].parquet", text_field=field)] == [text, ""]
    assert rows(tmp_path, "[b].parquet", text_field="struct.en", max_unreadable=0.5) == [
        ("[b].parquet:1", "c")
    ]


def test_a_few_bad_records_are_skipped_and_named(tmp_path):
    lines = [json.dumps({"text": f"text {n}"}) for n in range(200)]
    for number in (3, 50, 51, 52, 180):
        lines[number] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    said = []
    reading = Reading(CorpusSettings(paths=["a.jsonl"]), tmp_path, say=said.append)
    assert sum(len(batch["id"]) for batch in reading) == 195
    (warning,) = [line for line in said if line.startswith("WARNING")]
    assert warning.startswith("WARNING: skipped 5 of 200 records")
    for number in (4, 51, 52):
        assert f"a.jsonl, line {number}: is not JSON" in warning
    assert "line 53" not in warning
    assert reading.summary()["unreadable"] == 5 and len(reading.summary()["faults"]) == 3
    with pytest.raises(
        DataError, match=r"^5 of 200 records .*max_unreadable 0\.01 .*line 4: .*line 51: .*line 52:"
    ):
        rows(tmp_path, "a.jsonl", max_unreadable=0.01)


def test_one_damaged_file_among_many_is_read_up_to_there_and_named(tmp_path):
    """Not where it is named by itself, and not where it is one of a few."""
    for number in range(30):
        (tmp_path / f"{number:02}.jsonl.gz").write_bytes(gzip.compress(b'{"text": "whole"}\n'))
    cut = gzip.compress(b'{"text": "early"}\n{\n' + b'{"text": "early"}\n' * 8)[:-9]
    (tmp_path / "05.jsonl.gz").write_bytes(cut)
    said = []
    reading = Reading(CorpusSettings(paths=["."]), tmp_path, say=said.append)
    texts = [text for batch in reading for text in batch["text"]]
    assert texts.count("whole") == 29 and len(texts) <= 29 + 9
    assert [line for line in said if "1 of 30 files are read up to where they are damaged" in line]
    assert "05.jsonl.gz is damaged" in reading.summary()["damaged"][0]
    assert reading.summary()["unreadable"] == 1  # what was wrong before the damage counts as well
    with pytest.raises(DataError, match=r"05\.jsonl\.gz is damaged"):
        rows(tmp_path, "05.jsonl.gz", "06.jsonl.gz")
    with pytest.raises(DataError, match=r"05\.jsonl\.gz is damaged"):
        rows(tmp_path, "0[456].jsonl.gz")


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{\n')
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no parquet file PAR1")
    (tmp_path / "c.txt.gz").write_bytes(b"no gzip")
    (tmp_path / "d.jsonl").write_text('{"body": "b"}\n' * 300)
    (tmp_path / "e.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError) as caught:
        rows(tmp_path, ".")
    for part in (r"a.jsonl, line 2: is not JSON", "b.parquet is damaged", "c.txt.gz is damaged"):
        assert part in str(caught.value)
    assert "2 of 3 records" in str(caught.value) and "e.txt, line 1: byte 0xe9" in str(caught.value)
    assert "d.jsonl, line 1: there is no field 'text' (fields here: body)" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\n \n", "holds no text"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: byte 11 is not UTF-8"),
        ("a.txt", b"one\ntwo \xe4\xb8\n", r"line 2: byte 0xe4 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: is not JSON"),
        (
            "a.jsonl",
            b'{"title": "a", "body": "b", "url": 1}\n',
            r"line 1: there is no field 'text' \(fields here: title, body, url\); set corpus.text_field",
        ),
        ("a.jsonl", b'{"text": 5}\n', "line 1: field 'text' holds 5, which is no text"),
        ("a.jsonl", b'{"text": {"en": "b"}}\n', "set corpus.text_field to one of text.en"),
        ("a.jsonl", b'["text"]\n', "line 1: is JSON, but no record"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: half of a surrogate"),
        ("a.jsonl", b'{"text": "a", "id": "\\ud800"}\n', "line 1: half of a surrogate"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}]}\n',
            "line 1: field 'messages' holds a conversation",
        ),
        (
            "a.json",
            b'[{"text": [{"from": "human", "value": "a"}]}, {"text": [{"from": "gpt", "value": ""}]}]',
            "record 1: field 'text' holds a conversation",
        ),
        ("a.parquet", b"PAR1 no parquet file PAR1", "is damaged"),
        ("a.json", b'[{"text": "a"}, {"te', "is damaged"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        rows(tmp_path, name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_what_holds_no_text_in_a_folder_is_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "dataset_info.json").write_text('{"splits": {"train": 1}}')
    (tmp_path / "blank.txt").write_text("\n\n")
    said = []
    reading = Reading(CorpusSettings(paths=["."]), tmp_path, say=said.append)
    assert [batch["text"] for batch in reading] == [["a"]]
    assert said[-1] == "passed over besides: 1 .txt, 1 .json without a text in 'text'"
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"info.json, record 1: .* \(fields here: splits\)"):
        rows(tmp_path, ".")
    (tmp_path / "dataset_info.json").unlink()
    with pytest.raises(DataError, match=r"^no text in \."):
        rows(tmp_path, ".")


def test_bad_parquet(tmp_path):
    pq.write_table(pa.table({"id": ["a", "b"], "body": ["x", "y"]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"row 1: there is no field 'text' \(fields here: id, body\)"
    ):
        rows(tmp_path, "a.parquet")
    chat = [[{"role": "user", "content": "a"}]]
    pq.write_table(pa.table({"messages": chat}), tmp_path / "chat.parquet")
    with pytest.raises(DataError, match="field 'messages' holds a conversation"):
        rows(tmp_path, "chat.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="holds no text"):
        rows(tmp_path, "none.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is damaged"):
        rows(tmp_path, "cut.parquet")


def test_reading_gives_a_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr("shenhong.corpus.read.BATCH", 10)
    monkeypatch.setattr("shenhong.corpus.progress.EVERY", 0)
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n' * 100)
    said = []
    for _ in Reading(CorpusSettings(paths=["."]), tmp_path, say=said.append):
        pass
    assert said[0].startswith("files: 1 .jsonl (0.0 MB)")
    assert len(said) == 11 and said[-1].endswith("about 0 s left)")
    assert said[5].startswith("reading: 50 records, ") and "records/s, about" in said[5]


def test_memory_is_one_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("shenhong.corpus.read.BATCH", 64)
    with open(tmp_path / "a.txt", "w") as file:
        for line in range(200_000):
            file.write(f"line {line} of a long file, which is read a piece at a time\n\n")
    tracemalloc.start()
    count = sum(len(batch["text"]) for batch in Reading(CorpusSettings(paths=["a.txt"]), tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 5_000 and peak < 2e6
