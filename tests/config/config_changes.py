"""Configs for tests: a preset with some keys changed."""

import dataclasses
from typing import Any, TypeVar

from based_megatron.config import Config, load_config

T = TypeVar("T")


def changed(config: T, values: dict[str, Any]) -> T:
    """The config with `section.field` keys replaced."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        new = changed(getattr(config, section), {name: value}) if name else value
        config = dataclasses.replace(config, **{section: new})  # type: ignore[type-var]
    return config


def legal(preset: str = "tiny") -> Config:
    """A preset with a data folder named, so that it can run."""
    return changed(load_config(preset), {"data.path": "corpus"})
