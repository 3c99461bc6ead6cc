"""The corpus stage: raw records in, train/valid/test.parquet and report.json out.

    read -> normalise -> the domain's rules -> exact -> near -> split -> write

The texts pass through in batches and rest on disk between the steps; memory holds, for each record
that passed the rules, its id and 180 bytes (digest and band keys), and the shingles of those records
that have a near-duplicate candidate, and while writing the texts of one range of ids (96 MB). Measured
peaks: 140 MB of long documents 0.66 GB, the 311,855 poems 0.69 GB.

The result depends on the records, the settings and the seed, and not on the order of reading: records
are compared in the order of their ids and written sorted by id.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shenhong.corpus import dedup, shingles, split
from shenhong.corpus.progress import Progress
from shenhong.corpus.read import Columns, Reading
from shenhong.corpus.records import Kept, Record
from shenhong.corpus.report import Step
from shenhong.corpus.settings import CorpusSettings
from shenhong.errors import DataError
from shenhong.tokenizer.normalise import simplify, unify

_SORTED_AT_ONCE = 96 << 20  # bytes of text that are sorted in memory at a time

if TYPE_CHECKING:
    from shenhong.domains.base import Domain

Log = Callable[[str], None]


def refine(
    settings: CorpusSettings, domain: Domain, base: Path, out: Path, seed: int, log: Log
) -> dict:
    """Refine the corpus of `settings` (paths relative to `base`) into the folder `out`.

    Writes {train,valid,test}.parquet (columns id, prompt, text and those of the domain) and report.json, whose
    content is returned.
    Errors: DataError (a file is missing, empty or damaged, not every part has text); OSError (the disk is full).
    """
    out.mkdir(parents=True, exist_ok=True)
    stage = out / ".stage.parquet"
    try:
        return _refine(settings, domain, base, out, stage, seed, log)
    except _RepeatedIdError as error:
        if settings.id_field != CorpusSettings.model_fields["id_field"].default:
            raise  # the recipe's word is that this field names them
        log(f"two records have the id {error.id!r}: all are named by their file and line instead")
        unnamed = settings.model_copy(update={"id_field": ""})
        return _refine(unnamed, domain, base, out, stage, seed, log)
    finally:
        stage.unlink(missing_ok=True)


def _refine(
    settings: CorpusSettings,
    domain: Domain,
    base: Path,
    out: Path,
    stage: Path,
    seed: int,
    log: Log,
) -> dict:
    steps = {
        "normalise": Step(
            "normalise",
            "Unicode NFC, white space"
            + (", variants, simplified characters" if settings.simplify else ""),
            rewrites=True,
        ),
        "rules": Step(*domain.step, rewrites=domain.rewrites),
        "exact": Step("exact duplicates", "equal but for punctuation, spaces and letter case"),
        "near": Step(
            "near duplicates", f"Jaccard similarity of {settings.near_duplicate} and more"
        ),
        "split": Step(
            "leaks", f"training records that share {settings.leak_overlap} with a held-out one"
        ),
    }
    reading = Reading(settings, base, domain.fields, log)
    share = _share(settings, domain, base, reading.found.size, seed)
    if share.piece:
        log(f"few documents: held out in pieces of about {share.piece:,} characters")
    names, digests, keys = _stage(settings, domain, reading, stage, seed, share, steps)
    summaries = [steps[name].summary(log) for name in ("normalise", "rules")]
    if not len(names):
        raise DataError(
            f"none of the {reading.records:,} records of {', '.join(settings.paths)} passed the rules: "
            f"{steps['rules'].reasons()}; see the corpus settings"
        )
    rank = np.empty(len(names), np.int64)
    rank[pc.sort_indices(names).to_numpy()] = np.arange(len(names))
    _unique(names, rank)
    live = _exact(names, digests, rank, stage, steps["exact"])
    summaries.append(steps["exact"].summary(log))
    live = _near(settings, names, keys, rank, live, stage, steps["near"])
    summaries.append(steps["near"].summary(log))
    part = _split(settings, names, live, stage, seed, share, steps["split"], log)
    summaries.append(steps["split"].summary(log))
    written = _write(names, part, stage, out)
    empty = [f"{name}.parquet" for name, count in written.items() if not count["records"]]
    if empty:
        raise DataError(
            f"nothing is left for {' and '.join(empty)}: {live.sum()} records passed; "
            "add text or raise corpus.held_out"
        )
    report = {
        "settings": settings.model_dump(exclude={"paths"}),  # the recipe has them
        "seed": seed,
        "held_out": share._asdict(),
        "read": reading.summary(),
        "steps": summaries,
        "splits": written,
    }
    text = json.dumps(report, ensure_ascii=False, indent=1)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    log("; ".join(f"{name} {count['records']:,}" for name, count in written.items()))
    return report


def _share(
    settings: CorpusSettings, domain: Domain, base: Path, size: int, seed: int
) -> split.Share:
    """How much is held out; a corpus that may be small is read once for it."""
    if settings.held_out is not None:
        return split.Share(settings.held_out)
    if size >= split.SMALL:
        return split.share_of(split.SMALL, 0, size, domain.divisible)
    characters = records = 0
    tiny: list[tuple[str, str]] = []
    for batch in Reading(settings, base, domain.fields):
        records += len(batch["id"])
        characters += sum(map(len, batch["text"]))
        if characters < split.TINY:
            tiny += zip(batch["id"], batch["text"], strict=True)
        if characters >= split.SMALL:  # packed files hold more than their size
            break
    share = split.share_of(characters, records, size, domain.divisible)
    if characters >= split.TINY:
        return share
    names = [name for record in tiny for name in split.names_of_pieces(*record, share)]
    return split.enough(share, names, seed)


def _in_pieces(batch: Columns, seed: int, share: split.Share) -> Columns:
    names, texts, rows = split.in_pieces(batch["id"], batch["text"], seed, share)
    others = {name: [column[row] for row in rows] for name, column in batch.items()}
    return {**others, "id": names, "text": texts}


def _stage(
    settings: CorpusSettings,
    domain: Domain,
    reading: Reading,
    stage: Path,
    seed: int,
    share: split.Share,
    steps: dict[str, Step],
) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Read, normalise, apply the rules; write what passes. Returns ids, digests [N], band keys [N, 21]."""
    columns = ["id", "prompt", "text", *domain.columns]
    schema = pa.schema([(name, pa.string()) for name in columns])
    ids: list[pa.Array] = []
    digests: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    with pq.ParquetWriter(stage, schema, compression="zstd", write_statistics=False) as writer:
        for batch in reading:
            if share.piece:
                batch = _in_pieces(batch, seed, share)
            originals = _normalise(batch, domain, settings, steps["normalise"])
            with steps["rules"] as step:
                step.records += len(batch["id"])
                passed = _kept(batch, originals, domain, settings, seed, share, step)
            if not passed["id"]:
                continue
            with steps["exact"]:
                digests.append(shingles.digests(passed["text"]))
            with steps["near"]:
                keys.append(dedup.band_keys(*shingles.shingles(passed["text"])))
            ids.append(pa.array(passed["id"], pa.string()))
            writer.write_table(pa.table(passed, schema))
    if not ids:
        return pa.array([], pa.string()), np.empty(0, np.uint64), np.empty((0, 0))
    return pa.concat_arrays(ids), np.concatenate(digests), np.concatenate(keys)


