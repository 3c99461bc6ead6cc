"""Makes facts.jsonl.gz: conversations in which facts of the World Factbook are asked for and given as JSON.

    python data/assistant/build.py

Every table of a chapter ("Telephones - mobile cellular:" and its lines) becomes one conversation: a person quotes it, in
one of several wordings, and the assistant answers with its figures, each as a string without its year, and the year.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path

import pyarrow.parquet as pq

HERE = Path(__file__).parent
SOURCE = HERE.parent / "english" / "factbook.parquet"
OUT = HERE / "facts.jsonl.gz"
YEAR = re.compile(r"\s*\((?:(?:FY|FY/)?\d{2,4}/)?((?:19|20)\d\d)(?: est\.)?\)$")
LINE = re.compile(r"  ([a-z][^:]{0,60}): (\S.{0,60})$")
ASKED = (
    "Give these facts as JSON: {}",
    "Turn this into JSON.\n{}",
    "{}\n\nWhich figures does this name? Answer with one JSON object.",
    "Extract the figures of this note: {}",
    "JSON, please: {}",
    "Read the following and answer with a JSON object and nothing else.\n\n{}",
)
MOST = 5  # tables of one chapter


def tables(text: str):
    """(heading, [(name, figure)]) of a chapter's tables."""
    heading, lines = "", []
    for line in [*text.splitlines(), ""]:
        if found := LINE.match(line):
            lines.append(found.groups())
            continue
        if heading and 2 <= len(lines) <= 4:
            yield heading, lines
        heading, lines = (line[:-1], []) if re.fullmatch(r"[A-Z][^:]{2,60}:", line) else ("", [])


def conversation(
    place: str, heading: str, lines: list[tuple[str, str]], wording: str
) -> list[dict]:
    """One question and its answer."""
    facts: dict[str, object] = {"place": place, "about": heading}
    year = None
    for name, figure in lines:
        if found := YEAR.search(figure):
            figure, year = figure[: found.start()], int(found[1])
        facts[name] = figure
    if year is not None:
        facts["year"] = year
    note = f"{heading} of {place}: " + "; ".join(f"{name}: {figure}" for name, figure in lines)
    return [
        {"role": "user", "content": wording.format(note)},
        {"role": "assistant", "content": json.dumps(facts, ensure_ascii=False)},
    ]


def main() -> None:
    records = []
    for chapter in pq.read_table(SOURCE).to_pylist():
        place = chapter["title"].partition(":")[0]
        if "\ufffd" in chapter["text"]:
            continue
        for number, (heading, lines) in enumerate(list(tables(chapter["text"]))[:MOST], 1):
            name = f"{chapter['id']}/{number}"
            wording = ASKED[hashlib.sha256(name.encode()).digest()[0] % len(ASKED)]
            records.append({"id": name, "messages": conversation(place, heading, lines, wording)})
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    data = gzip.compress("".join(lines).encode(), 9, mtime=0)
    OUT.write_bytes(data)
    print(f"{OUT.name}: {len(records):,} conversations, {len(data) / 1000:.0f} KB")


if __name__ == "__main__":
    main()
