"""Configs for tests: a preset with some keys changed."""

import dataclasses
from typing import Any

from based_megatron.config import Config, load_config


def changed(config: Config, values: dict[str, Any]) -> Config:
    """The config with `section.field` keys replaced."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def legal(preset: str = "tiny") -> Config:
    """A preset with a data folder named, so that it can run."""
    return changed(load_config(preset), {"data.path": "corpus"})
