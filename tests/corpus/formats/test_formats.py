import bz2
import gzip
import io
import json
import lzma
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong.corpus import formats
from shenhong.corpus.formats import format_of, listed, text
from shenhong.corpus.formats.base import Row, Source
from tests.growth import LINEAR, growth
from tests.test_extending import example


def rows(path, wanted=("text",)):
    with open(path, "rb") as file:
        return list(format_of(path.name).rows(Source(path, file), wanted))


def zstd(data):
    half = len(data) // 2  # two frames, as parallel packers write
    return b"".join(
        pa.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:])
    )


@pytest.mark.parametrize(
    ("ending", "pack"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".zst", zstd),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
    ],
)
def test_packed_files_give_what_is_in_them(ending, pack, tmp_path):
    records = [{"text": f"text {n} 字"} for n in range(3000)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    for name, data in (("a.jsonl", lines), ("a.json", json.dumps(records).encode())):
        path = tmp_path / (name + ending)
        path.write_bytes(pack(data))
        assert [row.fields for row in rows(path)] == records
    path = tmp_path / ("a.txt" + ending)
    path.write_bytes(pack(b"one\r\ntwo\n"))
    assert rows(path) == [Row(1, {"text": "one\r\ntwo\n"})]


def test_a_kind_is_what_the_name_ends_in():
    for name in ("A.MD", "a.json", "v1.2.jsonl.GZ", "b.parquet"):
        assert format_of(name), name
    for name in (
        "a.html",
        "a.pdf",
        "a.gz",
        "a.tar.gz",
        "a.parquet.gz",
        "README",
        "jsonl",
        "a.gz.zst",
    ):
        assert not format_of(name), name
    assert listed().startswith(".json, .jsonl, .ndjson, .parquet, .txt")
    assert listed().endswith("; all but .parquet also as .gz, .zst, .bz2, .xz")


def test_a_kind_of_file_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "srt.py").write_text(example("corpus/formats/srt.py"))
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    formats._by_ending.cache_clear()
    try:
        path = tmp_path / "film.srt"
        path.write_text(
            "1\n00:01 --> 00:03\nGood evening.\nWho is it?\n\n2\n00:04 --> 00:05\nMe.\n"
        )
        said = "Good evening.\nWho is it?\nMe.\n"
        assert rows(path, ("body",)) == [Row(1, {"body": said})]
        assert ".srt" in listed()
    finally:
        formats._by_ending.cache_clear()


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '\ufeff[\n {"text": "a"},\n {"text": "b"}\n]\n',
        '{"text": "a"}\n{"text": "b"}\n',
        '{\n "text": "a"\n}\n{\n "text": "b"}',
        '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}',
    ],
)
def test_the_ways_json_holds_records(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    assert rows(path) == [Row(1, {"text": "a"}), Row(2, {"text": "b"})]


def test_json_is_read_a_record_at_a_time(tmp_path):
    path = tmp_path / "a.json"
    with open(path, "w") as file:
        file.write("[" + ",".join(json.dumps({"text": "x" * 1000}) for _ in range(5000)) + "]")
    tracemalloc.start()
    with open(path, "rb") as file:
        count = sum(1 for _ in format_of("a.json").rows(Source(path, file), ("text",)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5000 and peak < 1e6


def test_bad_json_lines_are_faults_and_bad_lists_are_damage(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": \n{"text": "b"}\n')
    found = rows(tmp_path / "a.json")
    assert [row.fields for row in found] == [
        {"text": "a"},
        {},
        {"text": "b"},
    ] and "not JSON" in found[1].fault
    for content in (
        '[{"text": "a"}, {"te',
        '[{"text": "a"}',
        '[{"text": "a"} oh {"text": "b"}]',
        "hello",
    ):
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(ValueError):
            rows(tmp_path / "b.json")
    lines = ['{"text": "a"}', "oh", '["a"]', "[" * 100_000, "1" * 5000, '{"text": "b"}']
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    found = rows(tmp_path / "c.jsonl")
    assert [row.place for row in found if row.fault] == [2, 3, 4, 5]
    assert [row.fields for row in found if not row.fault] == [{"text": "a"}, {"text": "b"}]


def test_a_line_without_end_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr("shenhong.corpus.formats.jsonl.LONGEST", 1000)
    (tmp_path / "a.jsonl").write_text(
        '{"text": "' + "x" * 5000 + '"}\n{"text": "b"}\n' + "y" * 9999
    )
    found = rows(tmp_path / "a.jsonl")
    assert [bool(row.fault) for row in found] == [True, False, True]
    assert found[1] == Row(2, {"text": "b"})


def test_a_small_parquet_of_long_texts_is_unpacked_in_parts(tmp_path, monkeypatch):
    """One text, stored once and meant by every row, as its dictionary allows."""
    monkeypatch.setattr("shenhong.corpus.formats.parquet.LONGEST", 1 << 20)
    texts = pa.array(["x" * (1 << 18), "y" * (2 << 20)]).dictionary_encode()
    pq.write_table(
        pa.table({"text": texts.take(pa.array([0] * 4000 + [1]))}), tmp_path / "a.parquet"
    )
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    tracemalloc.start()
    with open(tmp_path / "a.parquet", "rb") as file:
        source = Source(tmp_path / "a.parquet", file)
        found = [bool(row.fault) for row in format_of("a.parquet").rows(source, ("text",))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [False] * 4000 + [True] and peak < 300 << 18


def test_parquet_of_every_kind_of_string(tmp_path):
    columns = {
        "view": pa.array(["a", None], pa.string_view()),
        "large": pa.array(["a", None], pa.large_string()),
        "listed": [["a", "b"], None],
        "struct": [{"en": "a", "de": "b"}, None],
        "coded": pa.array(["a", None]).dictionary_encode(),
        "raw": [b"a", None],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=1)
    assert rows(tmp_path / "a.parquet", ("view", "id")) == [
        Row(1, {"view": "a"}),
        Row(2, {"view": None}),
    ]
    assert rows(tmp_path / "a.parquet", ("struct.en",))[0].fields == {
        "struct": {"en": "a", "de": "b"}
    }
    assert set(rows(tmp_path / "a.parquet", ("text",))[0].fields) == set(
        columns
    )  # to say what is there


def test_parquet_is_read_a_batch_at_a_time(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [*map(str, range(60_000))], "text": ["x" * 500] * 60_000}), path)
    with open(path, "rb") as file:
        source = Source(path, file)
        shares = [source.share for _ in format_of("a.parquet").rows(source, ("text",))]
    assert shares[30_000] == pytest.approx(0.5, abs=0.1)


# ------------------------------------------------------------------------ plain text


def documents(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return rows(path)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=200))
@settings(max_examples=30, deadline=None)
def test_plain_text_is_cut_but_nothing_is_lost(tmp_path_factory, lines):
    content = "\n".join(lines) + "\n\n" + "字" * 70_000 + "\n" + "x" * 9_000
    found = documents(tmp_path_factory.mktemp("text") / "a.txt", content)
    texts = [row.fields["text"] for row in found]
    assert "".join(texts) == content.removeprefix("\ufeff")
    assert len({row.place for row in found}) == len(found)


def test_where_a_text_is_cut(tmp_path):
    path = tmp_path / "a.txt"
    paragraphs = ("word " * 100 + "\n\n") * 40  # 502 characters each
    assert {len(row.fields["text"]) for row in documents(path, paragraphs)} == {502 * 4}
    lines = ("word " * 100 + "\n") * 40
    assert [row.place for row in documents(path, lines)] == [1, 17, 33]
    sentences = "A sentence of some words. " * 4000
    found = documents(path, sentences)
    assert len(found) == 7 and all(row.fields["text"].endswith(". ") for row in found)
    assert found[1].place == f"1+{len(found[0].fields['text'])}"
    assert all(row.fields["text"].endswith("。") for row in documents(path, "白日依山尽。" * 9000))
    assert max(len(row.fields["text"]) for row in documents(path, "x" * 100_000)) == 16_000


def test_a_text_of_one_line_needs_no_memory(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("A sentence of some words. " * 400_000)
    tracemalloc.start()
    with open(path, "rb") as file:
        count = sum(1 for _ in text.rows(Source(path, file), ("text",)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 600 and peak < 1e6


@pytest.mark.parametrize("piece", [".", '"', ".”", ". ", "。"])
def test_marks_without_end_cost_no_more_than_letters(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_DOCUMENT", 15_000)  # so that much is looked through for an end

    def read(size):
        (tmp_path / "x.txt").write_text(piece * (size // len(piece)))
        return rows(tmp_path / "x.txt")

    assert growth(lambda size: text._end(piece * (size // len(piece)), 0), int, 2_050) < LINEAR
    assert "".join(row.fields["text"] for row in read(40_000)) == piece * (40_000 // len(piece))


def test_bytes_that_are_no_text_have_a_line(tmp_path):
    good = "good words\n\n" * 400
    found = documents(tmp_path / "a.txt", good.encode() + b"one\ntwo \xe4\xb8\n\n" + good.encode())
    (bad,) = [row for row in found if row.fault]
    assert bad.place == 802 and "0xe4 is not UTF-8" in bad.fault and len(found) > 4


def test_a_source_knows_how_far_it_was_read(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"".join(b"%d\n" % (n * n) for n in range(100_000))))
    with open(path, "rb") as file:
        source = Source(path, file)
        assert isinstance(source.stream, io.BufferedIOBase)
        shares = [source.share for _ in text.rows(source, ("text",))]
    assert shares == sorted(shares) and 0.2 < shares[len(shares) // 2] < 0.8 and shares[-1] == 1
