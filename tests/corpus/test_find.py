import os

import pytest

from shenhong.corpus.find import find
from shenhong.corpus.settings import CorpusSettings
from shenhong.errors import DataError


def found(base, *paths):
    return find(CorpusSettings(paths=list(paths)), base)


def names(base, *paths):
    return [file.name for file in found(base, *paths).files]


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("some text\n")


def test_folders_patterns_and_files(tmp_path):
    fill(tmp_path, "a.txt", "deep/b.txt", "deep/er/c.md")
    assert names(tmp_path, ".") == ["a.txt", "deep/b.txt", "deep/er/c.md"]
    assert names(tmp_path, "*.txt") == ["a.txt"]
    assert names(tmp_path, "deep/**") == ["b.txt", "er/c.md"]
    assert names(tmp_path, "**/*.txt", "a.txt") == ["a.txt", "deep/b.txt"]  # each once
    assert names(tmp_path, "deep/b.txt") == ["b.txt"]


def test_files_of_one_name_are_told_apart(tmp_path):
    fill(tmp_path, "one/a.txt", "two/a.txt", "two/b.txt")
    assert names(tmp_path, ".") == ["one/a.txt", "two/a.txt", "two/b.txt"]
    assert names(tmp_path, "one", "two") == ["one/a.txt", "two/a.txt", "two/b.txt"]
    assert names(tmp_path, "one/a.txt", "two/*.txt") == ["one/a.txt", "two/a.txt", "two/b.txt"]


@pytest.mark.parametrize("folder", ["my [x] folder", "{a,b}", "what?", "a*b", "[!a]"])
def test_what_exists_is_meant_literally(folder, tmp_path):
    fill(tmp_path, f"{folder}/a [1].txt", f"{folder}/b.txt")
    assert names(tmp_path / folder, "*.txt") == ["a [1].txt", "b.txt"]
    assert names(tmp_path, f"{folder}/a [1].txt") == ["a [1].txt"]
    assert names(tmp_path, folder) == names(tmp_path, f"{folder}/*") == ["a [1].txt", "b.txt"]


def test_a_link_is_of_the_kind_its_name_says(tmp_path):
    """As the hub's cache lies on the disk: names are links to blobs without an ending."""
    fill(tmp_path, "blobs/0a1b2c")
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "train.txt").symlink_to("../blobs/0a1b2c")
    (tmp_path / "snapshots" / "gone.txt").symlink_to("../blobs/gone")
    (tmp_path / "linked").symlink_to("snapshots")
    (tmp_path / "snapshots" / "round").symlink_to("..")
    for path in ("snapshots/train.txt", "snapshots/*.txt", "linked/*.txt"):
        assert names(tmp_path, path) == ["train.txt"]
    assert names(tmp_path, "snapshots") == ["train.txt"]
    assert ("gone.txt", "that are links to nothing") in found(tmp_path, "snapshots").passed


def test_pipes_and_devices_are_passed_over(tmp_path):
    fill(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    assert names(tmp_path, ".") == names(tmp_path, "*.txt") == ["a.txt"]
    assert "2 .txt that are no files" in found(tmp_path, ".").summary()
    with pytest.raises(DataError, match="no corpus file"):
        found(tmp_path, "b.txt")


def test_every_file_is_accounted_for(tmp_path):
    fill(
        tmp_path, "a.md", "b.html", "c.html", "d.pdf", "e.md.gz", ".hidden/f.md", "LICENSE", "g.rst"
    )
    (tmp_path / "empty.txt").touch()
    here = found(tmp_path, ".")
    assert [file.name for file in here.files] == ["a.md", "e.md.gz", "g.rst"]
    said = here.summary()
    for part in (
        "1 .md, 1 .md.gz, 1 .rst",
        "2 .html",
        "1 .pdf",
        "hidden",
        "1 .txt that are empty",
        ".parquet",
    ):
        assert part in said, said
    assert len(here.passed) == 6
    here = found(tmp_path, "**/*.md")
    assert [file.name for file in here.files] == ["a.md"]
    assert here.passed == [(".hidden/f.md", "hidden")]
    assert names(tmp_path, ".hidden/*.md") == names(tmp_path, ".hidden") == ["f.md"]


def test_a_readme_beside_data_is_not_text_to_learn(tmp_path):
    fill(tmp_path, "README.md", "data/a.jsonl", "notes.md")
    here = found(tmp_path, ".")
    assert [file.name for file in here.files] == ["data/a.jsonl", "notes.md"]
    assert here.passed == [("README.md", "about the data beside them")]
    (tmp_path / "data" / "a.jsonl").unlink()
    assert names(tmp_path, ".") == ["README.md", "notes.md"]
    assert names(tmp_path, "README.md") == ["README.md"]


def test_what_cannot_be_found_or_read(tmp_path):
    fill(tmp_path, "web/a.html", "web/b.html", "a.csv")
    (tmp_path / "a.txt").touch()
    for path, says in {
        "nowhere.jsonl": r"no corpus file at .*nowhere\.jsonl",
        "no*.jsonl": r"no corpus file at .*no\*\.jsonl",
        "a**b": "is no pattern",
        "web": r"no corpus file at .*web: there are 2 \.html of another kind \(kinds that are read: .*\.jsonl",
        "a.csv": r"cannot read .*a\.csv: kinds that are read are .*\.parquet",
        "a.txt": "a.txt is empty",
        "\0": "no corpus file",
    }.items():
        with pytest.raises(DataError, match=says) as caught:
            found(tmp_path, path)
        assert "\n" not in str(caught.value)


def test_a_name_whose_bytes_are_no_text(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    with open(path, "w") as file:
        file.write("text")
    fill(tmp_path, "a.txt")
    here = found(tmp_path, ".")
    assert [file.name for file in here.files] == ["a.txt"]
    assert here.passed == [("caf\\xe9.txt", "whose names are not UTF-8")]
