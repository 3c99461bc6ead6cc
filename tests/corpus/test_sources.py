from shenhong.corpus import sources
from shenhong.corpus.settings import CorpusSettings


def test_a_source_may_be_a_link_and_have_any_name(tmp_path):
    run = tmp_path / "my [x] folder" / "run"
    run.mkdir(parents=True)
    (tmp_path / "blob").write_text("text")
    (run.parent / "a {1}.txt").symlink_to("../blob")
    settings = CorpusSettings(paths=[str(run.parent / "*.txt")])
    recorded = sources.record(settings, run)
    assert list(recorded["sources"]) == ["../a {1}.txt"]
    assert sources.changed(recorded, settings, run) is None
    (run.parent / "b.txt").write_text("new")
    assert sources.changed(recorded, settings, run) == f"{run.parent / 'b.txt'} was added"
    (tmp_path / "blob").write_text("other")
    assert sources.changed(recorded, settings, run) == f"{tmp_path / 'blob'} was changed"


def test_files_of_kinds_that_a_run_did_not_know_are_not_new(tmp_path):
    """A run of 0.1.0 read text, JSON lines and parquet, and said nothing of it."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "a.txt").write_text("text")
    settings = CorpusSettings(paths=[str(tmp_path)])
    old = {"sources": sources.record(settings, run)["sources"]}
    for name in ("b.json", "c.txt.gz", "d.rst"):
        (tmp_path / name).write_text("text")
    assert sources.changed(old, settings, run) is None
    now = sources.record(settings, run)
    (tmp_path / "e.md.gz").write_text("text")
    assert sources.changed(now, settings, run) == f"{tmp_path / 'e.md.gz'} was added"
    assert sources.changed(old, settings, run) is None