def _normalise(batch: Columns, domain: Domain, settings: CorpusSettings, step: Step) -> list[str]:
    """Normalises the batch in place; returns the texts before simplification, equally long."""
    with step:
        step.records += len(batch["id"])
        originals = []
        for row, raw in enumerate(batch["text"]):
            original = unify(raw)
            text = simplify(original) if settings.simplify else original
            originals.append(original)
            batch["text"][row] = text
            if text != raw:
                step.change(batch["id"][row], raw, text)
        for field in domain.fields:
            if settings.simplify:
                batch[field] = [simplify(unify(value)) for value in batch[field]]
    return originals


def _kept(
    batch: Columns,
    originals: list[str],
    domain: Domain,
    settings: CorpusSettings,
    seed: int,
    share: split.Share,
    step: Step,
) -> Columns:
    """The records that the domain keeps, with its columns."""
    passed: Columns = {name: [] for name in ("id", "prompt", "text", *domain.columns)}
    ids = batch["id"]
    held_out = (split.parts(ids, seed, share.of_all) != split.TRAIN).tolist()
    for row, (name, text, original) in enumerate(zip(ids, batch["text"], originals, strict=True)):
        fields = {field: batch[field][row] for field in domain.fields}
        kept = domain.keep(Record(name, text, original, fields, held_out[row], seed), settings)
        if not isinstance(kept, Kept):
            step.drop(kept, name, text)
            continue
        if domain.rewrites and kept.text != text.replace("\n", ""):
            step.change(name, text, kept.text)
        if kept.columns.keys() != set(domain.columns):
            raise DataError(
                f"the domain {domain.name} gave {name!r} the columns {sorted(kept.columns)}; it declares {sorted(domain.columns)}"
            )
        if not all(
            isinstance(value, str) for value in (kept.text, kept.prompt, *kept.columns.values())
        ):
            raise DataError(f"the domain {domain.name} gave {name!r} a value that is not text")
        row_of = {"id": name, "prompt": kept.prompt, "text": kept.text, **kept.columns}
        for column, values in passed.items():
            values.append(row_of[column])
    return passed


