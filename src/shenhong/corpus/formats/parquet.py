"""Parquet: the columns that are wanted, a few hundred rows at a time.

A small file may hold one long text for each of many rows, so what is unpacked at a time is what bounds the memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from shenhong.corpus.formats.base import LONGEST, Row, Source

ENDINGS = (".parquet",)
UNIT = "row"
TABULAR = True
PACKABLE = False  # its parts are compressed already, and found from its end

_ROWS = 256


def rows(source: Source, wanted: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(source.stream) as file:
        present = file.schema_arrow.names
        columns = [name for name in present if name in wanted or name in _structs(wanted)]
        if not {wanted[0], *_structs(wanted[:1])} & set(columns):
            columns = present
        number, total = 0, file.metadata.num_rows
        # One group of rows after the other: iter_batches would read ahead through the whole file.
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(_ROWS, [group], columns, use_threads=False):
                names = batch.schema.names
                values = zip(*(column.to_pylist() for column in batch.columns), strict=True)
                for place, row in enumerate(values, number + 1):
                    if any(isinstance(v, str | bytes) and len(v) > LONGEST for v in row):
                        yield Row(place, {}, f"is longer than {LONGEST >> 20} MB")
                    else:
                        yield Row(place, dict(zip(names, row, strict=True)))
                number += batch.num_rows
                source.share = number / max(total, 1)


def _structs(names: tuple[str, ...]) -> set[str]:
    """The columns whose fields are meant by names such as "translation.en"."""
    return {name.partition(".")[0] for name in names if "." in name}
