"""Every format that `based prep` knows."""

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.formats.base import Format
from based_megatron.data_prep.formats.jsonl import JSONL
from based_megatron.data_prep.formats.parquet import PARQUET
from based_megatron.data_prep.formats.text import plain_text


def known_formats(config: PrepConfig) -> tuple[Format, ...]:
    """A file is read by the first format that holds its name; plain text, whose endings are a setting, comes last."""
    return (JSONL, PARQUET, plain_text(config.suffixes))