class _RepeatedIdError(DataError):
    def __init__(self, id: str) -> None:
        super().__init__(
            f'two records have the id {id!r}; make ids unique, or set corpus.id_field to "" to name records by file and line'
        )
        self.id = id


def _unique(names: pa.Array, rank: np.ndarray) -> None:
    """Error: _RepeatedIdError when an id occurs twice."""
    if pc.count_distinct(names).as_py() != len(names):
        ordered = names.take(pa.array(np.argsort(rank)))
        repeated = pc.equal(ordered.slice(1), ordered.slice(0, len(ordered) - 1))
        name = ordered[pc.index(repeated, True).as_py()]
        raise _RepeatedIdError(name.as_py().partition("#")[0])


def _exact(
    names: pa.Array, digests: np.ndarray, rank: np.ndarray, stage: Path, step: Step
) -> np.ndarray:
    """Marks [N] the records that stay."""
    with step:
        repeated = dedup.exact(digests, rank)
        _report(step, "the same as another", names, repeated, stage, np.ones(len(names), bool))
    return repeated < 0


def _near(
    settings: CorpusSettings,
    names: pa.Array,
    keys: np.ndarray,
    rank: np.ndarray,
    live: np.ndarray,
    stage: Path,
    step: Step,
) -> np.ndarray:
    with step:
        if settings.near_duplicate >= 1:
            step.records = int(live.sum())
            return live
        repeated, verified = dedup.near(
            keys, rank, live, settings.near_duplicate, lambda records: _texts(stage, records)
        )
        step.notes["pairs_verified"] = verified
        _report(step, "almost the same as another", names, repeated, stage, live)
    return live & (repeated < 0)


def _split(
    settings: CorpusSettings,
    names: pa.Array,
    live: np.ndarray,
    stage: Path,
    seed: int,
    share: split.Share,
    step: Step,
    log: Log,
) -> np.ndarray:
    """The part of each record [N]: TRAIN, VALID, TEST, or -1 where it is left out."""
    with step:
        part = np.where(live, split.parts(names.to_pylist(), seed, share.of_all), -1)
        held = np.flatnonzero(part > split.TRAIN)
        step.records = int((part == split.TRAIN).sum())
        leaked = np.full(len(names), -1)
        if len(held):
            index = split.HeldOut(_texts(stage, held))
            progress = Progress(log, "leaks")
            for start, batch in _batches(stage):
                rows = np.flatnonzero(part[start : start + batch.num_rows] == split.TRAIN)
                if len(rows):
                    texts = batch.column("text").take(pa.array(rows)).to_pylist()
                    overlap, whose = index.overlaps(texts)
                    bad = overlap >= settings.leak_overlap
                    leaked[start + rows[bad]] = held[whose[bad]]
                done = start + batch.num_rows
                progress.at(done / len(names), done)
        _report(step, "known from a held-out record", names, leaked, stage, part == split.TRAIN)
        return np.where(leaked >= 0, -1, part)


