"""Parquet: the text of a row stands in the column `--text-key`."""

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.formats.base import Format, Record, Skip, decoded
from based_megatron.errors import DataError

BATCH_ROWS = 1024


def read_rows(raw: BinaryIO, name: str, config: PrepConfig) -> Iterator[Record]:
    """One record for each row. Raises DataError if there is no column of that name."""
    parquet, text_key = pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True), config.text_key
    columns = parquet.schema_arrow.names
    if text_key not in columns:
        raise DataError(f"{name} has no column {text_key!r}, only {', '.join(columns)}: set --text-key")
    first_row = 1
    for group in range(parquet.num_row_groups):
        yield from _rows_of_group(parquet, group, first_row, text_key)
        first_row += parquet.metadata.row_group(group).num_rows


def _rows_of_group(parquet: pyarrow.parquet.ParquetFile, group: int, first_row: int, text_key: str) -> Iterator[Record]:
    """The rows of one row group, up to damage: what follows on a damaged page is found again at the next row group."""
    row, end = first_row, first_row + parquet.metadata.row_group(group).num_rows
    try:
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=[text_key]):
            # As bytes: one row that is not UTF-8 must not make its whole batch unreadable.
            for value in batch.column(0).cast(pyarrow.large_binary()):
                data = value.as_py()
                yield row, Skip("malformed", f"no {text_key!r} in this row") if data is None else decoded(data)
                row += 1
    except (OSError, pyarrow.ArrowException) as error:
        yield row, Skip("damaged", f"{end - row:,} rows, up to the next row group, cannot be read: {error}", end - row)


PARQUET = Format((".parquet",), read_rows, (pyarrow.ArrowException,))
