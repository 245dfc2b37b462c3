"""What each setting may be: its limits are written at it in the schema, and one walk over a config checks them all."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from based_megatron.errors import ConfigError

T = TypeVar("T")
LARGEST_WHOLE_NUMBER = 2**63 - 1
LARGEST_FP32 = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True)
class Range:
    """The legal values of a number. A number whose field names none is finite and at least 0: `Range(at_least=0)`."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    multiple_of: int | None = None

    def holds(self, value: float) -> bool:
        """Whether a number is within the bounds; nan is not."""
        return (
            value == value
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        parts = (
            ("at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
            ("a multiple of", self.multiple_of),
        )
        return " and ".join(f"{words} {bound}" for words, bound in parts if bound is not None)


@dataclass(frozen=True)
class FilePath:
    """Marks a text as the path of a file or folder; empty means none, if that is allowed."""

    may_be_empty: bool = True


NOT_NEGATIVE = Range(at_least=0)


@dataclass(frozen=True)
class Setting:
    """One value of a config."""

    key: str
    """Its name from the top, such as optimizer.lr."""
    value: Any
    limits: tuple[Any, ...]
    """What the schema says of it besides its type: a Range, a FilePath, or nothing."""


def settings_of(config: Any, prefix: str = "") -> Iterator[Setting]:
    """Every value of a dataclass of settings, sections and lists of sections included, in the order of the schema."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{key}.")
        elif _is_list_of_sections(value):
            for index, entry in enumerate(value):
                yield from settings_of(entry, f"{key}.{index}.")
        else:
            yield Setting(key, value, _limits(hints[field.name]))


def check_limits(config: Any, name: Callable[[str], str] = str) -> None:
    """Raise ConfigError for the first value of a dataclass of settings that is outside its limits.

    name: how the message names a key.
    """
    for setting in settings_of(config):
        key, value = name(setting.key), setting.value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_number(key, value, setting.limits)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                _check_text(key, text, setting.limits)


def flag(key: str) -> str:
    """The command line's name of a key that has no sections: `hang_seconds` is --hang-seconds."""
    return f"--{key.replace('_', '-')}"


def absolute_paths(config: T) -> T:
    """A copy of the settings with every path absolute, so that they mean the same files from any working directory; URLs stay."""
    hints = get_type_hints(type(config), include_extras=True)
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = absolute_paths(value)
        elif _is_list_of_sections(value):
            changes[field.name] = tuple(map(absolute_paths, value))
        elif value and any(isinstance(limit, FilePath) for limit in _limits(hints[field.name])):
            changes[field.name] = value if "://" in value else os.path.abspath(value)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _is_list_of_sections(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and dataclasses.is_dataclass(value[0])


def _limits(hint: Any) -> tuple[Any, ...]:
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def _check_number(key: str, value: float, limits: tuple[Any, ...]) -> None:
    legal = next((limit for limit in limits if isinstance(limit, Range)), NOT_NEGATIVE)
    whole = isinstance(value, int)
    fits = abs(value) <= (LARGEST_WHOLE_NUMBER if whole else LARGEST_FP32)
    if fits and legal.holds(value):
        return
    kind = "whole number" if whole else "finite number"
    if not fits and (whole or math.isfinite(value)):
        kind += " of 64 bits" if whole else " of 32 bits"
    # An absurd integer may have more digits than Python prints.
    shown = value if fits or not isinstance(value, int) else f"an integer of {value.bit_length()} bits"
    raise ConfigError(f"{key} is {shown}, but must be a {kind} {legal}; change {key}")


def _check_text(key: str, text: str, limits: tuple[Any, ...]) -> None:
    path = next((limit for limit in limits if isinstance(limit, FilePath)), None)
    if path and not (text or path.may_be_empty):
        raise ConfigError(f"{key} is empty, but must name a folder; set {key}")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{key} is {ascii(text)[:80]}, which is not text; change {key}")
    if path and not text.isprintable():
        raise ConfigError(f"{key} is {text[:80]!r}, which has characters that cannot be printed; change {key}")