def _report(
    step: Step, reason: str, names: pa.Array, of: np.ndarray, stage: Path, among: np.ndarray
) -> None:
    """Counts the records whose `of` [N] names another record, and shows the first few of them."""
    gone = np.flatnonzero(of >= 0)
    step.records = int(among.sum())
    shown = gone[:3]
    needed = np.unique(np.concatenate([shown, of[shown]])).astype(np.int64)
    texts = dict(zip(needed.tolist(), _texts(stage, needed), strict=True))
    for record in shown.tolist():
        other = int(of[record])
        step.drop(
            reason,
            names[record].as_py(),
            texts[record],
            other_id=names[other].as_py(),
            other_text=texts[other][:120],
        )
    if len(gone) > len(shown):
        step.dropped[reason] += len(gone) - len(shown)


def _batches(
    stage: Path, columns: tuple[str, ...] | None = ("text",)
) -> Iterator[tuple[int, pa.Table]]:
    """The stage file in its order: the number of the first record, and the records of one batch."""
    start = 0
    with pq.ParquetFile(stage) as file:
        # iter_batches would read ahead through the whole file; a row group is one batch.
        for group in range(file.num_row_groups):
            batch = file.read_row_group(group, columns, use_threads=False)
            yield start, batch
            start += batch.num_rows


def _texts(stage: Path, records: np.ndarray) -> list[str]:
    """The texts of the records with these ascending numbers."""
    found: list[str] = []
    if not len(records):
        return found
    for start, batch in _batches(stage):
        low, high = np.searchsorted(records, [start, start + batch.num_rows])
        if low < high:
            found += batch.column("text").take(pa.array(records[low:high] - start)).to_pylist()
    return found


def _write(names: pa.Array, part: np.ndarray, stage: Path, out: Path) -> dict[str, dict[str, int]]:
    """Writes the three parts sorted by id, by ranges of ids so that a large corpus fits in memory."""
    from shenhong.corpus.frames import daft

    metadata = pq.read_metadata(stage)
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    ranges = -(-size // _SORTED_AT_ONCE)
    ordered = names.take(pc.sort_indices(names))
    bounds = [ordered[len(ordered) * i // ranges].as_py() for i in range(1, ranges)]
    schema = pq.read_schema(stage)
    written = {name: {"records": 0, "characters": 0} for name in split.NAMES}
    with contextlib.ExitStack() as files:
        writers = [
            files.enter_context(
                pq.ParquetWriter(out / f"{name}.parquet", schema, compression="zstd")
            )
            for name in split.NAMES
        ]
        for low, high in zip([None, *bounds], [*bounds, None], strict=True):
            kept = []
            for start, batch in _batches(stage, None):
                mask = part[start : start + batch.num_rows] >= 0
                own = batch.append_column("part", pa.array(part[start : start + batch.num_rows]))
                if low is not None:
                    mask &= pc.greater_equal(batch["id"], low).to_numpy()
                if high is not None:
                    mask &= pc.less(batch["id"], high).to_numpy()
                kept.append(own.filter(pa.array(mask)))
            table = daft.from_arrow(pa.concat_tables(kept)).sort("id").to_arrow()
            del kept
            for number, name in enumerate(split.NAMES):
                own = (
                    table.filter(pc.equal(table["part"], number)).select(schema.names).cast(schema)
                )
                writers[number].write_table(own)
                written[name]["records"] += own.num_rows
                written[name]["characters"] += pc.sum(pc.utf8_length(own["text"])).as_py() or 0
    return written
