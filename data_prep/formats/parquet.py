"""Parquet: the text of a row stands in the column `--text-key`."""

import io
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.formats.base import Format, Record, Skip, Stretch, decoded
from based_megatron.errors import DataError

BATCH_ROWS = 1024
TEXT_TYPES = (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())


def check_column(raw: BinaryIO, name: str, config: PrepConfig) -> None:
    """Raise DataError unless there is a column of texts under `--text-key`."""
    schema = pyarrow.parquet.read_schema(raw)
    kind: pyarrow.DataType = pyarrow.struct(list(schema))
    for key in _path(schema, config.text_key):
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(key) < 0:
            only = ", ".join(schema.names)
            raise DataError(
                f"{name} has no column {config.text_key!r}, only {only}: set --text-key, or leave the file out"
            )
        kind = kind.field(key).type
    if (kind.value_type if pyarrow.types.is_dictionary(kind) else kind) not in TEXT_TYPES:
        raise DataError(
            f"the column {config.text_key!r} of {name} holds {kind} and no text: set --text-key, or leave the file out"
        )


def read_rows(raw: BinaryIO, name: str, config: PrepConfig) -> Iterator[Record]:
    """One record for each row."""
    parquet = pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True)
    yield from _rows_of_groups(parquet, range(parquet.num_row_groups), config.text_key)


def cut_at_row_groups(raw: BinaryIO, stretch_bytes: int) -> list[Stretch]:
    """Stretches of whole row groups; none of a file whose row groups do not lie one after another."""
    metadata = pyarrow.parquet.ParquetFile(raw).metadata
    begins = _group_begins(metadata)
    if not begins or begins != sorted(set(begins)):
        return []
    stretches: list[Stretch] = []
    begin = records = 0
    for group, following in enumerate([*begins[1:], raw.seek(0, io.SEEK_END)]):
        records += metadata.row_group(group).num_rows
        if following - begin >= stretch_bytes or group == len(begins) - 1:
            stretches.append(Stretch(begin, following, records))
            begin, records = following, 0
    return stretches


def read_row_groups(raw: BinaryIO, begin: int, end: int, config: PrepConfig) -> Iterator[Record]:
    """One record for each row of the row groups that begin between two bytes of a file."""
    parquet = pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True)
    groups = [group for group, byte in enumerate(_group_begins(parquet.metadata)) if begin <= byte < end]
    yield from _rows_of_groups(parquet, groups, config.text_key)


def _group_begins(metadata: pyarrow.parquet.FileMetaData) -> list[int]:
    """The first byte of each row group."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    columns = [[group.column(i) for i in range(group.num_columns)] for group in groups]
    return [min(column.dictionary_page_offset or column.data_page_offset for column in group) for group in columns]


def _rows_of_groups(parquet: pyarrow.parquet.ParquetFile, groups: Iterable[int], text_key: str) -> Iterator[Record]:
    first_row = 1
    for group in groups:
        yield from _rows_of_group(parquet, group, first_row, text_key)
        first_row += parquet.metadata.row_group(group).num_rows


def _rows_of_group(parquet: pyarrow.parquet.ParquetFile, group: int, first_row: int, text_key: str) -> Iterator[Record]:
    """The rows of one row group, up to damage: what follows on a damaged page is found again at the next row group."""
    row, end = first_row, first_row + parquet.metadata.row_group(group).num_rows
    column, *inner = _path(parquet.schema_arrow, text_key)
    try:
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=[text_key]):
            texts = pyarrow.compute.struct_field(batch.column(column), inner) if inner else batch.column(column)
            # As bytes: one row that is not UTF-8 must not make its whole batch unreadable.
            for value in texts.cast(pyarrow.large_binary()):
                data = value.as_py()
                yield row, Skip("malformed", f"no {text_key!r} in this row") if data is None else decoded(data)
                row += 1
    except (OSError, pyarrow.ArrowException) as error:
        yield row, Skip("damaged", f"{end - row:,} rows, up to the next row group, cannot be read: {error}", end - row)


def _path(schema: pyarrow.Schema, text_key: str) -> list[str]:
    """The column of a key and the fields inside of it: a key with points leads into structs, unless it is a column as it is."""
    return [text_key] if text_key in schema.names else text_key.split(".")


PARQUET = Format(
    (".parquet",),
    read_rows,
    (pyarrow.ArrowException,),
    check=check_column,
    cut=cut_at_row_groups,
    read_stretch=read_row_groups,
)
