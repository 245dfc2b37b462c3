"""What a start would refuse, all of it at once: layout, mixers, data, tokenizer, disk. Nothing is written."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from based_megatron.config import Config
from based_megatron.config.validate import validate
from based_megatron.data.manifest import verify
from based_megatron.errors import BasedError, ConfigError
from based_megatron.model.check import check_mixers
from based_megatron.train.accept import corpora

GIB = 2**30


def layout_refusals(config: Config, ranks: int) -> list[str]:
    """Reasons why this config cannot run on so many ranks, whatever its data."""
    return _messages(lambda: validate(with_data(config), ranks), lambda: check_mixers(config))


def with_data(config: Config) -> Config:
    """The config with a name for its data, so that its layout can be looked at before there is any."""
    if config.data.path or config.data.sources:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path="not given"))


def data_refusals(config: Config, read_all: bool) -> list[str]:
    """Reasons why the prepared data cannot be used. read_all: compare every byte with its hash."""
    if not config.data.path and not config.data.sources:
        return ["no data: set data.path to a folder written by `based prep`"]
    return _messages(lambda: _check_data(config, read_all))


def disk_refusals(config: Config, save_bytes: int) -> list[str]:
    """Whether the run folder's disk has room for the checkpoints that are kept, and for one more while it is written."""
    return _messages(lambda: _check_disk(config, save_bytes))


def kept_bytes(config: Config, save_bytes: int) -> int:
    """Bytes of checkpoints at most."""
    settings, steps = config.checkpoint, config.train.steps
    saves = 1 + (steps // settings.interval_steps if settings.interval_steps else 0)
    if not settings.keep_last:
        return save_bytes * saves
    may_roll_back = config.guards.spike != "off" and config.guards.rollback
    # The newest checkpoint that is proven good, and the next one that will be.
    proven = (
        2 if may_roll_back and (settings.keep_last - 1) * settings.interval_steps < config.guards.window_steps else 0
    )
    kept = settings.keep_last + 1 + proven + (steps // settings.keep_every_steps if settings.keep_every_steps else 0)
    # How many saves there are by time is not known.
    return save_bytes * (kept if settings.interval_seconds else min(saves, kept))


def _check_data(config: Config, read_all: bool) -> None:
    found = corpora(config)
    if read_all:
        for manifest in found.manifests:
            verify(manifest)


def _check_disk(config: Config, save_bytes: int) -> None:
    folder = Path(config.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, kept_bytes(config, save_bytes)
    if free < needed:
        raise ConfigError(
            f"{folder} has {free / GIB:.1f} GiB free but the checkpoints of this run need {needed / GIB:.1f} GiB; change run_dir, or "
            f"lower checkpoint.keep_last {config.checkpoint.keep_last}"
        )


def _messages(*checks: Callable[[], None]) -> list[str]:
    found = []
    for check in checks:
        try:
            check()
        except BasedError as error:
            found.append(str(error))
    return found
