"""Every format that `based prep` knows."""

from collections.abc import Sequence

from based_megatron.data_prep.config import TEXT_SUFFIXES, PrepConfig
from based_megatron.data_prep.formats.base import Format
from based_megatron.data_prep.formats.jsonl import JSON, JSONL
from based_megatron.data_prep.formats.parquet import PARQUET
from based_megatron.data_prep.formats.text import plain_text


def known_formats(config: PrepConfig) -> tuple[Format, ...]:
    """A file is read by the first format that holds its name; plain text, whose endings are a setting, comes last."""
    return (JSONL, JSON, PARQUET, plain_text(text_suffixes(config.suffixes)))


def text_suffixes(suffixes: Sequence[str]) -> tuple[str, ...]:
    """The endings that `--suffixes` means: those with a + come on top of the others, or of the default if there are no others."""
    plain = [suffix for suffix in suffixes if not suffix.startswith("+")]
    added = [suffix.removeprefix("+") for suffix in suffixes if suffix.startswith("+")]
    return (*(plain or TEXT_SUFFIXES.split()), *added)
