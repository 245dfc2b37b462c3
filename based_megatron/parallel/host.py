"""Changes to the process that hosts us, undone at the end of a `with` block.

Megatron-core and DeepSpeed expect some settings of the whole process. A program that imports this package keeps its own.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Other values for attributes of a module or an object."""
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Other values for environment variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def log_level(logger: str, level: int) -> Iterator[None]:
    """Another level for a logger, by its name."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(level)
    try:
        yield
    finally:
        found.setLevel(before)


@contextmanager
def without_warnings(*modules: str) -> Iterator[None]:
    """No warnings from modules whose names match one of these patterns, and none of torch's about renamed collectives.

    Newer torch renamed collectives that Megatron-core and DeepSpeed call by their old names.
    """
    with warnings.catch_warnings():
        for module in modules:
            warnings.filterwarnings("ignore", module=module)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        yield
